"""The configuration: a typed, validated view of the YAML that drives a run.

Every key is a field below; its docstring says what it means, ``config/README.md`` lists them all and
``workflow/schemas/config.schema.json`` is generated from them. An unknown key, a wrong type, an unknown
teacher or a cycle among judges gives one line each, never a traceback.

The part that each phase gets is in ``config.phases``.
"""

from __future__ import annotations

import difflib
import graphlib
import hashlib
import itertools
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import PurePath
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from arena_distill.config.judge import (
    Backbone,
    EndpointLimits,
    Judge,
    JudgeDefaults,
    Name,
    Section,
    Share,
    State,
)
from arena_distill.config.vocabulary import Calibration, FoldMethod, ModelKind, ViewAverage
from arena_distill.errors import InputError
from arena_distill.verdicts import Order

Accelerator = Literal["a100-80g", "a100-40g", "h100-80g", "h200", "l40s", "rtx-4090"]


# --- data -----------------------------------------------------------------------------------------


class Arena(Section):
    """The synthetic arena: battles with known vote probabilities (see ``battles.simulation``)."""

    seed: int = 2025
    """Another seed, other battles."""
    train: PositiveInt = 2000
    """Labelled battles."""
    extra: NonNegativeInt = 600
    """Labelled battles that join every training fold."""
    ut: NonNegativeInt = 1500
    """Battles for post-pretraining, voted on by another population."""
    test: PositiveInt = 500
    """Battles to predict."""
    unlabelled: NonNegativeInt = 0
    """Battles without votes, which students learn from their teachers."""


class Fetch(Section):
    """Where a file of battles is fetched from: exactly one of `kaggle`, `hub`."""

    kaggle: str | None = None
    """A competition on Kaggle; accept its rules there; you need a token."""
    hub: str | None = None
    """A data set on the Hugging Face hub; needs `revision`."""
    revision: str | None = None
    """The commit on the hub, or a tag or branch: which commit that was, the file's provenance tells."""
    files: tuple[str, ...] = ()
    """Its name there, or on the hub patterns; on Kaggle it is the name here unless it is given."""
    format: Literal["battles", "ultrafeedback", "arena"] = "battles"
    """`battles`: as it is; `ultrafeedback`: rated answers; `arena`: conversations that were voted on."""
    without: tuple[str, ...] = ()
    """Files of battles: what asks one of their prompts is left out (`arena`)."""
    seed: NonNegativeInt = 2025
    """Decides which two answers meet (`ultrafeedback`)."""

    @model_validator(mode="after")
    def _known_place(self) -> Fetch:
        if (self.kaggle is None) == (self.hub is None):
            raise ValueError("needs exactly one of kaggle, hub")
        if (self.hub is None) != (self.revision is None):
            raise ValueError("`hub` and `revision` go together")
        if self.hub and not self.files:
            raise ValueError(
                "files: say which of the data set's files, such as data/train-*.parquet"
            )
        if self.kaggle and (self.format != "battles" or len(self.files) > 1):
            raise ValueError(
                "a file of Kaggle is taken as it is: format: battles, one name in files"
            )
        if self.without and self.format != "arena":
            raise ValueError("without: only of format arena battles are left out")
        return self

    def source(self) -> str:
        """What to call it in messages."""
        return f"kaggle {self.kaggle}" if self.kaggle else f"{self.hub}@{self.revision}"


