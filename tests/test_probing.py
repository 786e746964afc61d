"""A head fitted to frozen features: as by scikit-learn, with regularisation chosen across prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Run
from test_training import LORA, fit, training_settings

from arena_distill.battles.folds import training_rows
from arena_distill.battles.votes import votes_of
from arena_distill.config.head import Head
from arena_distill.config.training import Loss, Training
from arena_distill.encoding.sequences import read_tokens
from arena_distill.files.artifacts import read_parquet
from arena_distill.files.keys import key, locate
from arena_distill.models.adapters import new_judge
from arena_distill.models.heads import battle_logits
from arena_distill.models.hidden_states import head_layer
from arena_distill.models.loading import load_classifier
from arena_distill.runtime.launch import Launch
from arena_distill.training import judge_trainer, linear_probe, trainer
from arena_distill.training.examples import Examples, make_examples
from arena_distill.training.linear_probe import (
    RIDGES,
    cross_validate,
    fit_head,
    fit_weights,
    read_features,
)
from arena_distill.training.losses import battle_losses
from arena_distill.training.targets import VOTE_LOSS
from arena_distill.training.trainer import train_fold
from arena_distill.verdicts import Votes

JOINT, MEAN = Head(kind="joint"), Head(kind="pointwise", pooling="mean")


def objective(votes: Votes, head: Head = JOINT) -> Callable[..., torch.Tensor]:
    probabilities = torch.from_numpy(votes.probabilities.astype(np.float32))
    return lambda outputs, rows: battle_losses(
        battle_logits(outputs, head), probabilities[rows], None, None, VOTE_LOSS
    )


def made_up(rows: int, width: int, *, strength: float, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Features on several scales, and labels that depend on them."""
    rng = np.random.default_rng(seed)
    sizes = np.geomspace(0.1, 10, width)
    features = rng.normal(0.3, 1, (rows, 1, width)) * sizes
    truth = rng.normal(size=(width, 3)) * strength / sizes[:, None]
    odds = features[:, 0] @ truth + rng.gumbel(size=(rows, 3))
    return features.astype(np.float32), odds.argmax(1)


@pytest.mark.parametrize("ridge", [10.0, 0.1, 0.003])
def test_it_is_scikit_learns_logistic_regression(ridge: float) -> None:
    from sklearn.linear_model import LogisticRegression

    features, labels = made_up(300, 12, strength=1)
    (path, found) = fit_weights(
        torch.from_numpy(features), objective(Votes.hard(labels)), 3, np.arange(300), (100.0, ridge)
    )
    assert path.abs().max() < found.abs().max()
    flat = features[:, 0] / features.std(axis=0, ddof=1)
    model = LogisticRegression(C=1 / ridge / 300, fit_intercept=False, max_iter=10_000, tol=1e-9)
    expected = model.fit(flat, labels).coef_ / features.std(axis=0, ddof=1)
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-3 * np.abs(expected).max())


def test_what_predicts_is_learned_and_noise_is_not() -> None:
    features, labels = made_up(400, 10, strength=2)
    noise = np.random.default_rng(1).permutation(labels)
    groups = np.arange(400)
    _, weak, found = cross_validate(
        torch.from_numpy(features), objective(Votes.hard(labels)), 3, groups
    )
    head, strong, guessed = cross_validate(
        torch.from_numpy(features), objective(Votes.hard(noise)), 3, groups
    )
    assert found < 0.6 < np.log(3) - 0.02 < guessed
    assert weak < 0.1 < strong
    assert (torch.from_numpy(features[:, 0]) @ head.T).std() < 0.1


def test_prompts_stay_whole() -> None:
    """Features that identify the prompt predict its votes, but not those of other prompts."""
    rng = np.random.default_rng(2)
    groups = np.repeat(np.arange(40), 10)
    names = np.eye(40, dtype=np.float32)[groups][:, None]
    labels = rng.integers(0, 3, 40)[groups]
    _, ridge, found = cross_validate(
        torch.from_numpy(names), objective(Votes.hard(labels)), 3, groups
    )
    _, fooled, seen = cross_validate(
        torch.from_numpy(names), objective(Votes.hard(labels)), 3, rng.permutation(400)
    )
    assert seen < 0.3 < np.log(3) - 0.05 < found
    assert fooled < ridge


