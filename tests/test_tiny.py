"""The shipped tiny backbones: small ordinary folders of their families, on which LoRA can learn."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from arena_distill.battles.simulation import SimulatedBattles, simulate
from arena_distill.config.backbone import TINY
from arena_distill.encoding.templates import TEMPLATES
from arena_distill.models.tiny_backbones import pretrain_tiny
from arena_distill.verdicts import WINNERS

FAMILIES = ("llama", "qwen2", "gemma2")
WEIRD = (
    "",
    " two  spaces and a tail ",
    "tabs\tand\r\nlines\n\n",
    "naïve Łódź, ½ of “it” … ﬁ",
    "Привет, мир! 首都は東京です。 한국어 العربية",
    "👩‍👩‍👧 😀 🏳️‍🌈",
    "\u0000\u200b\ufeff",
    "```python\nprint({'a': [1, 2, 345678]})\n```",
)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def tokenizer_of(family: str):  # type: ignore[no-untyped-def]
    return AutoTokenizer.from_pretrained(TINY / family, local_files_only=True)


# --- folders --------------------------------------------------------------------------------------


def test_a_folder_is_small_and_says_where_it_comes_from(family: str) -> None:
    folder = TINY / family
    assert (folder / "model.safetensors").stat().st_size <= 1_600_000
    assert (folder / "README.md").stat().st_size > 0
    about = json.loads((folder / "provenance.json").read_text())
    assert "pretrain-tiny" in about["command"]
    assert f"--family {family}" in about["command"]


def test_only_the_score_head_is_fresh(family: str) -> None:
    model, info = AutoModelForSequenceClassification.from_pretrained(
        TINY / family, num_labels=3, dtype=torch.float32, output_loading_info=True
    )
    assert set(info["missing_keys"]) == {"score.weight"}
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert model.config.model_type == family
    with safe_open(TINY / family / "model.safetensors", "np") as weights:
        assert not any(name.startswith(("score", "lm_head")) for name in weights.keys())  # noqa: SIM118


def test_linear_layers_split_into_groups_of_32(family: str) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(TINY / family, num_labels=3)
    layers = [
        m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "score"
    ]
    assert len(layers) == 7 * model.config.num_hidden_layers
    assert all(m.in_features % 32 == 0 and m.out_features % 32 == 0 for m in layers)
    assert model.config.max_position_embeddings >= 2048


def test_vllm_takes_the_heads(family: str) -> None:
    """On a CPU from 32 on; it takes the width of a Qwen2's heads from the hidden size."""
    config = AutoConfig.from_pretrained(TINY / family)
    assert getattr(config, "head_dim", 32) == 32
    assert family != "qwen2" or config.hidden_size == 32 * config.num_attention_heads


def test_the_vocabulary_is_the_models(family: str) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(TINY / family, num_labels=3)
    tokenizer = tokenizer_of(family)
    assert len(tokenizer) == model.get_input_embeddings().num_embeddings
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id


# --- tokenizers -----------------------------------------------------------------------------------


def test_the_three_families_set_their_three_traps() -> None:
    llama, qwen2, gemma2 = map(tokenizer_of, FAMILIES)
    assert llama.pad_token is None
    assert llama.bos_token == "<|begin_of_text|>"
    assert llama.convert_tokens_to_ids("<|reserved_special_token_0|>") is not None
    assert qwen2.bos_token is None
    assert (qwen2.pad_token, qwen2.eos_token) == ("<|endoftext|>", "<|im_end|>")
    assert (gemma2.bos_token, gemma2.eos_token, gemma2.pad_token) == ("<bos>", "<eos>", "<pad>")
    for tokenizer in (llama, qwen2, gemma2):
        bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        plain = tokenizer("Hello", add_special_tokens=False)["input_ids"]
        assert tokenizer("Hello")["input_ids"] == bos + plain


@pytest.mark.parametrize("text", WEIRD)
def test_any_text_comes_back(family: str, text: str) -> None:
    tokenizer = tokenizer_of(family)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert tokenizer.unk_token_id is None or tokenizer.unk_token_id not in ids


def test_the_arenas_words_are_single_tokens(family: str) -> None:
    tokenizer = tokenizer_of(family)
    for word in (" Valdoria", " Merin", " kopek", " capital", " hammer", " French"):
        assert len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1, word


# --- learning -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"family": "bert"}, "family must be one of .* got 'bert'"),
        ({"family": "llama", "battles": 0}, "battles must be positive, got 0"),
        ({"family": "llama", "epochs": 0.0}, "epochs must be positive, got 0"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        pretrain_tiny(output=tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_pretraining_writes_such_a_folder(family: str, tmp_path: Path) -> None:
    pretrain_tiny(family, tmp_path / family, battles=300, epochs=1.0, seed=1)
    shipped = {path.name for path in (TINY / family).iterdir()}
    assert {path.name for path in (tmp_path / family).iterdir()} == shipped
    about = json.loads((tmp_path / family / "provenance.json").read_text())
    assert about["bayes_log_loss"] < about["log_loss"] < 1.5
    ours = AutoTokenizer.from_pretrained(tmp_path / family)
    assert ours.special_tokens_map == tokenizer_of(family).special_tokens_map
    _, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / family, num_labels=3, output_loading_info=True
    )
    assert set(info["missing_keys"]) == {"score.weight"}


def pooled(family: str, battles: SimulatedBattles) -> np.ndarray:
    """The input of a new head: the last token's hidden state, (rows, hidden)."""
    tokenizer = tokenizer_of(family)
    model = AutoModelForSequenceClassification.from_pretrained(
        TINY / family, num_labels=3, dtype=torch.float32
    ).eval()
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    states = []
    with torch.no_grad():
        for fields in battles.frame[["prompt", "response_a", "response_b"]].itertuples(index=False):
            texts = ["\n".join(turns) for turns in fields]
            pieces = [piece for pair in zip(TEMPLATES["winners"], [*texts, ""]) for piece in pair]  # noqa: B905
            ids = [i for piece in pieces for i in tokenizer.encode(piece, add_special_tokens=False)]
            sequence = torch.tensor([[*bos, *ids[-600:], tokenizer.eos_token_id]])
            states.append(model.model(input_ids=sequence).last_hidden_state[0, -1].numpy())
    return np.array(states)


@pytest.mark.slow
def test_a_linear_head_alone_already_learns_the_arena(family: str) -> None:
    from sklearn.linear_model import LogisticRegression

    train = simulate(rows=800, seed=21, voters="arena")
    test = simulate(rows=600, seed=22, voters="arena")
    drawn = [b.frame[list(WINNERS)].to_numpy().argmax(axis=1) for b in (train, test)]
    head = LogisticRegression(max_iter=2_000, C=0.1).fit(pooled(family, train), drawn[0])
    rows = np.arange(len(drawn[1]))
    reached = -np.log(head.predict_proba(pooled(family, test))[rows, drawn[1]]).mean()
    bayes = -np.log(test.probabilities[rows, drawn[1]]).mean()
    shares = np.bincount(drawn[0]) / len(drawn[0])
    prior = -np.log(shares[drawn[1]]).mean()
    assert (prior - reached) / (prior - bayes) > 0.5
