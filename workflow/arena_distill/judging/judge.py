"""Ask a judge: load its folder, and get the verdicts that the workflow itself would get.

    judge = Judge.from_pretrained("results/default/merged/gemma2-student")
    verdicts = judge.predict([{"prompt": "2 + 2?", "response_a": "4", "response_b": "5"}])
    verdicts.probabilities    # float64 (1, 3): A wins, B wins, tie

The folder's `judge.json` (:mod:`arena_distill.judging.contract`) says how the judge is asked. Scoring,
averaging and calibration are the functions with which the workflow scores its test battles.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from itertools import chain, product
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from huggingface_hub import snapshot_download

from arena_distill.battles.surface_features import surface_features
from arena_distill.config.compute import Attention
from arena_distill.deployment.gptq import load_quantized
from arena_distill.encoding.sequences import FIELDS, Sequences, Tokens, tokens_of
from arena_distill.encoding.tokenization import load_tokenizer, tokenize
from arena_distill.encoding.views import encode, tokens_cut, views
from arena_distill.errors import InputError, brief
from arena_distill.judging.battles import battles_table
from arena_distill.judging.contract import (
    FILE,
    MEMBERS,
    TREES,
    Contract,
    ModelContract,
    StackContract,
    read_contract,
)
from arena_distill.judging.verdicts import Ranking, Verdict, Verdicts, averaged
from arena_distill.models.loading import load_classifier, refuse_weights
from arena_distill.models.scoring import score
from arena_distill.prediction.test_time import score_variants
from arena_distill.scoring.stacks import combine, surface_logits
from arena_distill.scoring.surface_trees import ask_surface, read_trees
from arena_distill.scoring.trees import Trees

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from arena_distill.judging.battles import Battles

Forward = Callable[[Sequences], np.ndarray]
"""Encoded sequences → the model's outputs, float32 (rows, outputs of its head)."""

BATCH_TOKENS = 16384
"""Tokens per forward pass, padding included."""


@dataclass(frozen=True)
class Seen:
    """What a judge's models say of battles.

    logits: float32 (rows, lengths, orders, classes), in the canonical frame, before calibration.
    cut: tokens that are not read at the greatest length, by field; int64 (rows,) each.
    """

    logits: np.ndarray
    cut: dict[str, np.ndarray]


