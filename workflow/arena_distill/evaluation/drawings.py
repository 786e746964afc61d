"""Draw a run's figures as SVG.

matplotlib draws with a few colours for roles (ink, accent, paper); on the page they are replaced by the
page's own colours, so drawings follow its light or dark theme.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from markupsafe import Markup

from arena_distill.evaluation.tables import variant_records
from arena_distill.metrics import Figures
from arena_distill.prediction.calibration import METHODS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, RULE, PAPER = "#1d1f21", "#6a7178", "#d5d9dd", "#fdfdfc"
ACCENT, SECOND = "#1f6f8b", "#b4541a"
ROLES = {
    INK: "currentColor",
    MUTED: "var(--muted)",
    RULE: "var(--rule)",
    PAPER: "var(--paper)",
    ACCENT: "var(--accent)",
    SECOND: "var(--second)",
}
"""The page's colours in place of the drawings'."""

FONT = "system-ui, 'Segoe UI', 'Helvetica Neue', 'DejaVu Sans', sans-serif"
NAMES = {
    "class_prior": "class prior",
    "length": "length regression",
    "surface": "surface trees",
    "bayes": "Bayes limit",
}
MODELS = {"merged": "merged", "gptq": "GPTQ"}
CALIBRATIONS: dict[str, str] = {"raw": "uncalibrated", **{method: method for method in METHODS}}
NOT_SCORED = "no votes on battles that nothing was trained on: nothing to show"
UNKNOWN = "unknown"
"""What stands for the ends of an interval of a single prompt."""

BATTLES = {"test": "test battles", "held_out": "held-out battles"}
"""Those that nothing was trained on."""

CLASS_NAMES = {"model_a": "A wins", "model_b": "B wins", "tie": "tie"}


def percent(share: float | None, digits: int = 1) -> str:
    """Format a share in per cent, with a narrow space before the sign."""
    if share is None:
        return UNKNOWN
    return f"{100 * share:.{digits}f}\u202f%"


def overview(metrics: Figures) -> list[Figures]:
    """The rows of the main table: baselines and judges from the class prior to the Bayes limit."""
    baselines = {name: f for name, f in metrics["baselines"].items() if f}
    bayes = baselines.pop("bayes", None)
    rows = [{"name": NAMES[name], "kind": "baseline", **f} for name, f in baselines.items()]
    for name, figures in metrics["judges"].items():
        kind = "final" if name == metrics["final"]["judge"] else "judge"
        rows.append({"name": name, "kind": kind, **figures, **figures["oof"]})
    rows += [{"name": NAMES["bayes"], "kind": "baseline", **bayes}] if bayes else []
    return rows


def variants_by_name(metrics: Figures) -> dict[str, dict[str, Figures]]:
    """Variant → model → figures, for a table with a column per model."""
    variants: dict[str, dict[str, Figures]] = {}
    for record in variant_records(metrics):
        variants.setdefault(record["variant"], {})[record["model"]] = record
    return variants


def calibrations_of(judge: Figures) -> dict[str, Figures]:
    """A judge's uncalibrated scores (`raw`) and those of each method, with their truth scores."""
    scored = {"raw": {**judge, **judge["oof"]}, **judge["calibration"]}
    truth = judge["truth"] or {}
    return {
        name: {**scored[name], "truth": truth.get(name)} for name in CALIBRATIONS if name in scored
    }


def deployed_calibrations(metrics: Figures) -> dict[str, dict[str, dict[str, Figures]]]:
    """Of the deployed models by `BATTLES` and model: scores uncalibrated (`raw`) and by each method."""
    test, held_out = metrics["test"], metrics["held_out"]
    found = {"test": test["calibration"]} if test else {}
    if held_out:
        models = held_out["models"].items()
        found["held_out"] = {model: {"raw": f["raw"], **f["methods"]} for model, f in models}
    return found


