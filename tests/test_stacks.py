"""Stacks: what is combined, how it is weighted, and what a fold's weights never see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from made_up_run import LENGTHS, MadeUpRun, made_up_run
from test_config import lines, raw

from arena_distill.battles.folds import EVERY_FOLD
from arena_distill.battles.votes import votes_of
from arena_distill.config.derived import JudgeFamily, derive
from arena_distill.config.phases.evaluation import EvaluationSettings
from arena_distill.config.phases.prediction import StackedViewsSettings
from arena_distill.config.phases.scoring import LogitsSettings, StackedLogitsSettings, StackSettings
from arena_distill.config.phases.settings import Settings
from arena_distill.config.run import load
from arena_distill.errors import InputError
from arena_distill.files.artifacts import read_json, read_parquet, write_json
from arena_distill.files.keys import key, locate
from arena_distill.files.logits import read_logits
from arena_distill.files.probabilities import read_probabilities
from arena_distill.metrics import log_loss, mean_over_views, softmax
from arena_distill.prediction.stacked import combine_views
from arena_distill.scoring.stacks import (
    SURFACE,
    combine,
    combine_fold,
    cross_fit,
    describe,
    fit,
    fit_stack,
    worth,
)
from arena_distill.scoring.surface_trees import write_surface
from arena_distill.verdicts import Votes, swap_classes


def drawn(rows: int, noise: tuple[float, ...]) -> tuple[np.ndarray, Votes]:
    """Votes, and members that know their probabilities but for so much noise."""
    rng = np.random.default_rng(0)
    truth = rng.normal(0, 1.5, (rows, 3))
    label = (softmax(truth).cumsum(axis=1) < rng.random(rows)[:, None]).sum(axis=1).clip(max=2)
    members = truth[:, None] + rng.normal(0, 1, (rows, len(noise), 3)) * np.array(noise)[:, None]
    return members, Votes.hard(label)


# --- weights ----------------------------------------------------------------------------------------


def test_weights_are_a_share_each_and_better_members_have_more() -> None:
    members, votes = drawn(3000, (0.5, 1.5, 50.0))
    weights, temperature = fit(members, votes)
    assert weights.sum() == pytest.approx(1)
    assert (weights >= 0).all()
    assert weights[0] > weights[1] > weights[2]
    assert weights[2] < 0.01
    stacked = log_loss(softmax(combine(list(members.swapaxes(0, 1)), weights, temperature)), votes)
    assert stacked < min(log_loss(softmax(members[:, i]), votes) for i in range(3))


def test_the_temperature_is_that_of_members_that_are_too_sure() -> None:
    members, votes = drawn(4000, (0.0, 0.0))
    for hot in (1.0, 3.0):
        weights, temperature = fit(hot * members, votes)
        assert temperature == pytest.approx(hot, rel=0.1)
        np.testing.assert_allclose(weights, 0.5, atol=1e-3)  # they say the same


def test_exchanging_the_answers_exchanges_the_stack() -> None:
    members, votes = drawn(200, (0.5, 1.0))
    weights, temperature = fit(members, votes)
    swapped = Votes(swap_classes(votes.probabilities), votes.weights)
    again, same = fit(swap_classes(members), swapped)
    np.testing.assert_allclose(again, weights, atol=1e-4)
    assert same == pytest.approx(temperature, abs=1e-3)
    parts = list(members.swapaxes(0, 1))
    np.testing.assert_allclose(
        combine([swap_classes(part) for part in parts], weights, temperature),
        swap_classes(combine(parts, weights, temperature)),
    )


def test_a_member_of_weight_1_gives_its_logits_back() -> None:
    rng = np.random.default_rng(0)
    parts = [rng.normal(size=(5, 2, 3)).astype(np.float32) for _ in range(3)]
    np.testing.assert_array_equal(combine(parts, np.array([0.0, 1.0, 0.0])), parts[1])
    with pytest.raises(InputError, match=r"different shapes: \(2, 3\), \(2, 2\)"):
        combine([parts[0], parts[1][..., :2]], np.array([0.5, 0.5]))


def test_what_says_nothing_has_no_votes_to_fit_and_no_effect() -> None:
    members, votes = drawn(3000, (0.5,))
    nothing = np.zeros_like(members)
    weights, temperature = fit(np.concatenate([members, nothing], axis=1), votes)
    alone, same = fit(members, votes)
    assert weights[0] / temperature == pytest.approx(alone[0] / same, abs=0.01)
    weights, temperature = fit(members[:0], votes[np.arange(0)])
    assert (weights.tolist(), temperature) == ([1.0], 1.0)


def test_a_member_that_knows_its_own_fold_is_not_rewarded_there() -> None:
    """A member of noise that repeats the votes of fold 0 has more weight in the other folds alone."""
    members, votes = drawn(900, (0.5, 1.0))
    fold = np.arange(900) % 3
    members[:, 1] = np.random.default_rng(1).normal(size=(900, 3))
    _, honest = cross_fit(members, votes, fold, np.arange(900))
    members[fold == 0, 1] = 8 * votes.probabilities[fold == 0]
    _, leaked = cross_fit(members, votes, fold, np.arange(900))
    np.testing.assert_array_equal(leaked[0][0], honest[0][0])
    assert leaked[0][1] == honest[0][1]
    for number in (1, 2):
        assert leaked[number][0][1] > honest[number][0][1] + 0.1


def test_weights_of_a_fold_see_no_prompt_of_it() -> None:
    members, votes = drawn(400, (0.5, 1.0))
    fold, groups = np.arange(400) % 2, np.arange(400) // 4
    groups[200:] = np.arange(1000, 1200)  # half of the prompts are in both folds
    _, fitted = cross_fit(members, votes, fold, groups)
    alone = (fold == 1) & (np.arange(400) >= 200)
    expected = fit(members[alone], votes[alone])
    np.testing.assert_array_equal(fitted[0][0], expected[0])


def test_whether_a_stack_pays_is_said() -> None:
    """Two judges whose errors are independent are worth more than one; one and itself are not."""
    members, votes = drawn(2000, (1.5, 1.5))
    fold, prompts = np.arange(2000) % 4, np.arange(2000)
    for other, word in ((1, "pays"), (0, "does not pay")):
        found = worth({"a": members[:, 0], "b": members[:, other]}, votes, fold, prompts)
        told = describe({"judge": "e", **found})
        assert told.startswith(f"the stack e {word}: log loss {found['log_loss']:.4f} out of fold")
    assert found["versus_best"]["difference"] == pytest.approx(0, abs=1e-4)


# --- files ------------------------------------------------------------------------------------------


MEMBERS = ("big", "other-big")


def stacked(run: MadeUpRun, *, surface: bool = True) -> Path:
    """Write the stack of a made-up run's judges."""
    output = run.folder / "stacks/ensemble.json"
    fit_stack(
        {name: run.logits[name] for name in MEMBERS},
        run.folder / "folds.parquet",
        output,
        settings=StackSettings(version=1, judge="ensemble", members=MEMBERS, surface=surface),
        surface=run.folder / "surface.parquet" if surface else None,
    )
    return output


