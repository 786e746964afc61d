"""Ask a judge: load its folder, and get the verdicts that the workflow itself would get.

    judge = Judge.from_pretrained("results/default/merged/gemma2-student")
    verdicts = judge.predict([{"prompt": "2 + 2?", "response_a": "4", "response_b": "5"}])
    verdicts.probabilities    # float64 (1, 3): A wins, B wins, tie

The folder's `judge.json` (:mod:`arena_distill.judging.contract`) says how the judge is asked. Scoring,
averaging and calibration are the functions with which the workflow scores its test battles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from huggingface_hub import snapshot_download

from arena_distill.battles.style_features import style_features
from arena_distill.config.judge import Attention
from arena_distill.deployment.gptq import load_quantized
from arena_distill.encoding.sequences import FIELDS, Sequences, Tokens, tokens_of
from arena_distill.encoding.tokenization import load_tokenizer, tokenize
from arena_distill.encoding.views import encode, tokens_cut, views
from arena_distill.errors import InputError, brief
from arena_distill.judging.battles import battles_table
from arena_distill.judging.contract import Contract, read_contract
from arena_distill.models.loading import load_classifier, refuse_weights
from arena_distill.models.scoring import score
from arena_distill.prediction.averages import mean_of_views
from arena_distill.prediction.test_time import score_variants
from arena_distill.verdicts import Order

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from arena_distill.judging.battles import Battles

Forward = Callable[[Sequences], np.ndarray]
"""Encoded sequences → the model's outputs, float32 (rows, outputs of its head)."""

BATCH_TOKENS = 16384
"""Tokens per forward pass, padding included."""


@dataclass(frozen=True)
class Verdict:
    """What a judge says of one battle.

    probabilities: by class (`model_a`, `model_b`, `tie`); their sum is 1.
    winner: the likeliest class.
    cut: tokens that the judge did not read, by field, at its greatest length.
    orders: by order of the answers, the probabilities from it alone.
    """

    probabilities: dict[str, float]
    winner: str
    cut: dict[str, int]
    orders: dict[Order, dict[str, float]]


@dataclass(frozen=True)
class Verdicts:
    """What a judge says of battles, in their order.

    ids: the battles' own, or their numbers; string (rows,).
    classes: `model_a`, `model_b` and, if the judge knows ties, `tie`.
    orders: those in which the judge sees the answers.
    probabilities: float64 (rows, classes), after average and calibration.
    by_order: float64 (rows, orders, classes), the same from one order alone.
    logits: float32 (rows, lengths, orders, classes), in the canonical frame, before calibration.
    cut: tokens that the judge did not read, by field, at its greatest length; int64 (rows,) each.
    """

    ids: pa.Array
    classes: tuple[str, ...]
    orders: tuple[Order, ...]
    probabilities: np.ndarray
    by_order: np.ndarray
    logits: np.ndarray
    cut: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.probabilities)

    def __getitem__(self, row: int) -> Verdict:
        probabilities = self.probabilities[row]
        return Verdict(
            self._named(probabilities),
            self.classes[int(probabilities.argmax())],
            {name: int(count[row]) for name, count in self.cut.items()},
            dict(zip(self.orders, map(self._named, self.by_order[row]), strict=True)),
        )

    def _named(self, probabilities: np.ndarray) -> dict[str, float]:
        return dict(zip(self.classes, probabilities.tolist(), strict=True))

    def __iter__(self) -> Iterator[Verdict]:
        return (self[row] for row in range(len(self)))

    @property
    def winners(self) -> np.ndarray:
        """The likeliest class of each battle: str (rows,)."""
        return np.array(self.classes)[self.probabilities.argmax(axis=1)]

    @property
    def disputed(self) -> np.ndarray:
        """Whether the likeliest class depends on which answer is read first: bool (rows,)."""
        likeliest = self.by_order.argmax(axis=2)
        return (likeliest != likeliest[:, :1]).any(axis=1)

    def to_arrow(self) -> pa.Table:
        """Columns `id`, a probability per class (as in submissions), `winner`, `cut_<field>`."""
        return pa.table(
            {
                "id": self.ids,
                **{f"winner_{c}": self.probabilities[:, i] for i, c in enumerate(self.classes)},
                "winner": pa.array(self.winners.tolist(), pa.string()),
                **{f"cut_{name}": count for name, count in self.cut.items()},
            }
        )

    def to_pandas(self) -> Any:
        """:meth:`to_arrow` as a pandas data frame."""
        return self.to_arrow().to_pandas()


