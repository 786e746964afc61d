"""The configuration: a typed, validated view of the YAML that drives a run.

An unknown key, a wrong type, an unknown teacher or a cycle among judges gives one line each, never a
traceback. The keys are in ``config.keys``, what follows from them in ``config.graph``, and the part of each
phase in ``config.phases``.
"""

from __future__ import annotations

import graphlib
import itertools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError, model_validator

from arena_distill.config.external import asked_without_tie
from arena_distill.config.graph import Graph
from arena_distill.config.judge import FROZEN, NOT_TRAINED, Judge
from arena_distill.config.mistakes import explain, repeated_keys
from arena_distill.errors import InputError


class Config(Graph):
    """The keys of a run, checked: each for itself, then beside the others."""

    @model_validator(mode="before")
    @classmethod
    def _judges_override_defaults(cls, value: Any) -> Any:
        if not isinstance(value, Mapping) or not isinstance(value.get("judges"), Mapping):
            return value
        defaults = value.get("defaults") or {}
        judges = {
            k: v if _is_not_trained(v) else _as_frozen(k, v, overlay(defaults, v))
            for k, v in value["judges"].items()
        }
        return {**value, "judges": judges}

    @model_validator(mode="before")
    @classmethod
    def _no_tie_to_ask_for(cls, value: Any) -> Any:
        """Without ties an endpoint is asked for two verdicts, unless its configuration says otherwise."""
        if not isinstance(value, Mapping) or value.get("classes") != 2:
            return value
        judges = value.get("judges")
        if not isinstance(judges, Mapping):
            return value
        return {**value, "judges": {name: asked_without_tie(j) for name, j in judges.items()}}

    @model_validator(mode="after")
    def _judges_are_a_graph(self) -> Config:
        known = ", ".join(self.judges)
        if self.final not in self.judges:
            raise ValueError(f"final: unknown judge {self.final!r}; known judges: {known}")
        if self.judges[self.final].external:
            raise ValueError(
                f"final: {self.final} is external: it has no model to merge and submit; "
                "name a judge that is trained"
            )
        for name, judge in self.judges.items():
            key = "stack.judges" if judge.stack else "teachers"
            for source in judge.sources():
                if source not in self.judges:
                    raise ValueError(
                        f"judges.{name}.{key}: unknown judge {source!r}; known judges: {known}"
                    )
        try:
            self.ordered()
        except graphlib.CycleError as error:
            cycle = " → ".join(reversed(error.args[1]))
            raise ValueError(
                f"judges: a cycle of teachers, {cycle}: a judge cannot teach itself"
                + (", or be a part of itself" if any(j.stack for j in self.judges.values()) else "")
            ) from None
        return self

    @model_validator(mode="after")
    def _students_learn_something(self) -> Config:
        """Refuse students that would find nothing to learn from their teachers."""
        for name, judge in self.judges.items():
            if (
                judge.teachers
                and judge.targets == "unlabelled"
                and not self.learns_unlabelled(name)
            ):
                raise ValueError(
                    f"judges.{name}.targets: unlabelled, but it learns no battles without votes: set "
                    "data.unlabelled, and leave pseudo_labels true"
                )
            for teacher in judge.teachers:
                if self.judges[teacher].without_votes() and judge.targets != "unlabelled":
                    raise ValueError(
                        f"judges.{name}.targets: {judge.targets}, but {teacher} judged battles without "
                        "votes alone: set targets: unlabelled"
                    )
        return self

    @model_validator(mode="after")
    def _members_can_be_combined(self) -> Config:
        """Refuse members whose logits out of fold, or final predictions, are not there or not honest."""
        for name, judge in self.judges.items():
            for member in judge.sources() if judge.stack else ():
                if self.is_optimistic(member):
                    raise ValueError(
                        f"judges.{name}.stack.judges: {member} is optimistic out of fold, where "
                        "weights are fitted: combine its teachers, or give it targets: in_sample"
                    )
                if self.judges[member].without_votes():
                    raise ValueError(
                        f"judges.{name}.stack.judges: {member} judged no battle with a vote, so its weight "
                        "cannot be fitted: combine a student of it (targets: unlabelled)"
                    )
        for member in self.deployed():
            if self.judges[member].external:
                raise ValueError(
                    f"final: {self.final} combines {member}, which is external: it predicts no test "
                    f"battle; name a judge without it, which {self.final} may teach"
                )
        return self

    @model_validator(mode="after")
    def _nobody_knows_models_of_new_battles(self) -> Config:
        deployed = self.deployed()
        for name, judge in self.judges.items():
            if judge.encoding.privileged and (judge.teachers or name in deployed):
                whose = "a student" if judge.teachers else "the final judge"
                raise ValueError(
                    f"judges.{name}.encoding.privileged: {whose} must judge without the models' names, "
                    "which nobody knows of new battles: set it to [], give it to teachers that learn votes"
                )
        return self

    @model_validator(mode="after")
    def _choices_have_battles(self) -> Config:
        for name, judge in self.judges.items():
            choices = {
                "merge.weights: greedy": judge.merge.weights == "greedy",
                "training.keep: best": judge.training.keep == "best",
                "training.patience": judge.training.patience is not None,
            }
            for key in [key for key, asked in choices.items() if asked and not self.folds.choices]:
                raise ValueError(
                    f"judges.{name}.{key} chooses by battles that no fold saw; set folds.choices, "
                    "0.05 for example"
                )
        return self

    @model_validator(mode="after")
    def _curves_are_of_trained_judges(self) -> Config:
        known = ", ".join(self.judges)
        for name in self.studies.curve_judges:
            if name not in self.judges:
                raise ValueError(
                    f"studies.curve_judges: unknown judge {name!r}; known judges: {known}"
                )
            if not self.judges[name].backbone:
                kind = "a stack" if self.judges[name].stack else "external"
                raise ValueError(f"studies.curve_judges: {name} is {kind}: it learns nothing")
        return self

    @model_validator(mode="after")
    def _predictions_have_model_and_battles(self) -> Config:
        if self.prediction.model == "gptq" and not self.is_quantized(self.final):
            raise ValueError(
                f"prediction.model: gptq, but judges.{self.deployed()[0]}.quantization is null; "
                "set `prediction: {model: merged}`"
            )
        if self.prediction.calibration != "none" and not self.folds.holdout:
            raise ValueError(
                f"prediction.calibration: {self.prediction.calibration} is fitted to battles that neither "
                "the judge nor its teachers learned; set folds.holdout, 0.1 for example"
            )
        return self

    @model_validator(mode="after")
    def _states_can_be_compared(self) -> Config:
        """Hidden states are compared view by view, attention token by token."""
        for name, judge in self.judges.items():
            for teacher, state in itertools.product(judge.teachers, judge.loss.states()):
                other = self.judges[teacher]
                pairs: dict[str, tuple[Any, Any]] = {"head": (judge.head.kind, other.head.kind)}
                if state == "attention":
                    pairs["encoding"] = judge.encoding, other.encoding
                    pairs["tokenizer"] = self.tokenizer_name(name), self.tokenizer_name(teacher)
                pairs["frozen"] = False, other.frozen is not None
                pairs["stack"] = False, other.stack is not None
                unlike = [f"{k} ({a} / {b})" for k, (a, b) in pairs.items() if a != b]
                if unlike:
                    shown = "the very same tokens" if state == "attention" else "the same views"
                    raise ValueError(
                        f"judges.{name}.loss.{state}: {name} and its teacher {teacher} have to be "
                        f"shown {shown} of a battle, but differ in {', '.join(unlike)}"
                    )
        return self

    @model_validator(mode="after")
    def _classes_fit(self) -> Config:
        """Keys about ties need ties, and what knows no ties needs a run without."""
        two = self.classes == 2
        if self.data.ties != "refuse" and not (two and self.data.arena is None):
            why = (
                "the simulated battles then have no ties"
                if two
                else "ties are a class: set classes: 2"
            )
            raise ValueError(f"data.ties: {self.data.ties}, but {why}, or leave it out")
        if two and self.prediction.calibration == "vector":
            raise ValueError(
                "prediction.calibration: vector scales ties apart, and with classes: 2 there are none; set "
                "temperature, or style"
            )
        for name, judge in self.judges.items():
            if two and "ties" in judge.head.model_fields_set:
                raise ValueError(
                    f"judges.{name}.head.ties: {judge.head.ties} is a model of ties, and with classes: 2 "
                    "there are none: leave it out"
                )
            endpoint = judge.external and judge.external.endpoint
            if endpoint and len(endpoint.verdicts) < self.classes:
                raise ValueError(
                    f"judges.{name}.external.endpoint.verdicts: two, but with classes: 3 a verdict may be "
                    "a tie: add its token, or set classes: 2"
                )
        return self

    def with_judges(self, more: Mapping[str, Judge]) -> Config:
        """The same configuration with more judges, which come after its own."""
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        return Config.model_construct(**fields | {"judges": {**self.judges, **more}})


