"""Merging: the two means of adapters, the head, the output folder, errors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Run
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification as AutoModel

from arena_distill.config.encoding import Encoding
from arena_distill.config.phases.deployment import MergeSettings
from arena_distill.deployment import merging
from arena_distill.deployment.fold_weights import FoldMerger
from arena_distill.deployment.merging import merge_folds
from arena_distill.encoding.sequences import read_tokens
from arena_distill.encoding.views import encode_views
from arena_distill.errors import InputError
from arena_distill.metrics import log_loss, mean_over_views
from arena_distill.models.heads import verdicts
from arena_distill.models.loading import load_classifier
from arena_distill.models.scoring import score
from arena_distill.verdicts import Votes

torch = pytest.importorskip("torch")

FAMILIES = ("llama", "qwen2", "gemma2")
TARGETS = ["q_proj", "v_proj", "down_proj"]
WORDS = ["[PROMPT]", "[RESPONSE_A]", "[RESPONSE_B]", "what", "is", "one", "and", "two"]


def base_model(family: str, hidden: int = 16) -> Any:
    from transformers import (
        AutoModelForSequenceClassification,
        Gemma2Config,
        LlamaConfig,
        Qwen2Config,
    )

    kinds: dict[str, Any] = {"llama": LlamaConfig, "qwen2": Qwen2Config, "gemma2": Gemma2Config}
    config = kinds[family](
        vocab_size=32,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=hidden // 2,
        pad_token_id=0,
        num_labels=3,
    )
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(config)


def save_backbone(model: Any, folder: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {w: i for i, w in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
    ).save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def save_adapter(folder: Path, backbone: Path, seed: int, **options: Any) -> Path:
    """A LoRA adapter and head without zeros, as after training."""
    from peft import LoraConfig, get_peft_model

    from arena_distill.models.loading import load_classifier

    choices = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "SEQ_CLS"} | options
    model = get_peft_model(load_classifier(backbone, head_seed=0), LoraConfig(**choices))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2 if "lora" in name else 0.5)
    model.save_pretrained(folder)
    return folder


def merge(backbone: Path, adapters: list[Path], output: Path, **options: Any) -> Any:
    from transformers import AutoModelForSequenceClassification

    choices: dict[str, Any] = {"average": "products", "heads": "average", "precision": "fp32"}
    settings = MergeSettings(version=1, judge="j", encoding=Encoding(), **(choices | options))
    merge_folds(backbone, adapters, output, settings=settings)
    return AutoModelForSequenceClassification.from_pretrained(output)


def judge(backbone: Path, adapter: Path) -> Any:
    from peft import PeftModel

    from arena_distill.models.loading import load_classifier

    return PeftModel.from_pretrained(
        load_classifier(backbone, pad_token_id=0, head_seed=0), adapter
    )


def logits(model: Any) -> Any:
    ids = torch.arange(3, 15).reshape(2, 6) % 12 + 1
    with torch.no_grad():
        return model.eval()(ids).logits


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_backbone(base_model("llama"), tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="module")
def adapters(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return [save_adapter(folder / f"fold_{k}", backbone, k) for k in range(3)]


def weights(model: Any) -> dict[str, Any]:
    return {name: value.double() for name, value in model.state_dict().items()}


def deltas(backbone: Path, adapter: Path) -> dict[str, Any]:
    """What PEFT itself adds to each layer."""
    base, merged = weights(base_model("llama")), judge(backbone, adapter).merge_and_unload()
    return {k: v - base[k] for k, v in weights(merged).items()}


# --- the means ------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    scalings=st.lists(st.floats(0.1, 4), min_size=4, max_size=4),
    seed=st.integers(0, 99),
)
def test_mean_of_products_is_what_its_name_says(
    ranks: list[int], scalings: list[float], seed: int
) -> None:
    torch.manual_seed(seed)
    parts = [(torch.randn(r, 6), torch.randn(7, r), s) for r, s in zip(ranks, scalings)]  # noqa: B905
    expected = sum(s * (b.double() @ a.double()) for a, b, s in parts) / len(parts)
    assert torch.allclose(
        merging._mean_of_products(parts, [1 / len(parts)] * len(parts)).double(),
        expected,
        atol=1e-5,
    )


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.floats(0.1, 4), st.integers(0, 99))
def test_product_of_means_is_what_its_name_says(
    rank: int, folds: int, scaling: float, seed: int
) -> None:
    torch.manual_seed(seed)
    parts = [(torch.randn(rank, 6), torch.randn(7, rank), scaling) for _ in range(folds)]
    a, b = (torch.stack([p[i].double() for p in parts]).mean(0) for i in (0, 1))
    found = merging._product_of_means(parts, [1 / len(parts)] * len(parts))
    assert found is not None
    assert torch.allclose(found.double(), scaling * b @ a, atol=1e-5)


def test_products_average_what_peft_would_merge(
    backbone: Path, adapters: list[Path], tmp_path: Path
) -> None:
    merged, base = weights(merge(backbone, adapters, tmp_path / "m")), weights(base_model("llama"))
    each = [deltas(backbone, adapter) for adapter in adapters]
    for name, weight in merged.items():
        expected = sum(delta[name] for delta in each) / len(each)
        assert torch.allclose(weight - base[name], expected, atol=1e-6), name


def test_factors_average_a_and_b_apart(
    backbone: Path, adapters: list[Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    merged = weights(merge(backbone, adapters, tmp_path / "m", average="factors"))
    base = weights(base_model("llama"))
    files = [load_file(adapter / "adapter_model.safetensors") for adapter in adapters]
    name = "model.layers.1.mlp.down_proj"
    a, b = (
        sum(f[f"base_model.model.{name}.lora_{x}.weight"].double() for f in files) / len(files)
        for x in "AB"
    )
    assert torch.allclose(merged[f"{name}.weight"] - base[f"{name}.weight"], 2 * b @ a, atol=1e-6)
    about = json.loads((tmp_path / "m" / "merge.json").read_text())
    assert about["factors_gap"] > 0.1
    assert about["provenance"]["settings"]["judge"] == "j"


@pytest.mark.parametrize("average", ["factors", "products"])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_fold_is_that_fold(family: str, average: str, tmp_path: Path) -> None:
    backbone = save_backbone(base_model(family), tmp_path / "base")
    adapter = save_adapter(tmp_path / "fold_0", backbone, 1)
    merged = merge(backbone, [adapter], tmp_path / "m", average=average)
    single = judge(backbone, adapter)
    assert torch.allclose(logits(merged), logits(single), atol=1e-5)
    for name, weight in weights(single.merge_and_unload()).items():
        assert torch.allclose(weights(merged)[name], weight, atol=1e-6), name


def test_identical_folds_leave_no_gap(backbone: Path, adapters: list[Path], tmp_path: Path) -> None:
    same = [adapters[0]] * 3
    means = [
        merge(backbone, same, tmp_path / average, average=average, heads=heads)
        for average, heads in (("factors", "first"), ("products", "average"))
    ]
    assert torch.allclose(logits(means[0]), logits(means[1]), atol=1e-5)
    assert json.loads((tmp_path / "factors" / "merge.json").read_text())["factors_gap"] < 1e-6


def test_folds_of_different_rank_have_a_mean_of_products_only(
    backbone: Path, tmp_path: Path
) -> None:
    folds = [
        save_adapter(tmp_path / "fold_0", backbone, 0),
        save_adapter(tmp_path / "fold_1", backbone, 1, r=2, use_rslora=True),
        save_adapter(tmp_path / "fold_2", backbone, 2, alpha_pattern={"q_proj": 16}),
    ]
    merged, base = weights(merge(backbone, folds, tmp_path / "m")), weights(base_model("llama"))
    each = [deltas(backbone, fold) for fold in folds]
    for name, weight in merged.items():
        expected = sum(delta[name] for delta in each) / 3
        assert torch.allclose(weight - base[name], expected, atol=1e-6), name
    assert json.loads((tmp_path / "m" / "merge.json").read_text())["factors_gap"] is None
    with pytest.raises(InputError, match=r"differ in rank or scaling.*average: products"):
        merge(backbone, folds, tmp_path / "n", average="factors")
    assert not (tmp_path / "n").exists()


def test_head_is_averaged_or_the_first(
    backbone: Path, adapters: list[Path], tmp_path: Path
) -> None:
    heads = [judge(backbone, a).merge_and_unload().score.weight for a in adapters]
    first = merge(backbone, adapters, tmp_path / "f", heads="first").score.weight
    mean = merge(backbone, adapters, tmp_path / "a", heads="average").score.weight
    assert torch.equal(first, heads[0])
    assert torch.allclose(mean, sum(heads) / 3, atol=1e-6)


def test_the_first_head_is_of_a_fold_that_is_merged(
    backbone: Path, adapters: list[Path], tmp_path: Path
) -> None:
    settings = MergeSettings(
        version=1,
        judge="j",
        encoding=Encoding(),
        average="products",
        heads="first",
        precision="fp32",
    )
    merge_folds(backbone, adapters, tmp_path / "m", settings=settings, weights=[0, 0.5, 0.5])
    merged = judge(backbone, adapters[1]).merge_and_unload().score.weight
    assert torch.equal(load_file(tmp_path / "m" / "model.safetensors")["score.weight"], merged)


def test_a_soup_is_chosen_with_the_head_that_it_gets(
    make_run: Callable[..., Run], tmp_path: Path
) -> None:
    run = make_run("llama")
    adapters = [save_adapter(tmp_path / f"fold_{k}", run.backbone, k) for k in range(2)]
    tokens = read_tokens(run.tokens)
    votes, losses = Votes.hard(np.arange(len(tokens)) % 3), []
    for heads in ("first", "average"):
        settings = MergeSettings(
            version=1, judge="j", encoding=Encoding(max_length=96), average="products", heads=heads,
            precision="fp32",
        )  # fmt: skip
        pot = FoldMerger(run.backbone, adapters, tokens, settings, 4096)
        merge_folds(run.backbone, adapters, tmp_path / heads, settings=settings)
        model = load_classifier(tmp_path / heads, pad_token_id=tokens.vocabulary.pad)
        views = encode_views(tokens, settings.encoding, settings.head)
        outputs = [score(model, view, batch_tokens=4096, progress=False) for view in views]
        merged = mean_over_views(verdicts(np.stack(outputs, axis=1), settings.head))
        losses.append(log_loss(merged, votes))
        assert pot.log_loss([0, 1], votes) == pytest.approx(losses[-1], abs=1e-5)
    assert abs(losses[0] - losses[1]) > 0.01


# --- all weights ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_folds(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Folds without LoRA: other weights each, in shards of a few tensors."""
    folders = [tmp_path_factory.mktemp("whole") / f"fold_{k}" for k in range(3)]
    for k, folder in enumerate(folders):
        model = base_model("llama")
        torch.manual_seed(k)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        model.save_pretrained(folder, max_shard_size="10KB")
        assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folders


