"""Train the tokenizers of the tiny backbones: byte-complete, with the special cases of their families."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from arena_distill.config.vocabulary import Family

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCABULARY = 1280
MAX_LENGTH = 4096

_SPECIAL: dict[Family, dict[str, str]] = {
    "llama": {
        "bos_token": "<|begin_of_text|>",
        "end_of_text": "<|end_of_text|>",
        "reserved_0": "<|reserved_special_token_0|>",
        "reserved_1": "<|reserved_special_token_1|>",
        "eos_token": "<|eot_id|>",
        "reserved_2": "<|reserved_special_token_2|>",
    },
    "qwen2": {
        "pad_token": "<|endoftext|>",
        "turn": "<|im_start|>",
        "eos_token": "<|im_end|>",
    },
    "gemma2": {
        "pad_token": "<pad>",
        "eos_token": "<eos>",
        "bos_token": "<bos>",
        "unk_token": "<unk>",
    },
}
# The published patterns; Llama keeps up to three digits together, Qwen2 one.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLIT = {"llama": rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}", "qwen2": rf"{_WORDS}|\p{{N}}|{_REST}"}
_GEMMA2_SPLIT = r"▁?[^▁\s\p{P}]+|\s+|▁?\p{P}+|▁+"


def train_tokenizer(family: Family, texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a BPE tokenizer with the family's special tokens; it encodes any text without loss.

    Llama's and Qwen2's are byte-level; Gemma-2's falls back to bytes.
    """
    from transformers import PreTrainedTokenizerFast

    special = _SPECIAL[family]
    reserved = list(special.values())
    alphabet: list[str] = []
    if family == "gemma2":
        core = Tokenizer(BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        core.normalizer = normalizers.Replace(" ", "▁")
        core.pre_tokenizer = pre_tokenizers.Split(Regex(_GEMMA2_SPLIT), "isolated")
        core.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        reserved += [f"<0x{byte:02X}>" for byte in range(256)]
    else:
        core = Tokenizer(BPE())
        core.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_SPLIT[family]), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        core.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=reserved,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    # The trainer gives fixed ids to special tokens only; bytes must not stay special, because
    # decoding would drop them.
    state = json.loads(core.to_str())
    state["added_tokens"] = [
        token for token in state["added_tokens"] if token["content"] in special.values()
    ]
    core = Tokenizer.from_str(json.dumps(state))
    roles = {role: token for role, token in special.items() if role.endswith("_token")}
    if bos := roles.get("bos_token"):
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos}:1 $B:1",
            special_tokens=[(bos, core.token_to_id(bos))],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, model_max_length=MAX_LENGTH, padding_side="right", **roles
    )
