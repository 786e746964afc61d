"""Train LoRA adapters: post-pretraining on UT battles, then per fold on votes or teachers' logits.

Both phases call transformers' Trainer (which brings accelerate and several GPUs) on sequences built from
the token file. All folds of a judge start from the same adapter and the same head, because averaging
them requires it. (Fitted heads differ, but they are linear: their mean gives the mean of their outputs
on the same features.) The result depends neither on the number of processes nor on interruptions: the
order of the battles follows from seed and epoch only, and ``checkpoints`` restores the rest.
"""

from __future__ import annotations

import logging
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from arena_distill.battles.folds import training_rows, undivided_groups
from arena_distill.battles.votes import votes_of
from arena_distill.config.judge import (
    WARMUP,
    Head,
    Loss,
    Optimization,
    Precision,
    State,
    Training,
)
from arena_distill.config.model_files import ModelFolder
from arena_distill.config.phases import PretrainingSettings, TrainingSettings
from arena_distill.encoding.batching import micro_batch_size
from arena_distill.encoding.sequences import read_tokens
from arena_distill.errors import InputError
from arena_distill.files.artifacts import (
    atomic_directory,
    check_made_from,
    file_sha256,
    fingerprint,
    provenance,
    read_parquet,
    read_provenance,
    report_full_disk,
    write_json,
    write_parquet,
)
from arena_distill.files.keys import key, locate
from arena_distill.files.logits import ids_path
from arena_distill.models.adapters import ADAPTER_FILES, check_adapter, load_adapter, new_judge
from arena_distill.models.heads import battle_logits
from arena_distill.models.hidden_states import capture, project, projections_of
from arena_distill.models.loading import check_length, load_classifier
from arena_distill.runtime.launch import Launch
from arena_distill.training.checkpoints import Checkpoints, digest, file_identities
from arena_distill.training.examples import (
    FILLER,
    LOWER,
    UNTRAINED,
    ByLength,
    Examples,
    collator,
    make_examples,
    optimization,
)
from arena_distill.training.linear_probe import fit_head
from arena_distill.training.losses import attention_divergences, battle_losses, feature_distances
from arena_distill.training.targets import (
    VOTE_LOSS,
    select_rows,
    teacher_logits,
    teacher_states,
    teacher_weights,
)

PROJECTIONS = "projections.safetensors"
"""In the checkpoints of a student with a loss on features."""


