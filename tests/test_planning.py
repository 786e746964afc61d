"""The cost of a run: counted, traced, scheduled; compared with real steps and with the winners' days."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import yaml
from checkouts import make_checkout, warm_python
from conftest import FAMILIES, ROOT
from hypothesis import given
from hypothesis import strategies as st

from arena_distill.config import run as configuration
from arena_distill.config.backbone import TINY, Backbone
from arena_distill.config.encoding import Encoding
from arena_distill.config.head import JOINT, Head
from arena_distill.config.plan import Accelerator, Plan
from arena_distill.config.run import Config, overlay
from arena_distill.config.training import Lora
from arena_distill.errors import InputError
from arena_distill.models.adapters import new_judge
from arena_distill.models.loading import load_classifier
from arena_distill.planning.alternatives import alternatives
from arena_distill.planning.costs import NF4_BYTES, ON_THE_HOST, Cost, Costs
from arena_distill.planning.devices import DEVICES, GIB, USABLE
from arena_distill.planning.fit import refuse_what_does_not_fit
from arena_distill.planning.schedule import critical_path, simulate
from arena_distill.planning.sizes import Alive, alive, measure, read_config, step_bytes
from arena_distill.planning.workload import Battles, assumed_sequence
from arena_distill.runs.graph import Planned

sys.path.insert(0, str(ROOT / "benchmarks"))
from plan_against_reality import KERNELS

LORA = Lora(r=16, alpha=32)

# Sizes as their publishers give them, the head of the language model left out where it is not tied.
PUBLISHED = {
    "meta-llama/Meta-Llama-3-70B-Instruct": 70_553_706_496 - 128_256 * 8192,
    "meta-llama/Llama-3.1-8B": 8_030_261_248 - 128_256 * 4096,
    "Qwen/Qwen2-72B-Instruct": 72_706_203_648 - 152_064 * 8192,
    "Qwen/Qwen2-7B": 7_615_616_512 - 152_064 * 3584,
    "Qwen/Qwen2-1.5B": 1_543_714_304,
    "google/gemma-2-27b-it": 27_227_128_320,
    "google/gemma-2-9b-it": 9_241_705_984,
    "google/gemma-2-2b": 2_614_341_888,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
}


def shipped(*files: str) -> dict[str, Any]:
    """Configurations that ship with the workflow, each overriding the one before."""
    raw: dict[str, Any] = {}
    for file in files:
        raw = overlay(raw, yaml.safe_load((ROOT / "config" / file).read_text()))
    return json.loads(json.dumps(raw))  # what YAML's anchors share becomes each one's own


WINNERS = shipped("lmsys.yaml", "recipes/blackpearl.yaml")


def planned(rule: str, config: Config, *, judge: str, **wildcards: str) -> Planned:
    """A job with the resources of its rule."""
    compute = config.judges[judge].compute
    resources: dict[str, int | str] = {
        "gpu": compute.gpus,
        "mem_mb": compute.mem_mb,
        "runtime": compute.runtime,
    }
    if rule in ("pretrain_adapter", "train_teacher", "distill_student"):
        resources |= {
            "micro_batch_size": compute.micro_batch_size,
            "gradient_checkpointing": int(compute.gradient_checkpointing),
            "fsdp": int(compute.fsdp),
            "nodes": compute.nodes,
        }
    else:
        resources |= {
            "gpu": config.judges[judge].scoring_gpus(),
            "batch_tokens": compute.batch_tokens,
        }
    return Planned(
        rule=rule,
        wildcards={"judge": judge, **wildcards},
        outputs=[f"{rule}/{judge}"],
        logs=[],
        needed=True,
        threads=compute.threads,
        resources=resources,
    )


def costs_of(raw: dict[str, Any], run: Path = Path("nowhere")) -> Costs:
    config = configuration.load(raw)
    return Costs(config, Battles(config, run), run)


def tiny(family: str = "llama") -> dict[str, Any]:
    """A run of one tiny judge."""
    return {
        "run": "tiny",
        "data": {"train": "train.csv", "test": "test.csv", "extra": "extra.csv", "ut": "ut.csv"},
        "folds": {"n": 3},
        "judges": {"j": {"backbone": {"tiny": family}, "precision": "fp32"}},
        "final": "j",
    }


# --- sizes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_that_were_published(name: str) -> None:
    config = read_config(Backbone(hub=name, revision="main"), Path("nowhere"))
    assert measure(config, JOINT, Lora()).base == PUBLISHED[name]


def test_parameters_are_those_of_the_real_judge() -> None:
    for family in FAMILIES:
        judge = new_judge(load_classifier(TINY / family, head_seed=0), LORA, seed=0)
        learned = {n: p.numel() for n, p in judge.named_parameters() if p.requires_grad}
        sizes = measure(read_config(Backbone(tiny=family), Path("nowhere")), JOINT, LORA)
        assert sizes.lora == sum(count for name, count in learned.items() if "lora_" in name)
        assert sizes.lora + sizes.head == sum(learned.values())
        everything = sum(p.numel() for p in judge.parameters())
        assert sizes.base + sizes.lora + 2 * sizes.head == everything
        whole = measure(read_config(Backbone(tiny=family), Path("nowhere")), JOINT, None)
        assert whole.learned == whole.base + whole.head == sizes.base + sizes.head
        assert sizes.learned == sizes.lora + sizes.head


def test_a_backbone_is_its_own_folder_before_a_published_one(tmp_path: Path) -> None:
    folder = tmp_path / "gemma-2-9b"
    folder.mkdir()
    (folder / "config.json").write_text((TINY / "gemma2" / "config.json").read_text())
    for backbone, prepared in (
        (Backbone(path=str(folder)), tmp_path / "none"),
        (Backbone(hub="google/gemma-2-9b", revision="main"), folder),
    ):
        assert read_config(backbone, prepared).hidden_size == 64


def test_the_first_layers_and_folders_that_are_not_there_yet() -> None:
    backbone = Backbone(path="models/Llama-3-8B", layers=4)
    config = read_config(backbone, Path("nowhere"))
    assert (config.hidden_size, config.num_hidden_layers) == (4096, 4)


def test_a_model_that_nobody_knows_is_one_clear_line() -> None:
    with pytest.raises(InputError, match=r"models/mine: the size .*Known: gemma-2-27b, "):
        read_config(Backbone(path="models/mine"), Path("nowhere"))


# --- against real steps -----------------------------------------------------------------------------


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize(
    ("family", "lora"), [*((family, LORA) for family in FAMILIES), ("qwen2", None)]
)
def test_operations_of_a_training_step(family: str, lora: Lora | None, again: bool) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    judge: Any = new_judge(
        load_classifier(TINY / family, pad_token_id=0, head_seed=0), lora, seed=0
    )
    if again:
        judge.activation_checkpointing_enable({"use_reentrant": False})
    judge.train()
    ids = torch.randint(5, 900, (2, 96))
    with FlopCounterMode(display=False, custom_mapping=KERNELS) as counter:
        judge(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.sum().backward()
    sizes = measure(read_config(Backbone(tiny=family), Path("nowhere")), JOINT, lora)
    flops = sizes.training_flops(2 * 96, 2 * 96**2, checkpointing=again)
    assert 0.9 < flops / counter.get_total_flops() < 1.1


@pytest.mark.parametrize(
    ("family", "again", "half", "lora"),
    [
        ("llama", False, False, LORA),
        ("llama", True, True, LORA),
        ("qwen2", True, False, LORA),
        ("gemma2", False, True, LORA),
        ("qwen2", False, True, None),
        ("gemma2", True, False, None),
    ],
)
def test_memory_of_a_training_step(family: str, again: bool, half: bool, lora: Lora | None) -> None:
    """Four layers and three sequences, extrapolated from two and three layers, one and two sequences."""
    dtype = torch.bfloat16 if half else torch.float32
    base = load_classifier(TINY / family, dtype=dtype, pad_token_id=0, head_seed=0)
    ids = torch.randint(5, 900, (3, 96))
    real = step_bytes(new_judge(base, lora, seed=0), ids, half, True, again)
    config = read_config(Backbone(tiny=family), Path("nowhere"))
    precision: Any = "bf16" if half else "fp32"
    told = alive(
        config, JOINT, lora, length=96, precision=precision, training=True, checkpointing=again
    )
    casts = 2 * measure(config, JOINT, lora).linear if half and lora is None else 0
    # Most for a Llama whose heads are wider together than the model.
    assert 0.9 < (told.at(4, 3) + casts) / real < 1.12


def test_checkpointing_and_half_precision_take_less() -> None:
    config = read_config(Backbone(tiny="llama"), Path("nowhere"))

    def held(**how: Any) -> float:
        how = {"precision": "fp32", "training": True, **how}
        return alive(config, JOINT, LORA, length=96, **how).at(4, 2)  # most are traced above

    assert held() > held(precision="bf16") > held(precision="bf16", checkpointing=True)
    assert held(eager=True) > held() > held(training=False)


# --- battles ----------------------------------------------------------------------------------------


@given(st.integers(40, 4000), st.floats(0.3, 1.5))
def test_lengths_are_log_normal_and_cut(limit: int, spread: float) -> None:
    plan = Plan(tokens_per_battle=700, tokens_spread=spread)
    normal = np.random.default_rng(0).normal(math.log(700) - spread**2 / 2, spread, 200_000)
    lengths = np.minimum(np.exp(normal), limit)
    found = assumed_sequence(plan, Encoding(), JOINT, limit)
    assert found.tokens == pytest.approx(lengths.mean(), rel=0.03)
    assert found.squares == pytest.approx((lengths**2).mean(), rel=0.06)


def test_pointwise_sequences_are_shorter_and_a_budget_is_kept() -> None:
    plan = Plan()
    joint = assumed_sequence(plan, Encoding(), JOINT, 1024).tokens
    assert assumed_sequence(plan, Encoding(), Head(kind="pointwise"), 1024).tokens < joint
    tight = assumed_sequence(plan, Encoding(tokens_per_battle=256), JOINT, 1024)
    assert tight.tokens == pytest.approx(256, abs=1)


def test_battles_are_counted_where_they_are_there(
    tmp_path: Path, make_run: Callable[..., Any]
) -> None:
    made = make_run("llama")
    run = tmp_path / "results" / "tiny"
    (run / "tokens" / "tiny-llama").mkdir(parents=True)
    for source, target in (
        (made.battles, "battles.parquet"),
        (made.folds, "folds.parquet"),
        (made.tokens, "tokens/tiny-llama/battles.parquet"),
    ):
        (run / target).write_bytes(source.read_bytes())
    config = configuration.load(tiny())
    battles = Battles(config, run)
    assert battles.counts == {"train": 18, "extra": 5, "ut": 10, "test": 3}
    trained, scored = battles.training("j", 0), battles.scored("j", 0)
    assert trained["train"] + scored["train"] == 18
    assert sum(battles.scored("j", fold)["train"] for fold in range(3)) == 18
    work = battles.work("j", {"train": 18.0}, shown=2)
    assert work.sequences == 36
    assert battles.measured
    assert 36 < work.tokens < 36 * work.longest <= 36 * 1024
    assert work.squares >= work.tokens**2 / work.sequences


def test_battles_are_assumed_where_they_are_not(tmp_path: Path) -> None:
    raw = tiny() | {"plan": {"battles": {"train": 3000, "extra": 100, "ut": 50, "test": 30}}}
    battles = Battles(configuration.load(raw), tmp_path)
    assert battles.training("j", 1) == pytest.approx({"train": 2000, "extra": 100})
    assert battles.scored("j", 1) == {"train": 1000}
    arena = tiny() | {"data": {"arena": {"train": 600, "extra": 0, "ut": 0, "test": 7}}}
    assert Battles(configuration.load(arena), tmp_path).counts == {"train": 600, "test": 7}


def test_students_and_what_they_learn_from() -> None:
    raw = shipped("lmsys.yaml")
    raw["data"]["unlabelled"] = "more.csv"
    raw["plan"] = {"battles": {"train": 1000, "extra": 100, "unlabelled": 10}}
    battles = costs_of(raw).battles
    everything = {"train": 200, "extra": 100, "unlabelled": 10}
    assert battles.scored("llama3-70b", 0) == everything
    assert battles.scored("gemma2-9b", 0) == {"train": 200}
    assert battles.training("gemma2-9b", 0) == everything | {"train": 800}
    assert "unlabelled" not in battles.training("llama3-70b", 0)
    raw["defaults"]["targets"] = "in_sample"
    assert costs_of(raw).battles.scored("llama3-70b", 0) == everything | {"train": 1000}


# --- jobs -------------------------------------------------------------------------------------------


def test_nf4_weights_and_what_is_learned() -> None:
    costs = costs_of(WINNERS)
    cost = costs.of(planned("train_teacher", costs.config, judge="llama3-70b", fold="0"))
    sizes = costs.sizes("llama3-70b")
    assert 0.515 < NF4_BYTES < 0.517
    assert cost.memory["weights"] == NF4_BYTES * sizes.linear + 2 * (sizes.embedding + sizes.other)
    assert cost.memory["optimizer"] == 8 * (828_375_040 + 3 * 8192)
    assert cost.peak < USABLE * DEVICES["a100-80g"].memory
    assert cost.stored == 4 * (828_375_040 + 3 * 8192)


def test_all_weights_take_sixteen_bytes_each() -> None:
    """Weights, gradients and both moments in float32; fewer on each GPU that shares them, DDP's buckets."""
    raw = json.loads(json.dumps(WINNERS))
    raw["judges"]["gemma2-9b"] |= {"lora": None, "precision": "bf16"}
    costs = costs_of(raw)
    sizes = costs.sizes("gemma2-9b")
    assert sizes.learned == PUBLISHED["google/gemma-2-9b-it"] + sizes.head
    job = planned("distill_student", costs.config, judge="gemma2-9b", fold="0")

    def held(**asked: int) -> float:
        memory = costs.of(replace(job, resources=job.resources | asked)).memory
        assert memory.pop("casts", 0) == (0 if asked.get("fsdp") else 2 * sizes.linear)
        del memory["activations"]
        memory.pop("gathered", None)
        return sum(memory.values())

    assert held(gpu=1) == 16 * sizes.learned
    assert held(gpu=8) == 20 * sizes.learned
    assert held(gpu=8, fsdp=1) == pytest.approx(
        16 * sizes.learned / 8, rel=1e-4
    )  # each has the head
    with pytest.raises(
        InputError, match=r"optimizer 68\.9, .*casts 15\.\d.*fsdp: true, gpus: 4 "
    ) as error:
        refuse_what_does_not_fit([job], [costs.of(job)], costs)
    assert "nf4" not in str(error.value)
    fold = costs.of(job)
    assert (fold.stored, fold.checkpoints) == (4 * sizes.learned, 3 * 12 * sizes.learned)
    assert fold.host > 2 * 4 * sizes.learned  # what is written, and the best weights
    with_adapter = costs_of(WINNERS).of(job)
    assert 1.2 < fold.flops / with_adapter.flops < 1.5
    merged = costs.of(planned("merge_folds", costs.config, judge="gemma2-9b"))
    assert merged.stored == 2 * sizes.learned
    assert merged.host < 4 * 1.2 * sizes.learned


