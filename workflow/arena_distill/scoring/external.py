"""Get the logits of external judges from a file or from an endpoint.

They are written to one file of all labelled battles (sources train and extra), and of the battles without
votes that students learn from the judge. Each fold gets its rows of it, in the same form as for a judge
that is trained here. The judge is the same in every fold, so its out-of-fold and its in-sample logits are
equal.

Where the run has two classes and the judge knows ties, its logit of a tie is left out: see
:func:`arena_distill.verdicts.logits_among`.

An endpoint is a chat model. Its prompt is a battle, in both orders, and asks for one token, the verdict;
the log-probabilities of the verdicts are the logits. (On chat models as judges, and the effect of the
order of the answers on them: Zheng et al. 2023, arXiv:2306.05685.)
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from arena_distill.battles.folds import fold_rows
from arena_distill.config.external import EndpointLimits, Query
from arena_distill.config.phases.scoring import LogitsSettings, QuerySettings
from arena_distill.errors import InputError
from arena_distill.files.artifacts import (
    fingerprint,
    provenance,
    read_parquet,
    read_provenance,
    write_json,
)
from arena_distill.files.keys import key, locate
from arena_distill.files.logits import ids_path, read_logits, write_logits
from arena_distill.scoring import endpoint
from arena_distill.scoring.answers import Alternative, Answers, Request, Token
from arena_distill.scoring.external_files import LEAST, judged_battles
from arena_distill.scoring.log_odds import log_softmax
from arena_distill.verdicts import ORDERS, Order, exchange, logits_among

TEMPLATE = """\
{instructions}

<question>
{question}
</question>
<answer_a>
{answer_a}
</answer_a>
<answer_b>
{answer_b}
</answer_b>

