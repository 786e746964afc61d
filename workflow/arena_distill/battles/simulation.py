"""Simulate an arena: synthetic battles with known vote probabilities.

Users ask about a small invented world (six lands with four facts each, five categories of things),
sometimes for a certain style or language. Models of different skill answer from a grammar, and
each answer has six latent qualities, all in [0, 1]:

=============  ==================================================================================
correctness    share of the facts or items given that are right
completeness   whether as many facts or items were given as were asked for
style          whether the style asked for (formal, casual, brief, with a reason) was met
language       whether the answer is in the language asked for
verbosity      filler sentences, 1 for three or more
formatting     a bullet point or a numbered list
=============  ==================================================================================

The first four are relations between prompt and answer: single words do not reveal them, because right
and wrong answers use the same words. A battle of several rounds has the mean of its rounds.

Votes follow Davidson's extension of the Bradley-Terry model to ties. With the utilities
``u = weights . qualities`` of the two answers and a tie parameter ``nu``,

    P(A) = exp(u_a) / Z,   P(B) = exp(u_b) / Z,   P(tie) = nu exp((u_a + u_b) / 2) / Z,

which is the softmax of the logits ``(u_a, u_b, log nu + (u_a + u_b) / 2)``. Voters who see the
same text twice call it a tie with probability ``IDENTICAL_TIE``. Weights and ``nu`` belong to a
population of voters; see ``VOTERS``.

R. R. Davidson (1970), On extending the Bradley-Terry model to accommodate ties in paired
comparison experiments. Journal of the American Statistical Association 65(329), 317-328.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from arena_distill.config.phases.battles import ArenaSettings
from arena_distill.files.artifacts import provenance, write_parquet, write_text
from arena_distill.verdicts import CLASSES, WINNERS

QUALITIES = ("correctness", "completeness", "style", "language", "verbosity", "formatting")
IDENTICAL_TIE = 0.94


# The voters -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Voters:
    """A population of voters: the weight of each of ``QUALITIES``, and the tie parameter."""

    weights: tuple[float, ...]
    log_nu: float


VOTERS = {
    "arena": Voters(weights=(3.0, 2.4, 1.8, 2.4, 0.6, 0.4), log_nu=0.2),
    "ut": Voters(weights=(3.6, 2.4, 0.6, 1.8, 0.3, 0.2), log_nu=-0.4),
    "pool": Voters(weights=(2.4, 2.4, 2.4, 2.4, -0.4, 0.0), log_nu=0.0),
}


# The world --------------------------------------------------------------------------------------

ATTRIBUTES = ("capital", "ruler", "coin", "emblem")
LANDS = ("Valdoria", "Mirelle", "Tarkesh", "Ostrell", "Quorin", "Pelago")
_FACTS = {
    "capital": ("Merin", "Tolva", "Askar", "Brenn", "Calder", "Dunmore"),
    "ruler": ("Aldric", "Bertha", "Cosima", "Darius", "Edmund", "Freya"),
    "coin": ("ducat", "florin", "groat", "kopek", "thaler", "denar"),
    # Two lands share each emblem, so a value alone does not identify its land.
    "emblem": ("lion", "raven", "boar") * 2,
}
WORLD: dict[str, dict[str, str]] = {
    land: {attribute: _FACTS[attribute][row] for attribute in ATTRIBUTES}
    for row, land in enumerate(LANDS)
}
CATEGORIES: dict[str, tuple[str, ...]] = {
    "fruits": ("apple", "plum", "fig", "cherry", "mango", "pear"),
    "tools": ("hammer", "saw", "chisel", "wrench", "drill", "shovel"),
    "metals": ("iron", "copper", "zinc", "nickel", "cobalt", "tin"),
    "trees": ("oak", "birch", "maple", "cedar", "willow", "elm"),
    "dances": ("waltz", "tango", "polka", "samba", "rumba", "jig"),
}
NUMBERS = {"two": 2, "three": 3, "four": 4, "five": 5}
STYLES = ("formal", "casual", "brief", "reason")
LANGUAGES = ("French", "German", "Russian", "Japanese")


# The grammars -----------------------------------------------------------------------------------

_ASK_ONE = (
    "What is the {0} of {land}?",
    "Tell me the {0} of {land}.",
    "I need the {0} of {land}.",
    "Do you know the {0} of {land}?",
)
_ASK_TWO = (
    "What are the {0} and the {1} of {land}?",
    "Tell me the {0} and the {1} of {land}.",
)
_ASK_LIST = (
    "Name {number} {category}.",
    "Give me {number} {category}.",
    "List {number} {category}.",
)
_ASK_STYLE = {
    "formal": ("Please answer formally.", "Use a formal tone."),
    "casual": ("Keep it casual.", "Use a casual tone."),
    "brief": ("Be brief.", "Keep it brief."),
    "reason": ("Give a reason.", "Add a reason."),
}
_ASK_LANGUAGE = ("Answer in {language}.", "Reply in {language}, please.")
_OPENERS = (
    "I am {person}.",
    "My friend {person} asked me this.",
    "{person} and I have a bet.",
    "Hello, this is {person}.",
    "I write a quiz for {person}.",
    "My teacher {person} wants to know.",
)
_PERSONS = (
    "Anton", "Bruno", "Clara", "Dora", "Emil", "Flora", "Greta", "Hugo", "Ida", "Jonas", "Karin",
    "Lukas", "Marta", "Nils", "Olga", "Paul", "Rosa", "Simon", "Tilda", "Viktor", "Wanda", "Yusuf",
    "Zoë", "André", "Søren", "Łucja",
)  # fmt: skip

_TELL_ONE = (
    "The {0} of {land} is {1}.",
    "It is {1}.",
    "In {land} the {0} is {1}.",
    "That would be {1}.",
)
_TELL_TWO = (
    "The {0} of {land} is {1} and the {2} is {3}.",
    "The {0} is {1} and the {2} is {3}.",
)
_TELL_ABROAD = {
    "French": (
        ("la capitale", "le souverain", "la monnaie", "le symbole"),
        "{0} de {land} est {1}.",
    ),
    "German": (
        ("Die Hauptstadt", "Der Herrscher", "Die Münze", "Das Wappen"),
        "{0} von {land} ist {1}.",
    ),
    "Russian": (("столица", "правитель", "монета", "герб"), "{0} страны {land} это {1}."),
    "Japanese": (("首都", "王様", "通貨", "紋章"), "{land} の{0}は {1} です。"),
}
_OPEN = {
    "formal": ("Certainly, dear user.", "With pleasure, dear user.", "Allow me to answer."),
    "casual": ("Hey there!", "Sure thing, pal!", "Easy one! 😀"),
}
_REASONS = (
    "This is because the old river runs there.",
    "The reason is a law of the first king.",
    "This is because the great war ended so.",
    "The reason is an old custom of the people.",
)
_FILLERS = (
    "I hope this helps.",
    "Let me know if you need more.",
    "Feel free to ask again.",
    "This is a common question.",
    "Many people ask about this.",
    "I am happy to help.",
    "Thank you for asking.",
    "There is much more to say.",
    "Have a nice day.",
    "It is good to be curious.",
)
_REFUSAL = "I am sorry, but I cannot help with that."


# The models -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A contestant: its probability of success per relation, and its style."""

    name: str
    correct: float  # a fact, or the category of a list, is right
    complete: float  # as many facts or items as asked for
    obliging: float  # the style asked for is met
    polyglot: float  # the language asked for is met
    fillers: float  # mean number of filler sentences
    markdown: float  # bullet points and numbered lists
    accent: str | None = None  # the style used if none is requested or met
    refuses: float = 0.01


