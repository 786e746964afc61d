"""Check that every path that needs a GPU runs on this machine, and measure its speed.

    python benchmarks/gpu_smoke.py [--size 1b] [--families llama gemma2] [--checks bf16 nf4 …]

Each check calls the workflow's own commands, as its rules do, on battles of the synthetic arena: it
trains a fold, scores its battles, quantises a model. It downloads nothing: backbones are the tiny ones
that ship with the workflow, or with `--size 1b` random ones of about a billion weights. A check passes if
its commands succeed and its logits agree with those of the simplest way to compute them. If the machine
lacks something (a second GPU, a package), the check is skipped with a message.

Exits with 0 if no check failed, with 1 if one did, with 2 without a GPU. `--cpu` tests the checks on the
CPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from arena_distill.config.backbone import TINY
from arena_distill.config.phases.battles import ArenaSettings, FoldsSettings
from arena_distill.config.phases.deployment import MergeSettings, QuantizationSettings
from arena_distill.config.phases.prediction import ScoringSettings
from arena_distill.config.phases.scoring import LogitsSettings
from arena_distill.config.phases.settings import Settings
from arena_distill.config.phases.training import TrainingSettings
from arena_distill.config.run import Config, load
from arena_distill.encoding.sequences import read_tokens
from arena_distill.encoding.views import encode
from arena_distill.files.artifacts import read_json
from arena_distill.files.logits import read_logits
from arena_distill.runtime.launch import CPU_ALLOWED

ROOT = Path(__file__).resolve().parents[1]

LARGE = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 4096,
}
"""About a billion weights, of any family."""

APART = 0.1
"""Logits of two ways to compute the same differ by less, on average: bfloat16 has three digits."""


class Skipped(Exception):
    """What a check needs is not here."""


class Failed(Exception):
    """A command failed, or what it computed is wrong."""


@dataclass
class Bench:
    """The files of a run of one family, and how commands are called on them."""

    family: str
    folder: Path
    config: Config
    gpus: int
    gptq: Path
    speeds: dict[str, float] = field(default_factory=dict)
    """Tokens per second of the check at work: of `training`, of `scoring`."""

    @property
    def backbone(self) -> Path:
        return self.folder / "backbone"

    def settings(self, phase: Any, **changes: Any) -> str:
        of_judge = ("judge",) if phase is not FoldsSettings else ()
        settings: Settings = phase.of(self.config, *of_judge)
        return settings.model_copy(update=changes).as_params()

    def call(self, *words: Any, python: Path = Path(sys.executable)) -> float:
        """Run a command of the workflow; the seconds it took."""
        command = [str(python), "-m", "arena_distill", "phase", *map(str, words)]
        path = os.pathsep.join([str(ROOT / "workflow"), os.environ.get("PYTHONPATH", "")])
        start = time.perf_counter()
        done = subprocess.run(
            command,
            env=os.environ | {"PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip() or "nothing was said").splitlines()
            # Some exceptions' texts go on for pages, and end in advice.
            errors = [line for line in said if re.match(r"(error|[\w.]+(Error|Exception)): ", line)]
            raise Failed(f"{words[0]}: {(errors or said)[-1][:200]}")
        return time.perf_counter() - start

    def train(self, name: str, *options: Any, gpus: int = 1, **changes: Any) -> Path:
        """Train fold 0."""
        output = self.folder / name
        self.call(
            *(
                "train-fold",
                "--backbone",
                self.backbone,
                "--tokens",
                self.folder / "tokens.parquet",
            ),
            *("--folds", self.folder / "folds.parquet", "--fold", 0, "--output", output),
            *("--settings", self.settings(TrainingSettings, **changes)),
            *("--micro-batch-size", 8, "--gpus", gpus, *options),
        )
        metrics = read_json(output / "metrics.json")
        if not np.isfinite(metrics["train_loss"]):
            raise Failed(f"train-fold: the loss is {metrics['train_loss']}")
        self.speeds["training"] = metrics["tokens"] * metrics["epochs"] / metrics["seconds"]
        return output

    def score(
        self, adapter: Path, name: str, *options: Any, gpus: int = 1, **changes: Any
    ) -> np.ndarray:
        """Score fold 0's battles: float32 (rows, orders, 3)."""
        output = self.folder / f"{name}/fold_0.npy"
        output.parent.mkdir(exist_ok=True)
        seconds = self.call(
            *("predict-logits", "--backbone", self.backbone, "--adapter", adapter),
            *("--tokens", self.folder / "tokens.parquet", "--folds", self.folder / "folds.parquet"),
            *(
                "--fold",
                0,
                "--output",
                output,
                "--settings",
                self.settings(LogitsSettings, **changes),
            ),
            *("--gpus", gpus, *options),
        )
        logits, ids = read_logits(output)
        read = read_tokens(self.folder / "tokens.parquet")
        encoding = self.config.judges["judge"].encoding
        mean = np.mean([encode(read, encoding, order).lengths.mean() for order in ("AB", "BA")])
        self.speeds["scoring"] = len(ids) * 2 * mean / seconds  # the start of the job included
        return logits


