"""What a judge is: its backbone, head, adapter and training, its teachers and its loss.

The part of the configuration that ``judges`` and ``defaults`` hold; the whole is in ``config.run``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from arena_distill.config.backbone import Backbone
from arena_distill.config.compute import Compute, Logits, Precision
from arena_distill.config.deployment import Merge, Quantization
from arena_distill.config.encoding import Encoding
from arena_distill.config.external import External
from arena_distill.config.head import HeadKeys, Pooling
from arena_distill.config.section import Distinct, Name, Section
from arena_distill.config.training import Lora, Loss, Pretraining, Targets, Training


def _head(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


class Frozen(Section):
    """A judge without adapter: its head reads hidden states of several layers, see ``training.probe``."""

    layers: Distinct[Annotated[tuple[PositiveInt, ...], Field(min_length=1)]] | None = None
    """Layers that the head may read; null: those at 0.5, 0.6 and 0.7 of the backbone's depth."""
    poolings: Distinct[Annotated[tuple[Pooling, ...], Field(min_length=1)]] = (
        "mean",
        "answer",
        "last",
    )
    """How: the mean over all tokens, the mean over the answer's, the last token. The fit chooses."""


class Stack(Section):
    """Judges, and trees, combined into one by a weighted geometric mean, see ``scoring.stacks``."""

    judges: Distinct[Annotated[tuple[Name, ...], Field(min_length=1)]]
    """Its members: judges of any kind, other stacks included."""
    surface: bool = False
    """Boosted trees over what shows on the surface of a battle are a member too."""

    @model_validator(mode="after")
    def _at_least_two(self) -> Stack:
        if len(self.judges) + self.surface < 2:
            raise ValueError("a single judge is no stack: name another one, or set surface: true")
        return self


FROZEN = {
    "head": {"kind": "pointwise", "pooling": "layers"},
    "lora": Lora().model_dump(mode="json"),
    "pretraining": None,
    "training": Training().model_dump(mode="json", exclude={"share", "seed"}),
    "logits": Logits().model_dump(mode="json", include={"shards"}),
    "merge": Merge().model_dump(mode="json"),
}
"""What a frozen judge has of the keys that only an adapter, or another head, needs."""


class JudgeDefaults(Section):
    """All settings of a judge except its backbone and teachers."""

    encoding: Encoding = Encoding()
    """Template, truncation, length."""
    head: Annotated[
        HeadKeys,
        BeforeValidator(_head, json_schema_input_type=Literal["joint", "pointwise"] | HeadKeys),
    ] = HeadKeys(kind="joint")
    """`joint`, `pointwise`, or a mapping of the keys below."""
    lora: Lora | None = Lora()
    """The adapter. null: none, all weights are trained (full fine-tuning)."""
    precision: Precision = "bf16"
    """`nf4`: bf16 over a frozen 4-bit backbone (QLoRA). Losses, and weights that are trained, are always
    float32."""
    pretraining: Pretraining | None = Pretraining()
    """null: start from the backbone."""
    training: Training = Training()
    """Of the folds."""
    targets: Targets = "out_of_fold"
    """A student's teacher logits: from the fold model that never saw the row, or from its own fold;
    `unlabelled`: from its own fold, of battles without votes alone (`data.unlabelled`)."""
    loss: Loss = Loss()
    """Of the folds."""
    pseudo_labels: bool = True
    """A student also learns from its teachers' logits of unlabelled battles (`kl`, `cosine`)."""
    logits: Logits = Logits()
    """Of the folds."""
    merge: Merge = Merge()
    """Of the folds into one model."""
    quantization: Quantization | None = Quantization()
    """null: the merged model is the final one."""
    compute: Compute = Compute()
    """How jobs run, never their results."""

    def dense_precision(self) -> Precision:
        """Of the merged model: adapters are merged into the backbone as it was before NF4."""
        return "bf16" if self.precision == "nf4" else self.precision


NOT_TRAINED = ("external", "stack")
"""What a judge has instead of a backbone; defaults mean nothing to it."""


