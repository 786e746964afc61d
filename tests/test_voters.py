"""What voters predict of each other, beside a judge: by hand, and leaving out voter after voter."""

from __future__ import annotations

import html
import io
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_run import made_up_run
from rich.console import Console

from arena_distill.battles.votes import vote_columns
from arena_distill.evaluation.ranking import RANKING_COLUMNS, describe_ranking, shown_ranking
from arena_distill.evaluation.report import render_report
from arena_distill.evaluation.terminal import print_table
from arena_distill.evaluation.voters import describe_voters, shown_voters, voter_scores
from arena_distill.files.artifacts import provenance, read_parquet, write_parquet
from arena_distill.metrics import losses, right_verdicts
from arena_distill.verdicts import Votes


def shares(counts: np.ndarray) -> Votes:
    """Votes as `annotators: merge` leaves them, through the float32 of the files."""
    number = counts.sum(axis=1)
    return Votes((counts / number[:, None]).astype(np.float32).astype(float), number.astype(float))


def slowly(counts: np.ndarray, judge: np.ndarray) -> dict[str, float]:
    """Means over voters, who are left out one by one."""
    met, loss, judged, judged_loss, agreed = [], [], [], [], []
    for battle, p in zip(counts, judge, strict=True):
        voters = np.repeat(np.arange(len(battle)), battle)
        for i, vote in enumerate(voters):
            others = np.bincount(np.delete(voters, i), minlength=len(battle))
            top = np.flatnonzero(others == others.max())
            met.append((vote in top) / len(top))
            loss.append(-math.log((others[vote] + 0.5) / (others.sum() + len(battle) / 2)))
            one = Votes.hard(np.array([vote]), len(battle))
            judged.append(float(right_verdicts(p[None], one)[0]))
            judged_loss.append(float(losses(p[None], one)[0]))
            agreed.append(np.mean(np.delete(voters, i) == vote))
    names = ("others met", "others loss", "judge met", "judge loss", "agreement")
    return dict(zip(names, map(np.mean, (met, loss, judged, judged_loss, agreed)), strict=True))


COUNTS = st.integers(2, 3).flatmap(
    lambda classes: st.lists(
        st.lists(st.integers(0, 4), min_size=classes, max_size=classes).filter(
            lambda c: sum(c) > 1
        ),
        min_size=1,
        max_size=6,
    )
)


@given(COUNTS, st.integers(0, 99))
@settings(max_examples=50)
def test_a_voter_is_predicted_by_the_others_and_by_the_judge(
    lists: list[list[int]], seed: int
) -> None:
    counts = np.array(lists)
    judge = np.random.default_rng(seed).dirichlet(np.ones(counts.shape[1]), len(counts))
    found = voter_scores(shares(counts), {"judge": judge}, np.arange(len(counts)))
    assert found is not None
    assert (found["battles"], found["voters"]) == (len(counts), counts.sum())
    told = {
        f"{who} {short}": found["scores"][who][kind]["value"]
        for who in ("others", "judge")
        for kind, short in (("accuracy", "met"), ("log_loss", "loss"))
    }
    assert told | {"agreement": found["agreement"]} == pytest.approx(
        slowly(counts, judge), abs=1e-6
    )


def test_three_voters_by_hand() -> None:
    votes, judge = shares(np.array([[2, 1, 0]])), np.array([[0.5, 0.3, 0.2]])
    found = voter_scores(votes, {"judge": judge}, np.zeros(1))
    assert found is not None
    # Who voted A sees A and B: half right. Who voted B sees two of A: wrong.
    assert found["scores"]["others"]["accuracy"]["value"] == pytest.approx((0.5 + 0.5 + 0) / 3)
    expected = -(2 * math.log(1.5 / 3.5) + math.log(0.5 / 3.5)) / 3
    assert found["scores"]["others"]["log_loss"]["value"] == pytest.approx(expected)
    assert found["scores"]["judge"]["accuracy"]["value"] == pytest.approx(2 / 3)
    assert found["agreement"] == pytest.approx(1 / 3)
    plain = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    assert found["entropy"] == pytest.approx(plain + 1 / 6)


def test_only_whole_votes_of_several_people_count() -> None:
    counts = np.array([[2.0, 1, 0], [1, 0, 0], [1.3, 0.7, 0]])
    judge = np.full((3, 3), 1 / 3)
    found = voter_scores(shares(counts), {"judge": judge}, np.arange(3))
    assert found == voter_scores(shares(counts[:1]), {"judge": judge[:1]}, np.arange(1))
    assert voter_scores(shares(counts[1:]), {"judge": judge[1:]}, np.arange(2)) is None


def test_a_run_shows_voters_and_the_ranking_of_models_beside_the_judge(tmp_path: Path) -> None:
    run = made_up_run(tmp_path)
    rng = np.random.default_rng(2)

    def change(name: str, columns: Callable[[int], dict[str, pa.Array]]) -> None:
        table = read_parquet(run.folder / f"{name}.parquet")
        for column, values in columns(len(table)).items():
            table = table.set_column(table.column_names.index(column), column, values)
        write_parquet(table, run.folder / f"{name}.parquet", provenance("edited", {}))

    def voted(rows: int) -> dict[str, pa.Array]:
        return vote_columns(shares(rng.multinomial(3, np.full(3, 1 / 3), rows)))

    def named(rows: int) -> dict[str, pa.Array]:
        names = np.array(["=m0", "m1", "m2", "m3", "m4", "m5"])[rng.integers(0, 6, (2, rows))]
        return {f"model_{side}": pa.array(one) for side, one in zip("ab", names, strict=True)}

    for name, columns in (("folds", voted), ("test_votes", voted), ("battles", named)):
        change(name, columns)
    merged = run.settings.model_copy(update={"merged": ("train",), "optimistic": ("small",)})
    metrics = json.loads(run.evaluate(settings=merged).read_text())
    assert metrics["test"]["voters"] is None, "a weight alone is no number of voters"
    found = shown_voters(metrics)
    assert found is not None
    assert found["voters"] == 3 * found["battles"] == 3 * metrics["rows"]
    judge = found["scores"]["judge"]
    assert judge["log_loss"]["value"] == pytest.approx(
        metrics["judges"]["small"]["oof"]["log_loss"]
    )
    assert metrics["test"]["ranking"] is None, "40 test battles are too few"
    ranking = metrics["ranking"]
    assert list(ranking["agreement"]) == ["judge", "length", "surface", "bayes"]
    flat = pd.read_csv(run.folder / "tables" / "ranking.csv")
    assert tuple(flat.columns) == RANKING_COLUMNS
    assert set(flat["battles"]) == {"out of fold"}
    assert flat["judge"].tolist() == [m["judge"] for m in ranking["models"]]
    told = [describe_voters(found), describe_ranking(shown_ranking(metrics))]
    assert told[1].endswith("(optimistic: its teachers learned these votes)")
    assert f"ρ {ranking['agreement']['judge']['spearman']['value']:.3f} (" in told[1]
    render_report(run.folder / "metrics.json", tmp_path / "report.html")
    page = html.unescape((tmp_path / "report.html").read_text())
    console = Console(width=80, record=True, file=io.StringIO())
    print_table(metrics, console)
    printed = " ".join(console.export_text().split())
    assert all(sentence in text for sentence in told for text in (page, printed))
