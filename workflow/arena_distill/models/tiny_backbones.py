"""Pretrain three tiny backbones, one per real family.

LoRA on a frozen random backbone learns nothing, so the default run needs backbones that know the
language and facts of the synthetic arena. Each is a Llama, Qwen2 or Gemma-2 of some hundred
thousand parameters with its own byte-complete tokenizer, pretrained in full on a pool of simulated
battles that no run uses, with votes of other voters. It is saved without a head: like a real
backbone, it learns the arena's votes only through a fresh ``score`` head.

The tokenizers keep the special cases of the three families: Llama has a BOS but no padding token,
Qwen2 a padding token but no BOS, Gemma-2 both.

It is hard to learn whether an answer is *right*: two distant words must match, and neither alone
tells. From a random start, the loss stays on a plateau; three measures shorten it.
The embeddings start as word vectors of good answers [1], so a land is close to its own capital;
each layer's queries start equal to its keys, so similar tokens attend to each other [2]; and the
first steps use short battles, cut after the first answer. Muon [3] trains the matrices, AdamW the rest.

References
----------
[1] O. Levy, Y. Goldberg (2014), Neural word embedding as implicit matrix factorization. NeurIPS.
[2] A. Trockman, J. Z. Kolter (2023), Mimetic initialization of self-attention layers. ICML.
[3] K. Jordan et al. (2024), Muon: an optimizer for hidden layers in neural networks.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from numpy.typing import NDArray

from arena_distill.battles.simulation import QUALITIES, SimulatedBattles, simulate
from arena_distill.config.vocabulary import Family
from arena_distill.files.artifacts import atomic_directory, provenance, write_json
from arena_distill.models.tiny_tokenizers import MAX_LENGTH, train_tokenizer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

FAMILIES: tuple[Family, ...] = get_args(Family)

# Architecture. Sizes of linear layers are multiples of 32, a quantisation group.
# Heads are 32 wide, the least that vLLM's attention takes on a CPU. A Qwen2's heads share its width.
HEAD_WIDTH = 32
SHAPES: dict[Family, dict[str, int]] = {
    "llama": {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2},
    "qwen2": {"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 3},
    "gemma2": {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2},
}
INTERMEDIATE = 128
LAYERS = 4

# Pretraining.
ANSWER_LAYER = 2  # predicts the answers' qualities; the later layers move them to the last token
BATCH = 64  # battles
MATRIX_RATE = 0.02  # Muon
OTHER_RATE = 2e-3  # AdamW: embeddings, norms and heads
WARMUP_STEPS = 100
ANSWERS_FIRST = 0.25  # share of the steps on short battles cut after the first answer
SHORT = 0.3  # share of the battles that count as short
QUALITY_WEIGHT = 4.0  # of the qualities' squared errors; the votes' cross-entropy has 1
FIELD_TOKENS = 96  # longer prompts and answers are cut

# The text before the prompt, A and B, and after B: the layouts of judges.
LAYOUTS = (
    ('User question:\n"""', '"""\nAnswer A:\n"""', '"""\nAnswer B:\n"""', '"""\n'),
    ("[PROMPT]", "[RESPONSE_A]", "[RESPONSE_B]", ""),
)

_TOKENIZER_BATTLES = 10_000
_FIELDS = ["prompt", "response_a", "response_b"]
_logger = logging.getLogger(__name__)
_POOL = 20_250_101  # the pool's random streams differ from those of any run


def pretrain_tiny(
    family: Family, output: Path, *, battles: int = 40_000, epochs: float = 4.0, seed: int = 0
) -> None:
    """Pretrain one family's tiny backbone and write it as a Hugging Face folder.

    Every battle of the pool is used in both layouts and both orders. The last token learns the true
    vote probabilities of the pool's voters and both answers' qualities; every token of an answer
    learns that answer's qualities, a more direct signal for the relations.

    Parameters
    ----------
    family : "llama", "qwen2" or "gemma2"
    output : Path
        The folder to write: config, weights, tokenizer, ``README.md`` and ``provenance.json``.
    battles : int
        Size of the pool; a thousand more are held out to report the log loss.
    epochs : float
        Passes over the pool, in steps of ``BATCH`` battles.
    seed : int
        Seed of the pool, the weights and the batches.
    """
    import torch
    from transformers import AutoModel

    if family not in FAMILIES:
        raise ValueError(f"family must be one of {FAMILIES}, got {family!r}")
    if battles < 1:
        raise ValueError(f"battles must be positive, got {battles}")
    if epochs <= 0:
        raise ValueError(f"epochs must be positive, got {epochs}")

    pool_seed, test_seed = np.random.SeedSequence((_POOL, seed)).generate_state(2).tolist()
    pool = simulate(rows=battles, seed=pool_seed, voters="pool")
    tokenizer = train_tokenizer(family, _texts(pool))
    examples = _Examples.of(pool, tokenizer)
    held_out = _Examples.of(simulate(rows=1_000, seed=test_seed, voters="pool"), tokenizer)

    torch.manual_seed(seed)
    backbone = AutoModel.from_config(tiny_config(family, tokenizer), trust_remote_code=False)
    _initialise(backbone, examples)
    heads = _fit(backbone, examples, epochs=epochs, seed=seed)
    log_loss, bayes = _expected_log_loss(backbone, heads, held_out)

    settings = {"family": family, "battles": battles, "epochs": epochs, "seed": seed}
    options = " ".join(f"--{name} {value}" for name, value in settings.items())
    about = provenance("pretrain-tiny", settings) | {
        "command": f"python -m arena_distill pretrain-tiny {options} --output {family}",
        "parameters": backbone.num_parameters(),
        "log_loss": round(log_loss, 4),
        "bayes_log_loss": round(bayes, 4),
    }
    with atomic_directory(output) as folder:
        backbone.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_json(about, folder / "provenance.json")
        (folder / "README.md").write_text(_README.format(**about, **settings), encoding="utf-8")


_README = """\
# A tiny {family}, pretrained on a simulated arena

