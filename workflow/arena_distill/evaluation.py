"""Every figure of a run: judges, yardsticks on the same rows, test variants, quantisation.

Log loss is in nats, the mean over battles of -log p(vote); lower is better. A figure means little
alone, so every judge stands between three yardsticks scored on the very rows it is scored on:

- `class_prior`: the shares of the votes among the rows that train a fold;
- `length`: a logistic regression on how much longer one answer is than the other;
- `bayes`: the true vote probabilities, known for synthetic battles only: nobody does better, but
  for luck. There each judge is also compared with the truth itself.

Beside its scores stand a judge's calibration, as it is and as temperature and vector scaling would
mend it, and its position bias. How figures are computed is in ``metrics``.

What is fitted is fitted on the rows that train a fold and scored on those that validate it. Files
are joined by key: a row that is missing, or there twice, ends the job.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

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
from arena_distill.calibration import METHODS, cross_fit, fit, parts_of
from arena_distill.errors import InputError
from arena_distill.folds import (
    dropped_extra,
    fold_settings,
    prompt_groups,
    shared_prompts,
    training_rows,
    validation_rows,
)
from arena_distill.keys import key, locate
from arena_distill.logits import read_out_of_fold
from arena_distill.metrics import (
    Figures,
    calibration_scores,
    class_reliability,
    gap_closed,
    losses,
    paired_difference,
    position_bias,
    reliability,
    scores,
    softmax,
    truth_scores,
)
from arena_distill.orders import CLASSES, NO_VOTE, ORDERS
from arena_distill.prediction import WINNERS, Costs, averages, confidence
from arena_distill.settings import EvaluationSettings
from arena_distill.style import LENGTHS, style_features
from arena_distill.yardsticks import (
    Yardstick,
    class_prior,
    length_regression,
    true_probabilities,
)

JUDGE_COLUMNS = ("name", "kind", "fold", "rows", "log_loss", "accuracy")
VARIANT_COLUMNS = ("model", "variant", "rows", "log_loss", "accuracy", "submitted")
CASCADE_COLUMNS = (
    *("threshold", "battles", "sequences", "tokens", "all_tokens"),
    *("log_loss", "accuracy", "difference", "low", "high"),
)

THRESHOLDS = (0.0, *(i / 100 for i in range(34, 101)))
"""Of the cascade's curve; the likeliest of three verdicts has a third at least."""


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
    audit: Path | None = None,
    test_logits: Path | None = None,
) -> None:
    """Compute every figure of a run → `metrics.json`, and `judges`, `variants` and `cascade.csv`.

    Args:
        folds: `folds.parquet`.
        battles: `battles.parquet`.
        logits: judge → its files `fold_<k>.npy`, one per fold, in any order.
        output: where `metrics.json` goes.
        tables: folder of the flat tables.
        rejected: `rejected.parquet`, to count the refused rows by reason.
        predictions: the final judge's `test.parquet`, scored where `solution` is given.
        solution: the test battles' votes.
        drift: what quantising the final judge changed, as JSON.
        truth: the synthetic arena's true vote probabilities (`source`, `id`, `p_model_a`,
            `p_model_b`, `p_tie`).
        audit: the leaks that :mod:`arena_distill.audit` found, as JSON.
        test_logits: the submitted model's scores of the test battles, for the cascade's curve.

    Raises:
        InputError: a judge or fold has no logits, or a row is missing, there twice, or unknown.
    """
    run = Run.read(folds, battles)
    votes = run.votes()
    seen = {
        name: read_out_of_fold(run.folds, logits.get(name, ()), name) for name in settings.judges
    }
    yardsticks = {
        "class_prior": run.out_of_fold(class_prior),
        "length": run.out_of_fold(length_regression),
    }
    if truth is not None:
        yardsticks["bayes"] = true_probabilities(truth, run.keys())
    parts = run.parts()
    judges = {
        name: {
            "teachers": list(teachers),
            **_judge(run, seen[name]),
            **_calibrations(
                seen[name], votes, parts, run.styles[run.validation], yardsticks.get("bayes")
            ),
        }
        for name, teachers in settings.judges.items()
    }
    for name in settings.external:
        judges[name]["external"] = True
    for name in settings.flattered:
        judges[name]["flattered"] = True
    baselines: dict[str, Figures | None] = {
        name: scores(p, votes) | {"folds": run.by_fold(p)} for name, p in yardsticks.items()
    }
    baselines.setdefault("bayes", None)
    reference = losses(both_orders(seen[settings.final]), votes)
    compared = [(judges[name], both_orders(logits)) for name, logits in seen.items()]
    compared += [(baselines[name] or {}, p) for name, p in yardsticks.items()]
    for figures, probabilities in compared:
        loss = losses(probabilities, votes)
        assert len(loss) == len(reference), "all are scored on the same battles"
        figures["gap_closed"] = gap_closed(float(loss.mean()), baselines)
        figures["versus_final"] = paired_difference(loss, reference, run.groups())
    test = None
    if predictions is not None and solution is not None:
        test = _test(run, predictions, solution, truth)
        test["cascade"] = None
        if test_logits is not None:
            average = _settings(predictions).get("average", "logits")
            test["cascade"] = _cascade(test_logits, battles, solution, average)
    prediction = None if predictions is None else _settings(predictions)
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
        "final": _final(settings.final, test, drift, prediction),
        "test": test,
        "audit": None if audit is None else read_json(audit),
        "provenance": {
            "evaluation": provenance("evaluation", settings.model_dump(mode="json")),
            "logits": {n: _settings(ids_path(paths[0])) for n, paths in logits.items()},
            "prediction": prediction,
        },
    }
    write_json(metrics, output)
    write_text(_csv(judge_records(metrics), JUDGE_COLUMNS), tables / "judges.csv")
    write_text(_csv(variant_records(metrics), VARIANT_COLUMNS), tables / "variants.csv")
    write_text(_csv(cascade_records(metrics), CASCADE_COLUMNS), tables / "cascade.csv")
    final = judges[settings.final]["oof"]
    print(
        f"{output}: {settings.final} {final['log_loss']:.4f} on {len(votes):,} battles out of fold"
    )


