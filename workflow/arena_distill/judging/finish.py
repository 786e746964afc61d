"""Finish a judge: its weights become a folder that says how it is asked, and proves it.

To the files of the merged or quantised model (linked, not copied) are added `judge.json` with test
vectors, a model card, and keys of `config.json` that other programs read. A stack's folder holds those of
its members, and its trees.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.compute as pc

from arena_distill.battles.votes import Solution
from arena_distill.config.compute import Attention
from arena_distill.config.phases.judging import JudgeSettings, StackedJudgeSettings
from arena_distill.config.prediction import Card
from arena_distill.config.vocabulary import ModelKind
from arena_distill.encoding.sequences import Tokens, read_tokens
from arena_distill.encoding.templates import ONE_ANSWER, SIZE, TEMPLATES
from arena_distill.encoding.truncation import length_budget
from arena_distill.encoding.views import views
from arena_distill.files.artifacts import (
    atomic_directory,
    file_sha256,
    provenance,
    read_json,
    read_parquet,
    write_json,
)
from arena_distill.files.keys import locate
from arena_distill.judging.card import write_card
from arena_distill.judging.contract import (
    FILE,
    MEMBERS,
    TREES,
    AnyContract,
    Calibrated,
    ModelContract,
    Scores,
    StackContract,
    Template,
    read_contract,
)
from arena_distill.judging.judge import Judge
from arena_distill.judging.vectors import make_vectors
from arena_distill.metrics import Figures, deployed_score
from arena_distill.prediction.held_out import read_calibration
from arena_distill.scoring.stacks import SURFACE, names_of, read_stack
from arena_distill.scoring.surface_trees import read_trees
from arena_distill.verdicts import CLASSES, WINNERS

FINGERPRINTED = ("*.safetensors", "tokenizer*.json", "*.model", "special_tokens_map.json")
"""The files of weights and tokenizer."""


def finish_judge(
    weights: Path,
    tokens: Path,
    output: Path,
    *,
    settings: JudgeSettings,
    kind: ModelKind,
    calibration: Path | None = None,
    predictions: Path | None = None,
    test_votes: Path | None = None,
    batch_tokens: int,
    attention: Attention = "auto",
) -> None:
    """Finish a judge → a folder with model, tokenizer, `judge.json` and model card.

    Args:
        weights: the folder of the merged or quantised model.
        tokens: `tokens.parquet` of the judge's tokenizer.
        calibration: of this very model, where battles are held out.
        predictions: the test predictions of this very model.
        test_votes: `test_votes.parquet`; with both the judge's scores are those on test battles, else those
            on the held-out ones.

    Raises:
        InputError: a file is damaged, or the model cannot be loaded.
    """
    read = read_tokens(tokens)
    scores = _scores(calibration, predictions, test_votes)
    with atomic_directory(output) as folder:
        for file in sorted(weights.glob("[!.]*")):  # not Snakemake's time stamp
            _link(file, folder / file.name)
        config = read_json(folder / "config.json")
        write_json(
            for_other_programs(config, pointwise=settings.head.kind == "pointwise"),
            folder / "config.json",
        )
        contract = _contract(folder, read, settings, kind, calibration, scores, config)
        _prove(folder, contract, settings.card, attention=attention, batch_tokens=batch_tokens)
    print(f"{output}: a finished judge{_described(scores)}")


def finish_stack(
    members: Sequence[Path],
    stack: Path,
    output: Path,
    *,
    settings: StackedJudgeSettings,
    kind: ModelKind,
    trees: Path | None = None,
    calibration: Path | None = None,
    predictions: Path | None = None,
    test_votes: Path | None = None,
    batch_tokens: int,
    attention: Attention = "auto",
) -> None:
    """Finish a stack → a folder with the members' folders, the trees, `judge.json` and a card.

    Args:
        members: the finished judges, in the order of `settings`.
        stack: the file of ``scoring.stacks.fit_stack``.
        kind: `gptq`, if a member's weights are quantised.
        trees: the file of ``scoring.surface_trees.write_surface``, if trees are a member.
        calibration, predictions, test_votes: as for :func:`finish_judge`, of the stack.

    Raises:
        InputError: a file is damaged or of other members, or a member cannot be loaded.
    """
    contracts = [read_contract(folder) for folder in members]
    weights, temperature = read_stack(stack, names_of(settings))
    scores = _scores(calibration, predictions, test_votes)
    classes = contracts[0].classes
    if trees is not None:
        read_trees(trees, len(classes))
    with atomic_directory(output) as folder:
        for name, member in zip(settings.members, members, strict=True):
            hidden = shutil.ignore_patterns(".*")  # Snakemake's time stamp
            shutil.copytree(member, folder / MEMBERS / name, ignore=hidden, copy_function=_link)
        if trees is not None:
            _link(trees, folder / TREES)
        shares = dict(zip(names_of(settings), weights.tolist(), strict=True))
        sources = [contract.sources for contract in contracts]
        contract = StackContract(
            judge=settings.judge,
            kind=kind,
            run=settings.run,
            classes=classes,
            members={name: shares[name] for name in settings.members},
            surface=shares.get(SURFACE),
            temperature=temperature,
            lengths=tuple(map(max, zip(*(found.lengths for found in contracts), strict=True))),
            orders=settings.orders,
            average=settings.average,
            calibration=_calibrated(calibration),
            dtype=next((c.dtype for c in contracts if c.dtype != "float32"), "float32"),
            sources={
                name: max(found.get(name, 0) for found in sources)
                for name in dict.fromkeys(chain(*sources))
            },
            scores=scores,
            fingerprints=_fingerprints(folder),
            provenance=provenance("stacked_judge", json.loads(settings.as_params())),
        )
        _prove(folder, contract, settings.card, attention=attention, batch_tokens=batch_tokens)
    print(f"{output}: a finished stack of {', '.join(shares)}{_described(scores)}")


def _prove(
    folder: Path, contract: AnyContract, card: Card, *, attention: Attention, batch_tokens: int
) -> None:
    """Write `judge.json`, ask the judge in the folder its test vectors, and write these and the card."""
    write_json(contract.model_dump(mode="json"), folder / FILE)
    judge = Judge.from_pretrained(folder, attention=attention, batch_tokens=batch_tokens)
    contract = contract.model_copy(update={"vectors": make_vectors(judge)})
    write_json(contract.model_dump(mode="json"), folder / FILE)
    write_card(folder, contract, card)


def _fingerprints(folder: Path) -> dict[str, str]:
    """SHA-256 by path of weights and tokenizer, of trees, and of all that members say of themselves."""
    files = {file for pattern in (*FINGERPRINTED, FILE) for file in folder.rglob(pattern)}
    return {file.relative_to(folder).as_posix(): file_sha256(file) for file in sorted(files)}


def _scores(
    calibration: Path | None, predictions: Path | None, test_votes: Path | None
) -> Scores | None:
    """A deployed model's scores on test battles, else on held-out ones."""
    if predictions is not None and test_votes is not None:
        return score_predictions(predictions, Solution.read(test_votes))
    return (
        None if calibration is None else _as_scores(read_json(calibration)["deployed"], "held_out")
    )


