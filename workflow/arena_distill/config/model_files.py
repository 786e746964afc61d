"""What a model's folder says of itself: read from its JSON and its weights' headers, in a moment.

Nothing is loaded. What these files do not say is not checked here; loading the model checks it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, get_args

from arena_distill.config.vocabulary import Bits, GroupSize

TOKENIZERS = (
    *("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("vocab.json", "vocab.txt"),
)
"""Files that a tokenizer may be made of; one is enough."""

WEIGHTS, SHARDS = "model.safetensors", "model.safetensors.index.json"
_UNREAD = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf")
_IN_BLOCK = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.\d+\.")
_HEADER = 100_000_000  # bytes; safetensors itself reads no longer one
_PACKED = ("qweight", "qzeros", "scales", "g_idx")  # what GPTQ makes of a layer's weight


@dataclass(frozen=True)
class ModelFolder:
    """A Hugging Face folder."""

    path: Path

    def problems(self) -> Iterator[str]:
        """What is wrong with the folder, whatever judge it is for; each a line without its key."""
        if not isinstance(self.described, dict):
            yield f"{self.path}/config.json is no JSON object: fetch the model again"
            return
        kind, known = self.described.get("model_type"), classifiers()
        if known and kind not in known:
            own = " (it brings Python code of its own, which is never run)"
            yield (
                f"{self.path} is a {kind or 'model without model_type'}, of which transformers has no "
                f"classifier{own if 'auto_map' in self.described else ''}: take another model"
            )
        yield from self.weight_problems()
        yield from self.tokenizer_problems()
        largest, known_ids = self._largest_id, self.config.get("vocab_size")
        if largest and known_ids and largest >= known_ids:
            yield (
                f"{self.path}: its tokenizer gives ids up to {largest}, the model has {known_ids} "
                "embeddings: this tokenizer is not this model's; copy the model's own into the folder"
            )

    def tokenizer_problems(self) -> Iterator[str]:
        """What is wrong with it as a tokenizer's folder."""
        if not any((self.path / name).is_file() for name in TOKENIZERS):
            yield f"{self.path} has no tokenizer ({', '.join(TOKENIZERS[:2])} …): copy it there"

    def weight_problems(self) -> Iterator[str]:
        """What is wrong with its weights: missing, not whole, not safetensors, of fewer layers."""
        if self.files is None:
            unread = [file.name for pattern in _UNREAD for file in self.path.glob(pattern)]
            if unread:
                yield (
                    f"{self.path} has weights as {unread[0]} alone, which is not read: save the model as "
                    f"safetensors{', or give the file as gguf' if unread[0].endswith('gguf') else ''}"
                )
            else:
                yield f"{self.path} has no weights ({WEIGHTS}): fetch the model again"
            return
        for file in self.files:
            if not file.is_file():
                yield f"{file} is not there: fetch the model again"
            elif self.headers.get(file) is None:
                yield f"{file} is not whole, or no safetensors (a pointer of Git LFS?): fetch it again"
        layers, tensors = self.config.get("num_hidden_layers"), self._tensors
        if isinstance(layers, int) and tensors and layers > tensors:
            yield (
                f"{self.path}/config.json says {layers} layers, but its weights have {tensors} tensors: "
                "fetch the model again"
            )

    def gptq_problems(self) -> Iterator[str]:
        """What keeps a judge's GPTQ weights from being unpacked as they were packed.

        A layer that lacks a tensor is left to the loading of the model, which names it.
        """
        again = "quantise the judge again, or fetch it again"
        about = (
            self.described.get("quantization_config") if isinstance(self.described, dict) else None
        )
        if not isinstance(about, dict) or about.get("quant_method") != "gptq":
            yield f"{self.path}/config.json has no quantization_config of GPTQ: {again}"
            return
        bits: Any = about.get("bits")
        size: Any = about.get("group_size")
        for key, value, known in (
            ("bits", bits, get_args(Bits)),
            ("group_size", size, get_args(GroupSize)),
            ("checkpoint_format", about.get("checkpoint_format", "gptq"), ("gptq",)),
        ):
            if value not in known:
                yield (
                    f"{self.path}/config.json: quantization_config.{key}: one of "
                    f"{', '.join(map(str, known))} expected, not {str(value)[:60]!r}: {again}"
                )
                return
        tensors = {
            n: about for header in self.headers.values() for n, about in (header or {}).items()
        }
        for name in tensors:
            layer, _, last = name.rpartition(".")
            parts = [tensors[n] for part in _PACKED if (n := f"{layer}.{part}") in tensors]
            if last == "qweight" and len(parts) == len(_PACKED) and not _packed(parts, bits, size):
                found = ", ".join(
                    f"{part} {about.get('dtype')} {about.get('shape')}"
                    for part, about in zip(_PACKED, parts, strict=True)
                )
                yield (
                    f"{self.path}: {layer} is not of {bits} bits in groups of {size}, as config.json has "
                    f"it ({found}): {again}"
                )

    @cached_property
    def described(self) -> Any:
        """Its config.json; None if that is none."""
        return _json(self.path / "config.json")

    @property
    def config(self) -> Mapping[str, Any]:
        """The part of it that is about text."""
        described = self.described if isinstance(self.described, dict) else {}
        return described.get("text_config") or described

    @cached_property
    def files(self) -> list[Path] | None:
        """Its weights; None where there are none as safetensors."""
        if (self.path / WEIGHTS).exists():
            return [self.path / WEIGHTS]
        index = _json(self.path / SHARDS)
        of_tensor = index.get("weight_map") if isinstance(index, dict) else None
        names = of_tensor.values() if isinstance(of_tensor, dict) else ()
        if not names or not all(isinstance(name, str) for name in names):
            return None
        return [self.path / name for name in sorted(set(names))]

    @cached_property
    def headers(self) -> dict[Path, dict[str, Any] | None]:
        """By file the header of its tensors; None of one that is not whole."""
        return {file: _header(file) for file in self.files or () if file.is_file()}

    @cached_property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Outputs and inputs of each module with a matrix; empty unless all weights are there."""
        if not self.files or any(self.headers.get(file) is None for file in self.files):
            return {}
        return {
            name.removesuffix(".weight"): tuple(about["shape"])
            for header in self.headers.values()
            for name, about in (header or {}).items()
            if name.endswith(".weight") and len(about.get("shape", ())) == 2
        }

    def fingerprint(self) -> str:
        """Names its architecture, not its weights: type, and names, shapes and dtypes of all tensors."""
        tensors = [
            (name, about.get("dtype"), about.get("shape"))
            for header in self.headers.values()
            for name, about in (header or {}).items()
            if name != "__metadata__"
        ]
        described = json.dumps([self.config.get("model_type"), sorted(tensors)])
        return hashlib.sha256(described.encode()).hexdigest()[:16]

    @property
    def _tensors(self) -> int:
        return sum(map(len, filter(None, self.headers.values())))

    def lacking(self, targets: tuple[str, ...]) -> list[str]:
        """Names of modules that it has none of; none, if its modules are not known."""
        return [
            target
            for target in targets
            if self.matrices
            and not any(name == target or name.endswith(f".{target}") for name in self.matrices)
        ]

    def linear_layers(self) -> dict[str, int]:
        """The linear layers of its blocks by their last name, and how many inputs each has."""
        blocks = {name: shape for name, shape in self.matrices.items() if _IN_BLOCK.search(name)}
        return {name.rpartition(".")[2]: inputs for name, (_, inputs) in blocks.items()}

    @cached_property
    def _largest_id(self) -> int | None:
        tokenizer = _json(self.path / "tokenizer.json")
        model = tokenizer.get("model") if isinstance(tokenizer, dict) else None
        vocabulary = model.get("vocab") if isinstance(model, dict) else None
        # Without added tokens: Gemma 3 has one for images, which has no embedding and is in no text.
        if isinstance(vocabulary, dict):
            return max(vocabulary.values(), default=None)
        return len(vocabulary) - 1 if isinstance(vocabulary, list) else None


@cache
def classifiers() -> frozenset[str]:
    """The model types that transformers has classifiers for; empty if transformers' table is not found.

    Read from the table's source, because importing it imports PyTorch, which takes seconds.
    """
    found = importlib.util.find_spec("transformers")
    for folder in found.submodule_search_locations or () if found else ():
        source = Path(folder, "models/auto/modeling_auto.py").read_text(encoding="utf-8")
        _, _, table = source.partition("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES = ")
        return frozenset(re.findall(r'\("([^"]+)", "', table.partition("\n)\n")[0]))
    return frozenset()


def _packed(parts: list[dict[str, Any]], bits: int, size: int) -> bool:
    """Whether `_PACKED` of a layer have the shapes and integers of these bits and groups."""
    shapes: list[Any] = [part.get("shape") for part in parts]
    try:
        (_, outputs), (inputs,) = shapes[2:]
        groups = -(-inputs // size)
        words = [[inputs * bits // 32, outputs], [groups, outputs * bits // 32]]
    except (TypeError, ValueError):
        return False
    integers = all(parts[i].get("dtype") == "I32" for i in (0, 1, 3))
    return integers and shapes[:3] == [*words, [groups, outputs]]


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def _header(file: Path) -> dict[str, Any] | None:
    """The header of a safetensors file; None if the file is none, or not whole."""
    try:
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(size)) if size < _HEADER else {}
        end = max(about["data_offsets"][1] for n, about in header.items() if n != "__metadata__")
        return header if file.stat().st_size == 8 + size + end else None
    except (OSError, ValueError, AttributeError, LookupError, TypeError, RecursionError):
        return None