def test_fsdp_spreads_the_backbone_and_shards_split_the_scoring() -> None:
    costs = costs_of(WINNERS)
    job = planned("distill_student", costs.config, judge="gemma2-9b", fold="0")
    spread = costs.of(replace(job, resources=job.resources | {"fsdp": 1}))
    whole = costs.of(job)
    assert spread.memory["weights"] == whole.memory["weights"] / 8
    assert spread.flops == whole.flops
    raw = json.loads(json.dumps(WINNERS))
    four = costs_of(raw)
    part = planned("predict_shard", four.config, judge="gemma2-9b", fold="0", shard="1")
    one = planned("predict_logits", costs.config, judge="gemma2-9b", fold="0")
    assert 4 * four.of(part).flops == pytest.approx(costs.of(one).flops)


def test_swap_epochs_and_checkpointing_multiply_the_work() -> None:
    raw = json.loads(json.dumps(WINNERS))
    raw["folds"]["choices"] = 0  # a look at them costs the same for any swap and number of epochs
    raw["defaults"]["training"]["keep"] = "last"
    costs = costs_of(raw)
    job = planned("distill_student", costs.config, judge="gemma2-9b", fold="0")
    flops = costs.of(job).flops
    once = costs.of(replace(job, resources=job.resources | {"gradient_checkpointing": 0}))
    assert flops / once.flops == pytest.approx(1.5, abs=0.03)
    raw["judges"]["gemma2-9b"]["training"] = {"epochs": 1, "swap": False}
    assert 4 * costs_of(raw).of(job).flops == pytest.approx(flops)