def agree(found: np.ndarray, expected: np.ndarray) -> None:
    apart = float(np.abs(found - expected).mean())
    if not apart < APART:
        raise Failed(f"logits are {apart:.3f} apart on average, less than {APART} expected")


# --- the checks -----------------------------------------------------------------------------------------


def check_bf16(bench: Bench) -> None:
    """Training and scoring in bfloat16; logits against float32."""
    adapter = bench.train("bf16", precision="bf16")
    expected = bench.score(adapter, "bf16-fp32", precision="fp32")
    agree(bench.score(adapter, "bf16-scores", precision="bf16"), expected)


def check_nf4(bench: Bench) -> None:
    """QLoRA; its gradients reach every layer, or the second training would not differ."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise Skipped("bitsandbytes is not installed")
    adapter = bench.train("nf4", "--gradient-checkpointing", 1, precision="nf4")
    logits = bench.score(adapter, "nf4-scores", precision="nf4")
    agree(bench.score(adapter, "nf4-again", precision="nf4"), logits)


def check_flash(bench: Bench) -> None:
    """Flash attention, forward and backward; logits against eager attention."""
    if importlib.util.find_spec("flash_attn") is None:
        raise Skipped("flash-attn is not installed")
    adapter = bench.train("flash", "--attention", "flash_attention_2", precision="bf16")
    expected = bench.score(adapter, "flash-eager", "--attention", "eager", precision="bf16")
    agree(bench.score(adapter, "flash-scores", "--attention", "flash_attention_2"), expected)


def check_flex(bench: Bench) -> None:
    """Flex attention, forward and backward; logits against eager attention."""
    if CPU_ALLOWED in os.environ:
        raise Skipped("it needs a GPU")
    adapter = bench.train("flex", "--attention", "flex_attention", precision="bf16")
    expected = bench.score(adapter, "flex-eager", "--attention", "eager", precision="bf16")
    agree(bench.score(adapter, "flex-scores", "--attention", "flex_attention"), expected)


def check_ddp(bench: Bench) -> None:
    """Two processes that share a batch; logits against the training of one."""
    _several(bench, "ddp")


def check_fsdp(bench: Bench) -> None:
    """The same with the backbone spread over both (FSDP2)."""
    _several(bench, "fsdp", "--fsdp", 1)


def check_nf4_ddp(bench: Bench) -> None:
    """Two processes that each hold the backbone in NF4: how large teachers are trained."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise Skipped("bitsandbytes is not installed")
    _several(bench, "nf4-ddp", precision="nf4")


def _several(bench: Bench, name: str, *options: Any, precision: str = "bf16") -> None:
    if bench.gpus < 2:
        raise Skipped("one GPU")
    alone = bench.train(f"{name}-alone", precision=precision)
    expected = bench.score(alone, f"{name}-alone-scores", precision=precision)
    adapter = bench.train(name, *options, gpus=2, precision=precision)
    agree(bench.score(adapter, f"{name}-scores", precision=precision), expected)


def check_spread(bench: Bench) -> None:
    """One judge over two GPUs, scoring; logits against one GPU."""
    if bench.gpus < 2:
        raise Skipped("one GPU")
    adapter = bench.train("spread", precision="bf16")
    expected = bench.score(adapter, "spread-one")
    agree(bench.score(adapter, "spread-two", gpus=2), expected)


def check_gptq(bench: Bench) -> None:
    """GPTQ and its kernels, in the environment that has GPTQModel; drift within its bounds."""
    if not bench.gptq.exists():
        raise Skipped(f"no interpreter {bench.gptq}")
    adapter = bench.train("gptq-fold", precision="bf16")
    merged, quantized = bench.folder / "merged", bench.folder / "gptq"
    bench.call(
        *("merge-folds", "--backbone", bench.backbone, "--output", merged),
        *("--settings", bench.settings(MergeSettings), adapter),
    )
    files = ("--tokens", bench.folder / "tokens.parquet")
    settings = bench.settings(QuantizationSettings)
    bench.call(
        *("quantize-model", "--model", merged, *files, "--output", quantized, "--gpus", 1),
        *("--settings", settings),
        python=bench.gptq,
    )
    drift = read_json(quantized / "drift.json")
    if not drift["kl"] < 0.01:
        raise Failed(f"quantize-model: mean KL {drift['kl']:.2g} nats")
    scores = {}
    for name, model, python in (
        ("merged", merged, Path(sys.executable)),
        ("gptq", quantized, bench.gptq),
    ):
        output = bench.folder / f"{name}_test.npy"
        bench.call(
            *("score-test", "--model", model, *files, "--output", output, "--gpus", 1),
            *("--settings", bench.settings(ScoringSettings)),
            *(["--quantized"] if name == "gptq" else []),
            python=python,
        )
        scores[name] = np.load(output, allow_pickle=False)
    agree(scores["gptq"], scores["merged"])


