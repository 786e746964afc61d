"""Train judges: post-pretraining on UT battles, then per fold on votes or teachers' logits.

Both phases call transformers' Trainer (which brings accelerate and several GPUs) on sequences built from
the token file. ``models.adapters`` decides what is trained: an adapter, or all weights. All folds of a
judge start from the same weights and the same head, because averaging them requires it. (Fitted heads
differ, but they are linear: their mean gives the mean of their outputs on the same features.) The result
depends neither on the number of processes nor on interruptions: the order of the battles follows from
seed and epoch only, and ``checkpoints`` restores the rest.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from accelerate import PartialState
from transformers import (
    PrinterCallback,
    ProgressCallback,
    TrainingArguments,
)
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import IntervalStrategy

from arena_distill import layout
from arena_distill.battles.folds import choice_rows, training_rows, undivided_groups
from arena_distill.battles.votes import votes_of
from arena_distill.config.compute import Precision
from arena_distill.config.model_files import ModelFolder
from arena_distill.config.phases.training import PretrainingSettings, TrainingSettings
from arena_distill.config.training import WARMUP, Loss, Optimization, State
from arena_distill.encoding.sequences import Vocabulary, read_tokens
from arena_distill.errors import InputError
from arena_distill.files.artifacts import (
    atomic_directory,
    file_sha256,
    fingerprint,
    provenance,
    read_parquet,
    report_full_disk,
    write_json,
    write_parquet,
)
from arena_distill.files.keys import key, locate
from arena_distill.models.adapters import (
    Judge,
    head_of,
    parameters_of,
    save_judge,
    start_judge,
)
from arena_distill.models.hidden_states import capture, project
from arena_distill.models.loading import check_length
from arena_distill.runtime.launch import Launch
from arena_distill.training.checkpoints import Checkpoints, digest, file_identities
from arena_distill.training.examples import (
    LOWER,
    Examples,
    collator,
    make_examples,
    optimization,
    part_of,
)
from arena_distill.training.judge_trainer import CHOICE_LOSS, JudgeTrainer, Progress
from arena_distill.training.linear_probe import fit_head
from arena_distill.training.probe import fit_layer_head
from arena_distill.training.targets import (
    VOTE_LOSS,
    teacher_states,
    weighted_targets,
)


def pretrain_adapter(
    backbone: Path,
    tokens: Path,
    output: Path,
    *,
    settings: PretrainingSettings,
    launch: Launch,
) -> None:
    """Post-pretrain a judge on the votes of the UT battles."""
    read = read_tokens(tokens)
    read = read.take(pc.equal(read.sources, "ut").to_numpy(zero_copy_only=False))
    examples = make_examples(read, read.votes, None, None, settings)
    if settings.head.pooling == "layers":
        examples = replace(examples, groups=read.fields["prompt"].tokens.alike())
    seed = settings.pretraining.seed
    model = start_judge(
        backbone, None, settings.lora, seed=seed, **_how(settings, read.vocabulary, launch)
    )
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

    Training never reads the fold's validation rows, not even to choose a checkpoint: that is done by the
    battles for choices, which no score uses.

    Args:
        pretrained: the folder of the post-pretraining to start from; None: the backbone.
        teachers: each teacher's logits files (see ``targets.select_rows``).
    """
    table = read_parquet(folds)
    chosen = training_rows(table, fold, unlabelled=settings.pseudo_labels)
    rows = part_of(table.take(chosen), settings.training.share, settings.training.seed)
    every = read_tokens(tokens)
    read = every.take(locate(key(rows), every.keys(), f"tokens in {tokens}"))
    votes = votes_of(rows)
    targets = weights = None
    states: dict[State, tuple[np.ndarray, ...]] = {}
    if settings.teachers and settings.targets:
        selected, votes, targets, weights = weighted_targets(
            teachers, rows, table, targets=settings.targets, loss=settings.loss
        )
        states = {name: teacher_states(selected, name) for name in settings.loss.states()}
    examples = make_examples(read, votes, targets, weights, settings, states)
    if settings.training.fit_head:
        groups = undivided_groups(rows)
        examples = replace(examples, groups=np.tile(groups, len(examples) // len(groups)))
    seed = settings.training.seed + (fold if settings.training.own_start else 0)
    model = start_judge(
        backbone,
        pretrained,
        settings.lora,
        seed=seed,
        keep_head=settings.keep_head,
        **_how(settings, read.vocabulary, launch),
    )
    if states:
        capture(model, states)
    if "features" in states:
        project(model, [of_teacher.shape[-1] for of_teacher in states["features"]], seed=seed)
    choices = None
    if settings.training.eval_steps and len(apart := table.take(choice_rows(table))):
        shown = every.take(locate(key(apart), every.keys(), f"tokens in {tokens}"))
        once = settings.training.model_copy(update={"swap": False})
        one_order = settings.model_copy(update={"training": once})
        choices = make_examples(shown, votes_of(apart), None, None, one_order)
    phase = "distillation" if settings.teachers else "training"
    about = provenance(phase, settings.model_dump(mode="json") | {"fold": fold})
    made_from = {"folds": fingerprint(table), "fold": fold}
    about["made_from"] = made_from | {"backbone": ModelFolder(backbone).fingerprint()}
    _fit(model, examples, output, settings, settings.loss, launch, about, choices)


def _fit(
    model: Judge,
    examples: Examples,
    output: Path,
    settings: PretrainingSettings | TrainingSettings,
    loss: Loss,
    launch: Launch,
    about: dict[str, Any],
    choices: Examples | None = None,
) -> None:
    """Train, and write what was trained (``adapters.save_judge``), metrics.json, history.parquet.

    Args:
        choices: battles whose log loss is measured during training.

    Raises:
        Stopped: a signal stopped training; a checkpoint holds its state.
    """
    if not len(examples):
        raise InputError(f"{output}: there is no battle to train on")
    longest = int(examples.lengths.max())
    check_length(model, longest)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as scratch:
        folder, checkpoints = Path(scratch), None
        arguments = _arguments(folder, optimization(settings), settings.precision, launch)
        training = settings.training if isinstance(settings, TrainingSettings) else None
        if training and choices:
            arguments.eval_strategy = IntervalStrategy.STEPS
            arguments.eval_steps = training.eval_steps
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
                eval_dataset=choices,
                data_collator=collator(model.config.pad_token_id),
                callbacks=[Progress, *([checkpoints] if checkpoints else [])],
                loss=loss,
                head=settings.head,
                training=training,
                micro_batch_tokens=launch.micro_batch_size * longest,
            )
            trainer.remove_callback(ProgressCallback)
            trainer.remove_callback(PrinterCallback)
            latest = checkpoints.latest() if checkpoints else None
            trainer.add_callback(_board(output, anew=latest is None))
            if latest:
                print(f"{latest}: going on from there", flush=True)
            elif examples.groups is not None:
                # Not earlier: the key of checkpoints must be the same in each attempt.
                # Twice the tokens of a step, because there is no backward pass.
                room = 2 * launch.micro_batch_size * longest
                fit = fit_layer_head if settings.head.pooling == "layers" else fit_head
                fit(model, examples, loss=loss, head=settings.head, batch_tokens=room)
            with (
                checkpoints.listening() if checkpoints else nullcontext(),
                report_full_disk(folder),
            ):
                result = trainer.train(resume_from_checkpoint=str(latest) if latest else None)
            if checkpoints:
                checkpoints.raise_if_stopped(trainer.state)
            trainer.keep_best()
            trained = trainer.whole()
            if not all(torch.isfinite(weight).all() for weight in trained.values()):
                raise InputError(f"{output}: the last step left no finite weights: {LOWER}")
            seconds = checkpoints.seconds if checkpoints else result.metrics["train_runtime"]
            if trainer.is_world_process_zero():
                finished = checkpoints.finished if checkpoints else output
                _write(trainer, trained, examples, finished, about, seconds=seconds)
        if checkpoints and arguments.process_index == 0:
            checkpoints.publish(output)


def _board(adapter: Path, *, anew: bool) -> TensorBoardCallback:
    """Writes TensorBoard files; those of an earlier training are removed if this one starts `anew`."""
    folder = Path(layout.tensorboard(str(adapter)))
    if anew and PartialState().is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
    board = TensorBoardCallback()
    board.logging_dir = str(folder)
    return board


def _key(model: Judge, examples: Examples, about: dict[str, Any], world_size: int) -> str:
    """A key of all that determines the weights; launch options do not, except for rounding."""
    arrays = [a for view in examples.views for a in (view.ids, view.offsets)]
    arrays += [examples.votes.probabilities, examples.votes.weights]
    arrays += [a for a in (examples.teachers, examples.weights) if a is not None]
    arrays += [a for each in examples.states.values() for a in each]
    # What the model's own files hold, they stand for.
    body = f"{model.base_model_prefix}."
    start = [
        p for name, p in model.named_parameters() if p.requires_grad and not name.startswith(body)
    ]
    backbone = file_identities(Path(str(model.config.name_or_path)))
    settings = about | {"world_size": world_size, "backbone": backbone}
    return digest(settings, [*arrays, *start])


def _write(
    trainer: JudgeTrainer,
    trained: Mapping[str, torch.Tensor],
    examples: Examples,
    output: Path,
    about: dict[str, Any],
    *,
    seconds: float,
) -> None:
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    history = _history(trainer.state.log_history)
    tokens = sum(len(view.ids) for view in examples.views)
    learned, parameters = parameters_of(model)
    metrics: dict[str, Any] = {
        "battles": examples.battles,
        "sequences": len(examples) * len(examples.views),
        "tokens": tokens,
        "longest": int(examples.lengths.max()),
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "train_loss": pc.mean(history["loss"]).as_py(),
        "trainable_parameters": learned,
        "parameters": parameters,
        "seconds": round(seconds, 3),
        "provenance": about,
    }
    if measured := [entry for entry in trainer.state.log_history if CHOICE_LOSS in entry]:
        kept = min(measured, key=lambda e: e[CHOICE_LOSS]) if trainer.best else measured[-1]
        metrics |= {"kept_step": kept["step"], "choice_loss": kept[CHOICE_LOSS]}
    if examples.weights is not None:
        metrics["teacher_weights"] = examples.weights.mean(axis=0, dtype=np.float64).tolist()
    if head := head_of(model):
        metrics |= {"reads": head.reader.reads, "marker": head.reader.marker.tolist()}
    with atomic_directory(output) as folder:
        files = save_judge(model, trained, folder)
        metrics["sha256"] = {name: file_sha256(folder / name) for name in files}
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
        prediction_loss_only=True,
        report_to=_service(launch.report_to),
    )
    devices = arguments.world_size * max(1, arguments.n_gpu)
    if optimization.batch_size % devices:
        raise InputError(
            f"config: batch_size {optimization.batch_size} cannot be shared by {devices} devices; "
            "make it a multiple"
        )
    arguments.per_device_train_batch_size = optimization.batch_size // devices
    arguments.per_device_eval_batch_size = launch.micro_batch_size
    return arguments


