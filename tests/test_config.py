"""The configuration: a mistake is one line, and each phase gets only its own part."""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from conftest import ROOT
from pydantic import BaseModel

from arena_distill.config.backbone import Backbone
from arena_distill.config.compute import Compute
from arena_distill.config.data import Data, Folds
from arena_distill.config.encoding import Encoding
from arena_distill.config.judge import Judge, JudgeDefaults
from arena_distill.config.phases.battles import (
    ArenaSettings,
    AuditSettings,
    BattlesSettings,
    CountSettings,
    FetchSettings,
    FoldsSettings,
    SolutionSettings,
)
from arena_distill.config.phases.deployment import (
    DriftSettings,
    MergeSettings,
    QuantizationSettings,
    SoupSettings,
)
from arena_distill.config.phases.encoding import BackboneSettings, TokensSettings
from arena_distill.config.phases.evaluation import BenchmarkSettings, EvaluationSettings
from arena_distill.config.phases.judging import JudgeSettings, StackedJudgeSettings
from arena_distill.config.phases.prediction import (
    CalibrationSettings,
    PredictionSettings,
    ScoringSettings,
    StackedViewsSettings,
)
from arena_distill.config.phases.scoring import (
    ExternalSettings,
    LogitsSettings,
    QuerySettings,
    StackedLogitsSettings,
    StackSettings,
)
from arena_distill.config.phases.settings import VERSIONS, Settings, parse
from arena_distill.config.phases.studies import AveragingSettings, CompareSettings, CurveSettings
from arena_distill.config.phases.training import (
    FeatureSettings,
    PretrainingSettings,
    ProbeSettings,
    TrainingSettings,
)
from arena_distill.config.prediction import Prediction
from arena_distill.config.run import Config, load, overlay, schema
from arena_distill.config.section import Section
from arena_distill.config.source import Source
from arena_distill.config.training import Loss
from arena_distill.errors import InputError

FILES = {"train": "train.csv", "test": "test.csv"}


def raw(**changes: Any) -> dict[str, Any]:
    whole: dict[str, Any] = {
        "data": {**FILES, "ut": "ut.csv", "extra": ["extra.csv", "more.csv"]},
        "judges": {
            "l": {"backbone": {"tiny": "llama"}},
            "q": {"backbone": {"tiny": "qwen2"}},
            "s": {"backbone": {"tiny": "gemma2"}, "teachers": ["l", "q"]},
        },
        "final": "s",
    }
    return {**whole, **changes}


def judged(**judges: Any) -> dict[str, Any]:
    """The configuration with some judges overridden."""
    return raw(judges=overlay(raw()["judges"], judges))


def lines(broken: dict[str, Any]) -> list[str]:
    with pytest.raises(InputError) as error:
        load(broken)
    return str(error.value).splitlines()


# --- mistakes ---------------------------------------------------------------------------------------


def test_which_scores_out_of_fold_are_optimistic() -> None:
    """Students whose teachers saw their votes, and judges that learn from such a student."""
    config = load(
        judged(s={"teachers": ["l"]}, t={"backbone": {"tiny": "llama"}, "teachers": ["s"]})
    )
    assert [name for name in config.judges if config.is_optimistic(name)] == ["s", "t"]
    honest = {"teachers": ["l"], "targets": "in_sample"}
    second = {"backbone": {"tiny": "llama"}, "teachers": ["s"], "targets": "in_sample"}
    config = load(judged(s=honest, t=second))
    assert not any(map(config.is_optimistic, config.judges))
    config = load(judged(s={"teachers": ["l"]}, t=second))
    assert config.is_optimistic("t")
    config = load(judged(s={"teachers": ["e"]}, e={"external": {"file": "x.parquet"}}))
    assert not config.is_optimistic("s"), (
        "who it was that an external judge learned from is not known"
    )


def test_a_calibration_needs_held_out_battles() -> None:
    for method in ("auto", "temperature"):
        (line,) = lines(raw(prediction={"calibration": method}))
        assert line.startswith(
            f"config: prediction.calibration: {method} is fitted to battles that"
        )
        assert "set folds.holdout" in line
        load(raw(prediction={"calibration": method}, folds={"holdout": 0.1}))


