"""Judges learn: LoRA adapters after UT battles, and per fold from votes or from teachers.

Both phases are one call of transformers' Trainer (so accelerate, and several GPUs, come with it) over
sequences assembled from the token file. A judge's folds all start from the same adapter and the same
head: averaging them afterwards relies on it. (Fitted heads differ, but they are linear: their mean is
the mean of what they say of the same features.) Neither the number of processes nor an interruption
changes what is learned: the order of the battles follows from seed and epoch alone, and ``checkpoints``
restores the rest.
"""

from __future__ import annotations

import logging
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, get_peft_model_state_dict
from peft.utils import ModulesToSaveWrapper
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset, Sampler
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_pt_utils import get_length_grouped_indices

from arena_distill.artifacts import (
    atomic_directory,
    full_disk_told,
    provenance,
    read_parquet,
    write_json,
    write_parquet,
)
from arena_distill.backbones import HEADS, check_length, load_classifier
from arena_distill.batching import micro_batch_size, pad
from arena_distill.battles import read_votes
from arena_distill.checkpoints import Checkpoints, digest, file_identities
from arena_distill.distillation import (
    VOTES,
    as_seen,
    attention_divergences,
    feature_distances,
    losses,
    select_rows,
    teacher_logits,
    teacher_states,
    teacher_weights,
)
from arena_distill.encoding import Sequences, Tokens, read_tokens
from arena_distill.errors import InputError
from arena_distill.folds import training_rows
from arena_distill.heads import battle_logits, encode_views
from arena_distill.judge import (
    Attention,
    Head,
    Lora,
    Loss,
    Optimization,
    Precision,
    State,
    Training,
)
from arena_distill.keys import key, locate
from arena_distill.orders import ORDERS, swap_labels
from arena_distill.probing import fit_head
from arena_distill.settings import PretrainingSettings, TrainingSettings
from arena_distill.states import project, projections_of, watch

FILLER = -100
"""The label that weighs nothing, as PyTorch and the Trainer know it."""

PROJECTIONS = "projections.safetensors"
"""In the checkpoints of a student that compares features."""

_LOWER = "lower the learning rate (lr) or max_grad_norm"


@dataclass(frozen=True)
class Launch:
    """How a training job runs; what it computes does not depend on it."""

    micro_batch_size: int = 8
    gradient_checkpointing: bool = False
    fsdp: bool = False
    checkpoints: Path | None = None
    """The folder of this output's checkpoints; None writes none."""
    checkpoint_minutes: float = 30.0
    attention: Attention = "auto"


@dataclass(frozen=True)
class Examples(Dataset):
    """What the Trainer reads: battles as shown, votes as shown, teachers' logits and states as shown.

    A position past the end is a filler (see `ByLength`): a short battle whose label is -100.

    views: the sequences of each battle as shown: one for a joint judge, two for a pointwise one.
    labels: int64 (battles as shown,).
    teachers: float32 (battles as shown, J, 3), or None.
    weights: float32 (battles as shown, J), of the teachers, or None where there are none.
    battles: how many there are, however often each is shown.
    states: by name, of each teacher float16 (battles as shown, sequences of each, width).
    groups: int64 (battles as shown,), of their prompts; None where nobody asks.
    """

    views: tuple[Sequences, ...]
    labels: np.ndarray
    teachers: np.ndarray | None = None
    weights: np.ndarray | None = None
    battles: int = 0
    states: Mapping[State, tuple[np.ndarray, ...]] = field(default_factory=dict)
    groups: np.ndarray | None = None

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each battle's longest sequence: int64 (battles as shown,)."""
        return np.max([view.lengths for view in self.views], axis=0)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, Any]:
        row = i if i < len(self) else int(np.argmin(self.lengths))
        label = self.labels[row] if row == i else np.int64(FILLER)
        item = {"input_ids": [view[row] for view in self.views], "labels": label}
        if self.teachers is None or self.weights is None:
            return item
        states = {name: [values[row] for values in each] for name, each in self.states.items()}
        return item | {"teachers": self.teachers[row], "weights": self.weights[row]} | states


