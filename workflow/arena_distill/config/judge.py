"""What a judge is: its backbone, head, adapter and training, its teachers and its loss.

The part of the configuration that ``judges`` and ``defaults`` hold; the whole is in ``config.run``.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from arena_distill.config.backbone import Backbone
from arena_distill.config.external import External
from arena_distill.config.section import Distinct, Name, Section, Seed, Share, Word
from arena_distill.config.vocabulary import Bits, FoldAverage, FoldHeads, GroupSize
from arena_distill.errors import InputError
from arena_distill.verdicts import CLASSES, Classes

WARMUP = 0.05
"""The share of its steps that a training warms up for, unless it says otherwise."""

FEWEST_SAMPLES = 16
"""With fewer sequences the second moments of a layer's inputs mean nothing to GPTQ."""

Momentum = Annotated[float, Field(ge=0, lt=1)]
Targets = Literal["out_of_fold", "in_sample", "unlabelled"]
Precision = Literal["fp32", "bf16", "nf4"]
State = Literal["features", "attention"]
Pooling = Literal["mean", "answer", "last"]
"""Of the hidden states of a layer, see ``models.layer_reads``."""
Attention = Literal["auto", "eager", "sdpa", "flash_attention_2", "flex_attention"]


class Encoding(Section):
    """How a battle becomes a sequence of tokens."""

    template: Literal["winners", "markers"] = "markers"
    """`winners`: User question / Answer A / Answer B; `markers`: [PROMPT] [RESPONSE_A] [RESPONSE_B]."""
    truncation: Literal["winners", "rounds", "middle"] = "rounds"
    """`winners`: word caps, question to 256 tokens, longer answer first; `rounds`: keep last rounds;
    `middle`: keep the head and the tail of every part, in proportion to their lengths."""
    max_length: Annotated[int, Field(ge=32)] = 1024
    """Tokens per sequence in training and in the folds' logits."""
    sizes: bool = False
    """Append to each answer its number of tokens before truncation."""
    tokens_per_battle: Annotated[int, Field(ge=32)] | None = None
    """Mean tokens per sequence of training battles; one length limit, found from it, cuts all battles."""
    privileged: Distinct[tuple[Literal["model_a", "model_b"], ...]] = ()
    """`[model_a, model_b]`: read the models' names before the answers. Never for students or the final."""

    @field_validator("privileged")
    @classmethod
    def _both_names_or_none(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(value) == 1:
            raise ValueError(
                f"give [model_a, model_b] or nothing: with {value[0]} alone the sides would not be alike"
            )
        return tuple(sorted(value))


class HeadKeys(Section):
    """What a judge reads in one sequence, and its output; see ``models.heads``."""

    kind: Literal["joint", "pointwise"]
    """`joint`: both answers in one sequence, a logit per class; `pointwise`: one answer, one strength."""
    ties: Literal["davidson", "rao_kupper"] = "davidson"
    """The model of ties that turns two strengths and a tie parameter into three logits (`classes: 3`)."""
    pooling: Literal["last", "mean", "layers"] = "last"
    """The head reads the last token's hidden state, or (decoders) the mean over the sequence's tokens;
    `layers`: it reads several layers as a frozen judge's head does; an adapter is trained below it."""


class Head(HeadKeys):
    """A judge's head in a run of so many classes."""

    classes: Classes = 3

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of a sequence's outputs, in their order."""
        if self.kind == "joint":
            return CLASSES[: self.classes]
        return ("strength", "tie")[: self.classes - 1]


JOINT = Head(kind="joint")


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


class Lora(Section):
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685)."""

    r: PositiveInt = 64
    """Rank; scale it down for small models."""
    alpha: PositiveInt = 128
    """The update is scaled by alpha / r."""
    dropout: Share = 0.05
    """Of the adapter's input, in training."""
    target_modules: Annotated[tuple[Word, ...], Field(min_length=1)] | Literal["all-linear"] = (
        "all-linear"
    )
    """Module names; `all-linear` is q, k, v, o, gate, up, down on the three families."""


class Schedule(Section):
    """How long a training takes."""

    epochs: PositiveFloat = 1
    """Passes over the battles (in both orders, with `swap`)."""
    batch_size: PositiveInt = 64
    """Battles as shown (each order is one) per optimizer step, over all devices."""
    warmup_steps: NonNegativeInt | None = None
    """Optimizer steps of the linear warm-up to `lr`."""
    swap: bool = True
    """Show every battle in both orders, the vote exchanged with the answers (pointwise: no need)."""

    def steps(self, examples: int) -> int:
        """Optimizer steps, as the Trainer counts them.

        Args:
            examples: battles as shown.
        """
        return math.ceil(self.epochs * max(1, math.ceil(examples / self.batch_size)))


