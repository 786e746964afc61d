"""Quantisation: the computation and bounds of the drift, errors, and GPTQ itself.

GPTQ runs in the second environment: those tests start its interpreter once and look at its files.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from arena_distill.config.deployment import CalibrationRows
from arena_distill.config.encoding import Encoding
from arena_distill.config.phases.deployment import DriftSettings, QuantizationSettings
from arena_distill.deployment import gptq
from arena_distill.deployment.gptq import check_layers
from arena_distill.deployment.quantization_error import check_drift, drift
from arena_distill.encoding.sequences import Sequences
from arena_distill.errors import InputError
from arena_distill.models.scoring import score
from arena_distill.verdicts import Votes

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = ("llama", "qwen2", "gemma2")
CASES: list[dict[str, Any]] = [
    *({"name": f"{f}-8", "model": f, "bits": 8, "group_size": 32} for f in FAMILIES),
    {"name": "llama-8-again", "model": "llama", "bits": 8, "group_size": 32},
    {"name": "llama-8-seed", "model": "llama", "bits": 8, "group_size": 32, "seed": 1},
    {"name": "gemma2-half", "model": "gemma2-bf16", "bits": 8, "group_size": 16},
    *({"name": f"llama-{b}", "model": "llama", "bits": b, "group_size": 32} for b in (4, 3, 2)),
    {"name": "llama-128", "model": "llama", "bits": 8, "group_size": 128},
]

# --- drift ----------------------------------------------------------------------------------------

LOGITS = arrays.arrays(np.float32, (5, 3), elements=st.floats(-30, 30, width=32))


@given(LOGITS, LOGITS)
def test_drift_is_a_divergence(before: np.ndarray, after: np.ndarray) -> None:
    report = drift(before, after)
    assert 0 <= report["kl"] <= report["kl_max"] < np.inf
    assert 0 <= report["flip_rate"] <= 1
    assert drift(before, before)["kl"] == drift(before, before)["flip_rate"] == 0


@given(LOGITS, st.floats(-5, 5))
def test_drift_ignores_what_softmax_ignores(before: np.ndarray, shift: float) -> None:
    assert drift(before, before + np.float32(shift))["kl"] < 1e-9


def test_drift_by_hand() -> None:
    p, q = np.array([[0.5, 0.25, 0.25], [0.8, 0.1, 0.1]]), np.array([[0.25, 0.5, 0.25]] * 2)
    votes = Votes.hard(np.array([0, 2]))
    report = drift(np.log(p).astype(np.float32), np.log(q).astype(np.float32), votes)
    kl = (p * np.log(p / q)).sum(-1)
    assert report["rows"] == 2
    assert report["kl"] == pytest.approx(kl.mean(), rel=1e-6)
    assert report["kl_max"] == pytest.approx(kl.max(), rel=1e-6)
    assert report["flip_rate"] == 1
    assert report["logit_change"] == pytest.approx(np.abs(np.log(p / q)).mean(), rel=1e-6)
    assert report["log_loss_before"] == pytest.approx(-np.log([0.5, 0.1]).mean(), rel=1e-6)
    assert report["log_loss"] == pytest.approx(-np.log([0.25, 0.25]).mean(), rel=1e-6)
    change = report["log_loss"] - report["log_loss_before"]
    assert report["log_loss_change"] == pytest.approx(change, rel=1e-6)


def test_drift_without_votes_has_no_log_loss() -> None:
    report = drift(np.zeros((2, 3), np.float32), np.zeros((2, 3), np.float32))
    assert report["log_loss"] is report["log_loss_before"] is report["log_loss_change"] is None


@pytest.fixture
def drifted(tmp_path: Path) -> Path:
    path = tmp_path / "gptq" / "drift.json"
    path.parent.mkdir()
    report = {"rows": 9, "kl": 0.12, "flip_rate": 0.05, "bits": 4, "group_size": 32, "samples": 64}
    path.write_text(json.dumps(report))
    return path


def bounds(max_kl: float, max_flip_rate: float) -> DriftSettings:
    return DriftSettings(version=1, max_kl=max_kl, max_flip_rate=max_flip_rate)


def test_drift_within_bounds_is_written_down(drifted: Path, tmp_path: Path) -> None:
    check_drift(drifted, tmp_path / "ok.json", settings=bounds(0.12, 0.05))
    within = json.loads((tmp_path / "ok.json").read_text())["within_bounds"]
    assert within["kl"] == {"value": 0.12, "bound": 0.12}


@pytest.mark.parametrize(
    ("max_kl", "max_flip_rate", "message"),
    [
        (0.01, 1, r"mean KL 0\.12 > 0\.01 \(config: judges\.\*\.quantization\.max_kl\)"),
        (1, 0.01, r"changed verdicts 0\.05 > 0\.01 \(config: .*max_flip_rate\)"),
    ],
)
def test_drift_beyond_a_bound_keeps_the_model(
    drifted: Path, tmp_path: Path, max_kl: float, max_flip_rate: float, message: str
) -> None:
    with pytest.raises(InputError, match=message) as error:
        check_drift(drifted, tmp_path / "ok.json", settings=bounds(max_kl, max_flip_rate))
    assert f"kept in {drifted.parent}" in str(error.value)
    assert drifted.exists() and not (tmp_path / "ok.json").exists()


def test_drift_that_is_not_a_number_is_beyond_any_bound(drifted: Path, tmp_path: Path) -> None:
    drifted.write_text(drifted.read_text().replace("0.12", "NaN"))
    with pytest.raises(InputError, match="mean KL nan"):
        check_drift(drifted, tmp_path / "ok.json", settings=bounds(1, 1))


# --- what is calibrated on ------------------------------------------------------------------------


class Tokens:
    """Stands for tokens: which rows are taken."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows = rows
        self.sources = pa.array(["train" if row % 3 else "extra" for row in rows.tolist()])
        self.votes = Votes.hard(rows % 3)

    def take(self, rows: np.ndarray) -> Tokens:
        return Tokens(self.rows[rows])


