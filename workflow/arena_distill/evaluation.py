"""Every figure of a run: judges, yardsticks on the same rows, test variants, quantisation.

Log loss is in nats, the mean over battles of -log p(vote); lower is better. A figure means little
alone, so every judge stands between three yardsticks scored on the very rows it is scored on:

- `class_prior`: the shares of the votes among the rows that train a fold;
- `length`: a logistic regression on how much longer one answer is than the other;
- `bayes`: the true vote probabilities, known for synthetic battles only: nobody does better, but
  for luck.

What is fitted is fitted on the rows that train a fold and scored on those that validate it. Files
are joined by key: a row that is missing, or there twice, ends the job.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from arena_distill.artifacts import (
    ids_path,
    provenance,
    read_json,
    read_logits,
    read_parquet,
    read_provenance,
    write_json,
    write_text,
)
from arena_distill.battles import read_solution
from arena_distill.errors import InputError
from arena_distill.folds import (
    dropped_extra,
    fold_settings,
    shared_prompts,
    training_rows,
    validation_rows,
)
from arena_distill.keys import key, locate
from arena_distill.orders import CLASSES, ORDERS
from arena_distill.prediction import WINNERS, softmax
from arena_distill.settings import EvaluationSettings
from arena_distill.yardsticks import (
    Yardstick,
    class_prior,
    length_features,
    length_regression,
    true_probabilities,
)

ECE_BINS = 15

JUDGE_COLUMNS = ("name", "kind", "fold", "rows", "log_loss", "accuracy")
VARIANT_COLUMNS = ("model", "variant", "rows", "log_loss", "accuracy", "submitted")

Figures = dict[str, Any]
"""A part of `metrics.json`: plain JSON values."""


def evaluate(
    folds: Path,
    battles: Path,
    logits: Mapping[str, Sequence[Path]],
    output: Path,
    tables: Path,
    *,
    settings: EvaluationSettings,
    rejected: Path | None = None,
    predictions: Path | None = None,
    solution: Path | None = None,
    drift: Path | None = None,
    truth: Path | None = None,
) -> None:
    """Compute every figure of a run → `metrics.json`, `judges.csv` and `variants.csv`.

    Args:
        folds: `folds.parquet`.
        battles: `battles.parquet`.
        logits: judge → its files `fold_<k>.npy`, one per fold, in any order.
        output: where `metrics.json` goes.
        tables: folder of the two flat tables.
        rejected: `rejected.parquet`, to count the refused rows by reason.
        predictions: the final judge's `test.parquet`, scored where `solution` is given.
        solution: the test battles' votes.
        drift: what quantising the final judge changed, as JSON.
        truth: the synthetic arena's true vote probabilities (`source`, `id`, `p_model_a`,
            `p_model_b`, `p_tie`).

    Raises:
        InputError: a judge or fold has no logits, or a row is missing, there twice, or unknown.
    """
    run = _Run.read(folds, battles)
    votes = run.votes()
    seen = {name: _judge_logits(run, name, logits.get(name, ())) for name in settings.judges}
    judges = {
        name: {"teachers": list(teachers), **_judge(run, seen[name])}
        for name, teachers in settings.judges.items()
    }
    yardsticks = {
        "class_prior": run.out_of_fold(class_prior),
        "length": run.out_of_fold(length_regression),
    }
    if truth is not None:
        yardsticks["bayes"] = true_probabilities(truth, run.keys())
    baselines: dict[str, Figures | None] = {
        name: scores(p, votes) | {"folds": run.by_fold(p)} for name, p in yardsticks.items()
    }
    baselines.setdefault("bayes", None)
    reference = losses(_both_orders(seen[settings.final]), votes)
    compared = [(judges[name], _both_orders(logits)) for name, logits in seen.items()]
    compared += [(baselines[name] or {}, p) for name, p in yardsticks.items()]
    for figures, probabilities in compared:
        loss = losses(probabilities, votes)
        assert len(loss) == len(reference), "all are scored on the same battles"
        figures["gap_closed"] = gap_closed(float(loss.mean()), baselines)
        figures["versus_final"] = paired_difference(loss, reference, run.groups())
    test = None
    if predictions is not None and solution is not None:
        test = _test(run, predictions, solution, truth)
    sources = pc.value_counts(run.battles["source"].cast(pa.string())).to_pylist()
    metrics = {
        "run": settings.run,
        "rows": len(votes),
        "battles": {count["values"]: count["counts"] for count in sources},
        "rejected": _rejections(rejected),
        "folding": fold_settings(run.folds),
        "folds": [_fold(run, fold) for fold in run.fold_numbers()],
        "baselines": baselines,
        "judges": judges,
        "final": _final(settings.final, test, drift),
        "test": test,
        "provenance": {
            "evaluation": provenance("evaluation", settings.model_dump(mode="json")),
            "logits": {n: _settings(ids_path(paths[0])) for n, paths in logits.items()},
            "prediction": None if predictions is None else _settings(predictions),
        },
    }
    write_json(metrics, output)
    write_text(_csv(judge_records(metrics), JUDGE_COLUMNS), tables / "judges.csv")
    write_text(_csv(variant_records(metrics), VARIANT_COLUMNS), tables / "variants.csv")
    final = judges[settings.final]["oof"]
    print(
        f"{output}: {settings.final} {final['log_loss']:.4f} on {len(votes):,} battles out of fold"
    )


# --- scores ---------------------------------------------------------------------------------------


def losses(probabilities: np.ndarray, votes: np.ndarray) -> np.ndarray:
    """Log loss of every battle, in nats: float64 (rows,) of probabilities (rows, 3), votes (rows,).

    As in scikit-learn, a probability of 0 counts as the smallest step of float64, 2.2e-16.
    """
    given = np.take_along_axis(probabilities.astype(np.float64), votes[:, None], axis=1)[:, 0]
    return -np.log(given.clip(min=np.finfo(np.float64).eps))


def scores(probabilities: np.ndarray, votes: np.ndarray) -> Figures:
    """Row count, mean log loss and accuracy of probabilities (rows, 3) against votes (rows,)."""
    return {
        "rows": len(votes),
        "log_loss": float(losses(probabilities, votes).mean()),
        "accuracy": float((probabilities.argmax(axis=1) == votes).mean()),
    }


def paired_difference(loss: np.ndarray, reference: np.ndarray, groups: np.ndarray) -> Figures:
    """Mean difference of two losses on the same battles, with its 95 % interval.

    Battles with the same prompt are not independent: the interval is the normal one, by a standard
    error that is robust to clusters.

    Args:
        loss, reference: float (rows,), of the same battles in the same order.
        groups: int (rows,), the battle's prompt.

    References:
        Cameron and Miller 2015, A Practitioner's Guide to Cluster-Robust Inference.
    """
    difference = loss - reference
    mean = difference.mean()
    cluster = np.unique(groups, return_inverse=True)[1]
    sums = np.bincount(cluster, difference - mean)
    correction = len(sums) / max(len(sums) - 1, 1)
    half = 1.96 * np.sqrt(correction * (sums**2).sum()) / len(difference)
    return {"difference": float(mean), "low": float(mean - half), "high": float(mean + half)}


def reliability(probabilities: np.ndarray, votes: np.ndarray) -> list[Figures]:
    """Confidence and accuracy of the verdicts, in 15 bins of equal width: the reliability diagram.

    A verdict is the most probable class, its confidence that class's probability. A bin holds the
    verdicts with `lower` < confidence <= `upper`; empty ones are left out.

    References:
        Guo et al. 2017, On Calibration of Modern Neural Networks, arXiv:1706.04599.
    """
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == votes
    number = np.clip(np.ceil(confidence * ECE_BINS).astype(np.int64) - 1, 0, ECE_BINS - 1)
    rows, confidences, rights = (
        np.bincount(number, weights, minlength=ECE_BINS) for weights in (None, confidence, right)
    )
    return [
        {
            "lower": i / ECE_BINS,
            "upper": (i + 1) / ECE_BINS,
            "rows": int(rows[i]),
            "confidence": float(confidences[i] / rows[i]),
            "accuracy": float(rights[i] / rows[i]),
        }
        for i in np.flatnonzero(rows).tolist()
    ]


def calibration_error(bins: Sequence[Figures]) -> float:
    """The expected calibration error (ECE): mean |accuracy - confidence| of a reliability diagram.

    Bins weigh as much as they have rows. 0 is perfect; it also depends on the number of bins, so
    compare only what was computed alike.
    """
    rows = sum(b["rows"] for b in bins)
    return float(sum(b["rows"] * abs(b["accuracy"] - b["confidence"]) for b in bins) / rows)


def gap_closed(log_loss: float, baselines: Mapping[str, Figures | None]) -> float | None:
    """How far from the class prior (0) to the Bayes limit (1) a log loss is; None where unknown."""
    prior, bayes = baselines["class_prior"], baselines["bayes"]
    if prior is None or bayes is None or prior["log_loss"] == bayes["log_loss"]:
        return None
    gap = prior["log_loss"] - bayes["log_loss"]
    return float((prior["log_loss"] - log_loss) / gap)


# --- one run --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Run:
    """The battles of a run, and which of them validate.

    folds: `folds.parquet`.
    battles: `battles.parquet` without its prompts.
    lengths: float64 (rows of `folds`, 4), :func:`length_features`.
    validation: positions in `folds` of the out-of-fold rows: what every score is computed on.
    """

    folds: pa.Table
    battles: pa.Table
    lengths: np.ndarray
    validation: np.ndarray

    @classmethod
    def read(cls, folds_path: Path, battles_path: Path) -> _Run:
        folds = read_parquet(folds_path)
        battles = read_parquet(battles_path, ["id", "source", "response_a", "response_b"])
        keys = key(folds)
        locate(keys, keys, str(folds_path))  # no row is there twice
        rows = locate(keys, key(battles), str(battles_path))
        validation = np.flatnonzero(folds["fold"].to_numpy() >= 0)
        lengths = length_features(battles.take(pa.array(rows)))
        return cls(folds, battles, lengths, validation)

    def keys(self) -> pa.Array:
        """Keys of the out-of-fold rows."""
        return key(self.folds.select(["id", "source"]).take(pa.array(self.validation)))

    def fold_numbers(self) -> list[int]:
        return np.unique(self.folds["fold"].to_numpy()[self.validation]).tolist()

    def votes(self, rows: np.ndarray | None = None) -> np.ndarray:
        """Votes of the given rows of `folds`, by default of the out-of-fold rows: int64."""
        labels = self.folds["label"].to_numpy().astype(np.int64)
        return labels[self.validation if rows is None else rows]

    def groups(self) -> np.ndarray:
        """Prompts of the out-of-fold rows, as numbers: int64."""
        return self.folds["group"].to_numpy()[self.validation]

    def out_of_fold(self, yardstick: Yardstick) -> np.ndarray:
        """Probabilities of the out-of-fold rows, each from the rows that train its fold."""
        probabilities = np.empty((len(self.folds), len(CLASSES)))
        for fold in self.fold_numbers():
            training, rows = training_rows(self.folds, fold), validation_rows(self.folds, fold)
            seen = self.lengths[training], self.votes(training)
            probabilities[rows] = yardstick(*seen, self.lengths[rows])
        return probabilities[self.validation]

    def by_fold(self, probabilities: np.ndarray) -> list[Figures]:
        """Scores per fold of the out-of-fold rows' probabilities."""
        fold, votes = self.folds["fold"].to_numpy()[self.validation], self.votes()
        return [
            {"fold": k, **scores(probabilities[fold == k], votes[fold == k])}
            for k in self.fold_numbers()
        ]


