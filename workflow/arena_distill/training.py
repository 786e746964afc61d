"""Judges learn: LoRA adapters after UT battles, and per fold from votes or from teachers.

Both phases are one call of transformers' Trainer (so accelerate, and several GPUs under torchrun, come
with it) over sequences assembled from the token file. A judge's folds all start from the same adapter
and the same head: averaging them afterwards relies on it.
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, get_peft_model_state_dict
from peft.utils import ModulesToSaveWrapper
from safetensors import safe_open
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, set_seed

from arena_distill.artifacts import (
    atomic_directory,
    provenance,
    read_parquet,
    write_json,
    write_parquet,
)
from arena_distill.backbones import HEADS, check_length, load_classifier
from arena_distill.batching import pad
from arena_distill.battles import read_votes
from arena_distill.config import Lora, Loss, Optimization, Precision
from arena_distill.distillation import VOTES, as_seen, losses, teacher_targets
from arena_distill.encoding import Sequences, Tokens, encode, read_tokens
from arena_distill.errors import InputError
from arena_distill.folds import training_rows
from arena_distill.keys import key, locate
from arena_distill.orders import ORDERS, swap_labels
from arena_distill.settings import PretrainingSettings, TrainingSettings

_LOWER = "lower the learning rate (lr) or max_grad_norm"


@dataclass(frozen=True)
class Launch:
    """How a training job runs; what it computes does not depend on it."""

    micro_batch_size: int = 8
    gradient_checkpointing: bool = False


@dataclass(frozen=True)
class Examples(Dataset):
    """What the Trainer reads: sequences as shown, votes as shown, teachers' logits as shown.

    sequences: one per shown battle.
    labels: int64 (sequences,).
    teachers: float32 (sequences, J, 3), or None.
    """

    sequences: Sequences
    labels: np.ndarray
    teachers: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, i: int) -> dict[str, Any]:
        item = {"input_ids": self.sequences[i], "labels": self.labels[i]}
        return item if self.teachers is None else item | {"teachers": self.teachers[i]}


def pretrain_adapter(
    backbone: Path,
    tokens: Path,
    battles: Path,
    output: Path,
    *,
    settings: PretrainingSettings,
    launch: Launch,
) -> None:
    """Post-pretrain a judge's adapter on the votes of the UT battles."""
    read = read_tokens(tokens)
    read = read.take(pc.equal(read.sources, "ut").to_numpy(zero_copy_only=False))
    examples = show(read, read_votes(battles, read.keys()), None, settings)
    model = new_judge(
        backbone, settings.lora, settings.precision, read.vocabulary.pad, settings.pretraining.seed
    )
    about = provenance("pretraining", settings.model_dump(mode="json"))
    _fit(model, examples, output, settings.pretraining, VOTES, settings.precision, launch, about)


def train_fold(
    backbone: Path,
    pretrained: Path | None,
    tokens: Path,
    folds: Path,
    fold: int,
    output: Path,
    *,
    teachers: Mapping[str, Sequence[Path]],
    settings: TrainingSettings,
    launch: Launch,
) -> None:
    """Train one fold's judge: on votes, or on its teachers' logits where it has teachers.

    The fold's validation rows are read by nothing here: no checkpoint is chosen by them.

    Args:
        pretrained: the post-pretrained adapter to start from; None starts a fresh one.
        teachers: each teacher's logits files (see ``distillation.teacher_targets``).
    """
    table = read_parquet(folds)
    rows = table.take(training_rows(table, fold))
    read = read_tokens(tokens)
    read = read.take(locate(key(rows), read.keys(), f"tokens in {tokens}"))
    targets = None
    if settings.teachers and settings.targets:
        targets = teacher_targets(teachers, rows, settings.targets)
    examples = show(read, rows["label"].to_numpy().astype(np.int64), targets, settings)
    seed = settings.training.seed
    if pretrained is None:
        model = new_judge(backbone, settings.lora, settings.precision, read.vocabulary.pad, seed)
    else:
        model = _load_base(backbone, settings.precision, read.vocabulary.pad, seed)
        model = load_adapter(model, pretrained, keep_head=settings.keep_head, trainable=True)
    phase = "distillation" if settings.teachers else "training"
    about = provenance(phase, settings.model_dump(mode="json") | {"fold": fold})
    loss = settings.loss or VOTES
    _fit(model, examples, output, settings.training, loss, settings.precision, launch, about)


