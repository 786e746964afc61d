"""The figures of a run: by hand on a few rows, by properties on an invented run."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from made_up_run import FOLDS, JUDGES, SIZES, MadeUpRun, made_up_run
from rich.console import Console
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from arena_distill.battles.style_features import LENGTHS, style_features
from arena_distill.battles.votes import votes_of
from arena_distill.errors import InputError
from arena_distill.evaluation.baselines import class_prior, length_regression
from arena_distill.evaluation.contradictions import contradicted_votes
from arena_distill.evaluation.terminal import print_table
from arena_distill.files.artifacts import provenance, read_parquet, write_parquet
from arena_distill.files.keys import key
from arena_distill.files.logits import ids_path, read_logits, write_logits
from arena_distill.metrics import softmax
from arena_distill.prediction.calibration import METHODS
from arena_distill.verdicts import Votes

Edit = Callable[[np.ndarray, pa.Table], tuple[np.ndarray, pa.Table]]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> MadeUpRun:
    """A run that tests only read."""
    return made_up_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def metrics(whole_run: MadeUpRun) -> dict[str, Any]:
    return json.loads(whole_run.evaluate().read_text())


@pytest.fixture
def run(tmp_path: Path) -> MadeUpRun:
    """A run that tests may damage."""
    return made_up_run(tmp_path)


def rewrite(path: Path, edit: Edit) -> None:
    logits, ids = edit(*read_logits(path))
    write_logits(path, logits, ids, provenance("edited", {}))


# --- baselines ------------------------------------------------------------------------------------


def test_lengths_are_counted_in_characters_and_words() -> None:
    table = {"response_a": [["one two", "three"], []], "response_b": [["one"], ["a b"]]}
    features = style_features(pa.table(table))[:, :LENGTHS]
    assert features[:, 0].tolist() == [13 - 3, 0 - 3]
    assert features[:, 2].tolist() == [3 - 1, 0 - 2]


def test_the_class_prior_never_peeks_at_its_validation_fold(
    run: MadeUpRun, metrics: dict[str, Any]
) -> None:
    fold, label = run.folds["fold"].to_numpy(), votes_of(run.folds).labels
    for k, figures in enumerate(metrics["baselines"]["class_prior"]["folds"]):
        shares = np.bincount(label[fold != k], minlength=3) / (fold != k).sum()
        expected = -np.log(shares[label[fold == k]]).mean()
        assert figures["log_loss"] == pytest.approx(expected)


def test_the_length_regression_never_peeks_at_its_validation_fold(
    run: MadeUpRun, metrics: dict[str, Any]
) -> None:
    fold, label = run.folds["fold"].to_numpy(), votes_of(run.folds).labels
    # Folds list train and extra in the battles' order.
    features = style_features(run.battles.slice(0, len(run.folds)))[:, :LENGTHS]
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    model.fit(features[fold != 1], label[fold != 1])
    expected = log_loss(label[fold == 1], model.predict_proba(features[fold == 1]))
    assert metrics["baselines"]["length"]["folds"][1]["log_loss"] == pytest.approx(expected)


def test_a_vote_that_training_rows_lack_has_probability_zero() -> None:
    features = np.array([[0.0], [1.0], [2.0], [3.0]])
    votes = Votes.hard(np.array([0, 0, 2, 2]))
    assert (length_regression(features, votes, features)[:, 1] == 0).all()
    all_a = Votes.hard(np.zeros(4, int))
    assert (length_regression(features, all_a, features) == [1, 0, 0]).all()
    assert (class_prior(features, votes, features[:1]) == [[0.5, 0, 0.5]]).all()


# --- a run ----------------------------------------------------------------------------------------


def test_every_promised_figure_is_there(run: MadeUpRun, metrics: dict[str, Any]) -> None:
    assert metrics["run"] == "made-up"
    assert metrics["rows"] == SIZES["train"]
    assert metrics["battles"] == SIZES
    assert set(metrics["baselines"]) == {"class_prior", "length", "surface", "bayes"}
    assert list(metrics["judges"]) == list(JUDGES)
    for name, judge in metrics["judges"].items():
        assert judge["teachers"] == list(JUDGES[name])
        assert [set(f) for f in judge["folds"]] == [{"fold", "rows", "log_loss", "accuracy"}] * 3
        assert sum(f["rows"] for f in judge["folds"]) == judge["oof"]["rows"] == SIZES["train"]
        assert {"log_loss", "accuracy", "ece"} <= set(judge["oof"])
        assert list(judge["calibration"]) == list(METHODS)
        for figures in judge["calibration"].values():
            assert set(judge["oof"]) < set(figures)
            assert figures["rows"] == SIZES["train"]
            assert len(figures["parameters"]["scale"]) == 3
        assert list(judge["truth"]) == ["raw", *METHODS]
        assert set(judge["class_reliability"]) == {"model_a", "model_b", "tie"}
    final = metrics["final"]
    assert final["judge"] == "small"
    assert final["calibration"] is None
    assert set(final["variants"]) == set(metrics["test"]["models"]["gptq"])
    gptq = final["gptq"]
    drift = json.loads((run.folder / "drift.json").read_text())
    assert {name: gptq[name] for name in drift} == drift  # of training battles alone
    test = metrics["test"]
    assert test["rows"] == SIZES["test"]
    assert test["submitted"] == {"model": "gptq", "variant": "256+512/AB+BA"}
    after, before = (test["models"][m]["256+512/AB+BA"]["log_loss"] for m in ("gptq", "merged"))
    assert gptq["test"]["rows"] == SIZES["test"]
    assert gptq["test"]["log_loss_change"] == pytest.approx(after - before)
    assert 0 < gptq["test"]["kl"] < gptq["test"]["kl_max"]


def test_a_judge_is_scored_by_the_mean_of_both_orders_logits(
    run: MadeUpRun, metrics: dict[str, Any]
) -> None:
    train = run.folds.filter(pc.field("source") == "train").to_pylist()
    label_of = {row["id"]: row["vote"].index(1) for row in train}
    parts, votes = [], []
    for path in run.logits["big"]:
        logits, ids = read_logits(path)
        keep = ids["validation"].to_numpy()
        parts.append(logits[keep].astype(np.float64))
        votes += [label_of[i] for i in ids["id"].filter(ids["validation"]).to_pylist()]
    seen, label = np.concatenate(parts), np.array(votes)
    judge = metrics["judges"]["big"]
    expected = log_loss(label, softmax(seen.mean(axis=1)))
    assert judge["oof"]["log_loss"] == pytest.approx(expected)
    for i, order in enumerate(("AB", "BA")):
        expected = log_loss(label, softmax(seen[:, i]))
        assert judge["orders"][order]["log_loss"] == pytest.approx(expected)
    flips = (seen[:, 0].argmax(axis=1) != seen[:, 1].argmax(axis=1)).mean()
    assert judge["order_flip_rate"] == judge["position"]["flip_rate"] == pytest.approx(flips)
    orders = {order: judge["orders"][order]["log_loss"] for order in ("AB", "BA")}
    orders["both"] = judge["oof"]["log_loss"]
    assert judge["position"]["log_loss"] == pytest.approx(orders)


def test_what_an_overconfident_judge_gains_by_its_temperature(tmp_path: Path) -> None:
    run = made_up_run(tmp_path)
    for path in run.logits["big"]:
        rewrite(path, lambda logits, ids: (logits * 4, ids))
    big = json.loads(run.evaluate().read_text())["judges"]["big"]
    calibrated = big["calibration"]["temperature"]
    assert 3 < calibrated["parameters"]["temperature"] < 8
    assert calibrated["log_loss"] < big["oof"]["log_loss"] - 0.1
    assert calibrated["accuracy"] == big["oof"]["accuracy"]
    assert big["truth"]["temperature"]["kl"] < big["truth"]["raw"]["kl"] / 2


def test_a_judge_that_knows_the_truth_closes_the_gap(tmp_path: Path) -> None:
    noise = {"big": 0.0, "other-big": 0.5, "small": 3.0}
    metrics = json.loads(made_up_run(tmp_path, noise=noise).evaluate().read_text())
    judges = metrics["judges"]
    assert judges["big"]["gap_closed"] == pytest.approx(1, abs=1e-4)
    assert judges["big"]["order_flip_rate"] == 0
    assert judges["big"]["orders"]["AB"] == judges["big"]["orders"]["BA"]
    assert judges["big"]["position"]["total_variation"] == 0
    assert judges["big"]["position"]["first_place_preference"] == 0
    assert judges["big"]["truth"]["raw"]["kl"] == pytest.approx(0, abs=1e-9)
    assert judges["big"]["truth"]["raw"]["excess_log_loss"] == pytest.approx(0, abs=1e-6)
    errors = [judges[name]["truth"]["raw"]["mean_absolute_error"] for name in noise]
    assert errors == sorted(errors)
    assert judges["small"]["gap_closed"] < judges["other-big"]["gap_closed"]
    assert judges["big"]["versus_final"]["high"] < 0


def test_differences_to_the_final_judge_by_hand(
    whole_run: MadeUpRun, metrics: dict[str, Any]
) -> None:
    """Of both orders' mean logits on the same battles, with an interval by prompt."""
    folds = whole_run.folds
    rows = folds.filter(pc.greater_equal(folds["fold"], 0))
    labels, groups = votes_of(rows).labels, rows["group"].to_numpy()
    loss = {}
    for judge, paths in whole_run.logits.items():
        seen = {}
        for path in paths:
            logits, ids = read_logits(path)
            own = ids["validation"].to_numpy()
            names = key(ids.filter(ids["validation"])).to_pylist()
            seen |= dict(zip(names, logits[own].mean(1, dtype=np.float64), strict=True))
        z = np.array([seen[name] for name in key(rows).to_pylist()])
        loss[judge] = np.log(np.exp(z).sum(1)) - z[np.arange(len(z)), labels]
    for judge, values in loss.items():
        apart = values - loss["small"]
        sums = np.array([(apart - apart.mean())[groups == g].sum() for g in np.unique(groups)])
        half = 1.96 * np.sqrt((sums**2).sum() * len(sums) / (len(sums) - 1)) / len(apart)
        found = metrics["judges"][judge]["versus_final"]
        mean = apart.mean()
        expected = {"difference": mean, "low": mean - half, "high": mean + half}
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-9)
    assert metrics["judges"]["big"]["versus_final"]["difference"] != 0