def test_drift_is_measured_on_other_battles_than_calibrate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[dict[str, Any]] = []
    monkeypatch.setattr(gptq, "read_tokens", lambda _: Tokens(np.arange(120)))
    monkeypatch.setattr(gptq, "encode_views", lambda tokens, *_: [tokens.rows.tolist()])
    monkeypatch.setattr(gptq, "quantize_model", lambda *_, **kwargs: given.append(kwargs))
    for seed in (0, 1):
        settings = QuantizationSettings(
            version=1, encoding=Encoding(), bits=8, group_size=32, seed=seed, samples=40,
            validation_rows=30,
        )  # fmt: skip
        gptq.quantize_judge(Path(), Path(), Path(), settings=settings, batch_tokens=1)
    drawn = []
    for call in given:
        calibration, (validation,) = call["calibration"], call["validation"]
        assert sorted(calibration + validation) == [row for row in range(120) if row % 3]
        assert len(validation) == 30
        assert call["votes"].labels.tolist() == [row % 3 for row in validation]
        drawn.append(validation)
    assert drawn[0] != drawn[1]


def test_each_block_is_calibrated_on_what_the_rounded_blocks_before_it_make(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its inputs are the hidden states of the finished model, whose later blocks cannot change them."""
    import torch
    from test_merging import base_model

    def config(**given: Any) -> SimpleNamespace:
        return SimpleNamespace(**given, sym=True, desc_act=False, damp_percent=0.05)

    modules = {"quantization": {"QuantizeConfig": config}, "version": {"__version__": "0"}}
    monkeypatch.setitem(sys.modules, "gptqmodel", ModuleType("gptqmodel"))
    for name, content in modules.items():
        module = ModuleType(f"gptqmodel.{name}")
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    seen: list[tuple[Any, list[Any]]] = []

    def rounded(block: Any, group: list[str], _: Any) -> Any:
        if not seen or seen[-1][0] is not block.module:
            seen.append((block.module, list(block.hidden)))
        for name in group:
            layer = block.layers[name]
            layer.weight.data = (layer.weight * 20).round() / 20
            yield name, layer

    monkeypatch.setattr(gptq, "_round", rounded)
    model = base_model("llama")
    rows = [np.array([3, 4, 5, 6]), np.array([7, 8])]
    offsets = np.array([0, 4, 6])
    before = [p.clone() for p in model.parameters()]
    gptq._quantize(model, Sequences(np.concatenate(rows).astype(np.int32), offsets), 4, 16)
    assert any(not one.equal(p) for one, p in zip(before, model.parameters(), strict=True))
    assert [module for module, _ in seen] == list(model.model.layers)
    for row, ids in enumerate(rows):
        with torch.no_grad():
            states = model.model(torch.from_numpy(ids)[None], output_hidden_states=True)
        for number, (_, hidden) in enumerate(seen):
            torch.testing.assert_close(hidden[row], states.hidden_states[number])


@pytest.mark.parametrize("last", ["self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj"])
def test_a_block_runs_to_the_layers_that_are_rounded(
    monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    """They see the inputs of a whole pass, of every row, and what follows does not run."""
    import torch
    from test_merging import base_model

    inputs: dict[str, list[Any]] = {}

    class Solver:
        def __init__(self, layer: Any, _: Any) -> None:
            self.quantizer, self.seen = SimpleNamespace(configure=lambda **_: None), []
            inputs[next(n for n, x in block.layers.items() if x is layer)] = self.seen

        def add_batch(self, given: Any, _: Any) -> None:
            self.seen.append(given)

        def quantize(self) -> Any:
            raise InterruptedError

    for name, content in {
        "gptqmodel": {},
        "gptqmodel.quantization": {"GPTQ": Solver},
        "gptqmodel.nn_modules.qlinear.torch": {"TorchLinear": None},
        "gptqmodel.utils.model": {"convert_gptq_v2_to_v1_format_module": None},
    }.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    model = base_model("llama").eval()
    rows = Sequences(np.array([3, 4, 5, 6, 7, 8], np.int32), np.array([0, 4, 6]))
    with torch.inference_mode():
        block = gptq._record_calls(model, model.model.layers, rows)[0]
        (group,) = [names for names in gptq._layers_by_input(block) if last in names]
        whole: list[Any] = []
        hook = block.layers[last].register_forward_pre_hook(lambda _, given: whole.append(given[0]))
        block.forward()
        hook.remove()
        ends: list[Any] = []
        block.module.register_forward_hook(lambda *_: ends.append(1))
        with pytest.raises(InterruptedError):
            next(gptq._round(block, group, None))
    assert set(inputs) == set(group) and not ends
    for seen in inputs.values():
        assert len(seen) == 2 and all(map(torch.equal, seen, whole))


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "battles", "sizes"),
    [
        ({}, 10_000, (128, 512)),
        ({}, 640, (128, 512)),
        ({}, 200, (100, 100)),
        ({}, 17, (16, 1)),
        ({"samples": 32}, 200, (32, 168)),
        ({"validation_rows": 150}, 200, (50, 150)),
        ({"samples": 32, "validation_rows": 32}, 64, (32, 32)),
    ],
)
def test_few_battles_calibrate_and_measure(
    given: dict[str, int], battles: int, sizes: tuple[int, int]
) -> None:
    sized = CalibrationRows(**given).sized(battles)
    assert (sized.samples, sized.validation_rows) == sizes


@pytest.mark.parametrize(
    ("given", "battles"),
    [({}, 16), ({"validation_rows": 190}, 200), ({"samples": 200}, 200), ({"samples": 128}, 100)],
)
def test_too_few_battles_to_quantise(given: dict[str, int], battles: int) -> None:
    with pytest.raises(InputError, match=f"but there are only {battles} training battles; lower"):
        CalibrationRows(**given).sized(battles)


@pytest.mark.parametrize(
    ("sizes", "bits", "group_size", "message"),
    [
        (
            {"q": (64, 64), "down": (192, 64)},
            8,
            128,
            r"128 does not divide the 64 inputs of q; use 64",
        ),
        (
            {"q": (64, 64), "down": (96, 64)},
            8,
            64,
            r"does not divide the 96 inputs of down; use 32",
        ),
        ({"q": (24, 64)}, 8, 32, r"no supported size fits"),
        (
            {"q": (64, 48)},
            3,
            32,
            r"q: weights of 3 bits are packed by 32, which does not divide 48",
        ),
    ],
)
def test_layers_that_do_not_divide(
    sizes: dict[str, tuple[int, int]], bits: int, group_size: int, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        check_layers(sizes, bits, group_size)


def test_environment_without_gptqmodel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq.importlib.util, "find_spec", lambda name: None)
    rows = Sequences(np.zeros(0, np.int32), np.zeros(65, np.int64))
    settings = QuantizationSettings(
        version=1, encoding=Encoding(), bits=8, group_size=32, samples=64, seed=0, validation_rows=1
    )
    options: dict[str, Any] = {"settings": settings, "batch_tokens": 64, "validation": [rows]}
    with pytest.raises(InputError, match=r"gptqmodel is not installed .*environments\.gptq"):
        gptq.quantize_model(tmp_path, tmp_path / "o", calibration=rows, **options)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("gpu", [True, False])
def test_loading_needs_no_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, gpu: bool
) -> None:
    """On a GPU, GPTQModel by default chooses a kernel that needs CUDA's compiler."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForSequenceClassification

    asked: list[Any] = []

    def load(folder: Path, *, config: Any, **options: Any) -> Any:
        asked.append((config.quantization_config["backend"], options["device_map"]))
        raise ValueError("that was all")

    kernels = SimpleNamespace(TorchLinear=type("TorchLinear", (), {"optimize": None}))
    monkeypatch.setitem(sys.modules, "gptqmodel.nn_modules.qlinear.torch", kernels)
    for name in ("gptqmodel", "gptqmodel.nn_modules", "gptqmodel.nn_modules.qlinear"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    monkeypatch.setattr(gptq, "_prepare_gptqmodel", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", load)
    about = {"quant_method": "gptq", "bits": 8, "group_size": 32}
    config = {"model_type": "llama", "dtype": dtype, "quantization_config": about}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"score.weight": torch.zeros(3, 1)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="that was all"):
        gptq.load_quantized(tmp_path)
    assert asked == [("gptq_torch", {"": "cuda:0" if gpu else "cpu"})]


# --- GPTQ -----------------------------------------------------------------------------------------


def interpreter() -> Path:
    path = Path(os.environ.get("ARENA_GPTQ_PYTHON", ROOT / ".venv-gptq" / "bin" / "python"))
    if not path.exists():
        pytest.skip(f"no second environment: {path} does not exist (set ARENA_GPTQ_PYTHON)")
    return path


def save_dense(folder: Path, family: str, dtype: str = "float32") -> None:
    import torch
    from test_merging import save_backbone
    from transformers import (
        AutoModelForSequenceClassification,
        Gemma2Config,
        LlamaConfig,
        Qwen2Config,
    )

    kinds: dict[str, Any] = {"llama": LlamaConfig, "qwen2": Qwen2Config, "gemma2": Gemma2Config}
    options = {"sliding_window": 8} if family == "gemma2" else {}
    config = kinds[family](
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        pad_token_id=0,
        num_labels=3,
        **options,
    )
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    for name, parameter in model.named_parameters():
        if "proj.bias" in name:  # Qwen2 starts them at zero, where a lost one would not be seen
            torch.nn.init.normal_(parameter, std=0.1)
    torch.nn.init.normal_(model.score.weight, std=0.2)
    save_backbone(model.to(getattr(torch, dtype)), folder)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases quantised, by one process of the second environment: its imports take seconds."""
    python, folder = interpreter(), tmp_path_factory.mktemp("gptq")
    for family in FAMILIES:
        save_dense(folder / family, family)
    save_dense(folder / "gemma2-bf16", "gemma2", "bfloat16")
    rng = np.random.default_rng(0)
    offsets = np.concatenate([[0], np.cumsum(rng.integers(20, 50, 128))])
    np.savez(
        folder / "sequences.npz",
        ids=rng.integers(3, 256, offsets[-1]).astype(np.int32),
        offsets=offsets,
        labels=rng.integers(0, 3, 64),
    )
    (folder / "cases.json").write_text(json.dumps(CASES))
    run = subprocess.run(
        [python, ROOT / "tests" / "quantize_in_gptq.py", folder],
        env=os.environ | {"PYTHONPATH": str(ROOT / "workflow"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def auto_gptq(work: Path) -> Path:
    """What auto-gptq 0.7.1 makes of the same folders."""
    python = ROOT / ".venv-auto-gptq" / "bin" / "python"
    if not python.exists():
        pytest.skip(f"no {python}: `make auto-gptq` sets that environment up")
    names = [work / name for name in ("llama-8", "qwen2-8", "gemma2-8", "llama-4")]
    run = subprocess.run(
        [python, ROOT / "tests" / "read_in_auto_gptq.py", *names],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return work


def report(work: Path, name: str) -> dict[str, Any]:
    return dict(json.loads((work / name / "drift.json").read_text()))


def logits(work: Path, name: str, of: str) -> np.ndarray:
    found: np.ndarray = np.load(work / f"{name}.{of}.npy")
    return found


def tensors(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


LOAD_ALL = """
import pathlib, sys
from arena_distill.deployment.gptq import load_quantized
from arena_distill.errors import InputError
for folder in sys.argv[1:]:
    try:
        load_quantized(pathlib.Path(folder))
    except InputError as error:
        print("refused:", error)
"""

needs_gptq = [pytest.mark.gptq, pytest.mark.slow]


class TestGPTQ:
    pytestmark = needs_gptq

    @pytest.mark.parametrize("family", FAMILIES)
    def test_eight_bits_barely_drift(self, work: Path, family: str) -> None:
        found = report(work, f"{family}-8")
        assert 0 < found["kl"] < 5e-4 and found["flip_rate"] <= 1 / 64
        assert found["rows"] == 64 and found["bits"] == 8 and found["group_size"] == 32
        assert abs(found["log_loss_change"]) < 0.01
        assert found["bytes"] < found["bytes_before"]
        assert found["provenance"]["settings"]["bits"] == 8

    def test_fewer_bits_drift_more(self, work: Path) -> None:
        divergences = [report(work, f"llama-{bits}")["kl"] for bits in (8, 4, 3, 2)]
        assert divergences == sorted(divergences) and divergences[1] > 10 * divergences[0]
        assert report(work, "llama-4")["bytes"] < report(work, "llama-8")["bytes"]

    @pytest.mark.parametrize("bits", [8, 4])
    def test_it_drifts_less_than_plain_rounding_to_its_grid(self, work: Path, bits: int) -> None:
        """1.7 times less at 8 bits, 2.2 times less at 4, though these inputs hardly correlate."""
        import torch
        from transformers import AutoModelForSequenceClassification

        model = AutoModelForSequenceClassification.from_pretrained(work / "llama")
        grid = tensors(work / f"llama-{bits}")
        for name, layer in model.named_modules():
            if f"{name}.scales" in grid:
                step = grid[f"{name}.scales"].float()[grid[f"{name}.g_idx"].long()].T
                levels = (
                    (layer.weight / step).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
                )
                layer.weight.data = levels * step
        with np.load(work / "sequences.npz") as stored:
            sequences = Sequences(stored["ids"], stored["offsets"])
        held_out = sequences.take(np.arange(len(sequences) // 2, len(sequences)))
        with torch.inference_mode():
            plain = score(model, held_out, batch_tokens=2048)
        found = drift(logits(work, f"llama-{bits}", "dense"), plain)
        assert found["kl"] > 1.4 * report(work, f"llama-{bits}")["kl"]

    @pytest.mark.parametrize("family", FAMILIES)
    def test_only_layers_of_blocks_change(self, work: Path, family: str) -> None:
        dense, quantized = tensors(work / family), tensors(work / f"{family}-8")
        kept = set(dense) & set(quantized)
        assert "score.weight" in kept and "model.embed_tokens.weight" in kept
        for name in kept - {n for n in kept if n.endswith("proj.bias")}:  # stored in float16
            assert dense[name].equal(quantized[name]), name
        assert {n.rpartition(".")[0] for n in set(dense) - kept} == {
            n.removesuffix(".qweight") for n in quantized if n.endswith(".qweight")
        }

    @pytest.mark.parametrize("name", ["llama-8", "qwen2-8", "gemma2-8", "gemma2-half", "llama-3"])
    def test_plain_transformers_load_the_same_model(self, work: Path, name: str) -> None:
        plain, loaded = logits(work, name, "plain"), logits(work, name, "loaded")
        # Transformers' own head answers in the dtype of the weights, a judge's in float32.
        rounding = 2**-8 if name.endswith("half") else 0
        np.testing.assert_allclose(plain, loaded, rtol=rounding, atol=max(rounding, 1e-5))
        found = drift(logits(work, name, "dense"), loaded)
        assert found["kl"] == pytest.approx(report(work, name)["kl"], rel=0.1 if rounding else 1e-3)

    def test_plain_four_bits_are_close(self, work: Path) -> None:
        # On a CPU transformers picks another kernel there, with scales in bfloat16.
        found = drift(logits(work, "llama-4", "loaded"), logits(work, "llama-4", "plain"))
        assert found["kl"] < report(work, "llama-4")["kl"]

    @pytest.mark.parametrize("name", ["llama-8", "qwen2-8", "gemma2-8", "llama-4"])
    def test_auto_gptq_reads_the_same_weights(self, auto_gptq: Path, name: str) -> None:
        from safetensors.torch import load_file

        ours = load_file(auto_gptq / f"{name}.weights.safetensors")
        theirs = load_file(auto_gptq / f"{name}.auto_gptq.safetensors")
        assert set(theirs) == set(ours) and ours
        for layer, weight in ours.items():
            largest = weight.abs().max()
            assert (theirs[layer] - weight).abs().max() <= 2e-3 * largest, layer  # float16 scales

    def test_same_seed_gives_the_same_bytes(self, work: Path) -> None:
        first, again = work / "llama-8", work / "llama-8-again"
        files = sorted(path.name for path in first.iterdir())
        assert {"model.safetensors", "config.json", "drift.json"} <= set(files)
        for name in files:
            assert (first / name).read_bytes() == (again / name).read_bytes(), name

    def test_seed_decides_the_sample(self, work: Path) -> None:
        a, b = tensors(work / "llama-8"), tensors(work / "llama-8-seed")
        assert any(not a[name].equal(b[name]) for name in a)

    def test_a_folder_that_lacks_a_tensor_or_a_group_is_refused(
        self, work: Path, tmp_path: Path
    ) -> None:
        import torch
        from safetensors.torch import save_file

        whole = tensors(work / "llama-8")
        lost = ("score.weight", "model.layers.1.mlp.up_proj.qweight")
        for name in lost:
            shutil.copytree(work / "llama-8", tmp_path / name)
            rest = {other: tensor for other, tensor in whole.items() if other != name}
            save_file(rest, tmp_path / name / "model.safetensors", {"format": "pt"})
        wrong = f"{lost[1].removesuffix('qweight')}g_idx"
        for value in (-1, 99):
            shutil.copytree(work / "llama-8", tmp_path / f"{value}")
            moved = whole | {wrong: whole[wrong].clone().index_fill_(0, torch.tensor([5]), value)}
            save_file(moved, tmp_path / f"{value}" / "model.safetensors", {"format": "pt"})
        done = subprocess.run(
            [interpreter(), "-c", LOAD_ALL, *lost, "./-1", "99"],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT / "workflow")},
            capture_output=True,
            text=True,
        )
        for name in lost:
            assert f"refused: {name}: tensors are missing: 1 ({name}): its" in done.stdout
        assert done.stdout.count(f": {wrong} names groups that are not among its 2: quant") == 2

    def test_folder_says_what_it_is(self, work: Path) -> None:
        config = json.loads((work / "llama-8" / "config.json").read_text())
        assert config["quantization_config"]["quant_method"] == "gptq"
        assert config["pad_token_id"] == 0
        assert str(work) not in json.dumps(config)

    def test_group_that_does_not_divide_is_refused_first(self, work: Path) -> None:
        message = (work / "llama-128.error").read_text()
        assert "128 does not divide the 64 inputs of model.layers.0.self_attn.q_proj" in message
        assert not (work / "llama-128").exists()