@settings(max_examples=20)
@given(
    counts=st.lists(st.integers(0, 9), min_size=3, max_size=3).filter(any),
    heads=st.sampled_from(["first", "average"]),
)
def test_merged_weights_are_the_weighted_mean_of_the_folds(
    counts: list[int], heads: Any, whole_folds: list[Path]
) -> None:
    shares = [count / sum(counts) for count in counts]
    folds = merging.read_adapters(whole_folds)
    model = base_model("llama")
    assert merging.merge_into(model, folds, shares, "factors", heads, torch.float32) is None
    each = [weights(AutoModel.from_pretrained(folder)) for folder in whole_folds]
    for name, merged in weights(model).items():
        expected = sum(w * fold[name] for w, fold in zip(shares, each, strict=True))
        if heads == "first" and name == "score.weight":
            expected = each[[bool(count) for count in counts].index(True)][name]
        assert float((merged - expected).abs().max()) < 1e-7, name


def test_a_merged_folder_of_whole_folds(
    backbone: Path, whole_folds: list[Path], tmp_path: Path
) -> None:
    merged = weights(merge(backbone, whole_folds, tmp_path / "m"))
    half = merge(backbone, whole_folds, tmp_path / "h", precision="bf16").state_dict()
    for name, weight in merged.items():
        assert torch.equal(weight.float().bfloat16(), half[name]), name  # rounded once
    about = json.loads((tmp_path / "m/merge.json").read_text())
    assert (about["average"], about["targets"], about["factors_gap"]) == ("weights", 0, None)


