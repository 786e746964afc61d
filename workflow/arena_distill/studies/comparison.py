"""Compare judges on the same battles, with intervals for their differences.

Every difference is paired (two judges, the same battle) and has an interval from a bootstrap over whole
prompts: battles with one prompt are not independent, so a bootstrap over battles would be too narrow. It
covers the luck of the battles, not that of training: another seed may differ by more (`compare.seeds`).

References:
    Efron and Tibshirani 1993, An Introduction to the Bootstrap (percentile intervals).
    Field and Welsh 2007, Bootstrapping clustered data, JRSS B 69(3).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from arena_distill.battles.style_features import LENGTHS
from arena_distill.battles.votes import Solution
from arena_distill.config.phases.studies import CompareSettings, Entry
from arena_distill.config.vocabulary import CalibrationMethod
from arena_distill.errors import InputError
from arena_distill.evaluation.baselines import class_prior, length_regression
from arena_distill.evaluation.out_of_fold import Run
from arena_distill.files.artifacts import provenance, read_json, write_json
from arena_distill.files.keys import key, locate
from arena_distill.files.logits import read_logits
from arena_distill.files.probabilities import read_probabilities
from arena_distill.layout import Layout
from arena_distill.metrics import (
    Figures,
    bootstrap,
    calibration_scores,
    losses,
    mean_over_views,
    position_bias,
    scores,
    softmax,
    truth_scores,
)
from arena_distill.prediction.averages import mean_of_views
from arena_distill.prediction.calibration import cross_fit, fit
from arena_distill.verdicts import Votes, logits_among

STYLE_ALONE = "style alone"
"""The name of a calibration by style without a judge."""


class _Calibrated(NamedTuple):
    """A row of the tables: a judge with a method of calibration, and the logits to fit it to."""

    label: str
    """The judge's name, or `STYLE_ALONE` for constant logits."""
    method: CalibrationMethod
    known: np.ndarray
    """Float64 (rows, classes), out of fold."""


def compare(
    run: Path,
    output: Path,
    *,
    settings: CompareSettings,
    test_votes: Path | None,
    truth: Path | None,
) -> None:
    """Compare the judges of `settings.entries` → `compare.json`.

    Args:
        run: the run's folder; of every entry its folds' adapters and logits, its merged model and that
            one's test logits are read, and of the runs in `settings.runs` the logits.
        test_votes: `test_votes.parquet`, where the votes are known.
        truth: the synthetic arena's true vote probabilities.

    Raises:
        InputError: a file is missing or damaged, or a row is missing.
    """
    files = Layout(str(run))
    data = Run.read(Path(files.folds), Path(files.battles))
    folds = data.fold_numbers()
    seen = {
        entry.label: data.judge_logits(
            entry.folds, [Path(files.logits(entry.folds, k)) for k in folds]
        )
        for entry in settings.entries
    }
    probabilities = {label: mean_over_views(logits) for label, logits in seen.items()}
    calibrated = _calibrated(seen, settings)
    parts, styles = data.parts(), data.styles[data.validation]
    for name, row in calibrated.items():
        calibrated_logits = cross_fit(row.method, row.known, data.votes(), parts, styles)
        probabilities[name] = softmax(calibrated_logits)
    probabilities |= {
        "class prior": data.out_of_fold(class_prior),
        "length regression": data.out_of_fold(length_regression),
        "surface trees": read_probabilities(Path(files.surface), data.keys()),
    }
    true = None if truth is None else read_probabilities(truth, data.keys())
    if true is not None:
        probabilities["Bayes limit"] = true
    held_out = _table(probabilities, data.votes(), data.groups(), settings, true)
    for label, logits in seen.items():
        held_out["judges"][label]["position"] = position_bias(logits, data.votes())
    test = None
    if test_votes is not None:
        test = _test(files, data, calibrated, settings, Solution.read(test_votes), truth)
    figures = {
        "run": settings.run,
        "entries": [
            {"label": e.label, "judge": e.judge, "teachers": list(e.teachers)}
            | {"against": e.against, "tested": e.tested, "optimistic": e.optimistic}
            | {"calibration": e.calibration, "repeats": e.repeats}
            | _cost(files, e, folds)
            for e in settings.entries
        ],
        "out_of_fold": held_out,
        "test": test,
        "runs": [
            part
            for other in settings.runs
            for part in _other_run(Path(other), data, seen, settings)
        ],
        "provenance": provenance("comparison", settings.model_dump(mode="json")),
    }
    write_json(figures, output)
    print(f"{output}: {len(settings.entries)} judges on {held_out['rows']:,} battles out of fold")


def calibrated_label(label: str, method: str) -> str:
    """The label of a judge in the tables, with its calibration."""
    return label if method == "none" else f"{label}, {method}"


def _calibrated(
    seen: Mapping[str, np.ndarray], settings: CompareSettings
) -> dict[str, _Calibrated]:
    """The calibrated judges, by their label in the tables."""
    found = {
        calibrated_label(entry.label, method): _Calibrated(
            entry.label, method, seen[entry.label].mean(axis=1, dtype=np.float64)
        )
        for entry in settings.entries
        if (method := entry.calibration) != "none"
    }
    if by_style := next((row for row in found.values() if row.method == "style"), None):
        found[STYLE_ALONE] = _Calibrated(STYLE_ALONE, "style", np.zeros_like(by_style.known))
    return found