def test_every_kind_of_job_has_a_cost() -> None:
    costs = costs_of(WINNERS)
    for rule in ("merge_folds", "quantize_model", "score_test_merged", "score_test_gptq"):
        cost = costs.of(planned(rule, costs.config, judge="gemma2-9b"))
        assert cost.seconds > 60 and cost.flops > 0 and cost.host > 0 and cost.peak > 0
    dense = costs.of(planned("merge_folds", costs.config, judge="gemma2-9b")).stored
    packed = costs.of(planned("quantize_model", costs.config, judge="gemma2-9b")).stored
    assert dense == pytest.approx(2 * 9_241_705_984, rel=0.001)
    assert 0.5 < packed / dense < 0.6  # 8 bits, but for the embeddings


def test_a_frozen_judge_reads_once_and_merges_no_adapter() -> None:
    raw = tiny()
    raw["judges"]["j"]["frozen"] = {"layers": [1, 2], "poolings": ["last"]}
    costs = costs_of(raw)
    read, merge = (
        costs.of(planned(rule, costs.config, judge="j"))
        for rule in ("read_features", "merge_probes")
    )
    counts, width = costs.battles.counts, costs.sizes("j").hidden
    floats = (counts["train"] + counts["extra"]) * 2 * 2 * width  # answers, layers
    assert read.stored == 2 * floats and read.flops > 0
    assert merge.memory["adapters"] == 0 and merge.stored > 0
    fit, score = (
        costs.of(planned(rule, costs.config, judge="j", fold="0"))
        for rule in ("fit_probe", "score_probe")
    )
    of_a_battle, base = (
        4 * 2 * 2 * width,
        costs.of(planned("assign_folds", costs.config, judge="j")),
    )
    for cost, battles, held in (
        (fit, costs.battles.training("j", 0), 5),
        (score, costs.battles.scored("j", 0), 2),
    ):
        in_memory = cost.host - base.host
        assert in_memory == pytest.approx(held * of_a_battle * sum(battles.values()))