def test_unknown_teachers_cycles_and_finals() -> None:
    (line,) = lines(judged(s={"teachers": ["l", "p"]}))
    assert line == "config: judges.s.teachers: unknown judge 'p'; known judges: l, q, s"
    (line,) = lines(judged(l={"teachers": ["s"]}))
    assert "a cycle of teachers" in line
    assert "l" in line
    assert "s" in line
    (line,) = lines(judged(l={"teachers": ["l"]}))
    assert "l → l" in line
    (line,) = lines(raw(final="x"))
    assert line == "config: final: unknown judge 'x'; known judges: l, q, s"
    (line,) = lines(judged(s={"teachers": ["l", "l"]}))
    assert "named twice" in line
    (line,) = lines(judged(s={"quantization": None}))
    assert "prediction.model" in line


def test_a_mistake_in_the_defaults_is_reported_once() -> None:
    assert lines(raw(defaults={"lora": {"rank": 3}})) == [
        "config: defaults.lora.rank: unknown key; known keys: r, alpha, dropout, target_modules"
    ]
    assert len(lines(raw(defaults={"precision": "fp8"}))) == 1
    assert len(lines(raw(defaults={"loss": {"ce": 0, "kl": 0}}))) == 1
    assert len(lines(raw(defaults={"lora": {"target_modules": 3}}))) == 1
    both = overlay(judged(l={"lora": {"dropout": 3}}), {"defaults": {"lora": {"r": -1}}})
    assert [line.split(": ")[1] for line in lines(both)] == [
        "defaults.lora.r",
        "judges.l.lora.dropout",
    ]


@pytest.mark.parametrize("broken", [{}, [], None, "x", 3, {"data": 3, "judges": [1], "final": {}}])
def test_nonsense_is_an_input_error(broken: Any) -> None:
    with pytest.raises(InputError, match="^config: "):
        load(broken)


def test_a_mistake_in_settings_names_the_key() -> None:
    with pytest.raises(InputError, match="config: lora.rr: unknown key; did you mean 'r'"):
        settings = json.loads(TrainingSettings.of(load(raw()), "l").model_dump_json())
        settings["lora"]["rr"] = 3
        parse(TrainingSettings, json.dumps(settings))
    with pytest.raises(InputError, match="^config: "):
        parse(TrainingSettings, "{")


# --- judges and their defaults ----------------------------------------------------------------------


def test_a_judge_overrides_the_defaults_all_the_way_down() -> None:
    config = load(
        overlay(
            judged(s={"training": {"lr": 0.5}, "pretraining": None, "quantization": {"bits": 4}}),
            {"defaults": {"training": {"lr": 0.1, "epochs": 7}, "lora": {"r": 2}}},
        )
    )
    student, teacher = config.judges["s"], config.judges["l"]
    assert (student.training.lr, student.training.epochs, student.lora.r) == (0.5, 7, 2)
    assert (teacher.training.lr, teacher.training.epochs) == (0.1, 7)
    assert student.pretraining is None
    assert teacher.pretraining is not None
    assert student.quantization is not None
    assert (student.quantization.bits, student.quantization.group_size) == (4, 128)


def test_null_in_the_defaults_is_switched_on_again_by_a_judge() -> None:
    config = load(
        overlay(judged(s={"pretraining": {"lr": 0.25}}), {"defaults": {"pretraining": None}})
    )
    assert config.judges["l"].pretraining is None
    assert config.judges["s"].pretraining is not None
    assert config.judges["s"].pretraining.lr == 0.25


def test_overlay_changes_neither_of_its_arguments() -> None:
    base = {"a": {"b": 1, "c": [1]}, "d": 2}
    top = {"a": {"b": {"x": 1}}, "e": None}
    assert overlay(base, top) == {"a": {"b": {"x": 1}, "c": [1]}, "d": 2, "e": None}
    assert base == {"a": {"b": 1, "c": [1]}, "d": 2}
    assert top == {"a": {"b": {"x": 1}}, "e": None}


def test_students_may_teach() -> None:
    config = load(judged(t={"backbone": {"tiny": "gemma2", "layers": 1}, "teachers": ["s"]}))
    ordered = config.ordered()
    assert sorted(ordered) == ["l", "q", "s", "t"]
    assert ordered.index("l") < ordered.index("s") < ordered.index("t")
    assert config.students_of("s") == ["t"]
    assert config.students_of("l") == ["s"]
    assert config.students_of("t") == []
    assert TrainingSettings.of(config, "t").teachers == ("s",)
    assert LogitsSettings.of(config, "s").rows == ("validation", "extra")
    assert LogitsSettings.of(config, "t").rows == ("validation",)