def _described(scores: Scores | None) -> str:
    return f", log loss {scores.log_loss.value:.4f} on {scores.battles:,} battles" if scores else ""


def _calibrated(calibration: Path | None) -> Calibrated | None:
    if calibration is None:
        return None
    method, found = read_calibration(calibration)
    if method == "none":
        return None
    return Calibrated(
        method=method,
        **{name: tuple(array.tolist()) for name, array in vars(found).items()},
        fitted_on=f"{read_json(calibration)['rows']:,} battles that nothing was trained on: their "
        "votes, and this model's own probabilities",
    )


def score_predictions(predictions: Path, solution: Solution) -> Scores:
    """Score the submitted predictions of one model on the test battles."""
    votes, groups = solution.votes, solution.groups
    names = WINNERS[: votes.classes]
    table = read_parquet(predictions, ["id", "submitted", *names])
    submitted = table.filter(table["submitted"])
    rows = locate(solution.ids, submitted["id"].combine_chunks(), str(predictions))
    probabilities = np.column_stack([submitted[name].to_numpy() for name in names])[rows]
    return _as_scores(deployed_score(probabilities, votes, groups), "test")


def _as_scores(found: Figures, of: Literal["test", "held_out"]) -> Scores:
    figures = {name: value for name, value in found.items() if name != "rows"}
    return Scores(battles=found["rows"], of=of, **figures)


def for_other_programs(config: Mapping[str, Any], *, pointwise: bool) -> dict[str, Any]:
    """A model's configuration with the keys that other programs need.

    transformers 4 reads `rope_theta` and `rope_scaling` alone, and falls back to defaults without a
    word. Servers apply softmax to a classifier's outputs unless `problem_type` says that they are no
    classes: those of a pointwise judge are a strength and a tie parameter. transformers
    4.57 and 5.19 run Gemma-2 by a kernel without soft-capping, unless `_attn_implementation` is eager.
    """
    added = dict(config)
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        added["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            added["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    if config.get("attn_logit_softcapping"):
        added["_attn_implementation"] = "eager"
    if pointwise:
        added["problem_type"] = "regression"
    return added


def _contract(
    folder: Path,
    tokens: Tokens,
    settings: JudgeSettings,
    kind: ModelKind,
    calibration: Path | None,
    scores: Scores | None,
    config: Mapping[str, Any],
) -> ModelContract:
    head, encoding = settings.head, settings.encoding
    joint = head.kind == "joint"
    view = views(head, settings.orders)[0]
    vocabulary = tokens.vocabulary
    literals = (TEMPLATES if joint else ONE_ANSWER)[encoding.template]
    frame = (vocabulary.frames if joint else vocabulary.one_answer)[encoding.template]
    sources = pc.value_counts(tokens.sources).to_pylist()
    return ModelContract(
        judge=settings.judge,
        kind=kind,
        run=settings.run,
        classes=CLASSES[: head.classes],
        head=head,
        encoding=encoding.model_copy(update={"tokens_per_battle": None}),
        template=Template(
            name=encoding.template,
            literals=literals,
            frame=frame,
            size=SIZE if encoding.sizes else None,
        ),
        newline=vocabulary.newline,
        pad=vocabulary.pad,
        lengths=tuple(length_budget(tokens, encoding, view, n) for n in settings.max_lengths),
        orders=settings.orders,
        average=settings.average,
        cascade=settings.cascade,
        calibration=_calibrated(calibration),
        dtype=str(config.get("dtype") or "float32"),
        backbone=settings.backbone,
        sources={count["values"]: count["counts"] for count in sources},
        scores=scores,
        fingerprints=_fingerprints(folder),
        provenance=provenance("judge", json.loads(settings.as_params())),
    )


def _link(source: str | Path, target: str | Path) -> None:
    """A second name for a file that is never changed; a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