def test_a_judge_below_a_head_on_layers_is_cut() -> None:
    """After 0.7 of its depth: that is what is trained, and scored."""
    raw = {**WINNERS, "judges": dict(WINNERS["judges"])}
    final = raw["judges"]["gemma2-9b"] | {"lora": {"r": 8}, "loss": {"ce": 1}}
    layered = {"head": {"kind": "pointwise", "pooling": "layers"}, "merge": {"heads": "average"},
               "training": {"fit_head": True}, "compute": {"gpus": 1}}  # fmt: skip
    plain = layered | {"head": {"kind": "pointwise"}}
    whole, cut = (
        costs_of({**raw, "judges": raw["judges"] | {"gemma2-9b": final | head}}).sizes("gemma2-9b")
        for head in (plain, layered)
    )
    assert (whole.layers, cut.layers) == (42, 29)


def test_sequences_beyond_the_models_positions_are_refused() -> None:
    raw = tiny() | {"prediction": {"max_lengths": [5000]}}
    costs = costs_of(raw)
    with pytest.raises(InputError, match="5000 tokens, but its model allows only 4096"):
        costs.of(planned("score_test_merged", costs.config, judge="j"))


def test_the_table_of_accelerators_is_that_of_the_configuration() -> None:
    assert list(DEVICES) == list(get_args(Accelerator))