def test_logits_cover_the_rows_that_students_need() -> None:
    assert LogitsSettings.of(load(raw()), "l").rows == ("validation", "extra")
    own = load(judged(s={"targets": "in_sample"}))
    assert LogitsSettings.of(own, "l").rows == ("validation", "training")
    both = load(
        judged(s={"targets": "in_sample"}, t={"backbone": {"tiny": "gemma2"}, "teachers": ["l"]})
    )
    assert LogitsSettings.of(both, "l").rows == ("validation", "training", "extra")
    assert LogitsSettings.of(both, "q").rows == ("validation", "training")
    assert LogitsSettings.of(load(raw(data=FILES)), "l").rows == ("validation",)


def test_sources_are_those_given() -> None:
    assert load(raw()).data.sources() == ("train", "extra", "ut", "test")
    assert load(raw(data=FILES)).data.sources() == ("train", "test")
    kept = {**FILES, "train": {"path": "train.csv", "missing_votes": "keep"}}
    assert load(raw(data=kept)).data.sources() == ("train", "test", "unlabelled")


def test_a_path_is_a_source_read_by_default(tmp_path: Path) -> None:
    for name in ("b.csv", "a.csv"):
        (tmp_path / name).touch()
    shards = {"path": f"{tmp_path}/*.csv", "ties": {"Both_Bad": "drop"}}
    data = load(raw(data={**FILES, "extra": ["extra.csv", shards]})).data
    assert data.train == (Source(path="train.csv"),)
    settings = BattlesSettings.of(load(raw(data={**FILES, "extra": ["extra.csv", shards]})))
    assert list(settings.sources) == ["extra"]
    for file in data.extra[1].shards():
        (source,) = settings.files_of("extra", [file])
        assert (source.path, source.ties) == (str(file), {"both_bad": "drop"})
        assert settings.files_of("train", [file]) == [Source(path=str(file))]
    assert BattlesSettings.of(load(raw(data=FILES))).sources == {}
    assert Data(arena={"extra": 0, "ut": 0}).sources() == ("train", "test")


# --- names ------------------------------------------------------------------------------------------


def names(**backbones: dict[str, Any]) -> tuple[list[str], list[str]]:
    judges = {name: {"backbone": backbone} for name, backbone in backbones.items()}
    config = load(raw(judges=judges, final=next(iter(judges))))
    return (
        [config.backbone_name(name) for name in judges],
        [config.tokenizer_name(name) for name in judges],
    )


def test_backbones_have_readable_names_and_share_them() -> None:
    backbones, tokenizers = names(
        a={"tiny": "llama"}, b={"tiny": "llama"}, c={"path": "m/gemma-2-9b"}
    )
    assert backbones == ["tiny-llama", "tiny-llama", "gemma-2-9b"]
    assert tokenizers == backbones


def test_a_cut_backbone_shares_the_tokenizer_of_the_whole_one() -> None:
    backbones, tokenizers = names(
        a={"gguf": "m/smol.gguf"}, b={"gguf": "m/smol.gguf", "layers": 8},
        c={"gguf": "m/smol.gguf", "layers": 4},
    )  # fmt: skip
    assert backbones == ["smol", "smol-8layers", "smol-4layers"]
    assert tokenizers == ["smol"] * 3


def test_different_backbones_never_share_a_name() -> None:
    given: list[dict[str, Any]] = [
        {"path": "one/model"}, {"path": "two/model"}, {"hub": "org/model", "revision": "a"},
        {"hub": "org/model", "revision": "b"}, {"gguf": "model.gguf"}, {"path": "model", "layers": 2},
        {"path": "two/model", "tokenizer": "x/t"}, {"path": "two/model", "tokenizer": "y/t"},
        {"path": "model-2layers"}, {"path": "."}, {"path": ".."}, {"path": "my model"},
    ]  # fmt: skip
    backbones, tokenizers = names(**{f"j{i}": backbone for i, backbone in enumerate(given)})
    assert len(set(backbones)) == len(given)
    assert len(set(tokenizers)) == len(given)
    for name in (*backbones, *tokenizers):
        assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name), name


def test_a_name_does_not_depend_on_judges_of_other_backbones() -> None:
    alone, _ = names(a={"path": "one/model"})
    with_others, _ = names(a={"path": "one/model"}, b={"tiny": "llama"})
    assert alone[0] == with_others[0] == "model"


def test_ready_folders_need_no_job() -> None:
    assert Backbone(path="x").is_ready_folder()
    assert Backbone(tiny="llama").is_ready_folder()
    assert not Backbone(path="x", layers=2).is_ready_folder()
    assert not Backbone(path="x", tokenizer="t").is_ready_folder()
    assert not Backbone(hub="a/b", revision="c").is_ready_folder()
    assert not Backbone(gguf="x.gguf").is_ready_folder()


