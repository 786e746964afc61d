"""Define the commands of the rules, `arena-distill phase …`: one per rule, in the order of the data flow.

Each can be run by hand. `--settings` takes the rule's settings: JSON of one of the models in
``config.phases`` (``snakemake -n -p`` prints it). A command imports its phase when it runs, so `--help`
and small jobs start fast, without torch.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from arena_distill.config import judge, run
from arena_distill.config import phases as phase
from arena_distill.config.external import EndpointLimits
from arena_distill.config.phases import parse
from arena_distill.config.vocabulary import ModelKind
from arena_distill.runtime import launch
from arena_distill.runtime.launch import Launch

app = typer.Typer(
    help="The phases of the workflow, as the rules run them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Settings = Annotated[str, typer.Option(help="The phase's settings, as JSON.")]
Backbone = Annotated[Path, typer.Option(help="Hugging Face folder, or its config.json.")]
Tokens = Annotated[Path, typer.Option(help="tokens/<tokenizer>/battles.parquet")]
Battles = Annotated[Path, typer.Option(help="battles.parquet")]
Folds = Annotated[Path, typer.Option(help="folds.parquet")]
TestVotes = Annotated[Path | None, typer.Option(help="test_votes.parquet, where they are known.")]
Features = Annotated[Path, typer.Option(help="features/<judge>")]
TeacherLogits = Annotated[
    list[str] | None,
    typer.Option(help="A student's targets: <teacher>=logits/<teacher>/fold_<k>.npy"),
]
Fold = Annotated[int, typer.Option(help="0 to n - 1.", min=0)]
Output = Annotated[Path, typer.Option(help="What to write.")]
BatchTokens = Annotated[int, typer.Option(help="Tokens per forward pass, padding included.", min=1)]
Gpus = Annotated[int, typer.Option(help="GPUs of this job; 0: the CPU.", min=0)]
Attention = Annotated[judge.Attention, typer.Option(help="transformers' attention kernel.")]


def launched(command: Callable[..., None]) -> Callable[..., None]:
    """A training command: the fields of its `Launch` are options, and it starts as they say."""
    options = inspect.signature(Launch, eval_str=True).parameters
    own = inspect.signature(command, eval_str=True).parameters

    @functools.wraps(command)
    def run(**given: Any) -> None:
        how = Launch(**{name: given.pop(name) for name in options})
        launch.start(how)
        command(**given, how=how)

    shown = [*(p for p in own.values() if p.name != "how"), *options.values()]
    run.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    return run


# --- battles and folds ------------------------------------------------------------------------------


@app.command()
def fetch_battles(output: Output, settings: Settings) -> None:
    """Fetch a file of battles from Kaggle, or a folder of them from the Hugging Face hub."""
    from arena_distill.battles.fetching import fetch_battles

    fetch_battles(output, settings=parse(phase.FetchSettings, settings))


@app.command()
def simulate_arena(output: Output, settings: Settings) -> None:
    """Write the synthetic arena: train, extra, ut and test battles, and their true probabilities."""
    from arena_distill.battles.simulation import write_arena

    write_arena(output, settings=parse(phase.ArenaSettings, settings))


@app.command()
def read_battles(
    output: Output,
    rejected: Annotated[Path, typer.Option(help="Where refused rows go.")],
    reading: Annotated[Path, typer.Option(help="Where the counts go, as JSON.")],
    settings: Settings,
    train: Annotated[list[Path], typer.Option(help="Labelled battles (repeatable).")],
    test: Annotated[list[Path], typer.Option(help="Battles to predict (repeatable).")],
    extra: Annotated[list[Path] | None, typer.Option(help="More labelled battles.")] = None,
    ut: Annotated[list[Path] | None, typer.Option(help="Battles for post-pretraining.")] = None,
    unlabelled: Annotated[
        list[Path] | None, typer.Option(help="Battles that students learn from teachers alone.")
    ] = None,
) -> None:
    """Read published preferences into canonical battles."""
    from arena_distill.battles.reading import write_battles

    parsed = parse(phase.BattlesSettings, settings)
    given = {"train": train, "extra": extra, "ut": ut, "test": test, "unlabelled": unlabelled}
    files = {name: parsed.files_of(name, some or []) for name, some in given.items()}
    write_battles(files, output, rejected, reading, parsed)


@app.command()
def read_solution(
    battles: Battles,
    solution: Annotated[Path, typer.Option(help="The test battles' votes, as Kaggle has them.")],
    output: Output,
    settings: Settings,
) -> None:
    """Read the votes of the test battles, which nothing is trained on."""
    from arena_distill.battles.solution import write_test_votes

    write_test_votes(solution, battles, output, parse(phase.SolutionSettings, settings))


@app.command()
def assign_folds(battles: Battles, output: Output, settings: Settings) -> None:
    """Assign the training battles to folds."""
    from arena_distill.battles.folds import write_folds

    write_folds(battles, output, settings=parse(phase.FoldsSettings, settings))


@app.command()
def check_counts(battles: Battles, folds: Folds, output: Output, settings: Settings) -> None:
    """Count what each training learns from, and refuse what the battles are too few for."""
    from arena_distill.battles.counts import write_counts

    write_counts(battles, folds, output, settings=parse(phase.CountSettings, settings))


@app.command()
def audit_leaks(
    battles: Battles,
    folds: Folds,
    output: Output,
    table: Annotated[Path, typer.Option(help="CSV file for the worst examples.")],
    settings: Settings,
) -> None:
    """Count battles whose prompt is also in a judge's training battles."""
    from arena_distill.battles.audit import write_audit

    write_audit(battles, folds, output, table, settings=parse(phase.AuditSettings, settings))


