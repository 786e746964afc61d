"""What a real vLLM does with finished judges beyond test_doors.py, and what it cannot do."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from checkouts import GPTQ, ROOT
from judges import Finished, finished_judge
from servers import vllm_server

from arena_distill.cli import app
from arena_distill.config.backbone import TINY
from arena_distill.config.encoding import Encoding
from arena_distill.config.head import JOINT, Head
from arena_distill.config.phases.deployment import QuantizationSettings
from arena_distill.errors import InputError
from arena_distill.judging.clients import judge_on
from arena_distill.judging.vectors import compare_with_vectors

pytestmark = [pytest.mark.real, pytest.mark.slow]

MEAN = ("--pooler-config", '{"seq_pooling_type": "MEAN"}')


def made(folder: Path, head: Head = JOINT, family: str = "llama") -> Finished:
    return finished_judge(folder, TINY / family, head=head, encoding=Encoding(template="winners"))


def verify(folder: Path, address: str) -> int:
    """The exit status of `arena-distill verify`."""
    words = ["verify", str(folder), "--server", address]
    return int(app(words, standalone_mode=False) or 0)


def test_a_mean_of_all_tokens_needs_its_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judge = made(tmp_path, Head(kind="joint", pooling="mean"))
    with vllm_server(judge.folder, tmp_path / "mean.log", *MEAN) as address:
        assert verify(judge.folder, address) == 0
    with vllm_server(judge.folder, tmp_path / "last.log") as address:
        assert verify(judge.folder, address) == 1
        with pytest.raises(InputError, match="not the same judge: .*`arena-distill verify "):
            app(["predict", str(judge.folder), "battles.csv", "-o", "p.csv", "--server", address],
                standalone_mode=False)  # fmt: skip
    same, other = capsys.readouterr().out.splitlines()[-2:]
    assert same.endswith("the same judge") and other.endswith("NOT the same judge")


def test_what_a_server_cannot_answer_is_one_line(tmp_path: Path) -> None:
    joint, pointwise = made(tmp_path / "j"), made(tmp_path / "p", Head(kind="pointwise"))
    with vllm_server(joint.folder, tmp_path / "log", "--max-model-len", "100") as address:
        asked = judge_on(joint.folder, address)
        assert asked.compare("2 + 2?", "4", "5").winner
        with pytest.raises(InputError) as too_long:
            asked.compare("2 + 2?", "4 " * 200, "5")
        with pytest.raises(InputError) as another:
            judge_on(pointwise.folder, address).compare("2 + 2?", "4", "5")
    for error, said in ((too_long, "status 400: .*100 tokens"), (another, "holds another model")):
        assert "\n" not in str(error.value)
        assert error.match(rf"^{address}/classify: .*{said}")


def quantised(judge: Finished, folder: Path) -> Path:
    """The same judge in 4 bits, finished; the second environment makes it."""
    if not GPTQ.exists():
        pytest.skip(f"no second environment: {GPTQ} does not exist (set ARENA_GPTQ_PYTHON)")
    how = QuantizationSettings(
        version=1, encoding=judge.settings.encoding, bits=4, group_size=32, seed=1, samples=16,
        validation_rows=2,
    )  # fmt: skip
    where = ["--tokens", str(judge.tokens), "--output"]
    for words in (
        ["quantize-model", "--model", str(judge.weights), *where, str(folder / "gptq"),
         "--settings", how.as_params()],
        ["finish-judge", "--weights", str(folder / "gptq"), *where, str(folder / "quantised"),
         "--settings", judge.settings.as_params(), "--kind", "gptq"],
    ):  # fmt: skip
        done = subprocess.run(
            [GPTQ, "-m", "arena_distill", "phase", *words],
            cwd=ROOT / "workflow", capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    return folder / "quantised"


def test_a_quantised_judge_is_close(tmp_path: Path) -> None:
    """In 4 bits, the only ones that vLLM reads on a CPU, and in bfloat16: its GPTQ has no float32."""
    folder = quantised(made(tmp_path), tmp_path)
    with vllm_server(folder, tmp_path / "log", "--dtype", "bfloat16") as address:
        assert compare_with_vectors(judge_on(folder, address)).within(1e-2)
