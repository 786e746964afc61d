"""Logits belong to the right rows, in one frame, and do not depend on their batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import FAMILIES, Run

from arena_distill.battles.folds import fold_rows, training_rows, validation_rows
from arena_distill.config.encoding import Encoding
from arena_distill.config.phases.scoring import LogitsSettings
from arena_distill.config.training import Lora
from arena_distill.encoding.batching import pad, token_batches
from arena_distill.encoding.sequences import Tokens, read_tokens
from arena_distill.encoding.views import encode
from arena_distill.errors import InputError
from arena_distill.files.artifacts import read_parquet, read_provenance
from arena_distill.files.keys import key
from arena_distill.files.logits import read_logits, write_logits
from arena_distill.models.adapters import new_judge
from arena_distill.models.loading import load_classifier
from arena_distill.models.scoring import score
from arena_distill.scoring import logits as module
from arena_distill.scoring.logits import gather_logits, predict_logits

ENCODING = Encoding(max_length=96)
LORA = Lora(r=4, alpha=8, dropout=0.0)


def logits_settings(*rows: str, precision: str = "fp32") -> LogitsSettings:
    return LogitsSettings(
        version=1, encoding=ENCODING, precision=precision, rows=("validation", *rows)
    )


def one_by_one(model: Any, sequences: Any) -> np.ndarray:
    """Scores of each sequence alone, without padding."""
    with torch.inference_mode():
        return np.concatenate(
            [
                model(
                    input_ids=torch.from_numpy(ids.astype(np.int64))[None],
                    attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
                ).logits.numpy()
                for ids in sequences
            ]
        )


@pytest.fixture(params=[*FAMILIES, "bert"])
def any_run(request: pytest.FixtureRequest, make_run: Callable[..., Run]) -> Run:
    return make_run(request.param)


def test_a_batch_scores_like_its_sequences_alone(any_run: Run) -> None:
    tokens = read_tokens(any_run.tokens)
    model = load_classifier(
        any_run.backbone, pad_token_id=tokens.vocabulary.pad, head_seed=0
    ).eval()
    sequences = encode(tokens, ENCODING, "AB")
    assert len(set(sequences.lengths)) > 5
    alone = one_by_one(model, sequences)
    assert np.ptp(alone, axis=0).max() > 0.1  # the sequences do differ
    for batch_tokens in (1, 200, 100_000):
        batched = score(model, sequences, batch_tokens=batch_tokens)
        assert batched.dtype == np.float32
        np.testing.assert_allclose(batched, alone, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_on_either_side_changes_nothing(family: str, make_run: Callable[..., Run]) -> None:
    run = make_run(family)
    tokens = read_tokens(run.tokens).take(np.arange(6))
    model = load_classifier(run.backbone, pad_token_id=tokens.vocabulary.pad, head_seed=0).eval()
    sequences = encode(tokens, ENCODING, "AB")
    alone = one_by_one(model, sequences)
    ids, mask = pad(list(sequences), tokens.vocabulary.pad)
    left_ids, left_mask = np.full_like(ids, tokens.vocabulary.pad), np.zeros_like(mask)
    for row, part in enumerate(sequences):
        left_ids[row, ids.shape[1] - len(part) :] = part
        left_mask[row, ids.shape[1] - len(part) :] = 1
    for batch_ids, batch_mask in ((ids, mask), (left_ids, left_mask)):
        with torch.inference_mode():
            # Positions count from a sequence's own first token, wherever that stands.
            positions = (torch.from_numpy(batch_mask).cumsum(-1) - 1).clamp(min=0)
            batch = model(
                input_ids=torch.from_numpy(batch_ids),
                attention_mask=torch.from_numpy(batch_mask),
                position_ids=positions,
            ).logits
        np.testing.assert_allclose(batch.numpy(), alone, atol=1e-4)


def test_padding_with_the_end_of_sequence_would_pool_another_token(
    make_run: Callable[..., Run],
) -> None:
    """Why `safe_pad_id` exists: with pad = EOS, pooling reads the token before the last."""
    run = make_run("llama")
    tokens = read_tokens(run.tokens)
    end = tokens.vocabulary.frames["markers"][3][-1]
    sequences = encode(tokens, ENCODING, "AB")
    wrong = load_classifier(run.backbone, pad_token_id=end, head_seed=0).eval()
    right = load_classifier(run.backbone, pad_token_id=tokens.vocabulary.pad, head_seed=0).eval()
    apart = np.abs(one_by_one(wrong, sequences) - one_by_one(right, sequences))
    assert apart.max() > 0.1


def test_a_pad_token_the_model_does_not_know_is_an_error(make_run: Callable[..., Run]) -> None:
    with pytest.raises(InputError, match="pad token 9999 is outside"):
        load_classifier(make_run("llama").backbone, pad_token_id=9999, head_seed=0)


# --- rows -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["kfold", "stratified_group"])
@pytest.mark.parametrize("rows", [(), ("extra",), ("training",), ("training", "extra")])
def test_a_fold_scores_the_rows_its_settings_say_once_each(
    method: str, rows: tuple[str, ...], make_run: Callable[..., Run]
) -> None:
    folds = read_parquet(make_run("llama", method).folds)
    for fold in range(3):
        scored = fold_rows(folds, fold, logits_settings(*rows))
        names = key(scored).to_pylist()
        assert len(set(names)) == len(names)
        validation = key(folds.take(validation_rows(folds, fold))).to_pylist()
        wanted = set(validation)
        if "training" in rows:
            wanted |= set(key(folds.take(training_rows(folds, fold))).to_pylist())
        if "extra" in rows:
            wanted |= {name for name in key(folds).to_pylist() if name.startswith("extra:")}
        assert set(names) == wanted
        flags = scored["validation"].to_pylist()
        assert {n for n, flag in zip(names, flags, strict=True) if flag} == set(validation)


def test_every_train_row_is_out_of_fold_in_exactly_one_file(make_run: Callable[..., Run]) -> None:
    folds = read_parquet(make_run("llama").folds)
    held_out: list[str] = []
    for fold in range(3):
        scored = fold_rows(folds, fold, logits_settings("training", "extra"))
        held_out += key(scored.filter(scored["validation"])).to_pylist()
    assert sorted(held_out) == sorted(n for n in key(folds).to_pylist() if n.startswith("train:"))


# --- the file ---------------------------------------------------------------------------------------


@pytest.fixture
def adapter(run: Run, tmp_path: Path) -> Path:
    pad_id = read_tokens(run.tokens).vocabulary.pad
    judge = new_judge(load_classifier(run.backbone, pad_token_id=pad_id, head_seed=0), LORA, 4)
    torch.manual_seed(1)
    for name, parameter in judge.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    judge.save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


def predict(run: Run, adapter: Path, output: Path, settings: LogitsSettings, fold: int = 1) -> Any:
    predict_logits(
        run.backbone, adapter, run.tokens, run.folds, fold, output,
        settings=settings, batch_tokens=300,
    )  # fmt: skip
    return read_logits(output)


def test_the_file_holds_both_orders_in_the_canonical_frame(
    run: Run, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logits, ids = predict(run, adapter, tmp_path / "fold_1.npy", logits_settings("extra"))
    assert "battles in 2 orders" in capsys.readouterr().out
    assert logits.dtype == np.float32
    assert logits.shape == (len(ids), 2, 3)
    expected = fold_rows(read_parquet(run.folds), 1, logits_settings("extra"))
    assert ids.equals(expected)
    about = read_provenance(tmp_path / "fold_1.ids.parquet")
    assert about["phase"] == "logits"
    assert about["settings"]["fold"] == 1
    # The BA column has the logits of the exchanged battle, exchanged back.
    tokens = of_rows(run, ids)
    judge = module_judge(run, adapter, tokens)
    ab = one_by_one(judge, encode(tokens, ENCODING, "AB"))
    ba = one_by_one(judge, encode(tokens, ENCODING, "BA"))
    np.testing.assert_allclose(logits[:, 0], ab, atol=1e-4)
    np.testing.assert_allclose(logits[:, 1], ba[:, [1, 0, 2]], atol=1e-4)
    assert np.abs(ba - ba[:, [1, 0, 2]]).max() > 0.1


def of_rows(run: Run, ids: Any) -> Tokens:
    from arena_distill.files.keys import locate

    tokens = read_tokens(run.tokens)
    return tokens.take(locate(key(ids), tokens.keys(), "tokens"))


def module_judge(run: Run, adapter: Path, tokens: Tokens) -> Any:
    from arena_distill.models.adapters import load_adapter

    model = load_classifier(run.backbone, pad_token_id=tokens.vocabulary.pad, head_seed=0)
    return load_adapter(model, adapter).eval()


def test_half_precision_is_near_full_precision(run: Run, adapter: Path, tmp_path: Path) -> None:
    full, _ = predict(run, adapter, tmp_path / "full.npy", logits_settings())
    half, _ = predict(run, adapter, tmp_path / "half.npy", logits_settings(precision="bf16"))
    assert half.dtype == np.float32
    assert np.isfinite(half).all()
    assert np.corrcoef(full.ravel(), half.ravel())[0, 1] > 0.95


def test_the_same_judge_writes_the_same_bytes(make_run: Callable[..., Run], tmp_path: Path) -> None:
    run = make_run("qwen2")
    pad_id = read_tokens(run.tokens).vocabulary.pad
    judge = new_judge(load_classifier(run.backbone, pad_token_id=pad_id, head_seed=0), LORA, 4)
    judge.save_pretrained(str(tmp_path / "adapter"))
    for name in ("one", "two"):
        predict(run, tmp_path / "adapter", tmp_path / f"{name}.npy", logits_settings())
    assert (tmp_path / "one.npy").read_bytes() == (tmp_path / "two.npy").read_bytes()


class LongerWins(torch.nn.Module):
    """A judge whose verdict depends only on which answer in its input is longer."""

    def __init__(self, frame: tuple[tuple[int, ...], ...], pad_token_id: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.config = type("config", (), {"pad_token_id": pad_token_id, "num_labels": 3})
        self.frame = frame

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        logits = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            text = ids[: int(mask.sum())].tolist()
            first, second = find(text, self.frame[1]), find(text, self.frame[2])
            one = second - first - len(self.frame[1])
            other = len(text) - len(self.frame[3]) - second - len(self.frame[2])
            logits.append([float(one > other), float(other > one), 0.5])
        return type("output", (), {"logits": torch.tensor(logits)})


def find(text: list[int], literal: tuple[int, ...]) -> int:
    width = len(literal)
    return next(i for i in range(len(text)) if tuple(text[i : i + width]) == literal)


def test_the_longer_answer_wins_in_both_orders(
    make_run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This fails if the verdict on order BA is not swapped back."""
    from arena_distill.models import adapters

    run = make_run("llama")
    tokens = read_tokens(run.tokens)
    judge = LongerWins(tokens.vocabulary.frames["markers"], tokens.vocabulary.pad)
    monkeypatch.setattr(adapters, "load_adapter", lambda *_: judge)
    settings = LogitsSettings(
        version=1, encoding=Encoding(max_length=2000), precision="fp32", rows=("validation",)
    )
    predict_logits(
        run.backbone, tmp_path, run.tokens, run.folds, 0, tmp_path / "x.npy",
        settings=settings, batch_tokens=1000,
    )  # fmt: skip
    logits, ids = read_logits(tmp_path / "x.npy")
    rows = of_rows(run, ids)
    a, b = (rows.fields[name].tokens.lengths for name in ("response_a", "response_b"))
    assert (a > b).any()
    assert (b > a).any()
    for order in range(2):
        np.testing.assert_array_equal(logits[:, order, 0], a > b)
        np.testing.assert_array_equal(logits[:, order, 1], b > a)