@dataclass(frozen=True)
class Ranking:
    """Answers to one prompt, the best first.

    order: positions in the list of answers.
    scores: float64 (answers,), in the order of the list. A pointwise judge: the strengths. A joint one:
        the mean over the other answers of P(wins) + P(tie) / 2.
    """

    order: list[int]
    scores: np.ndarray


class Judge:
    """A judge that is ready to be asked; make one by :meth:`from_pretrained`.

    Several threads may ask it at a time if `forward` allows it.

    contract: how it is asked, and what it scored.
    tokenizer: for one thread at a time, which holds `tokenizing`.
    forward: runs the model, here or on a server.
    """

    def __init__(
        self,
        contract: Contract,
        tokenizer: PreTrainedTokenizerBase,
        forward: Forward,
    ) -> None:
        self.contract = contract
        self.forward = forward
        self.tokenizer = tokenizer
        self.tokenizing = Lock()

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        attention: Attention = "auto",
        batch_tokens: int = BATCH_TOKENS,
        progress: bool = False,
    ) -> Judge:
        """Load a judge from its folder.

        Args:
            folder: a folder with `judge.json`; or ``hub:ORG/NAME``, which is downloaded, with ``@`` and
                a commit, tag or branch if not the newest.
            device: such as ``cuda:1``; by default a GPU if there is one.
            dtype: of the weights; by default as they were saved. Another one changes the figures.
            attention: the kernel (see ``loading.choose_attention``).
            batch_tokens: tokens per forward pass, padding included.
            progress: show a progress bar on stderr.

        Raises:
            InputError: the folder is not a finished judge, or cannot be loaded here.
        """
        folder = local_folder(folder)
        contract = read_contract(folder)
        refuse_weights(folder, quantized=contract.kind == "gptq")
        tokenizer = load_tokenizer(folder)  # first: the weights may take minutes
        model = _load(folder, contract, device, dtype, attention)
        forward = partial(score, model, batch_tokens=batch_tokens, progress=progress)
        return cls(contract, tokenizer, forward)

    def answered_by(self, forward: Forward) -> Judge:
        """This judge, with another function that runs the model."""
        other = copy(self)
        other.forward = forward
        return other

    def text_ids(self, texts: list[str]) -> list[list[int]]:
        """The ids of whole texts as the tokenizer alone gives them, special tokens included.

        They are those of no training sequence: :meth:`encode` gives these.
        """
        with self.tokenizing:
            ids: list[list[int]] = self.tokenizer(texts, verbose=False)["input_ids"]
        return ids

    def encode(self, battles: Battles) -> Tokens:
        """The token ids of battles, before truncation."""
        table = battles_table(battles)
        with self.tokenizing:
            found = tokenize(table, self.tokenizer)
        return tokens_of(found, self.contract.vocabulary)

    def predict(self, battles: Battles) -> Verdicts:
        """Judge battles: at every length, in every order, averaged and calibrated.

        Each distinct sequence runs once. Battles of any length may be mixed.

        Args:
            battles: a list of dicts, a dict of columns, a pandas data frame or an Arrow table with
                `prompt`, `response_a`, `response_b` (a text, or a list of turns) and perhaps `id`.

        Raises:
            InputError: a field is missing or not text, or the model's outputs are not finite.
        """
        table = battles_table(battles)
        return judged(self.contract, table, self.encode(table), self.forward)

    def compare(self, prompt: str | list[str], a: str | list[str], b: str | list[str]) -> Verdict:
        """Judge one battle."""
        return self.predict([{"prompt": prompt, "response_a": a, "response_b": b}])[0]

    def rank(self, prompt: str | list[str], answers: Sequence[str | list[str]]) -> Ranking:
        """Rank answers to one prompt; a joint judge compares every two of them.

        Raises:
            InputError: there are fewer than two answers.
        """
        if len(answers) < 2:
            raise InputError(f"rank: two or more answers expected, got {len(answers)}")
        if self.contract.head.kind == "pointwise":
            scores = self.rewards([prompt] * len(answers), answers)
        else:
            first, second = np.triu_indices(len(answers), 1)
            verdicts = self.predict(
                {
                    "prompt": [prompt] * len(first),
                    "response_a": [answers[i] for i in first.tolist()],
                    "response_b": [answers[i] for i in second.tolist()],
                }
            )
            a, b = verdicts.probabilities.T[:2]
            won = (1 + a - b) / 2  # P(A) + P(tie) / 2
            scores = np.bincount(first, won, len(answers))
            scores = (scores + np.bincount(second, 1 - won, len(answers))) / (len(answers) - 1)
        return Ranking(np.argsort(-scores, kind="stable").tolist(), scores)

    def reward(self, prompt: str | list[str], answer: str | list[str]) -> float:
        """The strength of one answer, as a reward; differences are log-odds of winning, without ties.

        Raises:
            InputError: the judge is not pointwise: it knows no strength of one answer.
        """
        return float(self.rewards([prompt], [answer])[0])

    def rewards(
        self, prompts: Sequence[str | list[str]], answers: Sequence[str | list[str]]
    ) -> np.ndarray:
        """The rewards of many answers, each to its prompt, the mean over the lengths: float64 (answers,).

        Raises:
            InputError: as :meth:`reward`.
        """
        if self.contract.head.kind != "pointwise":
            raise InputError(
                f"{self.contract.judge}: a joint judge compares two answers and has no reward of one; "
                "train one with `head: pointwise`, or call `rank`"
            )
        empty = [""] * len(answers)
        tokens = self.encode(
            {"prompt": list(prompts), "response_a": list(answers), "response_b": empty}
        )
        lengths = self.contract.lengths
        parts = [encode(tokens, self.contract.encoding, "A", n) for n in lengths]
        outputs = self.forward(Sequences.concatenate(parts))[:, 0]
        return outputs.reshape(len(lengths), len(answers)).mean(axis=0, dtype=np.float64)


