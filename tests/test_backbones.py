"""Every kind of backbone becomes an ordinary folder that loads as a judge."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FAMILIES, REAL_TOKENIZERS, ROOT, make_backbone, make_config
from safetensors.torch import load_file, save_file

from arena_distill.config.backbone import TINY, Backbone
from arena_distill.config.head import Head
from arena_distill.config.phases.encoding import BackboneSettings
from arena_distill.encoding.tokenization import load_tokenizer, safe_pad_id
from arena_distill.errors import InputError
from arena_distill.files.artifacts import read_json
from arena_distill.models.loading import HEADS, check_length, load_classifier
from arena_distill.models.preparation import prepare_backbone

GGUF = ROOT / "models" / "smollm2-135m-instruct.gguf"

Folders = Callable[[str], Path]


def head_of(model: Any) -> torch.Tensor:
    (head,) = (getattr(model, name) for name in HEADS if hasattr(model, name))
    weight: torch.Tensor = head.weight
    return weight


@pytest.mark.parametrize("family", [*FAMILIES, "bert"])
def test_the_same_seed_gives_the_same_head(family: str, backbones: Folders) -> None:
    folder = backbones(family)
    first = head_of(load_classifier(folder, head_seed=5))
    torch.randn(7)
    again = head_of(load_classifier(folder, head_seed=5))
    other = head_of(load_classifier(folder, head_seed=6))
    assert first.shape == (3, 32)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_judge_is_nearly_indifferent(family: str, backbones: Folders) -> None:
    """The initial head adds little noise: a default one would add five times as much."""
    model = load_classifier(backbones(family), pad_token_id=0, head_seed=3).eval()
    ids = torch.randint(3, 40, (8, 20), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = model(input_ids=ids).logits
    assert 0 < logits.abs().max() < 0.6


def test_the_configuration_names_the_classes(backbone: Path) -> None:
    model = load_classifier(backbone, pad_token_id=2, head_seed=0)
    assert model.config.num_labels == 3
    assert model.config.id2label == {0: "model_a", 1: "model_b", 2: "tie"}
    assert model.config.pad_token_id == 2
    assert not model.config.use_cache  # keys and values are never read again
    assert model.dtype == torch.float32
    assert load_classifier(backbone, dtype=torch.bfloat16, head_seed=0).dtype == torch.bfloat16


def test_a_saved_head_is_kept(backbone: Path, tmp_path: Path) -> None:
    model = load_classifier(backbone, head_seed=9)
    model.save_pretrained(tmp_path)
    assert torch.equal(head_of(load_classifier(tmp_path, head_seed=1)), head_of(model))


@pytest.mark.parametrize("load", [load_classifier, load_tokenizer])
def test_a_missing_folder_is_an_error(load: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="missing"):
        load(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty"):
        load(tmp_path / "empty")


def test_a_head_of_other_classes_is_an_error(backbones: Folders, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(backbones("llama"), num_labels=2)
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"score.weight is \[2, 32\], not \[3, 32\]"):
        load_classifier(tmp_path)


# --- tensors that are missing -----------------------------------------------------------------------


def edited(source: Path, folder: Path, change: Callable[[str], str | None]) -> Path:
    """A copy of a model, its tensors under the names that `change` gives; None leaves one out."""
    shutil.copytree(source, folder)
    weights = {change(k): v for k, v in load_file(folder / "model.safetensors").items()}
    weights.pop(None, None)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


LACKS: dict[str, tuple[Callable[[str], str | None], str]] = {
    "layer": (
        lambda name: None if "layers.1." in name else name,
        r"missing: 9 \(model\.layers\.1\.\S+, \S+, \S+, …\): its weights are incomplete",
    ),
    "norm": (lambda name: None if name.endswith("norm.weight") else name, r"missing: 5 \(model\."),
    "prefix": (
        lambda name: "other." + name,
        r"missing: \d+ \(model\..*, and \d+ \(other\..*\) are unknown to the model",
    ),
}


@pytest.mark.parametrize("lacks", LACKS)
def test_a_judge_of_an_incomplete_model_is_refused(
    lacks: str, backbones: Folders, tmp_path: Path
) -> None:
    change, message = LACKS[lacks]
    folder = edited(backbones("llama"), tmp_path / "incomplete", change)
    with pytest.raises(InputError, match=f"incomplete: tensors are {message}") as error:
        load_classifier(folder, head_seed=0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("lacks", LACKS)
def test_no_backbone_is_prepared_of_an_incomplete_model(
    lacks: str, backbones: Folders, tmp_path: Path
) -> None:
    folder = edited(backbones("llama"), tmp_path / "incomplete", LACKS[lacks][0])
    backbone = Backbone(path=str(folder), tokenizer=str(backbones("bert")))
    with pytest.raises(InputError, match="incomplete: tensors are missing: "):
        prepare_backbone(tmp_path / "x", settings=BackboneSettings.of(backbone))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("family", [*FAMILIES, "bert"])
def test_a_finished_judge_has_its_head(family: str, backbones: Folders, tmp_path: Path) -> None:
    load_classifier(backbones(family), head_seed=0).save_pretrained(tmp_path / "merged")
    load_classifier(tmp_path / "merged")
    headless = edited(
        tmp_path / "merged", tmp_path / "headless", lambda n: None if n.startswith(HEADS) else n
    )
    with pytest.raises(
        InputError, match=r"headless: tensors are missing: [12] \((score|classifier)"
    ):
        load_classifier(headless)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_language_models_head_is_neither_missing_nor_in_the_way(
    family: str, tied: bool, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    config = make_config(family, 64)
    config.tie_word_embeddings = tied
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert load_classifier(tmp_path, head_seed=0).num_labels == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_the_shipped_backbones_are_whole(family: str) -> None:
    assert load_classifier(TINY / family, head_seed=0).num_labels == 3


# --- prepared backbones -----------------------------------------------------------------------------


def plain(folder: Path) -> Any:
    """Load with plain transformers, as anybody would."""
    from transformers import AutoModelForSequenceClassification

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert "quantization_config" not in config
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3).eval()


@pytest.mark.parametrize("family", [*FAMILIES, "bert"])
def test_the_first_layers_make_a_backbone(family: str, tmp_path: Path) -> None:
    source = make_backbone(family, tmp_path / "whole", layers=3)
    prepare_backbone(
        tmp_path / "cut", settings=BackboneSettings.of(Backbone(path=str(source), layers=2))
    )
    config = json.loads((tmp_path / "cut" / "config.json").read_text(encoding="utf-8"))
    assert config["num_hidden_layers"] == 2
    if "layer_types" in config:
        assert len(config["layer_types"]) == 2
    whole, cut = plain(source).state_dict(), plain(tmp_path / "cut").state_dict()
    for name in HEADS:
        cut = {k: v for k, v in cut.items() if not k.startswith(name)}
    assert {k for k in whole if ".2." not in k and not k.startswith(HEADS)} == set(cut)
    for name, weight in cut.items():
        assert torch.equal(weight, whole[name]), name
    tokenizers = [load_tokenizer(folder) for folder in (source, tmp_path / "cut")]
    assert tokenizers[0]("a b").input_ids == tokenizers[1]("a b").input_ids
    origin = read_json(tmp_path / "cut" / "provenance.json")
    assert origin["settings"]["backbone"]["path"] == str(source)


def test_a_cut_backbone_scores_like_the_whole_one_stopped_early(tmp_path: Path) -> None:
    source = make_backbone("gemma2", tmp_path / "whole", layers=3)
    prepare_backbone(
        tmp_path / "cut", settings=BackboneSettings.of(Backbone(path=str(source), layers=2))
    )
    ids = torch.tensor([[0, 40, 41, 42, 43]])
    with torch.inference_mode():
        states = (
            load_classifier(source, head_seed=0)
            .eval()
            .model(ids, output_hidden_states=True)
            .hidden_states
        )
        cut = (
            load_classifier(tmp_path / "cut", head_seed=0)
            .eval()
            .model(ids, output_hidden_states=True)
        )
    torch.testing.assert_close(states[1], cut.hidden_states[1])


def test_more_layers_than_there_are_is_an_error(backbones: Folders, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"backbone\.layers: 3, but .* has only 2"):
        prepare_backbone(
            tmp_path / "x",
            settings=BackboneSettings.of(Backbone(path=str(backbones("llama")), layers=3)),
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", FAMILIES)
def test_another_tokenizer_gives_embeddings_of_its_size(
    family: str, backbones: Folders, tmp_path: Path
) -> None:
    backbone = Backbone(path=str(backbones(family)), tokenizer=str(backbones("bert")))
    for name in ("one", "two"):
        prepare_backbone(tmp_path / name, settings=BackboneSettings.of(backbone))
    tokenizer = load_tokenizer(tmp_path / "one")
    assert tokenizer.cls_token == "[CLS]"
    model = load_classifier(tmp_path / "one", pad_token_id=safe_pad_id(tokenizer), head_seed=0)
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    before = load_classifier(backbones(family), head_seed=0).model.layers[0].state_dict()
    for name, weight in model.model.layers[0].state_dict().items():
        assert torch.equal(weight, before[name])


@pytest.mark.parametrize(
    "backbone",
    [
        Backbone(path="nowhere/model", layers=1),
        Backbone(gguf="nowhere/model.gguf"),
        Backbone(path="nowhere/model", tokenizer="nowhere/tokenizer"),
    ],
)
def test_a_source_that_is_missing_is_an_error(backbone: Backbone, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such backbone"):
        prepare_backbone(tmp_path / "x", settings=BackboneSettings.of(backbone))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layers", [None, 1])
def test_a_hub_model_is_downloaded_and_cut(
    layers: int | None, backbones: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With sharded weights, as of big models. A cut model keeps no file of the whole one."""
    import huggingface_hub

    asked: dict[str, Any] = {}
    commit = "c" * 40

    def download(repo: str, *, local_dir: Path, **options: Any) -> None:
        asked.update(options, repo=repo)
        shutil.copytree(backbones("llama"), local_dir, dirs_exist_ok=True)
        model = load_classifier(backbones("llama"), head_seed=0).model
        Path(local_dir, "model.safetensors").unlink()
        model.save_pretrained(local_dir, max_shard_size="20KB")

    def info(self: Any, repo: str, *, revision: str, repo_type: str) -> SimpleNamespace:
        assert (repo, revision, repo_type) == ("org/model", "abc", "model")
        return SimpleNamespace(sha=commit)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", info)
    whole = Backbone(hub="org/model", revision="abc")
    prepare_backbone(tmp_path / "whole", settings=BackboneSettings.of(whole))
    backbone = Backbone(hub="org/model", revision="abc", layers=layers)
    if layers:
        with pytest.raises(InputError, match="download org/model first"):
            prepare_backbone(tmp_path / "x", settings=BackboneSettings.of(backbone))
        prepare_backbone(
            tmp_path / "x", settings=BackboneSettings.of(backbone), source=tmp_path / "whole"
        )
    else:
        prepare_backbone(tmp_path / "x", settings=BackboneSettings.of(backbone))
    assert (asked["repo"], asked["revision"]) == ("org/model", commit)
    made = read_json(tmp_path / "whole/provenance.json")["settings"]
    assert (made["backbone"]["revision"], made["commit"]) == ("abc", commit)
    assert not any("bin" in pattern or pattern == "*" for pattern in asked["allow_patterns"])
    model = load_classifier(tmp_path / "x", head_seed=0)
    assert model.config.num_hidden_layers == (layers or 2)
    names = {path.name for path in (tmp_path / "x").iterdir()}
    assert ("model.safetensors.index.json" in names) == (layers is None)