# --- does it fit? -----------------------------------------------------------------------------------


def refusal(raw: dict[str, Any], rule: str = "train_teacher", judge: str = "llama3-70b") -> str:
    costs = costs_of(raw)
    job = planned(rule, costs.config, judge=judge, fold="0")
    with pytest.raises(InputError) as raised:
        refuse_what_does_not_fit([job], [costs.of(job)], costs)
    return str(raised.value)


def test_what_does_not_fit_is_refused_with_what_would() -> None:
    raw = json.loads(json.dumps(WINNERS))
    raw["judges"]["llama3-70b"]["precision"] = "bf16"
    told = refusal(raw)
    assert "train_teacher llama3-70b: needs 15" in told
    assert "weights 129.5" in told
    assert "judges.llama3-70b.precision: nf4 (" in told
    assert "judges.llama3-70b.compute.fsdp: true, gpus: 4 (" in told
    assert "gpus: 2" not in told  # half of the weights and the rest are more than a GPU has
    scoring = refusal(raw, rule="predict_logits")
    assert "judges.llama3-70b.logits.gpus: 2 (" in scoring


def test_remedies_are_true() -> None:
    raw = json.loads(json.dumps(WINNERS))
    raw["defaults"]["compute"] |= {"gradient_checkpointing": False, "micro_batch_size": 8}
    raw["plan"] = {"accelerator": "a100-40g"}
    told = refusal(raw, "distill_student", "gemma2-9b")
    assert "judges.gemma2-9b.compute.gradient_checkpointing: true" in told
    raw["defaults"]["compute"]["gradient_checkpointing"] = True
    costs = costs_of(raw)
    cost = costs.of(planned("distill_student", costs.config, judge="gemma2-9b", fold="0"))
    assert f"gradient_checkpointing: true ({cost.peak / GIB:.1f} GiB)" in told
    assert cost.peak < USABLE * DEVICES["a100-40g"].memory


def test_several_changes_together_where_none_is_enough() -> None:
    raw = json.loads(json.dumps(WINNERS))
    raw["judges"]["llama3-70b"] |= {"precision": "bf16"}
    raw["defaults"]["compute"]["gradient_checkpointing"] = False
    told = refusal(raw)
    assert "gradient_checkpointing: true and judges.llama3-70b.precision: nf4" in told