class Judge(JudgeDefaults):
    """A node of the graph. Without teachers it learns from votes, with teachers it is distilled."""

    external: External | None = None
    """Instead of a backbone: a file of logits, or an endpoint."""
    stack: Stack | None = None
    """Instead of a backbone: other judges, which are combined."""
    backbone: Backbone | None = Field(None, validate_default=True)
    """The pretrained model under it; required unless the judge is external or a stack."""
    frozen: Frozen | None = None
    """`{}` or the keys below: no adapter is trained, a pointwise head is fitted to the frozen backbone."""
    teachers: Distinct[tuple[Name, ...]] = ()
    """Judges whose logits it learns from; empty: it learns from votes."""

    def before_folds(self) -> tuple[Any, ...]:
        """What decides the post-pretrained adapter. (What becomes of its head, the folds decide.)"""
        pretraining = self.pretraining and self.pretraining.model_copy(update={"keep_head": False})
        start = self.backbone, self.encoding, self.head, self.lora, self.precision, pretraining
        return *start, self.frozen

    def learns_pseudo_labels(self) -> bool:
        """Whether it learns battles without votes, where there are any, from teachers."""
        return self.pseudo_labels and bool(self.teachers) and self.loss.kl + self.loss.cosine > 0

    @field_validator("backbone")
    @classmethod
    def _backbone_or_external(cls, value: Backbone | None, info: ValidationInfo) -> Backbone | None:
        if value is None and all(info.data.get(kind, "broken") is None for kind in NOT_TRAINED):
            raise ValueError(
                "missing: give `backbone`, or `external` where the logits come from elsewhere, or `stack` "
                "to combine other judges"
            )
        return value

    @model_validator(mode="after")
    def _not_trained_alone(self) -> Judge:
        kinds = [kind for kind in NOT_TRAINED if getattr(self, kind) is not None]
        if not kinds:
            return self
        kind, *more = kinds
        if self.backbone is not None or more:
            other = "backbone" if self.backbone else more[0]
            raise ValueError(f"give `{other}` or `{kind}`, not both")
        what = {"external": "an external judge", "stack": "a stack"}[kind]
        if self.teachers:
            raise ValueError(f"teachers: {what} learns from nobody: remove them")
        if given := self.model_fields_set - {*NOT_TRAINED, "backbone", "teachers"}:
            raise ValueError(
                f"{what} is not trained or run here: remove {', '.join(sorted(given))}"
            )
        return self

    def without_votes(self) -> bool:
        """Whether it judged no battle with a vote, and so has no score."""
        return self.external is not None and self.external.battles == "unlabelled"

    def sources(self) -> tuple[str, ...]:
        """The judges that it is made of: its teachers, or the members of a stack."""
        return self.stack.judges if self.stack else self.teachers

    def scoring_gpus(self) -> int:
        """GPUs of a job that scores battles: it is one process, and what several hold is one judge."""
        if self.compute.gpus == 0:
            return 0
        here = self.compute.gpus // self.compute.nodes
        return self.logits.gpus or (here if self.compute.fsdp else 1)

    @model_validator(mode="after")
    def _frozen_is_a_head_alone(self) -> Judge:
        if self.frozen is not None and self.loss.states():
            raise ValueError("loss.features and loss.attention train a backbone: a frozen judge has none "
                             "to train: set them to 0")  # fmt: skip
        if self.frozen is not None and self.precision == "nf4":
            raise ValueError(
                "precision: nf4 packs weights for training: a frozen judge trains none; set bf16"
            )
        return self

    @model_validator(mode="after")
    def _layers_are_read_by_a_fitted_head(self) -> Judge:
        if self.head.pooling != "layers" or self.frozen is not None:
            return self
        needed = {
            "head.kind: pointwise": self.head.kind == "pointwise",
            "training.fit_head: true": self.training.fit_head,
            "merge.heads: average": self.merge.heads == "average",
            "loss.features: 0": not self.loss.features,
            "compute.fsdp: false": not self.compute.fsdp,
        }
        if missing := [key for key, given in needed.items() if not given]:
            raise ValueError(
                "head.pooling: layers: each fold fits such a head and then trains what is below it: "
                f"set {', '.join(missing)}; or `frozen: {{}}` to train no adapter"
            )
        return self

    @model_validator(mode="after")
    def _nf4_needs_an_adapter(self) -> Judge:
        if self.precision == "nf4" and self.lora is None:
            raise ValueError(
                "precision: nf4 and lora: null exclude each other: weights of 4 bits are not trained; set "
                "bf16, whose weights are trained in float32, or train an adapter (lora: {})"
            )
        return self

    @model_validator(mode="after")
    def _nf4_is_not_spread(self) -> Judge:
        if self.precision == "nf4" and self.compute.fsdp:
            # Transformers shards a backbone before it reads the weights, bitsandbytes packs them as
            # they are read: a part of a packed weight is none.
            raise ValueError(
                "precision: nf4 and compute.fsdp: true exclude each other: weights of 4 bits cannot be "
                "spread; a backbone of 70 billion weights takes 40 GB in NF4, so let each GPU hold one "
                "(fsdp: false), or spread one in bf16"
            )
        return self

    @model_validator(mode="after")
    def _choices_are_measured(self) -> Judge:
        chosen = {"keep: best": self.training.keep == "best", "patience": self.training.patience}
        for key, asked in chosen.items():
            if asked and self.training.eval_steps is None:
                raise ValueError(f"training.{key} goes by log losses: set training.eval_steps")
        return self

    @model_validator(mode="after")
    def _pseudo_labels_need_a_loss(self) -> Judge:
        asked = self.pseudo_labels and "pseudo_labels" in self.model_fields_set
        if asked and self.teachers and not self.learns_pseudo_labels():
            raise ValueError(
                "pseudo_labels: true, but loss.kl and loss.cosine are 0: without votes there is nothing "
                "to learn; give one of them a weight, or set pseudo_labels: false"
            )
        return self

    @model_validator(mode="after")
    def _weights_need_honest_targets(self) -> Judge:
        if not self.teachers or self.targets == "out_of_fold":
            return self
        if self.loss.weights == "fitted":
            raise ValueError(
                f"loss.weights: fitted, but targets: {self.targets}: on rows a teacher was trained on, the "
                "one that over-fits most would win; set targets: out_of_fold"
            )
        if self.loss.contradicted_weight < 1:
            raise ValueError(
                f"loss.contradicted_weight: below 1, but targets: {self.targets}: teachers hardly "
                "contradict the votes that they were trained on; set targets: out_of_fold"
            )
        return self
