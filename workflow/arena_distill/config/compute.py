"""How a judge's jobs run: the keys of ``compute`` and ``logits``, and the precision."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    model_validator,
)

from arena_distill.config.section import Section

Precision = Literal["fp32", "bf16", "nf4"]
Attention = Literal["auto", "eager", "sdpa", "flash_attention_2", "flex_attention"]


class Compute(Section):
    """How a judge's jobs run. Changing it rebuilds nothing."""

    threads: PositiveInt = 1
    """CPU cores per job."""
    gpus: NonNegativeInt = 0
    """GPUs per job, 0 for the CPU. Training starts one process per GPU; batch_size does not change."""
    nodes: PositiveInt = 1
    """Slurm nodes that share the GPUs of a training. Threads and memory are those of each node."""
    gpu_model: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.]*$")] = ""
    """The cluster's name of the GPU, such as a100; empty: any."""
    fsdp: bool = False
    """Shard the backbone over the GPUs, for backbones that do not fit on one."""
    mem_mb: PositiveInt = 4000
    """Host memory per job in MB, multiplied by the attempt."""
    disk_mb: PositiveInt = 1000
    """Disk per job in MB, multiplied by the attempt."""
    runtime: PositiveInt = 120
    """Time limit in minutes, multiplied by the attempt."""
    checkpoint_minutes: NonNegativeFloat = 30.0
    """Minutes between checkpoints of a training. 0: after each step."""
    micro_batch_size: PositiveInt = 8
    """The longest examples per device and forward pass; of shorter ones, as many as have as many tokens.
    Gradients of the batch are accumulated."""
    batch_tokens: PositiveInt = 16384
    """Tokens per forward pass when scoring."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: slower, much less memory."""
    attention: Attention = "auto"
    """`auto`: flash_attention_2 if package, GPU and model support it, else transformers' choice."""
    report_to: Literal["none", "trackio", "wandb", "mlflow"] = "none"
    """A service to which training also reports; TensorBoard files are always written."""

    @model_validator(mode="after")
    def _fsdp_needs_several(self) -> Compute:
        if self.fsdp and self.gpus < 2:
            raise ValueError("fsdp spreads a backbone over several GPUs: set gpus to 2 or more")
        return self

    @model_validator(mode="after")
    def _nodes_have_as_many_gpus(self) -> Compute:
        if self.nodes > 1 and (self.gpus == 0 or self.gpus % self.nodes):
            raise ValueError(
                f"gpus: {self.gpus} cannot be shared by {self.nodes} nodes: make it a multiple of nodes"
            )
        return self


class Logits(Section):
    """Scoring of a fold's battles, for evaluation and for students."""

    shards: PositiveInt = 1
    """Number of jobs that share the scoring of a fold; the result is the same."""
    gpus: PositiveInt | None = None
    """GPUs per scoring job; several share the layers of the judge. null: one, or a node's with fsdp."""
