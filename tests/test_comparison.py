"""The comparison's table of judges has the figures of the evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import pytest
from made_up_run import JUDGES, made_up_run
from scipy.special import softmax
from sklearn.metrics import log_loss

from arena_distill.config.phases.studies import CompareSettings, Entry
from arena_distill.config.prediction import Prediction
from arena_distill.files.logits import read_logits
from arena_distill.studies.comparison import compare
from arena_distill.studies.comparison_report import gains, render_comparison


def settings_of(*tested: str, method: Literal["none", "style"] = "style") -> CompareSettings:
    entries = tuple(
        Entry(
            label=name, judge=name, folds=name, teachers=teachers, tested=name in tested,
            against="big" if teachers else None, prediction=Prediction(), calibration=method,
        )
        for name, teachers in JUDGES.items()
    )  # fmt: skip
    return CompareSettings(version=1, run="x", entries=entries, runs=(), resamples=100)


@pytest.mark.parametrize("holdout", [0, 0.2])
def test_calibrated_judges_are_those_of_the_evaluation(holdout: float, tmp_path: Path) -> None:
    """Also with held-out battles, which no judge scores and which lie between the others."""
    run = made_up_run(tmp_path, holdout=holdout)
    settings = settings_of()
    compare(tmp_path, tmp_path / "compare.json", settings=settings, test_votes=None, truth=None)
    found = json.loads((tmp_path / "compare.json").read_text())["out_of_fold"]["judges"]
    known = json.loads(run.evaluate(test=False).read_text())["judges"]
    for name in JUDGES:
        assert found[name]["log_loss"] == pytest.approx(known[name]["oof"]["log_loss"])
        calibrated, expected = found[f"{name}, style"], known[name]["calibration"]["style"]
        assert calibrated["log_loss"] == pytest.approx(expected["log_loss"])
        assert calibrated["low"] < calibrated["log_loss"] < calibrated["high"]
    # Style without a judge is better than nothing: the longer answer tends to win here.
    assert found["style alone"]["log_loss"] < found["class prior"]["log_loss"]
    assert found["small, style"]["log_loss"] < found["style alone"]["log_loss"]


def test_on_test_battles_a_judge_is_listed_raw_and_calibrated(tmp_path: Path) -> None:
    made_up_run(tmp_path)
    found = {}
    for method in ("none", "style"):
        compare(
            tmp_path,
            tmp_path / f"{method}.json",
            settings=settings_of("small", method=method),
            test_votes=tmp_path / "test_votes.parquet",
            truth=None,
        )
        found[method] = json.loads((tmp_path / f"{method}.json").read_text())
    logits, ids = read_logits(tmp_path / "logits/small/merged_test.npy")
    votes = pd.read_csv(tmp_path / "solution.csv", dtype={"id": str}).set_index("id")
    seen = softmax(logits.reshape(len(logits), -1, 3).mean(axis=1, dtype=np.float64), axis=1)
    expected = log_loss(votes.loc[ids["id"].to_pylist()].to_numpy().argmax(axis=1), seen)
    raw, calibrated = (found[method]["test"]["judges"] for method in ("none", "style"))
    assert raw["small"]["log_loss"] == calibrated["small"]["log_loss"] == pytest.approx(expected)
    assert calibrated["small, style"]["log_loss"] != calibrated["small"]["log_loss"]
    assert set(calibrated) - set(raw) == {"small, style", "style alone"}
    pairs = {(gain["label"], gain["against"], gain["part"]) for gain in gains(found["style"])}
    assert pairs == {
        ("small", "big", "out_of_fold"),
        ("small, style", "big, style", "out_of_fold"),
    }, "the teacher has no merged model"
    render_comparison(tmp_path / "style.json", tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert '<th scope="row">small, style</th><td class="text">big, style</td>' in page
    assert "A name that ends in <code>, style</code>" in page
    known = found["style"]
    known["entries"][1]["repeats"] = known["entries"][0]["label"]
    (tmp_path / "style.json").write_text(json.dumps(known))
    render_comparison(tmp_path / "style.json", tmp_path)
    assert "<td>2</td>" in (tmp_path / "report.html").read_text().split('id="trainings"')[1]
    assert "the luck of\nthe battles, not that of training (<code>compare.seeds</code>" in page
