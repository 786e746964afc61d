"""The configuration: a typed, validated view of the YAML that drives a run.

Every key is a field below; its docstring says what it means, ``config/README.md`` lists them all and
``workflow/schemas/config.schema.json`` is generated from them. An unknown key, a wrong type, an unknown
teacher or a cycle among judges gives one line each, never a traceback.

The part that each phase gets is in ``config.phases``.
"""

from __future__ import annotations

import graphlib
import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from arena_distill.config.backbone import Backbone
from arena_distill.config.data import Audit, Data, Folds, Sources
from arena_distill.config.external import EndpointLimits, asked_without_tie
from arena_distill.config.judge import FROZEN, NOT_TRAINED, Head, Judge, JudgeDefaults, State
from arena_distill.config.mistakes import explain, repeated_keys
from arena_distill.config.plan import Plan
from arena_distill.config.section import Distinct, FilePath, Name, Section, Seed, Share, Word
from arena_distill.config.source import SOURCES, Source
from arena_distill.config.vocabulary import AskedCalibration, Calibration, ModelKind, ViewAverage
from arena_distill.errors import InputError
from arena_distill.verdicts import Classes, Order, Ties

# --- predictions and studies -------------------------------------------------------------------------


Swap = Literal["always", "unsure"]


class Cascade(Section):
    """Battles are scored in all views only if the judge is not sure in the first ones."""

    threshold: Share
    """A battle continues if its most probable verdict is below this (mean logits of the first views)."""
    swap: Swap = "always"
    """The first views: the shortest length in all orders, or (`unsure`, joint heads) in the first order."""


class Card(Section):
    """The model card of the finished judge: what the workflow cannot know."""

    license: Word | None = None
    """An identifier of the hub, such as apache-2.0; null: not stated."""
    languages: Distinct[tuple[Word, ...]] = ()
    """Codes of the battles' languages, such as en."""
    datasets: Distinct[tuple[Word, ...]] = ()
    """Ids on the hub of the data sets that the battles come from."""
    base_model: Word | None = None
    """The backbone's id on the hub; by default that of `backbone.hub`."""


class Prediction(Section):
    """Test-time augmentation: every battle is scored at each length and in each order."""

    max_lengths: Distinct[tuple[Annotated[int, Field(ge=32)], ...]] = Field(
        (1024, 2000), min_length=1
    )
    """Tokens per sequence; the scores of several lengths are averaged."""
    orders: Distinct[tuple[Order, ...]] = Field(("AB", "BA"), min_length=1)
    """The orders to score and average; verdicts of BA are swapped back first."""
    average: ViewAverage = "logits"
    """What is averaged."""
    model: ModelKind = "gptq"
    """The model whose predictions are submitted; if both exist, both are scored."""
    calibration: AskedCalibration = "none"
    """Fitted to held-out battles (folds.holdout). `auto`: temperature, or more where more of it pays."""
    cascade: Cascade | None = None
    """Saves forward passes. null: every battle is scored at every length and in every order."""

    @model_validator(mode="after")
    def _a_cascade_has_steps(self) -> Prediction:
        by_order = self.cascade and self.cascade.swap == "unsure" and len(self.orders) > 1
        if self.cascade and len(self.max_lengths) < 2 and not by_order:
            raise ValueError(
                "a cascade goes from the shortest of max_lengths to longer: give several, or two orders "
                "and swap: unsure"
            )
        return self


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


# --- the whole --------------------------------------------------------------------------------------