# --- backbones and tokens ---------------------------------------------------------------------------


@app.command()
def prepare_backbone(
    output: Output,
    settings: Settings,
    source: Annotated[
        Path | None, typer.Argument(help="The folder of the whole model from the hub.")
    ] = None,
) -> None:
    """Make a Hugging Face folder from a hub model, a GGUF file or a model's first layers."""
    from arena_distill.models.preparation import prepare_backbone

    prepare_backbone(output, settings=parse(phase.BackboneSettings, settings), source=source)


@app.command()
def tokenize_battles(
    battles: Battles, backbone: Backbone, output: Output, settings: Settings
) -> None:
    """Tokenise every field of every battle, once per tokenizer."""
    from arena_distill.encoding.tokenization import tokenize_battles

    parsed = parse(phase.TokensSettings, settings)
    tokenize_battles(battles, _folder(backbone), output, settings=parsed)


# --- judges -----------------------------------------------------------------------------------------


@app.command()
@launched
def pretrain_adapter(
    backbone: Backbone,
    tokens: Tokens,
    output: Output,
    settings: Settings,
    how: Launch,
) -> None:
    """Post-pretrain a judge's adapter on UT battles."""
    from arena_distill.training.trainer import pretrain_adapter

    pretrain_adapter(
        _folder(backbone),
        tokens,
        output,
        settings=parse(phase.PretrainingSettings, settings),
        launch=how,
    )


@app.command()
@launched
def train_fold(
    backbone: Backbone,
    tokens: Tokens,
    folds: Folds,
    fold: Fold,
    output: Output,
    settings: Settings,
    how: Launch,
    pretrained: Annotated[Path | None, typer.Option(help="Post-pretrained adapter.")] = None,
    teacher_logits: TeacherLogits = None,
) -> None:
    """Train one fold's judge: on votes, or distilled from its teachers' logits."""
    from arena_distill.training.trainer import train_fold

    parsed = parse(phase.TrainingSettings, settings)
    train_fold(
        _folder(backbone),
        pretrained,
        tokens,
        folds,
        fold,
        output,
        teachers=_by_judge(teacher_logits or (), parsed.teachers),
        settings=parsed,
        launch=how,
    )


@app.command()
def read_features(
    backbone: Backbone,
    tokens: Tokens,
    output: Output,
    settings: Settings,
    batch_tokens: BatchTokens = 16384,
    gpus: Gpus = 0,
    attention: Attention = "auto",
) -> None:
    """Read every battle once with the backbone of a frozen judge."""
    launch.claim_gpus(gpus)
    from arena_distill.training.features import write_features

    write_features(
        _folder(backbone),
        tokens,
        output,
        settings=parse(phase.FeatureSettings, settings),
        batch_tokens=batch_tokens,
        attention=attention,
    )


