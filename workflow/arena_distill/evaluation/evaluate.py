"""Compute every figure of a run: the deployed model, judges, baselines on the same rows, quantisation.

The headline is the score of the deployed model on battles that nothing was trained on: the test battles, if
their votes are known, else the held-out ones (``folds.holdout``). Scores out of fold are a diagnostic of
other models, the folds'; those of students may be optimistic.

Log loss is in nats, the mean over battles of −Σ vote · log p; lower is better. A figure means little
alone, so every judge stands between four baselines scored on the very rows it is scored on:

- `class_prior`: the shares of the votes among the rows that train a fold;
- `length`: a logistic regression on how much longer one answer is than the other;
- `surface`: boosted trees over what shows on the surface of a battle (``scoring.surface_trees``);
- `bayes`: the true vote probabilities, known for synthetic battles only: nobody does better, but
  for luck. There each judge is also compared with the truth itself.

Beside its scores stand a judge's calibration, as it is and as temperature and vector scaling would
mend it, and its position bias; the final judge is also scored by slice. How figures are computed is in
``metrics``.

What is fitted is fitted on the rows that train a fold and scored on those that validate it. Files
are joined by key: a row that is missing, or there twice, ends the job.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from arena_distill.battles.folds import fold_settings, held_out_rows
from arena_distill.battles.style_features import LENGTHS
from arena_distill.battles.votes import Solution
from arena_distill.config.phases.evaluation import EvaluationSettings
from arena_distill.config.vocabulary import ModelKind
from arena_distill.deployment import quantization_error
from arena_distill.errors import InputError
from arena_distill.evaluation.baselines import class_prior, length_regression
from arena_distill.evaluation.cascade import _cascade, _settings
from arena_distill.evaluation.contradictions import contradicted_votes
from arena_distill.evaluation.judges import calibration_figures, judge_figures, judge_warning
from arena_distill.evaluation.out_of_fold import Run, _fold
from arena_distill.evaluation.ranking import rank_models
from arena_distill.evaluation.slices import slice_scores
from arena_distill.evaluation.tables import write_tables
from arena_distill.evaluation.voters import voter_scores
from arena_distill.files.artifacts import (
    REBUILD,
    provenance,
    read_json,
    read_parquet,
    write_json,
    write_parquet,
)
from arena_distill.files.keys import key, locate
from arena_distill.files.logits import ids_path
from arena_distill.files.probabilities import read_probabilities
from arena_distill.metrics import (
    Figures,
    deployed_score,
    gap_closed,
    log_probabilities,
    losses,
    mean_over_views,
    paired_difference,
    scores,
    truth_scores,
)
from arena_distill.prediction.calibration import all_scores
from arena_distill.scoring.logits import read_out_of_fold
from arena_distill.verdicts import WINNERS, Votes


def evaluate(
    folds: Path,
    battles: Path,
    logits: Mapping[str, Sequence[Path]],
    output: Path,
    tables: Path,
    *,
    settings: EvaluationSettings,
    surface: Path,
    rejected: Path | None = None,
    predictions: Sequence[Path] = (),
    test_votes: Path | None = None,
    drift: Path | None = None,
    truth: Path | None = None,
    audit: Path | None = None,
    calibrations: Sequence[Path] = (),
    stacks: Sequence[Path] = (),
    test_logits: Path | None = None,
    benchmarked: Path | None = None,
) -> None:
    """Compute every figure of a run → `metrics.json`, `contradicted.parquet`, and the tables of
    :func:`write_tables`.

    Args:
        folds: `folds.parquet`.
        battles: `battles.parquet`.
        logits: judge → its files `fold_<k>.npy`, one per fold, in any order.
        output: where `metrics.json` goes.
        tables: folder of the flat tables.
        surface: `surface.parquet`.
        rejected: `rejected.parquet`, to count the refused rows by reason.
        predictions: the final judge's, a file per model, scored where `test_votes` is given.
        test_votes: `test_votes.parquet`.
        drift: what quantising the final judge changed, as JSON.
        truth: the synthetic arena's true vote probabilities (`source`, `id`, `p_model_a`,
            `p_model_b`, with ties `p_tie`).
        audit: the leaks that :mod:`arena_distill.audit` found, as JSON.
        calibrations: the final judge's scores on held-out battles, a file per model.
        stacks: what stacks are worth (``scoring.stacks.fit_stack``), a file per stack.
        test_logits: the submitted model's scores of the test battles, for the cascade's curve.
        benchmarked: what :mod:`arena_distill.evaluation.benchmarks` found of the submitted model, as JSON.

    Raises:
        InputError: a judge or fold has no logits, or a row is missing, there twice, or unknown.
    """
    run = Run.read(folds, battles)
    votes = run.votes()
    seen = {
        name: read_out_of_fold(run.folds, logits.get(name, ()), name) for name in settings.judges
    }
    probabilities_of = {
        "class_prior": run.out_of_fold(class_prior),
        "length": run.out_of_fold(length_regression),
        "surface": read_probabilities(surface, run.keys()),
    }
    if truth is not None:
        probabilities_of["bayes"] = read_probabilities(truth, run.keys())
    parts = run.parts()
    judges = {
        name: {
            "teachers": list(teachers),
            **judge_figures(run, seen[name]),
            **calibration_figures(
                seen[name], votes, parts, run.styles[run.validation], probabilities_of.get("bayes")
            ),
        }
        for name, teachers in settings.judges.items()
    }
    for name in settings.external:
        judges[name]["external"] = True
    for name in settings.privileged:
        judges[name]["privileged"] = True
    for found in map(read_json, stacks):
        judges[found["judge"]]["stack"] = found
    for name in settings.optimistic:
        judges[name]["optimistic"] = True
    baselines: dict[str, Figures | None] = {
        name: scores(p, votes) | {"folds": run.by_fold(p)} for name, p in probabilities_of.items()
    }
    baselines.setdefault("bayes", None)
    final, names = mean_over_views(seen[settings.final]), run.names_of(run.keys())
    reference = losses(final, votes)
    compared = [(judges[name], mean_over_views(logits)) for name, logits in seen.items()]
    compared += [(baselines[name] or {}, p) for name, p in probabilities_of.items()]
    for figures, probabilities in compared:
        loss = losses(probabilities, votes)
        assert len(loss) == len(reference), "all are scored on the same battles"
        figures["gap_closed"] = gap_closed(float(votes.mean(loss)), baselines)
        figures["versus_final"] = paired_difference(loss, reference, votes, run.groups())
    for name, figures in judges.items():
        if warning := judge_warning(seen[name], figures["oof"], baselines["class_prior"] or {}):
            figures["warning"] = warning
            print(f"warning: {name} {warning}", flush=True)
    test = drifted = None
    if predictions and test_votes is not None:
        solved = Solution.read(test_votes)
        merged = "test" in settings.merged
        test, drifted = _test(
            run, predictions, settings.model, solved, surface, truth, merged=merged
        )
        test["cascade"] = None
        if test_logits is not None:
            average = _settings(predictions[0]).get("average", "logits")
            test["cascade"] = _cascade(test_logits, solved, average)
    prediction = {**_settings(predictions[0]), "model": settings.model} if predictions else None
    held_out = _held_out(run, calibrations, surface, truth) if calibrations else None
    about = provenance("evaluation", settings.model_dump(mode="json"))
    teachers = [n for n in settings.judges[settings.final] if n in seen]
    teachers = teachers or [n for n, t in settings.judges.items() if not t] or [settings.final]
    contradicted, contradictions = contradicted_votes(
        run.named(),
        {name: mean_over_views(seen[name]) for name in teachers},
        votes,
        settings.contradicted_below,
    )
    write_parquet(contradicted, tables / "contradicted.parquet", about)
    sources = pc.value_counts(run.battles["source"].cast(pa.string())).to_pylist()
    metrics: Figures = {
        "run": settings.run,
        "headline": _headline(settings.model, test, held_out),
        "rows": len(votes),
        "battles": {count["values"]: count["counts"] for count in sources},
        "rejected": _rejections(rejected),
        "folding": fold_settings(run.folds),
        "folds": [_fold(run, fold) for fold in run.fold_numbers()],
        "baselines": baselines,
        "judges": judges,
        "slices": slice_scores(names, final, probabilities_of, votes, run.groups()),
        **_people(
            names,
            {"judge": final} | probabilities_of,
            votes,
            run.groups(),
            merged="train" in settings.merged,
        ),
        "contradictions": contradictions,
        "final": _final(settings.final, settings.model, test, held_out, _gptq(drift, drifted)),
        "held_out": held_out,
        "test": test,
        "benchmarks": [] if benchmarked is None else read_json(benchmarked),
        "audit": None if audit is None else read_json(audit),
        "provenance": {
            "evaluation": about,
            "logits": {n: _settings(ids_path(paths[0])) for n, paths in logits.items()},
            "prediction": prediction,
        },
    }
    write_json(metrics, output)
    write_tables(metrics, tables)
    told = f"{settings.final} has no score on battles that nothing was trained on"
    if headline := metrics["headline"]:
        told = (
            f"{settings.final} {headline['log_loss']['value']:.4f} on {headline['rows']:,} battles"
        )
    print(f"{output}: {told}")


# --- one run --------------------------------------------------------------------------------------


def _rejections(path: Path | None) -> list[Figures]:
    """Count the refused rows of each source, by column and kind of reason."""
    if path is None:
        return []
    table = read_parquet(path, ["source", "column", "reason"])
    reason = table["reason"]
    for pattern, kind in (
        (r"^id .* is taken by .*", "id is taken by another row"),
        (r"""^is ['"].*['"], (.*) expected""", r"is something else than \1"),
        (r"(not a JSON list|not a battle): .*", r"\1"),
    ):
        reason = pc.replace_substring_regex(reason, f"(?s){pattern}", kind)
    kinds = pa.table({"source": table["source"], "column": table["column"], "reason": reason})
    counts = kinds.append_column("rows", pa.array(np.ones(len(kinds), np.int64)))
    by = kinds.column_names
    counted = counts.group_by(by, use_threads=False).aggregate([("rows", "sum")])
    return counted.rename_columns([*by, "rows"]).to_pylist()