def fold_of(run: MadeUpRun, fold: int, **changes: Any) -> tuple[np.ndarray, pa.Table]:
    settings = StackedLogitsSettings(
        version=1, members=MEMBERS, surface=True, rows=("validation", "extra")
    ).model_copy(update=changes)  # fmt: skip
    output = run.folder / f"logits/ensemble/fold_{fold}.npy"
    combine_fold(
        [run.logits[name][fold] for name in settings.members],
        run.folder / "stacks/ensemble.json",
        run.folder / "folds.parquet",
        fold,
        output,
        settings=settings,
        battles=run.folder / "battles.parquet" if settings.surface else None,
    )
    return read_logits(output)


def members_of(run: MadeUpRun, fold: int, ids: pa.Table) -> list[np.ndarray]:
    """The logits of both judges, of these rows."""
    found = [read_logits(run.logits[name][fold]) for name in MEMBERS]
    return [logits[locate(key(ids), key(rows), "logits")] for logits, rows in found]


def test_a_fold_of_a_stack_is_a_fold_of_a_judge(tmp_path: Path) -> None:
    """Validation rows, and extra rows that students learn; by the fold's weights and trees."""
    run = made_up_run(tmp_path)
    surface = tmp_path / "surface.parquet"
    write_surface(
        tmp_path / "folds.parquet",
        tmp_path / "battles.parquet",
        surface,
        tmp_path / "surface.safetensors",
        settings=Settings(version=1),
    )
    path = stacked(run)
    figures = read_json(path)
    assert list(figures["members"]) == [*MEMBERS, SURFACE]
    for weight, member in zip((0.5, 0.3, 0.2), figures["members"].values(), strict=True):
        member["folds"][1] = weight
    figures["folds"][1] = 2.0
    write_json(figures, path)
    logits, ids = fold_of(run, 1)
    fold = run.folds["fold"].to_numpy()
    assert logits.dtype == np.float32
    assert logits.shape == (((fold == 1) | (fold == EVERY_FOLD)).sum(), 2, 3)
    big, other = members_of(run, 1, ids)
    trees = softmax((logits - 0.25 * big - 0.15 * other) / 0.1)
    np.testing.assert_allclose(trees[:, 0], trees[:, 1], atol=1e-5)
    mine = ids["validation"].to_numpy()
    expected = read_probabilities(surface, key(ids.filter(pa.array(mine))))
    np.testing.assert_allclose(trees[mine, 0], expected, atol=1e-5)
    assert np.ptp(trees[~mine, 0], axis=0).max() > 0.01, "of extra battles too"