@app.command()
def fit_probe(
    features: Features,
    folds: Folds,
    fold: Fold,
    output: Output,
    settings: Settings,
    teacher_logits: TeacherLogits = None,
) -> None:
    """Fit the head of a frozen judge's fold: on votes, or on its teachers' logits."""
    from arena_distill.training.probe import fit_probe

    parsed = parse(phase.ProbeSettings, settings)
    teachers = _by_judge(teacher_logits or (), parsed.teachers)
    fit_probe(features, folds, fold, output, teachers=teachers, settings=parsed)


@app.command()
def score_probe(
    features: Features,
    probe: Annotated[Path, typer.Option(help="The fold's head.")],
    folds: Folds,
    fold: Fold,
    output: Output,
    settings: Settings,
) -> None:
    """Score a fold's battles with a frozen judge's head, in both orders."""
    from arena_distill.scoring.logits import score_probe

    parsed = parse(phase.LogitsSettings, settings)
    score_probe(features, probe, folds, fold, output, settings=parsed)


@app.command()
def merge_probes(
    backbone: Backbone,
    output: Output,
    settings: Settings,
    probes: Annotated[list[Path], typer.Argument(help="The folds' heads.")],
) -> None:
    """Put the mean of a frozen judge's heads on its backbone."""
    from arena_distill.deployment.frozen import merge_probes

    parsed = parse(phase.MergeSettings, settings)
    merge_probes(_folder(backbone), probes, output, settings=parsed)


@app.command()
def predict_logits(
    backbone: Backbone,
    adapter: Annotated[Path, typer.Option(help="The fold's adapter folder.")],
    tokens: Tokens,
    folds: Folds,
    fold: Fold,
    output: Output,
    settings: Settings,
    shard: Annotated[int, typer.Option(help="0 to --shards - 1.", min=0)] = 0,
    shards: Annotated[int, typer.Option(help="Jobs that share the fold.", min=1)] = 1,
    batch_tokens: BatchTokens = 16384,
    gpus: Gpus = 0,
    attention: Attention = "auto",
) -> None:
    """Score a fold's battles, or one shard of them, in both orders."""
    launch.claim_gpus(gpus)
    from arena_distill.scoring.logits import predict_logits

    predict_logits(
        _folder(backbone),
        adapter,
        tokens,
        folds,
        fold,
        output,
        settings=parse(phase.LogitsSettings, settings),
        batch_tokens=batch_tokens,
        shard=shard,
        shards=shards,
        attention=attention,
    )


@app.command()
def gather_logits(
    folds: Folds,
    fold: Fold,
    output: Output,
    settings: Settings,
    shards: Annotated[list[Path], typer.Argument(help="The shards' .npy files.")],
) -> None:
    """Join the shards of a fold."""
    from arena_distill.scoring.logits import gather_logits

    gather_logits(shards, folds, fold, output, settings=parse(phase.LogitsSettings, settings))


# --- external judges --------------------------------------------------------------------------------


@app.command()
def query_endpoint(
    battles: Battles,
    output: Output,
    cost: Annotated[Path, typer.Option(help="File for token counts and cost.")],
    answers: Annotated[Path, typer.Option(help="Folder of the stored answers.")],
    settings: Settings,
    limits: Annotated[str, typer.Option(help="Limits of the requests, as JSON.")],
) -> None:
    """Query an OpenAI-compatible endpoint for all labelled battles in both orders."""
    launch.lock_output(answers)
    from arena_distill.scoring.external import query_endpoint

    query_endpoint(
        battles,
        output,
        cost,
        answers,
        settings=parse(phase.QuerySettings, settings),
        limits=parse(EndpointLimits, limits),
    )


