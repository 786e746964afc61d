"""The smoke test of GPUs: what it says where there is none, and that its checks pass and fail rightly."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from checkouts import ROOT, warm_python


def smoke(*options: str) -> subprocess.CompletedProcess[str]:
    command = [warm_python(), "-m", "gpu_smoke", *options]
    path = os.environ | {"PYTHONPATH": f"{ROOT / 'workflow'}:{ROOT / 'benchmarks'}"}
    return subprocess.run(command, env=path, capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="PyTorch can use GPUs here")
def test_without_a_gpu_it_says_so_in_one_line() -> None:
    done = smoke()
    assert done.returncode == 2
    assert done.stdout.count("\n") == 1
    assert done.stdout.startswith("no GPU that PyTorch can use")
    assert not done.stderr


@pytest.mark.slow
def test_checks_run_on_the_cpu_too() -> None:
    options = ["--families", "llama", "--checks", "bf16", "flex", "gptq"]
    done = smoke("--cpu", *options, "--gptq", "/nowhere/python")
    assert done.returncode == 0, done.stdout + done.stderr
    verdicts = [line.split()[2] for line in done.stdout.splitlines()[1:]]
    assert verdicts == ["pass", "skip", "skip"], done.stdout


def test_what_fails_is_told_and_what_lacks_is_skipped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_smoke

    def fails(bench: object) -> None:
        gpu_smoke.agree(np.zeros(3), np.full(3, np.nan))

    def lacks(bench: object) -> None:
        raise gpu_smoke.Skipped("no such thing")

    prepared = gpu_smoke.Bench("llama", Path(), None, 0, Path())
    monkeypatch.setattr(gpu_smoke, "prepare", lambda *_: prepared)
    monkeypatch.setattr(gpu_smoke, "CHECKS", {"fails": fails, "lacks": lacks})
    monkeypatch.setattr(sys, "argv", ["gpu_smoke.py", "--cpu", "--families", "llama"])
    for name in ("ACCELERATE_USE_CPU", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # put back afterwards
    assert gpu_smoke.main() == 1
    _, failed, skipped = capsys.readouterr().out.splitlines()
    assert failed.split()[:3] == ["fails", "llama", "FAIL"]
    assert skipped.split()[2:] == ["skip", "no", "such", "thing"]


def test_the_error_is_shown_and_not_the_advice_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_smoke

    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\n"
        "echo 'Traceback (most recent call last):' >&2\n"
        "echo 'torch._inductor.exc.InductorError: no kernel' >&2\n"
        "echo '  target: flex_attention' >&2\n"
        "echo 'Set TORCHDYNAMO_VERBOSE=1 for more' >&2\n"
        "exit 1\n"
    )
    python.chmod(0o755)
    bench = gpu_smoke.Bench("llama", tmp_path, None, 0, Path())
    with pytest.raises(gpu_smoke.Failed, match=r"^train-fold: torch\..*InductorError: no kernel$"):
        bench.call("train-fold", python=python)