def overlay(base: Any, top: Any) -> Any:
    """Lay one mapping over another, key by key and all the way down; anything else replaces."""
    if not (isinstance(base, Mapping) and isinstance(top, Mapping)):
        return top
    return {**base, **{k: overlay(base[k], v) if k in base else v for k, v in top.items()}}


def _as_frozen(name: str, given: Any, judge: Any) -> Any:
    """A judge with its defaults; of a frozen one, without what only an adapter has."""
    if not isinstance(given, Mapping) or not isinstance(judge, Mapping):
        return judge
    if judge.get("frozen") is None:
        return judge
    unused: list[str] = []
    for key, own in FROZEN.items():
        if isinstance(own, Mapping) and isinstance(found := given.get(key), Mapping):
            unused += [f"{key}.{k}" for k, v in own.items() if k in found and found[k] != v]
        elif key in given and given[key] != own:
            unused.append(key)
    if unused:
        raise ValueError(
            f"judges.{name}: a frozen judge has a pointwise head and trains no adapter: remove "
            f"{', '.join(unused)}"
        )
    return {**judge, **{key: overlay(judge.get(key), own) for key, own in FROZEN.items()}}


def _is_not_trained(judge: Any) -> bool:
    """Whether a judge, as read from YAML, is one for which the defaults mean nothing."""
    return isinstance(judge, Mapping) and any(judge.get(kind) is not None for kind in NOT_TRAINED)


def load(raw: Mapping[str, Any], files: Iterable[str | Path] = ()) -> Config:
    """Validate a configuration as read from YAML.

    Args:
        files: what it was read from: none may give a key twice.

    Raises:
        InputError: one line per mistake, each with the key's path and what is allowed there.
    """
    mistakes = [line for file in files for line in repeated_keys(Path(file))]
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        mistakes += explain(error, of=Config)
    if mistakes:
        raise InputError("\n".join(mistakes))
    return config


def schema() -> dict[str, Any]:
    """The JSON schema of the configuration, for editors and for the documentation."""
    return json.loads(json.dumps(Config.model_json_schema()))