def test_one_prompt_alone_leaves_nothing_to_choose_by() -> None:
    features, labels = made_up(20, 4, strength=1)
    head, ridge, _ = cross_validate(
        torch.from_numpy(features), objective(Votes.hard(labels)), 3, np.zeros(20, int)
    )
    assert ridge == RIDGES[0]
    assert torch.isfinite(head).all()


@pytest.mark.parametrize("head", [JOINT, MEAN], ids=["joint", "mean"])
def test_features_are_what_the_head_reads(family: str, run: Run, head: Head) -> None:
    tokens = read_tokens(run.tokens).take(np.arange(7))
    pad = tokens.vocabulary.pad
    judge = new_judge(
        load_classifier(run.backbone, head=head, pad_token_id=pad, head_seed=0), LORA, 4
    )
    shown = make_examples(tokens, tokens.votes, None, None, training_settings(head=head))
    features = torch.from_numpy(read_features(judge, shown.views, 300))
    assert features.shape == (len(shown), len(shown.views), 32)
    assert judge.training
    judge.eval()
    with torch.inference_mode():
        for view, sequences in enumerate(shown.views):
            for row in (0, len(sequences) - 1):
                ids = torch.from_numpy(sequences[row].astype(np.int64))[None]
                said = judge(input_ids=ids)
                assert not hasattr(said, "features"), "it is not watched any more"
                made = head_layer(judge)(features[row, view])
                torch.testing.assert_close(made, said.logits[0], atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize(("family", "head"), [("llama", JOINT), ("qwen2", MEAN), ("gemma2", JOINT)])
def test_training_starts_where_the_fit_ends(run: Run, head: Head, tmp_path: Path) -> None:
    """With a learning rate near zero, the adapter's head stays the fitted one."""
    folds, tokens = read_parquet(run.folds), read_tokens(run.tokens)
    rows = folds.take(training_rows(folds, 0))
    tokens = tokens.take(locate(key(rows), tokens.keys(), "tokens"))
    votes = votes_of(rows)
    settings = training_settings(head=head)
    shown = make_examples(tokens, votes, None, None, settings)
    base = load_classifier(run.backbone, head=head, pad_token_id=tokens.vocabulary.pad, head_seed=0)
    judge = new_judge(base, LORA, settings.training.seed)
    features = torch.from_numpy(read_features(judge, shown.views, 300))
    groups = np.tile(rows["group"].to_numpy(), len(shown) // len(rows))
    layer = head_layer(judge)
    expected, *_ = cross_validate(
        features, objective(shown.votes, head), layer.out_features, groups
    )
    assert expected.abs().max() > 0
    learned = fit(run, tmp_path / "x", head=head, fit_head=True, lr=1e-12)
    (found,) = (weight for name, weight in learned.items() if "score" in name)
    torch.testing.assert_close(found, expected, atol=1e-3 * float(expected.abs().max()), rtol=1e-2)


def test_a_student_is_fitted_to_its_teachers(make_run: Callable[..., Run]) -> None:
    """Teachers are sure that the longer answer wins, all votes are A: the student follows its teachers."""
    run = make_run("llama")
    tokens = read_tokens(run.tokens)
    pad, rows = tokens.vocabulary.pad, len(tokens)
    settings = training_settings(head=MEAN)
    shown = make_examples(tokens, Votes.hard(np.zeros(rows, int)), None, None, settings)
    longer = shown.views[0].lengths > shown.views[1].lengths
    sure = np.where(longer[:, None], [4, 0, 0], [0, 4, 0]).astype(np.float32)
    taught = replace(
        shown,
        teachers=sure[:, None],
        weights=np.ones((rows, 1), np.float32),
        groups=np.arange(rows),
    )
    loss = Loss(ce=0, kl=1, temperature=1)
    said = {}
    for examples, by in ((taught, loss), (replace(taught, teachers=None, weights=None), VOTE_LOSS)):
        judge = new_judge(
            load_classifier(run.backbone, head=MEAN, pad_token_id=pad, head_seed=0), LORA, 4
        )
        fit_head(judge, examples, loss=by, head=MEAN, batch_tokens=500)
        features = torch.from_numpy(read_features(judge, shown.views, 500))
        logits = battle_logits(head_layer(judge)(features), MEAN).detach().numpy()
        said[by.kl] = (logits[:, 0] > logits[:, 1]) == longer
    assert said[1.0].mean() > 0.8
    assert said[1.0].mean() > said[0.0].mean()


def test_a_fit_counts_battles_and_teachers_by_their_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Scikit-learn's, with each class of the teachers' weighted mean as a row of its own."""
    from sklearn.linear_model import LogisticRegression

    rng, ridge, rows = np.random.default_rng(4), 0.05, 120
    features, _ = made_up(rows, 5, strength=1)
    teachers = rng.normal(0, 2, (rows, 2, 3)).astype(np.float32)
    weights = rng.dirichlet([0.3, 0.3], rows).astype(np.float32)
    votes = Votes(rng.dirichlet(np.ones(3), rows), rng.integers(1, 9, rows).astype(float))
    examples = Examples((), votes, teachers, weights, rows, groups=np.arange(rows))
    layer = torch.nn.Linear(5, 3)
    monkeypatch.setattr(linear_probe, "read_features", lambda *_: features)
    monkeypatch.setattr(linear_probe, "head_layer", lambda judge: judge)
    one = partial(linear_probe.cross_validate, ridges=(ridge,))
    monkeypatch.setattr(linear_probe, "cross_validate", one)
    loss = Loss(ce=1, kl=2, cosine=0, temperature=1, combine="mean_probabilities")
    fit_head(layer, examples, loss=loss, head=JOINT, batch_tokens=1)
    odds = np.exp(teachers.astype(np.float64))
    taught = np.einsum("rj,rjc->rc", weights, odds / odds.sum(-1, keepdims=True))
    target = votes.weights[:, None] * (votes.probabilities + 2 * taught) / 3
    spread = features[:, 0].std(axis=0, ddof=1)
    model = LogisticRegression(C=1 / ridge / rows, fit_intercept=False, max_iter=10_000, tol=1e-9)
    flat = np.repeat(features[:, 0] / spread, 3, axis=0)
    model.fit(flat, np.tile(np.arange(3), rows), sample_weight=target.ravel())
    expected = model.coef_ / spread
    np.testing.assert_allclose(
        layer.weight.detach().numpy(), expected, atol=2e-3 * np.abs(expected).max()
    )
    assert layer.bias.tolist() == [0, 0, 0]


def test_both_orders_of_a_prompts_battles_are_one_group(
    make_run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, given = make_run("llama"), []
    monkeypatch.setattr(trainer, "_fit", lambda _, examples, *__: given.append(examples))
    train_fold(
        run.backbone, None, run.tokens, run.folds, 0, tmp_path, teachers={},
        settings=training_settings(fit_head=True), launch=Launch(),
    )  # fmt: skip
    folds = read_parquet(run.folds)
    prompts = folds["group"].to_numpy()[training_rows(folds, 0)]
    assert len(set(prompts.tolist())) < len(prompts)
    assert given[0].groups.tolist() == [*prompts, *prompts]


def test_an_interrupted_training_keeps_its_checkpoints_key(
    make_run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another machine may fit a slightly different head: the checkpoint is still found and used."""
    run, launch = make_run("llama"), Launch(4, checkpoints=tmp_path / "kept", checkpoint_minutes=0)
    whole = fit(run, tmp_path / "whole", head=MEAN, fit_head=True, epochs=2)
    genuine, steps = judge_trainer.battle_losses, []

    def stop(*arguments: object) -> torch.Tensor:
        steps.append(1)
        if len(steps) == 6:
            raise KeyboardInterrupt
        return genuine(*arguments)

    monkeypatch.setattr(judge_trainer, "battle_losses", stop)
    with pytest.raises(KeyboardInterrupt):
        fit(run, tmp_path / "x", head=MEAN, fit_head=True, epochs=2, launch=launch)
    monkeypatch.setattr(judge_trainer, "battle_losses", genuine)
    monkeypatch.setattr(trainer, "fit_head", lambda *_, **__: pytest.fail("fitted twice"))
    again = fit(run, tmp_path / "x", head=MEAN, fit_head=True, epochs=2, launch=launch)
    for name, weight in whole.items():
        torch.testing.assert_close(again[name], weight, atol=1e-6, rtol=1e-5)


def test_it_is_off_by_default() -> None:
    assert not Training().fit_head
