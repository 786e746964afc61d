"""Compare two ways for a pointwise judge to read a prompt: once for both answers, or once for each.

    python benchmarks/shared_prompt.py BACKBONE_FOLDER BATTLES.csv [--max-length 192 512] [--rows 200]

`apart` is what the workflow does: two causal sequences, prompt with answer A and prompt with answer B.
`shared` is one sequence: the prompt, answer A, and answer B with the positions and the attention that B
has in `apart` (a tree of two branches). The mask of a tree is not causal, and flash attention has no
kernel for it. So on a GPU the gain is at most the ratio of tokens, and the mask costs memory. The script
checks that both ways give the same last hidden states.

Each line is a length: the tokens of both, their ratio, the seconds of both, and their ratio.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenized import tokenized

from arena_distill.config.judge import Encoding, Head
from arena_distill.encoding.batching import pad, token_batches
from arena_distill.encoding.sequences import Sequences
from arena_distill.encoding.views import encode_views

BATCH_TOKENS = 4096


def apart(model: Any, views: list[Sequences]) -> torch.Tensor:
    """The last token's hidden state of each answer's sequence: float32 (rows, 2, width)."""
    found = torch.empty(len(views[0]), 2, model.config.hidden_size)
    for answer, sequences in enumerate(views):
        for rows in token_batches(sequences.lengths, BATCH_TOKENS):
            ids, mask = map(torch.from_numpy, pad([sequences[i] for i in rows], 0))
            hidden = model(ids, attention_mask=mask, use_cache=False).last_hidden_state
            found[rows, answer] = hidden[torch.arange(len(rows)), mask.sum(1) - 1].float()
    return found


def common(views: list[Sequences]) -> np.ndarray:
    """The length of the common beginning of both sequences, at most all but one token: int64 (rows,)."""
    lengths = []
    for a, b in zip(*views, strict=True):
        most = min(len(a), len(b)) - 1
        differs = np.flatnonzero(a[:most] != b[:most])
        lengths.append(differs[0] if len(differs) else most)
    return np.array(lengths, np.int64)


def shared(model: Any, views: list[Sequences], prompts: np.ndarray) -> torch.Tensor:
    """The same result from one sequence per battle: prompt, rest of A, rest of B."""
    first, second = views
    found = torch.empty(len(first), 2, model.config.hidden_size)
    for rows in token_batches(first.lengths + second.lengths - prompts, BATCH_TOKENS):
        ids, there = pad([np.concatenate([first[i], second[i][prompts[i] :]]) for i in rows], 0)
        prompt, fork = prompts[rows, None], first.lengths[rows, None]
        place = np.arange(ids.shape[1])[None]
        of_b = place >= fork
        positions = np.where(of_b, place - fork + prompt, place)
        own_to_a = (place >= prompt) & ~of_b
        seen = (place[:, None, :] <= place[:, :, None]) & (there[:, None, :] > 0)
        seen &= ~(of_b[:, :, None] & own_to_a[:, None, :])
        mask = torch.zeros(seen.shape, dtype=model.dtype)
        mask.masked_fill_(torch.from_numpy(~seen), torch.finfo(model.dtype).min)
        hidden = model(
            torch.from_numpy(ids),
            attention_mask=mask[:, None],
            position_ids=torch.from_numpy(positions),
            use_cache=False,
        ).last_hidden_state
        ends = np.stack([first.lengths[rows], there.sum(axis=1)], axis=1) - 1
        found[rows] = hidden[torch.arange(len(rows))[:, None], torch.from_numpy(ends)].float()
    return found


def timed(work: Callable[[], torch.Tensor], repeats: int) -> tuple[torch.Tensor, float]:
    """The result of `work`, and the seconds of its fastest run."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        given = work()
        seconds.append(time.perf_counter() - start)
    return given, min(seconds)


def main() -> None:
    from transformers import AutoModel

    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("backbone", type=Path)
    parser.add_argument("battles", type=Path)
    parser.add_argument("--max-length", type=int, nargs="+", default=[192, 512])
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    tokens = tokenized(arguments.backbone, arguments.battles, arguments.rows)
    model = AutoModel.from_pretrained(
        arguments.backbone,
        dtype=torch.float32,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
    ).eval()
    print(f"{'length':>7}{'apart':>10}{'shared':>10}{'ratio':>8}{'s':>9}{'s':>9}{'ratio':>8}")
    for length in arguments.max_length:
        views = encode_views(tokens, Encoding(max_length=length), Head(kind="pointwise"))
        prompts = common(views)
        both = sum(int(sequences.lengths.sum()) for sequences in views)
        tree = both - int(prompts.sum())
        with torch.inference_mode():
            one, slow = timed(partial(apart, model, views), arguments.repeats)
            other, fast = timed(partial(shared, model, views, prompts), arguments.repeats)
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
        print(
            f"{length:>7}{both:>10,}{tree:>10,}{tree / both:>8.3f}"
            f"{slow:>9.2f}{fast:>9.2f}{fast / slow:>8.3f}"
        )


if __name__ == "__main__":
    main()
