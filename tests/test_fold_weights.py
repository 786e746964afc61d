"""The weights of folds: computed again with numpy, and as they reach the merged matrices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file
from test_merging import FAMILIES, base_model, deltas, judge, save_adapter, save_backbone, weights

from arena_distill.battles.folds import CHOICE, EVERY_FOLD
from arena_distill.battles.votes import vote_columns
from arena_distill.config.encoding import Encoding
from arena_distill.config.phases.deployment import MergeSettings
from arena_distill.config.vocabulary import FoldAverage, FoldHeads
from arena_distill.deployment import fold_weights
from arena_distill.deployment.fold_weights import FoldMerger, greedy_weights, validation_weights
from arena_distill.deployment.merging import merge_folds
from arena_distill.errors import InputError
from arena_distill.files.artifacts import write_parquet
from arena_distill.files.keys import key
from arena_distill.files.logits import write_logits
from arena_distill.verdicts import Votes


def settings_of(average: FoldAverage, heads: FoldHeads) -> MergeSettings:
    return MergeSettings(
        version=1, judge="j", encoding=Encoding(max_length=96), average=average, heads=heads,
        precision="fp32",
    )  # fmt: skip


def test_validation_weights_by_hand(tmp_path: Path) -> None:
    """Of both orders' mean logits, on the fold's own validation rows, whatever else its file holds."""
    rng = np.random.default_rng(5)
    rows, folds = 60, 3
    votes = Votes(rng.dirichlet(np.ones(3), rows).astype(np.float32), rng.integers(1, 5, rows))
    names = pa.table({"id": [str(i) for i in range(rows)], "source": ["train"] * rows})
    table = pa.table({n: names[n] for n in names.column_names} | vote_columns(votes))
    write_parquet(table, tmp_path / "folds.parquet", {})
    files, means, errors = [], [], []
    for fold in range(folds):
        seen = rng.permutation(rows)
        logits = rng.normal(0, 1 + fold / 5, (rows, 2, 3)).astype(np.float32)
        own = seen % folds == fold
        ids = names.take(pa.array(seen)).append_column("validation", pa.array(own))
        files.append(tmp_path / f"fold_{fold}.npy")
        write_logits(files[-1], logits, ids, {})
        z, v, w = logits[own].mean(1), votes.probabilities[seen[own]], votes.weights[seen[own]]
        loss = -(v * (z - np.log(np.exp(z).sum(1, keepdims=True)))).sum(1)
        means.append((w * loss).sum() / w.sum())
        spread = (w * (loss - means[-1]) ** 2).sum() / w.sum()
        errors.append(np.sqrt(spread * (w**2).sum()) / w.sum())
    expected = np.exp(-np.array(means) / np.mean(errors))
    found = validation_weights(files, tmp_path / "folds.parquet")
    assert found == pytest.approx(expected / expected.sum(), rel=1e-4)
    assert 0.01 < min(found) < 0.5 * max(found)


ADAPTERS = [Path(f"fold_{k}") for k in range(4)]


class Tokens:
    """Stands for tokens, of which only the rows are asked for."""

    def __init__(self, keys: pa.Array) -> None:
        self.rows = keys

    def keys(self) -> pa.Array:
        return self.rows

    def take(self, rows: np.ndarray) -> Tokens:
        return Tokens(self.rows.take(pa.array(rows)))


class Pot:
    """Stands for a `FoldMerger`: a soup of folds loses what its mean misses 1 by."""

    models = (0.0, 1.3, 0.8, 5.0)

    def __init__(self, backbone: Path, adapters: list[Path], tokens: Tokens, *rest: object) -> None:
        assert (backbone, adapters) == (Path("base"), ADAPTERS)
        assert rest == (settings_of("products", "average"), 7)
        assert tokens.rows.to_pylist() == ["train:4", "train:1"]

    def log_loss(self, some: list[int], votes: Votes) -> float:
        assert votes.labels.tolist() == [2, 0]
        return float(abs(np.mean([self.models[k] for k in some]) - 1))


def test_greedy_weights_are_chosen_on_the_battles_for_choices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = pa.table({"id": list("345126"), "source": ["train"] * 5 + ["extra"]})
    tokens = Tokens(key(names).take(pa.array([5, 3, 1, 4, 2, 0])))
    monkeypatch.setattr(fold_weights, "FoldMerger", Pot)
    monkeypatch.setattr(fold_weights, "read_tokens", {Path("t"): tokens}.get)
    votes = vote_columns(Votes.hard(np.array([0, 2, 1, 0, 1, 1])))

    def weights_of(folds: list[int]) -> list[float]:
        table = pa.table({n: names[n] for n in names.column_names} | votes | {"fold": folds})
        write_parquet(table, tmp_path / "folds.parquet", {})
        settings = settings_of("products", "average")
        return greedy_weights(
            Path("base"),
            ADAPTERS,
            Path("t"),
            tmp_path / "folds.parquet",
            settings=settings,
            batch_tokens=7,
        )

    assert weights_of([0, CHOICE, 1, CHOICE, 0, EVERY_FOLD]) == [0, 0.5, 0.5, 0]
    with pytest.raises(InputError, match=r"folds\.choices"):
        weights_of([0, 0, 1, 1, 0, EVERY_FOLD])


def test_a_soup_of_some_folds_is_their_equal_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Merged as the settings say; its loss is that of both orders' mean logits."""
    merged: list[Any] = []

    def logits(_: FoldMerger, *asked: Any) -> tuple[np.ndarray, None]:
        merged.append(asked)
        return np.log([[[0.5, 0.25, 0.25], [0.125, 0.25, 0.625]]]), None

    monkeypatch.setattr(FoldMerger, "logits", logits)
    pot = FoldMerger.__new__(FoldMerger)
    pot.folds, pot.settings = [None] * 4, settings_of("factors", "first")  # type: ignore[list-item]
    mean = np.sqrt([0.5 * 0.125, 0.25 * 0.25, 0.25 * 0.625])
    found = pot.log_loss([3, 1], Votes.hard(np.array([2])))
    assert found == pytest.approx(-np.log(mean[2] / mean.sum()))
    assert merged == [([0, 0.5, 0, 0.5], "factors", "first")]