def test_a_stack_is_scored_by_the_weights_of_other_folds(tmp_path: Path) -> None:
    run = made_up_run(tmp_path)
    figures = read_json(stacked(run, surface=False))
    total, folds = 0.0, read_parquet(tmp_path / "folds.parquet")
    for fold in range(3):
        logits, ids = fold_of(run, fold, surface=False)
        mine = np.flatnonzero(ids["validation"].to_numpy())
        votes = votes_of(folds)[locate(key(ids.take(mine)), key(folds), "folds")]
        total += log_loss(mean_over_views(logits[mine]), votes) * len(mine)
    assert figures["log_loss"] == pytest.approx(total / figures["rows"], abs=1e-6)
    best = {n: min(m["log_loss"], m["tempered"]) for n, m in figures["members"].items()}
    assert best[figures["best"]] == min(best.values())
    difference = figures["log_loss"] - best[figures["best"]]
    assert figures["versus_best"]["difference"] == pytest.approx(difference)


def test_files_of_other_members_or_folds_are_refused(tmp_path: Path) -> None:
    run = made_up_run(tmp_path)
    path = stacked(run, surface=False)
    with pytest.raises(InputError, match="not the stack of other-big, big"):
        fold_of(run, 0, surface=False, members=("other-big", "big"))
    figures = read_json(path)
    figures["provenance"]["made_from"]["folds"] = "other"
    write_json(figures, path)
    with pytest.raises(InputError, match="made from another folds"):
        fold_of(run, 0, surface=False)


@pytest.mark.parametrize("classes", [3, 2])
def test_final_predictions_are_combined_view_by_view(tmp_path: Path, classes: int) -> None:
    run = made_up_run(tmp_path, holdout=0.3, classes=classes)
    path = stacked(run)
    logits = [tmp_path / f"logits/small/{model}_held_out.npy" for model in ("merged", "gptq")]
    settings = StackedViewsSettings(version=1, members=MEMBERS, surface=True,
                                    max_lengths=LENGTHS, orders=("AB", "BA"))  # fmt: skip
    output = tmp_path / "logits/ensemble/merged_held_out.npy"
    combine_views(logits, path, output, settings=settings, surface=tmp_path / "surface.parquet")
    found, ids = read_logits(output)
    figures = read_json(path)
    shares = [member["weight"] / figures["temperature"] for member in figures["members"].values()]
    views = [read_logits(file) for file in logits]
    assert key(ids).equals(key(views[0][1]))
    trees = np.log(read_probabilities(tmp_path / "surface.parquet", key(ids)))[:, None, None]
    expected = shares[0] * views[0][0] + shares[1] * views[1][0] + shares[2] * trees
    np.testing.assert_allclose(found, expected, atol=1e-5)
    with pytest.raises(InputError, match="max_lengths"):
        combine_views(logits, path, output, surface=tmp_path / "surface.parquet",
                      settings=settings.model_copy(update={"max_lengths": (64,)}))  # fmt: skip


# --- configuration ----------------------------------------------------------------------------------


