"""Render `metrics.json` as one HTML file, and its figures and tables as separate files.

The page is self-contained: it includes style and drawings, loads nothing and has no scripts.
"""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import jinja2

from arena_distill.battles.audit import COUNTS
from arena_distill.errors import refusing
from arena_distill.evaluation.benchmarks import BENCHMARK_COLUMNS
from arena_distill.evaluation.contradictions import describe_contradictions
from arena_distill.evaluation.drawings import (
    BATTLES,
    CALIBRATIONS,
    FIGURES,
    MODELS,
    NAMES,
    UNKNOWN,
    alt_text,
    calibrations_of,
    deployed_calibrations,
    draw,
    inline,
    overview,
    percent,
    training_curves,
    variants_by_name,
)
from arena_distill.evaluation.jobs import histories, job_costs
from arena_distill.evaluation.ranking import (
    RANKING_COLUMNS,
    describe_ranking,
    ranking_records,
    shown_ranking,
)
from arena_distill.evaluation.slices import FEWEST, SLICE_COLUMNS, slice_records
from arena_distill.evaluation.tables import variant_records
from arena_distill.evaluation.voters import describe_voters, shown_voters
from arena_distill.files.artifacts import read_json, write_text
from arena_distill.files.tables import guarded, table_csv
from arena_distill.metrics import Figures
from arena_distill.prediction.calibration import methods
from arena_distill.prediction.held_out import FEWEST as FEWEST_CALIBRATED
from arena_distill.scoring.stacks import describe as describe_stack

TEMPLATES = Path(__file__).parent / "templates"

TABLES = (
    *("judges", "calibration", "position", "variants", "slices", "ranking", "benchmarks"),
    *("folds", "audit", "rejected"),
)
"""Tables, `<name>.csv`."""


def render_report(
    metrics: Path, output: Path, *, parts: Path | None = None, configuration: Path | None = None
) -> None:
    """Write the report → `report.html`, its figures and tables → `report/*.svg`, `report/*.csv`.

    Args:
        metrics: `metrics.json`.
        output: the HTML file.
        parts: folder of the separate files; by default `report` next to `output`. All of
            `FIGURES` and `TABLES` are always written.
        configuration: the run's configuration, a text file to include unchanged.

    Raises:
        InputError: `metrics` is missing, invalid, or of another version.
    """
    figures = read_json(metrics)
    date = datetime.fromtimestamp(metrics.stat().st_mtime)
    with refusing(f"{metrics}: not the figures of a run; run the workflow again"):
        text = configuration.read_text() if configuration else None
        page, files = render(figures, text, run=metrics.parent, date=f"{date:%-d %B %Y}")
    for name, text in files.items():
        write_text(text, (parts or output.parent / "report") / name)
    write_text(page, output)
    print(f"{output}: {len(page) / 1024:,.0f} KiB, readable offline")


def render(
    metrics: Figures, configuration: str | None = None, *, run: Path, date: str
) -> tuple[str, dict[str, str]]:
    """Render the page's HTML, and the text of the separate files by name.

    Args:
        run: the run's folder, for what it took and how it trained.
        date: of the figures.
    """
    trained = histories(run, list(metrics["judges"]))
    drawings = {name: draw(name, make, metrics) for name, make in FIGURES.items()}
    tables = _tables(metrics)
    final = metrics["judges"][metrics["final"]["judge"]]
    page = template("report.html.j2").render(
        metrics=metrics,
        final=final,
        date=date,
        costs=job_costs(run),
        curves=inline(
            draw("training", training_curves, trained),
            f"Loss of each fold by epoch: {', '.join(trained)}.",
        )
        if trained
        else None,
        classes=len(final["class_reliability"]),
        rows=overview(metrics),
        drawings={name: inline(svg, alt_text(name, metrics)) for name, svg in drawings.items()},
        variants=variants_by_name(metrics),
        slices=_slices(metrics),
        fewest=FEWEST,
        about_contradictions=describe_contradictions(metrics["contradictions"]),
        voters=shown_voters(metrics),
        about_voters=describe_voters,
        ranking=shown_ranking(metrics),
        about_ranking=describe_ranking(shown_ranking(metrics)),
        fewest_calibrated=FEWEST_CALIBRATED,
        calibrations={name: calibrations_of(f) for name, f in metrics["judges"].items()},
        deployed=deployed_calibrations(metrics),
        names=NAMES | MODELS | CALIBRATIONS | BATTLES,
        stacks=[describe_stack(f["stack"]) for f in metrics["judges"].values() if "stack" in f],
        methods=methods(len(final["class_reliability"])),
        audit=metrics.get("audit"),
        worst=_worst_leaks(metrics.get("audit")),
        shared_prompts=sum(fold["shared_prompts"] for fold in metrics["folds"]),
        settings=json.dumps(metrics["provenance"], indent=2, ensure_ascii=False),
        versions=metrics["provenance"]["evaluation"]["versions"],
        configuration=configuration,
    )
    files = {f"{name}.svg": svg for name, svg in drawings.items()}
    return page, files | {f"{name}.csv": text for name, text in tables.items()}


