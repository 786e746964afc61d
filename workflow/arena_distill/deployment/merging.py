"""Merge the folds into one dense model.

LoRA (Hu et al. 2021, arXiv:2106.09685) trains W + s·B·A. There are two means over the folds:

``products``  the mean of s·B·A, equal to the mean of the folds' dense models: exact, of any rank;
              folds may differ in rank and scaling.
``factors``   mean B times mean A. This is another matrix, which contains B₁·A₂ and all other mixed
              products. It is close to the exact mean only if the folds started from the same adapter
              and stayed near it; ``merge.json`` holds the distance.

Both are computed in float32, one matrix at a time, added to the backbone's weights before
quantisation, and rounded to the target dtype once.

Folds without LoRA (`lora: null`) are whole models: the mean of their weights is exact, in float32, one
fold's tensor at a time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from operator import iadd
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from arena_distill.config.model_files import ModelFolder
from arena_distill.config.phases.deployment import MergeSettings
from arena_distill.config.vocabulary import FoldAverage, FoldHeads
from arena_distill.encoding.tokenization import load_tokenizer, safe_pad_id
from arena_distill.errors import InputError, refusing
from arena_distill.files.artifacts import (
    REBUILD,
    atomic_directory,
    provenance,
    write_json,
)
from arena_distill.models.loading import HEADS, load_classifier

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


_PREFIX = "base_model.model."
_FACTORS = (".lora_A.weight", ".lora_B.weight")

# Other starts change the backbone's own weights: the adapter does not hold all changes.
_HARMLESS_STARTS = (True, False, "gaussian", "orthogonal", "eva")


def merge_folds(
    backbone: Path,
    adapters: Sequence[Path],
    output: Path,
    *,
    settings: MergeSettings,
    weights: Sequence[float] | None = None,
) -> None:
    """Merge the folds into the backbone → a Hugging Face folder.

    Memory holds the backbone (in the dtype of its file, or of the result) and three float32 copies of its
    largest matrix.

    Args:
        backbone: the folder that the folds were trained from, not quantised.
        adapters: one folder per fold (see ``models.adapters``), in the order of the folds.
        output: the folder to write: model, tokenizer, model card, ``merge.json``.
        weights: of the folds, with sum 1 (see ``fold_weights``); None: equal.

    Raises:
        InputError: there is no fold, one is neither plain LoRA with a head nor a whole model, they do not
            match each other or the backbone, or their factors cannot be averaged.
    """
    import torch

    from arena_distill.models.layer_reads import BIAS, WEIGHT, attach_head_of

    if not adapters:
        raise InputError(f"{output}: there is no adapter to merge")
    target = torch.float32 if settings.precision == "fp32" else torch.bfloat16
    folds = read_adapters(adapters)
    weights = weights or [1 / len(folds)] * len(folds)

    tokenizer, pad = padded_tokenizer(backbone)
    wide = torch.float32 if target == torch.float32 else "auto"
    model: Any = load_classifier(
        backbone,
        head=settings.head,
        dtype=wide,
        pad_token_id=pad,
        head_seed=0,  # the folds have their own
    )
    check_folds(adapters, backbone)
    attach_head_of(model, adapters[0])
    gap = merge_into(model, folds, weights, settings.average, settings.heads, target)
    for name, weight in model.named_parameters():
        if name not in (WEIGHT, BIAS):
            weight.data = weight.data.to(target)

    about = {
        "backbone": backbone.name,
        "folds": len(folds),
        "average": settings.average if folds[0].targets else "weights",
        "heads": settings.heads,
        "weights": list(weights),
        "dtype": str(target).removeprefix("torch."),
        "targets": len(folds[0].targets),
        "ranks": [fold.rank for fold in folds],
        "factors_gap": gap,
    }
    save_merged(output, model, tokenizer, about, settings)
    distance = "" if gap is None else f", {gap:.2g} between the means of factors and of products"
    print(f"{output}: {len(folds)} folds merged by their {about['average']}{distance}")


def padded_tokenizer(backbone: Path) -> tuple[PreTrainedTokenizerBase, int]:
    """The tokenizer of a merged model, and the id that it pads with.

    Padding is recognised by its id: the tokenizer in the folder must use the same one.
    """
    tokenizer = load_tokenizer(backbone)
    pad = safe_pad_id(tokenizer)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    return tokenizer, pad


def save_merged(
    output: Path,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    about: dict[str, Any],
    settings: MergeSettings,
) -> None:
    """Write a merged model's folder: model, tokenizer, `merge.json` of `about` and provenance."""
    with atomic_directory(output) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        made = provenance("merging", settings.model_dump(mode="json"))
        write_json({**about, "provenance": made}, folder / "merge.json")