def _fold(run: _Run, fold: int) -> Figures:
    return {
        "fold": fold,
        "training_rows": len(training_rows(run.folds, fold)),
        "validation_rows": len(validation_rows(run.folds, fold)),
        "dropped_extra": dropped_extra(run.folds, fold),
        "shared_prompts": shared_prompts(run.folds, fold),
    }


def _rejections(path: Path | None) -> list[Figures]:
    """How many rows of each source were refused, by column and kind of reason."""
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


# --- one judge ------------------------------------------------------------------------------------


def _judge(run: _Run, logits: np.ndarray) -> Figures:
    """The figures of one judge: the mean of both orders' logits, and each order alone."""
    votes = run.votes()
    probabilities = _both_orders(logits)
    bins = reliability(probabilities, votes)
    verdicts = logits.argmax(axis=-1)
    return {
        "folds": run.by_fold(probabilities),
        "oof": scores(probabilities, votes) | {"ece": calibration_error(bins)},
        "orders": {order: scores(softmax(logits[:, i]), votes) for i, order in enumerate(ORDERS)},
        "order_flip_rate": float((verdicts[:, 0] != verdicts[:, 1]).mean()),
        "reliability": bins,
    }


def _both_orders(logits: np.ndarray) -> np.ndarray:
    """Probabilities by the mean of both orders' logits (rows, orders, 3): float64 (rows, 3)."""
    return softmax(logits.mean(axis=1, dtype=np.float64))


