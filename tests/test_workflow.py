"""The workflow as people use it: whole runs of Snakemake on a copy of the checkout.

One small run of every phase is made once; the tests look at its files, ask by dry run what a change
would rebuild, and feed it what is wrong.
"""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from checkouts import GPTQ, ROOT, Checkout, warm_python, write

from arena_distill.config.phases.settings import VERSIONS
from arena_distill.verdicts import WINNERS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.gptq,
    pytest.mark.skipif(not GPTQ.exists(), reason=f"no quantisation environment at {GPTQ}"),
]


@pytest.fixture
def checkout(finished: Checkout) -> Iterator[Checkout]:
    """The finished run, with files of the workflow that a test edits put back afterwards."""
    texts = {
        path: path.read_bytes()
        for name in (
            "mini.yaml",
            "rules/training.smk",
            "workflow/arena_distill/config/phases/settings.py",
        )
        for path in [finished.folder / name]
    }
    package = finished.folder / "workflow/arena_distill"
    texts |= {p: p.read_bytes() for p in package.rglob("*.py")}
    yield finished
    for path, content in texts.items():
        if path.read_bytes() != content:
            write(path, content)


# --- what a run leaves ------------------------------------------------------------------------------


def test_every_file_of_the_contract_is_there(finished: Checkout) -> None:
    results = finished.results
    for name in [
        "battles.parquet",
        "rejected.parquet",
        "reading.json",
        "folds.parquet",
        "counts.json",
        "test_votes.parquet",
        "audit.json",
        "tables/leaks.csv",
        "submission.csv",
        "metrics.json",
        "report.html",
        "config.yaml",
        "adapters/llama-teacher/pretrained/adapter_model.safetensors",
        "adapters/gemma2-student/fold_1/adapter_model.safetensors",
        "adapters/gemma2-student/fold_1/metrics.json",
        "adapters/gemma2-student/fold_1/history.parquet",
        "merged/gemma2-student/model.safetensors",
        "merged/gemma2-student/README.md",
        "merged/gemma2-student/judge.json",
        "gptq/gemma2-student/judge.json",
        "gptq/gemma2-student/drift.json",
        "predictions/gemma2-student/merged.parquet",
        "predictions/gemma2-student/gptq.parquet",
    ]:
        assert (results / name).is_file(), name


def test_nothing_is_pickled(finished: Checkout) -> None:
    kinds = {path.suffix for path in finished.results.rglob("*") if path.is_file()}
    assert not kinds & {".bin", ".pt", ".pth", ".pkl", ".pickle"}


