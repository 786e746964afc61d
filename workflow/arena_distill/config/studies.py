"""What is studied beside the run: comparisons of recipes, learning curves, averages of folds."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from arena_distill.config.section import Distinct, FilePath, Name, Section, Seed


class Compare(Section):
    """`snakemake compare`: the final judge and its teachers under several recipes."""

    recipes: Distinct[tuple[Name, ...]] = ("summary", "blackpearl", "best")
    """Names of files in config/recipes; what two recipes share is computed once."""
    variants: dict[Name, dict[str, Any]] = {}
    """More recipes, by name: keys of `defaults` that differ, such as `{targets: in_sample}`."""
    votes: bool = True
    """Beside each student the same judge trained on votes alone: what distillation adds."""
    seeds: Distinct[tuple[Seed, ...]] = Field((), max_length=20)
    """Also train each judge with these seeds (training.seed): no interval covers the luck of training."""
    vary: Literal["student", "all"] = "student"
    """Whose seed: the compared judge's, or also those of its teachers and of all post-pretraining."""
    runs: Distinct[tuple[FilePath, ...]] = ()
    """Folders of other runs, whose judges are compared on the common battles."""
    resamples: Annotated[int, Field(ge=100)] = 2000
    """Resamples of the bootstrap."""


class Studies(Section):
    """`snakemake curves` and `snakemake averaging`: more battles, and folds that drift apart."""

    curve_judges: tuple[Name, ...] = ()
    """Judges whose learning curves are drawn; empty: the final one, on votes, with both heads."""
    curve_shares: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (0.125, 0.25, 0.5, 1)
    """Shares of a fold's training battles: the points of a learning curve."""
    curve_folds: PositiveInt = 1
    """Number of folds whose mean is a learning curve."""
    averaging_epochs: tuple[PositiveFloat, ...] = (0.25, 0.5, 1, 2, 4)
    """Epochs that the folds train before they are averaged."""