def show(
    tokens: Tokens,
    labels: np.ndarray,
    targets: np.ndarray | None,
    settings: PretrainingSettings | TrainingSettings,
) -> Examples:
    """Battles as they are shown: in order AB, and with `swap` in order BA too.

    Args:
        labels: int64 (rows,), canonical.
        targets: float32 (rows, teachers, orders, 3), canonical, or None.
    """
    optimization = (
        settings.pretraining if isinstance(settings, PretrainingSettings) else settings.training
    )
    orders = ORDERS if optimization.swap else ORDERS[:1]
    return Examples(
        Sequences.concatenate([encode(tokens, settings.encoding, order) for order in orders]),
        np.concatenate([swap_labels(labels) if order == "BA" else labels for order in orders]),
        None
        if targets is None
        else np.concatenate([as_seen(targets, i) for i, _ in enumerate(orders)]),
    )


def new_judge(
    backbone: Path, lora: Lora, precision: Precision, pad_token_id: int, seed: int
) -> PeftModel:
    """A backbone with a fresh adapter and a fresh head, both decided by the seed."""
    model = _load_base(backbone, precision, pad_token_id, seed)
    _head_in_float32(model)
    set_seed(seed)
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS,  # the head is trained too, and saved beside the adapter
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.targets if isinstance(lora.targets, str) else list(lora.targets),
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise InputError(f"config: lora.targets: {error}") from None


def load_adapter(
    model: torch.nn.Module, adapter: Path, *, keep_head: bool = True, trainable: bool = False
) -> PeftModel:
    """Put a saved adapter on a backbone; without `keep_head` the backbone's own fresh head stays.

    Raises:
        InputError: the folder holds no adapter, or one of another backbone.
    """
    weights = adapter / "adapter_model.safetensors"
    if not weights.is_file():  # PEFT would ask the hub for it
        raise InputError(f"{adapter}: no adapter: {weights.name} is missing")
    _head_in_float32(model)
    try:
        judge = PeftModel.from_pretrained(model, adapter, is_trainable=trainable)
        with safe_open(weights, "pt") as file:
            stored = set(file.keys())
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{adapter}: no adapter for this backbone: {error}") from None
    # PEFT only warns of layers that the adapter or the backbone lacks.
    differing = stored ^ set(get_peft_model_state_dict(judge, save_embedding_layers=False))
    if differing:
        raise InputError(
            f"{adapter}: no adapter for this backbone: {len(differing)} tensors are in one and not "
            f"in the other, {min(differing)} among them"
        )
    if not keep_head:
        for module in judge.modules():
            if isinstance(module, ModulesToSaveWrapper):
                fresh = module.original_module.state_dict()
                module.modules_to_save[judge.active_adapter].load_state_dict(fresh)
    return judge


class JudgeTrainer(Trainer):
    """The Trainer with a judge's loss, exact under gradient accumulation and over devices."""

    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, loss: Loss, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.loss = loss
        self.model_accepts_loss_kwargs = True  # so that the Trainer counts each batch's battles

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        labels, teachers = inputs.pop("labels"), inputs.pop("teachers", None)
        outputs = model(**inputs)
        total = losses(outputs.logits, labels, teachers, self.loss).sum()
        if num_items_in_batch is None:
            loss = total / len(labels)
        else:  # the mean over the whole optimizer step; DDP averages gradients over processes
            loss = total / num_items_in_batch * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        for name in ("loss", "grad_norm"):
            value = float(logs.get(name, 0.0))
            if not math.isfinite(value):
                raise InputError(f"step {self.state.global_step}: {name} is {value}: {_LOWER}")


