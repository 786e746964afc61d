"""Define the command line for users; the commands of the rules are in ``phase_cli``."""

from __future__ import annotations

import gc
import json
import logging
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from arena_distill.config.vocabulary import Family
from arena_distill.errors import InputError, Stopped, foreign, refusing
from arena_distill.phase_cli import app as phase_cli
from arena_distill.runtime import launch

if TYPE_CHECKING:
    from arena_distill.config.source import Source
    from arena_distill.judging.judge import Judge

app = typer.Typer(
    help="Distil big preference judges into a small one you can deploy.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(phase_cli.app, name="phase")


def main() -> NoReturn:
    """Run a command; on bad input, print one line on stderr and exit with status 1."""
    launch.ignore_signals()
    gc.set_threshold(
        10_000
    )  # what imports make, a million objects, stays: looking through it is vain
    try:
        app(prog_name="arena-distill")
    except Stopped as stopped:
        launch.print_error(f"stopped: {stopped}")
        sys.exit(128 + stopped.received)
    except Exception as error:
        told = str(error) if isinstance(error, InputError) else foreign(error)
        if told is None:
            raise
        lines = (_printable(line) for line in told.splitlines())
        launch.print_error("\n".join(f"error: {line}" for line in lines))
        sys.exit(1)
    sys.exit(0)


def _printable(line: str) -> str:
    """Write what a terminal would obey, from names of files or cells, as Python's escapes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def plan(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON with every job.")] = False,
    cheaper: Annotated[
        bool, typer.Option("--cheaper", help="Also look for settings that cost less.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="Also write the JSON there.")] = None,
) -> None:
    """Report what a run will cost: memory, time, GPU-hours, disk; exits with 1 if a job cannot fit.

    All other arguments are passed to snakemake: --configfile, --config, --profile, targets.
    """
    from arena_distill.files.artifacts import write_json
    from arena_distill.planning.forecast import forecast, print_forecast

    found = forecast(context.args, cheaper=cheaper)
    if output:
        write_json(found.as_json(), output)
    if as_json:
        print(json.dumps(found.as_json(), indent=2))
    else:
        print_forecast(found)


@app.command()
def init(
    battles: Annotated[str, typer.Argument(help="Labelled battles: a file, folder or pattern.")],
    output: Annotated[Path, typer.Option(help="The configuration to write.")] = Path("arena.yaml"),
    test: Annotated[str | None, typer.Option(help="Battles to predict.")] = None,
    holdout_test: Annotated[
        float | None, typer.Option(help="Or: hold out this share of the prompts for the test.")
    ] = None,
    backbone: Annotated[
        str | None, typer.Option(help="A local model's folder; else tiny models that come along.")
    ] = None,
) -> None:
    """Write a first configuration for your battles and this machine."""
    from arena_distill.planning.proposal import propose

    propose(battles, output, test=test, holdout_test=holdout_test, backbone=backbone)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def check(context: typer.Context) -> None:
    """Report everything that will fail, before anything runs; exits with 1 if there is something.

    All other arguments are those of snakemake: --configfile, --config, --profile, --directory.
    """
    from arena_distill.runs.graph import read_findings

    found, looked_at = read_findings(context.args)
    if found:
        raise InputError("\n".join(finding.line for finding in found))
    print("nothing found. Looked at:")
    print("\n".join(f"  {line}" for line in looked_at))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def status(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON with every job.")] = False,
) -> None:
    """Report which jobs are done, running, waiting or failed, and why; exits with 1 if a job failed.

    All other arguments are passed to snakemake: --configfile, --directory, --profile, targets.
    """
    from arena_distill.runs.status import read_status
    from arena_distill.runs.status_table import print_status

    found = read_status(context.args)
    if as_json:
        print(json.dumps(found.as_json(), indent=2))
    else:
        print_status(found)
    raise typer.Exit(int(found.counts["failed"] > 0))


# How a file of battles is read, for every command that reads one.
Format = Annotated[str, typer.Option(help="What it is, where columns do not tell.")]
Columns = Annotated[list[str] | None, typer.Option(help="OUR_NAME=NAME_IN_FILE (repeatable).")]
Text = Annotated[str, typer.Option(help="auto, plain or turns.")]
System = Annotated[str, typer.Option(help="turn or drop.")]
Escape = Annotated[str, typer.Option(help="none or backslash.")]


@app.command()
def formats(
    file: Annotated[str, typer.Argument(help="A file, a folder of shards, or a quoted pattern.")],
    format: Format = "auto",
    columns: Columns = None,
    text: Text = "auto",
    ties: Annotated[
        list[str] | None, typer.Option(help="WORD=tie or WORD=drop (repeatable).")
    ] = None,
    missing_votes: Annotated[str, typer.Option(help="refuse or keep.")] = "refuse",
    system: System = "turn",
    escape: Escape = "none",
    votes: Annotated[bool, typer.Option(help="Whether it has votes.")] = True,
) -> None:
    """Show how a file of battles is understood: its format, counts, refused rows, three battles."""
    from arena_distill.battles.preview import print_preview

    keys = {"format": format, "columns": _pairs(columns), "text": text, "ties": _pairs(ties)}
    keys |= {"missing_votes": missing_votes, "system": system, "escape": escape}
    print_preview(_source(file, **keys), votes=votes)


def _source(path: str, **keys: Any) -> Source:
    """Options as a source of the configuration."""
    from arena_distill.config.phases.settings import parse
    from arena_distill.config.source import Source

    return parse(Source, json.dumps({"path": path, **keys}))


def _pairs(options: list[str] | None) -> dict[str, str | None]:
    return {name: value or None for name, _, value in (o.partition("=") for o in options or ())}


# --- the judge ----------------------------------------------------------------------------------------


JudgeFolder = Annotated[str, typer.Argument(help="A finished judge: results/RUN/merged/JUDGE.")]
Server = Annotated[
    str | None, typer.Option(help="Ask this running server (vLLM, or ours) for the model's part.")
]
Tolerance = Annotated[
    float | None,
    typer.Option(
        help="How far a server's probabilities of the test vectors may be; default: by its dtype."
    ),
]


@app.command()
def predict(
    judge: JudgeFolder,
    battles: Annotated[str, typer.Argument(help="A file, a folder, a pattern, or - for stdin.")],
    output: Annotated[
        str, typer.Option("--output", "-o", help=".parquet, .csv, .jsonl, or - for stdout.")
    ],
    server: Server = None,
    tolerance: Tolerance = None,
    format: Format = "auto",
    columns: Columns = None,
    text: Text = "auto",
    system: System = "turn",
    escape: Escape = "none",
    device: Annotated[str | None, typer.Option(help="Such as cuda:1; default: a free GPU.")] = None,
    batch_tokens: Annotated[int, typer.Option(help="Tokens per forward pass.", min=1)] = 16384,
) -> None:
    """Judge the battles of files; after a kill, the same command goes on where it was.

    A server is first asked the judge's test vectors.
    """
    from arena_distill.config.phases.settings import parse
    from arena_distill.config.source import Reading
    from arena_distill.judging.predict import predict_files

    keys = {"format": format, "columns": _pairs(columns), "text": text}
    reading = parse(Reading, json.dumps({**keys, "system": system, "escape": escape}))
    asked = _checked(judge, server, tolerance, device=device, batch_tokens=batch_tokens)
    done = predict_files(asked.contract, asked.predict, battles, reading, output)
    print(f"{output}: {done.battles:,} battles judged by {asked.contract.judge}", file=sys.stderr)


@app.command()
def serve(
    judge: JudgeFolder,
    host: Annotated[
        str,
        typer.Option(help="Where to listen; beyond this machine, ARENA_SERVER_TOKEN is needed."),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any free one.", min=0, max=65535)] = 8000,
    device: Annotated[str | None, typer.Option(help="Such as cuda:1; default: a free GPU.")] = None,
    batch_tokens: Annotated[int, typer.Option(help="Tokens per forward pass.", min=1)] = 16384,
    queue_tokens: Annotated[
        int, typer.Option(help="The most tokens that wait; beyond them, status 503.", min=1)
    ] = 1 << 18,
    requests: Annotated[
        int, typer.Option(help="The most requests at work; beyond them, status 503.", min=1)
    ] = 128,
    timeout: Annotated[
        float, typer.Option(help="Seconds for an answer; beyond them, status 504.", min=0.1)
    ] = 120,
) -> None:
    """Serve a judge over HTTP, with a page for people; Ctrl-C ends it after the last answer."""
    from arena_distill.judging.server.guard import Limits
    from arena_distill.judging.server.serving import serve

    serve(
        judge,
        host=host,
        port=port,
        limits=Limits(requests=requests, seconds=timeout),
        queue_tokens=queue_tokens,
        batch_tokens=batch_tokens,
        device=device,
    )


@app.command()
def compare_answers(
    judge: JudgeFolder,
    prompt: Annotated[str, typer.Option(help="What was asked.")],
    a: Annotated[str, typer.Option("--a", help="The first answer.")],
    b: Annotated[str, typer.Option("--b", help="The second answer.")],
    server: Server = None,
    tolerance: Tolerance = None,
) -> None:
    """Judge one battle, and print the verdict as JSON."""
    asked = _checked(judge, server, tolerance)
    print(json.dumps(asdict(asked.compare(prompt, a, b)), indent=2))


@app.command()
def verify(
    judge: JudgeFolder,
    server: Server = None,
    tolerance: Tolerance = None,
) -> None:
    """Compare a judge, or a server of it, with its test vectors; exits with 1 if they differ.

    Without a server, the files of the judge are also compared with their fingerprints.
    """
    from arena_distill.judging.judge import local_folder
    from arena_distill.judging.vectors import print_verification

    folder = None if server else local_folder(judge)
    passed = print_verification(_judge(judge, server), tolerance, folder)
    raise typer.Exit(int(not passed))


@app.command()
def benchmark(
    judge: JudgeFolder,
    benchmarks: Annotated[
        list[str],
        typer.Argument(
            help="NAME=PATH of each file, folder of shards or quoted pattern; those of one name together."
        ),
    ],
    output: Annotated[Path | None, typer.Option(help="Also write the figures there, JSON.")] = None,
    learned: Annotated[
        Path | None, typer.Option(help="results/RUN/battles.parquet: count prompts it learned.")
    ] = None,
    server: Server = None,
    device: Annotated[str | None, typer.Option(help="Such as cuda:1; default: a free GPU.")] = None,
) -> None:
    """Count how often a judge prefers the better answer: LLMBar, JudgeBench, RM-Bench, RewardBench, PPE."""
    from arena_distill.config.phases.evaluation import BenchmarkSettings
    from arena_distill.config.phases.settings import VERSIONS
    from arena_distill.evaluation.benchmarks import benchmark, learned_prompts, print_benchmarks
    from arena_distill.files.artifacts import write_json

    if unnamed := [given for given in benchmarks if not all(given.partition("=")[::2])]:
        raise InputError(f"{unnamed[0]}: NAME=PATH expected, such as llmbar={unnamed[0]}")
    sources = BenchmarkSettings(version=VERSIONS["benchmarks"]).files_of(benchmarks)
    prompts = learned_prompts(learned) if learned else None
    found = benchmark(_judge(judge, server, device=device).predict, sources, prompts)
    print_benchmarks(found)
    if output:
        write_json(found, output)


Yes = Annotated[bool, typer.Option("--yes", help="Send without a question, in scripts.")]


@app.command()
def push(
    judge: Annotated[Path, typer.Argument(help="A finished judge: results/RUN/merged/JUDGE.")],
    to: Annotated[str, typer.Option(help="hub:ORG/NAME or kaggle:OWNER/MODEL/VARIATION.")],
    public: Annotated[bool, typer.Option("--public", help="Anybody may read it.")] = False,
    yes: Yes = False,
) -> None:
    """Publish a judge, private by default; shows what will be sent, and asks."""
    from arena_distill.judging.publishing import Address
    from arena_distill.judging.publishing import push as publish

    publish(judge, Address.parse(to), public=public, agree=_agree(yes))


@app.command()
def submit(
    run: Annotated[Path, typer.Argument(help="The folder of a run: results/RUN.")],
    to: Annotated[str, typer.Option(help="kaggle:COMPETITION.")],
    message: Annotated[str | None, typer.Option(help="What it is called there.")] = None,
    yes: Yes = False,
) -> None:
    """Submit a run's submission.csv to a competition; shows what will be sent, and asks."""
    from arena_distill.judging.publishing import submit as send

    send(run, to, message=message, agree=_agree(yes))


def _agree(yes: bool) -> Callable[[str], bool]:
    """Ask on the terminal, no by default; nobody there is a no."""

    def asked(question: str) -> bool:
        try:
            return typer.confirm(question)
        except typer.Abort:
            raise InputError("nobody answered, nothing was sent; in a script, give --yes") from None

    return (lambda _: True) if yes else asked


def _checked(folder: str, server: str | None, tolerance: float | None, **options: Any) -> Judge:
    """A judge to ask; a server has answered its test vectors."""
    judge = _judge(folder, server, **options)
    if server:
        from arena_distill.judging.vectors import refuse_another_judge

        refuse_another_judge(judge, folder, server, tolerance)
    return judge


def _judge(folder: str, server: str | None, **options: Any) -> Judge:
    if server:  # the environment of quantised judges lacks what a client needs
        from arena_distill.judging.clients import judge_on

        return judge_on(folder, server)
    from arena_distill.judging.judge import Judge

    return Judge.from_pretrained(folder, **options)


# --- the package ---------------------------------------------------------------------------------------


@app.command()
def show_results(
    metrics: Annotated[Path, typer.Argument(help="results/<run>/metrics.json")],
) -> None:
    """Print the result table."""
    from arena_distill.config.phases.settings import VERSIONS
    from arena_distill.evaluation.terminal import print_table
    from arena_distill.files.artifacts import read_json

    figures = read_json(metrics)
    with refusing(f"{metrics}: not the figures of a run"):
        made = figures["provenance"]["evaluation"]["settings"]["version"]
        if made != VERSIONS["evaluation"]:
            raise InputError(
                f"{metrics}: figures of version {made}, and this program prints version "
                f"{VERSIONS['evaluation']}: run the workflow again, which computes them anew"
            )
        print_table(figures)


@app.command()
def pretrain_tiny(
    family: Annotated[Family, typer.Option(help="Architecture.")],
    output: Annotated[Path, typer.Option(help="The folder to write.")],
    battles: Annotated[int, typer.Option(help="Battles of the pool.")] = 40_000,
    epochs: Annotated[float, typer.Option(help="Passes over them.")] = 4,
    seed: Annotated[int, typer.Option(help="Seed of pool and weights.")] = 0,
) -> None:
    """Pretrain one of the tiny backbones that ship with the workflow, tokenizer included."""
    from arena_distill.models.tiny_backbones import pretrain_tiny

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    pretrain_tiny(family, output, battles=battles, epochs=epochs, seed=seed)