def test_more_gpus_than_a_node_has() -> None:
    raw = json.loads(json.dumps(WINNERS)) | {"plan": {"gpus_per_node": 4}}
    assert "needs 8 GPUs, a node has 4" in refusal(raw)


def test_two_nodes_have_them_together() -> None:
    raw = json.loads(json.dumps(WINNERS)) | {"plan": {"gpus_per_node": 4, "nodes": 2}}
    raw["defaults"]["compute"]["nodes"] = 2
    costs = costs_of(raw)
    wide = planned("train_teacher", costs.config, judge="llama3-70b", fold="0")
    found = costs.of(wide)
    assert (found.gpus, found.nodes) == (8, 2)
    alone = costs.of(replace(wide, resources=wide.resources | {"nodes": 1}))
    written = 2 * found.stored  # by one process, which holds it, and the best weights
    assert found.host - written == (alone.host - written) / 2
    refuse_what_does_not_fit([wide], [found], costs)
    raw["plan"]["nodes"] = 1
    assert "needs 2 nodes, there are 1" in refusal(raw)


# --- cheaper settings -------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations by a formula: tracing each setting's takes seconds, and has its own tests above."""

    def alive(*about: Any, length: int, checkpointing: bool = False, **more: Any) -> Alive:
        of_layers = [100 * length * (1 if checkpointing else layers) for layers in (2, 3)]
        return Alive(tuple((bytes_, 2 * bytes_) for bytes_ in of_layers))  # type: ignore[arg-type]

    monkeypatch.setattr("arena_distill.planning.costs.alive", alive)


def small_run(**plan: Any) -> tuple[list[Planned], Costs]:
    """Three folds of a teacher and of its student."""
    raw = tiny() | {"plan": {"accelerator": "a100-80g", "startup": 0, "disk_gb_per_s": 1e9, **plan}}
    compute = {"gpus": 8, "gradient_checkpointing": True, "micro_batch_size": 2}
    shared = {"precision": "bf16", "training": {"batch_size": 16}, "compute": compute}
    raw["judges"] = {
        "t": {"backbone": {"tiny": "llama"}, **shared},
        "s": {"backbone": {"tiny": "qwen2"}, "teachers": ["t"], **shared},
    }
    raw["final"] = "s"
    raw["defaults"] = {"pretraining": None}
    costs = costs_of(raw)
    jobs = []
    for name, rule, after in (("t", "train_teacher", []), ("s", "distill_student", [0, 1, 2])):
        job = planned(rule, costs.config, judge=name, fold="0")
        jobs += [replace(job, after=after, outputs=["o"]) for _ in range(3)]
    return jobs, costs


def gpu_seconds(costs: Costs, jobs: list[Planned]) -> float:
    return sum(cost.gpus * cost.seconds for cost in map(costs.of, jobs))


@pytest.mark.usefixtures("quick")
def test_cheaper_settings_cost_what_a_plan_with_them_costs() -> None:
    jobs, costs = small_run()
    plan, *told = alternatives(jobs, [costs.of(job) for job in jobs], costs)
    assert plan.changes == ()
    assert plan.gpu_hours == pytest.approx(gpu_seconds(costs, jobs) / 3600)
    by_text = {each.changes[0]: each for each in told if len(each.changes) == 1}
    for key, value in (
        ("head", {"kind": "pointwise"}),
        ("backbone", {"tiny": "llama", "layers": 3}),
    ):
        judge = costs.config.judges["t"]
        changed = judge.model_copy(
            update={
                key: getattr(judge, key).model_copy(update=value)
            }  # the judge's other keys stay
        )
        config = costs.config.with_judges({"t": changed})
        text = "head: pointwise" if key == "head" else "backbone.layers: 3"
        found = by_text[f"judges.t.{text}"]
        assert not found.same
        other = Costs(config, Battles(config, costs.run), costs.run)
        assert found.gpu_hours == pytest.approx(gpu_seconds(other, jobs) / 3600)
    text = "judges.s.compute: {gradient_checkpointing: false, micro_batch_size: 2}"
    assert by_text[text].same
    once = [replace(j, resources=j.resources | {"gradient_checkpointing": 0}) for j in jobs[3:]]
    assert by_text[text].gpu_hours == pytest.approx(gpu_seconds(costs, jobs[:3] + once) / 3600)


