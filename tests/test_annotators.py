"""Several annotators' rows of one battle become one battle with shares: by properties and from files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax
from test_training import Spy, spy, training_settings  # noqa: F401

from arena_distill.battles.annotators import hash_sides, merge_annotators
from arena_distill.battles.folds import assign_folds, write_folds
from arena_distill.battles.formats.graded import VOTES
from arena_distill.battles.parts import SCHEMA, read_parts
from arena_distill.battles.reading import read_battles, write_battles
from arena_distill.battles.row_counts import count_rows
from arena_distill.battles.simulation import simulate
from arena_distill.battles.votes import vote_columns, votes_of
from arena_distill.config.backbone import TINY
from arena_distill.config.data import Data
from arena_distill.config.encoding import Encoding
from arena_distill.config.phases.battles import BattlesSettings, FoldsSettings
from arena_distill.config.phases.encoding import TokensSettings
from arena_distill.config.phases.scoring import LogitsSettings
from arena_distill.config.phases.settings import VERSIONS
from arena_distill.config.source import Source
from arena_distill.config.training import Lora
from arena_distill.encoding.tokenization import tokenize_battles
from arena_distill.files.artifacts import read_json, read_parquet, write_parquet
from arena_distill.files.logits import read_logits
from arena_distill.runtime.launch import Launch
from arena_distill.scoring.logits import predict_logits
from arena_distill.training.trainer import train_fold
from arena_distill.verdicts import NO_VOTE, Votes, swap_classes

Row = dict[str, Any]
WORDS = ("model_a", "model_b", "tie")
ROWS = st.lists(
    st.tuples(
        st.integers(0, 3),  # which battle
        st.booleans(),  # whether its sides are exchanged
        st.sampled_from([0, 1, 2, NO_VOTE]),
        st.sampled_from([0.5, 1.0, 2.0]),
    ),
    min_size=1,
    max_size=24,
)


def battles_of(rows: list[tuple[int, bool, int, float]]) -> tuple[pa.Table, Votes]:
    """Battles 0 and 1 differ in one answer alone, 1 and 2 in one model, 2 and 3 in the prompt."""
    texts = [
        ("p", "x", "z", "n"),
        ("p", "x", "y", "n"),
        ("p", "x", "y", None),
        ("q", "x", "y", None),
    ]
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names[2:7]}
    for battle, exchanged, *_ in rows:
        prompt, *b = texts[battle]
        sides = [("x", "m"), (b[1], b[2])][:: -1 if exchanged else 1]
        columns["prompt"].append([prompt])
        for side, (answer, model) in zip("ab", sides, strict=True):
            columns[f"response_{side}"].append([answer])
            columns[f"model_{side}"].append(model)
    schema = pa.schema([SCHEMA.field(name) for name in columns])
    _, exchanged, labels, weights = map(np.array, zip(*rows, strict=True))
    probabilities = Votes.hard(labels).probabilities
    shown = np.where(exchanged[:, None], swap_classes(probabilities), probabilities)
    return pa.table(columns, schema=schema), Votes(shown, weights.astype(float))


def by_battle(rows: list[tuple[int, bool, int, float]]) -> dict[Any, Any]:
    """What is merged, by its texts and models as they stand."""
    table, votes = battles_of(rows)
    kept, merged = merge_annotators(hash_sides(table), votes)
    names = [json.dumps(row) for row in table.take(pa.array(kept)).to_pylist()]
    assert len(set(names)) == len(names)
    shares = zip(merged.probabilities.tolist(), merged.weights.tolist(), strict=True)
    return dict(zip(names, shares, strict=True))


@given(ROWS, st.randoms(use_true_random=False))
def test_the_order_of_rows_changes_nothing(rows: list[Any], random: Any) -> None:
    shuffled = random.sample(rows, len(rows))
    assert by_battle(shuffled).keys() == by_battle(rows).keys()
    for name, (shares, weight) in by_battle(rows).items():
        found_shares, found_weight = by_battle(shuffled)[name]
        assert found_shares == pytest.approx(shares)
        assert found_weight == pytest.approx(weight) or not any(shares)


@given(ROWS)
def test_merged_votes_are_the_means_of_one_hot_votes(rows: list[Any]) -> None:
    table, votes = battles_of(rows)
    kept, merged = merge_annotators(hash_sides(table), votes)
    assert sorted({rows[row][0] for row in kept}) == sorted({row[0] for row in rows})
    for row, shares, weight in zip(kept, merged.probabilities, merged.weights, strict=True):
        battle, exchanged, *_ = rows[row]
        cast = [(np.eye(3)[label], w) for b, _, label, w in rows if b == battle and label >= 0]
        if not cast:
            assert not shares.any()
            continue
        assert rows[row][2] != NO_VOTE, "a row with a vote stands for its battle"
        mean = sum(vote * w for vote, w in cast) / sum(w for _, w in cast)
        assert (swap_classes(shares) if exchanged else shares) == pytest.approx(mean)
        assert shares.sum() == pytest.approx(1)
        assert weight == pytest.approx(sum(w for _, w in cast))


@given(ROWS)
def test_merging_changes_no_loss(rows: list[Any]) -> None:
    """A judge that is the same in both orders has the same loss on all votes and on merged ones."""
    table, votes = battles_of(rows)
    kept, merged = merge_annotators(hash_sides(table), votes)
    said = np.random.default_rng(0).dirichlet(np.ones(3), 4)[[row[0] for row in rows]]
    exchanged = np.array([row[1] for row in rows])[:, None]
    loss = np.log(np.where(exchanged, swap_classes(said), said))
    before = (votes.weights * votes.cross_entropy(loss)).sum()
    after = (merged.weights * merged.cross_entropy(loss[kept])).sum()
    assert after == pytest.approx(before)


# --- files ----------------------------------------------------------------------------------------


def judged(judge: str, winner: str | None, *, turn: int = 1, exchanged: bool = False) -> Row:
    """A row in the schema of MT-Bench's human judgments."""

    def chat(*answers: str) -> list[Row]:
        turns = zip(("q", "r"), answers, strict=True)
        return [
            {"role": role, "content": text}
            for asked, answered in turns
            for role, text in (("user", asked), ("assistant", answered))
        ]

    sides = [("m", chat("x", "xx")), ("n", chat("y", "yy"))][:: -1 if exchanged else 1]
    return {
        "question_id": 81,
        **{f"model_{side}": model for side, (model, _) in zip("ab", sides, strict=True)},
        **{f"conversation_{side}": said for side, (_, said) in zip("ab", sides, strict=True)},
        "winner": winner,
        "judge": judge,
        "turn": turn,
    }


