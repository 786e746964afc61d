"""Run a judge on encoded battles: one row of logits per battle and order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from arena_distill.config.training import State
from arena_distill.encoding.batching import pad, token_batches
from arena_distill.encoding.sequences import Sequences
from arena_distill.models.loading import check_length


def score(
    model: Any, sequences: Sequences, *, batch_tokens: int, progress: bool = True
) -> np.ndarray:
    """Compute a model's outputs for every sequence.

    Args:
        model: a classifier whose `config.pad_token_id` occurs in no sequence.
        batch_tokens: tokens per forward pass, padding included.
        progress: show a progress bar on stderr.

    Returns:
        float32 (rows, outputs of its head).

    Raises:
        InputError: a sequence is longer than the model allows.
    """
    batches = list(token_batches(sequences.lengths, batch_tokens))
    return score_batches(model, sequences, batches, progress=progress)


def score_batches(
    model: Any,
    sequences: Sequences,
    batches: Sequence[np.ndarray],
    states: Mapping[State, np.ndarray] | None = None,
    *,
    progress: bool = True,
) -> np.ndarray:
    """As :func:`score`, but only for the rows of the batches; the others are NaN.

    Args:
        states: arrays (rows, width) by name, to fill with the states of the judge's outputs.
    """
    import torch

    check_length(model, int(sequences.lengths.max(initial=0)))
    model.eval()
    weight = next(model.parameters())
    scores = np.full((len(sequences), model.config.num_labels), np.nan, np.float32)
    # A model that computes in half precision has what is trained in float32: it needs autocast.
    dtype = getattr(model, "computing", None) or weight.dtype
    half = dtype if dtype in (torch.bfloat16, torch.float16) else None
    with (
        torch.no_grad(),  # inference_mode would leave FSDP buffers that training cannot write to
        torch.autocast(weight.device.type, dtype=half, enabled=half is not None),
        tqdm(
            total=sum(map(len, batches)),
            desc="scoring",
            unit="seq",
            mininterval=5,
            disable=not progress,
        ) as bar,
    ):
        for rows in batches:
            ids, mask = pad([sequences[row] for row in rows], model.config.pad_token_id)
            outputs = model(
                input_ids=torch.from_numpy(ids).to(weight.device),
                attention_mask=torch.from_numpy(mask).to(weight.device),
            )
            scores[rows] = outputs.logits.float().cpu().numpy()
            for name, room in (states or {}).items():
                values = getattr(outputs, name).cpu()
                room[rows, : values.shape[1]] = values.half().numpy()
            bar.update(len(rows))
    return scores
