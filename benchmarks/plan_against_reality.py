"""Compare the forecast of a training step with what PyTorch counts while one runs.

    python benchmarks/plan_against_reality.py [models/smollm2-135m-instruct.gguf]

One step of each tiny backbone that ships with the workflow and, if its file is given, of the first layers
of SmolLM2: operations by PyTorch's FlopCounterMode, memory as its allocator reports it to the profiler.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from arena_distill.config.backbone import TINY, Backbone
from arena_distill.config.head import JOINT
from arena_distill.config.phases.encoding import BackboneSettings
from arena_distill.config.training import Lora
from arena_distill.models.adapters import new_judge
from arena_distill.models.loading import load_classifier
from arena_distill.models.preparation import prepare_backbone
from arena_distill.planning.sizes import alive, measure, read_config

KERNELS: Any = {  # the counter knows those of GPUs alone
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: (
        sdpa_flop_count(q, k, v)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda out, q, k, v, *_, **__: sdpa_backward_flop_count(out, q, k, v)
    ),
}


def compare(
    name: str, folder: Path, lora: Lora, *, sequences: int, length: int, half: bool, again: bool
) -> tuple[float, float]:
    """Predicted by measured, of a step's operations and of the most memory in it; printed, too."""
    config = read_config(Backbone(path=str(folder)), folder)
    sizes = measure(config, JOINT, lora)
    precision: Any = "bf16" if half else "fp32"
    beside = alive(
        config, JOINT, lora, length=length, precision=precision, training=True, checkpointing=again
    )
    tokens, squares = sequences * length, sequences * length**2
    flops = sizes.training_flops(tokens, squares, checkpointing=again)
    weights = (2 if half else 4) * sizes.base + 2 * 4 * sizes.head + 4 * sizes.lora
    memory = weights + 4 * (sizes.lora + sizes.head) + beside.at(sizes.layers, sequences)

    base = load_classifier(
        folder, dtype=torch.bfloat16 if half else None, pad_token_id=0, head_seed=0
    )
    judge: Any = new_judge(base, lora, seed=0)
    judge.train()
    if again:
        judge.activation_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(5, 900, (sequences, length))
    mask = torch.ones_like(ids)
    mask[0, -1] = ids[0, -1] = 0  # one is shorter, as in most batches

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            logits = judge(input_ids=ids, attention_mask=mask).logits
        torch.nn.functional.log_softmax(logits.float(), -1)[:, 0].mean().backward()

    with FlopCounterMode(display=False, custom_mapping=KERNELS) as counter:
        step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    events = profiled.profiler.kineto_results.events()
    memories = sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())
    changes = itertools.accumulate(event.nbytes() for event in memories)
    held = [*judge.parameters(), *judge.buffers()]
    held += [p.grad for p in judge.parameters() if p.grad is not None]
    measured = max(changes) + sum({t.data_ptr(): t.nbytes for t in held}.values())
    counted = counter.get_total_flops()
    print(
        f"{name:<22}{precision:<6}{'again' if again else 'once':<7}"
        f"{flops / 1e9:10.2f}{counted / 1e9:10.2f}{flops / counted:7.2f}"
        f"{memory / 1e6:12.1f}{measured / 1e6:10.1f}{memory / measured:7.2f}"
    )
    return flops / counted, memory / measured


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(f"{'':<35}{'GFLOP: plan, real, ratio':>27}{'MB: plan, real, ratio':>29}")
    lora = Lora(r=16, alpha=32)
    for family, half, again in itertools.product(
        ("llama", "qwen2", "gemma2"), (False, True), (False, True)
    ):
        compare(
            f"tiny {family}", TINY / family, lora, sequences=8, length=256, half=half, again=again
        )
    for file, layers in itertools.product(sys.argv[1:], (4,)):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "backbone"
            prepare_backbone(
                folder, settings=BackboneSettings.of(Backbone(gguf=file, layers=layers))
            )
            for half, again in itertools.product((False, True), (False, True)):
                compare(
                    f"{Path(file).stem[:13]}, {layers}",
                    folder,
                    Lora(),
                    sequences=2,
                    length=256,
                    half=half,
                    again=again,
                )


if __name__ == "__main__":
    main()