def test_a_row_without_tokens_is_an_error(
    make_run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run("llama")
    tokens = read_tokens(run.tokens)
    monkeypatch.setattr(module, "read_tokens", lambda path: tokens.take(np.arange(3)))
    with pytest.raises(InputError, match=r"tokens in .*rows are missing"):
        predict_logits(
            run.backbone, tmp_path, run.tokens, run.folds, 0, tmp_path / "x.npy",
            settings=logits_settings(), batch_tokens=100,
        )  # fmt: skip


def test_logits_that_are_not_finite_are_an_error(
    make_run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run("llama")
    pad_id = read_tokens(run.tokens).vocabulary.pad
    judge = new_judge(load_classifier(run.backbone, pad_token_id=pad_id, head_seed=0), LORA, 4)
    judge.save_pretrained(str(tmp_path / "adapter"))
    monkeypatch.setattr(
        module, "score_batches", lambda _, rows, *__: np.full((len(rows), 3), np.nan, np.float32)
    )
    with pytest.raises(InputError, match="adapter: its logits are not finite"):
        predict(run, tmp_path / "adapter", tmp_path / "x.npy", logits_settings())
    assert not (tmp_path / "x.npy").exists()


# --- shards -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scorer:
    """Scores a fold of the same judge, whole or in shards."""

    run: Run
    adapter: Path
    settings: LogitsSettings

    def whole(self, output: Path) -> Path:
        predict(self.run, self.adapter, output, self.settings)
        return output

    def shards(self, folder: Path, count: int) -> list[Path]:
        files = [folder / f"{shard}.npy" for shard in range(count)]
        for shard, file in enumerate(files):
            predict_logits(
                self.run.backbone, self.adapter, self.run.tokens, self.run.folds, 1, file,
                settings=self.settings, batch_tokens=300, shard=shard, shards=count,
            )  # fmt: skip
        return files

    def gather(self, shards: list[Path], output: Path) -> Path:
        gather_logits(shards, self.run.folds, 1, output, settings=self.settings)
        return output


@pytest.fixture
def scorer(make_run: Callable[..., Run], tmp_path: Path) -> Scorer:
    run = make_run("llama")
    pad_id = read_tokens(run.tokens).vocabulary.pad
    judge = new_judge(load_classifier(run.backbone, pad_token_id=pad_id, head_seed=0), LORA, 4)
    judge.save_pretrained(str(tmp_path / "adapter"))
    return Scorer(run, tmp_path / "adapter", logits_settings("training", "extra"))


def both_files(path: Path) -> tuple[bytes, bytes]:
    return path.read_bytes(), path.with_suffix(".ids.parquet").read_bytes()


@pytest.mark.parametrize("count", [1, 2, 3, 7, 40])
def test_shards_make_the_bytes_that_one_job_would_have_written(
    count: int, scorer: Scorer, tmp_path: Path
) -> None:
    whole = scorer.whole(tmp_path / "whole.npy")
    shards = scorer.shards(tmp_path / "shards", count)
    rows = [len(read_logits(shard)[0]) for shard in shards]
    assert sum(rows) == len(np.load(whole))
    assert sum(n > 0 for n in rows) == min(count, batches(scorer))  # the work is shared
    gathered = scorer.gather(shards, tmp_path / "gathered.npy")
    assert both_files(gathered) == both_files(whole)
    # The order in which they are named does not matter.
    gathered = scorer.gather(shards[::-1], tmp_path / "gathered.npy")
    assert both_files(gathered) == both_files(whole)


def batches(scorer: Scorer) -> int:
    """The number of batches in the fold: with more shards, some are empty."""
    rows = fold_rows(read_parquet(scorer.run.folds), 1, scorer.settings)
    tokens = of_rows(scorer.run, rows)
    lengths = np.maximum(*(encode(tokens, ENCODING, order).lengths for order in ("AB", "BA")))
    count = len(list(token_batches(lengths, 300)))
    assert 3 < count < 40
    return count


def test_a_missing_shard_is_an_error(scorer: Scorer, tmp_path: Path) -> None:
    shards = scorer.shards(tmp_path / "shards", 3)
    with pytest.raises(InputError, match="shards: the shards hold .* rows, the fold has"):
        scorer.gather(shards[:2], tmp_path / "x.npy")
    with pytest.raises(InputError, match="shards: the shards hold .* rows, the fold has"):
        scorer.gather([*shards, shards[0]], tmp_path / "x.npy")
    assert not (tmp_path / "x.npy").exists()


def test_a_shard_given_for_another_is_an_error(scorer: Scorer, tmp_path: Path) -> None:
    """The number of rows is right, but some are there twice and some are missing."""
    shards = scorer.shards(tmp_path / "shards", 3)
    logits, ids = read_logits(shards[0])
    mine = len(read_logits(shards[1])[0])
    again = np.arange(mine) % len(logits)
    write_logits(shards[1], logits[again], ids.take(again), {})
    with pytest.raises(InputError, match="logits in .*shards: .* is there more than once"):
        scorer.gather(shards, tmp_path / "x.npy")
    assert not (tmp_path / "x.npy").exists()


def test_shards_of_another_fold_are_an_error(scorer: Scorer, tmp_path: Path) -> None:
    shards = scorer.shards(tmp_path / "shards", 2)
    logits, ids = read_logits(shards[0])
    other = pa.array([f"other {row}" for row in range(len(ids))])
    names = ids.set_column(ids.schema.get_field_index("id"), ids.schema.field("id"), other)
    write_logits(shards[0], logits, names, {})
    with pytest.raises(InputError, match=f"logits in .*shards: {len(ids)} of .* rows are missing"):
        scorer.gather(shards, tmp_path / "x.npy")


@pytest.mark.parametrize(
    "harm", ["cut", "changed", "gone", "ids cut", "ids gone", "ids of another"]
)
def test_a_damaged_shard_is_an_error_that_names_its_file(
    harm: str, scorer: Scorer, tmp_path: Path
) -> None:
    shards = scorer.shards(tmp_path / "shards", 3)
    ids = shards[1].with_suffix(".ids.parquet")
    harmed = ids if harm.startswith("ids") else shards[1]
    content = harmed.read_bytes()
    middle = len(content) // 2
    if harm.endswith("gone"):
        harmed.unlink()
    elif harm.endswith("cut"):
        harmed.write_bytes(content[:middle])
    elif harm == "changed":
        harmed.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    else:
        ids.write_bytes(shards[2].with_suffix(".ids.parquet").read_bytes())
    with pytest.raises(InputError) as error:
        scorer.gather(shards, tmp_path / "x.npy")
    assert str(shards[1] if harm == "ids of another" else harmed) in str(error.value)
    assert not (tmp_path / "x.npy").exists()