@app.command()
def read_external_logits(
    battles: Battles,
    file: Annotated[Path, typer.Option(help="A judge's logits: parquet, CSV or JSONL.")],
    output: Output,
    settings: Settings,
) -> None:
    """Read the logits of all labelled battles from a file."""
    from arena_distill.scoring.external import read_external_logits

    read_external_logits(file, battles, output, settings=parse(phase.Settings, settings))


@app.command()
def split_external_logits(
    logits: Annotated[Path, typer.Option(help="external/<judge>/logits.npy")],
    folds: Folds,
    fold: Fold,
    output: Output,
    settings: Settings,
) -> None:
    """Write a fold's rows of an external judge's logits."""
    from arena_distill.scoring.external import split_external_logits

    split_external_logits(
        logits, folds, fold, output, settings=parse(phase.LogitsSettings, settings)
    )


# --- stacks -----------------------------------------------------------------------------------------


MembersLogits = Annotated[
    list[Path], typer.Argument(help="The members' .npy files, in their order.")
]
StackWeights = Annotated[Path, typer.Option(help="stacks/<judge>.json")]


@app.command()
def fit_stack(
    folds: Folds,
    output: Output,
    settings: Settings,
    logits: Annotated[
        list[str], typer.Argument(help="<judge>=logits/<judge>/fold_<k>.npy, in the folds' order.")
    ],
    surface: Annotated[Path | None, typer.Option(help="surface.parquet")] = None,
) -> None:
    """Fit the weights of a stack's members, and score it out of fold."""
    from arena_distill.scoring.stacks import fit_stack

    parsed = parse(phase.StackSettings, settings)
    fit_stack(_by_judge(logits, parsed.members), folds, output, settings=parsed, surface=surface)


@app.command()
def combine_fold(
    stack: StackWeights,
    folds: Folds,
    fold: Fold,
    output: Output,
    settings: Settings,
    logits: MembersLogits,
    battles: Annotated[Path | None, typer.Option(help="battles.parquet, for trees.")] = None,
) -> None:
    """Combine a fold's logits of a stack's members."""
    from arena_distill.scoring.stacks import combine_fold

    parsed = parse(phase.StackedLogitsSettings, settings)
    combine_fold(logits, stack, folds, fold, output, settings=parsed, battles=battles)


@app.command()
def combine_views(
    stack: StackWeights,
    output: Output,
    settings: Settings,
    logits: MembersLogits,
    surface: Annotated[Path | None, typer.Option(help="surface.parquet")] = None,
) -> None:
    """Combine the final scores of a stack's members."""
    from arena_distill.prediction.stacked import combine_views

    parsed = parse(phase.StackedViewsSettings, settings)
    combine_views(logits, stack, output, settings=parsed, surface=surface)


# --- the deployable model ---------------------------------------------------------------------------


@app.command()
def merge_folds(
    backbone: Backbone,
    output: Output,
    settings: Settings,
    adapters: Annotated[list[Path], typer.Argument(help="The folds' adapters.")],
    tokens: Annotated[Path | None, typer.Option(help="For greedy weights.")] = None,
    folds: Annotated[Path | None, typer.Option(help="For weights other than equal.")] = None,
    logits: Annotated[
        list[Path] | None, typer.Option(help="The folds' logits, for validation weights.")
    ] = None,
    batch_tokens: BatchTokens = 16384,
    gpus: Gpus = 0,
) -> None:
    """Average the folds' adapters and heads and merge them into the backbone."""
    launch.claim_gpus(gpus)
    from arena_distill.deployment import fold_weights
    from arena_distill.deployment.merging import merge_folds

    parsed = parse(phase.MergeSettings, settings)
    weights = None
    if parsed.weights == "validation":
        assert folds and logits
        weights = fold_weights.validation_weights(logits, folds)
    elif parsed.weights == "greedy":
        assert folds and tokens
        weights = fold_weights.greedy_weights(
            _folder(backbone), adapters, tokens, folds, settings=parsed, batch_tokens=batch_tokens
        )
    merge_folds(
        _folder(backbone),
        adapters,
        output,
        settings=parsed,
        weights=weights,
    )