# --- post-pretraining -------------------------------------------------------------------------------


def test_an_ablation_shares_its_post_pretraining() -> None:
    same = {"backbone": {"tiny": "gemma2"}, "teachers": ["l"]}
    config = load(
        judged(
            t=same | {"loss": {"kl": 1}, "training": {"lr": 1.0}},
            u=same | {"pretraining": {"lr": 0.5}},
            v=same | {"pretraining": None},
            w={"backbone": {"tiny": "gemma2"}, "lora": {"r": 3}},
            x=same | {"pretraining": {"keep_head": True}},
        )
    )
    owners = {name: config.pretraining_owner(name) for name in config.judges}
    assert owners == {
        "l": "l", "q": "q", "s": "s", "t": "s", "u": "u", "v": None, "w": "w", "x": "s",
    }  # fmt: skip
    assert TrainingSettings.of(config, "x").keep_head
    assert not TrainingSettings.of(config, "s").keep_head
    assert not TrainingSettings.of(config, "v").keep_head


def test_without_ut_battles_nothing_is_post_pretrained() -> None:
    config = load(raw(data=FILES, defaults={"pretraining": {"keep_head": True}}))
    assert config.pretraining_owner("l") is None
    assert not TrainingSettings.of(config, "l").keep_head


# --- settings of a phase ----------------------------------------------------------------------------


def has_phase(judge: Judge, model: type[Settings]) -> bool:
    """Whether a judge goes through the phase with these settings."""
    if model in (QuerySettings, ExternalSettings):
        return judge.external is not None
    if model in (StackSettings, StackedLogitsSettings, StackedViewsSettings, StackedJudgeSettings):
        return judge.stack is not None
    if model is PretrainingSettings:
        return judge.pretraining is not None
    if model in (FeatureSettings, ProbeSettings):
        return judge.frozen is not None
    return model is not TrainingSettings or judge.frozen is None


def all_settings(config: Config) -> dict[tuple[str, str], Any]:
    """Every phase's settings, per judge where it has one."""
    found = {}
    for model in Settings.__subclasses__():
        phase = model.__name__.removesuffix("Settings").lower()
        asked = inspect.signature(model.of).parameters
        if "config" not in asked or "studies" in asked:  # parts of data, backbones; judges' names
            continue
        if model is ArenaSettings and not config.data.arena:
            continue
        judges = [name for name, judge in config.judges.items() if has_phase(judge, model)]
        if "judge" not in asked:
            judges = [""]
        for judge in judges:
            found[phase, judge] = model.of(config, judge) if judge else model.of(config)
    return found


def changed(base: dict[str, Any] | None = None, **changes: Any) -> set[tuple[str, str]]:
    """The phases, and their judges, whose settings differ where the configuration does."""
    base = base or raw()
    before, after = all_settings(load(base)), all_settings(load(overlay(base, changes)))
    return {k for k in before if before[k].as_params() != after[k].as_params()}


def test_compute_is_in_no_settings() -> None:
    compute = {
        "threads": 9, "gpus": 8, "mem_mb": 99, "runtime": 99, "micro_batch_size": 99,
        "batch_tokens": 99, "gradient_checkpointing": True, "gpu_model": "a100", "fsdp": True,
        "disk_mb": 99, "checkpoint_minutes": 9.0, "attention": "eager", "report_to": "wandb",
        "nodes": 2,
    }  # fmt: skip
    assert set(compute) == set(Compute.model_fields)
    assert changed(defaults={"compute": compute}) == set()
    for settings in all_settings(load(raw())).values():
        assert not set(compute) & set(settings.model_dump())


def test_a_change_reaches_the_head_of_a_frozen_judge_or_its_features() -> None:
    frozen = judged(l={"frozen": {}}, q={"frozen": {}})
    assert {p for p, _ in changed(frozen, defaults={"training": {"lr": 1e-3}})} == {"training"}
    assert changed(frozen, judges={"l": {"training": {"share": 0.5}}}) == {("probe", "l")}
    assert changed(frozen, judges={"l": {"frozen": {"layers": [1]}}}) == {("feature", "l")}
    assert {("feature", "l"), ("logits", "l"), ("merge", "l")} <= changed(
        frozen, judges={"l": {"encoding": {"max_length": 64}}}
    )


