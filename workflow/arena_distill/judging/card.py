"""Write a judge's model card: what it is, how it was made, what it scored, its limits, how to ask it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from arena_distill.config.prediction import Card
from arena_distill.errors import refusing
from arena_distill.files.artifacts import read_json, write_text
from arena_distill.judging.contract import (
    MEMBERS,
    AnyContract,
    Contract,
    ModelContract,
    Score,
    StackContract,
)

MADE_BY = ("merge.json", "drift.json")
"""The files in which merging and quantisation write what they did."""


_LIMITS = "\n## Limits\n"


def write_card(folder: Path, contract: AnyContract, card: Card) -> None:
    """Write `README.md` into a judge's folder; `contract` and the folder's files say what it tells."""
    merging, drift = (
        read_json(folder / name) if (folder / name).exists() else {} for name in MADE_BY
    )
    data = ModelCardData(
        model_name=contract.judge,
        license=card.license,
        language=list(card.languages) or None,
        datasets=list(card.datasets) or None,
        base_model=card.base_model,
        base_model_relation=card.base_model
        and ("quantized" if contract.kind == "gptq" else "finetune"),
        library_name=None if isinstance(contract, StackContract) else "transformers",
        pipeline_tag="text-classification",
        tags=["preference-judge", "arena-distill", *(["gptq"] if drift else [])],
        eval_results=_results(contract),
    )
    text = "\n".join(_sections(contract, card, merging, drift))
    write_text(f"---\n{data.to_yaml()}\n---\n\n{text}\n", folder / "README.md")


def add_to_card(folder: Path, title: str, text: str) -> None:
    """Put a section before the limits of a judge's card, in place of the one of this title, if any.

    Raises:
        InputError: the folder has no card of :func:`write_card`.
    """
    path = folder / "README.md"
    with refusing(f"{path}: not a model card of this package"):
        card = path.read_text(encoding="utf-8")
        before, limits = card[: card.index(_LIMITS)], card[card.index(_LIMITS) :]
    before = before.partition(f"\n## {title}\n")[0]
    write_text(f"{before}\n## {title}\n\n{text}\n{limits}", path)


def _results(contract: Contract) -> list[EvalResult] | None:
    if contract.scores is None:
        return None
    found = contract.scores
    figures = {
        "log_loss": found.log_loss.value,
        "accuracy": found.accuracy.value,
        "ece": found.ece,
    }
    return [
        EvalResult(
            task_type="text-classification",
            dataset_type="preferences",
            dataset_name=f"{contract.run}, {'test' if found.of == 'test' else 'held-out'} battles",
            metric_type=name,
            metric_value=round(value, 4),
        )
        for name, value in figures.items()
    ]


def _sections(
    contract: AnyContract, card: Card, merging: dict[str, Any], drift: dict[str, Any]
) -> list[str]:
    counts = ", ".join(f"{name} {count:,}" for name, count in contract.sources.items())
    if isinstance(contract, StackContract):
        about, made, asked = _STACK, _members(contract), _with_judge(contract)
    else:
        about, asked = _about(contract), _how_to_ask(contract)
        backbone = f"- Backbone: {contract.backbone}; weights: {contract.dtype}."
        made = [backbone, *_merging(merging), *_quantisation(drift)]
    return [
        f"# {contract.judge}: which of two answers do people prefer?\n",
        about,
        "## How it was made\n",
        *made,
        f"- Battles by source: {counts}.",
        *([] if card.license else [_NO_LICENSE]),
        f"\n## Scores\n\n{_scores(contract)}",
        f"{_LIMITS}\n{_limits(contract)}",
        f"\n## How to ask it\n\n{asked}",
    ]


def _members(contract: StackContract) -> list[str]:
    weights = [f"{name} {weight:.2f}" for name, weight in contract.members.items()]
    if contract.surface is not None:
        weights.append(f"trees over the surface of a battle {contract.surface:.2f}")
    return [
        f"- Weights: {', '.join(weights)}; the weighted sum of the logits is divided by "
        f"{contract.temperature:.3g}. They have the least log loss on battles that no member learned.",
        f"- Each member in `{MEMBERS}/` is a judge of its own, with a card.",
    ]


def _about(contract: ModelContract) -> str:
    if contract.head.kind == "joint":
        number = {2: "two", 3: "three"}[len(contract.classes)]
        classes = ", ".join(f"{i} = {name}" for i, name in enumerate(contract.classes))
        return _JOINT.format(number=number, classes=classes)
    return _POINTWISE if len(contract.classes) > 2 else _BRADLEY_TERRY


def _merging(merging: dict[str, Any]) -> list[str]:
    if not merging:
        return []
    if reads := merging.get("reads"):
        shown = ", ".join(f"{pooling} at layer {layer}" for layer, pooling in reads)
        return [
            f"- Not trained, but read: the mean of {merging['folds']} linear heads on its hidden states "
            f"({shown}). Layers after the last of these are left out."
        ]
    adapters, all_weights = "low-rank adapters", "weights, all of which were trained,"
    what, how = {
        "factors": (adapters, "the mean of A times the mean of B (factors)"),
        "products": (adapters, "the mean of B·A, exact (products)"),
        "weights": (all_weights, "their mean, exact"),
    }[merging["average"]]
    heads = {"average": "the mean of the folds' heads", "first": "the head of the first one"}
    return [
        f"- The {what} of {merging['folds']} folds merged into it: {how}; "
        f"head: {heads[merging['heads']]}."
    ]


def _quantisation(drift: dict[str, Any]) -> list[str]:
    if not drift:
        return []
    return [
        f"- Quantised by GPTQ: {drift['bits']} bits, groups of {drift['group_size']}, calibrated on "
        f"{drift['samples']} training battles; the head is not quantised. Loading it needs `gptqmodel` "
        f"and `optimum`.\n- Against the dense model: KL {drift['kl']:.2g} nats, "
        f"{drift['flip_rate']:.2%} of verdicts changed."
    ]


def _scores(contract: Contract) -> str:
    found = contract.scores
    if found is None:
        return "No battles with votes were kept from training: this judge has no score of its own."
    calibrated = contract.calibration
    after = (
        f"calibrated ({calibrated.method}, fitted on {calibrated.fitted_on})"
        if calibrated
        else "not calibrated"
    )
    battles = "test battles" if found.of == "test" else "held-out battles"
    crossed = ", its score cross-fitted" if calibrated and found.of == "held_out" else ""
    return f"""\
