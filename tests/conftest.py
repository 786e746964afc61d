"""Tiny models and tokenizers of the three families, made in a moment: tests need nothing else.

The three differ in what pooling, padding and begin of sequence trip over: Llama-like without a pad
token, Qwen2-like without begin of sequence, Gemma2-like with both and with soft-capping.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from checkouts import Checkout, link_gptq, make_checkout
from filelock import FileLock
from hypothesis import HealthCheck, settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A busy machine is no failure, and fixtures of this suite do not change between examples.
settings.register_profile(
    "arena",
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("arena")

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
REAL_TOKENIZERS = ROOT / "models" / "tokenizers"

FAMILIES = ("llama", "qwen2", "gemma2")

REAL = {"real_tokenizer", "reader", "llama_server", "auto_gptq"}
"""Fixtures of real tokenizers, models and libraries that `make test-real` fetches."""


def fixtures_of(item: pytest.Item) -> set[str]:
    return set(getattr(item, "fixturenames", ()))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark real components; of the files that need the finished run, one starts first, the others last."""
    for item in items:
        if REAL & fixtures_of(item):
            item.add_marker("real")
    waiting = {item.path for item in items if "finished" in fixtures_of(item)}
    first = max(waiting, default=None)
    items.sort(key=lambda item: 0 if item.path == first else 1 + (item.path in waiting))


SPECIAL_TOKENS: dict[str, dict[str, Any]] = {
    "llama": {
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
        "extra": ["<|finetune|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"],
    },
    "qwen2": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "extra": ["<|im_start|>"]},
    "gemma2": {
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "extra": [],
    },
    "bert": {
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "extra": ["[MASK]"],
    },
}

CORPUS = [
    "What is the capital of France? The capital of France is Paris.",
    "Write a short poem about the sea, please.\nThe sea is deep and the waves are high.",
    "User question Answer A Answer B [PROMPT] [RESPONSE_A] [RESPONSE_B]",
    "Explain how a bicycle stays upright. It stays upright because the rider steers.",
]


def make_tokenizer(special: dict[str, Any]) -> Any:
    """A byte-level BPE tokenizer of some 300 tokens with the given special ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    named = {name: text for name, text in special.items() if name != "extra"}
    extra = list(special.get("extra", []))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300 + len(named) + len(extra),
        special_tokens=[*dict.fromkeys([*named.values(), *extra])],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)


@pytest.fixture(scope="module", params=["llama3", "gemma2", "qwen2_5"])
def real_tokenizer(request: pytest.FixtureRequest) -> Any:
    folder = REAL_TOKENIZERS / request.param
    if not folder.is_dir():
        pytest.skip(f"no tokenizer in {folder}; scripts/fetch_tokenizers.sh fetches it")
    from arena_distill.encoding.tokenization import load_tokenizer

    return load_tokenizer(folder)


def make_config(family: str, vocab_size: int, *, layers: int = 2) -> Any:
    """A tiny configuration of a family; weights wide enough that every token moves the logits."""
    import transformers

    shape: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 2048,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if family == "bert":
        return transformers.BertConfig(**shape)
    shape |= {"num_key_value_heads": 2, "tie_word_embeddings": False}
    if family == "llama":
        return transformers.LlamaConfig(**shape)
    if family == "qwen2":
        return transformers.Qwen2Config(**shape)
    return transformers.Gemma2Config(
        **shape, head_dim=8, query_pre_attn_scalar=8, sliding_window=64
    )


def make_backbone(family: str, folder: Path, *, layers: int = 2) -> Path:
    """A random model and its tokenizer as an ordinary Hugging Face folder, without a head."""
    import torch
    from transformers import AutoModel

    tokenizer = make_tokenizer(SPECIAL_TOKENS[family])
    torch.manual_seed(7)
    model = AutoModel.from_config(make_config(family, len(tokenizer), layers=layers))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of tiny models by family, each made once."""
    import torch

    torch.set_num_threads(1)
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = make_backbone(family, tmp_path_factory.mktemp("backbones") / family)
        return made[family]

    return folder


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def backbone(family: str, backbones: Callable[[str], Path]) -> Path:
    return backbones(family)


# --- battles ----------------------------------------------------------------------------------------