def source(folder: Path, *files: list[Row], **keys: Any) -> Source:
    for number, rows in enumerate(files):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{number}.jsonl").write_text(text)
    return Source(path=str(folder / "*.jsonl"), **keys)


def test_the_judges_of_mt_bench_become_shares(tmp_path: Path) -> None:
    first = [judged("expert_1", "model_a"), judged("expert_2", "tie"), judged("e", "tie", turn=2)]
    second = [judged("expert_3", "model_b", exchanged=True), judged("author_0", "model_b")]
    rows = (first, [*second, judged("author_1", "nobody")])
    battles, rejected = read_battles({"train": [source(tmp_path, *rows, annotators="merge")]})
    assert len(rejected) == 1
    order = np.argsort([len(turns) for turns in battles["prompt"].to_pylist()])
    battles = battles.take(pa.array(order))
    assert battles["prompt"].to_pylist() == [["q"], ["q", "r"]]
    one, later = votes_of(battles).probabilities
    assert later.tolist() == [0, 0, 1]
    of_m = 0 if battles["model_a"][0].as_py() == "m" else 1
    assert battles[f"response_{'ab'[of_m]}"][0].as_py() == ["x"]
    assert one[of_m] == pytest.approx(0.5) and one[[1 - of_m, 2]] == pytest.approx([0.25, 0.25])
    assert battles["weight"].to_pylist() == [4, 1]
    assert battles["id"][1].as_py() == "81-m-n-2", "a battle is not named by its judge"


def test_by_default_every_annotator_has_a_row(tmp_path: Path) -> None:
    rows = [judged("expert_1", "model_a"), judged("expert_2", "tie")]
    battles, _ = read_battles({"train": [source(tmp_path, rows)]})
    assert battles["id"].to_pylist() == ["81-m-n-1-expert_1", "81-m-n-1-expert_2"]
    assert battles["weight"].to_pylist() == [1, 1]


def test_sides_stay_as_in_the_file_where_no_row_has_them_exchanged(tmp_path: Path) -> None:
    for exchanged in (False, True):
        rows = [judged(name, "model_a", exchanged=exchanged) for name in "jk"]
        battles, _ = read_battles({"train": [source(tmp_path, rows, annotators="merge")]})
        assert battles["model_a"].to_pylist() == ["n" if exchanged else "m"]
        assert battles["vote"].to_pylist() == [[1, 0, 0]]