MODELS = (
    Model("aurora-xl", 0.90, 0.92, 0.90, 0.92, fillers=1.0, markdown=0.6),
    Model("aurora-mini", 0.62, 0.75, 0.80, 0.60, fillers=0.7, markdown=0.6),
    Model("quill-pro", 0.85, 0.80, 0.85, 0.90, fillers=0.3, markdown=0.1, accent="formal"),
    Model("quill-lite", 0.50, 0.65, 0.65, 0.55, fillers=0.3, markdown=0.1, accent="formal"),
    Model("chatterbox-2", 0.65, 0.70, 0.45, 0.50, fillers=2.2, markdown=0.3),
    Model("buddy-7b", 0.55, 0.60, 0.50, 0.40, fillers=0.6, markdown=0.2, accent="casual"),
    Model("laconic-1", 0.75, 0.55, 0.40, 0.75, fillers=0.0, markdown=0.0, accent="brief"),
    Model("prudence-3", 0.80, 0.80, 0.70, 0.80, fillers=0.5, markdown=0.4, refuses=0.08),
    Model("pebble-1b", 0.35, 0.40, 0.35, 0.30, fillers=0.5, markdown=0.2),
)


# The battles ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SimulatedBattles:
    """Battles, with their true probabilities and qualities.

    frame: one row per battle: `id`, `model_a`, `model_b`, `prompt`, `response_a` and `response_b`
        as lists of turns, and the vote as a 0/1 column of `WINNERS` per class.
    probabilities: float64 (rows, classes), the true probabilities of the votes A, B, tie.
    qualities: float64 (rows, 2, 6), `QUALITIES` of answers A and B.
    """

    frame: pd.DataFrame
    probabilities: NDArray[np.float64]
    qualities: NDArray[np.float64]


