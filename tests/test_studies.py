"""Judges derived for studies: which ones, what they share, and their comparisons."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import yaml
from checkouts import make_checkout
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_run import made_up_run

from arena_distill.battles.votes import votes_of
from arena_distill.config.derived import DerivedStudies, JudgeFamily, derive
from arena_distill.config.phases.scoring import LogitsSettings
from arena_distill.config.phases.studies import CompareSettings, CurveSettings
from arena_distill.config.phases.training import TrainingSettings
from arena_distill.config.run import Config, load
from arena_distill.deployment import fold_weights
from arena_distill.errors import InputError
from arena_distill.files.artifacts import read_parquet, write_json
from arena_distill.files.keys import key
from arena_distill.files.logits import read_logits
from arena_distill.layout import Layout
from arena_distill.metrics import bootstrap
from arena_distill.studies import comparison, comparison_report, learning_curves
from arena_distill.verdicts import Votes

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted(path.stem for path in (ROOT / "config" / "recipes").glob("*.yaml"))


def derived(**changes: Any) -> tuple[Config, DerivedStudies, Config]:
    raw = yaml.safe_load((ROOT / "config" / "config.yaml").read_text()) | changes
    config = load(raw)
    family = JudgeFamily(dict(config.judges))
    found = derive(config, raw, family)
    return config, found, config.with_judges(family.judges)


# --- which judges ---------------------------------------------------------------------------------


def test_every_recipe_is_compared_and_its_student_on_votes_alone() -> None:
    config, found, graph = derived(compare={"recipes": RECIPES})
    labels = [entry.label for entry in found.compared]
    for recipe in RECIPES:
        entry = found.compared[labels.index(recipe)]
        student = graph.judges[entry.judge]
        alone = graph.judges[found.compared[labels.index(entry.against)].judge]
        assert student.teachers
        assert alone == student.model_copy(update={"teachers": ()})
    assert not found.problem


def test_what_recipes_share_is_there_once() -> None:
    """The embedded default equals `summary`: no part of it is trained twice."""
    config, found, graph = derived(compare={"recipes": ["summary", "blackpearl"]})
    (summary,) = [entry for entry in found.compared if entry.label == "summary"]
    assert summary.judge == config.final
    assert not [name for name in graph.judges if name.endswith("teacher.summary")]
    (blackpearl,) = [entry for entry in found.compared if entry.label == "blackpearl"]
    for teacher in graph.judges[blackpearl.judge].teachers:
        assert teacher.endswith(".blackpearl"), "another template makes another teacher"
    seen = [TrainingSettings.of(graph, name).as_params() for name in graph.judges]
    backbones = [judge.backbone for judge in graph.judges.values()]
    starts = [graph.judges[name].pretraining for name in graph.judges]
    distinct = {(s, b, p) for s, b, p in zip(seen, backbones, starts, strict=True)}
    assert len(distinct) == len(graph.judges)


def test_a_studys_judges_change_nothing_for_the_runs_own() -> None:
    config, _, graph = derived()
    for name in config.judges:
        for settings_ in (TrainingSettings, LogitsSettings):
            assert settings_.of(config, name) == settings_.of(graph, name)
        assert config.pretraining_owner(name) == graph.pretraining_owner(name)


def test_seeds_repeat_every_entry() -> None:
    _, once, _ = derived()
    _, found, graph = derived(compare={"seeds": [7, 8]})
    tested = [entry for entry in once.compared if entry.tested]
    repeated = [entry for entry in found.compared if "seed" in entry.label]
    assert len(repeated) == 2 * len(tested)
    for entry in repeated:
        seed = graph.judges[entry.judge].training.seed
        assert entry.label.endswith(f"seed {seed}")
        assert entry.against is None or entry.against.endswith(f"seed {seed}")
        assert entry.label == f"{entry.repeats}, seed {seed}"


def test_a_seed_varies_the_student_or_all_that_made_it() -> None:
    recipe = {"recipes": ["summary"], "votes": False, "seeds": [7]}
    found = {}
    for vary in ("student", "all"):
        _, studies, graph = derived(compare=recipe | {"vary": vary})
        names = {entry.label: entry.judge for entry in studies.compared}
        found[vary] = [graph.judges[names[label]] for label in ("summary", "summary, seed 7")]
        for before, after in zip(*(judge.teachers for judge in found[vary]), strict=True):
            one, other = graph.judges[before], graph.judges[after]
            seeds = one.training.seed if vary == "student" else 7
            assert other == one.model_copy(
                update={
                    "training": one.training.model_copy(update={"seed": seeds}),
                    "pretraining": one.pretraining
                    and one.pretraining.model_copy(
                        update={"seed": 7 if vary == "all" else one.pretraining.seed}
                    ),
                }
            )
    for vary, (once, again) in found.items():
        assert (once.training.seed, again.training.seed) == (2025, 7)
        assert once.pretraining and again.pretraining
        assert again.pretraining.seed == (7 if vary == "all" else once.pretraining.seed)
        assert (again.teachers == once.teachers) == (vary == "student")


def test_a_variant_differs_in_its_keys_alone() -> None:
    _, found, graph = derived(
        compare={"recipes": ["summary"], "variants": {"hot": {"loss": {"temperature": 9}}}}
    )
    entries = {entry.label: entry for entry in found.compared}
    summary, hot = (graph.judges[entries[name].judge] for name in ("summary", "hot"))
    assert hot == summary.model_copy(
        update={"loss": summary.loss.model_copy(update={"temperature": 9.0})}
    )
    assert entries["hot"].against == entries["summary"].against == "summary, votes"


def test_the_runs_own_judges_are_in_the_table() -> None:
    config, found, _ = derived()
    shown = {entry.judge for entry in found.compared}
    assert set(config.judges) <= shown
    assert not {e.judge for e in found.compared if not e.tested} & {config.final}


def test_a_missing_recipe_is_an_error_only_when_it_is_needed() -> None:
    _, found, _ = derived(compare={"recipes": ["sumary"]})
    assert not found.compared
    assert "no recipe 'sumary'" in found.problem
    assert "blackpearl" in found.problem


def test_a_name_that_is_taken_is_refused() -> None:
    raw = yaml.safe_load((ROOT / "config" / "config.yaml").read_text())
    taken = {"llama-teacher.blackpearl": {"backbone": {"tiny": "llama"}, "training": {"lr": 1.0}}}
    raw["judges"] |= taken
    config = load(raw)
    assert "rename" in derive(config, raw, JudgeFamily(dict(config.judges))).problem


def test_curves_are_nested_shares_of_both_heads() -> None:
    _, found, graph = derived()
    assert len(found.curves) == 2
    for points in found.curves.values():
        shares = [graph.judges[judge].training.share for judge in points.values()]
        assert shares == sorted(shares) == list(points)
    heads = {graph.judges[next(iter(p.values()))].head.kind for p in found.curves.values()}
    assert heads == {"joint", "pointwise"}


def test_a_curve_has_the_final_judges_own_head() -> None:
    raw = yaml.safe_load((ROOT / "config" / "config.yaml").read_text())
    raw["judges"]["gemma2-student"]["head"] = {"kind": "pointwise", "pooling": "mean"}
    config, found, graph = derived(judges=raw["judges"])
    own = found.curves["gemma2-student.pointwise"][1]
    assert graph.judges[own].head == config.judges[config.final].head
    assert graph.judges[own].head.pooling == "mean"


def test_folds_drift_from_one_start_or_from_their_own() -> None:
    _, found, graph = derived()
    for start, points in found.averaging.items():
        for epochs, name in points.items():
            judge = graph.judges[name]
            assert judge.training.own_start == (start == "own")
            assert judge.training.epochs == epochs
            assert judge.pretraining is None
            assert not judge.teachers


def test_a_judge_with_an_optimistic_score_is_compared_uncalibrated() -> None:
    """A calibrated run can be compared with a recipe whose targets are out of fold."""
    _, found, graph = derived(
        compare={"recipes": ["summary", "blackpearl"]},
        prediction={"max_lengths": [128], "calibration": "vector"},
        folds={"holdout": 0.1},
        defaults={"targets": "in_sample"},
    )
    assert not found.problem
    methods = {
        e.label: (e.optimistic, e.calibration) for e in CompareSettings.of(graph, found).entries
    }
    assert methods["summary"] == (True, "none")
    assert methods["summary, votes"] == methods["blackpearl"] == (False, "vector")


def test_settings_of_the_comparison_survive_json() -> None:
    _, found, graph = derived()
    told = CompareSettings.of(graph, found)
    assert CompareSettings.model_validate_json(told.as_params()) == told


# --- through the workflow -------------------------------------------------------------------------


@pytest.mark.slow
def test_a_comparison_curves_and_averaging_from_one_command_each(tmp_path: Path) -> None:
    """Two variants, two points of each curve, one of each start: all files, and consistent figures."""
    checkout = make_checkout(tmp_path / "checkout")
    config = yaml.safe_load((checkout.folder / "mini.yaml").read_text())
    config["data"]["arena"] |= {"train": 80, "extra": 16, "ut": 0}
    config["defaults"] |= {"pretraining": None, "head": "pointwise"}
    config["compare"] = {"recipes": [], "resamples": 200}
    config["compare"]["variants"] = {
        "soup": {"merge": {"weights": "greedy"}},
        "fitted": {"loss": {"combine": "mean_probabilities", "weights": "fitted"}},
    }
    config["folds"]["choices"] = 0.1
    config["studies"] = {"curve_shares": [0.5, 1], "averaging_epochs": [0.5]}
    (checkout.folder / "mini.yaml").write_text(yaml.safe_dump(config))
    checkout.run("compare", "curves", "averaging")
    compared = json.loads((checkout.results / "compare/compare.json").read_text())
    labels = [entry["label"] for entry in compared["entries"]]
    assert {"soup", "soup, votes", "fitted", "llama-teacher"} <= set(labels)
    for part in ("out_of_fold", "test"):
        table = compared[part]
        p = {name: judge["log_loss"] for name, judge in table["judges"].items()}
        for row in table["differences"]:
            assert row["difference"] == pytest.approx(p[row["judge"]] - p[row["against"]])
            assert row["low"] <= row["high"]
        assert p["Bayes limit"] < p["class prior"]
    entries = {entry["label"]: entry for entry in compared["entries"]}
    for weights in entries["fitted"]["teacher_weights"]:
        assert sum(weights) == pytest.approx(1)
    assert entries["soup"]["judge"] != "gemma2-student", "merged in another way"
    assert not (checkout.results / "adapters" / entries["soup"]["judge"]).exists(), "trained once"
    position = compared["out_of_fold"]["judges"]["fitted"]["position"]
    assert position["flip_rate"] == position["total_variation"] == 0, "a pointwise judge has none"
    soup = checkout.results / "weights" / entries["soup"]["judge"] / "merged"
    merged = json.loads((soup / "merge.json").read_text())
    assert sum(merged["weights"]) == pytest.approx(1)
    page = (checkout.results / "compare/report.html").read_text()
    assert "Does distillation help?" in page
    curve = json.loads((checkout.results / "curves/curves.json").read_text())
    assert len(curve["points"]) == 4
    for small, whole in (curve["points"][:2], curve["points"][2:]):
        assert small["battles"] == pytest.approx(whole["battles"] / 2, abs=1)
    points = json.loads((checkout.results / "averaging/averaging.json").read_text())["points"]
    shared = [point["factors_gap"] for point in points if point["start"] == "shared"]
    apart = [point["factors_gap"] for point in points if point["start"] == "own"]
    assert max(shared) < min(apart)
    assert not checkout.would_run("compare", "curves", "averaging")


# --- the bootstrap --------------------------------------------------------------------------------


def test_an_interval_is_wider_where_battles_share_prompts() -> None:
    rng = np.random.default_rng(0)
    by_prompt = np.repeat(rng.normal(size=100), 20) + rng.normal(0, 0.1, 2000)
    prompts = np.repeat(np.arange(100), 20)
    votes = Votes.hard(np.zeros(2000, int))
    as_prompts = bootstrap(by_prompt[None], votes, prompts, resamples=1000).std()
    as_rows = bootstrap(by_prompt[None], votes, np.arange(2000), resamples=1000).std()
    assert as_prompts == pytest.approx(by_prompt.reshape(100, 20).mean(1).std() / 10, rel=0.1)
    assert as_prompts > 3 * as_rows


def test_differences_are_paired() -> None:
    """Two judges with the same errors differ by a constant: the interval has no width."""
    loss = np.random.default_rng(1).exponential(size=500)
    votes = Votes.hard(np.zeros(500, int))
    drawn = bootstrap(np.stack([loss, loss + 0.01]), votes, np.arange(500) // 3, resamples=300)
    np.testing.assert_allclose(drawn[:, 1] - drawn[:, 0], 0.01, atol=1e-12)
    assert drawn[:, 0].std() > 0.01


def test_an_interval_covers_the_mean_as_often_as_it_says() -> None:
    rng, covered, votes = np.random.default_rng(2), 0, Votes.hard(np.zeros(180, int))
    for trial in range(200):
        loss = np.repeat(rng.normal(size=60), 3)[None]
        low, high = np.quantile(
            bootstrap(loss, votes, np.arange(180) // 3, resamples=400, seed=trial), [0.025, 0.975]
        )
        covered += low <= 0 <= high
    assert 0.89 < covered / 200 < 0.98


def bootstrap_by_hand(
    values: np.ndarray, votes: Votes, groups: np.ndarray, resamples: int, seed: int = 0
) -> np.ndarray:
    """Whole prompts as often as they are drawn, a battle after the other: (resamples, judges)."""
    rng, prompts = np.random.default_rng(seed), np.unique(groups)
    draws = rng.multinomial(len(prompts), np.full(len(prompts), 1 / len(prompts)), resamples)
    means = []
    for times in draws:
        rows = np.concatenate(
            [np.tile(np.flatnonzero(groups == g), n) for g, n in zip(prompts, times, strict=True)]
        )
        means.append((votes.weights[rows] * values[:, rows]).sum(1) / votes.weights[rows].sum())
    return np.array(means)


def test_a_bootstrap_draws_prompts_by_its_seed_alike_for_all_judges() -> None:
    rng = np.random.default_rng(4)
    values, groups = rng.exponential(size=(3, 40)), rng.integers(10, 22, 40)
    votes = Votes(np.eye(3)[rng.integers(0, 3, 40)], rng.integers(1, 5, 40).astype(float))
    for seed in (0, 9):
        found = bootstrap(values, votes, groups, resamples=70, seed=seed)
        expected = bootstrap_by_hand(values, votes, groups, 70, seed)
        np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_a_difference_has_the_sign_of_its_interval() -> None:
    """The better judge's is negative: its loss minus the other's, in figure and interval."""
    rng = np.random.default_rng(6)
    labels, groups = rng.integers(0, 3, 90), np.arange(90) // 3
    votes = Votes.hard(labels)
    good = 0.5 * np.eye(3)[labels] + 0.5 * rng.dirichlet(np.ones(3), 90)
    p = {"good": good, "bad": np.full((90, 3), 1 / 3), "luck": rng.dirichlet(np.ones(3), 90)}
    settings = CompareSettings(version=1, run="x", entries=(), runs=(), resamples=100)
    rows = comparison._table(p, votes, groups, settings, None)["differences"]
    loss = np.stack([-np.log(each[np.arange(90), labels]) for each in p.values()])
    drawn = dict(zip(p, bootstrap_by_hand(loss, votes, groups, 100).T, strict=True))
    mean = dict(zip(p, loss.mean(1), strict=True))
    assert len(rows) == 6
    for row in rows:
        one, other = row["judge"], row["against"]
        low, high = np.quantile(drawn[one] - drawn[other], [0.025, 0.975])
        assert row["difference"] == pytest.approx(mean[one] - mean[other])
        assert (row["low"], row["high"]) == pytest.approx((low, high))
    assert rows[0]["high"] < 0 < rows[2]["low"]


def test_the_luck_of_training_is_the_spread_over_seeds() -> None:
    losses = {"s": 0.8, "s, seed 1": 0.9, "s, seed 2": 1.0, "v": 0.95, "v, seed 1": 0.95}
    losses |= {"v, seed 2": 1.25, "t": 0.7}
    entries = [
        {"label": label, "repeats": label[0] if "seed" in label else None, "calibration": "none"}
        | {"against": label.replace("s", "v", 1) if label[0] == "s" else None}
        for label in losses
    ]
    table = {
        "judges": {label: {"log_loss": loss} for label, loss in losses.items()},
        "differences": [
            {"judge": a, "against": b, "difference": losses[a] - losses[b], "low": 0, "high": 0}
            for a in losses
            for b in losses
            if a != b
        ],
    }
    figures = {"entries": entries, "out_of_fold": table, "test": None}
    student, votes = comparison_report.trainings(figures)
    assert (student["label"], student["part"], student["trainings"]) == ("s", "out_of_fold", 3)
    assert student["log_loss"] == pytest.approx({"mean": 0.9, "deviation": 0.1})
    gains = [-0.15, -0.05, -0.25]
    assert student["gain"] == pytest.approx({"mean": -0.15, "deviation": np.std(gains, ddof=1)})
    assert (votes["label"], votes["gain"]) == ("v", None)
    assert votes["log_loss"]["deviation"] == pytest.approx(np.std([0.95, 0.95, 1.25], ddof=1))


def test_the_intervals_of_a_curve_are_by_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made_up_run(tmp_path)
    files, folds = Layout(str(tmp_path)), read_parquet(tmp_path / "folds.parquet")
    for judge in ("big", "small"):
        for fold in range(2):
            metrics = Path(files.adapter(judge, fold)) / "metrics.json"
            write_json({"battles": 10 * (fold + 1)}, metrics)
    monkeypatch.setattr(learning_curves, "draw", lambda *_: "")
    asked = CurveSettings(version=1, curves={"c": {"0.5": "big", "1": "small"}}, folds=2)
    learning_curves.draw_curves(tmp_path, tmp_path / "curves", settings=asked, truth=None)
    points = json.loads((tmp_path / "curves/curves.json").read_text())["points"]
    rows = folds.filter(pc.is_in(folds["fold"], pa.array([0, 1], folds["fold"].type)))
    votes, groups = votes_of(rows), rows["group"].to_numpy()
    assert len(set(groups.tolist())) < len(groups)
    for point, judge in zip(points, ("big", "small"), strict=True):
        seen = {}
        for path in run.logits[judge][:2]:
            logits, ids = read_logits(path)
            seen |= dict(zip(key(ids).to_pylist(), logits.mean(1, dtype=np.float64), strict=True))
        z = np.array([seen[name] for name in key(rows).to_pylist()])
        loss = np.log(np.exp(z).sum(1)) - z[np.arange(len(z)), votes.labels]
        drawn = bootstrap_by_hand(loss[None], votes, groups, 2000)
        assert point["log_loss"] == pytest.approx(loss.mean(), rel=1e-5)
        expected = np.quantile(drawn, [0.025, 0.975])
        assert (point["low"], point["high"]) == pytest.approx(expected, rel=1e-5)
        assert (point["battles"], point["judge"]) == (15, judge)


# --- soups ----------------------------------------------------------------------------------------


def test_the_greedy_soup_takes_what_helps() -> None:
    # Models are numbers, the soup their mean, its loss the distance from 1.
    models = [0.0, 1.3, 0.8, 5.0]
    loss = {}

    def log_loss(some: list[int]) -> float:
        loss[tuple(some)] = abs(np.mean([models[k] for k in some]) - 1)
        return loss[tuple(some)]

    chosen = fold_weights.greedy(log_loss, len(models))
    assert chosen == [2, 1]
    assert loss[(2, 1)] < loss[(2,)] < loss[(2, 1, 0)]


@settings(max_examples=50)
@given(st.lists(st.floats(-3, 3), min_size=1, max_size=6), st.floats(-3, 3))
def test_the_greedy_soup_is_never_worse_than_its_best_fold(
    models: list[float], target: float
) -> None:
    def log_loss(some: list[int]) -> float:
        return float(abs(np.mean([models[k] for k in some]) - target))

    chosen = fold_weights.greedy(log_loss, len(models))
    assert log_loss(chosen) <= min(log_loss([k]) for k in range(len(models)))


def test_recipes_have_no_other_keys_than_a_comparison_reads() -> None:
    for recipe in RECIPES:
        text = yaml.safe_load((ROOT / "config" / "recipes" / f"{recipe}.yaml").read_text())
        assert set(text) <= {"folds", "defaults", "prediction"}


def test_greedy_needs_battles_for_choices() -> None:
    raw = yaml.safe_load((ROOT / "config" / "config.yaml").read_text())
    raw["defaults"]["merge"] = {"weights": "greedy"}
    with pytest.raises(InputError, match="folds.choices"):
        load(raw)