def judged(contract: Contract, battles: pa.Table, tokens: Tokens, forward: Forward) -> Verdicts:
    """Score, average and calibrate battles, whoever runs the model.

    Args:
        battles: canonical battles.
        tokens: their tokens, in the same order.
        forward: sequences → float32 (rows, outputs of the head).
    """
    lengths, orders = contract.lengths, contract.orders
    if len(tokens):
        logits, _ = score_variants(tokens, contract.scoring, forward)
        if not np.isfinite(logits).all():
            raise InputError(
                f"{contract.judge}: its logits are not finite: its weights are damaged, or too large for "
                "their dtype; `arena-distill verify` compares its files"
            )
    else:
        logits = np.zeros((0, len(lengths), len(orders), len(contract.classes)), np.float32)
    calibrate = contract.calibration.map() if contract.calibration else None
    styles = style_features(battles) if calibrate and len(calibrate.lead) else None

    def together(seen: np.ndarray) -> np.ndarray:
        """Logits of some views (rows, views, classes) → probabilities (rows, classes)."""
        mean = mean_of_views(seen, contract.average)
        return calibrate.probabilities(mean, styles) if calibrate else mean

    flat = logits.reshape(len(tokens), len(lengths) * len(orders), len(contract.classes))
    by_order = [together(logits[:, :, i]) for i in range(len(orders))]
    cut: dict[str, np.ndarray] = {}
    for view in views(contract.head, orders):
        for name, count in tokens_cut(tokens, contract.encoding, view, max(lengths)).items():
            cut[name] = np.maximum(cut.get(name, 0), count)
    read = {name: cut[name] for name in FIELDS}
    return Verdicts(
        battles["id"],
        contract.classes,
        orders,
        together(flat),
        np.stack(by_order, axis=1),
        logits,
        read,
    )


def local_folder(folder: str | Path) -> Path:
    """The folder on this machine; ``hub:ORG/NAME``, or ``hub:ORG/NAME@REVISION``, is downloaded."""
    if not str(folder).startswith("hub:"):
        return Path(folder)
    repo, _, revision = str(folder).removeprefix("hub:").partition("@")
    try:  # neither pickles nor code
        kinds = ["*.json", "*.safetensors", "*.model"]
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=kinds))
    except Exception as error:  # of the hub, of the network
        raise InputError(f"{folder}: cannot be downloaded: {brief(error)}") from None


def _load(
    folder: Path,
    contract: Contract,
    device: str | torch.device | None,
    dtype: torch.dtype | str | None,
    attention: Attention,
) -> Any:
    """The model, on its device, ready to score."""
    import torch

    where = device or ("cuda:0" if torch.cuda.is_available() else "cpu")
    if contract.kind == "gptq":
        if dtype is not None:
            raise InputError(f"{folder}: a quantised judge has its own dtype; leave `dtype` out")
        return load_quantized(folder, attention=attention, device=where)
    return load_classifier(
        folder,
        head=contract.head,
        dtype=dtype or getattr(torch, contract.dtype),
        attention=attention,
        device_map={"": where},
        pad_token_id=contract.pad,
    )