class Data(Section):
    """Where the battles come from: your own files, or the synthetic arena."""

    arena: Arena | None = None
    """Simulate the battles instead of reading files."""
    train: tuple[str, ...] = ()
    """Labelled battles: CSV, JSONL (both also .gz) or parquet in the Kaggle schema."""
    extra: tuple[str, ...] = ()
    """More labelled battles: they join every training fold and no validation fold."""
    ut: tuple[str, ...] = ()
    """Labelled battles for post-pretraining, such as UltraFeedback."""
    test: tuple[str, ...] = ()
    """Battles to predict."""
    unlabelled: tuple[str, ...] = ()
    """Battles without votes: students learn them from their teachers (see `pseudo_labels`)."""
    solution: str | None = None
    """The test battles' votes, where known: the report then scores every variant on them."""
    fetch: dict[str, Fetch] = {}
    """By file: where those of the above that are not there come from. Else nothing is fetched."""

    @field_validator("fetch")
    @classmethod
    def _named_on_kaggle(cls, value: dict[str, Fetch]) -> dict[str, Fetch]:
        return {
            path: origin
            if origin.files
            else origin.model_copy(update={"files": (PurePath(path).name,)})
            for path, origin in value.items()
        }

    @model_validator(mode="before")
    @classmethod
    def _one_file_is_a_list(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            lists = ("train", "extra", "ut", "test", "unlabelled")
            value = {k: [v] if k in lists and isinstance(v, str) else v for k, v in value.items()}
        return value

    @model_validator(mode="after")
    def _arena_or_files(self) -> Data:
        files = any((self.train, self.extra, self.ut, self.test, self.unlabelled, self.solution))
        if self.arena is None and not (self.train and self.test):
            raise ValueError("give `train` and `test` files, or `arena` for the synthetic battles")
        if self.arena is not None and files:
            raise ValueError(
                "give files or `arena`, not both (set `arena: null` to use your files)"
            )
        named = {*self.train, *self.extra, *self.ut, *self.test, *self.unlabelled, self.solution}
        for path, origin in self.fetch.items():
            if path not in named:
                raise ValueError(f"fetch.{path}: no source reads this file; known: {self._known()}")
            if not path.endswith(".parquet") and origin.format != "battles":
                raise ValueError(f"fetch.{path}: what is converted is parquet: name it so")
        return self

    def _known(self) -> str:
        files = (*self.train, *self.extra, *self.ut, *self.test, *self.unlabelled)
        return ", ".join(files) or "none"

    def sources(self) -> tuple[str, ...]:
        """The sources this run has battles of, in the order of the canonical file."""
        given = self.arena or self
        known = ("train", "extra", "ut", "test", "unlabelled")
        return tuple(s for s in known if getattr(given, s))


class Folds(Section):
    """Cross-validation. Only `stratified_group` keeps battles of one prompt together."""

    method: FoldMethod = "kfold"
    """scikit-learn's KFold, StratifiedKFold (on the vote) or StratifiedGroupKFold (by prompt too)."""
    n: Annotated[int, Field(ge=2, le=127)] = 5
    """How many folds."""
    seed: NonNegativeInt = 42
    """Decides which battle is dealt where."""
    holdout: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Share of the training prompts kept out of all folds, for choices (merge.weights: greedy)."""
    near_duplicates: bool = False
    """Keep prompts that are nearly the same together as well, by `audit`; with `stratified_group` only."""

    @model_validator(mode="after")
    def _near_duplicates_are_groups(self) -> Folds:
        if self.near_duplicates and self.method != "stratified_group":
            raise ValueError(
                f"near_duplicates keeps prompts together, which {self.method} does not: "
                "set `method: stratified_group`"
            )
        return self


class Audit(Section):
    """The leak audit: battles whose prompt, or nearly the same one, stands where it must not."""

    threshold: Annotated[float, Field(ge=0.5, le=1)] = 0.8
    """Prompts as similar as this are nearly the same: Jaccard's index of their runs of 5 characters."""
    permutations: Annotated[int, Field(ge=64, le=1024)] = 128
    """Of MinHash, which finds candidates: more permutations, fewer needless comparisons."""
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 2025
    """Of MinHash."""


class Cascade(Section):
    """Battles go on from the shortest length to the longer ones only where the judge is not sure."""

    threshold: Share
    """A battle goes on if its likeliest verdict has less (probability by the mean logits of all orders)."""


class Prediction(Section):
    """Test-time augmentation: every battle is scored at each length and in each order."""

    max_lengths: tuple[Annotated[int, Field(ge=32)], ...] = Field((1024, 2000), min_length=1)
    """Tokens per sequence; several are averaged."""
    orders: tuple[Order, ...] = Field(("AB", "BA"), min_length=1)
    """Several are averaged, the verdict of BA exchanged back first."""
    average: ViewAverage = "logits"
    """What is averaged."""
    model: ModelKind = "gptq"
    """The one whose predictions are submitted; both are scored where both exist."""
    calibration: Calibration = "none"
    """Fitted to out-of-fold logits, so these may not be optimistic; `style` also knows how answers look."""
    cascade: Cascade | None = None
    """Spares forward passes at the longer lengths. null: every battle is scored at every length."""

    @model_validator(mode="after")
    def _a_cascade_has_steps(self) -> Prediction:
        if self.cascade and len(set(self.max_lengths)) < 2:
            raise ValueError(
                "a cascade goes from the shortest of max_lengths to longer: give several"
            )
        return self


class Compare(Section):
    """`snakemake compare`: the final judge and its teachers under several recipes."""

    recipes: tuple[Name, ...] = ("summary", "blackpearl", "best")
    """Names of config/recipes/*.yaml; what two of them share is computed once."""
    variants: dict[Name, dict[str, Any]] = {}
    """More of them, by name: keys of `defaults` that differ, such as `{targets: in_sample}`."""
    votes: bool = True
    """Beside each student the same judge trained on votes alone: what distillation adds."""
    seeds: Annotated[tuple[NonNegativeInt, ...], Field(max_length=20)] = ()
    """Also train each of them with these seeds (training.seed): how much of a difference is luck."""
    runs: tuple[str, ...] = ()
    """Folders of other runs: their judges join the table, on the battles both have."""
    resamples: Annotated[int, Field(ge=100)] = 2000
    """Of the bootstrap."""


class Studies(Section):
    """`snakemake curves` and `snakemake averaging`: what happens with more battles, and between folds."""

    curve_judges: tuple[Name, ...] = ()
    """Judges whose learning curves are drawn; none: the final one, on votes, with both heads."""
    curve_shares: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (0.125, 0.25, 0.5, 1)
    """Of a fold's training battles, for the points of a learning curve."""
    curve_folds: PositiveInt = 1
    """How many of the folds a learning curve is the mean of."""
    averaging_epochs: tuple[PositiveFloat, ...] = (0.25, 0.5, 1, 2, 4)
    """How long the folds train apart before they are averaged."""


class PlannedBattles(Section):
    """Battles per source, where the run has not read them yet. Of sources that it lacks nothing counts."""

    train: PositiveInt = 57477
    """As many as the competition's."""
    extra: NonNegativeInt = 33000
    """As many as the winners had."""
    ut: NonNegativeInt = 60000
    """A pair of answers for nearly every prompt of UltraFeedback."""
    test: PositiveInt = 25000
    """About as many as the competition's hidden ones."""
    unlabelled: NonNegativeInt = 50000
    """A guess."""


class Plan(Section):
    """`arena-distill plan`: the machines, and assumptions for missing data. Rebuilds nothing."""

    accelerator: Accelerator = "a100-80g"
    """The GPU of every job that has one."""
    nodes: PositiveInt = 1
    """Machines that work at a time."""
    gpus_per_node: PositiveInt = 8
    """GPUs of each."""
    cores_per_node: PositiveInt = 64
    """CPU cores of each."""
    utilisation: Annotated[float, Field(gt=0, le=1)] = 0.18
    """Share of the peak FLOP/s that is reached: 0.18 is what the winners' published durations come to."""
    price_per_gpu_hour: NonNegativeFloat | None = None
    """In any currency; null: no price is told."""
    battles: PlannedBattles = PlannedBattles()
    """How many."""
    tokens_per_battle: PositiveFloat = 850.0
    """Mean of a battle's tokens, prompt and both answers, before it is cut at max_length."""
    tokens_spread: PositiveFloat = 0.9
    """Standard deviation of their logarithm: lengths are taken to be log-normal."""
    one_answer: Annotated[float, Field(gt=0, le=1)] = 0.56
    """Share of a battle's tokens in its prompt and one answer, which is what a pointwise judge is shown."""
    disk_gb_per_s: PositiveFloat = 1.0
    """What a job reads and writes of models."""
    startup: NonNegativeFloat = 60.0
    """Seconds of each job before it works: the queue, imports."""


class Environments(Section):
    """Python interpreters of the two environments; relative paths start at the checkout."""

    main: str | None = None
    """null: the interpreter that runs Snakemake."""
    gptq: str = ".venv-gptq/bin/python"
    """The interpreter of the environment with GPTQModel."""


# --- the whole --------------------------------------------------------------------------------------


class Config(Section):
    run: Name = "default"
    """Results go to `results/<run>`."""
    results: str = "results"
    """The folder of all runs."""
    environments: Environments = Environments()
    """The interpreters jobs run with; `--sdm conda` uses envs/*.yaml instead."""
    data: Data
    """Where the battles come from."""
    folds: Folds = Folds()
    """How training battles are dealt into folds."""
    audit: Audit = Audit()
    """How leaks are looked for."""
    defaults: JudgeDefaults = JudgeDefaults()
    """What every judge is unless it says otherwise."""
    judges: dict[Name, Judge] = Field(min_length=1)
    """The nodes of the graph, by name."""
    final: Name
    """The judge that is merged, quantised and submitted."""
    prediction: Prediction = Prediction()
    """How the test battles are predicted."""
    compare: Compare = Compare()
    """What `snakemake compare` sets side by side."""
    studies: Studies = Studies()
    """Learning curves, and averaging as folds drift apart."""
    plan: Plan = Plan()
    """What the run will cost."""

    @model_validator(mode="before")
    @classmethod
    def _judges_override_defaults(cls, value: Any) -> Any:
        if not isinstance(value, Mapping) or not isinstance(value.get("judges"), Mapping):
            return value
        defaults = value.get("defaults") or {}
        judges = {
            k: v if _is_external(v) else overlay(defaults, v) for k, v in value["judges"].items()
        }
        return {**value, "judges": judges}

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
            for teacher in judge.teachers:
                if teacher not in self.judges:
                    raise ValueError(
                        f"judges.{name}.teachers: unknown judge {teacher!r}; known judges: {known}"
                    )
        try:
            self.ordered()
        except graphlib.CycleError as error:
            cycle = " → ".join(reversed(error.args[1]))
            raise ValueError(
                f"judges: a cycle of teachers, {cycle}: a judge cannot teach itself"
            ) from None
        for name, judge in self.judges.items():
            if judge.merge.weights == "greedy" and not self.folds.holdout:
                raise ValueError(
                    f"judges.{name}.merge.weights: greedy chooses folds by battles that none of them "
                    "saw; set folds.holdout, 0.05 for example"
                )
        for name in self.studies.curve_judges:
            if name not in self.judges:
                raise ValueError(
                    f"studies.curve_judges: unknown judge {name!r}; known judges: {known}"
                )
            if self.judges[name].external:
                raise ValueError(f"studies.curve_judges: {name} is external: it learns nothing")
        if self.prediction.model == "gptq" and self.judges[self.final].quantization is None:
            raise ValueError(
                f"prediction.model: gptq, but judges.{self.final}.quantization is null; "
                "set `prediction: {model: merged}`"
            )
        if self.prediction.calibration != self.calibration_of(self.final):
            raise ValueError(
                f"prediction.calibration: {self.prediction.calibration} is fitted to scores out of "
                f"fold, and those of {self.final} are better than it is, as its targets out of fold "
                "come from teachers that learned these votes; set targets: in_sample, or calibration: none"
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
                unlike = [f"{k} ({a} / {b})" for k, (a, b) in pairs.items() if a != b]
                if unlike:
                    shown = "the very same tokens" if state == "attention" else "the same views"
                    raise ValueError(
                        f"judges.{name}.loss.{state}: {name} and its teacher {teacher} have to be "
                        f"shown {shown} of a battle, but differ in {', '.join(unlike)}"
                    )
        return self

    def described(self) -> str:
        """What was computed, not how, as YAML: every key, the defaults filled in."""
        shown = self.model_dump(mode="json", exclude=self._how())
        return yaml.safe_dump(shown, sort_keys=False, allow_unicode=True)

    def as_params(self) -> str:
        """What was computed, not how: JSON, which :func:`load` takes, of what differs from the defaults."""
        return self.model_dump_json(exclude=self._how(), exclude_defaults=True)

    def _how(self) -> dict[str, Any]:
        """What decides no result of `all`. (And `defaults`, which are in the judges.)"""
        untold: dict[str, Any] = dict.fromkeys(
            (*JudgeDefaults.model_fields, "backbone", "teachers"), True
        )
        untold["external"] = {"endpoint": dict.fromkeys(EndpointLimits.model_fields, True)}
        trained = {"compute": True, "external": True}
        judges = {n: untold if judge.external else trained for n, judge in self.judges.items()}
        parts = ("environments", "compare", "studies", "plan", "defaults")
        return {**dict.fromkeys(parts, True), "judges": judges}

    def ordered(self) -> list[str]:
        """Judges' names, every teacher before its students."""
        graph = {name: judge.teachers for name, judge in self.judges.items()}
        return list(graphlib.TopologicalSorter(graph).static_order())

    def with_judges(self, more: Mapping[str, Judge]) -> Config:
        """The same configuration with more judges, which come after its own."""
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        return Config.model_construct(**fields | {"judges": {**self.judges, **more}})

    def students_of(self, teacher: str) -> list[str]:
        return [name for name, judge in self.judges.items() if teacher in judge.teachers]

    def is_optimistic(self, judge: str) -> bool:
        """Whether a judge's score out of fold is better than the judge.

        A student's targets out of fold come from teachers which were trained on the votes that it is
        then scored by (see ``training.targets``), and what it learns is handed on to its own students.
        """
        node = self.judges[judge]
        return any(
            self.is_optimistic(teacher)
            or (node.targets == "out_of_fold" and self.judges[teacher].external is None)
            for teacher in node.teachers
        )

    def calibration_of(self, judge: str) -> Calibration:
        """A judge's calibration: none is fitted to an optimistic score, which would make it too sure."""
        return "none" if self.is_optimistic(judge) else self.prediction.calibration

    def backbone_of(self, judge: str) -> Backbone:
        """A judge's backbone.

        Raises:
            InputError: it is external, and has none.
        """
        backbone = self.judges[judge].backbone
        if backbone is None:
            raise InputError(f"judges.{judge} is external: it has no backbone, nothing is trained")
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
        if node.external or node.pretraining is None or "ut" not in self.data.sources():
            return None
        return self._pretraining_owners[self.judges[judge].before_folds()]

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
            if not judge.external:
                owners.setdefault(judge.before_folds(), name)
        return owners


def overlay(base: Any, top: Any) -> Any:
    """Lay one mapping over another, key by key and all the way down; anything else replaces."""
    if not (isinstance(base, Mapping) and isinstance(top, Mapping)):
        return top
    return {**base, **{k: overlay(base[k], v) if k in base else v for k, v in top.items()}}


def _is_external(judge: Any) -> bool:
    """Whether a judge, as read from YAML, is one for which the defaults mean nothing."""
    return isinstance(judge, Mapping) and judge.get("external") is not None


def load(raw: Mapping[str, Any]) -> Config:
    """Validate a configuration as read from YAML.

    Raises:
        InputError: one line per mistake, each with the key's path and what is allowed there.
    """
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise InputError("\n".join(explain(error))) from None


def schema() -> dict[str, Any]:
    """The JSON schema of the configuration, for editors and for the documentation."""
    return json.loads(json.dumps(Config.model_json_schema()))


RENAMED: dict[tuple[str, ...], str] = {
    ("lora", "targets"): "target_modules",
    ("merge", "head"): "heads",
    ("studies", "drift_epochs"): "averaging_epochs",
}
"""Section and key of earlier configurations → the key's name today."""


def explain(error: ValidationError, of: type[BaseModel] = Config) -> list[str]:
    """One line per mistake. A mistake in `defaults` shows up in every judge: it is told once."""
    problems: dict[tuple[str, ...], Any] = {}
    for item in error.errors(include_url=False):
        # The last parts may name a choice of types, such as `tuple[str, ...]`, or a `[key]`.
        where = tuple(itertools.takewhile(lambda part: "[" not in part, map(str, item["loc"])))
        if where in problems:
            problems[where]["msg"] += f", or: {item['msg']}"
        else:
            problems[where] = dict(item)
    shared = {path[1:] for path in problems if path[:1] == ("defaults",)}
    lines = []
    for path, item in problems.items():
        if path[:1] == ("judges",) and path[2:] in shared:
            continue
        name = ".".join(path)
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden" and path[-2:] in RENAMED:
            message = f"this key is now called {RENAMED[path[-2:]]!r}"
        elif item["type"] == "extra_forbidden":
            allowed = _keys_at(of, path[:-1])
            close = difflib.get_close_matches(path[-1], allowed, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(allowed)}"
            message = f"unknown key; {hint}"
        elif item["type"] == "missing":
            message = "missing: this key is required"
        elif item["type"] not in ("value_error", "assertion_error"):
            message += f", got {item['input']!r}"
        lines.append(f"config: {name}: {message}" if name else f"config: {message}")
    return lines


def _keys_at(model: type[BaseModel], path: tuple[str, ...]) -> list[str]:
    """The keys allowed at a path of the configuration."""
    schema = model.model_json_schema()
    node: dict[str, Any] = schema
    for part in path:
        node = _resolve(node, schema)
        named = node.get("patternProperties", {}).values()  # judges, by name
        node = node.get("properties", {}).get(part) or next(iter(named), {})
    return list(_resolve(node, schema).get("properties", {}))


def _resolve(node: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    for option in node.get("anyOf", []):
        if "$ref" in option:
            node = option
    if "$ref" in node:
        return schema["$defs"][node["$ref"].rsplit("/", 1)[1]]
    return node
