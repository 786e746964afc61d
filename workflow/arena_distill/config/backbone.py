"""The pretrained model under a judge."""

from __future__ import annotations

import re
from pathlib import Path, PurePath

from pydantic import PositiveInt, model_validator

from arena_distill.config.section import FilePath, Section, Word
from arena_distill.config.vocabulary import Family

TINY = Path(__file__).parents[1] / "models" / "tiny"
"""The tiny pretrained models that ship with the package, a folder per family."""


class Backbone(Section):
    """The pretrained model under a judge: exactly one of `path`, `hub`, `gguf`, `tiny`."""

    path: FilePath | None = None
    """A local Hugging Face folder."""
    hub: Word | None = None
    """A Hugging Face hub id; needs `revision`. Only `hub`, `kaggle` and endpoints use the network."""
    revision: Word | None = None
    """A commit on the hub, or a tag or branch; provenance.json records the commit."""
    gguf: FilePath | None = None
    """A GGUF file, converted once to an ordinary folder."""
    tiny: Family | None = None
    """One of the tiny pretrained models that ship with the workflow."""
    layers: PositiveInt | None = None
    """Keep only the first N layers: a cheap student of the same family."""
    tokenizer: FilePath | None = None
    """A folder with another tokenizer, with new embeddings: for config/real-tokenizers.yaml."""

    @model_validator(mode="after")
    def _exactly_one(self) -> Backbone:
        given = [k for k in ("path", "hub", "gguf", "tiny") if getattr(self, k) is not None]
        if len(given) != 1:
            raise ValueError(f"needs exactly one of path, hub, gguf, tiny; got {given or 'none'}")
        if (self.hub is None) != (self.revision is None):
            raise ValueError("`hub` and `revision` (a commit) go together")
        return self

    def is_ready_folder(self) -> bool:
        """Whether the folder can be used as it is, without a job that prepares it."""
        return bool(self.path or self.tiny) and self.layers is None and self.tokenizer is None

    def described_by(self) -> str | None:
        """The config.json of a model that is here already."""
        folder = self.path or (str(TINY / self.tiny) if self.tiny else None)
        return folder and f"{folder}/config.json"

    def download(self) -> Backbone | None:
        """What of it comes from the hub, as it is there."""
        return Backbone(hub=self.hub, revision=self.revision) if self.hub else None

    def whole(self) -> Backbone:
        """The same backbone with all its layers: what decides the tokenizer."""
        return self.model_copy(update={"layers": None})

    def stem(self) -> str:
        """A short readable name; made unique by :meth:`Config.backbone_name`."""
        source = self.path or self.hub or self.gguf or f"tiny-{self.tiny}"
        stem = PurePath(source).name.removesuffix(".gguf")
        stem += f"-{self.layers}layers" if self.layers else ""
        stem += f"-{PurePath(self.tokenizer).name}" if self.tokenizer else ""
        # It names folders and wildcards: of a path such as `..` or `my model` keep what is safe there.
        return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip(".-") or "backbone"