@pytest.mark.usefixtures("quick")
def test_the_best_combination_is_no_worse_than_any_single_change() -> None:
    jobs, costs = small_run(price_per_gpu_hour={"a100-80g": 2.0, "h100-80g": 3.0})
    plan, *told = alternatives(jobs, [costs.of(job) for job in jobs], costs)
    *single, same, every = told
    prices = [each.cost or 0 for each in single]
    assert prices == sorted(prices)
    assert same.same
    assert not every.same
    assert "judges.t on h100-80g" in same.changes  # 1.5 times the price, 3.2 times the speed
    assert (same.cost or 0) <= min(each.cost or 0 for each in single if each.same)
    assert (every.cost or 0) < min(same.cost or 0, *prices)
    assert every.gpu_hours < same.gpu_hours < plan.gpu_hours
    assert len(set(every.changes)) == len(every.changes)


@pytest.mark.usefixtures("quick")
def test_what_does_not_fit_is_no_alternative(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs, costs = small_run(price_per_gpu_hour={"a100-80g": 2.0, "rtx-4090": 0.01})

    def priced_changes() -> set[str]:
        told = alternatives(jobs, [costs.of(job) for job in jobs], costs)
        return {change for each in told for change in each.changes}

    assert "judges.t on rtx-4090" in priced_changes()
    peaks = {job.wildcards["judge"]: costs.of(job).peak for job in jobs}
    assert peaks["s"] != peaks["t"]
    larger, smaller = sorted(peaks, key=lambda name: -peaks[name])
    room = (peaks[larger] + peaks[smaller]) / 2 / USABLE
    monkeypatch.setitem(DEVICES, "rtx-4090", replace(DEVICES["rtx-4090"], memory=room))
    assert f"judges.{smaller} on rtx-4090" in priced_changes()
    assert f"judges.{larger} on rtx-4090" not in priced_changes()


# --- when? ------------------------------------------------------------------------------------------


def job(*after: int) -> Planned:
    return Planned(rule="r", wildcards={}, outputs=["o"], logs=[], needed=True, after=list(after))


def test_jobs_share_a_node_and_wait_for_each_other() -> None:
    jobs = [job(), job(), job(0, 1)]
    costs = [Cost(gpus=4, seconds=10), Cost(gpus=4, seconds=20), Cost(gpus=8, seconds=5)]
    assert simulate(jobs, costs, Plan(gpus_per_node=8)) == [0, 0, 20]
    assert simulate(jobs, costs[:2] + [replace(costs[2], gpus=4)], Plan(gpus_per_node=4)) == [
        20,
        0,
        30,
    ]
    assert critical_path(jobs, costs) == [1, 2]


@given(
    st.lists(
        st.tuples(st.integers(0, 4), st.integers(1, 9), st.integers(0, 7), st.integers(1, 3)),
        min_size=1,
        max_size=25,
    ),
    st.integers(1, 3),
)
def test_no_schedule_is_faster_than_its_bounds_and_none_overfills(
    drawn: list[tuple[int, int, int, int]], nodes: int
) -> None:
    jobs = [job(*({i - 1 - back} if back < i else ())) for i, (_, _, back, _) in enumerate(drawn)]
    costs = [
        Cost(gpus=gpus * min(wide, nodes), seconds=seconds, nodes=min(wide, nodes))
        for gpus, seconds, _, wide in drawn
    ]
    plan = Plan(nodes=nodes, gpus_per_node=4, cores_per_node=3)
    starts = simulate(jobs, costs, plan)
    ends = [start + cost.seconds for start, cost in zip(starts, costs, strict=True)]
    for each, start in zip(jobs, starts, strict=True):
        assert all(ends[before] <= start for before in each.after)
    for moment in starts:
        at_work = [i for i, start in enumerate(starts) if start <= moment < ends[i]]
        assert sum(costs[i].gpus for i in at_work) <= 4 * nodes
        assert sum(costs[i].nodes for i in at_work) <= 3 * nodes
    chain = sum(costs[i].seconds for i in critical_path(jobs, costs))
    work = sum(cost.gpus * cost.seconds for cost in costs) / (4 * nodes)
    serial = sum(cost.seconds for cost in costs)
    assert max(chain, work) <= max(ends) <= serial


# --- the winners' days ------------------------------------------------------------------------------


def test_against_what_the_winners_published() -> None:
    """8 A100 with 80 GB: post-pretraining 1 to 2.5 days, a day per teacher's fold, half of one per
    student's. One utilisation for all.
    """
    costs = costs_of(WINNERS)
    config = costs.config

    def days(rule: str, judge: str, **wildcards: str) -> float:
        cost = costs.of(planned(rule, config, judge=judge, **wildcards))
        assert cost.peak < USABLE * DEVICES["a100-80g"].memory
        return cost.seconds / 86400

    pretraining = sum(days("pretrain_adapter", judge) for judge in config.judges)
    llama = days("train_teacher", "llama3-70b", fold="0")
    qwen = days("train_teacher", "qwen2-72b", fold="0")
    student = days("distill_student", "gemma2-9b", fold="0")
    training = pretraining + 5 * (llama + qwen + student)
    rows = [
        ("post-pretraining of all three", pretraining, "1 to 2.5"),
        ("a fold of Llama-3-70B", llama, "1"),
        ("a fold of Qwen2-72B", qwen, "1"),
        ("a fold of Gemma-2-9B", student, "0.5"),
    ]
    assert 1 <= pretraining <= 2.5
    for predicted, published in ((llama, 1), (qwen, 1), (student, 0.5), (training, 15)):  # days
        assert 0.5 < predicted / published < 2
    table = (ROOT / "docs" / "planning.md").read_text()
    assert f"| all trainings | {training:.2f} |" in table
    for stage, predicted, published in rows:
        assert f"| {stage} | {predicted:.2f} | {published} |" in table


# --- the command ------------------------------------------------------------------------------------


def plan_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [warm_python(), "-m", "arena_distill", "plan", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_a_plan_needs_neither_battles_nor_models(tmp_path: Path) -> None:
    raw = tiny() | {"data": {"train": "none/train.csv", "test": "none/test.csv"}}
    raw["judges"] = {"j": {"backbone": {"path": "none/Qwen2-1.5B"}, "compute": {"gpus": 1}}}
    raw["plan"] = {"accelerator": "l40s", "price_per_gpu_hour": 2}
    file, output = tmp_path / "mine.yaml", tmp_path / "plan.json"
    file.write_text(json.dumps(raw))
    done = plan_command("--output", str(output), "--json", "--configfile", str(file))
    assert not done.returncode, done.stderr
    plan = json.loads(output.read_text())
    assert json.loads(done.stdout) == plan
    totals, jobs = plan["totals"], plan["jobs"]
    assert plan["judges"]["j"]["base"] == 1_543_714_304
    assert totals["jobs"] == totals["jobs_left"] == len(jobs) > 10
    assert totals["cost"] == pytest.approx(2 * totals["gpu_hours"])
    assert totals["critical_path_hours"] <= totals["makespan_hours"]
    assert totals["makespan_hours"] * 3600 == pytest.approx(max(job["end"] for job in jobs))
    assert plan["critical_path"][-1].endswith(("report.html", "submission.csv"))


@pytest.mark.slow
def test_a_run_that_cannot_fit_exits_with_a_clear_line(tmp_path: Path) -> None:
    raw = tiny()
    raw["judges"] = {"j": {"backbone": {"path": "none/gemma-2-27b"}, "compute": {"gpus": 1}}}
    raw["plan"] = {"accelerator": "l40s"}
    file = tmp_path / "mine.yaml"
    file.write_text(json.dumps(raw))
    done = plan_command("--configfile", str(file))
    assert done.returncode == 1
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert any("train_teacher j: needs" in line for line in told)
    assert "Traceback" not in done.stderr


def test_what_is_planned_is_no_part_of_what_is_computed() -> None:
    some, other = tiny(), tiny() | {"plan": {"nodes": 3}}
    assert configuration.load(some).described() == configuration.load(other).described()


@pytest.mark.slow
def test_the_plan_is_a_target_of_the_workflow(tmp_path: Path) -> None:
    checkout = make_checkout(tmp_path / "checkout")
    assert checkout.would_run("plan") == {"plan": 1, "write_plan": 1}
    checkout.run("plan")
    plan = json.loads((checkout.results / "plan.json").read_text())
    rules = {job["rule"] for job in plan["jobs"]}
    assert {"train_teacher", "distill_student", "quantize_model", "render_report"} <= rules
    assert plan["battles"]["counted"] and not plan["battles"]["measured"]
    assert not list(checkout.results.glob("*.parquet"))  # nothing else was done


def test_the_planner_knows_every_rule() -> None:
    rules = {
        name
        for file in [ROOT / "Snakefile", *(ROOT / "rules").glob("*.smk")]
        for name in re.findall(r"(?m)^(?:rule|use rule \w+ as) (\w+)", file.read_text())
    }
    config = configuration.load(yaml.safe_load((ROOT / "config/config.yaml").read_text()))
    known = Costs(config, Battles(config, Path("none")), Path("none")).by_rule.keys() | ON_THE_HOST
    targets = set(re.findall(r"(?m)^rule (\w+)", (ROOT / "rules/targets.smk").read_text()))
    assert rules - targets - {"all"} == known