Verdict ({verdicts}):"""
"""The prompt: one user message, which every chat template supports."""

NEXT_TURN = "\n\n[next turn]\n\n"
LEFT_OUT = "\n[…]\n"

_TAG = r"(?i)<(/?\s*(?:question|answer_a|answer_b)\b)"


def split_external_logits(
    logits: Path, folds: Path, fold: int, output: Path, *, settings: LogitsSettings
) -> None:
    """Write a fold's rows of an external judge's logits → `fold_<k>.npy` and its ids.

    The judge is the same in all folds; the rows of a fold's file, and its validation rows, are those of
    a judge that is trained.
    """
    scores, ids = read_logits(logits)
    table = read_parquet(folds)
    rows = fold_rows(table, fold, settings)
    unjudged = pc.and_(
        pc.equal(rows["source"], "unlabelled"), pc.invert(pc.is_in(key(rows), key(ids)))
    )
    if lacking := pc.sum(unjudged).as_py():
        raise InputError(
            f"{logits}: {lacking:,} unlabelled battles have no logits, but students learn them from this "
            "judge: add them to its file (source: unlabelled), or set the students' pseudo_labels: false"
        )
    place = locate(key(rows), key(ids), f"logits in {logits}")
    about = {"fold": fold, "external": read_provenance(ids_path(logits)).get("settings")}
    about = provenance("logits", settings.model_dump(mode="json") | about)
    about["made_from"] = {"folds": fingerprint(table), "fold": fold}
    write_logits(output, scores[place], rows, about)
    print(f"{output}: {len(rows):,} battles of {logits}")


# --- an endpoint ------------------------------------------------------------------------------------


def query_endpoint(
    battles: Path,
    output: Path,
    cost: Path,
    answers: Path,
    *,
    settings: QuerySettings,
    limits: EndpointLimits,
) -> None:
    """Query an endpoint for all labelled battles in both orders → `logits.npy`, its ids, `cost.json`.

    Also for battles without votes, if a student learns them.

    Args:
        answers: folder of the stored answers; their requests are not sent again.
        settings: all that determines the answers.
        limits: rate, retries and cost of the requests.

    Raises:
        InputError: the endpoint refuses or keeps failing, `max_cost` is reached, or no answer has a
            verdict.
        Stopped: by SIGINT or SIGTERM.
    """
    asked, classes = judged_battles(battles, TEXTS, unlabelled=settings.unlabelled)
    questions = Questions(asked, settings)
    if questions.cut:
        print(
            f"{questions.cut:,} of {len(questions.rows):,} battles have a text of more than "
            f"{settings.max_characters:,} characters: its middle is cut out",
            flush=True,
        )
    with closing(Answers(answers)) as kept:
        keys: dict[bytes, int] = {}  # equal requests are sent once
        number_of = np.array([keys.setdefault(request.key, len(keys)) for request in questions])
        known = [kept.tokens(key) for key in keys]
        unknown = [number for number, tokens in enumerate(known) if tokens is None]
        print(f"{len(keys):,} requests, {len(unknown):,} of them to send", flush=True)
        first = np.unique(number_of, return_index=True)[1]
        if unknown:
            endpoint.ask(
                (questions.request(int(first[number])) for number in unknown),
                kept,
                limits=limits,
                spent=sum(endpoint.cost(*tokens, limits) for tokens in known if tokens),
                total=len(unknown),
            )
        found = [verdict_scores(kept.get(key).tokens() or (), settings.verdicts) for key in keys]
        counted = np.array([kept.tokens(key) for key in keys])
    scores, listed = (np.array(part) for part in zip(*found, strict=True))
    if not listed.any():
        raise InputError(
            f"{settings.url}: none of {len(keys):,} answers of {settings.model} has one of the verdicts "
            f"{', '.join(settings.verdicts)}: change `instructions` or `verdicts`; if the model reasons "
            "before it answers, switch that off (parameters)"
        )
    seen = log_softmax(logits_among(scores, classes))[number_of].reshape(-1, len(ORDERS), classes)
    logits = exchange(seen).astype(np.float32)
    prompt_tokens, completion_tokens = counted.sum(axis=0).tolist()
    priced = limits.prompt_price is not None
    figures = {
        "url": settings.url,
        "model": settings.model,
        "battles": len(logits),
        "battles_cut": questions.cut,
        "requests": len(keys),
        "asked_now": len(unknown),
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "prompt_price": limits.prompt_price,
        "completion_price": limits.completion_price,
        "cost": endpoint.cost(prompt_tokens, completion_tokens, limits) if priced else None,
        "verdicts": {
            "probability": float(np.where(listed, np.exp(scores), 0).sum(axis=1).mean()),
            "unlisted": dict(zip(settings.verdicts, (~listed).sum(axis=0).tolist(), strict=True)),
            "answers_without": int((~listed).all(axis=1).sum()),
        },
    }
    about = provenance("endpoint", settings.model_dump(mode="json"))
    write_json(figures | {"provenance": about}, cost)
    write_logits(output, logits, questions.rows, about)
    print(_summary(output, figures))


TEXTS = {"prompt": "question", "response_a": "answer_a", "response_b": "answer_b"}
"""Columns of the battles, and their names in `TEMPLATE`."""


class Questions:
    """The requests about some battles: battle by battle, each in both orders."""

    def __init__(self, battles: pa.Table, settings: Query) -> None:
        """
        Args:
            battles: canonical, columns `id`, `source` and `TEXTS`.
        """
        self.rows = battles.select(["id", "source"])
        self._settings = settings
        self._keys = key(battles)
        shown = [_shown(battles[name], settings.max_characters) for name in TEXTS]
        self._texts = dict(zip(TEXTS, (texts for texts, _ in shown), strict=True))
        self.cut = int(np.any([cut for _, cut in shown], axis=0).sum())

    def __len__(self) -> int:
        return len(self.rows) * len(ORDERS)

    def __iter__(self) -> Iterator[Request]:
        return map(self.request, range(len(self)))

    def request(self, number: int) -> Request:
        settings = self._settings
        row, order = divmod(number, len(ORDERS))
        body = {
            "model": settings.model,
            "messages": [{"role": "user", "content": self._message(row, ORDERS[order])}],
            "temperature": 0,
            "max_tokens": settings.max_tokens,
            "logprobs": True,
            "top_logprobs": settings.top_logprobs,
            **settings.parameters,
        }
        body = {name: value for name, value in body.items() if value is not None}
        most = int(body.get("max_tokens", body.get("max_completion_tokens", 0)))
        content = json.dumps(body, sort_keys=True, ensure_ascii=False).encode()
        name = f"battle {self._keys[row]}, order {ORDERS[order]}"
        return Request(name, settings.url, content, most)

    def _message(self, row: int, order: Order) -> str:
        texts = {TEXTS[name]: texts[row].as_py() for name, texts in self._texts.items()}
        if order == "BA":
            texts["answer_a"], texts["answer_b"] = texts["answer_b"], texts["answer_a"]
        verdicts = self._settings.verdicts
        instructions = self._settings.instructions
        for name, verdict in zip(("a", "b", "tie"), verdicts, strict=False):
            instructions = instructions.replace(f"{{{name}}}", verdict)
        either = f"{', '.join(verdicts[:-1])} or {verdicts[-1]}"
        return TEMPLATE.format(instructions=instructions, **texts, verdicts=either)


def verdict_scores(
    tokens: Sequence[Token], verdicts: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Compute the log-probabilities of the verdicts in an answer.

    "A", " A" and "a" are one verdict: their probabilities add up. Of several generated tokens the first
    verdict counts, or else the first token. A verdict that is not listed there cannot be more probable than
    the least probable listed token, nor than the rest that the listed ones leave (see `LEAST`): it gets the
    smaller of these two bounds. Without a token, all verdicts are equal.

    Returns:
        float64 (verdicts,), for the answers as shown; and bool (verdicts,), whether each was listed.
    """
    wanted = [_plain(verdict) for verdict in verdicts]
    if not tokens:
        return np.zeros(len(wanted)), np.zeros(len(wanted), bool)
    token = next((token for token in tokens if _plain(token.token) in wanted), tokens[0])
    listed: list[Alternative] = list(token.top_logprobs)
    if token.token not in {other.token for other in listed}:
        listed.append(token)
    listed = [other for other in listed if UNLIKELY < other.logprob < np.inf]
    logprobs = np.array([min(other.logprob, 0.0) for other in listed])
    plain = np.array([_plain(other.token) for other in listed])
    scores = np.array([np.logaddexp.reduce(logprobs[plain == verdict]) for verdict in wanted])
    left_over = 1 - np.exp(logprobs).sum()
    bound = min(logprobs.min(initial=0), np.log(max(left_over, LEAST)))
    found = np.isfinite(scores)
    return np.where(found, scores, bound), found