def test_the_order_of_rows_in_files_changes_nothing(
    run: MadeUpRun, metrics: dict[str, Any]
) -> None:
    rng = np.random.default_rng(1)

    def shuffled(logits: np.ndarray, ids: pa.Table) -> tuple[np.ndarray, pa.Table]:
        order = rng.permutation(len(ids))
        return logits[order], ids.take(pa.array(order))

    for paths in run.logits.values():
        for path in paths:
            rewrite(path, shuffled)
    for name in ("battles", "truth", "merged", "gptq"):
        table = read_parquet(run.folder / f"{name}.parquet")
        table = table.take(pa.array(rng.permutation(len(table))))
        write_parquet(table, run.folder / f"{name}.parquet", provenance("edited", {}))
    found = json.loads(run.evaluate().read_text())
    for part in ("baselines", "judges", "final"):
        assert flat(found[part]) == pytest.approx(flat(metrics[part]))


def flat(figures: Any, path: str = "") -> dict[str, Any]:
    """The leaves of nested figures, by path."""
    if not isinstance(figures, dict | list):
        return {path: figures}
    items = figures.items() if isinstance(figures, dict) else enumerate(figures)
    return {k: v for name, part in items for k, v in flat(part, f"{path}.{name}").items()}


def test_extra_and_training_rows_of_a_file_are_not_scored(
    run: MadeUpRun, metrics: dict[str, Any]
) -> None:
    def ruined(logits: np.ndarray, ids: pa.Table) -> tuple[np.ndarray, pa.Table]:
        logits[~ids["validation"].to_numpy()] = 99
        return logits, ids

    for path in run.logits["big"]:
        rewrite(path, ruined)
    assert json.loads(run.evaluate().read_text())["judges"]["big"] == metrics["judges"]["big"]