This very model, as `judge.json` says that it is asked, on {found.battles:,} {battles} that nothing was
trained on; 95 % intervals over prompts; {after}{crossed}.

| log loss (lower is better) | accuracy | expected calibration error |
|---|---|---|
| {_interval(found.log_loss)} | {_interval(found.accuracy)} | {found.ece:.3f} |"""


def _interval(score: Score) -> str:
    if score.low is None or score.high is None:
        return f"{score.value:.4f}"
    return f"{score.value:.4f} ({score.low:.4f} to {score.high:.4f})"


def _limits(contract: Contract) -> str:
    longest, how, order = max(contract.lengths), "", ""
    if isinstance(contract, ModelContract):
        how = f" (`{contract.encoding.truncation}`)"
        if contract.orders == ("AB", "BA") and contract.head.kind == "joint":
            order = "- A joint judge may favour the answer that it sees first; both orders are averaged.\n"
    return f"""\
- It reads at most {longest:,} tokens of a battle; longer ones are cut{how}.
{order}- It knows the voters of its battles. Other people, languages and tasks may prefer otherwise.
- It says what people prefer, not what is true or safe."""


def _with_judge(contract: Contract) -> str:
    alone = "\nA stack needs `Judge`; other programs can ask its members alone.\n"
    return f"""\
With Arena Distill, exactly as it was scored:

```python
from arena_distill import Judge

judge = Judge.from_pretrained("{contract.judge}")  # this folder
judge.compare("What is 2 + 2?", "4", "5").probabilities
```

`arena-distill verify FOLDER` compares a judge with the test vectors of its `judge.json`.
{alone if isinstance(contract, StackContract) else ""}"""


def _how_to_ask(contract: ModelContract) -> str:
    dense = _with_judge(contract)
    if contract.kind == "gptq":
        return dense
    joint = contract.head.kind == "joint"
    shown = "prompt, answer_a, answer_b" if joint else "prompt, answer"
    size = ""
    if contract.template.size:
        size = (
            '\n        tokens += ids(judge["template"]["size"].format(len(ids(field)))) * (i > 0)'
        )
    read, imports, head = _READ[contract.head.pooling], "", ""
    if contract.head.pooling == "layers":
        imports, head = "from pathlib import Path\nfrom safetensors import safe_open\n", _HEAD
    if joint:
        exchanged = [1, 0, 2][: len(contract.classes)]
        asked = _ASK_JOINT.format(exchanged=exchanged, names=", ".join(contract.classes))
    else:
        ties = len(contract.classes) > 2
        asked = _ASK_POINTWISE[contract.head.ties] if ties else _ASK_BRADLEY_TERRY
    return f"""\
{dense}
With transformers alone, for battles that need no truncation, one length, and without calibration:

```python
import json
{imports}import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSequenceClassification.from_pretrained(folder)
with open(f"{{folder}}/judge.json") as file:
    judge = json.load(file)
{head}
def ids(text):  # text is data: special tokens in it are ordinary text
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids

def ask({shown}):
    tokens, *literals = judge["template"]["frame"]  # token ids, with begin and end of sequence
    for i, field in enumerate([{shown}]):  # piece by piece, as in training
        tokens = tokens + ids(field){size}
        tokens = tokens + literals[i]
    {read}

{asked}
```

Turns of a conversation are joined by the ids `newline`. Pad on the right with the id `pad`."""


_NO_LICENSE = (
    "- Licence: not stated. The licences of the backbone and of the battles apply to it "
    "(`card.license` in the configuration states one)."
)

_STACK = """\
Judges, and perhaps trees over what shows on the surface of a battle, combined by a weighted geometric mean
of their probabilities: which answer a person prefers.
"""

_JOINT = """\
A sequence classifier over a prompt and two answers. Its {number} classes, in this order, are
{classes}: which answer a person prefers.
"""

_POINTWISE = """\
A sequence classifier over a prompt and one answer. Its two outputs are the answer's strength and its
tie parameter; those of two answers give the probabilities that a person prefers either, or neither.
The order of the answers has no effect.
"""

_BRADLEY_TERRY = """\
A sequence classifier over a prompt and one answer. Its output is the answer's strength; those of two
answers give the probability that a person prefers either. The order of the answers has no effect.
"""

_READ = {
    "last": "return model(torch.tensor([tokens])).logits[0]",
    "mean": """\
states = model.base_model(torch.tensor([tokens])).last_hidden_state
    return model.score(states.mean(1))[0]  # of all tokens; model(…) itself reads the last one""",
    "layers": """\
states = model.base_model(torch.tensor([tokens]), output_hidden_states=True).hidden_states
    marker = model.config.head_marker
    ends = range(len(marker), len(tokens) + 1)
    start = max(end for end in ends if tokens[end - len(marker) : end] == marker)
    first = {"mean": 0, "answer": min(start, len(tokens) - 1), "last": -1}
    read = [states[i][0, first[name] :].float().mean(0) for i, name in model.config.head_reads]
    return head["score.linear.weight"] @ torch.cat(read) + head["score.linear.bias"]""",
}

_HEAD = """
head = {}
for file in Path(folder).glob("*.safetensors"):
    with safe_open(file, "pt") as tensors:
        names = [name for name in tensors.keys() if name.startswith("score.")]
        head |= {name: tensors.get_tensor(name) for name in names}
model.base_model.norm = torch.nn.Identity()  # hidden states are read before it
"""

_ASK_JOINT = """\
there, back = ask(prompt, answer_a, answer_b), ask(prompt, answer_b, answer_a)
logits = (there + back[{exchanged}]) / 2  # both orders, the classes exchanged back
probabilities = logits.softmax(-1)  # {names}"""

_ASK_BRADLEY_TERRY = """\
strengths = torch.cat([ask(prompt, answer_a), ask(prompt, answer_b)])
probabilities = strengths.softmax(-1)  # model_a, model_b; Bradley and Terry 1952"""

_ASK_POINTWISE = {
    "davidson": """\
(a, tie_a), (b, tie_b) = ask(prompt, answer_a), ask(prompt, answer_b)
logits = torch.stack([a, b, tie_a + tie_b + (a + b) / 2])  # Davidson 1970
probabilities = logits.softmax(-1)  # model_a, model_b, tie""",
    "rao_kupper": """\
(a, tie_a), (b, tie_b) = ask(prompt, answer_a), ask(prompt, answer_b)
threshold = torch.nn.functional.softplus(tie_a + tie_b)  # Rao and Kupper 1967
p_a, p_b = (a - b - threshold).sigmoid(), (b - a - threshold).sigmoid()
probabilities = torch.stack([p_a, p_b, 1 - p_a - p_b])  # model_a, model_b, tie""",
}
