"""Load a Hugging Face folder as a judge, with the right device and attention kernel.

``preparation`` makes such a folder from any backbone; every phase loads it here.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from arena_distill.config.compute import Attention, Precision
from arena_distill.config.head import JOINT, Head
from arena_distill.config.model_files import ModelFolder
from arena_distill.errors import InputError, refusing
from arena_distill.runtime.launch import cpu_is_wanted

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

HEADS = ("score", "classifier")
"""The names of the classification head in decoders and in encoders."""


@cache
def _float32_linear() -> type[torch.nn.Linear]:
    import torch
    import torch.nn.functional as F

    class Float32Linear(torch.nn.Linear):
        """Computes in float32 whatever autocast says: in bfloat16 logits have three digits."""

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            bias = None if self.bias is None else self.bias.float()
            with torch.autocast(input.device.type, enabled=False):
                return F.linear(input.float(), self.weight.float(), bias)

    return Float32Linear


def head_in_float32(model: torch.nn.Module) -> None:
    """Have a classifier's head compute its logits in float32; its weights stay in their dtype."""
    import torch

    for name in HEADS:
        head = getattr(model, name, None)
        for part in head.modules() if isinstance(head, torch.nn.Module) else ():
            if type(part) is torch.nn.Linear:
                part.__class__ = _float32_linear()


def load_classifier(
    folder: Path,
    *,
    head: Head = JOINT,
    precision: Precision | None = None,
    dtype: torch.dtype | str | None = None,
    attention: Attention | None = None,
    device_map: dict[str, Any] | str | None = None,
    pad_token_id: int | None = None,
    head_seed: int | None = None,
    shards: int = 1,
) -> PreTrainedModel:
    """Load a model as a judge: a sequence classifier with the outputs of its head.

    Args:
        folder: a local Hugging Face folder.
        precision: what they compute in, and their quantisation; puts them on the device of this process
            (:func:`placement`).
        dtype: of the weights, whatever they compute in; by default that of `precision`, else float32.
        attention: the kernel (:func:`choose_attention`); None leaves it to transformers.
        device_map: accelerate's device map, instead of :func:`placement`.
        pad_token_id: the padding id (``tokenization.safe_pad_id``): pooling reads the last other token.
        head_seed: seeds a fresh head if the folder has none; None: the folder must have a head, like a
            finished judge.
        shards: processes that share the weights (FSDP2): each holds its part of them and the whole
            head, which is small and trained.

    Raises:
        InputError: the folder is not a model, cannot classify sequences, or lacks tensors or has unused
            ones; or hardware or a package for `precision` or `attention` is missing.
    """
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, logging

    names = head.outputs
    computing = torch.bfloat16 if precision in ("bf16", "nf4") else dtype or torch.float32
    options: dict[str, Any] = {"dtype": dtype or computing}
    if precision == "nf4":
        options["quantization_config"] = _nf4()
    if shards > 1:  # FSDP places the shards
        from transformers.distributed import DistributedConfig

        cast = options["dtype"] != computing  # before they are sent, not after
        options["distributed_config"] = DistributedConfig(
            fsdp_size=shards, fsdp_mixed_precision=cast
        )
    elif precision or device_map:
        options["device_map"] = device_map or placement()
    logging.set_verbosity_error()  # "newly initialized: score.weight" is intended
    refuse_weights(folder)
    with refusing(f"{folder}: cannot be loaded as a judge"):
        if attention:
            config = AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            kernel = choose_attention(config, attention, computing)
            options["attn_implementation"] = kernel
        model, loaded = AutoModelForSequenceClassification.from_pretrained(
            folder,
            num_labels=len(names),
            use_safetensors=True,  # never unpickle
            id2label=dict(enumerate(names)),
            label2id={name: i for i, name in enumerate(names)},
            local_files_only=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # check_tensors names them
            output_loading_info=True,
            **options,
        )
        other_head = head_seed is not None or head.pooling == "layers"
        check_tensors(folder, loaded, model, fresh_head=other_head)
        if shards > 1:
            _hold_whole_head(model)
        if precision == "nf4":
            _keep_as_packed(model)
        if head_seed is not None:
            start_head(model, head_seed, only=loaded["missing_keys"])
    head_in_float32(model)
    if precision:
        model.computing = computing  # as training does, whatever the dtype of its weights
    if head.pooling == "mean":
        pool_mean(model)
    elif head.pooling == "layers":
        if head_seed is None:
            from arena_distill.models.layer_reads import load_head

            load_head(model, folder)
    elif hasattr(model.config, "head_pooling"):  # a judge used as a backbone
        model.config.head_pooling = head.pooling
    if hasattr(model.config, "use_cache"):
        # No text is generated: keys and values would only use memory.
        model.config.use_cache = False
    if pad_token_id is not None:
        known = model.get_input_embeddings().num_embeddings
        if pad_token_id >= known:
            raise InputError(
                f"{folder}: the pad token {pad_token_id} is outside the model's {known} embeddings: "
                "the tokenizer belongs to another model"
            )
        model.config.pad_token_id = pad_token_id
        model.config.get_text_config().pad_token_id = pad_token_id
    return model