def _service(name: str) -> str:
    """The service that training reports to.

    Raises:
        InputError: its package is not installed.
    """
    if name != "none" and find_spec(name) is None:
        raise InputError(f"config: compute.report_to: {name} is not installed: pip install {name}")
    return name


def _history(log: list[dict[str, float]]) -> pa.Table:
    """A row per step; `choice_loss`, the log loss on the battles for choices, where it was measured."""
    steps = [entry for entry in log if "loss" in entry]
    columns = ("step", "epoch", "loss", "learning_rate", "grad_norm")
    table = {name: [entry.get(name, math.nan) for entry in steps] for name in columns}
    measured = {entry["step"]: entry[CHOICE_LOSS] for entry in log if CHOICE_LOSS in entry}
    choice_loss = pa.array([measured.get(step) for step in table["step"]], pa.float64())
    return pa.table(table | {"choice_loss": choice_loss})


def _how(
    settings: PretrainingSettings | TrainingSettings, vocabulary: Vocabulary, launch: Launch
) -> dict[str, Any]:
    """How to load the judge that is trained."""
    return {
        "head": settings.head,
        "precision": settings.precision,
        "attention": launch.attention,
        "pad_token_id": vocabulary.pad,
        "marker": vocabulary.one_answer[settings.encoding.template][1],
        "shards": int(os.environ.get("WORLD_SIZE", "1")) if launch.fsdp else 1,
    }