def test_ids_that_sources_share_do_not_mix(whole_run: MadeUpRun, metrics: dict[str, Any]) -> None:
    # The first battle of train and the last of test have the same id: see made_up_run.
    ids = whole_run.battles["id"]
    assert ids[0] == ids[-1]
    assert metrics["test"]["rows"] == SIZES["test"]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        # A distributed sampler fills its last batch with rows it had already.
        (lambda x, ids: (np.concatenate([x, x[:9]]), pa.concat_tables([ids, ids[:9]])), "once"),
        (lambda x, ids: (x[9:], ids[9:]), "missing"),
        (lambda x, ids: (x, all_validate(ids)), "not of fold 0"),
        (lambda x, ids: (x, ids.drop_columns("validation")), "no column validation"),
        (lambda x, ids: (x[:, :1], ids), r"\(1, 3\)"),
    ],
)
def test_logits_of_wrong_rows_are_refused(run: MadeUpRun, edit: Edit, message: str) -> None:
    path = run.logits["small"][0]
    rewrite(path, edit)
    with pytest.raises(InputError, match=message) as error:
        run.evaluate()
    assert str(ids_path(path)) in str(error.value) or str(path) in str(error.value)


def all_validate(ids: pa.Table) -> pa.Table:
    flags = pa.array(np.ones(len(ids), bool))
    return ids.set_column(ids.column_names.index("validation"), "validation", flags)