def _held_out(run: Run, calibrations: Sequence[Path], surface: Path, truth: Path | None) -> Figures:
    """Scores of the deployed models and of the baselines on the held-out battles."""
    rows = held_out_rows(run.folds)
    votes, keys = run.votes(rows), key(run.folds.take(pa.array(rows)))
    known = {
        "class_prior": class_prior(*run.trained(), run.lengths[rows]),
        "length": length_regression(*run.trained(), run.lengths[rows]),
        "surface": read_probabilities(surface, keys),
    }
    if truth is not None:
        known["bayes"] = read_probabilities(truth, keys)
    baselines: dict[str, Figures | None] = {name: scores(p, votes) for name, p in known.items()}
    baselines.setdefault("bayes", None)
    models = {found["model"]: found for found in map(read_json, calibrations)}
    for path, found in zip(calibrations, models.values(), strict=True):
        if found["rows"] != len(rows):
            raise InputError(
                f"{path}: scores of {found['rows']:,} battles, but {len(rows):,} are held out; {REBUILD}"
            )
    return {"rows": len(rows), "baselines": baselines, "models": models}


def _headline(model: ModelKind, test: Figures | None, held_out: Figures | None) -> Figures | None:
    """The deployed model's score on battles that nothing was trained on; None if there are none."""
    if test:
        battles, score, baselines = "test", test["score"], test["baselines"]
    elif held_out:
        battles, baselines = "held_out", held_out["baselines"]
        score = held_out["models"][model]["deployed"]
    else:
        return None
    return {
        "battles": battles,
        "model": model,
        **score,
        "baselines": {name: found and found["log_loss"] for name, found in baselines.items()},
        "gap_closed": gap_closed(score["log_loss"]["value"], baselines),
    }