{parameters:,} parameters, no head. Made by

    {command}

Held-out log loss on the pool's votes: {log_loss} (lower bound {bayes_log_loss}). It knows the
invented world of `arena_distill.battles.simulation` and nothing else. Apache-2.0, like the code.
"""


def _texts(battles: SimulatedBattles) -> list[str]:
    """Turns, and the layouts often enough that their words become tokens."""
    fields = battles.frame[_FIELDS].head(_TOKENIZER_BATTLES).to_numpy().ravel()
    layouts = ["".join(layout) for layout in LAYOUTS]
    return [turn for field in fields for turn in field] + layouts * 1_000


# Models -----------------------------------------------------------------------------------------


def tiny_config(family: Family, tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    """The family's architecture at a small size, for a tokenizer."""
    from transformers import Gemma2Config, LlamaConfig, Qwen2Config

    shared = {
        "vocab_size": len(tokenizer),
        **SHAPES[family],
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "max_position_embeddings": MAX_LENGTH,
        # The usual 0.02 is for widths of thousands, where it keeps a layer's output at its input's scale.
        "initializer_range": 0.8 * SHAPES[family]["hidden_size"] ** -0.5,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if family == "llama":
        return LlamaConfig(**shared, head_dim=HEAD_WIDTH)
    if family == "qwen2":
        return Qwen2Config(**shared)
    # Gemma-2's soft-capping of attention needs the eager implementation.
    return Gemma2Config(
        **shared,
        head_dim=HEAD_WIDTH,
        query_pre_attn_scalar=HEAD_WIDTH,
        sliding_window=MAX_LENGTH // 2,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        attn_implementation="eager",
    )


def _initialise(backbone: Any, examples: _Examples) -> None:
    """Set embeddings to word vectors, and queries equal to keys with orthonormal rows."""
    import torch

    embeddings = backbone.get_input_embeddings().weight
    # Gemma multiplies its embeddings by the root of the width.
    vocabulary, width = embeddings.shape
    gain = width**-0.5 if backbone.config.model_type == "gemma2" else 1.0
    vectors = _word_vectors(examples, vocabulary, width)
    shared = backbone.config.num_key_value_heads
    with torch.no_grad():
        noise = 0.3 * torch.randn(embeddings.shape)  # unseen tokens must differ too
        embeddings.copy_(0.5 * gain * (torch.from_numpy(vectors) + noise))
        for layer in backbone.layers:
            keys = torch.stack(
                [torch.linalg.qr(torch.randn(width, HEAD_WIDTH))[0].T for _ in range(shared)]
            )
            heads = backbone.config.num_attention_heads
            queries = keys.repeat_interleave(heads // shared, dim=0)
            layer.self_attn.k_proj.weight.copy_(keys.flatten(0, 1))
            layer.self_attn.q_proj.weight.copy_(queries.flatten(0, 1))


def _word_vectors(examples: _Examples, vocabulary: int, width: int) -> NDArray[np.float32]:
    """Factor the positive PMI of tokens in good answers: (vocabulary, width), rows of unit variance.

    Tokens co-occur if they share a prompt and a fully correct answer to it.
    """
    from scipy.sparse import csr_matrix

    documents = [
        sorted({*prompt, *answer})
        for (prompt, *answers), qualities in zip(examples.fields, examples.qualities, strict=True)
        for answer, correctness in zip(answers, qualities[:, 0], strict=True)
        if correctness == 1
    ]
    indptr = np.cumsum([0, *map(len, documents)])
    indices = np.concatenate([*map(np.asarray, documents), np.empty(0)]).astype(np.int64)
    counts = csr_matrix(
        (np.ones(len(indices)), indices, indptr), shape=(len(documents), vocabulary)
    )
    together = (counts.T @ counts).toarray()
    alone = together.diagonal() + 1.0  # smoothing: rare tokens count less
    with np.errstate(divide="ignore"):
        information = np.log(together * len(documents) / np.outer(alone, alone))
    information = np.maximum(information, 0.0)
    np.fill_diagonal(information, 0.0)
    values, vectors = np.linalg.eigh(information)
    vectors = vectors[:, -width:] * np.sqrt(np.maximum(values[-width:], 0.0))
    scale = np.sqrt((vectors**2).mean(axis=1, keepdims=True))
    return (vectors / np.maximum(scale, 1e-6)).astype(np.float32)


# Examples ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Batch:
    """Battles as sequences, right-padded.

    ids : int64 (batch, width)
    spans : int64 (batch, answers, 2), where each answer starts and ends
    last : int64 (batch,), the last token
    probabilities : float32 (batch, 3), votes for A, B, tie as shown
    qualities : float32 (batch, answers, 6)
    """

    ids: torch.Tensor
    spans: torch.Tensor
    last: torch.Tensor
    probabilities: torch.Tensor
    qualities: torch.Tensor


@dataclass(frozen=True)
class _Examples:
    """Tokenised battles and their targets.

    fields : per battle the ids of prompt, A and B
    layouts : per layout the ids of its four pieces, BOS and EOS included
    probabilities : float32 (rows, 3)
    qualities : float32 (rows, 2, 6)
    """

    fields: list[tuple[list[int], ...]]
    layouts: list[list[list[int]]]
    probabilities: NDArray[np.float32]
    qualities: NDArray[np.float32]

    @classmethod
    def of(cls, battles: SimulatedBattles, tokenizer: PreTrainedTokenizerFast) -> _Examples:
        def ids(texts: list[str]) -> list[list[int]]:
            return tokenizer(texts, add_special_tokens=False)["input_ids"]

        columns = [
            [field[:FIELD_TOKENS] for field in ids(["\n".join(turns) for turns in column])]
            for _, column in battles.frame[_FIELDS].items()
        ]
        bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        layouts = []
        for first, *between, last in map(ids, map(list, LAYOUTS)):
            layouts.append([bos + first, *between, [*last, tokenizer.eos_token_id]])
        return cls(
            fields=list(zip(*columns, strict=True)),
            layouts=layouts,
            probabilities=battles.probabilities.astype(np.float32),
            qualities=battles.qualities.astype(np.float32),
        )

    def shortest(self, share: float) -> NDArray[np.int64]:
        """Rows of the shortest battles."""
        lengths = [sum(map(len, fields)) for fields in self.fields]
        return np.argsort(lengths, kind="stable")[: math.ceil(share * len(lengths))]

    def batches(
        self, rows: NDArray[np.int64], rng: np.random.Generator, *, answers: int
    ) -> Iterator[_Batch]:
        """One pass over ``rows``, shuffled; a batch has one layout and battles of similar length."""
        rows = rng.permutation(rows)
        # Sorting within groups of 32 batches saves most padding and keeps batches random.
        lengths = np.array([sum(map(len, self.fields[row])) for row in rows])
        rows = rows[np.lexsort((lengths, np.arange(len(rows)) // (32 * BATCH)))]
        groups = np.array_split(rows, math.ceil(len(rows) / BATCH))
        for group in rng.permutation(len(groups)):
            layout = self.layouts[rng.integers(len(self.layouts))]
            swapped = rng.random(len(groups[group])) < 0.5
            yield self._batch(groups[group], layout, swapped, answers)

    def _batch(
        self,
        rows: NDArray[np.int64],
        layout: list[list[int]],
        swapped: NDArray[np.bool_],
        answers: int,
    ) -> _Batch:
        import torch

        before, *between, after = layout
        sequences, spans = [], []
        for row, swap in zip(rows, swapped, strict=True):
            prompt, a, b = self.fields[row]
            shown = (b, a) if swap else (a, b)
            sequence = before + prompt
            places = []
            for piece, answer in zip(between[:answers], shown[:answers], strict=True):
                start = len(sequence) + len(piece)
                sequence = sequence + piece + answer
                places.append((start, len(sequence)))
            if answers == 2:
                sequence = sequence + after
            sequences.append(sequence)
            spans.append(places)
        width = max(map(len, sequences))
        probabilities = self.probabilities[rows]
        probabilities[swapped, :2] = probabilities[swapped, 1::-1]
        qualities = self.qualities[rows]
        qualities[swapped] = qualities[swapped, ::-1]
        return _Batch(
            # Attention is causal: no token attends to the padding after the last one.
            ids=torch.tensor([sequence + [0] * (width - len(sequence)) for sequence in sequences]),
            spans=torch.tensor(spans),
            last=torch.tensor([len(sequence) - 1 for sequence in sequences]),
            probabilities=torch.from_numpy(probabilities),
            qualities=torch.from_numpy(qualities[:, :answers].copy()),
        )


# Training ---------------------------------------------------------------------------------------


def _fit(
    backbone: PreTrainedModel, examples: _Examples, *, epochs: float, seed: int
) -> torch.nn.ModuleDict:
    """Train the backbone in place; returns the heads, which are not part of it."""
    import torch
    from torch.nn.functional import cross_entropy, mse_loss

    width = backbone.config.hidden_size
    heads = torch.nn.ModuleDict(
        {
            "votes": torch.nn.Linear(width, 3),
            "battle": torch.nn.Linear(width, 2 * len(QUALITIES)),
            "answer": torch.nn.Linear(width, len(QUALITIES)),
        }
    )
    steps = math.ceil(epochs * len(examples.fields) / BATCH)
    optimizers, schedules = _optimizers(backbone, heads, steps)
    parameters = [*backbone.parameters(), *heads.parameters()]
    running: dict[str, float] = {}
    backbone.train()
    for step, batch in enumerate(_curriculum(examples, steps, seed), 1):
        middle, hidden = _hidden(backbone, batch)
        place = torch.arange(middle.shape[1])
        within = (place >= batch.spans[..., :1]) & (place < batch.spans[..., 1:])
        row, answer, token = within.nonzero(as_tuple=True)
        losses = {
            "answer": mse_loss(heads["answer"](middle[row, token]), batch.qualities[row, answer])
        }
        loss = QUALITY_WEIGHT * losses["answer"]
        if batch.spans.shape[1] == 2:
            last = _last(hidden, batch)
            losses["votes"] = cross_entropy(heads["votes"](last), batch.probabilities)
            losses["battle"] = mse_loss(heads["battle"](last), batch.qualities.flatten(1))
            loss = loss + losses["votes"] + QUALITY_WEIGHT * losses["battle"]
        backbone.zero_grad()
        heads.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        for name, value in losses.items():
            running[name] = 0.98 * running.get(name, value.item()) + 0.02 * value.item()
        if step % 100 == 0:
            figures = ", ".join(f"{name} {value:.4f}" for name, value in running.items())
            _logger.info("step %d of %d: %s", step, steps, figures)
    backbone.eval()
    return heads


def _curriculum(examples: _Examples, steps: int, seed: int) -> Iterator[_Batch]:
    """Batches: first short battles cut after one answer, then all of them whole."""
    rng = np.random.default_rng(seed)
    short = examples.shortest(SHORT)
    everything = np.arange(len(examples.fields))
    first = round(ANSWERS_FIRST * steps)
    for rows, answers, count in ((short, 1, first), (everything, 2, steps - first)):
        while count > 0:
            for batch in itertools.islice(examples.batches(rows, rng, answers=answers), count):
                yield batch
                count -= 1


def _optimizers(
    backbone: Any, heads: torch.nn.Module, steps: int
) -> tuple[list[torch.optim.Optimizer], list[torch.optim.lr_scheduler.LambdaLR]]:
    """Muon for the layers' matrices, AdamW for the rest; linear warm-up, then cosine to zero."""
    import torch

    matrices = [parameter for parameter in backbone.layers.parameters() if parameter.ndim == 2]
    chosen = set(map(id, matrices))
    others = [p for p in [*backbone.parameters(), *heads.parameters()] if id(p) not in chosen]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=MATRIX_RATE, weight_decay=0.01),
        torch.optim.AdamW(others, lr=OTHER_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    warmup = min(WARMUP_STEPS, max(1, steps // 10))

    def rate(step: int) -> float:
        return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))

    return optimizers, [torch.optim.lr_scheduler.LambdaLR(o, rate) for o in optimizers]


def _hidden(backbone: PreTrainedModel, batch: _Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states after ``ANSWER_LAYER`` (normalised) and after the last layer.

    Both float32 (batch, width, hidden).
    """
    from torch.nn.functional import rms_norm

    output = backbone(input_ids=batch.ids, use_cache=False, output_hidden_states=True)
    middle, last = output.hidden_states[ANSWER_LAYER], output.last_hidden_state
    return rms_norm(middle, middle.shape[-1:]), last


def _last(hidden: torch.Tensor, batch: _Batch) -> torch.Tensor:
    """Hidden state of each sequence's last token, which a classifier reads: (batch, hidden)."""
    import torch

    return hidden[torch.arange(len(hidden)), batch.last]


def _expected_log_loss(
    backbone: PreTrainedModel, heads: torch.nn.ModuleDict, examples: _Examples
) -> tuple[float, float]:
    """Expected log loss under the true vote probabilities, and its bound, their entropy (nats)."""
    import torch
    from torch.nn.functional import cross_entropy

    rows = np.arange(len(examples.fields))
    total = 0.0
    with torch.no_grad():
        for batch in examples.batches(rows, np.random.default_rng(0), answers=2):
            _, hidden = _hidden(backbone, batch)
            logits = heads["votes"](_last(hidden, batch))
            total += cross_entropy(logits, batch.probabilities, reduction="sum").item()
    truth = examples.probabilities
    return total / len(rows), float(-(truth * np.log(truth)).sum(axis=1).mean())