def test_whole_folds_of_another_kind_are_refused(
    backbone: Path, adapters: list[Path], whole_folds: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="is in only one of them"):
        merge(backbone, [whole_folds[0], adapters[0]], tmp_path / "m")
    wide = save_backbone(base_model("llama", hidden=32), tmp_path / "wide")
    with pytest.raises(InputError, match=r"fold_0: its \S+ \(\d.*\) does not fit the backbone"):
        merge(wide, whole_folds, tmp_path / "m")
    deep = base_model("llama")
    deep.config.num_hidden_layers = 3
    deep.config.layer_types = None
    save_backbone(type(deep)(deep.config), tmp_path / "deep")
    with pytest.raises(InputError, match=r"fold_0: lacks model\.layers\.2\."):
        merge(tmp_path / "deep", whole_folds, tmp_path / "m")


# --- the folder -----------------------------------------------------------------------------------


def test_folder_is_an_ordinary_model(backbone: Path, adapters: list[Path], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    model = merge(backbone, adapters, tmp_path / "m", precision="bf16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config.id2label == {0: "model_a", 1: "model_b", 2: "tie"}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    assert tokenizer.pad_token_id == model.config.pad_token_id == 0
    # Rounded once: from float32, not step by step in half precision.
    exact = merge(backbone, adapters, tmp_path / "x")
    for name, value in exact.state_dict().items():
        assert torch.equal(value.bfloat16(), model.state_dict()[name]), name


def test_same_folds_give_the_same_bytes(
    backbone: Path, adapters: list[Path], tmp_path: Path
) -> None:
    for name in ("a", "b"):
        merge(backbone, adapters, tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert "model.safetensors" in files
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


# --- what is refused ------------------------------------------------------------------------------


def test_no_adapter(backbone: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no adapter to merge"):
        merge(backbone, [], tmp_path / "m")


def test_missing_adapter(backbone: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"fold_7: cannot read an adapter"):
        merge(backbone, [tmp_path / "fold_7"], tmp_path / "m")


def test_adapter_of_another_backbone(adapters: list[Path], tmp_path: Path) -> None:
    wide = save_backbone(base_model("llama", hidden=32), tmp_path / "wide")
    with pytest.raises(InputError, match=r"fold_0: .*in the backbone.*from another one"):
        merge(wide, adapters, tmp_path / "m")


def test_adapter_of_deeper_backbone(backbone: Path, adapters: list[Path], tmp_path: Path) -> None:
    shallow = base_model("llama")
    shallow.model.layers = shallow.model.layers[:1]
    shallow.config.num_hidden_layers = 1
    shutil.copytree(backbone, tmp_path / "shallow")
    shallow.save_pretrained(tmp_path / "shallow")
    with pytest.raises(InputError, match=r"layers\.1\..* no such layer"):
        merge(tmp_path / "shallow", adapters, tmp_path / "m")


def test_folds_with_other_targets(backbone: Path, adapters: list[Path], tmp_path: Path) -> None:
    other = save_adapter(tmp_path / "other", backbone, 0, target_modules=["q_proj", "v_proj"])
    with pytest.raises(InputError, match=r"down_proj is in only one of them"):
        merge(backbone, [adapters[0], other], tmp_path / "m")


def test_half_a_pair_of_factors(backbone: Path, adapters: list[Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    half = Path(shutil.copytree(adapters[0], tmp_path / "half"))
    file = half / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(InputError, match=r"half: .* missing: 1 \(\S*layers\.1\S*lora_B\.weight\)"):
        merge(backbone, [half, adapters[1]], tmp_path / "m")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "lora_only", "target_modules": ["q_proj"]}, "bias: none"),
        ({"task_type": None}, "no head"),
        ({"init_lora_weights": "pissa"}, r"initialisation \(pissa\) changed the backbone"),
    ],
)
def test_other_kinds_of_adapters(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    family = "qwen2" if "bias" in options else "llama"
    backbone = save_backbone(base_model(family), tmp_path / "base")
    adapter = save_adapter(tmp_path / "fold_0", backbone, 0, **options)
    with pytest.raises(InputError, match=message):
        merge(backbone, [adapter], tmp_path / "m")