@app.command()
def quantize_model(
    model: Annotated[Path, typer.Option(help="The merged model.")],
    tokens: Tokens,
    output: Output,
    settings: Settings,
    batch_tokens: BatchTokens = 16384,
    gpus: Gpus = 0,
) -> None:
    """Quantise the merged model with GPTQ and measure its drift."""
    launch.claim_gpus(gpus)
    from arena_distill.deployment.gptq import quantize_judge

    quantize_judge(
        model,
        tokens,
        output,
        settings=parse(phase.QuantizationSettings, settings),
        batch_tokens=batch_tokens,
    )


@app.command()
def check_drift(
    model: Annotated[Path, typer.Option(help="The quantised model.")],
    output: Output,
    settings: Settings,
) -> None:
    """Fail if quantisation changed the model by more than the configured bound."""
    from arena_distill.deployment.quantization_error import DRIFT, check_drift

    check_drift(model / DRIFT, output, settings=parse(phase.DriftSettings, settings))


# --- predictions and results ------------------------------------------------------------------------


@app.command()
def score_test(
    model: Annotated[Path, typer.Option(help="The merged or quantised model.")],
    tokens: Tokens,
    output: Output,
    settings: Settings,
    quantized: Annotated[bool, typer.Option(help="The model is a GPTQ checkpoint.")] = False,
    folds: Annotated[
        Path | None, typer.Option(help="folds.parquet: score the held-out battles.")
    ] = None,
    batch_tokens: BatchTokens = 16384,
    gpus: Gpus = 0,
    attention: Attention = "auto",
) -> None:
    """Score the test battles, or the held-out ones, at every length and in every order."""
    launch.claim_gpus(gpus)
    from arena_distill.prediction.test_time import score_test

    parsed = parse(phase.ScoringSettings, settings)
    score_test(
        model,
        tokens,
        output,
        quantized=quantized,
        settings=parsed,
        batch_tokens=batch_tokens,
        attention=attention,
        folds=folds,
    )


@app.command()
def finish_judge(
    weights: Annotated[Path, typer.Option(help="The merged or quantised model.")],
    tokens: Tokens,
    output: Output,
    settings: Settings,
    kind: Annotated[ModelKind, typer.Option(help="What the weights are.")],
    predictions: Annotated[
        Path | None, typer.Option(help="predictions/<judge>/<model>.parquet")
    ] = None,
    test_votes: TestVotes = None,
    calibration: Annotated[
        Path | None, typer.Option(help="calibration/<judge>/<model>.json, with held-out battles.")
    ] = None,
    batch_tokens: BatchTokens = 16384,
    gpus: Gpus = 0,
    attention: Attention = "auto",
) -> None:
    """Finish a judge: link its weights, add judge.json with test vectors, and the model card."""
    launch.claim_gpus(gpus)
    from arena_distill.judging.finish import finish_judge

    finish_judge(
        weights,
        tokens,
        output,
        settings=parse(phase.JudgeSettings, settings),
        kind=kind,
        calibration=calibration,
        predictions=predictions,
        test_votes=test_votes,
        batch_tokens=batch_tokens,
        attention=attention,
    )


@app.command()
def run_benchmarks(
    judge: Annotated[Path, typer.Option(help="The finished judge's folder.")],
    battles: Battles,
    output: Output,
    settings: Settings,
    files: Annotated[list[str], typer.Argument(help="<benchmark>=<file>, of every file.")],
    batch_tokens: BatchTokens = 16384,
    gpus: Gpus = 0,
    attention: Attention = "auto",
) -> None:
    """Count how often a finished judge prefers the better answer of benchmarks."""
    launch.claim_gpus(gpus)
    from arena_distill.evaluation.benchmarks import write_benchmarks
    from arena_distill.judging.judge import Judge

    sources = parse(phase.BenchmarkSettings, settings).files_of(files)
    asked = Judge.from_pretrained(judge, attention=attention, batch_tokens=batch_tokens)
    write_benchmarks(asked.predict, sources, battles, output)