def with_stack(final: str = "s", **changes: Any) -> dict[str, Any]:
    """Two teachers, their stack, and its student."""
    judges = raw()["judges"]
    judges["e"] = {"stack": {"judges": ["l", "q"], "surface": True, **changes.pop("stack", {})}}
    judges["s"]["teachers"] = ["e"]
    return raw(judges=judges | changes, final=final)


def test_members_score_what_the_stack_s_students_learn() -> None:
    config = load(with_stack())
    assert config.students_of("l") == config.students_of("e") == ["s"]
    assert config.ordered().index("l") < config.ordered().index("e") < config.ordered().index("s")
    wanted = ("validation", "extra")
    assert StackedLogitsSettings.of(config, "e").rows == wanted
    assert LogitsSettings.of(config, "q").rows == wanted
    assert LogitsSettings.of(config, "s").rows == ("validation",)
    assert config.is_optimistic("s")
    assert not config.is_optimistic("e")
    assert load(with_stack(final="e")).deployed() == ["l", "q"]
    assert "e:\n    stack:\n      judges:" in config.described()
    names = {"encoding": {"privileged": ["model_a", "model_b"]}}
    config = load(with_stack(l={**raw()["judges"]["l"], **names}))
    assert EvaluationSettings.of(config).privileged == ("l", "e")
    (line,) = lines(with_stack("e", l={**raw()["judges"]["l"], **names}))
    assert line.startswith(
        "config: judges.l.encoding.privileged: the final judge must judge without"
    )


def test_a_recipe_s_stack_combines_its_judges() -> None:
    given = with_stack()
    config = load(given)
    derive(config, given, family := JudgeFamily(dict(config.judges)))
    found = family.judges["e.blackpearl"].stack
    assert found and found.judges == ("l.blackpearl", "q.blackpearl") and found.surface
    assert family.judges["s.blackpearl"].teachers == ("e.blackpearl",)
    studies = derive(config := load(with_stack("e")), given, JudgeFamily(dict(config.judges)))
    assert not studies.compared and studies.problem.startswith("e is a stack, which is not trained")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (with_stack(stack={"judges": ["l", "p"]}),
         "judges.e.stack.judges: unknown judge 'p'; known judges: l, q, s, e"),
        (with_stack(stack={"judges": ["l", "e"]}), "e → e: a judge cannot teach itself, or be a part"),
        (with_stack(stack={"judges": ["l", "s"]}), "a cycle of teachers, "),
        (with_stack(stack={"judges": ["l", "l"]}), "judges.e.stack.judges: l is named twice"),
        (with_stack(stack={"judges": ["l"], "surface": False}),
         "judges.e.stack: a single judge is no stack: name another one, or set surface: true"),
        (with_stack(e={"stack": {"judges": ["l", "q"]}, "training": {"lr": 1}}),
         "judges.e: a stack is not trained or run here: remove training"),
        (with_stack(e={"stack": {"judges": ["l", "q"]}, "backbone": {"tiny": "llama"}}),
         "judges.e: give `backbone` or `stack`, not both"),
        (with_stack(e={"stack": {"judges": ["l", "q"]}, "external": {"file": "x.csv"}}),
         "judges.e: give `stack` or `external`, not both"),
        (with_stack(e={"stack": {"judges": ["l", "q"]}, "teachers": ["l"]}),
         "judges.e: teachers: a stack learns from nobody: remove them"),
        (with_stack(s={"backbone": {"tiny": "llama"}, "teachers": ["l"]}, stack={"judges": ["q", "s"]}),
         "judges.e.stack.judges: s is optimistic out of fold, where weights are fitted: combine its"),
        (with_stack("e", **{name: {"backbone": {"tiny": "llama"}, "quantization": None} for name in "lq"}),
         "prediction.model: gptq, but judges.l.quantization is null"),
        (with_stack("e", l={"external": {"file": "x.csv"}}),
         "final: e combines l, which is external: it predicts no test battle"),
        (with_stack(s={"backbone": {"tiny": "llama"}, "teachers": ["e"], "loss": {"features": 1}}),
         "judges.s.loss.features: s and its teacher e have to be shown the same views of a battle, but "
         "differ in stack"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_stack_is_one_line(given: dict[str, Any], told: str) -> None:
    (line,) = lines(given)
    assert told in line