class Judge(ABC):
    """A judge that is ready to be asked; make one by :meth:`from_pretrained`.

    Several threads may ask it at a time if the functions that run its models allow it.

    contract: how it is asked, and what it scored.
    """

    contract: Contract
    _kind: str
    """What it is, in the message of a refusal."""

    @staticmethod
    def from_pretrained(
        folder: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        attention: Attention = "auto",
        batch_tokens: int = BATCH_TOKENS,
        progress: bool = False,
    ) -> Judge:
        """Load a judge, a model or a stack, from its folder.

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
        if isinstance(contract, StackContract):
            load = partial(
                Judge.from_pretrained,
                device=device,
                dtype=dtype,
                attention=attention,
                batch_tokens=batch_tokens,
                progress=progress,
            )
            return _load_stack(folder, contract, load)
        refuse_weights(folder, quantized=contract.kind == "gptq")
        tokenizer = load_tokenizer(folder)
        model = _load(folder, contract, device, dtype, attention)
        forward = partial(score, model, batch_tokens=batch_tokens, progress=progress)
        return ModelJudge(contract, tokenizer, forward)

    @property
    @abstractmethod
    def models(self) -> tuple[ModelJudge, ...]:
        """The judges that are models: itself, or the members of a stack, all the way down."""

    @abstractmethod
    def run_by(self, forward_of: Callable[[ModelJudge], Forward]) -> Judge:
        """This judge, with other functions that run its :attr:`models`."""

    @abstractmethod
    def sequences(self, battles: pa.Table) -> dict[str, Sequences]:
        """The sequences of canonical battles by ``<length>/<view>``, of a stack after ``<member>/``."""

    @abstractmethod
    def see(self, battles: pa.Table) -> Seen:
        """Score canonical battles at every length, in every order."""

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
        seen = self.see(table)
        return averaged(self.contract, table, seen.logits, seen.cut)

    def compare(self, prompt: str | list[str], a: str | list[str], b: str | list[str]) -> Verdict:
        """Judge one battle."""
        return self.predict([{"prompt": prompt, "response_a": a, "response_b": b}])[0]

    def rank(self, prompt: str | list[str], answers: Sequence[str | list[str]]) -> Ranking:
        """Rank answers to one prompt; every two of them are compared, unless the judge is pointwise.

        Raises:
            InputError: there are fewer than two answers.
        """
        if len(answers) < 2:
            raise InputError(f"rank: two or more answers expected, got {len(answers)}")
        scores = self._strengths(prompt, answers)
        return Ranking(np.argsort(-scores, kind="stable").tolist(), scores)

    def _strengths(self, prompt: str | list[str], answers: Sequence[str | list[str]]) -> np.ndarray:
        """What :meth:`rank` ranks by: float64 (answers,)."""
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
        return (scores + np.bincount(second, 1 - won, len(answers))) / (len(answers) - 1)

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
        raise InputError(
            f"{self.contract.judge}: {self._kind} compares two answers and has no reward of one; train a "
            "judge with `head: pointwise`, or call `rank`"
        )


class ModelJudge(Judge):
    """A judge that is one model.

    contract: its own.
    tokenizer: for one thread at a time, which holds `tokenizing`.
    forward: runs the model, here or on a server.
    """

    contract: ModelContract
    _kind = "a joint judge"

    def __init__(
        self,
        contract: ModelContract,
        tokenizer: PreTrainedTokenizerBase,
        forward: Forward,
    ) -> None:
        self.contract = contract
        self.forward = forward
        self.tokenizer = tokenizer
        self.tokenizing = Lock()

    @property
    def models(self) -> tuple[ModelJudge, ...]:
        return (self,)

    def answered_by(self, forward: Forward) -> ModelJudge:
        """This judge, with another function that runs the model."""
        other = copy(self)
        other.forward = forward
        return other

    def run_by(self, forward_of: Callable[[ModelJudge], Forward]) -> ModelJudge:
        return self.answered_by(forward_of(self))

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

    def sequences(self, battles: pa.Table) -> dict[str, Sequences]:
        contract, tokens = self.contract, self.encode(battles)
        return {
            f"{length}/{view}": encode(tokens, contract.encoding, view, length)
            for length, view in product(contract.lengths, views(contract.head, contract.orders))
        }

    def see(self, battles: pa.Table) -> Seen:
        contract, tokens = self.contract, self.encode(battles)
        lengths, orders = contract.lengths, contract.orders
        if len(tokens):
            logits, _ = score_variants(tokens, contract.scoring, self.forward)
        else:
            shape = (0, len(lengths), len(orders), len(contract.classes))
            logits = np.zeros(shape, np.float32)
        cut: dict[str, np.ndarray] = {}
        for view in views(contract.head, orders):
            for name, count in tokens_cut(tokens, contract.encoding, view, max(lengths)).items():
                cut[name] = np.maximum(cut.get(name, 0), count)
        return Seen(logits, {name: cut[name] for name in FIELDS})

    def _strengths(self, prompt: str | list[str], answers: Sequence[str | list[str]]) -> np.ndarray:
        if self.contract.head.kind == "pointwise":
            return self.rewards([prompt] * len(answers), answers)
        return super()._strengths(prompt, answers)

    def rewards(
        self, prompts: Sequence[str | list[str]], answers: Sequence[str | list[str]]
    ) -> np.ndarray:
        if self.contract.head.kind != "pointwise":
            return super().rewards(prompts, answers)
        empty = [""] * len(answers)
        tokens = self.encode(
            {"prompt": list(prompts), "response_a": list(answers), "response_b": empty}
        )
        lengths = self.contract.lengths
        parts = [encode(tokens, self.contract.encoding, "A", n) for n in lengths]
        outputs = self.forward(Sequences.concatenate(parts))[:, 0]
        return outputs.reshape(len(lengths), len(answers)).mean(axis=0, dtype=np.float64)


class StackedJudge(Judge):
    """A judge that combines others, and perhaps trees over the surface, as the workflow's stacks do.

    contract: its own, with the weights.
    members: the judges, by name, in the order of the weights.
    trees: over the surface, if they are a member.
    """

    contract: StackContract
    _kind = "a stack"

    def __init__(
        self, contract: StackContract, members: dict[str, Judge], trees: Trees | None
    ) -> None:
        self.contract, self.members, self.trees = contract, members, trees

    @property
    def models(self) -> tuple[ModelJudge, ...]:
        return tuple(chain(*(member.models for member in self.members.values())))

    def run_by(self, forward_of: Callable[[ModelJudge], Forward]) -> StackedJudge:
        members = {name: member.run_by(forward_of) for name, member in self.members.items()}
        return StackedJudge(self.contract, members, self.trees)

    def sequences(self, battles: pa.Table) -> dict[str, Sequences]:
        return {
            f"{name}/{view}": shown
            for name, member in self.members.items()
            for view, shown in member.sequences(battles).items()
        }

    def see(self, battles: pa.Table) -> Seen:
        seen = [member.see(battles) for member in self.members.values()]
        logits = [found.logits for found in seen]
        if self.trees:
            surface = surface_features(battles)
            said = ask_surface(self.trees, surface, len(self.contract.classes))
            logits.append(np.broadcast_to(surface_logits(said)[:, None, None], logits[0].shape))
        weights = np.array(self.contract.weights)
        return Seen(
            combine(logits, weights, self.contract.temperature).astype(np.float32),
            {name: np.max([found.cut[name] for found in seen], axis=0) for name in FIELDS},
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


def _load_stack(
    folder: Path, contract: StackContract, load: Callable[[Path], Judge]
) -> StackedJudge:
    """A stack whose members `load` loads."""
    trees, members = None, {}
    if contract.surface is not None:  # first: weights may take minutes
        trees = read_trees(folder / TREES, len(contract.classes))
    for name in contract.members:
        place = folder / MEMBERS / name
        if not place.is_dir():
            raise InputError(
                f"{place}: a member of the stack is missing; copy its whole folder again"
            )
        members[name] = load(place)
        known = members[name].contract
        if (known.classes, known.orders) != (contract.classes, contract.orders):
            raise InputError(
                f"{place}: not the member that {folder / FILE} knows: other classes or orders; copy the "
                "stack's whole folder again"
            )
    return StackedJudge(contract, members, trees)


def _load(
    folder: Path,
    contract: ModelContract,
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