def _test(
    run: Run,
    predictions: Sequence[Path],
    model: str,
    solved: Solution,
    surface: Path,
    truth: Path | None,
    *,
    merged: bool,
) -> tuple[Figures, Figures | None]:
    """Scores of every variant on the test battles, and of the baselines; what is submitted by slice.

    Returns:
        These, and the drift of what is submitted from the merged to the quantised model, if both are
        scored.
    """
    votes, keys = solved.votes, solved.keys
    seen: dict[str, dict[str, np.ndarray]] = {}
    names: dict[str, str] = {}
    for file in predictions:
        winners = WINNERS[: votes.classes]
        table = read_parquet(file, ["id", "model", "variant", *winners, "submitted"])
        views = table.group_by(["model", "variant", "submitted"], use_threads=False).aggregate([])
        for view in views.to_pylist():
            variant = view["variant"]
            part = table.filter(pc.field("variant") == variant)
            rows = locate(solved.ids, part["id"].combine_chunks(), f"{file}, {variant}")
            probabilities = np.column_stack([part[name].to_numpy() for name in winners])[rows]
            seen.setdefault(view["model"], {})[variant] = probabilities
            if view["submitted"]:
                names[view["model"]] = variant
    if model not in names:
        raise InputError(f"{predictions[0].parent}: no variant of {model} is marked as submitted")
    models = {
        name: {variant: scores(p, votes) for variant, p in by_variant.items()}
        for name, by_variant in seen.items()
    }
    learned = *run.voted(), run.styles_of(keys)[:, :LENGTHS]
    known = {"class_prior": class_prior(*learned), "length": length_regression(*learned)}
    known["surface"] = read_probabilities(surface, keys)
    if truth is not None:
        known["bayes"] = read_probabilities(truth, keys)
    baselines: dict[str, Figures | None] = {name: scores(p, votes) for name, p in known.items()}
    baselines.setdefault("bayes", None)
    best, chosen = models[model][names[model]], seen[model][names[model]]
    battles = run.names_of(keys)
    logs = {name: log_probabilities(seen[name][variant]) for name, variant in names.items()}
    drifted = None
    if len(logs) > 1:
        drifted = quantization_error.drift(logs["merged"], logs["gptq"], votes)
    return {
        "rows": len(votes),
        "submitted": {"model": model, "variant": names[model]},
        "score": deployed_score(chosen, votes, solved.groups),
        "calibration": {n: _by_calibration(seen[n], v, votes) for n, v in names.items()},
        "baselines": baselines,
        "models": models,
        "slices": slice_scores(battles, chosen, known, votes, solved.groups),
        **_people(battles, {"judge": chosen} | known, votes, solved.groups, merged=merged),
        "gap_closed": gap_closed(best["log_loss"], baselines),
        "truth": truth_scores(known["bayes"], chosen, votes) if "bayes" in known else None,
    }, drifted