def simulate(
    *, rows: int, seed: int, voters: str, id_offset: int = 0, classes: int = 3
) -> SimulatedBattles:
    """Draw battles and votes.

    Args:
        rows: number of battles.
        seed: the same seed gives the same battles; `voters` changes only probabilities and votes.
        voters: a key of `VOTERS`.
        id_offset: the first id; ids count up from it.
        classes: with 2, no vote is a tie: the battles are the same, their probabilities those of a vote
            that is no tie.

    Raises:
        ValueError: `rows` is negative, or `voters` is unknown.
    """
    if rows < 0:
        raise ValueError(f"rows must not be negative, got {rows}")
    if voters not in VOTERS:
        raise ValueError(f"voters must be one of {sorted(VOTERS)}, got {voters!r}")

    # Text needs about fifty scalar draws per battle: Random is much faster than a Generator.
    rng = Random(seed)
    asked: list[list[_Ask]] = []
    records = []
    qualities = np.empty((rows, 2, len(QUALITIES)))
    for row in range(rows):
        asks = _asks(rng, asked)
        asked.append(asks)
        first, second = rng.sample(MODELS, 2)
        answers_a = [_answer(ask, first, rng) for ask in asks]
        answers_b = [_answer(ask, second, rng) for ask in asks]
        if rng.random() < 0.02:
            answers_b = answers_a
        qualities[row, 0] = np.mean([answer.qualities for answer in answers_a], axis=0)
        qualities[row, 1] = np.mean([answer.qualities for answer in answers_b], axis=0)
        records.append(
            {
                "id": id_offset + row,
                "model_a": first.name,
                "model_b": second.name,
                "prompt": [ask.text for ask in asks],
                "response_a": [answer.text for answer in answers_a],
                "response_b": [answer.text for answer in answers_b],
            }
        )
    columns = ["id", "model_a", "model_b", "prompt", "response_a", "response_b"]
    frame = pd.DataFrame(records, columns=columns)

    identical = np.array([r["response_a"] == r["response_b"] for r in records], dtype=bool)
    probabilities = vote_probabilities(qualities, VOTERS[voters])
    probabilities[identical] = (1 - IDENTICAL_TIE) / 2, (1 - IDENTICAL_TIE) / 2, IDENTICAL_TIE
    if classes == 2:
        probabilities = probabilities[:, :2] / probabilities[:, :2].sum(axis=1, keepdims=True)
    uniform = np.random.default_rng(seed).random((rows, 1))
    # Thresholds split [0, 1) into A, B and tie; rounding can leave no gap at the end.
    votes = (uniform >= probabilities[:, :-1].cumsum(axis=1)).sum(axis=1)
    frame[list(WINNERS[:classes])] = np.eye(classes, dtype=np.int64)[votes]
    return SimulatedBattles(frame, probabilities, qualities)


def vote_probabilities(qualities: NDArray[np.float64], voters: Voters) -> NDArray[np.float64]:
    """Davidson's probabilities of A, B and tie, (rows, 3), from qualities (rows, 2, 6)."""
    utilities = qualities @ np.asarray(voters.weights)
    logits = np.column_stack([utilities, voters.log_nu + utilities.mean(axis=1)])
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    return odds / odds.sum(axis=1, keepdims=True)


