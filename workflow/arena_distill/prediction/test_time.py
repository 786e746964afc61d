"""Score battles with the deployed model: logits of every length and order, and their averages.

Test-time augmentation (TTA) scores a battle several times: cut to several lengths, with the answers
in both orders. The forward passes run once and are kept as logits; every average of them is a
variant. One variant is submitted: the configured model's average over all lengths and all orders,
calibrated if the configuration says so.

A cascade saves forward passes: if the judge is confident of a battle at the shortest length, the
battle is not scored at the longer ones; they get the same logits. With `swap: unsure` it is not scored
in the second order either. So the prediction of such a battle is that of the first views, and of any
other the average over all; :func:`averages` computes both from the logits on file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from arena_distill.battles.folds import held_out_rows
from arena_distill.battles.style_features import read_styles
from arena_distill.config.compute import Attention
from arena_distill.config.phases.prediction import PredictionSettings, ScoringSettings
from arena_distill.config.vocabulary import Calibration, ModelKind
from arena_distill.deployment.gptq import load_quantized
from arena_distill.encoding.sequences import Sequences, Tokens, read_tokens
from arena_distill.encoding.views import encode_views, views
from arena_distill.errors import InputError
from arena_distill.files.artifacts import provenance, read_parquet, write_parquet
from arena_distill.files.keys import key, locate
from arena_distill.files.logits import write_logits
from arena_distill.metrics import mean_over_views
from arena_distill.models.heads import verdicts
from arena_distill.models.loading import load_classifier
from arena_distill.models.scoring import score
from arena_distill.prediction.averages import averages, joined, read_views
from arena_distill.prediction.held_out import read_calibration
from arena_distill.verdicts import WINNERS

# --- forward passes -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Passes:
    """The cost of scoring each battle at each length, and whether it was scored.

    A sequence equal to one at a shorter length or in another order costs nothing.

    sequences, tokens: int32 (rows, lengths); tokens without padding, the sum over a battle's views.
    scored: float32 (rows, lengths), the share of the sequences that was scored: 0 if there is none, less
        than 1 if a cascade stopped before.
    """

    sequences: np.ndarray
    tokens: np.ndarray
    scored: np.ndarray

    def columns(self, lengths: Sequence[int]) -> dict[str, np.ndarray]:
        """As columns ``sequences_<length>``, ``tokens_<length>`` and ``scored_<length>``."""
        return {f"{k}_{n}": v[:, i] for i, n in enumerate(lengths) for k, v in vars(self).items()}

    @staticmethod
    def read(ids: pa.Table, lengths: Sequence[int]) -> Passes | None:
        """Read these columns; None if a file has none."""
        names = [[f"{k}_{n}" for n in lengths] for k in ("sequences", "tokens", "scored")]
        if not lengths or not {*chain(*names)} <= {*ids.column_names}:
            return None
        return Passes(*(np.column_stack([ids[name].to_numpy() for name in of]) for of in names))

    def take(self, rows: np.ndarray) -> Passes:
        """The given rows, in that order."""
        return Passes(self.sequences[rows], self.tokens[rows], self.scored[rows])


def score_test(
    model: Path,
    tokens: Path,
    output: Path,
    *,
    quantized: bool,
    settings: ScoringSettings,
    batch_tokens: int,
    attention: Attention = "auto",
    folds: Path | None = None,
) -> None:
    """Score the test battles, or the held-out ones, at every length and in every order → logits and ids.

    The file holds float32 (rows, lengths, orders, classes) in the canonical frame; lengths and orders are
    those of `settings`, which the ids' provenance repeats. The ids hold the cost of each battle at
    each length, and whether it was scored there (see :class:`Passes`).

    Args:
        model: a dense folder, or a GPTQ one if `quantized`.
        batch_tokens: tokens per forward pass, padding included.
        attention: the kernel (see ``loading.choose_attention``).
        folds: `folds.parquet`: score its held-out battles, with which the model is calibrated; None: the
            test battles.

    Raises:
        InputError: there is no such battle, or a file or the model cannot be read.
    """
    read = read_tokens(tokens)
    if folds is None:
        test = read.take(np.asarray(pc.equal(read.sources, "test")))
        lacking = f"{tokens}: holds no test battle; give `test` files in the configuration"
    else:
        table = read_parquet(folds, ["id", "source", "fold"])
        held_out = key(table.take(held_out_rows(table)))
        test = read.take(locate(held_out, read.keys(), f"tokens in {tokens}"))
        lacking = f"{folds}: no battle is held out; set folds.holdout"
    if not len(test):
        raise InputError(lacking)
    if quantized:
        judge = load_quantized(model, attention=attention)
    else:
        judge = load_classifier(
            model,
            head=settings.head,
            precision=settings.precision,
            attention=attention,
            pad_token_id=test.vocabulary.pad,
        )
    logits, costs = score_variants(
        test, settings, lambda sequences: score(judge, sequences, batch_tokens=batch_tokens)
    )
    ids = pa.table({"id": test.ids, "source": test.sources, **costs.columns(settings.max_lengths)})
    about = settings.model_dump(mode="json") | {"quantized": quantized}
    write_logits(output, logits, ids, provenance("scoring", about))
    lengths = len(settings.max_lengths)
    total = len(test) * lengths * len(views(settings.head, settings.orders))
    scored, needed = round((costs.sequences * costs.scored).sum()), int(costs.sequences.sum())
    spared = f" and {needed - scored:,} by the cascade" if settings.cascade else ""
    print(
        f"{output}: {len(test):,} battles, lengths {joined(settings.max_lengths)}, orders "
        f"{joined(settings.orders)}; {scored:,} sequences scored, {total - needed:,} of {total:,} "
        f"saved as repetitions{spared}"
    )


def score_variants(
    tokens: Tokens, settings: ScoringSettings, forward: Callable[[Sequences], np.ndarray]
) -> tuple[np.ndarray, Passes]:
    """Score every battle at every length and in every order, each distinct sequence once.

    A battle that fits into the shorter length has the same sequence at the longer one, and a battle
    with two equal answers the same in both orders: their logits are copied. A pointwise judge reads
    each answer once for all orders. With a cascade, a battle whose :func:`confidence` at the shortest
    length is not below the threshold has that length's logits at every length.

    Args:
        forward: sequences → float32 (rows, outputs of the head).

    Returns:
        logits: float32 (rows, lengths, orders, classes), in the canonical frame.
        costs: of the calls of `forward`.
    """
    lengths, orders, head = settings.max_lengths, settings.orders, settings.head
    ascending = np.argsort(lengths, kind="stable")
    shown = [
        view
        for i in ascending
        for view in encode_views(tokens, settings.encoding, head, orders, lengths[i])
    ]
    original = np.tile(np.arange(len(shown))[:, None], len(tokens))  # what each view repeats
    for later in range(1, len(shown)):
        for earlier in reversed(range(later)):
            original[later, identical(shown[later], shown[earlier])] = earlier
    own = original == np.arange(len(shown))[:, None]
    outputs = np.zeros((*own.shape, len(head.outputs)), np.float32)

    def run(wanted: np.ndarray) -> None:
        # One call for all views: this fills batches of similar length better.
        parts = [part.take(mask) for part, mask in zip(shown, wanted, strict=True)]
        outputs[wanted] = forward(Sequences.concatenate(parts))

    def seen(views: slice) -> np.ndarray:
        """Verdicts of all battles on views of one length: (rows, orders, classes)."""
        said = np.take_along_axis(outputs, original[views, :, None], axis=0)
        return verdicts(said.swapaxes(0, 1), head, orders[: len(said)])

    size = len(shown) // len(lengths)
    scored = own
    sure, brief = np.zeros(len(tokens), bool), None
    if settings.cascade is None:
        run(own)
    else:
        alone = settings.cascade.swap == "unsure" and head.kind == "joint"
        first = np.arange(len(shown)) < (1 if alone else size)
        run(own & first[:, None])
        brief = seen(slice(first.sum()))
        sure = confidence(brief) >= settings.cascade.threshold
        scored = own & (first[:, None] | ~sure)
        run(scored & ~first[:, None])
    place = np.argsort(ascending)  # from the shortest first to the order of the settings
    logits = np.stack([seen(slice(i * size, (i + 1) * size)) for i in place], axis=1)
    if brief is not None:  # a confident battle gets the logits of the first views in all others
        logits[sure] = brief[sure, None]
    taken = own * np.stack([part.lengths for part in shown])
    # (lengths, views of each, rows) → the sum over a battle's views.
    own, taken, scored = (x.reshape(len(lengths), size, -1)[place] for x in (own, taken, scored))
    sequences, taken, done = (x.sum(axis=1, dtype=np.int32).T for x in (own, taken, scored))
    share = (done / np.maximum(sequences, 1)).astype(np.float32)
    return logits, Passes(sequences, taken, share)


def confidence(logits: np.ndarray) -> np.ndarray:
    """A judge's confidence: the probability of its verdict, from the mean logits of the orders.

    Args:
        logits: float (rows, orders, classes), in the canonical frame.

    Returns:
        float64 (rows,), at least a third, of two classes half.
    """
    certain: np.ndarray = mean_over_views(logits).max(axis=-1)
    return certain


def identical(first: Sequences, second: Sequences) -> np.ndarray:
    """Which rows of two sets have the same tokens: bool (rows,)."""
    same = first.lengths == second.lengths
    candidates = np.flatnonzero(same)
    one, other = first.take(candidates), second.take(candidates)
    differing = np.concatenate([[0], np.cumsum(one.ids != other.ids)])
    same[candidates] = differing[one.offsets[1:]] == differing[one.offsets[:-1]]
    return same


# --- averages -------------------------------------------------------------------------------------


def predict_test(
    logits: Path,
    output: Path,
    *,
    model: ModelKind,
    settings: PredictionSettings,
    calibration: Path | None = None,
    battles: Path | None = None,
) -> None:
    """Average the test logits of one model in every way → `predictions/<judge>/<model>.parquet`.

    Its columns are `id`, `model`, `variant` (such as ``256+512/AB+BA``), the probabilities
    `winner_model_a`, `winner_model_b`, with ties `winner_tie` (float64) and `submitted` (bool): the variant
    of all lengths and all orders, which is submitted if this model is.

    With a calibration every variant has two rows: uncalibrated, and calibrated with the method in its name
    (``256+512/AB+BA/temperature``); a calibrated one is submitted. The parameters were fitted to this model
    and to the submitted variant (``prediction.calibration``); they are used for all variants.

    Args:
        logits: a file of :func:`score_test`.
        model: the model whose logits they are.
        calibration: this model's file of ``prediction.calibration.fit_calibration``.
        battles: `battles.parquet`, for calibration.

    Raises:
        InputError: the file was made with other lengths or orders, or there is no calibration.
    """
    method: Calibration = "none"
    calibrate = None
    if settings.calibration != "none":
        if calibration is None or battles is None:
            raise InputError(
                f"prediction.calibration: {settings.calibration}, but no file is given"
            )
        method, calibrate = read_calibration(calibration)
    lengths, orders = settings.max_lengths, settings.orders
    submitted = submitted_variant(settings, method)
    scores, ids = read_views(logits, settings)
    variants = averages(scores, lengths, orders, settings.average)
    if calibrate:
        styles = read_styles(battles, key(ids)) if battles else None
        variants |= {
            f"{name}/{method}": calibrate.probabilities(p, styles) for name, p in variants.items()
        }
    parts = []
    for name, probabilities in variants.items():
        part = {"id": ids["id"], "model": pa.repeat(model, len(ids))}
        part["variant"] = pa.repeat(name, len(ids))
        part |= dict(zip(WINNERS, probabilities.T, strict=False))  # of two classes, the first two
        part["submitted"] = pa.repeat(name == submitted, len(ids))
        parts.append(pa.table(part))
    about = provenance("prediction", settings.model_dump(mode="json"))
    write_parquet(pa.concat_tables(parts), output, about)
    print(f"{output}: {len(parts)} variants; to be submitted: {submitted}")


def submitted_variant(settings: PredictionSettings, calibration: Calibration = "none") -> str:
    """The name of the variant of all lengths and all orders, with the calibration if any."""
    name = f"{joined(settings.max_lengths)}/{joined(settings.orders)}"
    return name if calibration == "none" else f"{name}/{calibration}"
