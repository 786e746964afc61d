"""Define `judge.json`: all that is needed to ask a judge in the way in which it was trained and scored.

A judge is a model, or a stack of judges that are folders inside its own. A folder with this file is whole:
the template as text and as ids, truncation, lengths, orders, average and calibration, fingerprints of the
weights and the tokenizer, scores, and test vectors. Whoever loads the judge, with this package or without
it, can check itself against the vectors.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, ValidationError, model_validator

from arena_distill.config.encoding import Encoding
from arena_distill.config.head import Head
from arena_distill.config.mistakes import explain
from arena_distill.config.phases.prediction import ScoringSettings
from arena_distill.config.phases.settings import VERSIONS
from arena_distill.config.prediction import Cascade
from arena_distill.config.section import Name, Section
from arena_distill.config.vocabulary import CalibrationMethod, ModelKind, ViewAverage
from arena_distill.encoding.sequences import Vocabulary
from arena_distill.errors import InputError
from arena_distill.files.artifacts import file_sha256
from arena_distill.prediction.calibration import CalibrationMap
from arena_distill.verdicts import Order

FILE = "judge.json"

MEMBERS = "members"
"""The folder of a stack's members."""

TREES = "surface.safetensors"
"""A stack's trees."""


class Template(Section):
    """The text around the fields of a battle."""

    name: str
    literals: tuple[str, ...]
    """Before the prompt, before each answer, and after the last answer."""
    frame: tuple[tuple[int, ...], ...]
    """The same as token ids; the first with begin of sequence, the last with end of sequence."""
    size: str | None = None
    """The text after an answer, with its number of tokens before truncation in place of {}."""


class Calibrated(Section):
    """The calibration of averaged probabilities: their logarithms minus the mean of these, times `scale`,
    plus `bias`, plus the style's effect."""

    method: CalibrationMethod
    scale: tuple[float, ...]
    bias: tuple[float, ...]
    lead: tuple[float, ...] = ()
    tie: tuple[float, ...] = ()
    fitted_on: str
    """The logits and votes that it was fitted to."""

    def map(self) -> CalibrationMap:
        return CalibrationMap(*map(np.array, (self.scale, self.bias, self.lead, self.tie)))


class Score(Section):
    """A figure with its 95 % interval over prompts."""

    value: float
    low: float | None = None
    high: float | None = None
    """None: the battles have one prompt."""


class Scores(Section):
    """What this very model scored, as it is deployed, on battles with votes that nobody trained on."""

    battles: int
    of: Literal["test", "held_out"] = "test"
    """Test battles, or those that were held out; on these the calibration is cross-fitted."""
    log_loss: Score
    accuracy: Score
    ece: float
    """Expected calibration error."""


class Vector(Section):
    """A battle, and what the judge says of it."""

    about: str
    prompt: tuple[str, ...]
    response_a: tuple[str, ...]
    response_b: tuple[str, ...]
    ids: dict[str, tuple[int, ...]]
    """Token ids by ``<length>/<view>``, of a stack after ``<member>/``."""
    logits: tuple[tuple[tuple[float, ...], ...], ...]
    """By length and order, in the canonical frame, before calibration."""
    probabilities: tuple[float, ...]


class Contract(Section):
    """What the `judge.json` of every judge says."""

    format: Literal[1] = 1
    judge: str
    """Its name."""
    kind: ModelKind
    """`gptq`: GPTQModel is needed to load it."""
    run: str
    classes: tuple[str, ...]
    """The order of all logits and probabilities; answers are exchanged back first. Two: without `tie`."""
    lengths: tuple[int, ...]
    """The most tokens of a sequence, of a stack those of any member; the logits of several are averaged."""
    orders: tuple[Order, ...]
    average: ViewAverage
    """What is averaged over lengths and orders."""
    calibration: Calibrated | None = None
    dtype: str
    """Of the weights; of a stack the least precise."""
    sources: dict[str, int]
    """Battles of the run by source."""
    scores: Scores | None = None
    fingerprints: dict[str, str]
    """SHA-256 of the files of weights and tokenizer, by name; of a stack by their paths in it."""
    vectors: tuple[Vector, ...] = ()
    provenance: dict[str, Any] = {}


class ModelContract(Contract):
    """The `judge.json` of a judge that is a model."""

    head: Head
    encoding: Encoding
    """Template, truncation and sizes; `max_length` is that of training."""
    template: Template
    newline: tuple[int, ...]
    """The ids between two turns of a field."""
    pad: int
    """Pad on the right with this id, which occurs in no sequence; pooling reads the last other token."""
    cascade: Cascade | None = None
    backbone: str

    @property
    def scoring(self) -> ScoringSettings:
        """How battles are scored, as for the phase that scores the test battles."""
        return ScoringSettings(
            version=VERSIONS["scoring"],
            encoding=self.encoding,
            head=self.head,
            precision="fp32" if self.dtype == "float32" else "bf16",
            max_lengths=self.lengths,
            orders=self.orders,
            cascade=self.cascade,
        )

    @property
    def vocabulary(self) -> Vocabulary:
        """The ids around the fields, as the encoding takes them."""
        frames = {self.template.name: self.template.frame}
        joint = self.head.kind == "joint"
        return Vocabulary(self.pad, self.newline, frames if joint else {}, {} if joint else frames)


class StackContract(Contract):
    """The `judge.json` of a stack: its logits are its members', each times its weight, added, and divided
    by the temperature (``scoring.stacks``). A member is a judge of its own, in `members/<name>`."""

    members: dict[Name, float]
    """Weights of the members that are judges, whose own averages and calibrations do not count."""
    surface: float | None = None
    """Weight of the trees over what shows on a battle's surface, in `surface.safetensors`."""
    temperature: float = Field(gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _shares(self) -> StackContract:
        weights = self.weights
        if not self.members or min(weights) < 0 or not abs(sum(weights) - 1) < 1e-6:
            raise ValueError("members: weights of at least 0 whose sum is 1 expected")
        return self

    @property
    def weights(self) -> list[float]:
        """Of the members, and of the trees if they are one."""
        return [*self.members.values(), *([] if self.surface is None else [self.surface])]


AnyContract = ModelContract | StackContract


def read_contract(folder: Path) -> AnyContract:
    """Read `judge.json`.

    Raises:
        InputError: there is none, it is damaged, or a newer version of this package wrote it.
    """
    path = folder / FILE
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    if not path.exists():
        raise InputError(
            f"{folder}: has no {FILE}, so nothing says how this model is asked; give a folder that the "
            "workflow has finished: results/<run>/merged/<judge> or results/<run>/gptq/<judge>"
        )
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a JSON file ({error})") from None
    version = found.get("format") if isinstance(found, dict) else None
    if version != 1:
        raise InputError(
            f"{path}: format {version!r}, and this version of arena-distill reads 1; install the "
            "version that made the judge, or a newer one"
        )
    kind = StackContract if "members" in found else ModelContract
    try:
        return kind.model_validate(found)
    except ValidationError as error:
        fault = explain(error, kind)[0].removeprefix("config: ")
        raise InputError(f"{path}: damaged: {fault}") from None


def changed_files(folder: Path, contract: Contract) -> list[str]:
    """The names of weights and tokenizer files that are missing, or not those of the fingerprints."""
    return [
        name
        for name, digest in contract.fingerprints.items()
        if not (folder / name).is_file() or file_sha256(folder / name) != digest
    ]