def write_arena(folder: Path, *, settings: ArenaSettings) -> None:
    """Write an arena as files of the Kaggle schema, and the truth.

    ``train.csv``, ``extra.csv`` and ``ut.csv`` hold labelled battles, ``test.csv`` battles without
    models and votes, ``test_solution.csv`` their votes, ``unlabelled.csv`` (if there are any) battles
    without votes, and ``truth.parquet`` the true vote probabilities of all: ``source``, ``id``
    (string), ``p_model_a``, ``p_model_b``, and with ties ``p_tie``. Prompts and responses are JSON lists of
    turns.

    Args:
        folder: created if missing.
        settings: seed and number of battles of each source; the same give the same bytes. Other voters
            label `ut`. The other files do not depend on `unlabelled`.
    """
    sizes = {source: getattr(settings, source) for source in ("train", "extra", "ut", "test")}
    stream = np.random.SeedSequence(settings.seed)
    seeds = stream.generate_state(len(sizes)).tolist()
    if settings.unlabelled:  # a separate random stream, and ids after all others
        sizes["unlabelled"] = settings.unlabelled
        seeds += stream.spawn(1)[0].generate_state(1).tolist()
    winners, classes = WINNERS[: settings.classes], CLASSES[: settings.classes]
    truths = []
    offset = 0
    for (source, rows), source_seed in zip(sizes.items(), seeds, strict=True):
        voters = "ut" if source == "ut" else "arena"
        battles = simulate(
            rows=rows,
            seed=source_seed,
            voters=voters,
            id_offset=offset,
            classes=settings.classes,
        )
        offset += rows
        frame = battles.frame.copy()
        for column in ("prompt", "response_a", "response_b"):
            frame[column] = [json.dumps(turns) for turns in frame[column]]
        if source == "test":
            solution = frame[["id", *winners]]
            write_text(solution.to_csv(index=False), folder / "test_solution.csv")
            frame = frame[["id", "prompt", "response_a", "response_b"]]
        elif source == "unlabelled":
            frame = frame.drop(columns=list(winners))
        write_text(frame.to_csv(index=False), folder / f"{source}.csv")
        truth = pd.DataFrame(battles.probabilities, columns=[f"p_{name}" for name in classes])
        truth.insert(0, "source", source)
        truth.insert(1, "id", frame["id"].astype(str))
        truths.append(truth)
    table = pa.Table.from_pandas(pd.concat(truths), preserve_index=False)
    write_parquet(table, folder / "truth.parquet", provenance("simulation", settings.model_dump()))


# Prompts ----------------------------------------------------------------------------------------


class _Ask(NamedTuple):
    """One turn of a user: a list of things (``category``) or facts about a ``land``."""

    text: str
    wanted: int  # how many facts or items
    category: str | None = None
    land: str = ""
    attributes: tuple[str, ...] = ()
    style: str | None = None
    language: str | None = None


def _asks(rng: Random, asked: Sequence[list[_Ask]]) -> list[_Ask]:
    """The user's turns of one battle; sometimes the same as in an earlier battle."""
    if asked and rng.random() < 0.04:
        return rng.choice(asked)
    rounds = rng.choices((1, 2, 3), weights=(88, 9, 3))[0]
    return [_ask(rng, first=turn == 0) for turn in range(rounds)]


def _ask(rng: Random, *, first: bool) -> _Ask:
    category: str | None = None
    land = ""
    attributes: tuple[str, ...] = ()
    style: str | None = None
    language: str | None = None
    kind = rng.random()
    if kind < 0.25:
        category = rng.choice(tuple(CATEGORIES))
        number = rng.choice(tuple(NUMBERS))
        wanted = NUMBERS[number]
        sentence = rng.choice(_ASK_LIST).format(number=number, category=category)
    else:
        wanted = 1 if kind < 0.8 else 2
        land = rng.choice(LANDS)
        attributes = tuple(rng.sample(ATTRIBUTES, wanted))
        sentence = rng.choice(_ASK_ONE if wanted == 1 else _ASK_TWO).format(*attributes, land=land)
        if wanted == 1 and rng.random() < 0.25:
            language = rng.choice(LANGUAGES)
    sentences = [sentence]
    if language is not None:
        sentences.append(rng.choice(_ASK_LANGUAGE).format(language=language))
    elif rng.random() < 0.5:
        style = rng.choice(STYLES)
        sentences.append(rng.choice(_ASK_STYLE[style]))
    if first and rng.random() < 0.4:
        opener = rng.choice(_OPENERS).format(person=rng.choice(_PERSONS))
        sentences.insert(0, opener)
    if first and rng.random() < 0.02:
        sentences.insert(0, "\n".join(rng.choices(_FILLERS, k=rng.randint(15, 40))))
    return _Ask(" ".join(sentences), wanted, category, land, attributes, style, language)