def _table(
    probabilities: Mapping[str, np.ndarray],
    votes: Votes,
    groups: np.ndarray,
    settings: CompareSettings,
    true: np.ndarray | None,
) -> Figures:
    """Scores of all judges on the same rows, and every difference with its 95 % interval."""
    each = np.stack([losses(p, votes) for p in probabilities.values()])
    drawn = bootstrap(each, votes, groups, resamples=settings.resamples)
    means = votes.mean(each.T)
    judges = {}
    for i, (label, p) in enumerate(probabilities.items()):
        judges[label] = {
            **scores(p, votes),
            **calibration_scores(p, votes),
            **_interval(drawn[:, i], groups),
        }
        if true is not None:
            judges[label]["truth"] = truth_scores(true, p, votes)
    labels = list(probabilities)
    return {
        "rows": len(votes),
        "prompts": len(np.unique(groups)),
        "judges": judges,
        "differences": [
            {
                "judge": labels[a],
                "against": labels[b],
                "difference": float(means[a] - means[b]),
                **_interval(drawn[:, a] - drawn[:, b], groups),
            }
            for a in range(len(labels))
            for b in range(len(labels))
            if a != b
        ],
    }


def _interval(drawn: np.ndarray, groups: np.ndarray) -> Figures:
    """The 95 % interval of resampled figures (resamples,); None of one prompt, which shows no luck."""
    low, high = np.quantile(drawn, [0.025, 0.975]).tolist()
    return {"low": low, "high": high} if np.ptp(groups) else {"low": None, "high": None}


def _test(
    files: Layout,
    data: Run,
    calibrated: Mapping[str, _Calibrated],
    settings: CompareSettings,
    solved: Solution,
    truth: Path | None,
) -> Figures:
    """The merged models on the test battles, averaged by their recipes; also calibrated."""
    keys = solved.keys
    tested = [entry for entry in settings.entries if entry.tested]
    views = {entry.label: _test_views(files, entry.judge, keys) for entry in tested}
    averages = {entry.label: entry.prediction.average for entry in tested}
    probabilities = {label: mean_of_views(views[label], averages[label]) for label in views}
    views[STYLE_ALONE], averages[STYLE_ALONE] = (
        np.zeros((len(keys), 1, solved.votes.classes)),
        "logits",
    )
    known, styles = data.styles[data.validation], data.styles_of(keys)
    for name, row in calibrated.items():
        if row.label in views:
            calibration = fit(row.method, row.known, data.votes(), known)
            averaged = mean_of_views(views[row.label], averages[row.label])
            probabilities[name] = calibration.probabilities(averaged, styles)
    voted, lengths = data.voted(), styles[:, :LENGTHS]
    for name, baseline in (("class prior", class_prior), ("length regression", length_regression)):
        probabilities[name] = baseline(*voted, lengths)
    probabilities["surface trees"] = read_probabilities(Path(files.surface), keys)
    true = None if truth is None else read_probabilities(truth, keys)
    if true is not None:
        probabilities["Bayes limit"] = true
    return _table(probabilities, solved.votes, solved.groups, settings, true)


def _test_views(files: Layout, judge: str, keys: pa.Array) -> np.ndarray:
    """The merged model's logits of the battles of `keys`: float (rows, lengths · orders, classes)."""
    path = Path(files.test_logits(judge, "merged"))
    logits, rows = read_logits(path)
    return logits[locate(keys, key(rows), str(path))].reshape(len(keys), -1, logits.shape[-1])


def _cost(files: Layout, entry: Entry, folds: Sequence[int]) -> Figures:
    """A judge's cost: its folds' training seconds and tokens, its size, and the model's bytes."""
    folders = [Path(files.adapter(entry.folds, k)) for k in folds]
    if not folders[0].exists():  # it was not trained here
        return {"seconds": None, "tokens": None, "parameters": None, "bytes": 0}
    adapters = [read_json(folder / "metrics.json") for folder in folders]
    return {
        "seconds": sum(a["seconds"] for a in adapters),
        "tokens": sum(round(a["tokens"] * a["epochs"]) for a in adapters),
        "parameters": adapters[0]["parameters"],
        "bytes": sum(
            f.stat().st_size
            for f in Path(files.weights(entry.judge, "merged")).glob("*.safetensors")
        ),
        "teacher_weights": [a["teacher_weights"] for a in adapters if "teacher_weights" in a],
    }


def _other_run(
    other: Path, data: Run, seen: Mapping[str, np.ndarray], settings: CompareSettings
) -> Iterator[Figures]:
    """Compare the judges of another run with this one's, on the battles that both score out of fold."""
    layout = Layout(str(other))
    theirs = Run.read(Path(layout.folds), Path(layout.battles))
    ours, their_keys = data.keys(), theirs.keys()
    shared = pc.is_in(ours, their_keys).to_numpy(zero_copy_only=False)
    if not shared.any():
        raise InputError(f"config: compare.runs: {other} has no battle in common with this run")
    classes = data.votes().classes
    if theirs.votes().classes < classes:
        raise InputError(
            f"config: compare.runs: {other} knows no ties (classes: 2), this run does: leave it out"
        )
    rows = locate(ours.filter(pa.array(shared)), their_keys, str(other))
    for folder in sorted(path for path in (other / "logits").iterdir() if path.is_dir()):
        files = [Path(layout.logits(folder.name, k)) for k in theirs.fold_numbers()]
        if not all(file.exists() for file in files):
            continue
        logits = logits_among(theirs.judge_logits(folder.name, files)[rows], classes)
        probabilities = {f"{other.name}: {folder.name}": mean_over_views(logits)}
        probabilities |= {label: mean_over_views(own[shared]) for label, own in seen.items()}
        votes, groups = data.votes()[shared], data.groups()[shared]
        yield {"run": str(other), "judge": folder.name} | _table(
            probabilities, votes, groups, settings, None
        )