UNLIKELY = -9999.0
"""What OpenAI and vLLM return in place of an unknown log-probability."""


def _plain(token: str) -> str:
    # Some servers return the tokenizer's own symbol for a space.
    return token.strip().lstrip("▁Ġ").casefold()


def _shown(column: pa.ChunkedArray, most: int) -> tuple[pa.Array, np.ndarray]:
    """Turns as texts of at most `most` characters, and which of them were cut: bool (rows,).

    Text is data: what looks like a tag of the template gets a space, so that no battle can close its tag.
    """
    texts = pc.binary_join(column, NEXT_TURN).cast(pa.large_string()).combine_chunks()
    long = pc.greater(pc.utf8_length(texts), most)
    half = most // 2
    ends = pc.utf8_slice_codeunits(texts, 0, half), pc.utf8_slice_codeunits(texts, -half)
    cut = pc.binary_join_element_wise(*ends, pa.scalar(LEFT_OUT, pa.large_string()))
    shown = pc.replace_substring_regex(pc.if_else(long, cut, texts), _TAG, r"< \1")
    return shown, long.to_numpy(zero_copy_only=False)


def _summary(output: Path, figures: Mapping[str, Any]) -> str:
    verdicts = figures["verdicts"]
    parts = [
        f"{output}: {figures['battles']:,} battles in {len(ORDERS)} orders",
        f"{figures['asked_now']:,} of {figures['requests']:,} requests sent now",
        f"{figures['prompt_tokens']:,} + {figures['completion_tokens']:,} tokens",
        *([] if figures["cost"] is None else [f"cost {figures['cost']:.4g}"]),
        f"the verdicts have {verdicts['probability']:.1%} of the probability",
        "not listed, so bounded: "
        + ", ".join(f"{name} {count:,}" for name, count in verdicts["unlisted"].items()),
    ]
    if verdicts["answers_without"]:
        parts.append(f"{verdicts['answers_without']:,} answers without any verdict")
    return "; ".join(parts)
