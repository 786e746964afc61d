"""Turn the outputs of a judge's head into the logits of a battle.

``joint``      prompt and both answers in one sequence, a logit per class. A battle has two views, one
               per order, and each gives a verdict.
``pointwise``  prompt and one answer per sequence, two outputs: the strength s of the answer and its tie
               parameter t. A battle has two views, one per answer, and a model of paired comparison
               turns them into logits. Exchanging the answers exchanges the verdict by
               construction, so swap augmentation and a second order at test time add nothing.

With strengths s_a, s_b and log ν = t_a + t_b, which is learned and differs between battles, the logits
of (model_a, model_b, tie) are

``davidson``    (s_a, s_b, log ν + (s_a + s_b) / 2): R. R. Davidson 1970, On extending the Bradley-Terry
                model to accommodate ties, JASA 65(329);
``rao_kupper``  with d = s_a − s_b and the threshold η = log(1 + ν): P(a) = σ(d − η), P(b) = σ(−d − η),
                P(tie) = (e^2η − 1) P(a) P(b): P. V. Rao and L. L. Kupper 1967, Ties in
                paired-comparison experiments, JASA 62(317).

Both give a tie the probability 1/3 if the strengths are equal and ν = 1, where a fresh head starts.

In a run of two classes a sequence has one output, its strength, and the logits are (s_a, s_b): R. A.
Bradley and M. E. Terry 1952, Rank analysis of incomplete block designs, Biometrika 39(3/4).

Both sequences of a pointwise judge contain the prompt. Sharing it would save about a sixth of the tokens
of real battles (17 to 19 % between 192 and 2,000 tokens), which is faster on a CPU; but flash attention
has no kernel for it. ``benchmarks/shared_prompt.py`` measures both ways on your own battles.

Every later phase gets a logit per class for each battle and order from any head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from arena_distill.config.head import Head
from arena_distill.verdicts import ORDERS, Order, exchange

if TYPE_CHECKING:
    import torch


def verdicts(outputs: np.ndarray, head: Head, orders: Sequence[Order] = ORDERS) -> np.ndarray:
    """Compute logits in the canonical frame from a judge's outputs for each view.

    Args:
        outputs: float32 (rows, views, outputs of the head).

    Returns:
        float32 (rows, orders, classes); equal in both orders for a pointwise judge.
    """
    if head.kind == "joint":
        return exchange(outputs, orders)
    import torch

    logits = battle_logits(torch.from_numpy(np.ascontiguousarray(outputs)), head).numpy()
    return np.repeat(logits[:, None], len(orders), axis=1)


def battle_logits(outputs: torch.Tensor, head: Head) -> torch.Tensor:
    """Compute logits of battles in the order shown, in float32.

    Args:
        outputs: (battles, sequences per battle, outputs of the head): one sequence for a joint judge, two
            for a pointwise one.

    Returns:
        float32 (battles, classes).
    """
    import torch
    import torch.nn.functional as F

    outputs = outputs.float()
    if head.kind == "joint":
        return outputs[:, 0]
    if head.classes == 2:
        return outputs[..., 0]
    (first, second), log_nu = outputs[..., 0].unbind(1), outputs[..., 1].sum(1)
    if head.ties == "davidson":
        return torch.stack([first, second, log_nu + (first + second) / 2], dim=-1)
    eta, difference = F.softplus(log_nu), first - second
    a, b = F.logsigmoid(difference - eta), F.logsigmoid(-difference - eta)
    # e^2η − 1 = ν (ν + 2), whose logarithm neither overflows nor vanishes.
    scale = log_nu + torch.logaddexp(log_nu, log_nu.new_tensor(2).log())
    return torch.stack([a, b, scale + a + b], dim=-1)