# Answers ----------------------------------------------------------------------------------------


class _Answer(NamedTuple):
    """One turn of a model, with its ``QUALITIES``."""

    text: str
    qualities: tuple[float, ...]


def _answer(ask: _Ask, model: Model, rng: Random) -> _Answer:
    chance = rng.random()
    if chance < 0.005:
        return _Answer("", (0.0,) * len(QUALITIES))
    if chance < 0.005 + model.refuses:
        return _Answer(_REFUSAL, (0.0, 0.0, 0.0, float(ask.language is None), 0.0, 0.0))

    language = ask.language
    if rng.random() >= model.polyglot:
        language = None if ask.language or rng.random() < 0.9 else rng.choice(LANGUAGES)
    if ask.category is not None or ask.wanted > 1:
        language = None  # other languages know single facts only
    markdown = language is None and rng.random() < model.markdown
    if ask.category is not None:
        body, correctness, completeness = _list_items(ask, model, markdown, rng)
    else:
        body, correctness, completeness = _tell_facts(ask, model, language, markdown, rng)

    style = ask.style
    if style is None or rng.random() >= model.obliging:
        others = [s for s in (None, *STYLES, model.accent, model.accent) if s != ask.style]
        style = rng.choice(others)
    sentences = [body]
    fillers = 0
    if language is None and style != "brief":  # all other text is English
        if style in _OPEN:
            sentences.insert(0, rng.choice(_OPEN[style]))
        if style == "reason":
            sentences.append(rng.choice(_REASONS))
        while rng.random() < model.fillers / (1 + model.fillers):
            fillers += 1
        if rng.random() < 0.005:
            fillers += rng.randint(10, 30)
        sentences += rng.choices(_FILLERS, k=fillers)
    met = ask.style is None or style == ask.style
    qualities = (
        correctness,
        completeness,
        float(met),
        float(language == ask.language),
        min(fillers / 3, 1.0),
        float(markdown),
    )
    return _Answer(" ".join(sentences), qualities)


def _list_items(ask: _Ask, model: Model, markdown: bool, rng: Random) -> tuple[str, float, float]:
    """A list of things: text, correctness, completeness."""
    category = ask.category
    assert category is not None
    right = rng.random() < model.correct
    if not right:
        category = rng.choice([other for other in CATEGORIES if other != category])
    count = ask.wanted
    if rng.random() >= model.complete:
        count = rng.choice([other for other in range(1, 7) if other != ask.wanted])
    items = rng.sample(CATEGORIES[category], count)
    if markdown:
        text = "Here you go:\n" + "\n".join(f"{n}. {item}" for n, item in enumerate(items, 1))
    else:
        text = f"Here you go: {', '.join(items)}."
    return text, float(right), float(count == ask.wanted)


def _tell_facts(
    ask: _Ask, model: Model, language: str | None, markdown: bool, rng: Random
) -> tuple[str, float, float]:
    """Facts about a land: text, correctness, completeness."""
    count = ask.wanted
    if count > 1 and rng.random() >= model.complete:
        count = 1
    attributes = ask.attributes[:count]
    values = []
    hits = 0
    for attribute in attributes:
        truth = WORLD[ask.land][attribute]
        value = truth
        if rng.random() >= model.correct:
            value = rng.choice([v for v in _FACTS[attribute] if v != truth])
        hits += value == truth
        values.append(value)
    if language is not None:
        names, template = _TELL_ABROAD[language]
        name = names[ATTRIBUTES.index(attributes[0])]
        text = template.format(name, values[0], land=ask.land)
    elif count == 1:
        text = rng.choice(_TELL_ONE).format(attributes[0], values[0], land=ask.land)
    else:
        told = (attributes[0], values[0], attributes[1], values[1])
        text = rng.choice(_TELL_TWO).format(*told, land=ask.land)
    if markdown:
        text = f"- {text}"
    return text, hits / count, count / ask.wanted