def battles_table(rows: Sequence[dict[str, Any]]) -> pa.Table:
    """Canonical battles; a text stands for one turn, a label for a hard vote, the rest is filled in."""
    from arena_distill.battles.parts import SCHEMA

    filled = []
    for number, row in enumerate(rows):
        whole = {"id": str(number), "source": "train", "label": 0, "model_a": "a", "model_b": "b"}
        whole |= {
            "prompt": "p",
            "response_a": "x",
            "response_b": "y",
            "weight": 1,
            "group": 0,
        } | row
        for name in ("prompt", "response_a", "response_b"):
            turns: Any = whole[name]
            whole[name] = [turns] if isinstance(turns, str) else list(turns)
        label: Any = whole.pop("label")
        hard = None if label is None else [float(label == i) for i in range(3)]
        filled.append({"vote": hard} | whole)
    return grouped(pa.Table.from_pylist(filled, schema=SCHEMA))


def grouped(battles: pa.Table) -> pa.Table:
    """The same battles, their prompts numbered: tables of several calls know nothing of each other."""
    from arena_distill.battles.parts import SCHEMA
    from arena_distill.battles.prompts import prompt_groups

    groups = pa.array(prompt_groups(battles["prompt"]))
    return battles.set_column(SCHEMA.get_field_index("group"), SCHEMA.field("group"), groups)


def made_up_battles(
    train: int = 18, extra: int = 5, ut: int = 10, test: int = 3, *, seed: int = 0
) -> pa.Table:
    """Battles of many lengths; ids repeat between sources, and extra ones share train's prompts."""
    random = np.random.default_rng(seed)
    words = " ".join(CORPUS).split()

    def text(most: int) -> str:
        return " ".join(random.choice(words, int(random.integers(1, most + 1))))

    prompts = [f"{text(6)} {i}" for i in range(max(train, 1))]
    rows: list[dict[str, Any]] = []
    for source, count in (("train", train), ("extra", extra), ("ut", ut), ("test", test)):
        for i in range(count):
            prompt = prompts[i] if source != "ut" else f"{text(6)} ut {i}"
            rows.append(
                {
                    "id": str(i),
                    "source": source,
                    "prompt": [prompt, text(4)] if i % 4 == 1 else [prompt],
                    "response_a": [text(20), text(9)] if i % 4 == 1 else [text(20)],
                    "response_b": [text(20), text(9)] if i % 4 == 1 else [text(20)],
                    "label": None if source == "test" else i % 3,
                }
            )
    return battles_table(rows)


@dataclass(frozen=True)
class Run:
    """The files that stand before a judge is trained."""

    backbone: Path
    battles: Path
    tokens: Path
    folds: Path


@pytest.fixture(scope="session")
def make_run(
    backbones: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Run]:
    """Battles, tokens and folds for a family, as the workflow's earlier phases write them."""
    from arena_distill.battles.folds import assign_folds
    from arena_distill.config.phases.encoding import TokensSettings
    from arena_distill.encoding.tokenization import tokenize_battles
    from arena_distill.files.artifacts import write_parquet

    made: dict[tuple[str, str], Run] = {}

    def run(family: str, method: str = "stratified_group") -> Run:
        if (family, method) not in made:
            folder = tmp_path_factory.mktemp(f"run_{family}")
            battles = made_up_battles()
            write_parquet(battles, folder / "battles.parquet", {"phase": "battles"})
            tokens = folder / "tokens.parquet"
            tokenize_battles(
                folder / "battles.parquet",
                backbones(family),
                tokens,
                settings=TokensSettings(version=1),
            )
            folds = assign_folds(battles, method=method, n=3, seed=3)  # type: ignore[arg-type]
            write_parquet(folds, folder / "folds.parquet", {"phase": "folds"})
            made[family, method] = Run(
                backbones(family), folder / "battles.parquet", tokens, folder / "folds.parquet"
            )
        return made[family, method]

    return run


@pytest.fixture
def run(family: str, make_run: Callable[..., Run]) -> Run:
    return make_run(family)


# --- whole runs -------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A finished run: made once for all processes of the tests, copied for each.

    Two pytests that run at the same time share it in the folder ARENA_FINISHED.
    """
    base = tmp_path_factory.getbasetemp()
    own = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    shared = Path(os.environ.get("ARENA_FINISHED", own))
    with FileLock(shared / "finished.lock"):
        if not (shared / "finished").exists():
            checkout = make_checkout(shared / "unfinished")
            checkout.run()
            checkout.folder.rename(shared / "finished")
    mine = base / "finished-run"
    shutil.copytree(shared / "finished", mine, symlinks=True)
    link_gptq(mine)
    return Checkout(mine)
