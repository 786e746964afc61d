"""The report: complete, offline, with the figures of `metrics.json`, also in a real browser."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pyarrow as pa
import pytest
from checkouts import ROOT
from made_up_run import FOLDS, JUDGES, LENGTHS, MadeUpRun, made_up_run

from arena_distill.battles.audit import write_audit
from arena_distill.battles.votes import votes_of
from arena_distill.config.phases.battles import AuditSettings
from arena_distill.config.phases.prediction import PredictionSettings
from arena_distill.errors import InputError
from arena_distill.evaluation.drawings import FIGURES, percent
from arena_distill.evaluation.report import TABLES, render_report, signed
from arena_distill.files.artifacts import write_json, write_parquet
from arena_distill.files.keys import key, locate
from arena_distill.files.logits import read_logits
from arena_distill.metrics import mean_over_views
from arena_distill.prediction.calibration import METHODS, all_scores
from arena_distill.prediction.test_time import predict_test

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> MadeUpRun:
    run = made_up_run(tmp_path_factory.mktemp("run"))
    (run.folder / "config.yaml").write_text("run: <made-up>\n")
    audit = run.folder / "audit.json"
    write_audit(
        *(run.folder / f"{name}.parquet" for name in ("battles", "folds")),
        audit,
        run.folder / "leaks.csv",
        settings=AuditSettings(version=1),
    )
    render_report(
        run.evaluate(audit=audit),
        run.folder / "report.html",
        configuration=run.folder / "config.yaml",
    )
    return run


@pytest.fixture(scope="module")
def page(run: MadeUpRun) -> str:
    return (run.folder / "report.html").read_text()


@pytest.fixture(scope="module")
def metrics(run: MadeUpRun) -> dict[str, Any]:
    return json.loads((run.folder / "metrics.json").read_text())


class Page(HTMLParser):
    """Tags, ids and URLs of a page, and the cells of its tables by caption."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self._rows: list[list[str]] = []
        self._caption = ""
        self._within: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self._rows, self._caption = [], ""
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")
        self._within = tag if tag in ("td", "th", "caption") else self._within

    def handle_endtag(self, tag: str) -> None:
        if tag == self._within:
            self._within = None
        if tag == "table":
            self.tables[" ".join(self._caption.split())] = self._rows

    def handle_data(self, data: str) -> None:
        if self._within == "caption":
            self._caption += data
        elif self._within:
            self._rows[-1][-1] += data


def table(page: str, caption: str) -> list[list[str]]:
    """The rows of the table whose caption starts with a text, header first."""
    return next(rows for name, rows in Page(page).tables.items() if name.startswith(caption))


def test_the_table_of_judges_has_the_figures(page: str, metrics: dict[str, Any]) -> None:
    header, *rows = table(page, "Log loss by fold")
    assert len(header) == 2 + FOLDS + 4
    names = ["class prior", "length regression", "surface trees", *JUDGES, "Bayes limit"]
    assert [row[0] for row in rows] == names
    small = metrics["judges"]["small"]
    row = rows[names.index("small")]
    assert row[1] == "big, other-big"
    assert row[2] == f"{small['folds'][0]['log_loss']:.3f}"
    oof = small["oof"]
    shown = [f"{oof['log_loss']:.4f}", percent(oof["accuracy"]), f"{oof['ece']:.3f}"]
    assert row[-4:] == [*shown, percent(small["gap_closed"], 0)]


def test_every_variant_of_both_models_is_shown(page: str, metrics: dict[str, Any]) -> None:
    _, *rows = table(page, "Log loss and accuracy on")
    cells = {row[0]: row[1:] for row in rows}
    for variant, figures in metrics["final"]["variants"].items():
        assert cells[variant][2:] == [f"{figures['log_loss']:.4f}", percent(figures["accuracy"])]
    assert cells["class prior"][0] == cells["class prior"][2]


