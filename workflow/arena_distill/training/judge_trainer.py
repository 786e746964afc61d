"""Transformers' Trainer with a judge's loss; it watches the log loss of battles that it does not learn."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from arena_distill.config.head import Head
from arena_distill.config.training import Loss, State, Training
from arena_distill.errors import InputError
from arena_distill.files.artifacts import read_json, write_json
from arena_distill.models.heads import battle_logits
from arena_distill.models.hidden_states import projections_of
from arena_distill.training.examples import FILLER, LOWER, UNTRAINED, ByLength, micro_batches
from arena_distill.training.losses import attention_divergences, battle_losses, feature_distances
from arena_distill.training.sharding import (
    load_moments,
    load_weights,
    local,
    save_moments,
    whole,
)
from arena_distill.training.targets import VOTE_LOSS

BEST = "best.safetensors"
"""In checkpoints: the weights with the least log loss so far, if these are kept."""

CHOICE_LOSS = "eval_loss"
"""The Trainer's name of the log loss of the battles for choices."""

PROJECTIONS = "projections.safetensors"
"""In the checkpoints of a student with a loss on features."""


MOMENTS, SCHEDULE = "moments.safetensors", "schedule.json"
"""In the checkpoints of sharded weights: AdamW's states, and the state of the learning rate."""


class JudgeTrainer(Trainer):
    """The Trainer with a judge's loss, exact over micro-batches and devices.

    A batch of the Trainer is a device's share of an optimizer step. It is split into micro-batches here,
    because the Trainer's own have one number of battles, however short these are.

    Evaluations are log losses of the battles for choices, by which it may keep the best weights or stop.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *args: Any,
        loss: Loss,
        head: Head,
        training: Training | None,
        micro_batch_tokens: int,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.micro_batch_tokens = micro_batch_tokens
        self.loss = loss
        self.head = head
        self.training = training
        self.best: dict[str, torch.Tensor] = {}  # of a sharded weight this process's part
        self.sharded = any(isinstance(p.data, DTensor) for _, p in self.trained())
        self.model_accepts_loss_kwargs = True  # the Trainer then counts each batch's battles

    def _get_train_sampler(self, train_dataset: Any = None) -> ByLength:
        args = self.args
        examples: Any = train_dataset or self.train_dataset
        return ByLength(
            examples.lengths,
            batch_size=args.train_batch_size * args.world_size,
            processes=args.world_size,
            seed=args.seed,
            epoch=lambda: int(self.state.epoch or 0),
        )

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Forward and backward passes of a device's share of a step; its loss."""
        parts = micro_batches(inputs, self.micro_batch_tokens, self._most)
        losses = []
        for left, part in enumerate(parts, 1 - len(parts)):
            self.accelerator.gradient_state._set_sync_gradients(left == 0)
            with self.accelerator.no_sync(model) if left else nullcontext():
                losses.append(super().training_step(model, part, num_items_in_batch))
        return torch.stack(losses).sum()

    def _most(self, count: int) -> int:
        """The largest of all processes' counts: a sharded backbone is gathered for each forward pass."""
        if self.accelerator.num_processes == 1:
            return count
        return int(self.accelerator.gather(torch.tensor([count], device=self.args.device)).max())

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
        if not model.training:
            each = battle_losses(logits, votes, None, None, VOTE_LOSS)
            # The Trainer takes the mean over battles, whatever their weights.
            scale = len(each) * self.eval_dataset.votes.weights.mean()
            return (each * counts).sum() / scale, outputs
        each = battle_losses(logits, votes, teachers, weights, self.loss, apart)
        total = (each * counts).sum()
        if num_items_in_batch is None:
            loss = total / (labels != FILLER).sum()
        else:  # the mean over the whole optimizer step; DDP averages gradients over processes
            loss = total / num_items_in_batch * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measure the log loss of the battles for choices, keep the weights if it is the least, or stop."""
        with torch.random.fork_rng(devices=[]):  # looking changes no dropout
            metrics = super().evaluate(*args, **kwargs)
        assert self.training
        measured = [entry[CHOICE_LOSS] for entry in self.state.log_history if CHOICE_LOSS in entry]
        since = len(measured) - 1 - int(np.argmin(measured))
        if self.training.keep == "best" and not since:
            self.best = {name: local(p.detach()).cpu().clone() for name, p in self.trained()}
        if self.training.patience and since >= self.training.patience:
            self.control.should_training_stop = True
        return metrics

    def trained(self) -> list[tuple[str, torch.nn.Parameter]]:
        """The weights that are trained, by name."""
        model = self.accelerator.unwrap_model(self.model)
        for module in model.modules():
            if isinstance(module, FSDPModule):  # an evaluation leaves some weights gathered
                module.reshard()
        return [(name, p) for name, p in model.named_parameters() if p.requires_grad]

    def whole(self) -> dict[str, torch.Tensor]:
        """The weights that are trained, by name; all processes must ask. Sharded ones only one gets."""
        main = self.is_world_process_zero()
        found = {name: whole(p.detach(), keep=main) for name, p in self.trained()}
        return {name: weight for name, weight in found.items() if weight is not None}

    def keep_best(self) -> None:
        """Take the best weights, if they were asked for."""
        for name, p in self.trained() if self.best else ():
            local(p.data).copy_(self.best[name])

    def _own(self, folder: str, name: str) -> Path:
        """A file of a checkpoint, of which each process has its own if weights are sharded."""
        path = Path(folder, name)
        number = self.args.process_index if self.sharded else 0
        return path.with_stem(f"{path.stem}-{number}") if number else path

    # PEFT does not save a student's projections: checkpoints hold them, adapters do not.

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.best and (self.args.should_save or self.sharded):
            save_file(self.best, self._own(str(output_dir), BEST))
        projections = projections_of(self.model)
        if projections and self.args.should_save:
            save_file(projections.state_dict(), f"{output_dir}/{PROJECTIONS}")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if isinstance(self.model, PeftModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            judge: Any = self.model
            load_weights(dict(judge.named_parameters()), Path(resume_from_checkpoint))
        if (best := self._own(resume_from_checkpoint, BEST)).exists():
            self.best = load_file(best)
        if projections := projections_of(self.model):
            projections.load_state_dict(load_file(f"{resume_from_checkpoint}/{PROJECTIONS}"))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.sharded:
            return super()._save_optimizer_and_scheduler(output_dir)
        optimizer: Any = self.optimizer
        save_moments(optimizer.optimizer, self._own(output_dir, MOMENTS))
        if self.args.should_save:
            schedule: Any = self.lr_scheduler
            write_json(schedule.state_dict(), Path(output_dir, SCHEDULE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.sharded or checkpoint is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        optimizer: Any = self.optimizer
        schedule: Any = self.lr_scheduler
        load_moments(optimizer.optimizer, self._own(checkpoint, MOMENTS))
        schedule.load_state_dict(read_json(Path(checkpoint, SCHEDULE)))
        for group, lr in zip(optimizer.param_groups, schedule.get_last_lr(), strict=True):
            group["lr"] = lr

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
        if state.is_world_process_zero and CHOICE_LOSS in last:
            print(
                f"step {state.global_step}/{state.max_steps}: log loss {last[CHOICE_LOSS]:.4f} on the "
                "battles for choices",
                flush=True,
            )
        if state.is_world_process_zero and "loss" in last and state.global_step % every == 0:
            print(
                f"step {state.global_step}/{state.max_steps}, epoch {last['epoch']:.2f}: "
                f"loss {last['loss']:.4f}, gradient {last['grad_norm']:.3f}, "
                f"lr {last['learning_rate']:.2e}",
                flush=True,
            )
