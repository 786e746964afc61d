"""Make a Hugging Face folder from a hub model, a GGUF file or the first layers of a model.

Only `hub` uses the network.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from arena_distill.config.backbone import TINY, Backbone
from arena_distill.config.phases.encoding import BackboneSettings
from arena_distill.encoding.tokenization import load_tokenizer
from arena_distill.errors import InputError, refusing
from arena_distill.files.artifacts import atomic_directory, provenance, write_json
from arena_distill.files.hub import download
from arena_distill.models.loading import check_tensors, refuse_weights


def prepare_backbone(
    output: Path, *, settings: BackboneSettings, source: Path | None = None
) -> None:
    """Make the Hugging Face folder of a backbone.

    Args:
        source: for a part of a model on the hub, the folder of that model.

    Raises:
        InputError: the source is missing, is not a model, lacks tensors or has too few layers.
    """
    backbone = settings.backbone
    about = settings.model_dump()
    with atomic_directory(output) as folder:
        if backbone == backbone.download():
            about["commit"] = _download(backbone, folder)
        elif backbone.hub and source is None:
            raise InputError(
                f"{backbone.stem()}: download {backbone.hub} first and pass its folder"
            )
        else:
            source = source or Path(backbone.path or backbone.gguf or TINY / str(backbone.tiny))
            if not source.exists():
                raise InputError(f"{source}: no such backbone (config: judges.*.backbone)")
            with refusing(f"{source}: cannot be made a backbone"):
                _rebuild(backbone, source, folder)
        write_json(provenance("backbone", about), folder / "provenance.json")
    print(f"{output}: {backbone.stem()} is ready")


def _download(backbone: Backbone, folder: Path) -> str:
    """Download a backbone; returns its commit."""
    assert backbone.hub and backbone.revision
    # Weights as safetensors only: no pickle file is downloaded.
    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    advice = "download it elsewhere and set backbone.path"
    return download(backbone.hub, backbone.revision, folder, patterns=patterns, advice=advice)


def _rebuild(backbone: Backbone, source: Path, folder: Path) -> None:
    """Convert from GGUF, keep the first layers, change the tokenizer: load, change, save."""
    import torch
    from transformers import AutoConfig, AutoModel, logging

    from arena_distill.models.layer_reads import keep_layers

    logging.set_verbosity_error()
    where: dict[str, Any] = {
        "pretrained_model_name_or_path": source.parent if backbone.gguf else source
    }
    if backbone.gguf:
        where["gguf_file"] = source.name
    else:
        refuse_weights(source)
        where["use_safetensors"] = True  # never unpickle
    config = AutoConfig.from_pretrained(**where, local_files_only=True, trust_remote_code=False)
    if backbone.layers:
        if backbone.layers > config.num_hidden_layers:
            raise InputError(
                f"config: backbone.layers: {backbone.layers}, but {source} has only "
                f"{config.num_hidden_layers}"
            )
        keep_layers(config, backbone.layers)
    dtype = torch.float32 if backbone.gguf else "auto"
    model, loaded = AutoModel.from_pretrained(
        **where,
        config=config,
        dtype=dtype,
        local_files_only=True,
        trust_remote_code=False,
        ignore_mismatched_sizes=True,  # check_tensors names them
        output_loading_info=True,
    )
    check_tensors(source, loaded, model, cut=True)
    if backbone.gguf:  # the weights are plain tensors now
        model.hf_quantizer, model.is_quantized = None, False
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model = model.to(torch.bfloat16)
    if backbone.tokenizer:
        # AutoTokenizer depends on the model's type too, and may add tokens: load it as later jobs do.
        load_tokenizer(Path(backbone.tokenizer)).save_pretrained(folder)
        config.save_pretrained(folder)
        tokenizer = load_tokenizer(folder)
        torch.manual_seed(0)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        torch.nn.init.normal_(
            model.get_input_embeddings().weight, std=getattr(config, "initializer_range", 0.02)
        )
        for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(model.config, token, getattr(tokenizer, token))
    elif backbone.gguf:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(
            **where, local_files_only=True, trust_remote_code=False
        )
    else:
        tokenizer = load_tokenizer(source)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