@app.command()
def fit_calibration(
    folds: Folds,
    battles: Battles,
    judge: Annotated[str, typer.Option(help="The judge's name.")],
    model: Annotated[ModelKind, typer.Option(help="The model of these logits.")],
    logits: Annotated[Path, typer.Option(help="logits/<judge>/<model>_held_out.npy")],
    output: Output,
    settings: Settings,
) -> None:
    """Calibrate a deployed model on the held-out battles, and score it there."""
    from arena_distill.prediction.held_out import fit_calibration

    parsed = parse(phase.CalibrationSettings, settings)
    fit_calibration(folds, battles, logits, output, judge=judge, model=model, settings=parsed)


@app.command()
def predict_test(
    output: Output,
    settings: Settings,
    logits: Annotated[Path, typer.Option(help="logits/<judge>/<model>_test.npy")],
    model: Annotated[ModelKind, typer.Option(help="The model of these logits.")],
    calibration: Annotated[
        Path | None, typer.Option(help="calibration/<judge>/<model>.json")
    ] = None,
    battles: Annotated[Path | None, typer.Option(help="battles.parquet, to calibrate")] = None,
) -> None:
    """Average the test logits over lengths and orders in every variant, and calibrate them."""
    from arena_distill.prediction.test_time import predict_test

    parsed = parse(phase.PredictionSettings, settings)
    predict_test(
        logits, output, model=model, settings=parsed, calibration=calibration, battles=battles
    )


@app.command()
def write_submission(
    predictions: Annotated[Path, typer.Option(help="predictions/<judge>/<model>.parquet")],
    battles: Battles,
    output: Output,
) -> None:
    """Write the submission, and check it against the test battles."""
    from arena_distill.prediction.submission import write_submission

    write_submission(predictions, battles, output)


@app.command()
def predict_surface(folds: Folds, battles: Battles, output: Output, settings: Settings) -> None:
    """Predict battles by trees over what shows on their surface."""
    from arena_distill.scoring.surface_trees import write_surface

    write_surface(folds, battles, output, settings=parse(phase.Settings, settings))


@app.command()
def evaluate(
    folds: Folds,
    battles: Battles,
    surface: Annotated[Path, typer.Option(help="surface.parquet")],
    rejected: Annotated[Path, typer.Option(help="rejected.parquet")],
    predictions: Annotated[
        list[Path], typer.Option(help="predictions/<judge>/<model>.parquet (repeatable).")
    ],
    output: Output,
    tables: Annotated[Path, typer.Option(help="Folder of the flat tables.")],
    settings: Settings,
    logits: Annotated[
        list[str], typer.Argument(help="<judge>=logits/<judge>/fold_<k>.npy, in the folds' order.")
    ],
    test_votes: TestVotes = None,
    quantized: Annotated[Path | None, typer.Option(help="The quantised model.")] = None,
    truth: Annotated[Path | None, typer.Option(help="The arena's true probabilities.")] = None,
    audit: Annotated[Path | None, typer.Option(help="audit.json")] = None,
    calibrations: Annotated[
        list[Path] | None, typer.Option(help="calibration/<judge>/<model>.json (repeatable).")
    ] = None,
    stacks: Annotated[
        list[Path] | None, typer.Option(help="stacks/<judge>.json (repeatable).")
    ] = None,
    test_logits: Annotated[
        Path | None, typer.Option(help="logits/<judge>/<model>_test.npy of the submitted model.")
    ] = None,
    benchmarked: Annotated[
        Path | None, typer.Option(help="benchmarked/<judge>_<model>.json of the submitted model.")
    ] = None,
) -> None:
    """Compute every figure of the run."""
    from arena_distill.deployment.quantization_error import DRIFT
    from arena_distill.evaluation.evaluate import evaluate

    parsed = parse(phase.EvaluationSettings, settings)
    evaluate(
        folds,
        battles,
        _by_judge(logits, parsed.judges),
        output,
        tables,
        settings=parsed,
        surface=surface,
        rejected=rejected,
        predictions=predictions,
        test_votes=test_votes,
        drift=quantized / DRIFT if quantized else None,
        truth=truth,
        audit=audit,
        calibrations=calibrations or (),
        stacks=stacks or (),
        test_logits=test_logits,
        benchmarked=benchmarked,
    )