def test_calibration_and_position_are_shown_for_every_judge(
    page: str, metrics: dict[str, Any]
) -> None:
    small = metrics["judges"]["small"]
    both = [small["calibration"][method] for method in METHODS]
    position = small["position"]
    by_caption = {
        "Changes when": [
            percent(position["flip_rate"]),
            f"{position['total_variation']:.4f}",
            f"{signed(100 * position['first_place_preference'], 1)}\u202f%",
            *(f"{position['log_loss'][order]:.4f}" for order in ("AB", "BA", "both")),
        ],
        "Log loss and calibration error": [
            f"{both[0]['parameters']['temperature']:.3f}",
            *(f"{figures['log_loss']:.4f}" for figures in (small["oof"], *both)),
            *(f"{figures['ece']:.3f}" for figures in (small["oof"], *both)),
        ],
        "Distance from the true": [
            *(f"{figures['kl']:.4f}" for figures in small["truth"].values()),
            *(f"{figures['mean_absolute_error']:.4f}" for figures in small["truth"].values()),
            f"{small['truth']['raw']['excess_log_loss']:.4f}",
        ],
    }
    for caption, expected in by_caption.items():
        header, *rows = table(page, caption)
        assert [row[0] for row in rows] == list(JUDGES)
        assert rows[-1][1:] == expected
        assert len(header) == len(rows[-1])
    assert [row[0] for row in table(page, "All measures of small")[1:]] == [
        "uncalibrated", *METHODS,
    ]  # fmt: skip
    assert "prediction.calibration" in page


def test_students_with_optimistic_scores_are_named(
    run: MadeUpRun, page: str, tmp_path: Path
) -> None:
    assert "is optimistic" not in page
    metrics = json.loads((run.folder / "metrics.json").read_text())
    metrics["judges"]["small"]["optimistic"] = True
    write_json(metrics, tmp_path / "metrics.json")
    render_report(tmp_path / "metrics.json", tmp_path / "report.html")
    shown = " ".join((tmp_path / "report.html").read_text().split())
    assert "Out of fold, small is optimistic" in shown


