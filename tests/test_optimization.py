"""The steps of training, computed again by hand: order, schedule, clipping, AdamW."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import Run
from test_training import LORA, fit, of_rows, training_settings

from arena_distill.battles.folds import training_rows
from arena_distill.battles.votes import votes_of
from arena_distill.encoding.sequences import read_tokens
from arena_distill.files.artifacts import read_parquet
from arena_distill.models.adapters import new_judge
from arena_distill.models.loading import load_classifier
from arena_distill.training.examples import ByLength, Examples, collator, make_examples, part_of


@pytest.fixture(scope="module")
def run(make_run: Callable[..., Run]) -> Run:
    return make_run("llama")


def test_adamw_its_schedule_and_clipping_by_hand(run: Run, tmp_path: Path) -> None:
    """Kingma and Ba 2015, algorithm 1; Loshchilov and Hutter 2019, decay. A step is all battles."""
    lr, (b1, b2), decay, clip, warmup, steps = 4e-3, (0.8, 0.97), 0.3, 0.6, 2, 6
    learned = fit(
        run, tmp_path / "x", lr=lr, betas=(b1, b2), weight_decay=decay, max_grad_norm=clip,
        warmup_steps=warmup, epochs=steps, batch_size=1024,
    )  # fmt: skip
    folds, tokens, settings = read_parquet(run.folds), read_tokens(run.tokens), training_settings()
    mine = folds.take(training_rows(folds, 0))
    shown = make_examples(of_rows(tokens, mine), votes_of(mine), None, None, settings)
    pad, seed = tokens.vocabulary.pad, settings.training.seed
    judge = new_judge(load_classifier(run.backbone, pad_token_id=pad, head_seed=seed), LORA, seed)
    batch = collator(pad)([shown[i] for i in range(len(shown))])
    inputs = {name: batch[name].flatten(0, 1) for name in ("input_ids", "attention_mask")}
    labels = torch.from_numpy(shown.votes.labels)
    trained = [p for p in judge.parameters() if p.requires_grad]
    first, second = ([torch.zeros_like(p) for p in trained] for _ in range(2))
    rates, norms = [], []
    for step in range(steps):
        loss = torch.nn.functional.cross_entropy(judge(**inputs).logits, labels)
        gradients = torch.autograd.grad(loss, trained)
        norms.append(float(torch.cat([g.flatten() for g in gradients]).norm()))
        done = (step - warmup) / (steps - warmup)
        rates.append(lr * (step / warmup if step < warmup else (1 + np.cos(np.pi * done)) / 2))
        with torch.no_grad():
            for p, g, m, v in zip(trained, gradients, first, second, strict=True):
                g = g * min(1, clip / norms[-1])
                m.mul_(b1).add_(g * (1 - b1))
                v.mul_(b2).add_(g * g * (1 - b2))
                unbiased = m / (1 - b1 ** (step + 1)), v / (1 - b2 ** (step + 1))
                p -= rates[-1] * (unbiased[0] / (unbiased[1].sqrt() + 1e-8) + decay * p)
    history = read_parquet(tmp_path / "x" / "history.parquet")
    np.testing.assert_allclose(history["grad_norm"].to_numpy(), norms, rtol=1e-3)
    assert max(norms) > clip, "some gradients are clipped"
    np.testing.assert_allclose(history["learning_rate"].to_numpy(), rates, rtol=1e-6)
    named = dict(judge.named_parameters())
    for name, weight in learned.items():
        (whole,) = [
            n for n in named if n.replace(".default", "").replace(".modules_to_save", "") == name
        ]
        torch.testing.assert_close(weight, named[whole].detach(), atol=0.02 * lr, rtol=1e-3)


def test_each_epoch_has_an_order_of_its_own(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Examples, int]] = []
    genuine = Examples.__getitem__

    def note(self: Examples, i: int) -> dict[str, Any]:
        asked.append((self, i))
        return genuine(self, i)

    monkeypatch.setattr(Examples, "__getitem__", note)
    fit(run, tmp_path / "x", epochs=3, seed=5, batch_size=8)
    lengths = asked[0][0].lengths
    expected = [
        list(ByLength(lengths, batch_size=8, processes=1, seed=5, epoch=lambda e=e: e))  # type: ignore[misc]
        for e in range(3)
    ]
    assert [i for _, i in asked] == sum(expected, [])
    assert len({tuple(order) for order in expected}) == 3
    assert all(sorted(order) == list(range(len(lengths))) for order in expected)


def test_an_order_depends_on_seed_and_epoch_alone() -> None:
    lengths = np.random.default_rng(0).integers(10, 90, 40)
    orders = {
        (seed, epoch): tuple(
            ByLength(lengths, batch_size=4, processes=1, seed=seed, epoch=lambda e=epoch: e)  # type: ignore[misc]
        )
        for seed in (3, 8)
        for epoch in (0, 1)
    }
    assert len(set(orders.values())) == 4
    again = ByLength(lengths, batch_size=4, processes=1, seed=8, epoch=lambda: 1)
    assert (tuple(again), tuple(again)) == (orders[8, 1],) * 2


def test_a_share_of_the_battles_is_drawn_by_the_seed() -> None:
    rows = pa.table({"row": np.arange(200)})
    drawn = {
        (seed, share): part_of(rows, share, seed)["row"].to_pylist()
        for seed in (1, 2)
        for share in (0.25, 0.5)
    }
    for (_, share), chosen in drawn.items():
        assert len(chosen) == 200 * share
        assert chosen == sorted(set(chosen))
    assert set(drawn[1, 0.25]) < set(drawn[1, 0.5])
    shared = len(set(drawn[1, 0.5]) & set(drawn[2, 0.5]))
    assert 30 < shared < 70, "as many as by chance, 50, of 100"
    assert part_of(rows, 0.5, 2)["row"].to_pylist() == drawn[2, 0.5]
