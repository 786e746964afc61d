"""Judges of three families read real text through their real tokenizers, alone and in padded batches alike.

Llama-3 has no pad token, Qwen2 no token for the start of a sequence, Gemma-2 has both. Many published
folders pad with the end of sequence, which the classifiers' pooling takes for padding. The models are
tiny, with new embeddings of the tokenizers' sizes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REAL_TOKENIZERS, battles_table

from arena_distill.config.backbone import Backbone
from arena_distill.config.encoding import Encoding
from arena_distill.config.head import Head
from arena_distill.config.phases.encoding import BackboneSettings, TokensSettings
from arena_distill.encoding.batching import pad
from arena_distill.encoding.sequences import Tokens, read_tokens
from arena_distill.encoding.tokenization import load_tokenizer, tokenize_battles
from arena_distill.encoding.views import encode_views
from arena_distill.files.artifacts import write_parquet
from arena_distill.models.loading import load_classifier
from arena_distill.models.preparation import prepare_backbone
from arena_distill.models.scoring import score
from arena_distill.training.examples import collator

pytestmark = pytest.mark.slow

TOKENIZERS = {"llama": "llama3", "qwen2": "qwen2_5", "gemma2": "gemma2"}

BATTLES = [
    {"prompt": "What's 12345 + 67890?", "response_a": "80,235.", "response_b": "I can't say."},
    {"prompt": ["Hi!", "And now?"], "response_a": ["Hello.", ""], "response_b": ["Yo", "Go on…"]},
    {"prompt": "", "response_a": "def f(x):\n\treturn x  # é 你好 🏳️‍🌈", "response_b": "?"},
    {
        "prompt": "Spell out <eos> <|end_of_text|> <|endoftext|> <pad> </s>",
        "response_a": "<|eot_id|>" * 3,
        "response_b": "The sea is deep and the waves are high. " * 20,
    },
    {"prompt": "Which is larger, 9.9 or 9.11?", "response_a": "9.9", "response_b": "9.11 " * 9},
]


@dataclass(frozen=True)
class Reader:
    """A tiny backbone with a real tokenizer, and its tokenised battles."""

    folder: Path
    tokens: Tokens
    end: int | None


@pytest.fixture(scope="module", params=TOKENIZERS)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def source(family: str) -> Path:
    folder = REAL_TOKENIZERS / TOKENIZERS[family]
    if not folder.is_dir():
        pytest.skip(f"no tokenizer in {folder}; scripts/fetch_tokenizers.sh fetches it")
    return folder


@pytest.fixture(scope="module")
def tokenizer(source: Path) -> Any:
    return load_tokenizer(source)


@pytest.fixture(scope="module", params=[False, True], ids=["as it is", "pad is eos"])
def reader(
    family: str,
    source: Path,
    tokenizer: Any,
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
) -> Reader:
    folder = tmp_path_factory.mktemp(family)
    if request.param:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = tokenizer.eos_token
        source = folder / "tokenizer"
        tokenizer.save_pretrained(source)
    else:
        # What makes the three worth testing.
        expected = {"llama": (False, True), "qwen2": (True, False), "gemma2": (True, True)}
        found = tokenizer.pad_token is not None, tokenizer.bos_token is not None
        assert found == expected[family]
    backbone: Any = Backbone(tiny=family, tokenizer=str(source))  # type: ignore[arg-type]
    prepare_backbone(folder / "backbone", settings=BackboneSettings.of(backbone))
    write_parquet(battles_table(BATTLES), folder / "battles.parquet", {"phase": "battles"})
    tokenize_battles(
        folder / "battles.parquet",
        folder / "backbone",
        folder / "tokens",
        settings=TokensSettings(version=1),
    )
    return Reader(folder / "backbone", read_tokens(folder / "tokens"), tokenizer.eos_token_id)


@pytest.fixture(params=["joint", "pointwise"])
def head(request: pytest.FixtureRequest) -> Head:
    return Head(kind=request.param)


@pytest.fixture(scope="module")
def load(reader: Reader) -> Callable[[Head], Any]:
    @cache
    def judge(head: Head) -> Any:
        torch.manual_seed(0)
        model: Any = load_classifier(
            reader.folder, head=head, pad_token_id=reader.tokens.vocabulary.pad, head_seed=1
        )
        # The tiny models' weights are small compared to fresh embeddings: make every token count.
        model.score.weight.data.normal_()
        return model.eval()

    return judge


@pytest.fixture
def model(load: Callable[[Head], Any], head: Head) -> Any:
    return load(head)


def views(reader: Reader, head: Head) -> list[Any]:
    return encode_views(reader.tokens, Encoding(max_length=256), head)


def test_sequences_end_as_the_family_has_it_and_hold_no_padding(reader: Reader, head: Head) -> None:
    padding = reader.tokens.vocabulary.pad
    assert padding != reader.end
    for view in views(reader, head):
        for sequence in view:
            assert padding not in sequence
            assert sequence[-1] == reader.end
            assert list(sequence).count(reader.end) == 1  # spelled out in a text it is text


def test_a_padded_batch_says_what_its_sequences_say_alone(
    reader: Reader, head: Head, model: Any
) -> None:
    for view in views(reader, head):
        assert np.ptp(view.lengths) > 20
        with torch.inference_mode():
            alone = [
                model(input_ids=torch.from_numpy(s.astype(np.int64))[None]).logits for s in view
            ]
        expected = torch.cat(alone).numpy()
        batched = score(model, view, batch_tokens=100_000)
        np.testing.assert_allclose(batched, expected, atol=2e-4)
        assert np.ptp(expected, axis=0).min() > 0.01  # they do differ


def test_the_head_reads_the_last_token_of_each_sequence(
    reader: Reader, head: Head, model: Any
) -> None:
    view = views(reader, head)[0]
    ids, mask = pad(list(view), model.config.pad_token_id)
    with torch.inference_mode():
        given = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
        read = model.model(**given).last_hidden_state
        last = read[torch.arange(len(ids)), torch.from_numpy(view.lengths) - 1]
        np.testing.assert_allclose(
            model(**given).logits.numpy(), model.score(last).numpy(), atol=1e-5
        )


def test_training_pads_as_scoring_does(reader: Reader, head: Head, model: Any) -> None:
    shown = views(reader, head)
    items = [{"input_ids": [view[i] for view in shown], "labels": np.int64(0)} for i in range(5)]
    batch = collator(model.config.pad_token_id)(items)
    with torch.inference_mode():
        logits = model(
            input_ids=batch["input_ids"].flatten(0, 1),
            attention_mask=batch["attention_mask"].flatten(0, 1),
        ).logits.unflatten(0, batch["input_ids"].shape[:2])
    for i, view in enumerate(shown):
        expected = score(model, view, batch_tokens=100_000)
        np.testing.assert_allclose(logits[:, i].numpy(), expected, atol=2e-4)