def alt_text(name: str, metrics: Figures) -> str:
    """A description of a drawing, for screen readers."""
    if name == "log_loss":
        shown = [f"{r['name']} {r['log_loss']:.3f}" for r in overview(metrics)]
        return f"Dot chart of log loss out of fold, lower is better: {', '.join(shown)}."
    if name.startswith("reliability"):
        scored = _deployed(metrics) if name == "reliability" else _out_of_fold(metrics)
        told = [
            f"{CALIBRATIONS[method]}, calibration error {f['ece']:.3f}, verdicts' confidence: accuracy "
            + ", ".join(f"{b['confidence']:.2f}: {b['accuracy']:.2f}" for b in f["reliability"])
            for method, f in scored.items()
        ]
        return (
            f"Reliability diagrams of {metrics['final']['judge']}, of its verdicts and of each class. "
            f"{'; '.join(told) or NOT_SCORED}."
        )
    if name == "cascade":
        shown = [
            f"{p['swap']} {p['threshold']:.2f}: {percent(p['all_tokens'], 0)} of tokens, "
            f"{p['log_loss']:.4f}"
            for p in _points(metrics)
        ]
        return f"Test log loss by share of tokens scored, swap and threshold: {'; '.join(shown) or 'none'}."
    shown = [
        f"{MODELS.get(r['model'], r['model'])} {r['variant']} {r['log_loss']:.4f}"
        for r in variant_records(metrics)
    ]
    return f"Dot chart of test log loss by variant: {', '.join(shown) or 'no test votes'}."


def draw(name: str, make: Callable[[Any], Figure], metrics: Any) -> str:
    """Make a figure and return it as SVG text: the same figures give the same bytes."""
    import matplotlib as mpl

    style: dict[Any, Any] = {
        "svg.fonttype": "none",  # text stays text: smaller, selectable, accessible
        "svg.hashsalt": name,  # ids are unique among the drawings of a page
        "font.size": 10,
        "text.color": INK,
        "axes.labelcolor": MUTED,
        "axes.edgecolor": RULE,
        "axes.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "grid.color": RULE,
        "grid.linewidth": 0.6,
        "xtick.color": RULE,
        "ytick.color": RULE,
        "xtick.labelcolor": MUTED,
        "ytick.labelcolor": MUTED,
        "legend.frameon": False,
        "figure.facecolor": PAPER,
        "figure.constrained_layout.use": True,
    }
    text = io.StringIO()
    with mpl.rc_context(style):
        make(metrics).savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return re.sub(r"(font: [^;]*?[\d.]+px) [^;\"]*", rf"\1 {FONT}", text.getvalue())


def inline(svg: str, alt: str) -> Markup:
    """An SVG file's text as an element of the page, in the page's colours, with a description."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'(<g) id="[\w.]+_\d+"', r"\1", body)  # not unique among drawings
    for colour, role in ROLES.items():
        body = body.replace(colour, role)
    box = re.search(r'viewBox="([^"]*)"', body)
    assert box is not None
    opening = Markup('<svg role="img" aria-label="{}" viewBox="{}">').format(alt, box[1])
    return opening + Markup(body[body.index(">") + 1 :].strip())


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    return figure, figure.add_subplot()


def _log_loss(metrics: Figures) -> Figure:
    """A row per baseline and judge: its log loss, and that of each fold as small dots."""
    rows = overview(metrics)
    figure, axes = _figure(7.2, 0.9 + 0.36 * len(rows))
    colours = {"baseline": MUTED, "judge": ACCENT, "final": SECOND}
    for y, row in enumerate(rows):
        colour = colours[row["kind"]]
        folds = [fold["log_loss"] for fold in row["folds"]]
        axes.plot(folds, [y] * len(folds), "o", ms=3.5, mew=0, alpha=0.45, color=colour)
        marker = "D" if row["kind"] == "baseline" else "o"
        axes.plot(row["log_loss"], y, marker, ms=8, color=colour, mec=PAPER, mew=1.2)
        weight = "bold" if row["kind"] == "final" else "normal"
        beside = axes.get_yaxis_transform()
        text = f"{row['log_loss']:.4f}"
        axes.text(1.02, y, text, transform=beside, va="center", color=INK, weight=weight)
    for name, dash in (("class_prior", (4, 3)), ("bayes", (1, 2))):
        if metrics["baselines"][name]:
            x = metrics["baselines"][name]["log_loss"]
            axes.axvline(x, color=MUTED, lw=0.9, dashes=dash, zorder=0)
    rows_axis(axes, [row["name"] for row in rows])
    for label, row in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_fontweight("bold" if row["kind"] == "final" else "normal")
    axes.set_xlabel("log loss out of fold, nats (lower is better); small dots: single folds")
    return figure


def _deployed(metrics: Figures) -> dict[str, Figures]:
    """The deployed model, uncalibrated and calibrated, on the battles of the headline; {} without them."""
    headline = metrics["headline"]
    if not headline:
        return {}
    return _shown(metrics, deployed_calibrations(metrics)[headline["battles"]][headline["model"]])


def _out_of_fold(metrics: Figures) -> dict[str, Figures]:
    """The folds' models of the final judge, uncalibrated and calibrated."""
    return _shown(metrics, calibrations_of(metrics["judges"][metrics["final"]["judge"]]))