def test_a_hub_that_cannot_be_reached_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", fail)
    with pytest.raises(InputError, match=r"org/model@abc: cannot be downloaded: no route; check"):
        prepare_backbone(
            tmp_path / "x", settings=BackboneSettings.of(Backbone(hub="org/model", revision="abc"))
        )


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.skipif(not GGUF.is_file(), reason=f"no {GGUF}; scripts/fetch_weights.sh fetches it")
def test_a_gguf_file_becomes_an_ordinary_folder(tmp_path: Path) -> None:
    prepare_backbone(
        tmp_path / "x", settings=BackboneSettings.of(Backbone(gguf=str(GGUF), layers=2))
    )
    model = plain(tmp_path / "x")
    assert model.config.num_hidden_layers == 2
    assert model.dtype == torch.bfloat16
    tokenizer = load_tokenizer(tmp_path / "x")
    pad = safe_pad_id(tokenizer)
    assert pad != tokenizer.eos_token_id
    judge = load_classifier(tmp_path / "x", pad_token_id=pad, head_seed=0).eval()
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.inference_mode():
        assert np.isfinite(judge(input_ids=ids).logits.numpy()).all()
    assert tokenizer.decode(ids[0]) == "The capital of France is"


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "name"), [("llama", "llama3"), ("qwen2", "qwen2_5"), ("gemma2", "gemma2")]
)
def test_a_real_tokenizer_keeps_its_ids_on_another_model(
    family: str, name: str, backbones: Folders, tmp_path: Path
) -> None:
    """The class that AutoTokenizer picks depends on the model's type: it must read the same text."""
    source = REAL_TOKENIZERS / name
    if not source.is_dir():
        pytest.skip(f"no tokenizer in {source}; scripts/fetch_tokenizers.sh fetches it")
    backbone = Backbone(path=str(backbones(family)), tokenizer=str(source))
    prepare_backbone(tmp_path / "x", settings=BackboneSettings.of(backbone))
    before, after = load_tokenizer(source), load_tokenizer(tmp_path / "x")
    text = "What's 12345 + 67890?\n\n\tdef f(x):  return x\u2028é 你好 🏳️‍🌈"
    ask = {"add_special_tokens": False, "split_special_tokens": True}
    assert before(text, **ask).input_ids == after(text, **ask).input_ids
    assert (before.bos_token_id, before.eos_token_id) == (after.bos_token_id, after.eos_token_id)
    assert safe_pad_id(after) == safe_pad_id(before)
    model = load_classifier(tmp_path / "x", pad_token_id=safe_pad_id(after), head_seed=0)
    assert model.get_input_embeddings().num_embeddings == len(after)