@dataclass(frozen=True)
class Adapter:
    """What a fold learned; its tensors are read from its files on demand.

    files: the open file of each tensor, and its name there, by name as in the classifier.
    config: LoRA's; None: without LoRA.
    targets: names of the adapted linear layers, as in the backbone; none without LoRA.
    dense: names of what it holds as it is, as in the classifier: the head; without LoRA all.
    """

    folder: Path
    files: Mapping[str, tuple[Any, str]]
    config: Any
    targets: tuple[str, ...]
    dense: tuple[str, ...]

    @property
    def rank(self) -> int | None:
        return max((len(self.factors(target)[0]) for target in self.targets), default=None)

    def tensor(self, name: str) -> torch.Tensor:
        file, stored = self.files[name]
        tensor: torch.Tensor = file.get_tensor(stored)
        return tensor.float()

    def shape(self, name: str) -> tuple[int, ...]:
        file, stored = self.files[name]
        return tuple(file.get_slice(stored).get_shape())

    def factors(self, target: str) -> tuple[torch.Tensor, torch.Tensor, float]:
        """A (r, in), B (out, r), both float32, and the scaling of their product."""
        from peft.utils.other import get_pattern_key

        a, b = (self.tensor(target + suffix) for suffix in _FACTORS)
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            shapes = f"A {tuple(a.shape)} and B {tuple(b.shape)}"
            raise InputError(f"{self.folder}: {target}: {shapes} are no factors of a linear layer")
        alpha, rank = (
            patterns.get(get_pattern_key(patterns.keys(), target), usual)
            for patterns, usual in (
                (self.config.alpha_pattern, self.config.lora_alpha),
                (self.config.rank_pattern, self.config.r),
            )
        )
        if len(a) != rank:
            raise InputError(
                f"{self.folder}: {target}: its factors have rank {len(a)}, adapter_config.json says "
                f"{rank}; retrain it"
            )
        return a, b, alpha / (math.sqrt(len(a)) if self.config.use_rslora else len(a))