def template(name: str) -> jinja2.Template:
    """Load a page's template, with the filters for all pages."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "signed": signed, "guarded": guarded}
    return environment.get_template(name)


# --- contents -------------------------------------------------------------------------------------


def signed(value: float | None, digits: int = 4) -> str:
    """Format a number with its sign, with a typographic minus."""
    if value is None:
        return UNKNOWN
    return f"{value:+.{digits}f}".replace("-", "\N{MINUS SIGN}")


def _slices(metrics: Figures) -> dict[str, list[Figures]]:
    """The slices' figures, by the battles that they are of."""
    slices: dict[str, list[Figures]] = {}
    for record in slice_records(metrics):
        slices.setdefault(record["battles"], []).append(record)
    return slices


def _worst_leaks(audit: Figures | None) -> list[Figures]:
    """The first example of each relation and kind."""
    worst: dict[tuple[str, ...], Figures] = {}
    for example in audit["examples"] if audit else []:
        worst.setdefault(tuple(example[name] for name in ("of", "among", "kind")), example)
    return list(worst.values())


def _tables(metrics: Figures) -> dict[str, str]:
    """The tables as CSV: rounded, for reading; the exact figures are in `metrics.json`."""
    folds = [fold["fold"] for fold in metrics["folds"]]
    judges = [
        {
            "name": row["name"],
            "taught by": ", ".join(row.get("teachers", ()))
            or ", ".join(row.get("stack", {}).get("members", ()))
            or ("external" if row.get("external") else "votes" if "teachers" in row else ""),
            **{
                f"fold {k}": round(f["log_loss"], 4)
                for k, f in zip(folds, row["folds"], strict=True)
            },
            "log loss": round(row["log_loss"], 4),
            "accuracy": round(row["accuracy"], 4),
            "ECE": round(row["ece"], 4) if "ece" in row else None,
            "gap closed": None if row["gap_closed"] is None else round(row["gap_closed"], 3),
            **{
                f"{k} vs final": None if v is None else round(v, 4)
                for k, v in row["versus_final"].items()
            },
            "warning": row.get("warning"),
        }
        for row in overview(metrics)
    ]
    variants = [_rounded(record) for record in variant_records(metrics)]
    scored = [
        (metrics["final"]["judge"], MODELS[model], BATTLES[battles], by_method)
        for battles, models in deployed_calibrations(metrics).items()
        for model, by_method in models.items()
    ]
    scored += [
        (
            name,
            "external" if "external" in judge else "folds",
            "out of fold",
            calibrations_of(judge),
        )
        for name, judge in metrics["judges"].items()
    ]
    calibration = [
        {
            "name": name,
            "model": model,
            "battles": battles,
            "logits": CALIBRATIONS[method],
            "temperature": figures.get("parameters", {}).get("temperature"),
            **{k: figures[k] for k in ("rows", "log_loss", "accuracy", "brier")},
            **{k: figures[k] for k in ("ece", "adaptive_ece", "classwise_ece")},
            **dict.fromkeys(("kl", "mean_absolute_error", "excess_log_loss")),
            **(figures.get("truth") or {}),
        }
        for name, model, battles, by_method in scored
        for method, figures in by_method.items()
    ]
    position = [
        {
            "name": name,
            **{k: v for k, v in judge["position"].items() if k != "log_loss"},
            **{f"log_loss {order}": v for order, v in judge["position"]["log_loss"].items()},
        }
        for name, judge in metrics["judges"].items()
    ]
    return {
        "judges": table_csv(judges),
        "calibration": table_csv([_rounded(record) for record in calibration]),
        "position": table_csv([_rounded(record) for record in position]),
        "variants": table_csv(
            variants, ["model", "variant", "rows", "log_loss", "accuracy", "submitted"]
        ),
        "slices": table_csv([_rounded(r) for r in slice_records(metrics)], SLICE_COLUMNS),
        "ranking": table_csv([_rounded(r) for r in ranking_records(metrics)], RANKING_COLUMNS),
        "benchmarks": table_csv(
            [_rounded(record | record["orders"]) for record in metrics["benchmarks"]],
            BENCHMARK_COLUMNS,
        ),
        "folds": table_csv(metrics["folds"]),
        "audit": table_csv(metrics["audit"]["relations"] if metrics.get("audit") else [], COUNTS),
        "rejected": table_csv(metrics["rejected"], ["source", "column", "reason", "rows"]),
    }


def _rounded(record: Figures) -> Figures:
    return {k: round(v, 5) if isinstance(v, float) else v for k, v in record.items()}