def test_every_fold_of_every_judge_must_be_there(run: MadeUpRun) -> None:
    run.logits["big"][1].unlink()
    with pytest.raises(InputError, match=r"judge big: logits of the folds \[0, 1, 2\] expected"):
        run.evaluate()


@pytest.mark.parametrize("name", ["battles", "truth"])
def test_rows_missing_in_a_table_are_refused(run: MadeUpRun, name: str) -> None:
    path = run.folder / f"{name}.parquet"
    write_parquet(read_parquet(path).slice(1), path, provenance("edited", {}))
    with pytest.raises(InputError, match=rf"{name}\.parquet: 1 of \d+ rows are missing"):
        run.evaluate()


@pytest.mark.parametrize("name", ["battles", "truth", "folds"])
def test_rows_twice_in_a_table_are_refused(run: MadeUpRun, name: str) -> None:
    path = run.folder / f"{name}.parquet"
    table = read_parquet(path)
    write_parquet(pa.concat_tables([table, table[:1]]), path, provenance("edited", {}))
    with pytest.raises(InputError, match=rf"{name}\.parquet: train:\d+ is there more than once"):
        run.evaluate()


def test_without_test_votes_truth_and_quantisation_the_rest_is_there(run: MadeUpRun) -> None:
    metrics = json.loads(run.evaluate(test=False, rejected=None).read_text())
    assert metrics["test"] is metrics["baselines"]["bayes"] is metrics["final"]["gptq"] is None
    assert metrics["final"]["variants"] == {}
    assert metrics["rejected"] == []
    assert all(judge["gap_closed"] is None for judge in metrics["judges"].values())
    assert all(judge["truth"] is None for judge in metrics["judges"].values())
    assert (run.folder / "tables" / "variants.csv").read_text().startswith("model,variant,rows")


def test_refused_rows_are_counted_by_kind_of_reason(metrics: dict[str, Any]) -> None:
    counts = {(r["source"], r["column"], r["reason"]): r["rows"] for r in metrics["rejected"]}
    assert counts == {
        ("train", "prompt", "starts with [ but is not a JSON list"): 2,
        ("train", "id", "id is taken by another row"): 1,
        ("extra", None, "not a battle"): 1,
    }