def _read_whole(folder: Path) -> Adapter:
    """Open a folder that holds all weights of a model."""
    opened: dict[str, tuple[Any, str]] = {}
    with refusing(f"{folder}: cannot read a model from this folder"):
        for path in ModelFolder(folder).headers:
            file: Any = safe_open(path, "pt")
            opened |= {name: (file, name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    return Adapter(folder, opened, None, (), tuple(sorted(opened)))


def _read(folder: Path) -> Adapter:
    """Open a PEFT folder.

    Raises:
        InputError: it is missing or damaged, or not low-rank factors of linear layers and a head.
    """
    from peft import LoraConfig

    with refusing(f"{folder}: cannot read an adapter from this folder"):
        options = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        if options.get("peft_type") != "LORA":
            raise InputError(f"{folder}: a {options.get('peft_type')} adapter; only LoRA is merged")
        config = LoraConfig.from_pretrained(str(folder))
        file: Any = safe_open(folder / "adapter_model.safetensors", "pt")
    if config.init_lora_weights not in _HARMLESS_STARTS:
        raise InputError(
            f"{folder}: its initialisation ({config.init_lora_weights}) changed the backbone too; save "
            "it with PEFT's path_initial_model_for_weight_conversion and merge that"
        )
    names = {key.removeprefix(_PREFIX): (file, key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    targets = {name.removesuffix(s) for name in names for s in _FACTORS if name.endswith(s)}
    if alone := sorted({t + s for t in targets for s in _FACTORS}.difference(names)):
        raise InputError(f"{folder}: tensors are missing: {len(alone)} ({alone[0]}): retrain it")
    head = [name for name in names if not name.endswith(_FACTORS)]
    # Other tensors in the file would be lost: magnitudes of DoRA, biases, embeddings.
    saved = set(config.modules_to_save or ())
    strange = [name for name in head if ".lora_" in name or saved.isdisjoint(name.split("."))]
    if config.use_dora or strange:
        what = "DoRA" if config.use_dora else strange[0]
        raise InputError(f"{folder}: it holds {what}; plain LoRA with bias: none is merged")
    if not targets or not head:
        what = "head (train with task_type SEQ_CLS)" if targets else "low-rank factors"
        raise InputError(f"{folder}: it holds no {what}")
    return Adapter(folder, names, config, tuple(sorted(targets)), tuple(sorted(head)))


def read_adapters(folders: Sequence[Path]) -> list[Adapter]:
    """Open the folds' folders.

    Raises:
        InputError: one is neither plain LoRA with a head nor a whole model, or they do not match.
    """
    from arena_distill.models.adapters import is_whole

    folds = [_read_whole(folder) if is_whole(folder) else _read(folder) for folder in folders]
    _check_alike(folds)
    return folds


def check_folds(adapters: Sequence[Path], backbone: Path) -> None:
    """Refuse adapters that are not the folds of one judge, in their order.

    Raises:
        InputError: names the first that does not belong to the others.
    """
    from arena_distill.models.adapters import check_adapter

    known = [(a, origin) for a in adapters if (origin := check_adapter(a, backbone))]
    for (first, one), (second, other) in pairwise(known):
        settings = [dict(origin["settings"]) for origin in (one, other)]
        before, after = (of_fold.pop("fold") for of_fold in settings)
        differing = [name for name in settings[0] if settings[0][name] != settings[1].get(name)]
        differing += ["fold"] * (before >= after)
        differing += ["folds.parquet"] * (one["made_from"]["folds"] != other["made_from"]["folds"])
        if differing:
            raise InputError(
                f"{second} and {first} are not two folds of one judge, in their order: {differing[0]} "
                f"differs; {REBUILD}"
            )


def _check_alike(folds: Sequence[Adapter]) -> None:
    first = folds[0]
    for fold in folds[1:]:
        for names, expected in ((fold.targets, first.targets), (fold.dense, first.dense)):
            if differing := sorted(set(names) ^ set(expected)):
                raise InputError(
                    f"{fold.folder} and {first.folder} differ: {differing[0]} is in only one of "
                    "them; the folds of a judge must have the same targets and head"
                )


def merge_into(
    model: torch.nn.Module,
    folds: Sequence[Adapter],
    weights: Sequence[float],
    average: FoldAverage,
    heads: FoldHeads,
    dtype: torch.dtype,
) -> float | None:
    """Merge folds into `model` in place, with weights that sum to 1.

    Returns:
        ‖factors − products‖ / ‖products‖ over all targets (Frobenius); None if the factors have no
        mean because ranks or scalings differ, or if there are none.
    """
    import torch

    from arena_distill.models.layer_reads import BIAS, WEIGHT

    layers = dict(model.named_modules())
    gap: float | None = 0.0 if folds[0].targets else None
    size = 0.0
    for target in folds[0].targets:
        layer = layers.get(target)
        if not isinstance(layer, torch.nn.Linear):
            found = "no such layer" if layer is None else f"a {type(layer).__name__}"
            raise InputError(
                f"{folds[0].folder}: adapts {target}, but the backbone has {found} there; "
                "use the backbone that the adapters were trained from, not quantised"
            )
        parts = [fold.factors(target) for fold in folds]
        for fold, (a, b, _) in zip(folds, parts, strict=True):
            if (len(b), a.shape[1]) != tuple(layer.weight.shape):
                raise InputError(
                    f"{fold.folder}: {target} is {len(b)} × {a.shape[1]}, in the backbone "
                    f"{' × '.join(map(str, layer.weight.shape))}; it was trained from another one"
                )
        exact = _mean_of_products(parts, weights)
        rough = _product_of_means(parts, weights)
        size += float(exact.square().sum(dtype=torch.float64))
        if rough is None and average == "factors":
            raise InputError(
                f"{target}: the folds differ in rank or scaling, so their factors have no mean; "
                "set merge: {average: products}"
            )
        if rough is None or gap is None:
            gap = None
        else:
            gap += float((rough - exact).square().sum(dtype=torch.float64))
        delta = exact if average == "products" or rough is None else rough
        before = layer.weight.detach().float()
        layer.weight.data = (before + delta.to(before.device)).to(dtype)
    first = next(i for i, weight in enumerate(weights) if weight)  # of those that are merged
    parameters = model.state_dict(keep_vars=True)
    lacking = {name for name, _ in model.named_parameters()}.difference(folds[0].dense)
    if lacking and not folds[0].targets:
        raise InputError(
            f"{folds[0].folder}: lacks {min(lacking)}, which the backbone has; it was trained from another"
        )
    for name in folds[0].dense:
        for fold in folds:
            shape = fold.shape(name)
            if name not in parameters or shape != tuple(parameters[name].shape):
                raise InputError(
                    f"{fold.folder}: its {name} ({' × '.join(map(str, shape))}) does not fit the backbone; "
                    "it was trained from another one"
                )
        of_head = name.partition(".")[0] in HEADS
        if of_head and heads == "first":
            merged = folds[first].tensor(name)
        else:
            merged = _mean((fold.tensor(name) for fold in folds), weights)
        wide = torch.float32 if name in (WEIGHT, BIAS) else dtype
        parameters[name].data = merged.to(parameters[name].device, wide)
    if gap is None:
        return None
    return math.sqrt(gap / size) if size else 0.0


_Factors = Sequence[tuple["torch.Tensor", "torch.Tensor", float]]


def _mean_of_products(parts: _Factors, weights: Sequence[float]) -> torch.Tensor:
    """Mean over folds of s·B·A: (out, in), as one product of the concatenated factors."""
    import torch

    scaled = [b * (scaling * w) for (_, b, scaling), w in zip(parts, weights, strict=True)]
    return torch.cat(scaled, dim=1) @ torch.cat([a for a, _, _ in parts])


def _product_of_means(parts: _Factors, weights: Sequence[float]) -> torch.Tensor | None:
    """s · mean B · mean A: (out, in); None if ranks or scalings differ."""
    if len({(a.shape, scaling) for a, _, scaling in parts}) > 1:
        return None
    mean_a, mean_b = (_mean([part[i] for part in parts], weights) for i in (0, 1))  # type: ignore[misc]
    return parts[0][2] * mean_b @ mean_a


def _mean(tensors: Iterable[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Their weighted sum; of tensors that are read one by one, one at a time is in memory beside it."""
    return reduce(iadd, (t * w for t, w in zip(tensors, weights, strict=True)))
