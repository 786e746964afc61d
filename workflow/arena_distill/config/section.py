"""What all parts of the configuration are: immutable, closed to unknown keys, dumped by one rule."""

from __future__ import annotations

import os.path
import reprlib
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
)

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
"""Of a judge, a run or a recipe: a part of file names."""

Word = Annotated[str, Field(pattern=r"^[^\s-]\S*$")]
"""A name in somebody else's hands: of a model on the hub, a revision, a module."""

Share = Annotated[float, Field(ge=0, le=1)]

Seed = Annotated[int, Field(ge=0, lt=1 << 32)]
"""What NumPy, scikit-learn and PyTorch all take."""


def _usable(path: str) -> str:
    """Refuse a path that the rules, a shell or a command would take for something else."""
    if not path.strip():
        raise ValueError("a path expected, got nothing: write one, or leave the key out")
    if path.startswith("~"):
        raise ValueError(f"~ is not expanded: write {os.path.expanduser(path)}, got {path!r}")
    if path.startswith("-"):
        raise ValueError(f"what starts with - is taken for an option: write ./{path}")
    if not path.isprintable():
        raise ValueError(f"a character that cannot be printed: rename it, got {path!r}")
    if "{" in path or "}" in path:
        raise ValueError(f"{{ and }} are wildcards of Snakemake: rename it, got {path!r}")
    return path


FilePath = Annotated[str, AfterValidator(_usable)]
"""A file or folder. Spaces, quotes and dollars are as good as letters."""

Items = TypeVar("Items", bound=tuple[Any, ...])


def _distinct(values: Items) -> Items:
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"{value} is named twice")
    return values


Distinct = Annotated[Items, AfterValidator(_distinct)]


class Section(BaseModel):
    """A part of the configuration: immutable, and closed to keys it does not know.

    The docstrings of keys are read by ``scripts/write_config_reference.py`` alone: pydantic would parse the
    source of each section again, in every job.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,  # JSON, in which settings are handed over, has neither
        defer_build=True,  # a command needs few of the many sections
    )

    @field_validator("*", mode="before")
    @classmethod
    def _a_switch_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse `lr: true` and `sizes: 1`, which pydantic would take for 1.0 and true."""
        if cls.model_fields[str(info.field_name)].annotation is bool:
            if not isinstance(value, bool):
                raise ValueError(f"true or false expected, got {value!r}")
        elif any(isinstance(v, bool) for v in (value if isinstance(value, list) else [value])):
            raise ValueError(
                f"this key is no switch: true and false mean nothing here, got {reprlib.repr(value)}"
            )
        return value

    def as_params(self) -> str:
        """What decides results, for a rule's params and for names: JSON of what differs from the defaults.

        A new key changes nothing as long as nobody sets it. A changed default would change nothing
        either: it has to raise the versions of its phases (``config.phases.settings.VERSIONS``).
        """
        return self.model_dump_json(exclude_defaults=True)