def _judge_logits(run: _Run, name: str, paths: Sequence[Path]) -> np.ndarray:
    """A judge's out-of-fold logits: float32 (out-of-fold rows, orders, 3)."""
    logits = np.empty((len(run.folds), len(ORDERS), len(CLASSES)), np.float32)
    files = {_fold_number(path): path for path in paths}
    expected = run.fold_numbers()
    if len(files) < len(paths) or sorted(files) != expected:
        given = ", ".join(map(str, paths)) or "none"
        raise InputError(f"judge {name}: logits of the folds {expected} expected, got {given}")
    for fold, path in files.items():
        found, ids = read_logits(path)
        if found.shape[1:] != logits.shape[1:]:
            raise InputError(f"{path}: {found.shape[1:]} logits a row, {logits.shape[1:]} expected")
        if "validation" not in ids.column_names:
            raise InputError(f"{ids_path(path)}: no column validation")
        # Training and extra rows lie in the same file for students; they are no fold's validation.
        mine = np.flatnonzero(ids["validation"].to_numpy())
        available = key(ids.take(pa.array(mine)))
        rows = validation_rows(run.folds, fold)
        wanted = key(run.folds.select(["id", "source"]).take(pa.array(rows)))
        logits[rows] = found[mine[locate(wanted, available, str(ids_path(path)))]]
        if len(available) != len(wanted):
            foreign = available.filter(pc.invert(pc.is_in(available, wanted)))
            raise InputError(
                f"{ids_path(path)}: {len(foreign)} validation rows are not of fold {fold}, "
                f"{foreign[0]} among them"
            )
    return logits[run.validation]


