"""Define the requests and answers of the server as pydantic models, which also give the OpenAPI page."""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from arena_distill.verdicts import Order

OURS = "arena-distill"
"""Whose models a server lists; a client asks for it."""


def _whole(text: str) -> str:
    """Refuse what JSON can write but UTF-8 cannot."""
    if not text.isascii():
        text.encode()  # UnicodeEncodeError is a ValueError: pydantic tells it
    return text


Str = Annotated[str, AfterValidator(_whole)]

Text = Str | list[Str]
"""A text, or a list of turns."""


class Message(BaseModel):
    """Types are exact: a number is no text. Unknown keys are ignored, as columns of a file are."""

    model_config = ConfigDict(strict=True)


class Battle(Message):
    id: Str | int | None = None
    prompt: Text = Field(description="A text, or a list of turns.")
    response_a: Text
    response_b: Text


class JudgeRequest(Message):
    battles: list[Battle] = Field(min_length=1)
    kept: bool = Field(False, description="Also say which characters of each text the judge read.")


class VerdictOfBattle(Message):
    id: str
    probabilities: dict[str, float] = Field(description="By class, after average and calibration.")
    winner: str = Field(description="The likeliest class.")
    orders: dict[Order, dict[str, float]] = Field(
        description="The probabilities from one order of the answers alone."
    )
    cut: dict[str, int] = Field(description="Tokens that the judge did not read, by field.")
    kept: dict[str, list[list[tuple[int, int]]]] | None = Field(
        None, description="By field and turn, what was read: ranges, first character and end."
    )


class JudgeAnswer(Message):
    judge: str
    classes: list[str]
    verdicts: list[VerdictOfBattle]


class About(Message):
    """How the judge is asked, what it scored, and battles to try."""

    judge: str
    kind: Literal["joint", "pointwise", "stack"]
    classes: list[str]
    orders: list[Order]
    lengths: list[int]
    calibration: str | None
    scores: dict[str, Any] | None
    examples: list[dict[str, Any]]


Ids = list[Annotated[int, Field(ge=0, lt=1 << 31)]]


class ClassifyRequest(Message):
    """As vLLM's."""

    model: str | None = None
    input: Str | Ids | list[Str] | list[Ids] = Field(
        description="Token ids of one sequence or many: exactly what the model reads. A text becomes the "
        "ids that the tokenizer gives for it as a whole, which are not those of training."
    )
    use_activation: bool | None = Field(
        None, description="False: the outputs of the head. Else, of a joint judge, their softmax."
    )


class Classified(Message):
    index: int
    label: str
    probs: list[float]
    num_classes: int


class Usage(Message):
    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0


class ClassifyAnswer(Message):
    id: str = Field(default_factory=lambda: f"classify-{uuid.uuid4().hex}")
    object: str = "list"
    created: int = Field(default_factory=lambda: int(time.time()))
    model: str
    data: list[Classified]
    usage: Usage


class RewardRequest(Message):
    """As OpenRLHF's: each query is its prompt, followed by an answer."""

    query: list[Str] = Field(min_length=1)
    prompts: list[Str]


class RewardAnswer(Message):
    rewards: list[float]
    scores: list[float] = Field(description="The same; OpenRLHF reads either.")
    extra_logs: dict[str, list[float]] = {}


class Model(Message):
    id: str
    object: str = "model"
    owned_by: str = OURS


class Models(Message):
    object: str = "list"
    data: list[Model]


class Health(Message):
    status: str = "ok"
    judge: str


class Refusal(Message):
    """Why a request was refused, in one line."""

    error: dict[str, str | int]