# --- one run --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """The battles of a run, and which of them validate.

    folds: `folds.parquet`.
    battles: `battles.parquet` without its prompts.
    styles: float64 (rows of `folds`, 8), :func:`style_features`.
    validation: positions in `folds` of the out-of-fold rows: what every score is computed on.
    """

    folds: pa.Table
    battles: pa.Table
    styles: np.ndarray
    validation: np.ndarray

    @classmethod
    def read(cls, folds_path: Path, battles_path: Path) -> Run:
        folds = read_parquet(folds_path)
        battles = read_parquet(battles_path, ["id", "source", "response_a", "response_b"])
        keys = key(folds)
        locate(keys, keys, str(folds_path))  # no row is there twice
        rows = locate(keys, key(battles), str(battles_path))
        validation = np.flatnonzero(folds["fold"].to_numpy() >= 0)
        styles = style_features(battles.take(pa.array(rows)))
        return cls(folds, battles, styles, validation)

    @property
    def lengths(self) -> np.ndarray:
        """What the length baseline sees of the rows of `folds`: float64 (rows, 4)."""
        return self.styles[:, :LENGTHS]

    def of_folds(self, n: int) -> Run:
        """The same run, of whose battles only those of the first folds are scored."""
        fold = self.folds["fold"].to_numpy()
        return replace(self, validation=np.flatnonzero((fold >= 0) & (fold < n)))

    def judge_logits(self, judge: str, paths: Sequence[Path]) -> np.ndarray:
        """A judge's out-of-fold logits: float32 (out-of-fold rows, orders, 3)."""
        scored = self.folds.take(pa.array(self.validation))
        return read_out_of_fold(scored, paths, judge)

    def styles_of(self, keys: pa.Array) -> np.ndarray:
        """Features of any battles of the run: float64 (rows, 8), :func:`style_features`."""
        rows = locate(keys, key(self.battles), "battles")
        return style_features(self.battles.take(pa.array(rows)))

    def keys(self) -> pa.Array:
        """Keys of the out-of-fold rows."""
        return key(self.folds.select(["id", "source"]).take(pa.array(self.validation)))

    def fold_numbers(self) -> list[int]:
        return np.unique(self.folds["fold"].to_numpy()[self.validation]).tolist()

    def votes(self, rows: np.ndarray | None = None) -> np.ndarray:
        """Votes of the given rows of `folds`, by default of the out-of-fold rows: int64."""
        labels = self.folds["label"].to_numpy().astype(np.int64)
        return labels[self.validation if rows is None else rows]

    def voted(self) -> tuple[np.ndarray, np.ndarray]:
        """Of all rows that have a vote: their `lengths`, and the votes, int64."""
        rows = np.flatnonzero(self.folds["label"].to_numpy() != NO_VOTE)
        return self.lengths[rows], self.votes(rows)

    def groups(self) -> np.ndarray:
        """Prompts of the out-of-fold rows, as numbers: int64."""
        return self.folds["group"].to_numpy()[self.validation]

    def parts(self) -> np.ndarray:
        """Parts of the out-of-fold rows for cross-fitting (``calibration.parts_of``): int64."""
        parts = np.full(len(self.folds), -1)
        parts[self.folds["fold"].to_numpy() >= 0] = parts_of(self.folds)
        return parts[self.validation]

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