def _fit(
    model: PeftModel,
    examples: Examples,
    output: Path,
    optimization: Optimization,
    loss: Loss,
    precision: Precision,
    launch: Launch,
    about: dict[str, Any],
) -> None:
    """Train, and write the adapter's folder: PEFT files, metrics.json, history.parquet."""
    if not len(examples):
        raise InputError(f"{output}: there is no battle to train on")
    check_length(model, int(examples.sequences.lengths.max()))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = JudgeTrainer(
            model=model,
            args=_arguments(scratch, optimization, precision, launch),
            train_dataset=examples,
            data_collator=_collator(model.config.pad_token_id),
            loss=loss,
        )
        result = trainer.train()
    if not all(torch.isfinite(p).all() for p in model.parameters() if p.requires_grad):
        raise InputError(f"{output}: the last step left no finite weights: {_LOWER}")
    if not trainer.is_world_process_zero():
        return
    tokens = int(examples.sequences.lengths.sum())
    metrics: dict[str, Any] = {
        "sequences": len(examples),
        "tokens": tokens,
        "longest": int(examples.sequences.lengths.max()),
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "train_loss": result.training_loss,
        "trainable_parameters": trainable,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(result.metrics["train_runtime"], 3),
        "provenance": about,
    }
    for adapter in model.peft_config.values():
        targets: Any = getattr(adapter, "target_modules", None)
        if isinstance(targets, set):  # each process would write it in another order
            adapter.target_modules = sorted(targets)  # type: ignore[attr-defined]
    with atomic_directory(output) as folder:
        model.save_pretrained(str(folder))
        write_json(metrics, folder / "metrics.json")
        write_parquet(_history(trainer.state.log_history), folder / "history.parquet", about)
    speed = tokens * metrics["epochs"] / max(metrics["seconds"], 1e-9)
    print(
        f"{output}: {len(examples):,} sequences, {trainer.state.global_step} steps, "
        f"loss {result.training_loss:.4f}, {speed:,.0f} tokens/s"
    )


def _arguments(
    scratch: str, optimization: Optimization, precision: Precision, launch: Launch
) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=scratch,
        learning_rate=optimization.lr,
        num_train_epochs=optimization.epochs,
        lr_scheduler_type="cosine",
        warmup_steps=optimization.warmup_steps,
        weight_decay=optimization.weight_decay,
        adam_beta1=optimization.betas[0],
        adam_beta2=optimization.betas[1],
        max_grad_norm=optimization.max_grad_norm,
        seed=optimization.seed,
        bf16=precision == "bf16",
        use_cpu=not torch.accelerator.is_available(),
        activation_checkpointing=launch.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        train_sampling_strategy="group_by_length",
        remove_unused_columns=False,
        label_names=["labels"],
        logging_steps=0.02,
        logging_nan_inf_filter=False,  # it would put the mean of earlier losses in place of a NaN
        save_strategy="no",
        report_to="none",
        disable_tqdm=False,
    )
    devices = arguments.world_size * max(1, arguments.n_gpu)
    if optimization.batch_size % devices:
        raise InputError(
            f"config: batch_size {optimization.batch_size} cannot be shared by {devices} devices; "
            "make it a multiple"
        )
    # The largest micro batch within the bound whose multiples make the batch.
    share = optimization.batch_size // devices
    micro = max(n for n in range(1, min(launch.micro_batch_size, share) + 1) if share % n == 0)
    arguments.per_device_train_batch_size = micro
    arguments.gradient_accumulation_steps = share // micro
    return arguments


def _collator(pad_token_id: int) -> Any:
    def collate(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids, mask = pad([item["input_ids"] for item in items], pad_token_id)
        batch = {"input_ids": ids, "attention_mask": mask}
        for name in ("labels", "teachers"):
            if name in items[0]:
                batch[name] = np.stack([item[name] for item in items])
        return {name: torch.from_numpy(values) for name, values in batch.items()}

    return collate


def _history(log: list[dict[str, float]]) -> pa.Table:
    steps = [entry for entry in log if "loss" in entry]
    columns = ("step", "epoch", "loss", "learning_rate", "grad_norm")
    return pa.table({name: [entry.get(name, math.nan) for entry in steps] for name in columns})


def _load_base(backbone: Path, precision: Precision, pad_token_id: int, seed: int) -> Any:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return load_classifier(backbone, dtype=dtype, pad_token_id=pad_token_id, head_seed=seed)


def _head_in_float32(model: torch.nn.Module) -> None:
    """Adapters are float32 by themselves; a head in bfloat16 would lose the small steps of AdamW."""
    for name in HEADS:
        head = getattr(model, name, None)
        if isinstance(head, torch.nn.Module):
            head.float()