def test_the_flat_tables_hold_the_same_figures(
    whole_run: MadeUpRun, metrics: dict[str, Any]
) -> None:
    judges = pd.read_csv(whole_run.folder / "tables" / "judges.csv", dtype={"fold": str})
    assert len(judges) == (len(JUDGES) + 4) * (FOLDS + 1)
    small = judges[(judges["name"] == "small") & (judges["fold"] == "all")]
    assert small["log_loss"].item() == metrics["judges"]["small"]["oof"]["log_loss"]
    variants = pd.read_csv(whole_run.folder / "tables" / "variants.csv")
    assert len(variants) == 18
    assert variants.loc[variants["submitted"], "model"].tolist() == ["gptq"]


def test_the_submitted_judge_is_compared_with_the_truth_of_the_test_battles(
    whole_run: MadeUpRun, metrics: dict[str, Any]
) -> None:
    test = metrics["test"]
    excess = test["score"]["log_loss"]["value"] - test["baselines"]["bayes"]["log_loss"]
    assert test["truth"]["excess_log_loss"] == pytest.approx(excess)
    assert 0 < test["truth"]["kl"] < 1


def test_votes_that_both_teachers_contradict_are_listed(
    whole_run: MadeUpRun, metrics: dict[str, Any]
) -> None:
    found = metrics["contradictions"]
    assert found["teachers"] == ["big", "other-big"]
    table = read_parquet(whole_run.folder / "tables" / "contradicted.parquet")
    rows = whole_run.folds.filter(pc.greater_equal(whole_run.folds["fold"], 0))
    votes, keys = votes_of(rows), key(rows).to_pylist()
    said = []
    for judge in found["teachers"]:
        read = [read_logits(path) for path in whole_run.logits[judge]]
        p = {
            k: softmax(logits.mean(axis=0))
            for z, ids in read
            for k, logits, mine in zip(
                key(ids).to_pylist(), z, ids["validation"].to_pylist(), strict=True
            )
            if mine
        }
        said.append(
            [float((p[k] * v).sum()) for k, v in zip(keys, votes.probabilities, strict=True)]
        )
    most = np.max(said, axis=0)
    expected = [keys[i] for i in np.argsort(most, kind="stable") if most[i] < 0.1]
    assert expected
    assert key(table).to_pylist() == expected
    assert found["battles"] == len(expected) == sum(found["votes"].values())
    assert table["p_big"].to_pylist() == pytest.approx([said[0][keys.index(k)] for k in expected])
    assert found["worst"] == table.slice(0, 10).to_pylist()
    assert {line["model"]: line["battles"] for line in found["models"]} == {
        "x": len(expected), "y": len(expected)
    }  # fmt: skip


def test_contradictions_by_chance_are_the_expected_ones() -> None:
    rng = np.random.default_rng(1)
    truth = rng.dirichlet(np.full(3, 0.5), 20_000)
    labels = (truth.cumsum(axis=1) < rng.random((len(truth), 1))).sum(axis=1).clip(max=2)
    names = {n: pa.array(["m"] * len(truth)) for n in ("id", "source", "model_a", "model_b")}
    battles = pa.table({**names, "fold": np.zeros(len(truth), int)})
    _, found = contradicted_votes(battles, {"it": truth, "too": truth}, Votes.hard(labels), 0.1)
    assert found["battles"] == pytest.approx(found["expected"], rel=0.1)
    noisy = Votes.hard(
        np.where(rng.random(len(truth)) < 0.2, rng.integers(0, 3, len(truth)), labels)
    )
    _, found = contradicted_votes(battles, {"it": truth, "too": truth}, noisy, 0.1)
    assert found["battles"] > 2.5 * found["expected"]


def test_the_printed_table_fits_a_terminal_and_names_everyone(metrics: dict[str, Any]) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    print_table(metrics, console)
    text = console.export_text()
    for name in (
        *JUDGES,
        "class_prior",
        "length",
        "surface",
        "bayes",
        "256+512/AB+BA",
        "GPTQ of small",
    ):
        assert name in text
    assert f"{metrics['judges']['small']['oof']['log_loss']:.4f}" in text
    assert max(map(len, text.splitlines())) <= 80