def _fold(run: Run, fold: int) -> Figures:
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


def _judge(run: Run, logits: np.ndarray) -> Figures:
    """The figures of one judge: the mean of both orders' logits, and each order alone."""
    votes = run.votes()
    probabilities = both_orders(logits)
    position = position_bias(logits, votes)
    return {
        "folds": run.by_fold(probabilities),
        "oof": scores(probabilities, votes) | calibration_scores(probabilities, votes),
        "orders": {order: scores(softmax(logits[:, i]), votes) for i, order in enumerate(ORDERS)},
        "order_flip_rate": position["flip_rate"],
        "position": position,
        "reliability": reliability(probabilities, votes),
        "class_reliability": class_reliability(probabilities, votes),
    }


def _calibrations(
    logits: np.ndarray,
    votes: np.ndarray,
    parts: np.ndarray,
    styles: np.ndarray,
    truth: np.ndarray | None,
) -> Figures:
    """What calibrating a judge would give, cross-fitted; and how far from the truth it is then."""
    mean = logits.mean(axis=1, dtype=np.float64)
    figures = {}
    seen = {"raw": both_orders(logits)}
    for method in METHODS:
        seen[method] = p = softmax(cross_fit(method, mean, votes, parts, styles))
        figures[method] = {
            "parameters": fit(method, mean, votes, styles).parameters,
            **scores(p, votes),
            **calibration_scores(p, votes),
            "reliability": reliability(p, votes),
            "class_reliability": class_reliability(p, votes),
        }
    if truth is None:
        return {"calibration": figures, "truth": None}
    distances = {name: truth_scores(truth, p, votes) for name, p in seen.items()}
    return {"calibration": figures, "truth": distances}


def both_orders(logits: np.ndarray) -> np.ndarray:
    """Probabilities by the mean of both orders' logits (rows, orders, 3): float64 (rows, 3)."""
    return softmax(logits.mean(axis=1, dtype=np.float64))


# --- test battles and quantisation ----------------------------------------------------------------


