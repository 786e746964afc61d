"""What all parts of the configuration are: immutable, closed to unknown keys, dumped by one rule."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A part of the configuration: immutable, and closed to keys it does not know."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,  # JSON, in which settings are handed over, has neither
    )

    def as_params(self) -> str:
        """What decides results, for a rule's params and for names: JSON of what differs from the defaults.

        A new key changes nothing as long as nobody sets it. A changed default would change nothing
        either: it has to raise the versions of its phases (``config.phases.VERSIONS``).
        """
        return self.model_dump_json(exclude_defaults=True)