@pytest.mark.parametrize("average", ["products", "factors"])
def test_each_fold_counts_by_its_weight(average: FoldAverage, tmp_path: Path) -> None:
    """In the adapted matrices and in the head."""
    backbone = save_backbone(base_model(FAMILIES[0]), tmp_path / "base")
    folds = [save_adapter(tmp_path / f"fold_{k}", backbone, k) for k in range(3)]
    shares = [0.7, 0.1, 0.2]
    settings = settings_of(average, "average")
    merge_folds(backbone, folds, tmp_path / "m", settings=settings, weights=shares)
    merged, base = load_file(tmp_path / "m" / "model.safetensors"), weights(base_model(FAMILIES[0]))
    heads = [judge(backbone, fold).merge_and_unload().score.weight.detach() for fold in folds]
    mean = sum(w * head for w, head in zip(shares, heads, strict=True))
    torch.testing.assert_close(merged["score.weight"], mean, atol=1e-6, rtol=1e-5)
    name = "model.layers.1.mlp.down_proj"
    if average == "products":
        each = [deltas(backbone, fold)[f"{name}.weight"] for fold in folds]
        expected = sum(w * delta for w, delta in zip(shares, each, strict=True))
    else:
        files = [load_file(fold / "adapter_model.safetensors") for fold in folds]
        a, b = (
            sum(
                w * f[f"base_model.model.{name}.lora_{x}.weight"].double()
                for w, f in zip(shares, files, strict=True)
            )
            for x in "AB"
        )
        expected = 2 * b @ a  # alpha 8, rank 4
    delta = merged[f"{name}.weight"].double() - base[f"{name}.weight"]
    torch.testing.assert_close(delta, expected, atol=1e-5, rtol=1e-4)
