"""Compare scoring and training with the bare matrix products that they cannot do without.

    python benchmarks/utilisation.py [--rows 4] [--longest 384] [--rounds 2]
    python benchmarks/utilisation.py --device cuda --precision bf16 --rows 512 --longest 1024 \\
        --batch-tokens 16384

Scoring is the workflow's own, of a judge of random weights with the shape of SmolLM2-135M; training is
forward and backward of its adapter and head in the workflow's micro-batches, without the optimizer's step.
`torch.mm` does as many operations as the planner counts for the tokens of the battles, without padding, as
products of one batch with the largest matrix of the blocks, in the same dtype. So 1 divided by the ratio is
the share of `torch.mm`'s speed that is reached: the utilisation.
"""

from __future__ import annotations

import argparse
from functools import partial

import made_up
import torch
from batches import run
from measured import by_turns, keep, ratio, seconds

from arena_distill.config.head import JOINT
from arena_distill.config.training import Lora
from arena_distill.models.adapters import new_judge
from arena_distill.models.scoring import score
from arena_distill.planning.sizes import measure
from arena_distill.training.examples import Examples, collator, micro_batches

LORA = Lora(r=16, alpha=32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batch-tokens", type=int, default=1024)
    made_up.options(parser, model="smollm2-135m", longest=384)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device, dtype, tokens = (
        arguments.device,
        made_up.DTYPES[arguments.precision],
        arguments.batch_tokens,
    )
    model = made_up.backbone(arguments.model, dtype, device)
    sizes = measure(model.config, JOINT, LORA)
    battles = made_up.examples(arguments.rows, arguments.longest)
    lengths = battles.lengths.astype(float)
    amounts = lengths.sum(), (lengths**2).sum()
    inputs, outputs = max(sizes.matrices, key=lambda matrix: matrix[0] * matrix[1])
    batch = torch.randn(tokens, inputs, dtype=dtype, device=device)
    matrix = torch.randn(inputs, outputs, dtype=dtype, device=device)

    def products(flops: float) -> float:
        """Seconds of as many operations of `torch.mm`."""
        times = max(1, round(flops / (2 * batch.numel() * outputs)))

        def multiply() -> None:
            for _ in range(times):
                torch.mm(batch, matrix)

        return seconds(multiply, device) * flops / (2 * batch.numel() * outputs * times)

    judge = new_judge(made_up.backbone(arguments.model, dtype, device), LORA, seed=0).train()

    def train(examples: Examples) -> None:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            run(
                judge,
                micro_batches(collator(0)([examples[i] for i in range(len(examples))]), tokens),
                training=True,
            )

    scoring = partial(score, model, battles.views[0], batch_tokens=tokens, progress=False)
    forward = sizes.forward_flops(*amounts)
    backward_too = sizes.training_flops(*amounts, checkpointing=False)
    taken = by_turns(
        {
            "scoring": lambda: seconds(scoring, device),
            "torch.mm as in scoring": lambda: products(forward),
            "training": lambda: seconds(partial(train, battles), device),
            "torch.mm as in training": lambda: products(backward_too),
        },
        arguments.rounds,
    )
    ratios = [
        ratio(name, taken, name, f"torch.mm as in {name}") for name in ("scoring", "training")
    ]
    keep(__file__, ratios, device)


if __name__ == "__main__":
    main()
