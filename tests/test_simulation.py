"""The synthetic arena: schema, determinism, votes as likely as stated, no words that reveal them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import cross_val_predict

from arena_distill.battles.simulation import (
    CATEGORIES,
    IDENTICAL_TIE,
    NUMBERS,
    QUALITIES,
    VOTERS,
    WORLD,
    SimulatedBattles,
    Voters,
    simulate,
    vote_probabilities,
    write_arena,
)
from arena_distill.config.phases.battles import ArenaSettings
from arena_distill.verdicts import WINNERS

SIZES = {"train": 60, "extra": 20, "ut": 30, "test": 25}


@pytest.fixture(scope="module")
def arena() -> SimulatedBattles:
    return simulate(rows=4_000, seed=7, voters="arena")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("arena")
    write_arena(folder, settings=ArenaSettings(version=1, seed=3, **SIZES))
    return folder


def votes(battles: SimulatedBattles) -> np.ndarray:
    return battles.frame[list(WINNERS)].to_numpy().argmax(axis=1)


def prior_log_loss(votes: np.ndarray) -> float:
    shares = np.bincount(votes, minlength=3) / len(votes)
    return float(-np.log(shares[votes]).mean())


def bayes_log_loss(battles: SimulatedBattles) -> float:
    chosen = battles.probabilities[np.arange(len(battles.frame)), votes(battles)]
    return float(-np.log(chosen).mean())


def joined(battles: SimulatedBattles, column: str) -> list[str]:
    return ["\n".join(turns) for turns in battles.frame[column]]


def single_turns(battles: SimulatedBattles, side: int) -> list[tuple[str, str, dict[str, float]]]:
    """Prompt, answer and qualities of one side, where there is one turn."""
    answers = battles.frame["response_a" if side == 0 else "response_b"]
    return [
        (prompt[0], answer[0], dict(zip(QUALITIES, qualities[side], strict=True)))
        for prompt, answer, qualities in zip(
            battles.frame["prompt"], answers, battles.qualities, strict=True
        )
        if len(prompt) == 1
    ]


# --- determinism and schema -----------------------------------------------------------------------


def test_a_seed_decides_everything() -> None:
    first, again = (simulate(rows=50, seed=1, voters="arena") for _ in range(2))
    pd.testing.assert_frame_equal(first.frame, again.frame)
    np.testing.assert_array_equal(first.probabilities, again.probabilities)
    assert not first.frame["prompt"].equals(
        simulate(rows=50, seed=2, voters="arena").frame["prompt"]
    )


def test_voters_change_votes_and_nothing_else() -> None:
    arena, ut = (simulate(rows=200, seed=1, voters=voters) for voters in ("arena", "ut"))
    texts = [column for column in arena.frame if column not in WINNERS]
    pd.testing.assert_frame_equal(arena.frame[texts], ut.frame[texts])
    np.testing.assert_array_equal(arena.qualities, ut.qualities)
    assert np.abs(arena.probabilities - ut.probabilities).max() > 0.1


def test_files_have_the_kaggle_schema(folder: Path) -> None:
    names = {"train.csv", "extra.csv", "ut.csv", "test.csv", "test_solution.csv", "truth.parquet"}
    assert {path.name for path in folder.iterdir()} == names
    labelled = ["id", "model_a", "model_b", "prompt", "response_a", "response_b", *WINNERS]
    for source in ("train", "extra", "ut"):
        frame = pd.read_csv(folder / f"{source}.csv")
        assert list(frame) == labelled
        assert len(frame) == SIZES[source]
        assert (frame[list(WINNERS)].sum(axis=1) == 1).all()
        assert (frame["model_a"] != frame["model_b"]).all()
        for column in ("prompt", "response_a", "response_b"):
            turns = frame[column].map(json.loads)
            assert turns.map(lambda turns: all(isinstance(turn, str) for turn in turns)).all()
            assert turns.map(len).equals(frame["prompt"].map(json.loads).map(len))
    test = pd.read_csv(folder / "test.csv")
    solution = pd.read_csv(folder / "test_solution.csv")
    assert list(test) == ["id", "prompt", "response_a", "response_b"]
    assert list(solution) == ["id", *WINNERS]
    assert test["id"].equals(solution["id"])


def test_the_truth_covers_every_battle_once(folder: Path) -> None:
    truth = pd.read_parquet(folder / "truth.parquet")
    assert list(truth) == ["source", "id", "p_model_a", "p_model_b", "p_tie"]
    assert truth["source"].value_counts().to_dict() == SIZES
    assert truth["id"].is_unique
    np.testing.assert_allclose(truth[["p_model_a", "p_model_b", "p_tie"]].sum(axis=1), 1)
    for source in SIZES:
        ids = pd.read_csv(folder / f"{source}.csv", dtype={"id": str})["id"]
        assert truth.loc[truth["source"] == source, "id"].tolist() == ids.tolist()


def test_ut_battles_have_voters_of_their_own(folder: Path) -> None:
    """In truth and votes; no other battles have them."""
    truth = pd.read_parquet(folder / "truth.parquet")
    seeds = np.random.SeedSequence(3).generate_state(4)
    for (source, rows), seed in zip(SIZES.items(), seeds.tolist(), strict=True):
        voters = "ut" if source == "ut" else "arena"
        expected = simulate(rows=rows, seed=seed, voters=voters)
        found = truth.loc[truth["source"] == source].filter(like="p_")
        np.testing.assert_allclose(found, expected.probabilities, rtol=1e-12)
        votes = pd.read_csv(folder / ("test_solution.csv" if source == "test" else f"{source}.csv"))
        pd.testing.assert_frame_equal(votes[list(WINNERS)], expected.frame[list(WINNERS)])


def test_an_arena_is_written_alike_twice(folder: Path, tmp_path: Path) -> None:
    write_arena(tmp_path, settings=ArenaSettings(version=1, seed=3, **SIZES))
    for path in folder.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_an_arena_may_lack_extra_and_ut_battles(tmp_path: Path) -> None:
    sizes = {"train": 5, "extra": 0, "ut": 0, "test": 2}
    write_arena(tmp_path, settings=ArenaSettings(version=1, seed=3, **sizes))
    assert len(pd.read_csv(tmp_path / "extra.csv")) == 0
    assert len(pd.read_parquet(tmp_path / "truth.parquet")) == 7


def test_ids_count_up_from_the_offset() -> None:
    frame = simulate(rows=3, seed=0, voters="pool", id_offset=40).frame
    assert frame["id"].tolist() == [40, 41, 42]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": -1, "voters": "arena"}, "rows must not be negative, got -1"),
        ({"rows": 1, "voters": "critics"}, "voters must be one of .* got 'critics'"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        simulate(seed=0, **arguments)


# --- votes ----------------------------------------------------------------------------------------


def test_probabilities_are_davidsons() -> None:
    voters = Voters(weights=(1.0, 0.0, 0.0, 0.0, 0.0, 0.0), log_nu=np.log(2.0))
    qualities = np.zeros((1, 2, len(QUALITIES)))
    qualities[0, 0, 0] = np.log(4.0)
    # Worths 4 and 1: ties weigh 2 * sqrt(4 * 1) = 4, and the sum is 9.
    np.testing.assert_allclose(vote_probabilities(qualities, voters), [[4 / 9, 1 / 9, 4 / 9]])


@pytest.mark.parametrize("voters", VOTERS)
def test_exchanging_the_answers_exchanges_the_probabilities(voters: str) -> None:
    qualities = np.random.default_rng(0).random((20, 2, len(QUALITIES)))
    straight = vote_probabilities(qualities, VOTERS[voters])
    swapped = vote_probabilities(qualities[:, ::-1], VOTERS[voters])
    np.testing.assert_allclose(swapped, straight[:, [1, 0, 2]])


def test_drawn_votes_fit_their_probabilities(arena: SimulatedBattles) -> None:
    drawn = arena.frame[list(WINNERS)].to_numpy()
    for vote in range(3):
        # By tenths of the probability: within four standard errors of what was promised.
        order = np.argsort(arena.probabilities[:, vote], kind="stable")
        for rows in np.array_split(order, 10):
            promised = arena.probabilities[rows, vote]
            error = np.sqrt((promised * (1 - promised)).sum()) / len(rows)
            assert abs(drawn[rows, vote].mean() - promised.mean()) < 4 * error + 1e-9


def test_identical_answers_mostly_tie(arena: SimulatedBattles) -> None:
    same = (arena.frame["response_a"] == arena.frame["response_b"]).to_numpy()
    assert same.mean() > 0.02
    np.testing.assert_allclose(arena.probabilities[same, 2], IDENTICAL_TIE)
    assert (votes(arena)[same] == 2).mean() > 0.88


# --- the world ------------------------------------------------------------------------------------


def test_right_and_wrong_facts_are_the_worlds(arena: SimulatedBattles) -> None:
    question = re.compile(rf"the ({'|'.join(WORLD['Pelago'])}) of (\w+)[?.]")
    checked = 0
    for side in (0, 1):
        for prompt, answer, qualities in single_turns(arena, side):
            if not (asked := question.search(prompt)):
                continue
            attribute, land = asked.groups()
            told = {facts[attribute] for facts in WORLD.values() if facts[attribute] in answer}
            if " and the " in prompt or len(told) != 1:  # two facts asked for, or none told
                continue
            assert qualities["correctness"] == (told == {WORLD[land][attribute]}), (prompt, answer)
            checked += 1
    assert checked > 1_000


def test_lists_are_judged_by_kind_and_number(arena: SimulatedBattles) -> None:
    request = re.compile(rf"({'|'.join(NUMBERS)}) ({'|'.join(CATEGORIES)})\.")
    kinds = {item: kind for kind, items in CATEGORIES.items() for item in items}
    checked = 0
    for side in (0, 1):
        for prompt, answer, qualities in single_turns(arena, side):
            asked = request.search(prompt)
            given = [word for word in re.findall(r"\w+", answer) if word in kinds]
            if not asked or not given:
                continue
            number, kind = asked.groups()
            assert qualities["correctness"] == (kinds[given[0]] == kind), (prompt, answer)
            assert qualities["completeness"] == (len(given) == NUMBERS[number]), (prompt, answer)
            checked += 1
    assert checked > 500


def test_a_foreign_language_is_met_or_missed(arena: SimulatedBattles) -> None:
    seen = set()
    for prompt, answer, qualities in single_turns(arena, 0):
        if "Russian" in prompt and answer and "sorry" not in answer:
            cyrillic = bool(re.search("[а-я]", answer))
            assert qualities["language"] == cyrillic, (prompt, answer)
            seen.add(cyrillic)
    assert seen == {True, False}


def test_the_rare_cases_are_there(arena: SimulatedBattles) -> None:
    frame = arena.frame
    assert 0.08 < (frame["prompt"].map(len) > 1).mean() < 0.16
    answers = joined(arena, "response_a") + joined(arena, "response_b")
    assert any(not answer for answer in answers)
    for script in ("[а-я]", "[首都王様]", "[üéø]", "😀"):
        assert any(re.search(script, answer) for answer in answers), script
    prompts = pd.Series(joined(arena, "prompt"))
    assert 0.05 < prompts.duplicated(keep=False).mean() < 0.6
    longest = max(map(len, prompts))
    assert longest > 500


# --- how hard it is -------------------------------------------------------------------------------


def closed(battles: SimulatedBattles, features: csr_matrix | np.ndarray) -> float:
    """Share of the gap between class prior and Bayes that a linear model closes, out of fold."""
    drawn = votes(battles)
    model = LogisticRegression(max_iter=500, C=0.3)
    probabilities = cross_val_predict(model, features, drawn, cv=5, method="predict_proba")
    prior = prior_log_loss(drawn)
    return (prior - log_loss(drawn, probabilities)) / (prior - bayes_log_loss(battles))


@pytest.fixture(scope="module")
def few() -> SimulatedBattles:
    return simulate(rows=2_000, seed=11, voters="arena")


def test_there_is_something_to_learn(arena: SimulatedBattles) -> None:
    assert prior_log_loss(votes(arena)) - bayes_log_loss(arena) >= 0.12


def test_length_helps_a_little(few: SimulatedBattles) -> None:
    lengths = [np.array([*map(len, joined(few, f"response_{side}"))]) for side in "ab"]
    difference = (np.log1p(lengths[0]) - np.log1p(lengths[1]))[:, None]
    assert 0.0 < closed(few, difference) < 0.15


def test_words_give_little_away(few: SimulatedBattles) -> None:
    answers = joined(few, "response_a"), joined(few, "response_b")
    vectorizer = TfidfVectorizer(token_pattern=r"\w+|[^\w\s]", ngram_range=(1, 2))
    vectorizer.fit(answers[0] + answers[1])
    difference = vectorizer.transform(answers[0]) - vectorizer.transform(answers[1])
    assert closed(few, difference) < 0.4