def test_shards_and_their_gpus_are_in_no_settings() -> None:
    assert changed(defaults={"logits": {"shards": 4, "gpus": 2}}) == set()


def test_spreading_over_one_gpu_is_refused() -> None:
    with pytest.raises(InputError, match="set gpus to 2 or more"):
        load(raw(defaults={"compute": {"gpus": 1, "fsdp": True}}))


PREDICTING = {"prediction", "calibration"}


def test_a_change_reaches_the_phases_it_concerns_alone() -> None:
    assert changed(folds={"seed": 1}) == {("folds", "")}
    assert changed(audit={"threshold": 0.9}) == {("audit", "")}
    assert changed(judges={"l": {"training": {"lr": 1.0}}}) == {("training", "l")}
    assert changed(judges={"l": {"pretraining": {"lr": 1.0}}}) == {("pretraining", "l")}
    assert changed(judges={"l": {"pretraining": {"keep_head": True}}}) == {("training", "l")}
    assert changed(judges={"s": {"loss": {"kl": 1.0}}}) == {("training", "s")}
    assert changed(judges={"l": {"loss": {"kl": 1.0}}}) == set()
    assert changed(judges={"s": {"quantization": {"bits": 4}}}) == {("quantization", "s")}
    assert changed(judges={"s": {"quantization": {"max_kl": 1.0}}}) == {("drift", "s")}
    assert changed(judges={"s": {"merge": {"heads": "average"}}}) == {("merge", "s")}
    averaged = {p for p, _ in changed(prediction={"average": "probabilities"})}
    assert averaged == {*PREDICTING, "judge"}
    held_out = raw(folds={"holdout": 0.1})
    assert {p for p, _ in changed(held_out, prediction={"calibration": "vector"})} == PREDICTING
    assert changed(judges={"l": {"encoding": {"max_length": 64}}}) == {
        (phase, "l")
        for phase in (
            "pretraining", "training", "logits", "merge", "soup", "quantization", "scoring", "judge"
        )
    }  # fmt: skip


def test_settings_survive_json() -> None:
    config = load(judged(l={"lora": {"target_modules": ["q_proj", "v_proj"]}}))
    for settings in all_settings(config).values():
        assert parse(type(settings), settings.as_params()) == settings
        assert settings.version >= 1


def test_a_new_key_changes_no_params() -> None:
    """Params hold only what differs from the defaults: a new key rebuilds no finished run."""

    class NewEncoding(Encoding):
        new: int = 7

    class NewSettings(TrainingSettings):
        encoding: NewEncoding
        other: Encoding = Encoding(max_length=64)

    class NewConfig(Config):
        new: Encoding = Encoding(max_length=64)

    config = load(raw(defaults={"encoding": {"sizes": True}}))
    before = TrainingSettings.of(config, "s")
    after = parse(NewSettings, before.model_dump_json())
    assert after.as_params() == before.as_params()
    assert (
        after.model_copy(update={"encoding": NewEncoding(new=8)}).as_params() != before.as_params()
    )
    assert (
        NewConfig(**raw(defaults={"encoding": {"sizes": True}})).as_params() == config.as_params()
    )


PHASES = {
    "simulate": ArenaSettings, "fetch": FetchSettings, "backbone": BackboneSettings,
    "battles": BattlesSettings, "solution": SolutionSettings, "folds": FoldsSettings,
    "counts": CountSettings, "audit": AuditSettings, "tokens": TokensSettings,
    "pretraining": PretrainingSettings, "features": FeatureSettings, "probe": ProbeSettings,
    "training": TrainingSettings, "distillation": TrainingSettings, "logits": LogitsSettings,
    "stack": StackSettings, "stacked_logits": StackedLogitsSettings,
    "stacked_views": StackedViewsSettings, "endpoint": QuerySettings,
    "external_logits": ExternalSettings,
    "merging": MergeSettings, "soups": SoupSettings,
    "quantization": QuantizationSettings, "drift": DriftSettings, "scoring": ScoringSettings,
    "calibration": CalibrationSettings,
    "prediction": PredictionSettings, "judge": JudgeSettings,
    "stacked_judge": StackedJudgeSettings, "benchmarks": BenchmarkSettings,
    "evaluation": EvaluationSettings,
    "comparison": CompareSettings, "curves": CurveSettings, "averaging": AveragingSettings,
}  # fmt: skip
DEFAULTS = Path(__file__).with_name("defaults.jsonl")


