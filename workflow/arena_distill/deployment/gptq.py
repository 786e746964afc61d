"""Quantise a dense judge with GPTQ to 2, 3, 4 or 8 bits.

GPTQ (Frantar et al. 2022, arXiv:2210.17323) rounds a layer's weights one column at a time, and
adjusts the remaining columns to compensate the error, measured on the layer's real inputs. The
arithmetic and the packing are GPTQModel's, as in transformers' own quantiser. The loop over the
blocks is ours, because classifiers need three things: sequences in the judge's own template,
each block's own mask and rotation (Gemma's blocks differ), and no compiler.

Plain transformers loads the folder if gptqmodel and optimum are installed.
:func:`check_drift` is a separate phase, so an exceeded bound stops the graph but does not
discard a model that took hours to quantise.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args
from unittest.mock import patch

import numpy as np
import pyarrow.compute as pc
from tqdm.auto import tqdm

from arena_distill.config.compute import Attention
from arena_distill.config.phases.deployment import QuantizationSettings
from arena_distill.config.vocabulary import GroupSize
from arena_distill.deployment.quantization_error import DRIFT, drift
from arena_distill.encoding.sequences import Sequences, read_tokens
from arena_distill.encoding.tokenization import load_tokenizer
from arena_distill.encoding.views import encode_views
from arena_distill.errors import InputError, refusing
from arena_distill.files.artifacts import atomic_directory, provenance, write_json
from arena_distill.models.heads import verdicts
from arena_distill.models.loading import (
    check_tensors,
    choose_attention,
    head_in_float32,
    load_classifier,
    pool_mean,
    refuse_weights,
)
from arena_distill.models.scoring import score

if TYPE_CHECKING:
    import torch

    from arena_distill.verdicts import Votes


def quantize_judge(
    model: Path,
    tokens: Path,
    output: Path,
    *,
    settings: QuantizationSettings,
    batch_tokens: int,
) -> None:
    """Quantise a merged judge on training battles, and measure its drift on other ones.

    Raises:
        InputError: there are too few training battles, or as for :func:`quantize_model`.
    """
    read = read_tokens(tokens)
    train = np.flatnonzero(pc.equal(read.sources, "train").to_numpy(zero_copy_only=False))
    settings = settings.sized(len(train))
    shuffled = np.random.default_rng(settings.seed).permutation(train)
    held_out = read.take(np.sort(shuffled[: settings.validation_rows]))
    pool = read.take(np.sort(shuffled[settings.validation_rows :]))
    quantize_model(
        model,
        output,
        settings=settings,
        calibration=encode_views(pool, settings.encoding, settings.head, ("AB",))[0],
        validation=encode_views(held_out, settings.encoding, settings.head, ("AB",)),
        batch_tokens=batch_tokens,
        votes=held_out.votes,
    )


def quantize_model(
    model: Path,
    output: Path,
    *,
    settings: QuantizationSettings,
    calibration: Sequences,
    validation: Sequence[Sequences],
    batch_tokens: int,
    votes: Votes | None = None,
) -> None:
    """Quantise a dense judge → a folder with the model, its tokenizer and ``drift.json``.

    Every linear layer of the blocks is quantised; embeddings, norms and head stay bit-identical.
    The same model, sequences and seed give the same bytes on the same type of machine.

    Args:
        model: a dense folder, as ``merging`` writes it.
        calibration: sequences to draw from, encoded as for the judge.
        validation: the views of other battles, on which the drift is measured.
        batch_tokens: per forward pass while the drift is measured; calibration goes row by row.
        votes: of the validation rows as shown: adds the log loss before and after.

    Raises:
        InputError: before any long computation: the settings do not fit the model, there are too
            few sequences, or gptqmodel is not installed.
    """
    bits, group_size = settings.bits, settings.group_size
    samples = settings.samples or len(calibration)
    if samples > len(calibration):
        raise InputError(
            f"config: judges.*.quantization.samples: {samples}, but only {len(calibration)} rows are there "
            "to calibrate on; lower samples or give more training battles"
        )
    if not len(validation[0]):
        raise InputError("quantisation: there is no validation row to measure the drift on")
    _prepare_gptqmodel()
    import torch

    check_layers(_layer_sizes(model), bits, group_size)
    rows = np.random.default_rng(settings.seed).choice(len(calibration), samples, replace=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def verdict(judge: Any) -> np.ndarray:
        outputs = [score(judge, view, batch_tokens=batch_tokens) for view in validation]
        return verdicts(np.stack(outputs, axis=1), settings.head, ("AB",))[:, 0]

    judge: Any = load_classifier(model, head=settings.head, dtype="auto")
    judge.to(device)
    before = verdict(judge)
    _quantize(judge, calibration.take(np.sort(rows)), bits, group_size)

    with atomic_directory(output) as folder:
        judge.save_pretrained(folder)
        # The same settings again: loaders older than transformers' integration read this file.
        write_json(judge.config.quantization_config, folder / "quantize_config.json")
        load_tokenizer(model).save_pretrained(folder)
        del judge
        after = verdict(load_quantized(folder))
        report = {
            **drift(before, after, votes),
            "bits": bits,
            "group_size": group_size,
            "samples": samples,
            "bytes_before": _bytes(model),
            "bytes": _bytes(folder),
            "provenance": provenance("quantization", settings.model_dump(mode="json")),
        }
        write_json(report, folder / DRIFT)
    print(
        f"{output}: {bits} bits, {report['bytes_before']:,} → {report['bytes']:,} bytes; "
        f"KL {report['kl']:.2g} nats, {report['flip_rate']:.2%} of verdicts changed"
    )


def load_quantized(folder: Path, *, attention: Attention | None = None, device: Any = None) -> Any:
    """Load a GPTQ folder for scoring, on the GPU if there is one, in the dtype of its config.

    It calls transformers' ``from_pretrained`` with two choices: GPTQModel's PyTorch kernel, without
    compilation, which takes half a minute per job and saves nothing. The default kernel on a GPU
    (Marlin) is built by CUDA's compiler at its first use: this takes minutes, and fails without a
    compiler. Marlin is for generation, one token at a time; a judge reads batches of thousands of
    tokens, for which the time to unpack the weights is negligible. On a CPU they are unpacked once
    and kept.

    Args:
        attention: the kernel (see ``loading.choose_attention``); None leaves it to transformers.
        device: by default the first GPU, or the CPU if there is none.

    Raises:
        InputError: the folder has no whole GPTQ model, gptqmodel is not installed, or the kernel is not
            available.
    """
    refuse_weights(folder, quantized=True)
    _prepare_gptqmodel()
    import torch
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from transformers import AutoConfig, AutoModelForSequenceClassification

    with refusing(f"{folder}: cannot read a GPTQ model from this folder"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        config.quantization_config["backend"] = "gptq_torch"
    with (
        refusing(f"{folder}: cannot be loaded as a judge"),
        patch.object(TorchLinear, "optimize", lambda *_, **__: None),
    ):
        dtype = config.dtype or torch.float32
        model, loaded = AutoModelForSequenceClassification.from_pretrained(
            folder,
            config=config,
            dtype="auto",
            attn_implementation=choose_attention(config, attention, dtype) if attention else None,
            device_map={"": device or ("cuda:0" if torch.cuda.is_available() else "cpu")},
            use_safetensors=True,  # never unpickle
            local_files_only=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # check_tensors names them
            output_loading_info=True,
        )
        pooling = getattr(config, "head_pooling", "last")
        check_tensors(folder, loaded, model, fresh_head=pooling == "layers")
    for name, layer in model.named_modules():
        if isinstance(layer, TorchLinear):
            groups = layer.g_idx  # a negative one would count from the end
            if groups.min() < 0 or groups.max() >= len(layer.scales):
                raise InputError(
                    f"{folder}: {name}.g_idx names groups that are not among its {len(layer.scales)}: "
                    "quantise the judge again, or fetch it again"
                )
    head_in_float32(model)
    if pooling == "mean":
        pool_mean(model)
    elif pooling == "layers":
        from arena_distill.models.layer_reads import load_head

        load_head(model, folder)
    return model


def check_layers(sizes: Mapping[str, tuple[int, int]], bits: int, group_size: int) -> None:
    """Refuse layers that do not divide into groups and packed words.

    Args:
        sizes: (in_features, out_features) by layer.

    Raises:
        InputError: names the layer and a group size that fits all layers.
    """
    word = 32 if bits == 3 else 32 // bits
    for name, size in sizes.items():
        if uneven := [n for n in size if n % word]:
            raise InputError(
                f"{name}: weights of {bits} bits are packed by {word}, which does not divide "
                f"{uneven[0]}; choose other bits (config: judges.*.quantization.bits)"
            )
    for name, (features, _) in sizes.items():
        if features % group_size:
            fitting = [g for g in get_args(GroupSize) if not any(n % g for n, _ in sizes.values())]
            advice = f"use {max(fitting)}" if fitting else "no supported size fits this model"
            raise InputError(
                f"config: judges.*.quantization.group_size: {group_size} does not divide the "
                f"{features} inputs of {name}; {advice}"
            )


# --- GPTQ -----------------------------------------------------------------------------------------


def _quantize(model: Any, calibration: Sequences, bits: int, group_size: int) -> None:
    """Replace the linear layers of all blocks by quantised ones, in place.

    Each block gets the calibration rows from the blocks before it, which are already quantised.
    """
    import torch
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.version import __version__

    config = QuantizeConfig(bits=bits, group_size=group_size, offload_to_disk=False)
    path, modules = _blocks(model)
    model.eval()
    groups: list[list[str]] | None = None
    with torch.inference_mode():
        blocks = _record_calls(model, modules, calibration)
        hidden = blocks[0].hidden
        for block in tqdm(blocks, desc="quantising", unit="block"):
            block.hidden = hidden
            found = _layers_by_input(block)
            if set(sum(found, [])) != set(block.layers) or groups not in (None, found):
                raise InputError(
                    f"{type(model).__name__}: its blocks differ, or skip layers for some sequences "
                    "(mixture of experts); quantising such models is not supported"
                )
            groups = found
            packed = {name: q for group in found for name, q in _round(block, group, config)}
            hidden = block.forward()
            block.hidden = []
            for name, layer in packed.items():
                block.module.set_submodule(name, layer)
    model.config.quantization_config = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": bits,
        "group_size": group_size,
        "sym": config.sym,
        "desc_act": config.desc_act,
        "damp_percent": config.damp_percent,
        "true_sequential": True,
        "block_name_to_quantize": path,
        "modules_in_block_to_quantize": groups,
        "meta": {"quantizer": [f"gptqmodel:{__version__}"]},
    }


class _Enough(Exception):
    """A hook has what it needs of a row: the block need not run on."""


@dataclass
class _Block:
    """A block, and its inputs for every calibration row.

    hidden: float (1, tokens, width) per row.
    calls: per row the arguments besides the hidden states: mask, rotation, ...
    """

    module: torch.nn.Module
    hidden: list[torch.Tensor]
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]

    @property
    def layers(self) -> dict[str, Any]:
        return _linear_layers(self.module)

    def forward(self, rows: int | None = None) -> list[torch.Tensor]:
        """The hidden states after the block, of the first `rows` rows."""
        outputs = (self._row(row) for row in range(len(self.hidden[:rows])))
        return [out[0] if isinstance(out, tuple) else out for out in outputs]

    def run_to_hooks(self) -> None:
        """Run on every row, each as far as the hooks of its layers let it."""
        for row in range(len(self.hidden)):
            with suppress(_Enough):
                self._row(row)

    def _row(self, row: int) -> Any:
        args, kwargs = self.calls[row]
        return self.module(self.hidden[row], *args, **kwargs)


def _record_calls(
    model: Any, modules: Sequence[torch.nn.Module], calibration: Sequences
) -> list[_Block]:
    """Run the model on the calibration rows; keep the first block's hidden states only."""
    import torch

    blocks = [_Block(module, [], []) for module in modules]

    def record(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, block: _Block) -> None:
        if block is blocks[0]:
            block.hidden.append(args[0])
        block.calls.append((args[1:], kwargs))

    with ExitStack() as hooks:
        for block in blocks:
            hook = block.module.register_forward_pre_hook(
                partial(record, block=block), with_kwargs=True
            )
            hooks.callback(hook.remove)
        # No cache: a block that runs again must not read its own keys and values.
        options = {"use_cache": False} if getattr(model.config, "use_cache", False) else {}
        for sequence in calibration:
            # One row at a time, so that no padding enters the statistics.
            ids = torch.from_numpy(sequence.astype(np.int64))[None].to(model.device)
            model(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    return blocks


def _layers_by_input(block: _Block) -> list[list[str]]:
    """Names of a block's layers in the order of use, grouped by the tensor they read."""
    inputs: list[Any] = []  # kept alive: identity stands for "the same tensor"
    groups: dict[int, list[str]] = {}

    def note(_: Any, args: tuple[Any, ...], *, name: str) -> None:
        inputs.append(args[0])
        groups.setdefault(id(args[0]), []).append(name)

    with ExitStack() as hooks:
        for name, layer in block.layers.items():
            hook = layer.register_forward_pre_hook(partial(note, name=name))
            hooks.callback(hook.remove)
        block.forward(rows=1)
    return list(groups.values())


def _round(block: _Block, group: Sequence[str], config: Any) -> Iterator[tuple[str, Any]]:
    """Round the weights of layers that share their input, in place; yield the packed layers."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization import GPTQ
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    solvers = {name: GPTQ(block.layers[name], config) for name in group}
    seen: set[str] = set()

    def add(_: Any, args: tuple[Any, ...], output: Any, *, name: str) -> None:
        solvers[name].add_batch(args[0], output)
        seen.add(name)
        if len(seen) == len(group):  # of this row
            seen.clear()
            raise _Enough

    with ExitStack() as hooks:
        for name in group:
            hook = block.layers[name].register_forward_hook(partial(add, name=name))
            hooks.callback(hook.remove)
        block.run_to_hooks()
    for name, solver in solvers.items():
        layer = block.layers[name]
        solver.quantizer.configure(perchannel=True)
        rounded, *parameters = solver.quantize()[:4]
        solver.free()
        device = layer.weight.device
        layer.weight.data = rounded.cpu()
        packed = TorchLinear(
            bits=config.bits,
            group_size=config.group_size,
            sym=config.sym,
            desc_act=config.desc_act,
            in_features=layer.in_features,
            out_features=layer.out_features,
            bias=layer.bias is not None,
            register_buffers=False,
        )
        # The default packer builds a C++ extension first; this one uses numpy.
        packed.pack_original(layer.cpu(), *(parameter.cpu() for parameter in parameters))
        convert_gptq_v2_to_v1_format_module(packed, config)
        layer.to(device)
        yield name, packed


def _blocks(model: Any) -> tuple[str, Any]:
    """The path of the list of a model's blocks, and the list."""
    import torch

    count = model.config.get_text_config().num_hidden_layers
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return path, module
    raise InputError(f"{type(model).__name__}: no list of {count} blocks to quantise was found")


def _linear_layers(block: torch.nn.Module) -> dict[str, Any]:
    import torch

    return {n: x for n, x in block.named_modules() if type(x) is torch.nn.Linear}


def _layer_sizes(folder: Path) -> dict[str, tuple[int, int]]:
    """(in_features, out_features) of every layer to quantise, without reading weights."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    refuse_weights(folder)
    with refusing(f"{folder}: cannot be loaded as a judge"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            auto: Any = AutoModelForSequenceClassification
            model = auto.from_config(config, trust_remote_code=False)
    path, blocks = _blocks(model)
    return {
        f"{path}.{i}.{name}": (layer.in_features, layer.out_features)
        for i, block in enumerate(blocks)
        for name, layer in _linear_layers(block).items()
    }


def _prepare_gptqmodel() -> None:
    """Set the environment variables that gptqmodel reads, before it is imported."""
    if importlib.util.find_spec("gptqmodel") is None:
        raise InputError(
            f"gptqmodel is not installed for {sys.executable}; making and loading quantised models "
            "needs the interpreter of the second environment (config: environments.gptq)"
        )
    # Its thread pool starts too many workers for a small machine, and crashes.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(min(2, os.cpu_count() or 1)))
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("GPTQ_TORCH_CACHE_WEIGHTS", "1")


def _bytes(folder: Path) -> int:
    """Size of a model's weights on disk."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