def _fold_number(path: Path) -> int:
    match = re.fullmatch(r"fold_(\d+)\.npy", path.name)
    if match is None:
        raise InputError(f"{path}: logits of a fold are named fold_<k>.npy")
    return int(match[1])


# --- test battles and quantisation ----------------------------------------------------------------


def _test(run: _Run, predictions: Path, solution: Path, truth: Path | None) -> Figures:
    """Scores of every variant on the test battles with a known vote, and of the yardsticks."""
    solved = read_solution(solution)
    votes = solved["label"].to_numpy().astype(np.int64)
    ids = solved["id"].combine_chunks()
    table = read_parquet(predictions, ["id", "model", "variant", *WINNERS, "submitted"])
    models: dict[str, dict[str, Figures]] = {}
    submitted = {}
    views = table.group_by(["model", "variant", "submitted"], use_threads=False).aggregate([])
    for view in views.to_pylist():
        model, variant = view["model"], view["variant"]
        part = table.filter((pc.field("model") == model) & (pc.field("variant") == variant))
        rows = locate(ids, part["id"].combine_chunks(), f"{predictions}, {model} {variant}")
        probabilities = np.column_stack([part[name].to_numpy() for name in WINNERS])
        models.setdefault(model, {})[variant] = scores(probabilities[rows], votes)
        if view["submitted"]:
            submitted = {"model": model, "variant": variant}
    keys = key(pa.table({"id": ids, "source": pa.repeat("test", len(ids))}))
    rows = locate(keys, key(run.battles), "battles")
    lengths = length_features(run.battles.take(pa.array(rows)))
    everything = run.votes(np.arange(len(run.folds)))
    baselines = {
        "class_prior": scores(class_prior(run.lengths, everything, lengths), votes),
        "length": scores(length_regression(run.lengths, everything, lengths), votes),
        "bayes": None if truth is None else scores(true_probabilities(truth, keys), votes),
    }
    if not submitted:
        raise InputError(f"{predictions}: no variant is marked as submitted")
    best = models[submitted["model"]][submitted["variant"]]
    return {
        "rows": len(votes),
        "submitted": submitted,
        "baselines": baselines,
        "models": models,
        "gap_closed": gap_closed(best["log_loss"], baselines),
    }