def test_rows_without_a_vote_join_those_with_one(tmp_path: Path) -> None:
    rows = [
        judged("j", None),
        judged("k", "tie"),
        judged("l", None, turn=2),
        judged("m", None, turn=2),
    ]
    given = source(tmp_path, rows, annotators="merge", missing_votes="keep")
    battles, _ = read_battles({"train": [given]})
    assert list(zip(battles["source"].to_pylist(), battles["id"].to_pylist(), strict=True)) == [
        ("train", "81-m-n-1"),
        ("unlabelled", "train-81-m-n-2"),
    ]


def test_rows_of_other_answers_that_share_an_id_are_still_refused(tmp_path: Path) -> None:
    bare = {"id": "1", "prompt": "p", "response_a": "x", "response_b": "y", "winner": "model_a"}
    rows = [bare, bare | {"winner": "tie"}, bare | {"response_b": "z"}]
    battles, rejected = read_battles({"train": [source(tmp_path, rows, annotators="merge")]})
    assert battles["vote"].to_pylist() == [[0.5, 0, 0.5]]
    (line,) = rejected.to_pylist()
    assert line["row"] == 3 and line["reason"].startswith("id is taken: 1")


def test_merged_rows_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [judged("j", "model_a"), judged("k", "model_b"), judged("l", "model_a")]
    given = source(tmp_path, rows, annotators="merge")
    counts = count_rows(read_parts({"train": [given]}))
    assert (counts["rows"], counts["refused"], counts["merged"], counts["battles"]) == (3, 0, 2, 1)
    assert counts["votes"] == {"A": {"kept": 1, "refused": 0}}
    settings = BattlesSettings(version=VERSIONS["battles"])
    names = [tmp_path / name for name in ("battles.parquet", "rejected.parquet", "reading.json")]
    write_battles({"train": [given]}, *names, settings)
    assert read_json(names[2])["sources"]["train"]["merged"] == 2
    assert "3 rows, 2 merged with another annotator's" in capsys.readouterr().out


def test_a_kind_of_vote_that_merging_outvotes_is_not_refused(tmp_path: Path) -> None:
    rows = [judged("j", "model_a"), judged("k", "tie"), judged("l", "model_a")]
    settings = BattlesSettings(version=VERSIONS["battles"])
    names = [tmp_path / name for name in ("battles.parquet", "rejected.parquet", "reading.json")]
    write_battles({"train": [source(tmp_path, rows, annotators="merge")]}, *names, settings)
    assert read_json(names[2])["sources"]["train"]["votes"] == {"A": {"kept": 1, "refused": 0}}


@pytest.mark.parametrize(
    ("ties", "vote", "weight"), [("drop", [0.5, 0.5], 2), ("half", [0.5, 0.5], 4)]
)
def test_of_two_classes_ties_are_what_the_run_says(
    tmp_path: Path, ties: Any, vote: list[float], weight: float
) -> None:
    said = ["model_a", "model_b", "tie", "tie"]
    rows = [judged(str(number), winner) for number, winner in enumerate(said)]
    battles, _ = read_battles({"train": [source(tmp_path, rows, annotators="merge")]}, ties)
    assert battles["vote"].to_pylist() == [vote]
    assert battles["weight"].to_pylist() == [weight]


def test_graded_votes_reach_the_training(
    tmp_path: Path,
    backbones: Callable[[str], Path],
    spy: Spy,  # noqa: F811
) -> None:
    """From a file with the grades of several annotators, by the functions of the phases."""
    grades = [(-3, -1), (2,), (0, 0, 3), (1, -2)] * 2
    rows = [
        {
            "context": f"q{number}", "response1": "x", "response2": "y", "overall_preference": said[0],
            "individual_preference": [{"score": grade} for grade in said],
        }
        for number, said in enumerate(grades)
    ]  # fmt: skip
    files = [tmp_path / name for name in ("battles", "rejected", "reading", "folds", "tokens")]
    given = {"train": [source(tmp_path, rows, annotators="merge")]}
    write_battles(given, *files[:3], BattlesSettings(version=1))
    write_folds(files[0], files[3], settings=FoldsSettings(version=1, n=2))
    llama = backbones("llama")
    tokenize_battles(files[0], llama, files[4], settings=TokensSettings(version=1))
    train_fold(
        llama, None, files[4], files[3], 0, tmp_path / "x", teachers={},
        settings=training_settings(swap=False), launch=Launch(),
    )  # fmt: skip
    folds = read_parquet(files[3]).to_pylist()
    ours = [int(row["id"][3:]) - 1 for row in folds if row["fold"] != 0]
    expected = [np.mean([VOTES[grade] for grade in grades[row]], axis=0) for row in ours]
    (examples,) = spy.examples
    np.testing.assert_allclose(examples.votes.probabilities, expected, atol=1e-6)
    assert examples.votes.weights.tolist() == [len(grades[row]) for row in ours]