def pretrain_adapter(
    backbone: Path,
    tokens: Path,
    output: Path,
    *,
    settings: PretrainingSettings,
    launch: Launch,
) -> None:
    """Post-pretrain a judge's adapter on the votes of the UT battles."""
    read = read_tokens(tokens)
    read = read.take(pc.equal(read.sources, "ut").to_numpy(zero_copy_only=False))
    examples = make_examples(read, read.votes, None, None, settings)
    base = _load_base(backbone, settings, read.vocabulary.pad, settings.pretraining.seed, launch)
    model = new_judge(base, settings.lora, settings.pretraining.seed)
    about = provenance("pretraining", settings.model_dump(mode="json"))
    about["made_from"] = {"backbone": ModelFolder(backbone).fingerprint()}
    _fit(model, examples, output, settings, VOTE_LOSS, launch, about)


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
    """Train one fold's judge: on its teachers' logits if it has teachers, else on votes.

    Training never reads the fold's validation rows, not even to choose a checkpoint.

    Args:
        pretrained: the post-pretrained adapter to start from; None: a fresh one.
        teachers: each teacher's logits files (see ``distillation.select_rows``).
    """
    table = read_parquet(folds)
    chosen = training_rows(table, fold, unlabelled=settings.pseudo_labels)
    rows = _part(table.take(chosen), settings.training)
    read = read_tokens(tokens)
    read = read.take(locate(key(rows), read.keys(), f"tokens in {tokens}"))
    votes = votes_of(rows)
    targets = weights = None
    states: dict[State, tuple[np.ndarray, ...]] = {}
    if settings.teachers and settings.targets:
        for file in chain.from_iterable(teachers.values()):
            check_made_from(read_provenance(ids_path(file)), file, folds=fingerprint(table))
        selected = select_rows(teachers, rows, settings.targets)
        targets = teacher_logits(selected)
        states = {name: teacher_states(selected, name) for name in settings.loss.states()}
        # Every fold's teacher was trained on the extra battles: they do not enter the fit of weights.
        # (Battles without a vote do not either.)
        held_out = pc.equal(rows["source"], "train").to_numpy(zero_copy_only=False)
        weights = teacher_weights(targets, votes, held_out, settings.loss)
    examples = make_examples(read, votes, targets, weights, settings, states)
    if settings.training.fit_head:
        groups = undivided_groups(rows)
        examples = replace(examples, groups=np.tile(groups, len(examples) // len(groups)))
    seed = settings.training.seed + (fold if settings.training.own_start else 0)
    base = _load_base(backbone, settings, read.vocabulary.pad, seed, launch)
    if pretrained is None:
        model = new_judge(base, settings.lora, seed)
    else:
        check_adapter(pretrained, backbone)
        model = load_adapter(base, pretrained, keep_head=settings.keep_head, trainable=True)
    if states:
        capture(model, states)
    if "features" in states:
        project(model, [of_teacher.shape[-1] for of_teacher in states["features"]], seed=seed)
    phase = "distillation" if settings.teachers else "training"
    about = provenance(phase, settings.model_dump(mode="json") | {"fold": fold})
    made_from = {"folds": fingerprint(table), "fold": fold}
    about["made_from"] = made_from | {"backbone": ModelFolder(backbone).fingerprint()}
    _fit(model, examples, output, settings, settings.loss, launch, about)


def _part(rows: pa.Table, training: Training) -> pa.Table:
    """The battles to train on: the fold's, or the first of a shuffle of them."""
    if training.share == 1:
        return rows
    shuffled = np.random.default_rng(training.seed).permutation(len(rows))
    return rows.take(pa.array(np.sort(shuffled[: max(1, round(training.share * len(rows)))])))


class JudgeTrainer(Trainer):
    """The Trainer with a judge's loss, exact under gradient accumulation and over devices."""

    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, loss: Loss, head: Head, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.loss = loss
        self.head = head
        self.model_accepts_loss_kwargs = True  # the Trainer then counts each batch's battles

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
        counts, labels, votes = (inputs.pop(name) for name in ("counts", "labels", "votes"))
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
        each = battle_losses(logits, votes, teachers, weights, self.loss, apart)
        total = (each * counts).sum()
        if num_items_in_batch is None:
            loss = total / (labels != FILLER).sum()
        else:  # the mean over the whole optimizer step; DDP averages gradients over processes
            loss = total / num_items_in_batch * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    # PEFT does not save a student's projections: checkpoints hold them, adapters do not.

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
                first = self.state.global_step == 1  # computed before any update
                raise InputError(f"step {self.state.global_step}: {name} is {value}: "
                                 f"{UNTRAINED if first else LOWER}")  # fmt: skip


class Progress(TrainerCallback):
    """Print a line per 2 % of the steps instead of the Trainer's bar, for log files."""

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
        Stopped: a signal stopped training; a checkpoint holds its state.
    """
    if not len(examples):
        raise InputError(f"{output}: there is no battle to train on")
    check_length(model, int(examples.lengths.max()))
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as scratch:
        folder, checkpoints = Path(scratch), None
        arguments = _arguments(folder, optimization(settings), settings.precision, launch)
        if launch.checkpoints:
            decided = about | {"settings": settings.as_params()}  # a new key discards nothing
            folder = launch.checkpoints / _key(model, examples, decided, arguments.world_size)
            checkpoints = Checkpoints(folder, every=60 * launch.checkpoint_minutes)
            arguments.output_dir = str(folder)
        if checkpoints is None or not checkpoints.finished.exists():
            trainer = JudgeTrainer(
                model=model,
                args=arguments,
                train_dataset=examples,
                data_collator=collator(model.config.pad_token_id),
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
                # Not earlier: the key of checkpoints must be the same in each attempt.
                # Twice the tokens of a step, because there is no backward pass.
                room = 2 * launch.micro_batch_size * int(examples.lengths.max())
                fit_head(model, examples, loss=loss, head=settings.head, batch_tokens=room)
            with (
                checkpoints.listening() if checkpoints else nullcontext(),
                report_full_disk(folder),
            ):
                result = trainer.train(resume_from_checkpoint=str(latest) if latest else None)
            if checkpoints:
                checkpoints.raise_if_stopped(trainer.state)
            if not all(torch.isfinite(p).all() for p in model.parameters() if p.requires_grad):
                raise InputError(f"{output}: the last step left no finite weights: {LOWER}")
            seconds = checkpoints.seconds if checkpoints else result.metrics["train_runtime"]
            if trainer.is_world_process_zero():
                finished = checkpoints.finished if checkpoints else output
                _write(trainer, examples, finished, about, seconds=seconds)
        if checkpoints and arguments.process_index == 0:
            checkpoints.publish(output)


def _key(model: PeftModel, examples: Examples, about: dict[str, Any], world_size: int) -> str:
    """A key of all that determines the weights; launch options do not, except for rounding."""
    arrays = [a for view in examples.views for a in (view.ids, view.offsets)]
    arrays += [examples.votes.probabilities, examples.votes.weights]
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
    trainable, parameters = model.get_nb_trainable_parameters()  # counts packed NF4 weights
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
        if isinstance(targets, set):  # its order differs between processes
            adapter.target_modules = sorted(targets)
    # Only trained weights: gathering a sharded backbone would need all processes.
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    with atomic_directory(output) as folder:
        model.save_pretrained(str(folder), state_dict=trained)
        metrics["sha256"] = {name: file_sha256(folder / name) for name in ADAPTER_FILES}
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
        warmup_steps=WARMUP if optimization.warmup_steps is None else optimization.warmup_steps,
        weight_decay=optimization.weight_decay,
        adam_beta1=optimization.betas[0],
        adam_beta2=optimization.betas[1],
        max_grad_norm=optimization.max_grad_norm,
        seed=optimization.seed,
        bf16=precision != "fp32",
        use_cpu=not torch.accelerator.is_available(),
        activation_checkpointing=bool(launch.gradient_checkpointing),
        activation_checkpointing_kwargs={"use_reentrant": False},
        remove_unused_columns=False,
        label_names=["labels"],
        logging_steps=1,  # the history must not depend on interruptions
        logging_nan_inf_filter=False,  # it would replace a NaN by the mean of earlier losses
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
