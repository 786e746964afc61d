"""How a battle becomes a sequence of tokens: the keys of ``judges.*.encoding``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    Field,
    field_validator,
)

from arena_distill.config.section import Distinct, Section


class Encoding(Section):
    """How a battle becomes a sequence of tokens."""

    template: Literal["winners", "markers"] = "markers"
    """`winners`: User question / Answer A / Answer B; `markers`: [PROMPT] [RESPONSE_A] [RESPONSE_B]."""
    truncation: Literal["winners", "rounds", "middle"] = "rounds"
    """`winners`: word caps, question to 256 tokens, longer answer first; `rounds`: keep last rounds;
    `middle`: keep the head and the tail of every part, in proportion to their lengths."""
    max_length: Annotated[int, Field(ge=32)] = 1024
    """Tokens per sequence in training and in the folds' logits."""
    sizes: bool = False
    """Append to each answer its number of tokens before truncation."""
    tokens_per_battle: Annotated[int, Field(ge=32)] | None = None
    """Mean tokens per sequence of training battles; one length limit, found from it, cuts all battles."""
    privileged: Distinct[tuple[Literal["model_a", "model_b"], ...]] = ()
    """`[model_a, model_b]`: read the models' names before the answers. Never for students or the final."""

    @field_validator("privileged")
    @classmethod
    def _both_names_or_none(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(value) == 1:
            raise ValueError(
                f"give [model_a, model_b] or nothing: with {value[0]} alone the sides would not be alike"
            )
        return tuple(sorted(value))