def _people(
    battles: pa.Table,
    judged: Mapping[str, np.ndarray],
    votes: Votes,
    groups: np.ndarray,
    *,
    merged: bool,
) -> Figures:
    """The judge beside people: how it ranks models (the class prior has no ranking), and single voters."""
    ranking = {name: p for name, p in judged.items() if name != "class_prior"}
    return {
        "ranking": rank_models(battles, ranking, votes, groups),
        "voters": voter_scores(votes, judged, groups) if merged else None,
    }


def _by_calibration(variants: dict[str, np.ndarray], submitted: str, votes: Votes) -> Figures:
    """All scores of the submitted views: uncalibrated (`raw`) and, if it is so, as calibrated."""
    lengths, orders, *method = submitted.split("/")
    shown = {"raw": variants[f"{lengths}/{orders}"]} | dict.fromkeys(method, variants[submitted])
    return {name: all_scores(p, votes) for name, p in shown.items()}


def _final(
    judge: str,
    model: ModelKind,
    test: Figures | None,
    held_out: Figures | None,
    gptq: Figures | None,
) -> Figures:
    """The final judge: the submitted model's variants, their calibration, the drift of quantisation."""
    submitted = test["submitted"] if test else None
    variants = test["models"][submitted["model"]] if test and submitted else {}
    method = held_out["models"][model]["method"] if held_out else "none"
    return {
        "judge": judge,
        "submitted": submitted,
        "variants": variants,
        "calibration": None if method == "none" else method,
        "gptq": gptq,
    }


def _gptq(path: Path | None, test: Figures | None) -> Figures | None:
    """What quantising changed: on training battles, and in `test` on the test battles."""
    if path is None:
        return None
    figures = read_json(path)
    names = ("kl", "flip_rate", "bytes", "bytes_before")
    absent = [name for name in names if name not in figures]
    if absent:
        raise InputError(f"{path}: no {', '.join(absent)}; delete it and run the workflow again")
    return {**figures, "test": test}