def test_folds_logits_and_submission_fit_each_other(finished: Checkout) -> None:
    folds = pq.read_table(finished.results / "folds.parquet").to_pandas()
    for fold in (0, 1):
        path = finished.results / f"logits/llama-teacher/fold_{fold}.npy"
        logits = np.load(path, allow_pickle=False)
        ids = pq.read_table(path.with_suffix(".ids.parquet")).to_pandas()
        assert logits.dtype == np.float32
        assert logits.shape == (len(ids), 2, 3)
        held_out = folds[(folds.source == "train") & (folds.fold == fold)]
        assert set(ids[ids.validation].id) == set(held_out.id)
    with (finished.results / "submission.csv").open() as file:
        submitted = list(csv.DictReader(file))
    with (finished.results / "arena/test.csv").open() as file:
        assert [row["id"] for row in submitted] == [row["id"] for row in csv.DictReader(file)]
    shares = np.array([[float(v) for k, v in row.items() if k != "id"] for row in submitted])
    np.testing.assert_allclose(shares.sum(axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("model", ["merged", "gptq"])
def test_the_finished_judge_says_what_was_submitted(
    model: str, finished: Checkout, tmp_path: Path
) -> None:
    """On the command line of its environment: its vectors, and the test battles."""
    python = warm_python(GPTQ if model == "gptq" else sys.executable)
    judge = finished.results / model / "gemma2-student"
    battles = finished.results / "arena/test.csv"
    for words in (["verify", judge], ["predict", judge, battles, "-o", tmp_path / "out.parquet"]):
        done = subprocess.run(
            [python, "-m", "arena_distill", *map(str, words)],
            env=os.environ | {"PYTHONPATH": str(ROOT / "workflow")},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    table = pq.read_table(finished.results / f"predictions/gemma2-student/{model}.parquet")
    expected = table.filter(table["submitted"])
    found = pq.read_table(tmp_path / "out.parquet")
    assert found["id"].to_pylist() == expected["id"].to_pylist()
    for name in WINNERS:
        np.testing.assert_allclose(found[name], expected[name], atol=1e-6)


def test_the_figures_have_the_shape_others_read(finished: Checkout) -> None:
    metrics = json.loads((finished.results / "metrics.json").read_text())
    assert metrics["run"] == "mini"
    assert metrics["rows"] == 160
    for name in ("class_prior", "length", "surface", "bayes"):
        assert metrics["baselines"][name]["log_loss"] > 0
    student = metrics["judges"]["gemma2-student"]
    assert student["teachers"] == ["llama-teacher", "qwen2-teacher"]
    assert [fold["fold"] for fold in student["folds"]] == [0, 1]
    assert {"log_loss", "accuracy", "ece"} <= set(student["oof"])
    assert metrics["final"]["judge"] == "gemma2-student"
    assert metrics["final"]["variants"]
    assert {"kl", "flip_rate", "log_loss_change", "bytes", "bytes_before"} <= set(
        metrics["final"]["gptq"]
    )


# --- what a change rebuilds -------------------------------------------------------------------------

FINAL = {"predict_test": 1, "write_submission": 1, "evaluate": 1, "render_report": 1}
DEPLOYED = {"quantize_model": 1, "check_drift": 1, "score_test_gptq": 1, "finish_gptq": 1, **FINAL}
STUDENT = {
    "distill_student": 2,
    "merge_folds": 1,
    "score_test_merged": 1,
    "finish_merged": 1,
    **DEPLOYED,
    "predict_test": 2,  # of the merged and of the quantised model
}


def test_a_second_run_does_nothing(checkout: Checkout) -> None:
    assert "Nothing to be done" in checkout.run()


def test_other_gptq_bits_rebuild_from_quantisation_on(checkout: Checkout) -> None:
    checkout.edit("mini.yaml", "bits: 8", "bits: 4")
    assert checkout.would_run() == {**DEPLOYED, "write_config": 1}


def test_another_drift_bound_keeps_the_quantised_model(checkout: Checkout) -> None:
    checkout.edit("mini.yaml", "bits: 8", "bits: 8\n    max_kl: 0.5")
    jobs = checkout.would_run()
    assert "check_drift" in jobs
    assert "quantize_model" not in jobs


def test_a_teachers_lr_rebuilds_its_folds_and_every_student(checkout: Checkout) -> None:
    checkout.edit(
        "mini.yaml",
        "    backbone:\n      tiny: llama",
        "    backbone:\n      tiny: llama\n    training: {lr: 0.01}",
    )
    expected = {"train_teacher": 2, "predict_logits": 4, **STUDENT, "write_config": 1}
    assert checkout.would_run() == expected


def test_another_audit_is_another_report_and_nothing_else(checkout: Checkout) -> None:
    checkout.edit("mini.yaml", "final:", "audit: {threshold: 0.9}\nfinal:")
    expected = {"audit_leaks": 1, "evaluate": 1, "render_report": 1, "write_config": 1}
    assert checkout.would_run() == expected


def test_another_fold_seed_rebuilds_everything_after_the_folds(checkout: Checkout) -> None:
    checkout.edit("mini.yaml", "seed: 42", "seed: 43")
    expected = {
        "assign_folds": 1,
        "check_counts": 1,
        "audit_leaks": 1,
        "predict_surface": 1,
        "train_teacher": 4,
        "predict_logits": 6,
        **STUDENT,
    }
    assert checkout.would_run() == {**expected, "write_config": 1}


def test_threads_and_resources_rebuild_nothing(checkout: Checkout) -> None:
    checkout.edit(
        "mini.yaml", "mem_mb: 2000", "mem_mb: 3000\n    threads: 2\n    batch_tokens: 999"
    )
    checkout.edit("mini.yaml", "micro_batch_size: 16", "micro_batch_size: 4")
    assert checkout.would_run() == {}


def test_docstrings_and_the_look_of_rules_rebuild_nothing(checkout: Checkout) -> None:
    checkout.edit("workflow/arena_distill/training/trainer.py", '"""Train', '"""Now train')
    checkout.edit("rules/training.smk", "    message:\n", "    # a comment\n    message:\n")
    checkout.edit("rules/training.smk", " --folds {input.folds:q}", "  --folds  {input.folds:q}")
    assert checkout.would_run() == {}


def test_a_raised_version_rebuilds_that_phase_and_what_follows(checkout: Checkout) -> None:
    def edit(phase: str, before: int, after: int) -> None:
        path = "workflow/arena_distill/config/phases/settings.py"
        checkout.edit(path, f'"{phase}": {before}', f'"{phase}": {after}')

    distillation, submission = VERSIONS["distillation"], VERSIONS["submission"]
    edit("distillation", distillation, distillation + 1)
    assert checkout.would_run() == {**STUDENT, "predict_logits": 2}
    edit("submission", submission, submission + 1)
    edit("distillation", distillation + 1, distillation)
    assert checkout.would_run() == {"write_submission": 1}


def test_one_folds_logits_are_rebuilt_by_naming_their_file(checkout: Checkout) -> None:
    path = "results/mini/logits/qwen2-teacher/fold_1.npy"
    before = (checkout.folder / path).read_bytes()
    (checkout.folder / path).unlink()
    assert checkout.would_run(path) == {"predict_logits": 1}
    checkout.run(path)
    assert (checkout.folder / path).read_bytes() == before


def test_aggregate_targets(checkout: Checkout) -> None:
    targets = [
        "folds",
        "teachers",
        "logits",
        "students",
        "merged",
        "quantized",
        "submission",
        "report",
    ]
    assert set(checkout.would_run(*targets)) <= set(targets)


# --- what is wrong ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"- qwen2-teacher": ("- qwen3-teacher", "unknown judge 'qwen3-teacher'")},
        {
            "method: kfold": ("method: kfolds", "folds.method"),
            "    lr: 0.001": ("    lr: fast", "defaults.pretraining.lr"),
            "  seed: 42": ("  sed: 42", "did you mean 'seed'?"),
        },
    ],
)
def test_a_wrong_configuration_is_a_clear_line_for_each_mistake_and_touches_nothing(
    checkout: Checkout, wrong: dict[str, tuple[str, str]]
) -> None:
    stamps = {p: p.stat().st_mtime_ns for p in checkout.results.rglob("*") if p.is_file()}
    for old, (new, _) in wrong.items():
        checkout.edit("mini.yaml", old, new)
    done = checkout.snakemake("--cores", "1")
    assert done.returncode != 0
    for _, message in wrong.values():
        assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert stamps == {p: p.stat().st_mtime_ns for p in checkout.results.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("header", "row", "message"),
    [
        ("id,prompt,response_a,winner", "1,q,a,tie", "of no known format"),
        (
            "id,prompt,response_a,response_b,winner_model_a,winner_model_b,winner_tie",
            "1,q,a,b,1,1,0",
            "several winners",
        ),
    ],
)
def test_wrong_battles_are_one_clear_line(
    tmp_path: Path, checkout: Checkout, header: str, row: str, message: str
) -> None:
    (tmp_path / "train.csv").write_text(f"{header}\n{row}\n")
    (tmp_path / "test.csv").write_text("id,prompt,response_a,response_b\n1,q,a,b\n")
    config = yaml.safe_load((checkout.folder / "mini.yaml").read_text())
    config["data"] = {name: str(tmp_path / f"{name}.csv") for name in ("train", "test")}
    config["run"] = "wrong"
    (checkout.folder / "mini.yaml").write_text(yaml.safe_dump(config))
    done = checkout.snakemake("folds", "--cores", "1")
    assert done.returncode != 0
    assert re.search(rf"error: .*train\.csv.*{message}", done.stdout + done.stderr)
    assert "Traceback" not in done.stdout + done.stderr


def test_drift_past_the_bound_fails_the_graph_and_keeps_the_model(checkout: Checkout) -> None:
    checkout.edit("mini.yaml", "bits: 8", "bits: 8\n    max_kl: 1.0e-30")
    done = checkout.snakemake("--cores", "2")
    assert done.returncode != 0
    assert re.search(r"error: .*max_kl", done.stdout + done.stderr)
    assert (checkout.results / "weights/gemma2-student/gptq/drift.json").is_file()


def test_truncated_logits_are_told_and_made_again_once_deleted(checkout: Checkout) -> None:
    name = "results/mini/logits/llama-teacher/fold_0.npy"
    path = checkout.folder / name
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    done = checkout.snakemake("students", "--cores", "2")
    assert done.returncode != 0
    told = re.findall(r"error: .*", done.stdout + done.stderr)
    assert any("llama-teacher/fold_0.npy: damaged" in line and "delete it" in line for line in told)
    assert "Traceback" not in done.stdout + done.stderr
    path.unlink()
    checkout.run(name)
    assert path.read_bytes() == whole