CHECKS: dict[str, Callable[[Bench], None]] = {
    name.removeprefix("check_"): check
    for name, check in list(globals().items())
    if name.startswith("check_")
}

# --- the run --------------------------------------------------------------------------------------------


def prepare(family: str, folder: Path, size: str, gpus: int, gptq: Path) -> Bench:
    """Backbone, battles, tokens and folds."""
    folder.mkdir()
    # LoRA of full rank at a rate that moves the tiny models: what is compared has learned something.
    judge = {
        "backbone": {"path": "backbone"},
        "encoding": {"max_length": 256},
        "lora": {"r": 16, "alpha": 32, "dropout": 0.0},
        "training": {"lr": 1e-3, "epochs": 1, "batch_size": 32, "warmup_steps": 2},
        "quantization": {"group_size": 32, "samples": 32, "validation_rows": 64},
    }
    arena = {"train": 400, "extra": 0, "ut": 0, "test": 60}
    raw = {
        "data": {"arena": arena},
        "folds": {"n": 2},
        "judges": {"judge": judge},
        "final": "judge",
    }
    bench = Bench(family, folder, load(raw), gpus, gptq)
    make_backbone(family, bench.backbone, size)
    settings = ArenaSettings(version=1, **arena).as_params()
    bench.call("simulate-arena", "--output", folder / "arena", "--settings", settings)
    battles = folder / "battles.parquet"
    bench.call(
        *("read-battles", "--output", battles, "--rejected", folder / "rejected.parquet"),
        *("--reading", folder / "reading.json"),
        *(
            "--settings",
            Settings(version=1).as_params(),
            "--train",
            folder / "arena/train.csv",
            "--test",
            folder / "arena/test.csv",
        ),
    )
    bench.call(
        *("assign-folds", "--battles", battles, "--output", folder / "folds.parquet"),
        *("--settings", bench.settings(FoldsSettings)),
    )
    bench.call(
        *("tokenize-battles", "--battles", battles, "--backbone", bench.backbone),
        *("--settings", Settings(version=1).as_params(), "--output", folder / "tokens.parquet"),
    )
    return bench


def make_backbone(family: str, folder: Path, size: str) -> None:
    """The tiny backbone, or a large one with its tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModel

    from arena_distill.encoding.tokenization import load_tokenizer

    if size == "tiny":
        folder.symlink_to(TINY / family)
        return
    tiny = AutoConfig.from_pretrained(TINY / family, trust_remote_code=False)
    shape = {k: v for k, v in tiny.to_dict().items() if k != "layer_types"}
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModel.from_config(
            type(tiny)(**shape | LARGE), dtype=torch.bfloat16, trust_remote_code=False
        )
    model.save_pretrained(folder)
    load_tokenizer(TINY / family).save_pretrained(folder)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=["tiny", "1b"], default="tiny")
    parser.add_argument(
        "--families", nargs="+", choices=["llama", "qwen2", "gemma2"], default=["llama", "gemma2"]
    )
    parser.add_argument("--checks", nargs="+", choices=list(CHECKS), default=list(CHECKS))
    parser.add_argument("--gptq", type=Path, default=ROOT / ".venv-gptq/bin/python")
    parser.add_argument(
        "--cpu", action="store_true", help="try the checks themselves without a GPU"
    )
    arguments = parser.parse_args()
    import torch

    if arguments.cpu:
        os.environ |= {CPU_ALLOWED: "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        gpus = 2
    elif not torch.cuda.is_available():
        print(
            "no GPU that PyTorch can use: nothing was checked (--cpu tries the checks without one)"
        )
        return 2
    else:
        gpus = torch.cuda.device_count()
        names = {torch.cuda.get_device_name(device) for device in range(gpus)}
        print(f"{gpus} × {', '.join(names)}, PyTorch {torch.__version__}")

    print(f"{'check':8} {'family':7} {'':5} {'training':>12} {'scoring':>12}  (tokens/s)")
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for family in arguments.families:
            try:
                bench = prepare(family, Path(folder) / family, arguments.size, gpus, arguments.gptq)
            except Failed as error:
                print(f"{'prepare':8} {family:7} FAIL  {error}")
                failed = True
                continue
            for name in arguments.checks:
                bench.speeds.clear()
                try:
                    CHECKS[name](bench)
                    verdict, note = "pass", ""
                except Skipped as reason:
                    verdict, note = "skip", str(reason)
                except Failed as reason:
                    verdict, note, failed = "FAIL", str(reason), True
                speeds = [bench.speeds.get(phase) for phase in ("training", "scoring")]
                shown = " ".join(f"{s:12,.0f}" if s else " " * 12 for s in speeds)
                print(f"{name:8} {family:7} {verdict:5} {shown}  {note}".rstrip(), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
