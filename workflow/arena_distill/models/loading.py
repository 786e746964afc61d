"""Load an ordinary Hugging Face folder as a judge, on the device and with the kernel that fit.

Whatever a backbone comes from, ``preparation`` makes such a folder of it: every phase loads it here.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from safetensors import SafetensorError

from arena_distill.config.judge import JOINT, Attention, Head, Precision
from arena_distill.errors import InputError
from arena_distill.files.hub import brief
from arena_distill.models.heads import OUTPUTS
from arena_distill.runtime.launch import cpu_is_wanted

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

HEADS = ("score", "classifier")
"""The classification head's name, in the decoder families and in encoders."""


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
    """Load a model as a judge: a sequence classifier with the outputs of its head (``heads.OUTPUTS``).

    Args:
        folder: a local Hugging Face folder.
        precision: of a judge that is to run: it decides dtype and quantisation of the weights, and they
            go to where this process computes (:func:`placement`).
        dtype: without `precision`, of weights that stay on the host; float32 by default.
        attention: the kernel (:func:`choose_attention`); None leaves it to transformers.
        device_map: where the weights go, as accelerate has it, if not to :func:`placement`.
        pad_token_id: the id that pads (``tokenization.safe_pad_id``): pooling looks for the last other one.
        head_seed: decides a fresh head's weights, where the folder has no head; None: it has to have one,
            as a finished judge has.
        shards: processes that share the weights (FSDP2): each loads and holds its part of them, and
            the whole head, which is small and learns.

    Raises:
        InputError: the folder is no model, or one that cannot classify sequences, or lacks tensors; or
            `precision` or `attention` needs what is not there.
    """
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, logging

    names = OUTPUTS[head.kind]
    options: dict[str, Any] = {"dtype": dtype or torch.float32}
    if precision:
        options["dtype"] = torch.float32 if precision == "fp32" else torch.bfloat16
        if precision == "nf4":
            options["quantization_config"] = _nf4()
    if shards > 1:  # where its parts go is FSDP's to say
        from transformers.distributed import DistributedConfig

        options["distributed_config"] = DistributedConfig(fsdp_size=shards)
    elif precision:
        options["device_map"] = device_map or placement()
    logging.set_verbosity_error()  # "newly initialized: score.weight" is what we ask for
    try:
        if attention:
            config = AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            kernel = choose_attention(config, attention, options["dtype"])
            options["attn_implementation"] = kernel
        model, loaded = AutoModelForSequenceClassification.from_pretrained(
            folder,
            num_labels=len(names),
            use_safetensors=True,  # nothing that would be unpickled
            id2label=dict(enumerate(names)),
            label2id={name: i for i, name in enumerate(names)},
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{folder}: cannot be loaded as a judge: {brief(error)}") from None
    check_tensors(folder, loaded, fresh_head=head_seed is not None)
    if shards > 1:
        _hold_whole_head(model)
    if precision == "nf4":
        _keep_as_packed(model)
    if head_seed is not None:
        _start_head(model, loaded["missing_keys"], head_seed)
    if head.pooling == "mean":
        pool_mean(model)
    elif hasattr(model.config, "head_pooling"):  # of a judge that is a backbone now
        model.config.head_pooling = head.pooling
    if hasattr(model.config, "use_cache"):
        # Nothing is generated: keys and values would only fill memory.
        model.config.use_cache = False
    if pad_token_id is not None:
        known = model.get_input_embeddings().num_embeddings
        if pad_token_id >= known:
            raise InputError(
                f"{folder}: the pad token {pad_token_id} is outside the model's {known} embeddings: "
                "this tokenizer is not this model's"
            )
        model.config.pad_token_id = pad_token_id
        model.config.get_text_config().pad_token_id = pad_token_id
    return model


def check_tensors(
    source: Path, loaded: Mapping[str, Collection[str]], *, fresh_head: bool = False
) -> None:
    """Refuse a model that lacks tensors: transformers draws them at random, in every job anew.

    What is tied to another tensor, and what transformers computes by itself, does not lack.

    Args:
        source: the folder or file that was loaded, for the message.
        loaded: what transformers tells of it (`output_loading_info`).
        fresh_head: the head may lack.

    Raises:
        InputError: says how many lack, and names the first.
    """
    missing = sorted(loaded["missing_keys"])
    if fresh_head:
        missing = [name for name in missing if name.partition(".")[0] not in HEADS]
    if missing:
        unknown = sorted(loaded["unexpected_keys"])
        others = f", and {_some(unknown)} are unknown to the model" if unknown else ""
        raise InputError(
            f"{source}: tensors are missing: {_some(missing)}{others}: its weights are incomplete, or "
            "another model's; get or make it anew"
        )


def _some(names: Sequence[str]) -> str:
    """How many there are, and the first of them."""
    return f"{len(names)} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"


def placement() -> dict[str, int] | Literal["auto"] | None:
    """Where the weights of a judge that runs go, as accelerate's device map; None is the CPU.

    On the GPU of this process. A process that has several alone spreads the layers over all of them:
    jobs get as many as they ask for (``launch.claim_gpus``), and training has a process for each.
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
    """The attention kernel to load a model with, by transformers' name; None leaves it to transformers.

    Left to it, that is `sdpa`, and `eager` for families which soft-cap their attention (Gemma-2), as
    PyTorch's kernel cannot. Flash attention can, and is faster than both.

    Args:
        config: the model's.
        wanted: `auto` takes flash attention wherever nothing stands against it.
        dtype: the weights'.

    Raises:
        InputError: what is wanted is not to be had, and why.
    """
    if wanted == "auto":
        return None if _obstacle(config, "flash_attention_2", dtype) else "flash_attention_2"
    if obstacle := _obstacle(config, wanted, dtype):
        raise InputError(
            f"config: compute.attention: {wanted} is not to be had: {obstacle}; set auto"
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
    """What stands against an attention kernel here."""
    import torch
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING as CLASSIFIERS
    from transformers.utils import is_flash_attn_greater_or_equal

    if type(config) not in CLASSIFIERS:
        return "transformers has no classifier of this kind"
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
        return f"the package flash-attn {oldest} or newer is not installed beside {sys.executable}"
    for device in range(torch.cuda.device_count()):
        if torch.cuda.get_device_capability(device) < (8, 0):
            return f"{torch.cuda.get_device_name(device)} is older than Ampere"
    if dtype not in (torch.bfloat16, torch.float16):
        return "it computes in half precision alone (precision: bf16 or nf4)"
    return None


def _nf4() -> Any:
    """NF4 with double quantisation, computing in bfloat16 (Dettmers et al. 2023, arXiv:2305.14314)."""
    import torch
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(
            f"config: precision: nf4 needs bitsandbytes, which is not installed beside "
            f"{sys.executable}: pip install 'arena-distill[qlora]', or set precision: bf16"
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=list(HEADS),  # of 4 bits too, in spite of the name
    )


def _keep_as_packed(model: Any) -> None:
    """Where a CPU has AVX512-BF16, bitsandbytes packs weights anew in the first forward pass of an
    evaluation, and gradients of later passes are wrong, without a word: do not let it.
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


def _start_head(model: PreTrainedModel, missing: Collection[str], seed: int) -> None:
    """Draw what the folder lacks of the head, so that a fresh judge is nearly indifferent.

    As the families' `_init_weights` do, but for the last layer, which is smaller by the square root of
    its inputs: their start would give logits of a size of 1 and more (SmolLM2: 1.7), which are noise
    that the first hundreds of battles are spent on forgetting. (The readout layer of Yang et al. 2022,
    Tensor Programs V, arXiv:2203.03466, table 8, has the same scale for any width.)

    From a generator of its own: in what order the model's modules draw theirs depends on how they
    are spread over processes.
    """
    import torch

    rng = torch.Generator().manual_seed(seed)
    std = getattr(model.config.get_text_config(), "initializer_range", None) or 0.02
    for name, weight in model.named_parameters():
        if name in missing and name.partition(".")[0] in HEADS:
            with torch.no_grad():
                start = torch.zeros(weight.shape)
                if weight.ndim > 1:
                    outputs, inputs = weight.shape
                    last = outputs == model.config.num_labels
                    start.normal_(std=std / inputs**0.5 if last else std, generator=rng)
                weight.copy_(start)


def pool_mean(model: PreTrainedModel) -> None:
    """Have a decoder's head read the mean of the hidden states over a sequence's tokens.

    Each token is given that mean, so the last one has it too, which is what the classifier reads.
    transformers knows nothing of it: the configuration says `head_pooling`, for whoever loads the model.

    Raises:
        InputError: the head reads something else than a token's hidden state.
    """
    if not hasattr(model, "score"):
        raise InputError(
            f"{model.config.name_or_path}: config: head.pooling: mean is for decoders; a "
            f"{model.config.model_type} has a pooling of its own: set it to last"
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
    """Refuse sequences that are longer than the model has positions for.

    Raises:
        InputError: names the model's limit.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit and longest > limit:
        raise InputError(
            f"{model.config.name_or_path}: sequences of {longest} tokens, but the model has positions "
            f"for {limit}; lower max_length (config: encoding.max_length, prediction.max_lengths)"
        )
