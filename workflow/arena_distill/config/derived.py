"""Families of judges derived from a run's own: a study is a part of the graph like any other.

A comparison of recipes, a learning curve, a series of folds that drift apart: each is a set of judges
that differ from the final one in a few keys. They get names of their own (`student.best`,
`student.joint.400`), the same rules train and score them, and what two of them share (a post-pretrained
adapter, a teacher) is computed once. `all` needs none of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from arena_distill.config import run as configuration
from arena_distill.config.head import HeadKeys
from arena_distill.config.judge import Judge
from arena_distill.config.prediction import Prediction
from arena_distill.config.run import Config, overlay
from arena_distill.errors import InputError

RECIPES = Path(__file__).parent / "recipes"

VOTES = "votes"
"""What a student trained on votes alone is called, after its recipe."""


@dataclass(frozen=True)
class Compared:
    """An entry of the comparison.

    judge: its name in the graph.
    folds: the judge whose folds it has, where it differs in their merging alone.
    against: the label of the same judge without teachers, where this one has some.
    prediction: how its recipe averages test predictions.
    tested: its merged model is scored on the test battles too.
    repeats: the label of the entry of which this is another training.
    """

    label: str
    judge: str
    folds: str
    prediction: Prediction
    against: str | None = None
    tested: bool = True
    repeats: str | None = None


@dataclass
class JudgeFamily:
    """Judges by name, a run's own and those derived; an equal judge is never there twice."""

    judges: dict[str, Judge]
    _names: dict[tuple[Any, ...], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, judge in self.judges.items():
            for key in (_folds(judge), (_folds(judge), judge.merge)):
                self._names.setdefault(key, name)

    def add(self, name: str, judge: Judge, *, merged: bool = False) -> str:
        """The name of this judge: that of an equal one, else `name`, under which it joins.

        Args:
            merged: how its folds are merged counts too.
        """
        key = (_folds(judge), judge.merge) if merged else _folds(judge)
        known = self._names.setdefault(key, name)
        self._names.setdefault(_folds(judge), known)
        if known == name and self.judges.setdefault(name, judge) != judge:
            raise InputError(f"config: judges.{name}: a study needs this name; rename the judge")
        return known

    def trained_as(self, name: str) -> str:
        """The judge whose folds these are: one that differs in nothing but how its folds are merged."""
        return self._names[_folds(self.judges[name])]


def _folds(judge: Judge) -> tuple[Any, ...]:
    """What decides a judge's folds: neither how jobs run, nor the loss of teachers it lacks."""
    if not judge.backbone:
        return judge.external and judge.external.as_params(), judge.stack
    student = bool(judge.teachers)
    return (
        judge.before_folds(),
        judge.pretraining,
        judge.training,
        judge.teachers,
        judge.targets if student else None,
        judge.loss if student else judge.loss.on_votes(),
        judge.learns_pseudo_labels(),
    )


@dataclass(frozen=True)
class DerivedStudies:
    """What the studies of a run consist of; see the functions of the same names."""

    compared: list[Compared]
    curves: dict[str, dict[float, str]]
    averaging: dict[str, dict[float, str]]
    problem: str = ""
    """Why there is no comparison: a recipe does not fit this configuration, or nothing is trained."""


def derive(config: Config, raw: Mapping[str, Any], family: JudgeFamily) -> DerivedStudies:
    """All studies of a configuration; `family` gains their judges.

    A recipe that does not fit is no reason to refuse a run that compares nothing.
    """
    if config.judges[config.final].stack:
        told = f"{config.final} is a stack, which is not trained: let `final` name a judge to study"
        return DerivedStudies([], {}, {}, told)
    entries: list[Compared] = []
    problem = ""
    try:
        entries = compared(config, raw, family)
    except InputError as error:
        problem = str(error)
    return DerivedStudies(entries, curves(config, family), averaging(config, family), problem)


def compared(config: Config, raw: Mapping[str, Any], family: JudgeFamily) -> list[Compared]:
    """The final judge under every recipe, and on votes alone; and the run's judges as they are.

    Their calibration is not a recipe's: see ``Config.fold_calibration``.

    Args:
        raw: the configuration as it was read: a recipe lies between its `defaults` and its judges.
        family: gains the judges that are new.

    Raises:
        InputError: there is no such recipe, or it does not fit the configuration.
    """
    entries: list[Compared] = []
    recipes = {name: _recipe(name) for name in config.compare.recipes}
    recipes |= {name: {"defaults": keys} for name, keys in config.compare.variants.items()}
    for recipe, text in recipes.items():
        parts = {part: text[part] for part in ("defaults", "prediction") if part in text}
        parts = overlay(parts, {"prediction": {"calibration": "none"}})
        if not config.folds.choices:  # the folds are this run's, whatever a recipe says of them
            parts = overlay(parts, {"defaults": {"training": {"keep": "last", "patience": None}}})
        under = configuration.load(overlay(raw, parts))
        names: dict[str, str] = {}
        for judge in _teachers_first(under, under.final):
            node = under.judges[judge]
            renamed = node.model_copy(update={"teachers": tuple(names[t] for t in node.teachers)})
            if node.stack:
                members = tuple(names[member] for member in node.stack.judges)
                stack = node.stack.model_copy(update={"judges": members})
                renamed = node.model_copy(update={"stack": stack})
            merged = judge == under.final
            names[judge] = family.add(f"{judge}.{recipe}", renamed, merged=merged)
        final = names[under.final]
        alone = _on_votes(family.judges[final])
        against = None
        if config.compare.votes and alone != family.judges[final]:
            against = f"{recipe}, {VOTES}"
            name = family.add(f"{under.final}.{recipe}.{VOTES}", alone, merged=True)
            if name not in {entry.judge for entry in entries}:
                entries.append(Compared(against, name, family.trained_as(name), under.prediction))
            else:
                against = next(entry.label for entry in entries if entry.judge == name)
        entries.append(Compared(recipe, final, family.trained_as(final), under.prediction, against))
    repeated = []
    for seed, entry in itertools.product(config.compare.seeds, entries):
        name = _seeded(entry.judge, seed, family, teachers=config.compare.vary == "all")
        against = entry.against and f"{entry.against}, seed {seed}"
        label, folds = f"{entry.label}, seed {seed}", family.trained_as(name)
        again = Compared(label, name, folds, entry.prediction, against, repeats=entry.label)
        repeated.append(again)
    shown = {entry.judge for entry in entries}
    others = [
        Compared(name, name, name, config.prediction, tested=name == config.final)
        for name in config.scored()
        if name not in shown
    ]
    return others + entries + repeated


def curves(config: Config, family: JudgeFamily) -> dict[str, dict[float, str]]:
    """Learning curves: label → share of the training battles → judge.

    Without `curve_judges`: the final judge trained on votes, with its own head and with the other kind.
    """
    final = _on_votes(config.judges[config.final])
    heads = {final.head.kind: final.head}
    if not final.frozen:
        heads = {kind: HeadKeys(kind=kind) for kind in ("joint", "pointwise")} | heads
    chosen = {name: config.judges[name] for name in config.studies.curve_judges} or {
        f"{config.final}.{kind}": final.model_copy(update={"head": head})
        for kind, head in heads.items()
    }
    return {
        label: {
            share: family.add(f"{label}.{share:g}", _trained(judge, share=share))
            for share in sorted(set(config.studies.curve_shares))
        }
        for label, judge in chosen.items()
    }


def averaging(config: Config, family: JudgeFamily) -> dict[str, dict[float, str]]:
    """The final judge on votes, its folds trained apart for longer and longer: start → epochs → judge.

    `shared`: all folds start from one adapter and head; `own`: each from its own. Neither is
    post-pretrained, which would be a shared start.
    """
    judge = _on_votes(config.judges[config.final]).model_copy(update={"pretraining": None})
    if judge.frozen or judge.lora is None:  # the mean of linear heads, or of weights, is exact
        return {}
    return {
        start: {
            epochs: family.add(
                f"{config.final}.{start}.{epochs:g}epochs",
                _trained(judge, epochs=epochs, own_start=start == "own"),
            )
            for epochs in config.studies.averaging_epochs
        }
        for start in ("shared", "own")
    }


def _recipe(name: str) -> Mapping[str, Any]:
    path = RECIPES / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in RECIPES.glob("*.yaml")))
        raise InputError(f"config: compare.recipes: no recipe {name!r}; there are {known}")
    return dict(yaml.safe_load(path.read_text(encoding="utf-8")) or {})


def _seeded(name: str, seed: int, family: JudgeFamily, *, teachers: bool) -> str:
    """The same judge, trained with another seed; with `teachers` also they and all post-pretraining."""
    judge = family.judges[name]
    if judge.external:
        return name
    if teachers:
        taught = [_seeded(teacher, seed, family, teachers=True) for teacher in judge.teachers]
        start = judge.pretraining and judge.pretraining.model_copy(update={"seed": seed})
        judge = judge.model_copy(update={"teachers": tuple(taught), "pretraining": start})
    return family.add(f"{name}.seed{seed}", _trained(judge, seed=seed), merged=True)


def _teachers_first(config: Config, judge: str) -> list[str]:
    """A judge and all that it is made of, directly or through others."""
    needed, open_ = {judge}, [judge]
    while open_:
        new = [source for source in config.judges[open_.pop()].sources() if source not in needed]
        needed.update(new)
        open_.extend(new)
    return [name for name in config.ordered() if name in needed]


def _on_votes(judge: Judge) -> Judge:
    return judge.model_copy(update={"teachers": ()})


def _trained(judge: Judge, **changes: Any) -> Judge:
    return judge.model_copy(update={"training": judge.training.model_copy(update=changes)})