def test_sequences_beyond_the_models_positions_are_refused() -> None:
    model = SimpleNamespace(
        config=SimpleNamespace(max_position_embeddings=512, name_or_path="bert")
    )
    check_length(model, 512)
    with pytest.raises(InputError, match="bert: sequences have 513 tokens.*512.*max_length"):
        check_length(model, 513)


# --- pooling ------------------------------------------------------------------------------------------


def test_the_mean_is_over_the_sequences_own_tokens(family: str, backbones: Folders) -> None:
    """With mean pooling, logits are the mean of the logits of each token, without padding."""
    folder = backbones(family)
    mean, last = (
        load_classifier(
            folder, head=Head(kind="joint", pooling=pooling), pad_token_id=3, head_seed=0
        ).eval()
        for pooling in ("mean", "last")
    )
    ids = torch.tensor([[10, 11, 12, 13, 14], [15, 16, 3, 3, 3]])
    with torch.inference_mode():
        said = mean(input_ids=ids, attention_mask=(ids != 3).long()).logits
        for row, tokens in zip(said, (ids[0], ids[1, :2]), strict=True):
            states = last.base_model(tokens[None]).last_hidden_state
            torch.testing.assert_close(row, last.score(states)[0].mean(0), atol=1e-5, rtol=1e-4)
            alone = mean(input_ids=tokens[None]).logits[0]  # no mask: all of it
            torch.testing.assert_close(row, alone, atol=1e-5, rtol=1e-4)


def test_an_encoder_pools_in_its_own_way(backbones: Folders) -> None:
    with pytest.raises(InputError, match=r"head\.pooling: mean is for decoders; a bert"):
        load_classifier(backbones("bert"), head=Head(kind="joint", pooling="mean"), head_seed=0)


def test_a_judge_of_means_may_become_a_backbone_of_others(
    backbones: Folders, tmp_path: Path
) -> None:
    mean = load_classifier(backbones("llama"), head=Head(kind="joint", pooling="mean"), head_seed=0)
    mean.save_pretrained(tmp_path)
    assert read_json(tmp_path / "config.json")["head_pooling"] == "mean"
    last = load_classifier(tmp_path, head=Head(kind="joint"))
    assert last.config.head_pooling == "last"
