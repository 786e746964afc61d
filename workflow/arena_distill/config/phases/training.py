"""Settings of the phases that train judges, or fit heads to frozen ones."""

from __future__ import annotations

from arena_distill.config.compute import Precision
from arena_distill.config.encoding import Encoding
from arena_distill.config.head import JOINT, Head, Pooling
from arena_distill.config.phases.settings import VERSIONS, Settings
from arena_distill.config.run import Config
from arena_distill.config.section import Name
from arena_distill.config.training import Lora, Loss, Pretraining, Targets, Training
from arena_distill.errors import InputError


class PretrainingSettings(Settings):
    """Post-pretraining of a judge's adapter."""

    encoding: Encoding
    head: Head = JOINT
    lora: Lora | None
    precision: Precision
    pretraining: Pretraining

    @classmethod
    def of(cls, config: Config, judge: str) -> PretrainingSettings:
        node = config.judges[judge]
        if node.pretraining is None:
            raise InputError(f"judges.{judge}.pretraining is null: there is no adapter to pretrain")
        return cls(
            version=VERSIONS["pretraining"],
            encoding=node.encoding,
            head=config.head_of(judge),
            lora=node.lora,
            precision=node.precision,
            # What becomes of the head is for the folds to say: it changes nothing here.
            pretraining=node.pretraining.model_copy(update={"keep_head": False}),
        )


class TrainingSettings(Settings):
    """Training of a judge's folds, on votes or on teachers."""

    encoding: Encoding
    head: Head = JOINT
    lora: Lora | None
    precision: Precision
    training: Training
    keep_head: bool
    """Start from the post-pretrained head."""
    teachers: tuple[Name, ...] = ()
    targets: Targets | None = None
    loss: Loss
    pseudo_labels: bool = False
    """Learn the unlabelled battles too, from the teachers alone."""

    @classmethod
    def of(cls, config: Config, judge: str) -> TrainingSettings:
        node = config.judges[judge]
        student = bool(node.teachers)
        owner = config.pretraining_owner(judge)
        return cls(
            version=VERSIONS["distillation" if student else "training"],
            encoding=node.encoding,
            head=config.head_of(judge),
            lora=node.lora,
            precision=node.precision,
            training=node.training,
            keep_head=bool(owner and node.pretraining and node.pretraining.keep_head),
            teachers=node.teachers,
            targets=node.targets if student else None,
            loss=node.loss if student else node.loss.on_votes(),
            pseudo_labels=config.learns_unlabelled(judge),
        )


class FeatureSettings(Settings):
    """What is read of a frozen backbone."""

    encoding: Encoding
    head: Head
    precision: Precision
    layers: tuple[int, ...] | None = None
    poolings: tuple[Pooling, ...]

    @classmethod
    def of(cls, config: Config, judge: str) -> FeatureSettings:
        node = config.judges[judge]
        assert node.frozen
        return cls(
            version=VERSIONS["features"],
            encoding=node.encoding,
            head=config.head_of(judge),
            precision=node.precision,
            **node.frozen.model_dump(),
        )


class ProbeSettings(Settings):
    """How a frozen judge's head is fitted, on votes or on teachers."""

    head: Head
    share: float = 1.0
    """Of the fold's battles."""
    seed: int = 2025
    """Chooses them."""
    teachers: tuple[Name, ...] = ()
    targets: Targets | None = None
    loss: Loss
    pseudo_labels: bool = False

    @classmethod
    def of(cls, config: Config, judge: str) -> ProbeSettings:
        node = config.judges[judge]
        return cls(
            version=VERSIONS["probe"],
            head=config.head_of(judge),
            share=node.training.share,
            seed=node.training.seed,
            teachers=node.teachers,
            targets=node.targets if node.teachers else None,
            loss=node.loss if node.teachers else node.loss.on_votes(),
            pseudo_labels=config.learns_unlabelled(judge),
        )
