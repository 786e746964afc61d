"""What the settings of all phases share: their versions, and how a command reads them.

A phase's settings are its rule's ``params``: changing them rebuilds that phase and what follows, and
nothing else does. So they hold no more than the phase reads, and never `compute`, which decides only
how a job runs. Rules hand them over as JSON of what differs from the defaults (``Section.as_params``), so
a new key rebuilds nothing; the command line reads them back with :func:`parse`. The settings themselves
are beside this module, one module for each package that they serve.
"""

from __future__ import annotations

from typing import TypeVar

from pydantic import ValidationError

from arena_distill.config.mistakes import explain
from arena_distill.config.section import Section
from arena_distill.errors import InputError

VERSIONS = {
    "simulate": 1,
    "fetch": 3,
    "battles": 5,
    "solution": 1,
    "folds": 2,
    "counts": 1,
    "audit": 2,
    "backbone": 1,
    "tokens": 4,
    "pretraining": 6,
    "features": 1,
    "probe": 3,
    "training": 6,
    "distillation": 7,
    "logits": 2,
    "stack": 1,
    "stacked_logits": 1,
    "stacked_views": 1,
    "endpoint": 1,
    "external_logits": 2,
    "merging": 5,
    "soups": 4,
    "quantization": 4,
    "drift": 1,
    "scoring": 2,
    "calibration": 4,
    "prediction": 2,
    "submission": 1,
    "benchmarks": 2,
    "judge": 3,
    "stacked_judge": 1,
    "surface": 2,
    "evaluation": 17,
    "comparison": 7,
    "curves": 3,
    "averaging": 1,
    "report": 17,
}


class Settings(Section):
    """Settings of one phase: its version and the part of the configuration that it computes by."""

    version: int


T = TypeVar("T", bound=Section)


def parse(model: type[T], text: str) -> T:
    """Read settings back from JSON.

    Raises:
        InputError: one line per mistake.
    """
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        raise InputError("\n".join(explain(error, of=model))) from None