def test_a_calibrated_run_says_how(run: MadeUpRun, tmp_path: Path) -> None:
    metrics = json.loads((run.folder / "metrics.json").read_text())
    metrics["final"]["calibration"] = "vector"
    write_json(metrics, tmp_path / "metrics.json")
    render_report(tmp_path / "metrics.json", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "calibrated: vector scaling" in page
    drawing = (tmp_path / "report" / "reliability_folds.svg").read_text()
    assert ">vector<" in drawing
    assert ">temperature<" not in drawing


def test_reliability_is_of_the_deployed_model_and_says_of_which_battles(tmp_path: Path) -> None:
    run = made_up_run(tmp_path, holdout=0.4)
    files = [run.calibrate(model, calibration="temperature") for model in ("merged", "gptq")]
    logits, ids = read_logits(tmp_path / "logits" / "small" / "gptq_held_out.npy")
    votes = votes_of(run.folds)[locate(key(ids), key(run.folds), "folds")]
    seen = all_scores(mean_over_views(logits.reshape(len(ids), -1, 3)), votes)

    def shown(metrics: Path) -> tuple[str, list[list[str]], list[dict[str, str]], str]:
        render_report(metrics, tmp_path / "report.html")
        page = (tmp_path / "report.html").read_text()
        _, *rows = table(page, "The deployed models of small on")
        text = (tmp_path / "report" / "calibration.csv").read_text()
        (label,) = re.findall(r'Reliability diagrams"><svg role="img" aria-label="(.*?)"', page)
        return " ".join(page.split()), rows, list(csv.DictReader(io.StringIO(text))), label

    page, rows, written, label = shown(run.evaluate(test=False, calibrations=files))
    assert f"as it is deployed, on {len(ids)} held-out battles" in page
    assert f"uncalibrated, calibration error {seen['ece']:.3f}" in label
    assert "; temperature, calibration error" in label
    (raw,) = (row for row in rows if row[:2] == ["GPTQ", "uncalibrated"])
    assert raw[2:] == [
        f"{seen['log_loss']:.4f}",
        percent(seen["accuracy"]),
        f"{seen['brier']:.4f}",
        *(f"{seen[name]:.3f}" for name in ("ece", "adaptive_ece", "classwise_ece")),
    ]
    (line,) = (r for r in written if (r["model"], r["logits"]) == ("GPTQ", "uncalibrated"))
    assert (line["battles"], line["rows"]) == ("held-out battles", str(len(ids)))
    assert float(line["ece"]) == round(seen["ece"], 5)

    views = PredictionSettings(
        version=1,
        orders=("AB", "BA"),
        max_lengths=LENGTHS,
        average="logits",
        calibration="temperature",
    )
    for model, file in zip(("merged", "gptq"), files, strict=True):
        predict_test(
            tmp_path / "logits" / "small" / f"{model}_test.npy",
            tmp_path / f"{model}.parquet",
            model=model,
            settings=views,
            calibration=file,
            battles=tmp_path / "battles.parquet",
        )
    metrics = run.evaluate(calibrations=files)
    tested = json.loads(metrics.read_text())["test"]
    for name, variant in (("raw", "256+512/AB+BA"), ("temperature", "256+512/AB+BA/temperature")):
        for model, figures in tested["calibration"].items():
            assert figures[name]["log_loss"] == tested["models"][model][variant]["log_loss"]
    page, rows, written, label = shown(metrics)
    assert f"as it is deployed, on {tested['rows']} test battles" in page
    assert f"calibration error {tested['score']['ece']:.3f}" in label.split("; temperature, ")[1]
    assert {r["battles"] for r in written} == {"test battles", "held-out battles", "out of fold"}


def test_slices_are_shown_with_their_baselines(page: str, metrics: dict[str, Any]) -> None:
    header, *rows = table(page, "Battles out of fold by slice")
    assert header[-3:] == ["length", "surface", "Bayes limit"]
    assert [row[:3] for row in rows] == [["x", "model", "120"], ["y", "model", "120"]]
    (first, _) = metrics["slices"]
    assert rows[0][3] == f"{first['log_loss']:.4f}"
    assert rows[0][4] == f"{first['low']:.3f} to {first['high']:.3f}"
    shown = ("class_prior", "length", "surface", "bayes")
    assert rows[0][-4:] == [f"{first[name]:.4f}" for name in shown]


def test_the_page_fetches_nothing_and_runs_nothing(page: str) -> None:
    parsed = Page(page)
    assert "://" not in page.replace("arXiv:", "")
    assert "@import" not in page
    assert {tag for tag, _ in parsed.tags}.isdisjoint({"script", "iframe", "img", "object"})
    for tag, attributes in parsed.tags:
        if tag == "a":  # a link to a file of the run, followed by nobody but the reader
            continue
        for name in ("href", "xlink:href", "src"):
            assert (attributes.get(name) or "#").startswith(("#", "data:"))
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))


def test_the_page_can_be_read_aloud(page: str) -> None:
    parsed = Page(page)
    drawings = [attributes for tag, attributes in parsed.tags if tag == "svg"]
    assert len(drawings) == len(FIGURES)
    assert all(a["role"] == "img" and len(a["aria-label"] or "") > 60 for a in drawings)
    headers = [attributes for tag, attributes in parsed.tags if tag == "th"]
    assert all(a.get("scope") in ("row", "col") for a in headers)
    assert ("html", {"lang": "en"}) in parsed.tags
    ids = [attributes["id"] for _, attributes in parsed.tags if attributes.get("id")]
    assert len(ids) == len(set(ids))


def test_text_from_outside_stays_text(page: str, run: MadeUpRun, tmp_path: Path) -> None:
    assert "run: &lt;made-up&gt;" in page
    metrics = json.loads((run.folder / "metrics.json").read_text())
    metrics["rejected"][0]["reason"] = "<script>alert(1)</script>"
    write_json(metrics, tmp_path / "metrics.json")
    render_report(tmp_path / "metrics.json", tmp_path / "report.html")
    written = (tmp_path / "report.html").read_text()
    assert "<script>" not in written
    assert "&lt;script&gt;" in written


def test_figures_and_tables_are_files_as_well(run: MadeUpRun) -> None:
    folder = run.folder / "report"
    names = {f"{name}.svg" for name in FIGURES} | {f"{name}.csv" for name in TABLES}
    assert {path.name for path in folder.iterdir()} == names
    for name in FIGURES:
        assert ElementTree.parse(folder / f"{name}.svg").getroot().tag.endswith("svg")
    rows = list(csv.DictReader(io.StringIO((folder / "judges.csv").read_text())))
    assert [row["name"] for row in rows if row["taught by"]] == list(JUDGES)


