"""The GPUs and CPU cores that a plan knows: memory and peak rates, from their data sheets."""

from __future__ import annotations

import math
from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """A GPU or a CPU core.

    memory: bytes.
    bf16, fp32: peak FLOP/s of dense matrix products; fp32 without TF32.
    bandwidth: bytes per second of its memory.
    source: the source of the figures.
    """

    name: str
    memory: float
    bf16: float
    fp32: float
    bandwidth: float
    source: str


DEVICES = {
    device.name: device
    for device in (
        Device("a100-80g", 80 * GIB, 312e12, 19.5e12, 2039e9, "NVIDIA A100 datasheet (SXM)"),
        Device("a100-40g", 40 * GIB, 312e12, 19.5e12, 1555e9, "NVIDIA A100 datasheet (SXM)"),
        Device("h100-80g", 80 * GIB, 989e12, 67e12, 3350e9, "NVIDIA H100 datasheet (SXM)"),
        Device("h200", 140 * GIB, 989e12, 67e12, 4800e9, "NVIDIA H200 datasheet (SXM)"),
        Device("l40s", 45 * GIB, 362e12, 91.6e12, 864e9, "NVIDIA L40S datasheet"),
        Device(
            "rtx-4090", 24 * GIB, 165e12, 82.6e12, 1008e9, "NVIDIA Ada architecture, appendix A"
        ),
    )
}
"""GPUs, with their memory after error correction."""

CORE = Device("cpu-core", math.inf, 192e9, 192e9, 10e9, "two AVX-512 units at 3 GHz")
"""One CPU core; its memory is the host's."""

USABLE = 0.94
"""Usable share of a GPU's memory; the driver and fragmentation of PyTorch's allocator take the rest."""