class ByLength(Sampler[int]):
    """Battles in batches of like length, in an order that follows from seed and epoch alone.

    Processes that share a batch all see this order and take their parts of it, so that a batch holds
    the same battles whatever their number. Where the last batch cannot be shared evenly, fillers that
    weigh nothing complete it: the sampler of accelerate would repeat battles instead.

    Args:
        lengths: tokens per row.
        batch_size: rows per optimizer step, over all processes.
        share: rows that the processes take at once; the order's length is a multiple of it.
        epoch: called at the start of an epoch for its number.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        *,
        batch_size: int,
        share: int,
        seed: int,
        epoch: Callable[[], int],
    ) -> None:
        self.lengths: list[int] = lengths.tolist()
        self.batch_size = batch_size
        self.fillers = -len(self.lengths) % share
        self.seed = seed
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths) + self.fillers

    def __iter__(self) -> Iterator[int]:
        dice = torch.Generator().manual_seed(self.seed + self.epoch())
        yield from get_length_grouped_indices(self.lengths, self.batch_size, generator=dice)
        yield from range(len(self.lengths), len(self))


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
    examples = show(read, read_votes(battles, read.keys()), None, None, settings)
    base = _load_base(backbone, settings, read.vocabulary.pad, settings.pretraining.seed, launch)
    model = new_judge(base, settings.lora, settings.pretraining.seed)
    about = provenance("pretraining", settings.model_dump(mode="json"))
    _fit(model, examples, output, settings, VOTES, launch, about)


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
        teachers: each teacher's logits files (see ``distillation.select_rows``).
    """
    table = read_parquet(folds)
    chosen = training_rows(table, fold, unlabelled=settings.pseudo_labels)
    rows = _part(table.take(chosen), settings.training)
    read = read_tokens(tokens)
    read = read.take(locate(key(rows), read.keys(), f"tokens in {tokens}"))
    labels = rows["label"].to_numpy().astype(np.int64)
    targets = weights = None
    states: dict[State, tuple[np.ndarray, ...]] = {}
    if settings.teachers and settings.targets:
        selected = select_rows(teachers, rows, settings.targets)
        targets = teacher_logits(selected)
        states = {name: teacher_states(selected, name) for name in settings.loss.states()}
        # Extra battles were seen by every fold's teacher: no weight is fitted on them. (Nor on those
        # without a vote.)
        held_out = pc.equal(rows["source"], "train").to_numpy(zero_copy_only=False)
        weights = teacher_weights(targets, labels, held_out, settings.loss)
    examples = show(read, labels, targets, weights, settings, states)
    if settings.training.fit_head:
        groups = rows["group"].to_numpy()
        examples = replace(examples, groups=np.tile(groups, len(examples) // len(groups)))
    seed = settings.training.seed + (fold if settings.training.own_start else 0)
    base = _load_base(backbone, settings, read.vocabulary.pad, seed, launch)
    if pretrained is None:
        model = new_judge(base, settings.lora, seed)
    else:
        model = load_adapter(base, pretrained, keep_head=settings.keep_head, trainable=True)
    if states:
        watch(model, states)
    if "features" in states:
        project(model, [of_teacher.shape[-1] for of_teacher in states["features"]], seed=seed)
    phase = "distillation" if settings.teachers else "training"
    about = provenance(phase, settings.model_dump(mode="json") | {"fold": fold})
    _fit(model, examples, output, settings, settings.loss, launch, about)


def _part(rows: pa.Table, training: Training) -> pa.Table:
    """The battles to learn from: the fold's, or the first of a shuffle of them."""
    if training.share == 1:
        return rows
    shuffled = np.random.default_rng(training.seed).permutation(len(rows))
    return rows.take(pa.array(np.sort(shuffled[: max(1, round(training.share * len(rows)))])))


def show(
    tokens: Tokens,
    labels: np.ndarray,
    targets: np.ndarray | None,
    weights: np.ndarray | None,
    settings: PretrainingSettings | TrainingSettings,
    states: Mapping[State, tuple[np.ndarray, ...]] | None = None,
) -> Examples:
    """Battles as they are shown: in order AB, and with `swap` in order BA too; a pointwise judge sees
    each once, and learns from the mean of its teachers' logits of both orders.

    Args:
        labels: int64 (rows,), canonical.
        targets: float32 (rows, teachers, orders, 3), canonical, or None.
        weights: float32 (rows, teachers), or None.
        states: by name, of each teacher float16 (rows, views, width), or None.
    """
    states = states or {}
    if settings.head.kind == "pointwise":
        # Both orders at once: a joint teacher's two verdicts are one target.
        both = None if targets is None else targets.mean(axis=2)
        shown = tuple(encode_views(tokens, settings.encoding, settings.head))
        return Examples(shown, labels, both, weights, len(tokens), states)
    orders = ORDERS if optimization(settings).swap else ORDERS[:1]

    def by_order(values: np.ndarray) -> np.ndarray:
        return np.concatenate([values[:, i : i + 1] for i, _ in enumerate(orders)])

    return Examples(
        (Sequences.concatenate(encode_views(tokens, settings.encoding, settings.head, orders)),),
        np.concatenate([swap_labels(labels) if order == "BA" else labels for order in orders]),
        None
        if targets is None
        else np.concatenate([as_seen(targets, i) for i, _ in enumerate(orders)]),
        None if weights is None else np.concatenate([weights] * len(orders)),
        len(tokens),
        {name: tuple(map(by_order, each)) for name, each in states.items()},
    )


def optimization(settings: PretrainingSettings | TrainingSettings) -> Optimization:
    """How the phase optimizes."""
    return settings.pretraining if isinstance(settings, PretrainingSettings) else settings.training


def new_judge(model: torch.nn.Module, lora: Lora, seed: int) -> PeftModel:
    """Put a fresh adapter on a backbone with a fresh head; the seed decides both."""
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

    def __init__(self, *args: Any, loss: Loss, head: Head, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.loss = loss
        self.head = head
        self.model_accepts_loss_kwargs = True  # so that the Trainer counts each batch's battles

    def _get_train_sampler(self, train_dataset: Any = None) -> ByLength:
        args = self.args
        examples: Any = train_dataset or self.train_dataset
        return ByLength(
            examples.lengths,
            batch_size=args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            share=args.train_batch_size * args.world_size if args.world_size > 1 else 1,
            seed=args.seed,
            epoch=lambda: int(self.state.epoch or 0),
        )

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        labels = inputs.pop("labels")
        teachers, weights = inputs.pop("teachers", None), inputs.pop("weights", None)
        taught: dict[State, Any] = {n: inputs.pop(n) for n in self.loss.states() if n in inputs}
        shape = inputs["input_ids"].shape[:2]  # battles, sequences of each
        outputs = model(**{name: tensor.flatten(0, 1) for name, tensor in inputs.items()})
        logits = battle_logits(outputs.logits.unflatten(0, shape), self.head)
        apart: dict[State, torch.Tensor] = {}
        if "features" in taught:
            projected = [features.unflatten(0, shape) for features in outputs.projected]
            apart["features"] = feature_distances(projected, taught["features"])
        if "attention" in taught:
            looks = outputs.attention.unflatten(0, shape)
            apart["attention"] = attention_divergences(looks, taught["attention"])
        counts = labels != FILLER
        each = losses(logits, labels.where(counts, 0), teachers, weights, self.loss, apart)
        total = (each * counts).sum()
        if num_items_in_batch is None:
            loss = total / counts.sum()
        else:  # the mean over the whole optimizer step; DDP averages gradients over processes
            loss = total / num_items_in_batch * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    # A student's projections are not PEFT's to save: checkpoints hold them, adapters do not.

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        projections = projections_of(self.model)
        if projections and self.args.should_save:
            save_file(projections.state_dict(), f"{output_dir}/{PROJECTIONS}")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if projections := projections_of(self.model):
            projections.load_state_dict(load_file(f"{resume_from_checkpoint}/{PROJECTIONS}"))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        for name in ("loss", "grad_norm"):
            value = float(logs.get(name, 0.0))
            if not math.isfinite(value):
                raise InputError(f"step {self.state.global_step}: {name} is {value}: {_LOWER}")


class Progress(TrainerCallback):
    """A line per fiftieth of the way, instead of the Trainer's bar: logs are read as files."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        last, every = state.log_history[-1], max(1, state.max_steps // 50)
        if state.is_world_process_zero and "loss" in last and state.global_step % every == 0:
            print(
                f"step {state.global_step}/{state.max_steps}, epoch {last['epoch']:.2f}: "
                f"loss {last['loss']:.4f}, gradient {last['grad_norm']:.3f}, "
                f"lr {last['learning_rate']:.2e}",
                flush=True,
            )


def _fit(
    model: PeftModel,
    examples: Examples,
    output: Path,
    settings: PretrainingSettings | TrainingSettings,
    loss: Loss,
    launch: Launch,
    about: dict[str, Any],
) -> None:
    """Train, and write the adapter's folder: PEFT files, metrics.json, history.parquet.

    Raises:
        Stopped: the job was told to end before; a checkpoint holds what was done.
    """
    if not len(examples):
        raise InputError(f"{output}: there is no battle to train on")
    check_length(model, int(examples.lengths.max()))
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as scratch:
        folder, checkpoints = Path(scratch), None
        arguments = _arguments(folder, optimization(settings), settings.precision, launch)
        if launch.checkpoints:
            folder = launch.checkpoints / _key(model, examples, about, arguments.world_size)
            checkpoints = Checkpoints(folder, every=60 * launch.checkpoint_minutes)
            arguments.output_dir = str(folder)
        if checkpoints is None or not checkpoints.finished.exists():
            trainer = JudgeTrainer(
                model=model,
                args=arguments,
                train_dataset=examples,
                data_collator=_collator(model.config.pad_token_id),
                callbacks=[Progress, *([checkpoints] if checkpoints else [])],
                loss=loss,
                head=settings.head,
            )
            trainer.remove_callback(ProgressCallback)
            trainer.remove_callback(PrinterCallback)
            latest = checkpoints.latest() if checkpoints else None
            if latest:
                print(f"{latest}: going on from there", flush=True)
            elif examples.groups is not None:
                # Not before: the key of checkpoints is of what is exactly the same in each attempt.
                # Twice the tokens of a step: nothing is kept for a backward pass.
                room = 2 * launch.micro_batch_size * int(examples.lengths.max())
                fit_head(model, examples, loss=loss, head=settings.head, batch_tokens=room)
            with checkpoints.listening() if checkpoints else nullcontext(), full_disk_told(folder):
                result = trainer.train(resume_from_checkpoint=str(latest) if latest else None)
            if checkpoints:
                checkpoints.raise_if_stopped(trainer.state)
            if not all(torch.isfinite(p).all() for p in model.parameters() if p.requires_grad):
                raise InputError(f"{output}: the last step left no finite weights: {_LOWER}")
            seconds = checkpoints.seconds if checkpoints else result.metrics["train_runtime"]
            if trainer.is_world_process_zero():
                finished = checkpoints.finished if checkpoints else output
                _write(trainer, examples, finished, about, seconds=seconds)
        if checkpoints and arguments.process_index == 0:
            checkpoints.publish(output)


def _key(model: PeftModel, examples: Examples, about: dict[str, Any], world_size: int) -> str:
    """Of everything that decides the weights; how it is launched does not, but for rounding."""
    arrays = [*(a for view in examples.views for a in (view.ids, view.offsets)), examples.labels]
    arrays += [a for a in (examples.teachers, examples.weights) if a is not None]
    arrays += [a for each in examples.states.values() for a in each]
    start = [p for p in model.parameters() if p.requires_grad]
    backbone = file_identities(Path(model.config.name_or_path))
    settings = about | {"world_size": world_size, "backbone": backbone}
    return digest(settings, [*arrays, *start])


def _write(
    trainer: JudgeTrainer,
    examples: Examples,
    output: Path,
    about: dict[str, Any],
    *,
    seconds: float,
) -> None:
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    history = _history(trainer.state.log_history)
    tokens = sum(len(view.ids) for view in examples.views)
    trainable, parameters = model.get_nb_trainable_parameters()  # knows how many NF4 packs into one
    metrics: dict[str, Any] = {
        "battles": examples.battles,
        "sequences": len(examples) * len(examples.views),
        "tokens": tokens,
        "longest": int(examples.lengths.max()),
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "train_loss": pc.mean(history["loss"]).as_py(),
        "trainable_parameters": trainable,
        "parameters": parameters,
        "seconds": round(seconds, 3),
        "provenance": about,
    }
    if examples.weights is not None:
        metrics["teacher_weights"] = examples.weights.mean(axis=0, dtype=np.float64).tolist()
    for adapter in model.peft_config.values():
        targets: Any = getattr(adapter, "target_modules", None)
        if isinstance(targets, set):  # each process would write it in another order
            adapter.target_modules = sorted(targets)
    # Only what was trained: to ask for all of a backbone that is spread would need all processes.
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    with atomic_directory(output) as folder:
        model.save_pretrained(str(folder), state_dict=trained)
        write_json(metrics, folder / "metrics.json")
        write_parquet(history, folder / "history.parquet", about)
    speed = tokens * metrics["epochs"] / max(seconds, 1e-9)
    print(
        f"{metrics['sequences']:,} sequences, {trainer.state.global_step} steps, "
        f"loss {metrics['train_loss']:.4f}, {speed:,.0f} tokens/s"
    )


def _arguments(
    folder: Path, optimization: Optimization, precision: Precision, launch: Launch
) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(folder),
        learning_rate=optimization.lr,
        num_train_epochs=optimization.epochs,
        lr_scheduler_type="cosine",
        warmup_steps=optimization.warmup_steps,
        weight_decay=optimization.weight_decay,
        adam_beta1=optimization.betas[0],
        adam_beta2=optimization.betas[1],
        max_grad_norm=optimization.max_grad_norm,
        seed=optimization.seed,
        bf16=precision != "fp32",
        use_cpu=not torch.accelerator.is_available(),
        activation_checkpointing=launch.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        remove_unused_columns=False,
        label_names=["labels"],
        logging_steps=1,  # so that the history does not depend on where a job was interrupted
        logging_nan_inf_filter=False,  # it would put the mean of earlier losses in place of a NaN
        save_strategy="no",  # `Checkpoints` decides when
        save_total_limit=2,
        report_to="none",
    )
    devices = arguments.world_size * max(1, arguments.n_gpu)
    if optimization.batch_size % devices:
        raise InputError(
            f"config: batch_size {optimization.batch_size} cannot be shared by {devices} devices; "
            "make it a multiple"
        )
    share = optimization.batch_size // devices
    micro = micro_batch_size(share, launch.micro_batch_size)
    arguments.per_device_train_batch_size = micro
    arguments.gradient_accumulation_steps = share // micro
    return arguments


def _collator(pad_token_id: int) -> Any:
    def collate(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids, mask = pad([ids for item in items for ids in item["input_ids"]], pad_token_id)
        shape = len(items), -1, ids.shape[1]  # battles, sequences of each, tokens
        batch = {"input_ids": ids.reshape(shape), "attention_mask": mask.reshape(shape)}
        for name in ("labels", "teachers", "weights"):
            if name in items[0]:
                batch[name] = np.stack([item[name] for item in items])
        tensors: dict[str, Any] = {n: torch.from_numpy(values) for n, values in batch.items()}
        for name in get_args(State):
            if name in items[0]:  # a tensor per teacher: their hidden sizes differ
                per_teacher = zip(*(item[name] for item in items), strict=True)
                tensors[name] = [torch.from_numpy(np.stack(values)) for values in per_teacher]
        if "attention" in tensors:
            tensors["attention"] = [a[..., : shape[2]] for a in tensors["attention"]]
        return tensors

    return collate


def _history(log: list[dict[str, float]]) -> pa.Table:
    steps = [entry for entry in log if "loss" in entry]
    columns = ("step", "epoch", "loss", "learning_rate", "grad_norm")
    return pa.table({name: [entry.get(name, math.nan) for entry in steps] for name in columns})


def _load_base(
    backbone: Path,
    settings: PretrainingSettings | TrainingSettings,
    pad_token_id: int,
    seed: int,
    launch: Launch,
) -> Any:
    return load_classifier(
        backbone,
        head=settings.head,
        precision=settings.precision,
        attention=launch.attention,
        pad_token_id=pad_token_id,
        head_seed=seed,
        shards=int(os.environ.get("WORLD_SIZE", "1")) if launch.fsdp else 1,
    )


def _head_in_float32(model: torch.nn.Module) -> None:
    """Adapters are float32 by themselves; a head in bfloat16 would lose the small steps of AdamW."""
    for name in HEADS:
        head = getattr(model, name, None)
        if isinstance(head, torch.nn.Module):
            head.float()
