"""Settings of the studies: comparison, learning curves, averaging."""

from __future__ import annotations

from arena_distill.config.derived import DerivedStudies
from arena_distill.config.phases.settings import VERSIONS, Settings
from arena_distill.config.prediction import Prediction
from arena_distill.config.run import Config
from arena_distill.config.section import Name, Section
from arena_distill.config.vocabulary import Calibration


class Entry(Section):
    """A judge of the comparison."""

    label: str
    judge: Name
    folds: Name
    """The judge whose folds it has: another one, where the two differ in merging alone."""
    teachers: tuple[Name, ...]
    against: str | None
    """The label of the same judge on votes alone."""
    tested: bool
    """Whether its merged model is scored on the test battles."""
    optimistic: bool = False
    """Whether its teachers have learned from the very votes that it is scored by out of fold."""
    calibration: Calibration = "none"
    """Of its folds' models, cross-fitted: a diagnostic."""
    prediction: Prediction
    repeats: str | None = None
    """The label of the entry of which this is another training."""


class CompareSettings(Settings):
    """What is compared."""

    run: str
    entries: tuple[Entry, ...]
    runs: tuple[str, ...]
    resamples: int

    @classmethod
    def of(cls, config: Config, studies: DerivedStudies) -> CompareSettings:
        return cls(
            version=VERSIONS["comparison"],
            run=config.run,
            entries=tuple(
                Entry(
                    label=entry.label,
                    judge=entry.judge,
                    folds=entry.folds,
                    teachers=config.judges[entry.judge].teachers,
                    against=entry.against,
                    tested=entry.tested,
                    optimistic=config.is_optimistic(entry.judge),
                    calibration=config.fold_calibration(entry.judge),
                    prediction=entry.prediction.model_copy(update={"calibration": "none"}),
                    repeats=entry.repeats,
                )
                for entry in studies.compared
            ),
            runs=config.compare.runs,
            resamples=config.compare.resamples,
        )


class CurveSettings(Settings):
    """Learning curves: label → share of the training battles, as text → judge."""

    curves: dict[str, dict[str, Name]]
    folds: int

    @classmethod
    def of(cls, config: Config, studies: DerivedStudies) -> CurveSettings:
        return cls(
            version=VERSIONS["curves"],
            curves={
                label: {f"{share:g}": judge for share, judge in points.items()}
                for label, points in studies.curves.items()
            },
            folds=config.studies.curve_folds,
        )


class AveragingSettings(Settings):
    """Folds that drift apart: start → epochs, as text → judge."""

    averaging: dict[str, dict[str, Name]]

    @classmethod
    def of(cls, config: Config, studies: DerivedStudies) -> AveragingSettings:
        return cls(
            version=VERSIONS["averaging"],
            averaging={
                start: {f"{epochs:g}": judge for epochs, judge in points.items()}
                for start, points in studies.averaging.items()
            },
        )