def test_the_same_figures_give_the_same_bytes(run: MadeUpRun, page: str, tmp_path: Path) -> None:
    output = tmp_path / "report.html"
    configuration = run.folder / "config.yaml"
    render_report(run.folder / "metrics.json", output, configuration=configuration)
    assert output.read_text() == page


def test_a_run_without_test_votes_has_a_report_and_all_its_files(tmp_path: Path) -> None:
    run = made_up_run(tmp_path)
    render_report(run.evaluate(test=False, rejected=None), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "votes of the test battles are unknown" in page
    assert "is not quantised" in page
    assert "Bayes" not in page
    assert "true probabilities" not in page
    assert "no votes on battles that nothing was trained on: nothing to show" in page
    assert len(list((tmp_path / "report").iterdir())) == len(FIGURES) + len(TABLES)


def test_shared_prompts_are_pointed_out(run: MadeUpRun, page: str, tmp_path: Path) -> None:
    assert "share their prompt" not in page
    metrics = json.loads((run.folder / "metrics.json").read_text())
    metrics["folds"][0]["shared_prompts"] = 7
    write_json(metrics, tmp_path / "metrics.json")
    render_report(tmp_path / "metrics.json", tmp_path / "report.html")
    assert "7 validation rows share their prompt" in (tmp_path / "report.html").read_text()


def test_leaks_are_shown_by_relation(
    run: MadeUpRun, page: str, metrics: dict[str, Any], tmp_path: Path
) -> None:
    header, *rows = table(page, "Battles whose prompt")
    relations = metrics["audit"]["relations"]
    assert [[row[0], row[1]] for row in rows] == [[r["of"], r["among"]] for r in relations]
    assert [row[0] for row in rows] == [
        *(f"fold {k}" for k in range(FOLDS)),
        "test",
        "test",
        "train",
    ]
    folder = run.folder / "report"
    written = list(csv.DictReader(io.StringIO((folder / "audit.csv").read_text())))
    assert [int(row["near"]) for row in written] == [r["near"] for r in relations]
    # The audit of a run without leaks, and of one with leaks.
    clean = json.loads(json.dumps(metrics))
    for relation in clean["audit"]["relations"]:
        relation |= {"same": 0, "near": 0, "answers": 0}
    clean["audit"]["examples"] = []
    example = {"of": "test", "among": "train", "kind": "near", "similarity": 0.913, "answer": True}
    for prefix, prompt in (("", "<b>why</b>"), ("other_", "<i>how</i>")):
        example |= {f"{prefix}source": "train", f"{prefix}id": "7", f"{prefix}prompt": prompt}
    leaking = json.loads(json.dumps(clean))
    leaking["audit"]["relations"][-1] |= {"near": 1}
    leaking["audit"]["examples"] = [example]
    for name, figures in (("clean", clean), ("leaking", leaking)):
        write_json(figures, tmp_path / f"{name}.json")
        render_report(tmp_path / f"{name}.json", tmp_path / f"{name}.html")
    assert "No battle has a prompt" in (tmp_path / "clean.html").read_text()
    shown = (tmp_path / "leaking.html").read_text()
    assert "No battle has a prompt" not in shown
    (pair,) = table(shown, "Pairs of battles")[1:]
    assert pair == ["train:7 <b>why</b>", "train:7 <i>how</i>", "0.91", "yes"]


def test_without_an_audit_there_is_no_word_of_leaks(run: MadeUpRun, tmp_path: Path) -> None:
    figures = json.loads((run.folder / "metrics.json").read_text())
    for audit in ({"audit": None}, {}):
        del figures["audit"]
        figures |= audit
        write_json(figures, tmp_path / "metrics.json")
        render_report(tmp_path / "metrics.json", tmp_path / "report.html")
        assert 'id="leaks"' not in (tmp_path / "report.html").read_text()
        assert len(list((tmp_path / "report").iterdir())) == len(FIGURES) + len(TABLES)


def test_figures_of_another_shape_are_refused_by_name(tmp_path: Path) -> None:
    write_json({"run": "x"}, tmp_path / "metrics.json")
    with pytest.raises(InputError, match=r"metrics\.json: not the figures of a run"):
        render_report(tmp_path / "metrics.json", tmp_path / "report.html")


def test_every_part_has_a_caption() -> None:
    captions = {path.stem for path in (ROOT / "workflow" / "report").glob("*.rst")}
    assert {
        *FIGURES,
        "variants_table",
        "judges",
        "folds",
        "rejected",
        "audit",
        "workflow",
    } <= captions


def test_numbers_are_written_for_people() -> None:
    assert percent(0.4567) == "45.7\u202f%"
    assert signed(-0.5, 2) == "\N{MINUS SIGN}0.50"
    assert signed(0.5, 2) == "+0.50"


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")
def test_a_browser_shows_it_without_complaint(run: MadeUpRun, tmp_path: Path) -> None:
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    flags += "--disable-background-networking --disable-component-update --disable-sync "
    flags += "--enable-logging=stderr --window-size=400,800 --dump-dom"
    # Content wider than the window makes the page scroll sideways; this title shows the width.
    probe = "<script>document.title = document.documentElement.scrollWidth</script>"
    page = tmp_path / "report.html"
    written = (run.folder / "report.html").read_text()
    page.write_text(written.replace("</body>", f"{probe}</body>"))
    shown = subprocess.run(
        [str(CHROMIUM), *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "CONSOLE" not in shown.stderr
    assert [row[0] for row in table(shown.stdout, "Log loss by fold")[4:7]] == list(JUDGES)
    assert len(Page(shown.stdout).tables) == 16
    drifts = table(shown.stdout, "Drift of quantisation")
    assert [row[1] for row in drifts] == ["rows", "512", "40"]
    width = re.search(r"<title>(\d+)</title>", shown.stdout)
    assert width is not None
    assert int(width[1]) <= 500  # the narrowest window a headless browser opens


def test_the_page_says_what_the_run_took_and_how_it_trained(run: MadeUpRun, tmp_path: Path) -> None:
    folder = tmp_path / "benchmarks" / "train_teacher"
    folder.mkdir(parents=True)
    for fold, (seconds, memory) in enumerate([("61.2", "900.4"), ("30.1", "NA")]):
        (folder / f"big_fold_{fold}.tsv").write_text(f"s\tmax_rss\n{seconds}\t{memory}\n")
    (tmp_path / "benchmarks" / "evaluate.tsv").write_text("s\tmax_rss\n2.0\t-\n")
    jobs = [{"rule": "train_teacher", "seconds": 40.0}] * 2
    write_json({"jobs": jobs}, tmp_path / "plan.json")
    write_parquet(
        pa.table({"epoch": [0.5, 1.0], "loss": [1.1, 0.9], "choice_loss": [None, 1.0]}),
        tmp_path / "adapters" / "big" / "fold_0" / "history.parquet",
        {},
    )
    write_json(json.loads((run.folder / "metrics.json").read_text()), tmp_path / "metrics.json")
    os.utime(tmp_path / "metrics.json", (1.8e9, 1.8e9))
    render_report(tmp_path / "metrics.json", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    _, *rows = table(page, "Time and memory of the jobs")
    assert rows == [
        ["train_teacher", "2", "91", "80", "61", "900"],
        ["evaluate", "1", "2", "–", "2", "–"],
    ]
    assert re.search(r"<h1>Run made-up, 1[45] January 2027</h1>", page)
    assert 'aria-label="Loss of each fold by epoch: big."' in page
    assert 'href="gptq/small/README.md"' in page


def test_the_headline_is_no_flattered_figure(run: MadeUpRun, page: str, tmp_path: Path) -> None:
    metrics = json.loads((run.folder / "metrics.json").read_text())
    lead = page[page.index('class="lead"') : page.index('class="facts"')]
    assert f"{metrics['headline']['log_loss']['value']:.4f}" in lead
    assert f"{metrics['judges']['small']['oof']['log_loss']:.4f}" not in lead
    write_json({**metrics, "headline": None, "test": None}, tmp_path / "metrics.json")
    render_report(tmp_path / "metrics.json", tmp_path / "report.html")
    assert (
        "no score on battles that nothing was trained on" in (tmp_path / "report.html").read_text()
    )