class Optimization(Schedule):
    """AdamW with a cosine schedule, as transformers' Trainer runs it."""

    lr: PositiveFloat
    """Peak learning rate."""
    weight_decay: NonNegativeFloat = 0.0
    """Of AdamW."""
    betas: tuple[Momentum, Momentum] = (0.9, 0.95)
    """Of AdamW."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are clipped to this norm."""
    seed: Seed = 2025
    """Seed of the initial head and LoRA, of dropout and of the order of the rows."""


class Pretraining(Optimization):
    """Post-pretraining of the adapter on UT battles."""

    lr: PositiveFloat = 1e-5
    """Peak learning rate."""
    keep_head: bool = False
    """Start the folds from the head learned here, not from a new one."""


class Training(Optimization):
    """Training of each fold, on votes or on teachers."""

    lr: PositiveFloat = 5e-5
    """Peak learning rate."""
    epochs: PositiveFloat = 2
    """Passes over the battles (in both orders, with `swap`)."""
    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the fold's battles to train on: random, and part of every larger share."""
    fit_head: bool = False
    """Fit the head to the frozen backbone before training (a linear probe); set merge.heads: average."""
    eval_steps: PositiveFloat | None = 0.1
    """Steps between log losses on the battles for choices (folds.choices); below 1: a share of all."""
    keep: Literal["last", "best"] = "last"
    """The weights of the last step, or of the one with the least of these log losses."""
    patience: PositiveInt | None = None
    """Stop after so many of these log losses without a new least one. null: never."""
    own_start: bool = False
    """Each fold has its own initial head and LoRA: then only their products can be averaged."""


class Loss(Section):
    """A judge's loss: the mean of its terms, weighted; see ``training.losses``."""

    ce: NonNegativeFloat = 0.3
    """Weight of the cross-entropy with the vote. Without teachers it is the only term."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of a vote that is spread over all classes (Szegedy et al. 2016, arXiv:1512.00567)."""
    focal: NonNegativeFloat = 0.0
    """γ: weights the cross-entropy by (1 − p)^γ (Lin et al. 2017, arXiv:1708.02002)."""
    kl: NonNegativeFloat = 0.7
    """Weight of KL(teacher ‖ student) at `temperature`."""
    cosine: NonNegativeFloat = 0.0
    """Weight of the cosine distance between the two probability vectors."""
    temperature: PositiveFloat = 3.0
    """T: softens the probabilities that KL and cosine compare."""
    temperature_squared: bool = True
    """Multiply the KL term by T², which keeps its gradients' size (Hinton et al. 2015)."""
    combine: Literal["mean_logits", "mean_probabilities", "separate"] = "mean_logits"
    """One target (the teachers' mean logits, or mean probabilities), or KL and cosine per teacher."""
    weights: Literal["equal", "fitted", "confidence"] = "equal"
    """Weights of teachers. `fitted`: least log loss out of fold; `confidence`: per battle."""
    contradicted_weight: Share = 1.0
    """How much a vote counts in CE that every teacher gives less than `contradicted_below` out of fold."""
    contradicted_below: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """The probability of such a vote; the report lists them (tables/contradicted.parquet)."""
    unlabelled: Literal["own_terms", "all_terms"] = "own_terms"
    """A loss without a vote lacks CE: divide it by its own weights (then KL counts more), or by all."""
    unlabelled_weight: PositiveFloat = 1.0
    """How much a battle without a vote counts, against one vote."""
    features: NonNegativeFloat = 0.0
    """Weight of the distance to each teacher's last hidden state (PKD); needs the same kind of head."""
    attention: NonNegativeFloat = 0.0
    """Weight of KL(teacher ‖ student) of the last token's attention (MiniLM); needs the same tokens."""

    @model_validator(mode="after")
    def _some_term(self) -> Loss:
        if self.ce + self.kl + self.cosine <= 0:
            raise ValueError("at least one of ce, kl, cosine must be positive")
        if not self.contradicted_weight and self.kl + self.cosine <= 0:
            raise ValueError(
                "contradicted_weight: 0, but kl and cosine are 0: nothing is left to learn of such a "
                "battle; give one of them a weight, or a small contradicted_weight"
            )
        return self

    def states(self) -> tuple[State, ...]:
        """What it compares of student and teachers beside their logits."""
        return tuple(name for name in get_args(State) if getattr(self, name) > 0)

    def on_votes(self) -> Loss:
        """What is left of it without teachers."""
        return Loss(ce=1, kl=0, cosine=0, label_smoothing=self.label_smoothing, focal=self.focal)