def refuse_weights(folder: Path, *, quantized: bool = False) -> None:
    """Refuse weights that are not whole, or not safetensors, before a library reads them.

    Args:
        quantized: also weights that are not packed by GPTQ as its config.json says.

    Raises:
        InputError: says which file, and what to do.
    """
    model = ModelFolder(folder)
    for problem in (*model.weight_problems(), *(model.gptq_problems() if quantized else ())):
        raise InputError(problem)


def check_tensors(
    source: Path,
    loaded: Mapping[str, Collection[Any]],
    model: torch.nn.Module,
    *,
    fresh_head: bool = False,
    cut: bool = False,
) -> None:
    """Refuse a model that lacks tensors, or has unused ones or other shapes: then it is another model.

    Transformers would draw the missing ones at random in every job, and drop the unused ones without a
    word. Tied tensors, and those that transformers computes by itself, are not missing.

    Args:
        source: the folder or file that was loaded, for the message.
        loaded: the loading report of transformers (`output_loading_info`).
        model: the loaded model.
        fresh_head: it is a backbone: the head may be missing, and other heads and towers may be unused.
        cut: only its first layers were loaded.

    Raises:
        InputError: gives the number of these tensors, and names the first.
    """
    if other := sorted(loaded["mismatched_keys"]):
        name, stored, expected = other[0]
        raise InputError(
            f"{source}: tensors have other shapes than the model: {_some([key for key, *_ in other])}; "
            f"{name} is {list(stored)}, not {list(expected)}: its config.json or its weights belong to "
            "another model; download or make it again"
        )
    missing, unused = sorted(loaded["missing_keys"]), sorted(loaded["unexpected_keys"])
    if fresh_head:
        missing = [name for name in missing if name.partition(".")[0] not in HEADS]
    if missing:
        others = f", and {_some(unused)} are unknown to the model" if unused else ""
        raise InputError(
            f"{source}: tensors are missing: {_some(missing)}{others}: its weights are incomplete or "
            "belong to another model; download or make it again"
        )
    if fresh_head or cut:
        unused = _of_blocks(unused, model, further_layers=not cut)
    if unused:
        raise InputError(
            f"{source}: tensors are unused: {_some(unused)}: its config.json describes a smaller or "
            "another model than its weights; download or make it again"
        )


