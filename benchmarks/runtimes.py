"""Compare ONNX Runtime and OpenVINO with torch, for a finished judge on CPU, dense and in 8 bits.

    pip install onnx onnxscript onnxruntime openvino      # into an environment that has arena-distill
    python benchmarks/runtimes.py JUDGE BATTLES.csv [--rows 200] [--threads 2] [--repeats 3]

The judge's model is exported by `torch.onnx.export`, for any batch and length, and answers instead of
torch: encoding, average and calibration stay ours, so the test vectors apply. In 8 bits, ONNX Runtime
quantises the weights before, and the inputs of each product as it runs. All take turns in one process; a
line has the fastest of the repeats. `vectors` is the largest difference of probabilities from the test
vectors; `KL` and `flips` are against torch, over the battles, as in the gate of our own 8 bits (at most
0.001 and 2 %).
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import openvino
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic

from arena_distill import Judge
from arena_distill.battles.reading import read_battles
from arena_distill.encoding.batching import pad, token_batches
from arena_distill.encoding.sequences import Sequences
from arena_distill.judging.judge import ModelJudge
from arena_distill.judging.vectors import compare_with_vectors

INPUTS = ["input_ids", "attention_mask"]
Run = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Ids and mask, int64 (batch, longest) → the outputs of the head, float32 (batch, outputs)."""


class Outputs(torch.nn.Module):
    """A classifier whose result is the outputs of its head alone."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        given = {"input_ids": input_ids, "attention_mask": attention_mask}
        return self.model(**given, use_cache=False).logits


def exported(model: Any, file: Path) -> None:
    """Write the model as ONNX, for any batch and length."""
    ids = torch.randint(5, 100, (2, 16))
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    torch.onnx.export(
        Outputs(model),
        (ids, torch.ones_like(ids)),
        str(file),
        dynamo=True,
        dynamic_shapes=dict.fromkeys(INPUTS, sizes),
        input_names=INPUTS,
        output_names=["outputs"],
        external_data=True,
        verbose=False,
    )


def by_onnx(file: Path, threads: int) -> Run:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda *given: session.run(None, dict(zip(INPUTS, given, strict=True)))[0]


def by_openvino(file: Path, threads: int) -> Run:
    options = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    compiled = openvino.compile_model(str(file), "CPU", options)
    return lambda *given: compiled(dict(zip(INPUTS, given, strict=True)))[0]


def judge_by(judge: ModelJudge, run: Run, batch_tokens: int) -> ModelJudge:
    """The same judge, whose model's part another runtime does."""

    def forward(sequences: Sequences) -> np.ndarray:
        found: list[tuple[np.ndarray, np.ndarray]] = []
        for rows in token_batches(sequences.lengths, batch_tokens):
            given = pad([sequences[row] for row in rows], judge.contract.pad)
            found.append((rows, run(*given)))
        order = np.argsort(np.concatenate([rows for rows, _ in found]))
        return np.concatenate([outputs for _, outputs in found])[order]

    return judge.answered_by(forward)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("judge", type=Path)
    parser.add_argument("battles")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    ours = Judge.from_pretrained(
        arguments.judge, device="cpu", dtype=torch.float32, batch_tokens=arguments.batch_tokens
    )
    battles = read_battles({"test": [arguments.battles]})[0].slice(0, arguments.rows)
    with tempfile.TemporaryDirectory() as folder:
        dense, eight = Path(folder, "dense.onnx"), Path(folder, "eight.onnx")
        begin = time.perf_counter()
        exported(ours.forward.args[0], dense)  # type: ignore[attr-defined]
        print(f"exported in {time.perf_counter() - begin:.0f} s", flush=True)
        quantize_dynamic(dense, eight, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul"])
        threads, tokens = arguments.threads, arguments.batch_tokens
        judges = {
            "torch fp32": ours,
            "ONNX Runtime fp32": judge_by(ours, by_onnx(dense, threads), tokens),
            "ONNX Runtime int8": judge_by(ours, by_onnx(eight, threads), tokens),
            "OpenVINO fp32": judge_by(ours, by_openvino(dense, threads), tokens),
            "OpenVINO int8": judge_by(ours, by_openvino(eight, threads), tokens),
        }
        seconds: dict[str, list[float]] = {name: [] for name in judges}
        said = {}
        for _ in range(arguments.repeats):
            for name, judge in judges.items():
                begin = time.perf_counter()
                said[name] = judge.predict(battles).probabilities
                seconds[name].append(time.perf_counter() - begin)
        base = said["torch fp32"]
        print(
            f"{len(battles)} battles, {threads} threads\n"
            f"{'':20}{'s':>8}{'speed':>8}{'vectors':>10}{'KL':>10}{'flips':>8}"
        )
        for name, judge in judges.items():
            fastest, found = min(seconds[name]), said[name]
            kl = (base * np.log(base / found)).sum(axis=1).mean()
            flips = (base.argmax(axis=1) != found.argmax(axis=1)).mean()
            print(
                f"{name:20}{fastest:8.2f}{min(seconds['torch fp32']) / fastest:8.2f}"
                f"{compare_with_vectors(judge).probabilities:10.2g}{kl:10.2g}{flips:8.1%}"
            )


if __name__ == "__main__":
    main()