class Config(Section):
    run: Name = "default"
    """Results go to `results/<run>`."""
    results: FilePath = "results"
    """The folder of all runs."""
    classes: Classes = 3
    """3: A wins, B wins, tie; 2: a winner always, as in WSDM Cup 2025 (see `data.ties`)."""
    environments: Environments = Environments()
    """The Python interpreters of the jobs; `--sdm conda` uses envs/*.yaml instead."""
    data: Data
    """Where the battles come from."""
    folds: Folds = Folds()
    """How training battles are split into folds."""
    audit: Audit = Audit()
    """How the leak audit compares prompts."""
    defaults: JudgeDefaults = JudgeDefaults()
    """Settings of every judge; a judge overrides them."""
    judges: dict[Name, Judge] = Field(min_length=1)
    """The nodes of the graph, by name."""
    final: Name
    """The judge that is merged, quantised and submitted."""
    prediction: Prediction = Prediction()
    """How test battles are scored and averaged."""
    benchmarks: dict[Name, Sources] = {}
    """Battles whose better answer is known, by the benchmark's name: files as in `data`. The final judge's
    accuracy on them is in the report."""
    card: Card = Card()
    """What the model card of the finished judge says beside its figures."""
    compare: Compare = Compare()
    """What `snakemake compare` compares."""
    studies: Studies = Studies()
    """Learning curves, and averaging of folds that drift apart."""
    plan: Plan = Plan()
    """Assumptions about the cost of the run."""

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
    def _graph_of_judges(self) -> Config:
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
        self._check_unlabelled()
        self._check_stacks()
        deployed = self.deployed()
        for name, judge in self.judges.items():
            if judge.encoding.privileged and (judge.teachers or name in deployed):
                whose = "a student" if judge.teachers else "the final judge"
                raise ValueError(
                    f"judges.{name}.encoding.privileged: {whose} must judge without the models' names, "
                    "which nobody knows of new battles: set it to [], give it to teachers that learn votes"
                )
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
        for name in self.studies.curve_judges:
            if name not in self.judges:
                raise ValueError(
                    f"studies.curve_judges: unknown judge {name!r}; known judges: {known}"
                )
            if not self.judges[name].backbone:
                kind = "a stack" if self.judges[name].stack else "external"
                raise ValueError(f"studies.curve_judges: {name} is {kind}: it learns nothing")
        if self.prediction.model == "gptq" and not self.is_quantized(self.final):
            raise ValueError(
                f"prediction.model: gptq, but judges.{deployed[0]}.quantization is null; "
                "set `prediction: {model: merged}`"
            )
        if self.prediction.calibration != "none" and not self.folds.holdout:
            raise ValueError(
                f"prediction.calibration: {self.prediction.calibration} is fitted to battles that neither "
                "the judge nor its teachers learned; set folds.holdout, 0.1 for example"
            )
        return self

    def _check_unlabelled(self) -> None:
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

    def _check_stacks(self) -> None:
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

    def ties(self) -> Ties:
        """What a tie is in this run."""
        return "class" if self.classes == 3 else self.data.ties

    def head_of(self, judge: str) -> Head:
        """A judge's head, which has the classes of the run."""
        return Head(**self.judges[judge].head.model_dump(), classes=self.classes)

    def described(self) -> str:
        """What was computed, not how, as YAML: every key, the defaults filled in."""
        shown = self.model_dump(mode="json", exclude=self._how())
        return yaml.safe_dump(shown, sort_keys=False, allow_unicode=True)

    def as_params(self) -> str:
        """What was computed, not how: JSON, which :func:`load` takes, of what differs from the defaults."""
        return self.model_dump_json(exclude=self._how(), exclude_defaults=True)

    def _how(self) -> dict[str, Any]:
        """What decides no result of `all`. (And `defaults`, which are in the judges.)"""
        limits = {"endpoint": dict.fromkeys(EndpointLimits.model_fields, True)}
        trained = dict.fromkeys(("compute", *NOT_TRAINED), True)
        untold = dict.fromkeys(Judge.model_fields, True)
        kinds: dict[str, dict[str, Any]] = {
            "external": untold | {"external": limits},
            "stack": {key: True for key in untold if key != "stack"},
        }
        judges = {
            name: next(
                (told for k, told in kinds.items() if getattr(judge, k) is not None), trained
            )
            for name, judge in self.judges.items()
        }
        parts = ("environments", "compare", "studies", "plan", "defaults")
        return {**dict.fromkeys(parts, True), "judges": judges}

    def sources(self) -> dict[str, tuple[Source, ...]]:
        """Every file of battles that the configuration names, by the key that names it."""
        given = {f"data.{name}": getattr(self.data, name) for name in SOURCES}
        return given | {f"benchmarks.{name}": files for name, files in self.benchmarks.items()}

    def ordered(self) -> list[str]:
        """Judges' names, every teacher before its students, every member before its stack."""
        graph = {name: judge.sources() for name, judge in self.judges.items()}
        return list(graphlib.TopologicalSorter(graph).static_order())

    def with_judges(self, more: Mapping[str, Judge]) -> Config:
        """The same configuration with more judges, which come after its own."""
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        return Config.model_construct(**fields | {"judges": {**self.judges, **more}})

    def students_of(self, teacher: str) -> list[str]:
        """The judges that learn from its logits, alone or in stacks."""
        found = [name for name, judge in self.judges.items() if teacher in judge.teachers]
        stacks = [
            name for name, node in self.judges.items() if node.stack and teacher in node.sources()
        ]
        more = (self.students_of(stack) for stack in stacks)
        return list(dict.fromkeys(itertools.chain(found, *more)))

    def scored(self) -> list[str]:
        """The judges that say something of battles with votes."""
        return [name for name, judge in self.judges.items() if not judge.without_votes()]

    def trained_parts(self, judge: str) -> list[str]:
        """The judges that predict for it: itself, or the members of a stack, all the way down."""
        stack = self.judges[judge].stack
        if stack is None:
            return [judge]
        return list(dict.fromkeys(itertools.chain(*map(self.trained_parts, stack.judges))))

    def deployed(self) -> list[str]:
        """The judges that are merged and quantised: the final one, or all that it combines."""
        return self.trained_parts(self.final)

    def is_privileged(self, judge: str) -> bool:
        """Whether a judge, or a part of a stack, reads the models' names."""
        return any(self.judges[part].encoding.privileged for part in self.trained_parts(judge))

    def is_quantized(self, judge: str) -> bool:
        """Whether there is a quantised model of a judge, or of a part of a stack."""
        return any(self.judges[part].quantization is not None for part in self.trained_parts(judge))

    def is_optimistic(self, judge: str) -> bool:
        """Whether a judge's score out of fold is better than the judge.

        A student's targets out of fold come from teachers which were trained on the votes that it is
        then scored by (see ``training.targets``), and what it learns is handed on to its own students.
        """
        node = self.judges[judge]
        if node.stack:
            return any(map(self.is_optimistic, node.stack.judges))
        return any(
            self.is_optimistic(teacher)
            or (node.targets == "out_of_fold" and self.judges[teacher].external is None)
            for teacher in node.teachers
        )

    def fold_calibration(self, judge: str) -> Calibration:
        """What studies calibrate the folds' models by: none is fitted to an optimistic score."""
        if self.is_optimistic(judge):
            return "none"
        asked = self.prediction.calibration
        return "temperature" if asked == "auto" else asked

    def backbone_of(self, judge: str) -> Backbone:
        """A judge's backbone.

        Raises:
            InputError: it is external or a stack, and has none.
        """
        backbone = self.judges[judge].backbone
        if backbone is None:
            raise InputError(f"judges.{judge} has no backbone: nothing is trained")
        return backbone

    def learns_unlabelled(self, judge: str) -> bool:
        """Whether a judge learns battles without votes: there are some, and it wants them."""
        return "unlabelled" in self.data.sources() and self.judges[judge].learns_pseudo_labels()

    def states_of(self, teacher: str) -> tuple[State, ...]:
        """What its students compare with it beside logits."""
        wanted = [self.judges[name].loss.states() for name in self.students_of(teacher)]
        return tuple(s for s in get_args(State) if any(s in states for states in wanted))

    def backbone_name(self, judge: str) -> str:
        """The name of a judge's backbone: readable, one per distinct backbone of this configuration."""
        return self._unique_name(self.backbone_of(judge))

    def download_name(self, backbone: Backbone) -> str | None:
        """The name of what a backbone is made of, where that comes from the hub."""
        source = backbone.download()
        return self._unique_name(source) if source else None

    def tokenizer_name(self, judge: str) -> str:
        """The name of a judge's tokenizer: judges that share one share `tokens/<name>`."""
        return self._unique_name(self.backbone_of(judge).whole())

    def pretraining_owner(self, judge: str) -> str | None:
        """The judge whose post-pretrained adapter `judge` starts from; None without post-pretraining.

        Judges that would train the very same adapter share it: the first of them in the configuration
        owns it. So an ablation (same backbone, another loss) costs no second post-pretraining.
        """
        node = self.judges[judge]
        if not node.backbone or node.pretraining is None or "ut" not in self.data.sources():
            return None
        return self._pretraining_owners[self.judges[judge].before_folds()]

    def features_owner(self, judge: str) -> str:
        """The first judge that reads the same of the same backbone: its features are shared."""
        wanted = _reading(self.judges[judge])
        return next(name for name, node in self.judges.items() if _reading(node) == wanted)

    def _unique_name(self, backbone: Backbone) -> str:
        stem, described = backbone.stem(), backbone.as_params()
        if self._backbones[stem] == {described}:
            return stem
        digest = hashlib.sha256(described.encode()).hexdigest()
        return f"{stem}-{digest[:6]}"

    # Rules ask for one judge after another: what an answer takes of all judges is gathered once.

    @cached_property
    def _backbones(self) -> dict[str, set[str]]:
        """All backbones, as they are and whole, as JSON, by the stem of their name."""
        found: dict[str, set[str]] = {}
        given = [judge.backbone for judge in self.judges.values() if judge.backbone]
        downloads = filter(None, (backbone.download() for backbone in given))
        for backbone in (*given, *(backbone.whole() for backbone in given), *downloads):
            found.setdefault(backbone.stem(), set()).add(backbone.as_params())
        return found

    @cached_property
    def _pretraining_owners(self) -> dict[tuple[Any, ...], str]:
        """The first judge of each kind, by what decides its post-pretrained adapter."""
        owners: dict[tuple[Any, ...], str] = {}
        for name, judge in self.judges.items():
            if judge.backbone:
                owners.setdefault(judge.before_folds(), name)
        return owners


def overlay(base: Any, top: Any) -> Any:
    """Lay one mapping over another, key by key and all the way down; anything else replaces."""
    if not (isinstance(base, Mapping) and isinstance(top, Mapping)):
        return top
    return {**base, **{k: overlay(base[k], v) if k in base else v for k, v in top.items()}}


def _reading(judge: Judge) -> tuple[Any, ...]:
    """What decides a frozen judge's features."""
    return judge.frozen, judge.backbone, judge.encoding, judge.precision


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