def _of_blocks(names: Sequence[str], model: torch.nn.Module, *, further_layers: bool) -> list[str]:
    """Those unused tensors that are of a module of the model, or of further layers like its own."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    modules = {name.removeprefix(prefix) for name, _ in model.named_modules()}
    buffers = {name.removeprefix(prefix) for name, _ in model.named_buffers()}
    alike = {re.sub(r"\d+", "#", n.removeprefix(prefix)) for n, _ in model.named_parameters()}
    found = []
    for name in names:
        bare = name.removeprefix(prefix)
        module = bare.rpartition(".")[0]
        further = further_layers and re.sub(r"\d+", "#", bare) in alike
        # Old checkpoints hold what is computed today: positions, masks, frequencies.
        if further or (module and module in modules and bare not in buffers):
            found.append(name)
    return found


def _some(names: Sequence[str]) -> str:
    """The number of names, and the first of them."""
    return f"{len(names)} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"


def placement() -> dict[str, int] | Literal["auto"] | None:
    """Return the device map (accelerate) of a judge's weights; None is the CPU.

    They go to the GPU of this process. A single process with several GPUs spreads the layers over all
    of them: jobs get the GPUs they request (``launch.claim_gpus``); training has a process per GPU.
    """
    import torch

    if not torch.cuda.is_available() or cpu_is_wanted():
        return None
    if "LOCAL_RANK" in os.environ:
        return {"": int(os.environ["LOCAL_RANK"])}
    return "auto" if torch.cuda.device_count() > 1 else {"": 0}


def choose_attention(
    config: PretrainedConfig, wanted: Attention, dtype: torch.dtype | str
) -> str | None:
    """Choose the attention kernel, by transformers' name; None leaves it to transformers.

    By default it uses `sdpa`, or `eager` for families with soft-capped attention (Gemma-2), which
    PyTorch's kernel does not support. Flash attention does, and is faster than both.

    Args:
        config: the model's.
        wanted: `auto` takes flash attention wherever it is available.
        dtype: that it computes in.

    Raises:
        InputError: the kernel is not available; says why.
    """
    if wanted == "auto":
        return None if _obstacle(config, "flash_attention_2", dtype) else "flash_attention_2"
    if obstacle := _obstacle(config, wanted, dtype):
        raise InputError(
            f"config: compute.attention: {wanted} is not available: {obstacle}; set auto"
        )
    if wanted == "flex_attention":
        _use_one_flex_kernel()
    return wanted


def _use_one_flex_kernel() -> None:
    """Have flex attention compute every batch by the same kernel.

    For sequences of less than 128 tokens PyTorch (2.11 to 2.13) takes its kernel for generation, which
    holds a key's queries in one block of at most 128: tokens times the heads that share the key. With
    more of them the job would end: `NoValidChoicesError`.
    """
    from transformers import AttentionInterface
    from transformers.integrations.flex_attention import flex_attention_forward

    forward = partial(flex_attention_forward, kernel_options={"BACKEND": "TRITON"})
    AttentionInterface.register("flex_attention", forward)


def _obstacle(config: PretrainedConfig, kernel: str, dtype: torch.dtype | str) -> str | None:
    """Why an attention kernel is not available here; None if it is."""
    import torch
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING as CLASSIFIERS
    from transformers.utils import is_flash_attn_greater_or_equal

    if type(config) not in CLASSIFIERS:
        return "transformers has no classifier of this type"
    family: Any = CLASSIFIERS[type(config)]
    supported = {
        "eager": True,
        "sdpa": family._supports_sdpa,
        "flash_attention_2": family._supports_flash_attn,
        "flex_attention": family._supports_flex_attn,
    }
    if not supported[kernel]:
        return f"transformers has none for {config.model_type}"
    if kernel in ("eager", "sdpa"):
        return None
    if not torch.cuda.is_available() or cpu_is_wanted():
        return "it needs a GPU"  # flex attention has a forward pass on CPUs, but no backward pass
    if kernel == "flex_attention":
        return None
    oldest = "2.6.0" if getattr(config, "attn_logit_softcapping", None) else "2.3.3"
    if not is_flash_attn_greater_or_equal(oldest):
        return f"the package flash-attn {oldest} or newer is not installed for {sys.executable}"
    for device in range(torch.cuda.device_count()):
        if torch.cuda.get_device_capability(device) < (8, 0):
            return f"{torch.cuda.get_device_name(device)} is older than Ampere"
    if dtype not in (torch.bfloat16, torch.float16):
        return "it needs half precision (precision: bf16 or nf4)"
    return None


def _nf4() -> Any:
    """NF4 with double quantisation, computing in bfloat16 (Dettmers et al. 2023, arXiv:2305.14314)."""
    import torch
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(
            f"config: precision: nf4 needs bitsandbytes, which is not installed for "
            f"{sys.executable}: pip install 'arena-distill[qlora]', or set precision: bf16"
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=list(HEADS),  # for 4 bits too, despite the name
    )


def _keep_as_packed(model: Any) -> None:
    """Keep bitsandbytes from packing weights again in an evaluation's first forward pass: on a CPU with
    AVX512-BF16 it does so, and later gradients are silently wrong.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _hold_whole_head(model: PreTrainedModel) -> None:
    from torch.distributed.tensor import DTensor
    from torch.nn import Parameter

    for name in HEADS:
        if hasattr(model, name):
            # A copy: the module that FSDP manages keeps the shards it knows.
            head = deepcopy(getattr(model, name))
            for module in head.modules():
                for key, weight in list(module.named_parameters(recurse=False)):
                    if isinstance(weight.data, DTensor):
                        setattr(module, key, Parameter(weight.data.full_tensor()))
            setattr(model, name, head)