@pytest.mark.slow
def test_a_judge_of_shares_beats_a_judge_of_the_most_frequent_vote(tmp_path: Path) -> None:
    """Five people vote on each battle of the arena; the score is expected, by the true probabilities."""
    arena, rng = simulate(rows=900, seed=1, voters="arena"), np.random.default_rng(1)
    drawn = rng.random((5, len(arena.frame), 1)) > arena.probabilities.cumsum(axis=1)[:, :2]
    battles = arena.frame[["prompt", "response_a", "response_b", "model_a", "model_b"]]
    rows = [
        {**row, "id": str(number), "winner": WORDS[vote]}
        for said in drawn.sum(axis=2).tolist()
        for number, (row, vote) in enumerate(zip(battles.to_dict("records"), said, strict=True))
    ]
    read, _ = read_battles({"train": [source(tmp_path, rows, annotators="merge")]})
    folds = assign_folds(read, method="stratified_group", n=3, seed=1)
    shares = votes_of(folds)
    assert shares.weights.min() == 5 and len(np.unique(shares.probabilities)) > 4
    even = rng.random((len(folds), 3)) / 1e3  # equal shares: neither class every time
    hard = Votes(np.eye(3)[(shares.probabilities + even).argmax(axis=1)], shares.weights)
    tokens, backbone = tmp_path / "tokens.parquet", TINY / "gemma2"
    write_parquet(read, tmp_path / "battles.parquet", {})
    tokenize_battles(
        tmp_path / "battles.parquet", backbone, tokens, settings=TokensSettings(version=1)
    )
    encoding = Encoding(max_length=256, template="markers", truncation="rounds")
    settings = training_settings(
        encoding=encoding, lora=Lora(r=16, alpha=32, dropout=0), lr=4e-3, batch_size=32,
        warmup_steps=10, swap=False,
    )  # fmt: skip
    scoring = LogitsSettings(version=1, encoding=encoding, precision="fp32", rows=("validation",))

    def loss_of_judge(votes: Votes, folder: Path) -> tuple[float, float]:
        """The log loss of a judge of these votes, and the least that there is, on fresh battles."""
        given = vote_columns(votes)
        table = folds.drop_columns([*given])
        for name, column in given.items():
            table = table.append_column(folds.schema.field(name), column)
        write_parquet(table.select(folds.column_names), tmp_path / "folds.parquet", {})
        about = tokens, tmp_path / "folds.parquet", 0
        train_fold(backbone, None, *about, folder, teachers={}, settings=settings, launch=Launch())
        output = folder / "fold_0.npy"
        predict_logits(backbone, folder, *about, output, settings=scoring, batch_tokens=8192)
        logits, ids = read_logits(output)
        true = arena.probabilities[np.array(ids["id"].to_pylist(), int)]
        said = log_softmax(logits.mean(axis=1), axis=1)
        return -(true * said).sum(axis=1).mean(), -(true * np.log(true)).sum(axis=1).mean()

    soft_loss, best = loss_of_judge(shares, tmp_path / "soft")
    hard_loss, _ = loss_of_judge(hard, tmp_path / "hard")
    print(f"log loss: of shares {soft_loss:.3f}, of hard votes {hard_loss:.3f}, least {best:.3f}")
    assert best < soft_loss < hard_loss - 0.02


def test_test_battles_are_not_merged() -> None:
    test = {"path": "t.csv", "annotators": "merge"}
    with pytest.raises(ValueError, match="annotators: merge, but every test battle needs"):
        Data(train=["a.csv"], test=[test])


def test_votes_are_written_as_shares_that_sum_to_one() -> None:
    table, votes = battles_of([(0, False, 0, 1.0)] * 2 + [(0, True, 1, 1.0)])
    _, merged = merge_annotators(hash_sides(table), votes)
    written = votes_of(pa.table(vote_columns(merged)))
    assert written.probabilities.sum() == pytest.approx(1)
    assert written.weights.tolist() == [3]