def _shown(metrics: Figures, scored: dict[str, Figures]) -> dict[str, Figures]:
    """What diagrams show: uncalibrated, and by the method that is used, else by temperature."""
    methods = "raw", metrics["final"]["calibration"] or "temperature"
    return {method: scored[method] for method in methods if method in scored}


def _reliability(judge: dict[str, Figures]) -> Figure:
    """A judge before and after calibration: its verdicts, then each class, and their spread."""
    from matplotlib.figure import Figure

    if not judge:
        figure, axes = _figure(7.2, 1.5)
        axes.text(0.5, 0.5, NOT_SCORED, ha="center", color=MUTED)
        axes.set_axis_off()
        return figure
    markers: list[dict[str, Any]] = [
        {"marker": "o", "ms": 6.5, "color": SECOND},
        {"marker": "D", "ms": 4.8, "color": ACCENT},
    ]
    bars: list[dict[str, Any]] = [
        {"color": SECOND, "alpha": 0.75, "ec": PAPER},
        {"fc": "none", "ec": ACCENT, "lw": 1.3},
    ]
    # Of two classes one is enough: the other's diagram is its mirror image.
    shown = [None, *(CLASS_NAMES if len(judge["raw"]["class_reliability"]) == 3 else ("model_a",))]
    pairs = len(shown) // 2
    figure = Figure(figsize=(7.2, 3.9 * pairs))
    cells = figure.subplots(2 * pairs, 2, sharex=True, height_ratios=[4, 1] * pairs)
    for i, name in enumerate(shown):
        above, below = cells[i // 2 * 2 : i // 2 * 2 + 2, i % 2]
        above.plot([0, 1], [0, 1], color=MUTED, lw=0.9, dashes=(4, 3))
        for (method, figures), marker, bar in zip(judge.items(), markers, bars, strict=False):
            bins = figures["class_reliability"][name] if name else figures["reliability"]
            _diagram(above, bins, {**marker, "label": CALIBRATIONS[method]})
            rows = sum(b["rows"] for b in bins)
            left, widths = [b["lower"] for b in bins], [b["upper"] - b["lower"] for b in bins]
            shares = [b["rows"] / rows for b in bins]
            below.bar(left, shares, widths, align="edge", **bar)
        above.set_title(CLASS_NAMES[name] if name else "verdict", loc="left", color=INK, size=10)
        above.set(xlim=(0, 1), ylim=(0, 1))
        above.grid(True)
        if i % 2 == 0:
            above.set_ylabel("share that was right" if name is None else "share of votes")
            below.set_ylabel("share")
    for cell in cells[-1]:
        cell.set_xlabel("probability given")
    cells[0, 0].text(0.03, 0.09, "perfect calibration", color=MUTED, rotation=40, size=9)
    handles, labels = cells[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=2, labelcolor=INK, fontsize=9)
    return figure


def _diagram(axes: Axes, bins: Sequence[Figures], style: dict[str, Any]) -> None:
    """Accuracy against confidence, with one standard error either way."""
    confidence, accuracy = ([b[name] for b in bins] for name in ("confidence", "accuracy"))
    # With half a verdict added either way: a bin of one right verdict is not certain.
    shrunk = [(b["accuracy"] * b["rows"] + 0.5) / (b["rows"] + 1) for b in bins]
    error = [(p * (1 - p) / b["rows"]) ** 0.5 for p, b in zip(shrunk, bins, strict=True)]
    lines = {"ecolor": style["color"], "elinewidth": 1, "alpha": 0.5}
    axes.errorbar(confidence, accuracy, error, fmt="none", **lines)
    axes.plot(confidence, accuracy, ls="none", mec=PAPER, mew=0.8, clip_on=False, **style)


def _variants(metrics: Figures) -> Figure:
    """A row per variant: test log loss of each model; the submitted one is ringed."""
    variants = variants_by_name(metrics)
    figure, axes = _figure(7.2, 1.1 + 0.36 * max(len(variants), 1))
    if not variants:
        axes.text(0.5, 0.5, "no test votes: nothing to score", ha="center", color=MUTED)
        axes.set_axis_off()
        return figure
    styles = {"merged": ("D", ACCENT, -0.17), "gptq": ("o", SECOND, 0.17)}
    for model in metrics["test"]["models"]:
        marker, colour, shift = styles.get(model, ("s", MUTED, 0.0))
        records = [by_model[model] for by_model in variants.values()]
        x, y = [r["log_loss"] for r in records], [i + shift for i in range(len(records))]
        axes.plot(x, y, marker, color=colour, ms=6.5, mec=PAPER, label=MODELS.get(model, model))
        for record, height in zip(records, y, strict=True):
            if record["submitted"]:
                (ring,) = axes.plot(record["log_loss"], height, "o", ms=11, label="submitted")
                ring.set(markerfacecolor="none", markeredgecolor=INK, markeredgewidth=1.1)
    rows_axis(axes, list(variants))
    axes.set_xlabel(f"log loss on {metrics['test']['rows']:,} test battles, nats (lower is better)")
    figure.legend(loc="outside upper right", ncols=3, labelcolor=INK, fontsize=9)
    return figure


def _cascade(metrics: Figures) -> Figure:
    """Test log loss against the share of tokens that a cascade scores: a point per threshold, by `swap`."""
    points = _points(metrics)
    figure, axes = _figure(7.2, 3.4 if points else 1.5)
    if not points:
        axes.text(0.5, 0.5, "no other view to go on to", ha="center", color=MUTED)
        axes.set_axis_off()
        return figure
    for swap, color, beside in (("always", SECOND, 7), ("unsure", ACCENT, -15)):
        mine = [p for p in points if p["swap"] == swap]
        if not mine:
            continue
        x, y = [100 * p["all_tokens"] for p in mine], [p["log_loss"] for p in mine]
        if all(p["versus_all"] for p in mine):
            reference = y[-1] - mine[-1]["versus_all"]["difference"]
            low, high = ([reference + p["versus_all"][k] for p in mine] for k in ("low", "high"))
            axes.fill_between(x, low, high, color=color, alpha=0.15, lw=0)
            axes.axhline(reference, color=MUTED, lw=0.9, dashes=(4, 3))
        axes.plot(
            x, y, "-o", color=color, ms=5.5, mec=PAPER, mew=0.8, lw=1.1, label=f"swap: {swap}"
        )
        told = -100.0
        for share, height, point in zip(x, y, mine, strict=True):
            if share - told > 4:  # closer ones would overlap
                told, text = share, f"{point['threshold']:.2f}"
                axes.annotate(
                    text, (share, height), (0, beside), textcoords="offset points", ha="center"
                )
    axes.margins(y=0.15)
    axes.grid(True, axis="y")
    axes.set(xlabel="tokens scored, % of those of all views", ylabel="log loss, nats")
    if len({p["swap"] for p in points}) > 1:
        figure.legend(loc="outside upper right", ncols=2, labelcolor=INK, fontsize=9)
    return figure


def _points(metrics: Figures) -> list[Figures]:
    """The cascade's curve, if there is one."""
    return (metrics["test"] or {}).get("cascade") or []


def training_curves(histories: Mapping[str, Sequence[pa.Table]]) -> Figure:
    """A panel per judge: the smoothed loss of each fold, and the log loss of the battles for choices."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 0.3 + 2.2 * -(-len(histories) // 2)))
    panels = figure.subplots(-(-len(histories) // 2), 2, squeeze=False).flatten()
    for axes in panels[len(histories) :]:
        axes.set_axis_off()
    for axes, (judge, tables) in zip(panels, histories.items(), strict=False):
        for table in tables:
            epoch, loss = table["epoch"].to_numpy(), table["loss"].to_numpy()
            width = max(1, len(loss) // 20)
            smooth = np.convolve(loss, np.ones(width) / width, "valid")
            axes.plot(epoch[width - 1 :], smooth, color=MUTED, lw=0.9, alpha=0.8)
            if "choice_loss" in table.column_names:
                seen = table.filter(table["choice_loss"].is_valid())
                axes.plot(seen["epoch"], seen["choice_loss"], "o-", color=ACCENT, ms=3.5, lw=1)
        axes.set_title(judge, loc="left", color=INK, size=10)
        axes.set_xlabel("epochs")
        axes.grid(True, axis="y")
    return figure


def rows_axis(axes: Axes, names: Sequence[str]) -> None:
    """Name the rows of a dot chart, the first on top."""
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.margins(x=0.06)
    axes.grid(True, axis="x")
    axes.spines["left"].set_visible(False)


FIGURES: dict[str, Callable[[Figures], Figure]] = {
    "log_loss": _log_loss,
    "reliability": lambda metrics: _reliability(_deployed(metrics)),
    "reliability_folds": lambda metrics: _reliability(_out_of_fold(metrics)),
    "variants": _variants,
    "cascade": _cascade,
}
"""The drawings of the report, `<name>.svg`."""