def _test(run: Run, predictions: Path, solution: Path, truth: Path | None) -> Figures:
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
    lengths = run.styles_of(keys)[:, :LENGTHS]
    everything = run.voted()
    baselines = {
        "class_prior": scores(class_prior(*everything, lengths), votes),
        "length": scores(length_regression(*everything, lengths), votes),
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


def _cascade(
    test_logits: Path, battles: Path, solution: Path, average: Literal["logits", "probabilities"]
) -> list[Figures] | None:
    """The :func:`cascade_curve` of a file of `score_test`; None where it says nothing of costs."""
    logits, scored = read_logits(test_logits)
    about = _settings(ids_path(test_logits))
    lengths, orders = (about.get(name, ()) for name in ("max_lengths", "orders"))
    costs = Costs.read(scored, lengths)
    if costs is None:
        return None
    solved, text = read_solution(solution), read_parquet(battles, ["id", "source", "prompt"])
    text = text.filter(pc.equal(text["source"].cast(pa.string()), "test"))
    ids = solved["id"].combine_chunks()
    rows = locate(ids, scored["id"].combine_chunks(), str(ids_path(test_logits)))
    prompts = prompt_groups(text)[locate(ids, text["id"].combine_chunks(), str(battles))]
    votes = solved["label"].to_numpy().astype(np.int64)
    fixed = (about.get("cascade") or {}).get("threshold")

    def predict(scores: np.ndarray) -> np.ndarray:
        *_, everything = averages(scores, lengths, orders, average).values()
        return everything

    return cascade_curve(logits[rows], lengths, predict, costs.take(rows), votes, prompts, fixed)


def cascade_curve(
    logits: np.ndarray,
    lengths: Sequence[int],
    predict: Callable[[np.ndarray], np.ndarray],
    costs: Costs,
    votes: np.ndarray,
    groups: np.ndarray,
    threshold: float | None = None,
) -> list[Figures] | None:
    """What a cascade takes, and what it costs in log loss, at each of `THRESHOLDS` that changes it.

    Every point has the shares of `battles` that are scored at the longer lengths, of the `sequences`
    and the `tokens` that all battles have there, and of the tokens of all lengths (`all_tokens`); the
    scores of the prediction; and `versus_all`, the paired difference from scoring everything.

    Args:
        logits: float32 (rows, lengths, orders, 3), in the canonical frame.
        predict: logits → float64 (rows, 3), each row by itself.
        votes, groups: int64 (rows,), the battles' votes and prompts.
        threshold: of the cascade that the logits were scored with. What everything would score is
            not known then: there is one point, that of this cascade, and its `versus_all` is None.

    Returns:
        None where no battle has more to show at a longer length.
    """
    short = int(np.argmin(lengths))
    longer = np.arange(len(lengths)) != short
    if not costs.sequences[:, longer].any():
        return None
    everything, brief = predict(logits), predict(np.repeat(logits[:, [short]], len(lengths), 1))
    reference = losses(everything, votes)
    sure, more = confidence(logits[:, short]), costs.sequences[:, longer].any(axis=1)
    sequences, tokens = (c[:, longer].sum(axis=1) for c in (costs.sequences, costs.tokens))
    always = costs.tokens[:, short].sum()
    # A threshold above which no further battle goes on says nothing new.
    told = {int((more & (sure < p)).sum()): p for p in reversed(THRESHOLDS)}
    points = []
    for p in sorted(told.values()) if threshold is None else [threshold]:
        goes_on = more & (sure < p)
        probabilities = np.where(goes_on[:, None], everything, brief)
        points.append(
            {
                "threshold": p,
                "battles": float(goes_on.mean()),
                "sequences": float(sequences[goes_on].sum() / sequences.sum()),
                "tokens": float(tokens[goes_on].sum() / tokens.sum()),
                "all_tokens": float((always + tokens[goes_on].sum()) / costs.tokens.sum()),
                **scores(probabilities, votes),
                "versus_all": paired_difference(losses(probabilities, votes), reference, groups)
                if threshold is None
                else None,
            }
        )
    return points


def _final(
    judge: str, test: Figures | None, drift: Path | None, prediction: Figures | None
) -> Figures:
    """The final judge: the submitted model's variants, their calibration, what quantising changed."""
    submitted = test["submitted"] if test else None
    variants = test["models"][submitted["model"]] if test and submitted else {}
    return {
        "judge": judge,
        "submitted": submitted,
        "variants": variants,
        "calibration": prediction.get("calibration") if prediction else None,
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


def cascade_records(metrics: Figures) -> list[Figures]:
    """One record per point of the cascade's curve."""
    points = (metrics["test"] or {}).get("cascade") or []
    flat = [point | (point["versus_all"] or {}) for point in points]
    return [{column: point.get(column) for column in CASCADE_COLUMNS} for point in flat]


def _csv(records: Sequence[Figures], columns: Sequence[str]) -> str:
    import pandas as pd

    return pd.DataFrame(records, columns=list(columns)).to_csv(index=False, lineterminator="\n")