def parts_of(annotation: Any) -> Iterator[Any]:
    """A type and all those it is made of."""
    yield annotation
    for part in get_args(annotation):
        yield from parts_of(part)


def defaults_of(model: type[BaseModel]) -> dict[str, str]:
    """Every default below a model, by the key's path."""
    found = {}
    for name, field in model.model_fields.items():
        if not field.is_required():
            value = field.default
            found[name] = value.as_params() if isinstance(value, Section) else repr(value)
        for part in parts_of(field.annotation):
            if isinstance(part, type) and issubclass(part, BaseModel):
                found |= {f"{name}.{key}": value for key, value in defaults_of(part).items()}
    return found


def test_a_changed_default_raises_the_version() -> None:
    """Params hold no defaults, so only a new version rebuilds outputs made with an old default.

    `ARENA_WRITE_DEFAULTS=1 pytest tests/test_config.py` rewrites the file.
    """
    assert set(PHASES.values()) == set(Settings.__subclasses__()), "name its phase in PHASES"
    found = {name: [VERSIONS[name], defaults_of(model)] for name, model in PHASES.items()}
    if os.environ.get("ARENA_WRITE_DEFAULTS"):
        DEFAULTS.write_text("".join(json.dumps(line) + "\n" for line in found.items()))
    known = dict(map(json.loads, DEFAULTS.read_text().splitlines()))
    for name, (version, defaults) in found.items():
        old_version, old_defaults = known[name]
        changed = {k for k, v in old_defaults.items() if k in defaults and defaults[k] != v}
        assert not changed or version != old_version, f"raise VERSIONS[{name!r}]: {changed}"
    assert found == known, (
        f"write {DEFAULTS.name} anew: {test_a_changed_default_raises_the_version.__doc__}"
    )


def test_a_phase_version_is_part_of_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    before = all_settings(load(raw()))
    monkeypatch.setitem(VERSIONS, "distillation", 99)
    after = all_settings(load(raw()))
    assert {key for key in before if before[key] != after[key]} == {("training", "s")}


def test_what_is_switched_off_has_no_settings() -> None:
    config = load(
        raw(defaults={"pretraining": None, "quantization": None}, prediction={"model": "merged"})
    )
    for model in (PretrainingSettings, QuantizationSettings, DriftSettings):
        with pytest.raises(InputError, match=r"judges\.s\.\w+ is null"):
            model.of(config, "s")


# --- shipped configurations -------------------------------------------------------------------------

RECIPES = sorted((ROOT / "config" / "recipes").glob("*.yaml"))


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "path", sorted((ROOT / "config").glob("*.yaml")), ids=lambda path: str(path.stem)
)
def test_shipped_configurations_are_valid(path: Path) -> None:
    config = load(read(path))
    assert config.final in config.judges
    assert load(json.loads(config.as_params())).described() == config.described()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_lay_over_the_default(recipe: Path) -> None:
    default = read(ROOT / "config" / "config.yaml")
    config = load(overlay(default, read(recipe)))
    for settings in all_settings(config).values():
        assert parse(type(settings), settings.as_params()) == settings


def test_the_summary_recipe_is_what_every_key_defaults_to() -> None:
    summary = read(ROOT / "config" / "recipes" / "summary.yaml")
    plain = {
        "folds": Folds().model_dump(),
        "defaults": JudgeDefaults().model_dump(),
        "prediction": Prediction().model_dump(),
    }

    def compare(given: Any, default: Any, path: str) -> None:
        if isinstance(given, dict):
            for key, value in given.items():
                compare(value, default[key], f"{path}.{key}")
        else:
            default = list(default) if isinstance(default, tuple) else default
            assert given == default, path

    for section in summary:
        compare(summary[section], plain[section], section)


def test_the_blackpearl_recipe_is_five_equal_terms() -> None:
    recipe = read(ROOT / "config" / "recipes" / "blackpearl.yaml")
    config = load(overlay(read(ROOT / "config" / "config.yaml"), recipe))
    student = config.judges[config.final]
    assert student.loss == Loss(
        ce=1, kl=1, cosine=1, temperature=1, temperature_squared=False, combine="separate"
    )
    assert student.targets == "in_sample"
    assert config.folds.method == "stratified"
    assert config.prediction.average == "probabilities"


def test_the_schema_is_plain_json_and_closed() -> None:
    whole = schema()
    assert json.loads(json.dumps(whole)) == whole
    assert whole["additionalProperties"] is False
    for name, part in whole["$defs"].items():
        assert part["additionalProperties"] is False, name
