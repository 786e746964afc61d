"""Print the results of `metrics.json` on the terminal, in eighty columns."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from arena_distill.evaluation.benchmarks import print_benchmarks
from arena_distill.evaluation.contradictions import describe_contradictions
from arena_distill.evaluation.ranking import describe_ranking, shown_ranking
from arena_distill.evaluation.slices import FEWEST, OTHER, slice_records
from arena_distill.evaluation.tables import variant_records
from arena_distill.evaluation.voters import describe_voters, shown_voters
from arena_distill.metrics import Figures
from arena_distill.scoring.stacks import describe as describe_stack

SLICES_SHOWN = 8
"""Slices of a kind that are printed, the largest ones."""

LUCK = "Intervals are by prompt: the luck of the battles, not of training"


def print_table(metrics: Figures, console: Console | None = None) -> None:
    """Print the results of `metrics.json`: judges and baselines, test variants, quantisation."""
    console = console or Console()
    final, test = metrics["final"], metrics["test"]
    console.print(f"\n[bold]{metrics['run']}[/bold]: {describe_headline(metrics)}")
    console.print(
        f"\nThe folds' models: log loss by fold and over all, {metrics['rows']:,} battles out of fold\n"
    )
    console.print(_judges_table(metrics))
    legend = "* final judge"
    if metrics["baselines"]["bayes"]:
        legend += "; gap: the way from the class prior (0%) to Bayes (100%)"
    console.print(legend, style="dim")
    for name, judge in metrics["judges"].items():
        if "warning" in judge:
            console.print(f"warning: {name} {judge['warning']}", style="bold red")
    optimistic = [name for name, judge in metrics["judges"].items() if judge.get("optimistic")]
    if optimistic:
        console.print(
            f"optimistic out of fold: {', '.join(optimistic)}, because their teachers were trained on "
            "these votes (the test battles are not affected)",
            style="dim",
        )
    for stack in [judge["stack"] for judge in metrics["judges"].values() if "stack" in judge]:
        console.print(describe_stack(stack), style="dim" if stack["pays"] else "")
    privileged = [name for name, judge in metrics["judges"].items() if judge.get("privileged")]
    if privileged:
        console.print(
            f"read the models' names, which others do not: {', '.join(privileged)}", style="dim"
        )
    if test:
        console.print(
            f"\n[bold]{final['judge']}[/bold]: log loss (accuracy) on {test['rows']:,} "
            "test battles\n"
        )
        console.print(_variants_table(metrics))
        console.print("* submitted", style="dim")
    if records := slice_records(metrics):
        of = records[-1]["battles"]  # of test battles where their votes are known
        shown = [record for record in records if record["battles"] == of]
        console.print(f"\n[bold]{final['judge']}[/bold]: by slice, {of}\n")
        console.print(_slices_table(shown))
        legend = f"slices of fewer than {FEWEST} battles are pooled as {OTHER}"
        console.print(f"{legend}; all in tables/slices.csv. {LUCK}", style="dim")
    if voters := shown_voters(metrics):
        console.print(f"\n{describe_voters(voters)}")
    console.print(f"\n{describe_ranking(shown_ranking(metrics))}")
    console.print(f"\n{describe_contradictions(metrics['contradictions'])}")
    if metrics["benchmarks"]:
        console.print(f"\n[bold]{final['judge']}[/bold]: right answers on benchmarks\n")
        print_benchmarks(metrics["benchmarks"], console)
    if final["gptq"]:
        console.print(f"\nGPTQ of {final['judge']}: {describe_drift(final['gptq'])}")


def describe_headline(metrics: Figures) -> str:
    """The score of the deployed model, in a sentence."""
    judge, found = metrics["final"]["judge"], metrics["headline"]
    if found is None:
        return f"{judge} has no score: no test votes are known, and no battles held out (folds.holdout)"
    log_loss, accuracy = found["log_loss"], found["accuracy"]
    battles = "test" if found["battles"] == "test" else "held-out"
    between = ""
    if log_loss["low"] is not None:
        between = f" ({log_loss['low']:.4f} to {log_loss['high']:.4f})"
    return (
        f"{judge} ({found['model']}, as deployed) has log loss {log_loss['value']:.4f}{between} "
        f"and accuracy {accuracy['value']:.1%} "
        f"on {found['rows']:,} {battles} battles that nothing was trained on"
    )


def describe_drift(gptq: Figures) -> str:
    """One line: size before and after; drift on the test battles, else on training battles."""
    before, after = gptq["bytes_before"], gptq["bytes"]
    figures, battles = (gptq["test"], "test") if gptq["test"] else (gptq, "training")
    line = (
        f"{before / 1e6:,.1f} → {after / 1e6:,.1f} MB ({before / after:.1f}× smaller), on {battles} "
        f"battles KL {figures['kl']:.1e} nats, {figures['flip_rate']:.2%} of verdicts change"
    )
    change = figures["log_loss_change"]
    return line if change is None else f"{line}, log loss {change:+.5f}"


def _judges_table(metrics: Figures) -> Table:
    folds = [str(fold["fold"]) for fold in metrics["folds"]]
    table = _table(["judge", "taught by"], [*folds, "all", "acc.", "ECE", "gap"])
    final = metrics["final"]["judge"]
    rows = [(name, "–", f, f) for name, f in metrics["baselines"].items() if f]
    for name, figures in metrics["judges"].items():
        teachers = figures["teachers"]
        learned = "external" if figures.get("external") else "votes"
        taught_by = f"{len(teachers)} judges" if len(teachers) > 1 else (*teachers, learned)[0]
        if "stack" in figures:
            taught_by = f"stack of {len(figures['stack']['members'])}"
        rows.append((name, taught_by, figures, figures["oof"]))
    for name, teachers, figures, overall in rows:
        closed = figures["gap_closed"]
        judged = figures is not overall
        chosen = judged and name == final
        table.add_row(
            f"{name} *" if chosen else name,
            teachers,
            *(f"{part['log_loss']:.3f}" for part in figures["folds"]),
            f"{overall['log_loss']:.4f}",
            f"{overall['accuracy']:.1%}",
            f"{overall['ece']:.3f}" if "ece" in overall else "–",
            "–" if closed is None else f"{closed:.0%}",
            style="bold" if chosen else None if judged else "dim",
        )
    return table


def _variants_table(metrics: Figures) -> Table:
    test = metrics["test"]
    table = _table(["lengths/orders"], list(test["models"]))
    for name, figures in test["baselines"].items():
        if figures:
            table.add_row(name, *[_cell(figures)] * len(test["models"]), style="dim")
    for variant in dict.fromkeys(record["variant"] for record in variant_records(metrics)):
        cells = []
        for model, variants in test["models"].items():
            submitted = test["submitted"] == {"model": model, "variant": variant}
            cell = _cell(variants[variant])
            cells.append(f"[bold]* {cell}[/bold]" if submitted else cell)
        table.add_row(variant, *cells)
    return table


def _slices_table(records: Sequence[Figures]) -> Table:
    """The largest slices of each kind."""
    numbers = ["battles", "log loss", "95% interval", "acc.", "ECE", "prior", "trees"]
    table = _table(["", "slice"], numbers)
    for by in dict.fromkeys(record["by"] for record in records):
        for record in [record for record in records if record["by"] == by][:SLICES_SHOWN]:
            table.add_row(
                by,
                Text(record["slice"]),
                f"{record['rows']:,}",
                f"{record['log_loss']:.4f}",
                "–" if record["low"] is None else f"{record['low']:.3f}–{record['high']:.3f}",
                f"{record['accuracy']:.1%}",
                f"{record['ece']:.3f}",
                f"{record['class_prior']:.3f}",
                f"{record['surface']:.3f}",
            )
    return table


def _table(names: Sequence[str], numbers: Sequence[str]) -> Table:
    """An empty table, narrow enough for five folds in 80 columns."""
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="underline")
    for i, name in enumerate(names):
        table.add_column(name, no_wrap=i == 0, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _cell(figures: Figures) -> str:
    return f"{figures['log_loss']:.4f} ({figures['accuracy']:.1%})"