def _final(judge: str, test: Figures | None, drift: Path | None) -> Figures:
    """The final judge: the submitted model's variants, and what quantising changed."""
    submitted = test["submitted"] if test else None
    variants = test["models"][submitted["model"]] if test and submitted else {}
    return {
        "judge": judge,
        "submitted": submitted,
        "variants": variants,
        "gptq": _gptq(test, drift),
    }


def _gptq(test: Figures | None, drift: Path | None) -> Figures | None:
    if drift is None:
        return None
    figures = read_json(drift)
    names = ("kl", "flip_rate", "bytes", "bytes_before")
    absent = [name for name in names if name not in figures]
    if absent:
        raise InputError(f"{drift}: no {', '.join(absent)}; delete it and run the workflow again")
    change = None
    if test and {"gptq", "merged"} <= set(test["models"]):
        variant = test["submitted"]["variant"]
        after, before = (test["models"][m][variant]["log_loss"] for m in ("gptq", "merged"))
        change = after - before
    return {**figures, "log_loss_change": change}


def _settings(path: Path) -> Figures:
    return dict(read_provenance(path).get("settings", {}))


# --- tables ---------------------------------------------------------------------------------------


def judge_records(metrics: Figures) -> list[Figures]:
    """One record per judge or baseline and fold, and one (`fold` "all") over all folds' rows."""
    records = []
    baselines = {n: (f, f) for n, f in metrics["baselines"].items() if f}
    judges = {n: (f, f["oof"]) for n, f in metrics["judges"].items()}
    for kind, group in (("judge", judges), ("baseline", baselines)):
        for name, (figures, overall) in group.items():
            for part in (*figures["folds"], {"fold": "all", **overall}):
                record = {"name": name, "kind": kind, **part}
                records.append({column: record[column] for column in JUDGE_COLUMNS})
    return records


def variant_records(metrics: Figures) -> list[Figures]:
    """One record per model and variant scored on the test battles."""
    test = metrics["test"] or {"models": {}, "submitted": None}
    return [
        {"model": model, "variant": variant, **figures}
        | {"submitted": test["submitted"] == {"model": model, "variant": variant}}
        for model, variants in test["models"].items()
        for variant, figures in variants.items()
    ]


def _csv(records: Sequence[Figures], columns: Sequence[str]) -> str:
    import pandas as pd

    return pd.DataFrame(records, columns=list(columns)).to_csv(index=False, lineterminator="\n")