@app.command()
def write_config(
    output: Output,
    settings: Annotated[str, typer.Option(help="What of the configuration decides, as JSON.")],
) -> None:
    """Write the configuration of a run."""
    from arena_distill.files.artifacts import write_text

    write_text(parse(run.Config, settings).described(), output)


@app.command()
def render_report(
    metrics: Annotated[Path, typer.Option(help="metrics.json")],
    config: Annotated[Path, typer.Option(help="The run's config.yaml.")],
    output: Output,
    parts: Annotated[Path, typer.Option(help="Folder of the separate figures.")],
) -> None:
    """Write the report, one HTML file."""
    from arena_distill.evaluation.report import render_report

    render_report(metrics, output, parts=parts, configuration=config)


@app.command()
def write_plan(
    output: Output,
    settings: Annotated[str, typer.Option(help="The configuration, as JSON.")],
    snakefile: Annotated[Path, typer.Option(help="The workflow.")],
) -> None:
    """Write the forecast of the run's cost."""
    from arena_distill.planning.forecast import write_forecast

    write_forecast(settings, snakefile, output)


# --- studies ----------------------------------------------------------------------------------------


@app.command()
def compare_soups(
    backbone: Backbone,
    tokens: Tokens,
    folds: Folds,
    output: Output,
    settings: Settings,
    adapters: Annotated[list[Path], typer.Argument(help="The folds' adapters.")],
    logits: Annotated[list[Path], typer.Option(help="The folds' logits, in their order.")],
    test_votes: TestVotes = None,
    batch_tokens: BatchTokens = 16384,
    gpus: Gpus = 0,
) -> None:
    """Score every way to make one model from a judge's folds."""
    launch.claim_gpus(gpus)
    from arena_distill.studies.averaging import compare_soups

    compare_soups(
        _folder(backbone),
        adapters,
        logits,
        tokens,
        folds,
        test_votes,
        output,
        settings=parse(phase.SoupSettings, settings),
        batch_tokens=batch_tokens,
    )


@app.command()
def draw_averaging(
    output: Annotated[
        Path, typer.Option(help="Folder of averaging.json, averaging.csv, averaging.svg.")
    ],
    settings: Settings,
    soups: Annotated[list[Path], typer.Argument(help="soups/<judge>.json")],
) -> None:
    """Draw the gap between the means of factors and of products as the folds drift apart."""
    from arena_distill.studies.averaging import draw_averaging

    draw_averaging(soups, output, settings=parse(phase.AveragingSettings, settings))


@app.command()
def draw_curves(
    run: Annotated[Path, typer.Option(help="The run's folder.")],
    output: Annotated[Path, typer.Option(help="Folder of curves.json, curves.csv, curves.svg.")],
    settings: Settings,
    truth: Annotated[Path | None, typer.Option(help="The arena's true probabilities.")] = None,
) -> None:
    """Draw the scores of judges against the number of training battles."""
    from arena_distill.studies.learning_curves import draw_curves

    draw_curves(run, output, settings=parse(phase.CurveSettings, settings), truth=truth)


@app.command()
def compare(
    run: Annotated[Path, typer.Option(help="The run's folder.")],
    output: Annotated[Path, typer.Option(help="Folder of compare.json, tables and the report.")],
    settings: Settings,
    test_votes: TestVotes = None,
    truth: Annotated[Path | None, typer.Option(help="The arena's true probabilities.")] = None,
) -> None:
    """Compare judges on the same battles, with an interval for every difference."""
    from arena_distill.studies.comparison import compare
    from arena_distill.studies.comparison_report import render_comparison

    figures = output / "compare.json"
    compare(
        run,
        figures,
        settings=parse(phase.CompareSettings, settings),
        test_votes=test_votes,
        truth=truth,
    )
    render_comparison(figures, output)


def _by_judge(pairs: Sequence[str], judges: Iterable[str]) -> dict[str, list[Path]]:
    """The files of each judge, from arguments ``<judge>=<file>``."""
    files = [pair.split("=", 1) for pair in pairs]
    return {judge: [Path(file) for name, file in files if name == judge] for judge in judges}


def _folder(path: Path) -> Path:
    return path.parent if path.is_file() else path
