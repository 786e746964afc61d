"""The Python interpreters that run the jobs."""

from __future__ import annotations

from arena_distill.config.section import FilePath, Section

IMAGE = "/opt/arena-distill"
"""Where `Containerfile` makes the two environments."""


class Environments(Section):
    """Python interpreters of the two environments; paths are relative to the checkout."""

    main: FilePath | None = None
    """null: the interpreter that runs Snakemake."""
    gptq: FilePath = ".venv-gptq/bin/python"
    """The interpreter of the environment with GPTQModel."""
    container: str | None = None
    """`--sdm apptainer`: an image made by `Containerfile` (docker://…, or a .sif file) has both instead."""

    def in_image(self, interpreter: str | None) -> str:
        """The interpreter in the image that stands for one of these."""
        return f"{IMAGE}/{'.venv-gptq' if interpreter == self.gptq else '.venv'}/bin/python"
