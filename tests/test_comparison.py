"""One table of judges: what it says is what the evaluation says of each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from made_up_run import JUDGES, made_up_run

from arena_distill.comparison import compare
from arena_distill.config import Prediction
from arena_distill.settings import CompareSettings, Entry


@pytest.mark.parametrize("holdout", [0, 0.2])
def test_calibrated_judges_are_those_of_the_evaluation(holdout: float, tmp_path: Path) -> None:
    """With held-out battles as well, which are scored by nobody and lie between the others."""
    run = made_up_run(tmp_path, holdout=holdout)
    prediction = Prediction(calibration="style")
    entries = tuple(
        Entry(
            label=name, judge=name, folds=name, teachers=teachers, against=None, tested=False,
            prediction=prediction,
        )
        for name, teachers in JUDGES.items()
    )  # fmt: skip
    settings = CompareSettings(version=1, run="x", entries=entries, runs=(), resamples=100)
    compare(tmp_path, tmp_path / "compare.json", settings=settings, solution=None, truth=None)
    found = json.loads((tmp_path / "compare.json").read_text())["out_of_fold"]["judges"]
    known = json.loads(run.evaluate(test=False).read_text())["judges"]
    for name in JUDGES:
        assert found[name]["log_loss"] == pytest.approx(known[name]["oof"]["log_loss"])
        mended, expected = found[f"{name}, style"], known[name]["calibration"]["style"]
        assert mended["log_loss"] == pytest.approx(expected["log_loss"])
        assert mended["low"] < mended["log_loss"] < mended["high"]
    # What style tells without any judge: better than nothing, as the longer answer tends to win here.
    assert found["style alone"]["log_loss"] < found["class prior"]["log_loss"]
    assert found["small, style"]["log_loss"] < found["style alone"]["log_loss"]