class Merge(Section):
    """How the folds become one dense model."""

    average: FoldAverage = "factors"
    """Mean of LoRA's A and of its B over the folds (as documented), or of B·A (exact). Without LoRA it
    means nothing: the mean of the weights is exact."""
    heads: FoldHeads = "first"
    """The mean head of the folds, or that of the first one that is merged."""
    weights: Literal["equal", "validation", "greedy"] = "equal"
    """Weights of folds: by validation loss, or a greedy soup on battles apart (folds.choices)."""


class CalibrationRows(Section):
    """How many battles GPTQ reads."""

    samples: Annotated[int, Field(ge=FEWEST_SAMPLES)] | None = None
    """Training battles that calibrate; null: 128, or half of fewer than 256."""
    validation_rows: PositiveInt | None = None
    """Training battles, others than those, on which the drift is measured; null: 512, or what is left."""

    def sized(self, battles: int) -> Self:
        """The same with both numbers.

        Args:
            battles: how many training battles there are.

        Raises:
            InputError: too few.
        """
        rest = battles - self.validation_rows if self.validation_rows else battles // 2
        samples = self.samples or max(FEWEST_SAMPLES, min(128, rest))
        rows = self.validation_rows or max(1, min(512, battles - samples))
        if samples + rows > battles:
            raise InputError(
                f"config: judges.*.quantization: samples {samples} and validation_rows {rows}, but there "
                f"are only {battles} training battles; lower them, or set quantization: null"
            )
        return self.model_copy(update={"samples": samples, "validation_rows": rows})


class Quantization(CalibrationRows):
    """GPTQ (Frantar et al. 2022, arXiv:2210.17323)."""

    bits: Bits = 8
    """Per weight; the head stays as it is."""
    group_size: GroupSize = 128
    """Weights that share a scale; must divide every quantised layer's input size."""
    seed: Seed = 2025
    """Selects the battles for calibration and for measuring the drift."""
    max_kl: PositiveFloat = 0.001
    """The drift check fails if mean KL(before ‖ after), in nats, is larger."""
    max_flip_rate: Share = 0.02
    """The drift check fails if a larger share of verdicts changes."""


class Compute(Section):
    """How a judge's jobs run. Changing it rebuilds nothing."""

    threads: PositiveInt = 1
    """CPU cores per job."""
    gpus: NonNegativeInt = 0
    """GPUs per job, 0 for the CPU. Training starts one process per GPU; batch_size does not change."""
    nodes: PositiveInt = 1
    """Slurm nodes that share the GPUs of a training. Threads and memory are those of each node."""
    gpu_model: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.]*$")] = ""
    """The cluster's name of the GPU, such as a100; empty: any."""
    fsdp: bool = False
    """Shard the backbone over the GPUs, for backbones that do not fit on one."""
    mem_mb: PositiveInt = 4000
    """Host memory per job in MB, multiplied by the attempt."""
    disk_mb: PositiveInt = 1000
    """Disk per job in MB, multiplied by the attempt."""
    runtime: PositiveInt = 120
    """Time limit in minutes, multiplied by the attempt."""
    checkpoint_minutes: NonNegativeFloat = 30.0
    """Minutes between checkpoints of a training. 0: after each step."""
    micro_batch_size: PositiveInt = 8
    """The longest examples per device and forward pass; of shorter ones, as many as have as many tokens.
    Gradients of the batch are accumulated."""
    batch_tokens: PositiveInt = 16384
    """Tokens per forward pass when scoring."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: slower, much less memory."""
    attention: Attention = "auto"
    """`auto`: flash_attention_2 if package, GPU and model support it, else transformers' choice."""
    report_to: Literal["none", "trackio", "wandb", "mlflow"] = "none"
    """A service to which training also reports; TensorBoard files are always written."""

    @model_validator(mode="after")
    def _fsdp_needs_several(self) -> Compute:
        if self.fsdp and self.gpus < 2:
            raise ValueError("fsdp spreads a backbone over several GPUs: set gpus to 2 or more")
        return self

    @model_validator(mode="after")
    def _nodes_have_as_many_gpus(self) -> Compute:
        if self.nodes > 1 and (self.gpus == 0 or self.gpus % self.nodes):
            raise ValueError(
                f"gpus: {self.gpus} cannot be shared by {self.nodes} nodes: make it a multiple of nodes"
            )
        return self


class Logits(Section):
    """Scoring of a fold's battles, for evaluation and for students."""

    shards: PositiveInt = 1
    """Number of jobs that share the scoring of a fold; the result is the same."""
    gpus: PositiveInt | None = None
    """GPUs per scoring job; several share the layers of the judge. null: one, or a node's with fsdp."""


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