def start_head(model: PreTrainedModel, seed: int, only: Collection[str] | None = None) -> None:
    """Initialise the head, or `only` some of its weights, so that a fresh judge gives nearly equal logits.

    Like the families' `_init_weights`, except that the last layer is smaller by the square root of its
    inputs: their start gives random logits of size 1 and more (SmolLM2: 1.7), and the first hundreds of
    battles would only reduce them. (The readout layer of Yang et al. 2022, Tensor Programs V,
    arXiv:2203.03466, table 8, has the same scale for any width.)

    A separate generator draws them: the order in which the model's modules draw depends on how they
    are spread over processes.
    """
    import torch

    rng = torch.Generator().manual_seed(seed)
    std = getattr(model.config.get_text_config(), "initializer_range", None) or 0.02
    for name, weight in model.named_parameters():
        if name.partition(".")[0] in HEADS and (only is None or name in only):
            with torch.no_grad():
                start = torch.zeros(weight.shape)
                if weight.ndim > 1:
                    outputs, inputs = weight.shape
                    last = outputs == model.config.num_labels
                    start.normal_(std=std / inputs**0.5 if last else std, generator=rng)
                weight.copy_(start)


def pool_mean(model: PreTrainedModel) -> None:
    """Let a decoder's head read the mean of the hidden states over a sequence's tokens.

    Every token gets that mean, so also the last one, which the classifier reads. transformers does not
    know this pooling: `head_pooling` in the model's configuration records it.

    Raises:
        InputError: the head does not read a token's hidden state.
    """
    if not hasattr(model, "score"):
        raise InputError(
            f"{model.config.name_or_path}: config: head.pooling: mean is for decoders; a "
            f"{model.config.model_type} has its own pooling: set it to last"
        )

    def pool(_: Any, args: Any, given: dict[str, Any], outputs: Any) -> Any:
        states = outputs.last_hidden_state
        mask = given.get("attention_mask")
        present = states.new_ones(states.shape[:2]) if mask is None else mask.to(states)
        weights = (present / present.sum(1, keepdim=True)).unsqueeze(-1).float()
        mean = (states.float() * weights).sum(1, keepdim=True).to(states.dtype)
        outputs.last_hidden_state = mean.expand_as(states)
        return outputs

    model.base_model.register_forward_hook(pool, with_kwargs=True)
    model.config.head_pooling = "mean"


def check_length(model: Any, longest: int) -> None:
    """Refuse sequences that are longer than the model allows.

    Raises:
        InputError: names the model's limit.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit and longest > limit:
        raise InputError(
            f"{model.config.name_or_path}: sequences have {longest} tokens, but the model allows only "
            f"{limit}; lower max_length (config: encoding.max_length, prediction.max_lengths)"
        )
