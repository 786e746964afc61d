"""Settings of the phases that compute the figures of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from arena_distill.config.phases.battles import interpreted, told
from arena_distill.config.phases.settings import VERSIONS, Settings
from arena_distill.config.run import Config
from arena_distill.config.source import Source
from arena_distill.config.vocabulary import ModelKind


class BenchmarkSettings(Settings):
    """How files of benchmarks are read."""

    sources: dict[str, tuple[Source, ...]] = {}
    """What is not understood by default: by benchmark, its files."""

    @classmethod
    def of(cls, config: Config, judge: str) -> BenchmarkSettings:
        return cls(version=VERSIONS["benchmarks"], sources=told(config.benchmarks))

    def files_of(self, named: Sequence[str]) -> dict[str, list[Source]]:
        """The files of each benchmark: NAME=PATH of each, in the order of the configuration."""
        files: dict[str, list[Path]] = {}
        for name, _, path in (one.partition("=") for one in named):
            files.setdefault(name, []).append(Path(path))
        return {name: interpreted(self.sources.get(name, ()), of) for name, of in files.items()}


class EvaluationSettings(Settings):
    """What is evaluated."""

    run: str
    judges: dict[str, tuple[str, ...]]
    """Teachers by judge."""
    external: tuple[str, ...] = ()
    """Judges that are not trained here."""
    privileged: tuple[str, ...] = ()
    """Judges that read the models' names."""
    optimistic: tuple[str, ...] = ()
    """Students whose teachers have learned from the very votes that they are scored by out of fold."""
    merged: tuple[Literal["train", "test"], ...] = ()
    """Sources with `annotators: merge`: a battle's weight is the number of its voters."""
    contradicted_below: float = 0.1
    """The probability below which all teachers of the final judge contradict a vote."""
    final: str
    model: ModelKind
    """The model of the final judge that is submitted."""

    @classmethod
    def of(cls, config: Config) -> EvaluationSettings:
        return cls(
            version=VERSIONS["evaluation"],
            run=config.run,
            judges={n: config.judges[n].teachers for n in config.ordered() if n in config.scored()},
            external=tuple(name for name in config.scored() if config.judges[name].external),
            privileged=tuple(n for n in config.judges if config.is_privileged(n)),
            optimistic=tuple(filter(config.is_optimistic, config.judges)),
            merged=config.data.merged(),
            contradicted_below=config.judges[config.final].loss.contradicted_below,
            final=config.final,
            model=config.prediction.model,
        )
