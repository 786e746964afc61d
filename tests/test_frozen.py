"""Frozen judges: what they read, how their heads are fitted and merged, and the model that is left."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest
import torch
import yaml
from checkouts import GPTQ, Checkout, make_checkout, write
from conftest import Run
from test_benchmarks import ROWS, llmbar

from arena_distill import Judge
from arena_distill.battles.folds import held_out_rows, validation_rows
from arena_distill.battles.votes import votes_of
from arena_distill.config.encoding import Encoding
from arena_distill.config.head import Head
from arena_distill.config.judge import Frozen
from arena_distill.config.phases.deployment import MergeSettings
from arena_distill.config.phases.scoring import LogitsSettings
from arena_distill.config.phases.training import FeatureSettings, ProbeSettings
from arena_distill.config.run import load
from arena_distill.deployment.frozen import merge_probes
from arena_distill.encoding.sequences import read_tokens
from arena_distill.encoding.views import encode_views
from arena_distill.errors import InputError
from arena_distill.evaluation.drawings import percent
from arena_distill.files.artifacts import read_json, read_parquet
from arena_distill.files.keys import key, locate
from arena_distill.files.logits import read_logits
from arena_distill.judging.contract import read_contract
from arena_distill.judging.vectors import compare_with_vectors
from arena_distill.models.heads import battle_logits
from arena_distill.models.layer_reads import Reader, blocks, default_layers
from arena_distill.models.loading import load_classifier
from arena_distill.models.scoring import score
from arena_distill.scoring.logits import score_probe
from arena_distill.scoring.stacks import describe
from arena_distill.training.answer_pairs import CONSTANT
from arena_distill.training.features import Features, write_features
from arena_distill.training.linear_probe import cross_validate, objective_of
from arena_distill.training.probe import (
    ALONE,
    Probe,
    choose,
    fit_probe,
    mean_probe,
    read_probe,
    split,
)
from arena_distill.training.targets import VOTE_LOSS
from arena_distill.verdicts import WINNERS, Votes

HEAD = Head(kind="pointwise", pooling="layers")
ENCODING = Encoding(template="winners", max_length=96)
SETTINGS = FeatureSettings(
    version=1, encoding=ENCODING, head=HEAD, precision="fp32", layers=(1, 2),
    poolings=("mean", "answer", "last"),
)  # fmt: skip


def written(run: Run, folder: Path) -> Path:
    if not (folder / "features").exists():
        write_features(
            run.backbone, run.tokens, folder / "features", settings=SETTINGS, batch_tokens=500
        )
    return folder / "features"


def fitted(run: Run, folder: Path, fold: int = 0, **changes: Any) -> Path:
    settings = ProbeSettings(version=1, head=HEAD, loss=VOTE_LOSS)
    output = folder / f"fold_{fold}"
    fit_probe(written(run, folder), run.folds, fold, output, teachers={},
              settings=settings.model_copy(update=changes))  # fmt: skip
    return output


def test_features_are_pooled_hidden_states_whatever_the_padding(run: Run, tmp_path: Path) -> None:
    read = Features.read(written(run, tmp_path))
    assert read.reads == tuple((n, p) for n in (1, 2) for p in ("mean", "answer", "last"))
    tokens = read_tokens(run.tokens)
    tokens = tokens.take(locate(read.keys, tokens.keys(), "tokens"))
    model: Any = load_classifier(run.backbone, head_seed=0).eval()
    states: dict[int, torch.Tensor] = {}
    for layer, block in enumerate(blocks(model), start=1):
        block.register_forward_hook(
            lambda *seen, n=layer: states.update(
                {n: seen[-1][0][0] if isinstance(seen[-1], tuple) else seen[-1][0]}
            )
        )
    marker = list(tokens.vocabulary.one_answer["winners"][1])
    for view, sequences in enumerate(encode_views(tokens, ENCODING, HEAD)):
        for row in (0, 3, len(sequences) - 1):
            ids = sequences[row].tolist()
            with torch.no_grad():
                model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)))
            places = range(len(ids) - len(marker) + 1)
            start = max(i for i in places if ids[i : i + len(marker)] == marker) + len(marker)
            for (layer, pooling), found in zip(read.reads, read.values[row, view], strict=True):
                part = {"mean": slice(None), "answer": slice(start, None), "last": slice(-1, None)}
                expected = states[layer][part[pooling]].mean(0).numpy()
                np.testing.assert_allclose(found, expected, atol=3e-3, rtol=3e-3)


def test_the_answer_starts_after_the_last_marker() -> None:
    model = torch.nn.Module()
    model.config = type("C", (), {"get_text_config": lambda _: type("T", (), {"num_hidden_layers": 1})})()  # type: ignore[assignment]  # fmt: skip
    model.layers = torch.nn.ModuleList([torch.nn.Identity()])
    reader = Reader(model, [(1, "answer")], (7, 8))
    ids = torch.tensor([[1, 7, 8, 7, 8, 3], [7, 8, 2, 2, 7, 8], [1, 2, 3, 7, 0, 0]])
    mask = torch.tensor([[1] * 6, [1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0]]).bool()
    assert reader._starts(ids, mask).tolist() == [5, 2, 0]
    assert reader._starts(ids[:, :1], mask[:, :1]).tolist() == [0, 0, 0]


def test_the_mean_head_gives_the_mean_of_the_outputs() -> None:
    rng = np.random.default_rng(0)
    reads = ((1, "mean"), (1, "last"), (4, "answer"))
    features = rng.normal(size=(5, 2, 3, 8)).astype(np.float32)
    one = Probe(reads[:2], (1,), torch.randn(2, 16), torch.randn(2))
    other = Probe(reads[:0:-1], (1,), torch.randn(2, 16), torch.randn(2))
    mean = mean_probe([one, other], [0.25, 0.75])
    expected = 0.25 * one.outputs(features, reads) + 0.75 * other.outputs(features, reads)
    np.testing.assert_allclose(mean.outputs(features, reads), expected, atol=1e-5)
    assert set(mean.reads) == set(reads)


def test_what_knows_something_is_read_and_noise_is_not() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(3, 1, (400, 2, 4, 6)).astype(np.float32)
    strength = 2 * values[:, :, 2, 0]
    won = strength[:, 0] + rng.logistic(size=400) > strength[:, 1]

    def objective(outputs: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        lead = outputs[:, 0, 0] - outputs[:, 1, 0]
        sign = torch.from_numpy(np.where(won, 1.0, -1.0).astype(np.float32))[rows]
        return torch.nn.functional.softplus(-sign * lead)

    reads = tuple((layer, "mean") for layer in (1, 2, 3, 4))
    read = Features(Path(), None, values, reads, (1,), {})
    votes = Votes.hard(np.where(won, 0, 1), 2)
    parts = split(votes, np.arange(400), objective)
    probe, _, loss = choose(read.reads, (1,), values, objective, objective, parts, 1)
    assert probe.reads == ((3, "mean"),)
    assert loss < 0.55
    lead = probe.outputs(values, reads)[..., 0]
    assert ((lead[:, 0] > lead[:, 1]) == won).mean() > 0.7


@pytest.mark.parametrize("ties", ["davidson", "rao_kupper"])
def test_the_quick_fit_is_the_plain_one(ties: Any) -> None:
    """The same ridge, loss and verdicts as L-BFGS over the features as they are, and every ridge."""
    rng = np.random.default_rng(3)
    values = (rng.normal(3, 1, (300, 2, 1, 12)) * np.geomspace(0.1, 30, 12)).astype(np.float32)
    odds = 0.05 * values[:, :, 0].sum(-1) + rng.gumbel(size=(300, 2))
    lead = odds[:, 0] - odds[:, 1]
    votes = Votes.hard(np.where(np.abs(lead) < 0.5, 2, lead < 0))
    head = HEAD.model_copy(update={"ties": ties})
    objective = objective_of(votes, None, None, loss=VOTE_LOSS, head=head)
    groups = np.arange(300)
    read = Features(Path(), None, values, ((1, "mean"),), (1,), {})
    parts = split(votes, groups, objective)
    probe, ridge, loss = choose(read.reads, (1,), values, objective, objective, parts, 2)
    plain = torch.from_numpy(values[:, :, 0] - values[:, :, 0].mean((0, 1)))
    constant = plain.new_full((*plain.shape[:2], 1), CONSTANT)
    plain = torch.cat([plain, constant], -1)
    weights, expected, found = cross_validate(plain, objective, 2, groups, ALONE)
    assert ridge == expected
    assert loss == pytest.approx(found, abs=2e-3)
    shown = battle_logits(torch.from_numpy(probe.outputs(values, read.reads)), head)
    wanted = battle_logits(plain @ weights.T, head)
    torch.testing.assert_close(shown.softmax(-1), wanted.softmax(-1), atol=2e-3, rtol=0)


def test_a_head_is_chosen_by_votes_that_its_teachers_never_saw(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each other fold is asked of what its own teachers taught; the fold's own teach in the end."""
    asked = []

    def noted(rows: Any, table: Any, teachers: Any, settings: Any) -> Any:
        asked.extend(teachers["t"])
        return objective_of(votes_of(rows), None, None, loss=VOTE_LOSS, head=HEAD), None

    monkeypatch.setattr("arena_distill.training.probe._objective", noted)
    files = [tmp_path / f"t{fold}" for fold in range(3)]
    settings = ProbeSettings(
        version=1, head=HEAD, loss=VOTE_LOSS, teachers=("t",), targets="unlabelled"
    )
    fit_probe(written(run, tmp_path), run.folds, 1, tmp_path / "out", teachers={"t": files},
              settings=settings)  # fmt: skip
    assert asked == [files[1], files[0], files[2]]


def test_the_merged_model_says_what_the_heads_say(run: Run, tmp_path: Path) -> None:
    """From the features in files, and from the model alone, cut after the last layer that it reads."""
    folds = [fitted(run, tmp_path, fold) for fold in range(3)]
    settings = MergeSettings(
        version=1, judge="x", encoding=ENCODING, head=HEAD, precision="fp32", average="factors",
        heads="first", weights="equal",
    )  # fmt: skip
    merge_probes(run.backbone, folds, tmp_path / "merged", settings=settings)
    model: Any = load_classifier(tmp_path / "merged", head=HEAD)
    probe = mean_probe([read_probe(folder) for folder in folds], [1 / 3] * 3)
    assert len(blocks(model)) == max(layer for layer, _ in probe.reads)
    read = Features.read(tmp_path / "features")
    tokens = read_tokens(run.tokens)
    tokens = tokens.take(locate(read.keys, tokens.keys(), "tokens"))
    views = encode_views(tokens, ENCODING, HEAD)
    outputs = np.stack([score(model, view, batch_tokens=700) for view in views], axis=1)
    expected = probe.outputs(np.asarray(read.values, np.float32), read.reads)
    np.testing.assert_allclose(outputs, expected, atol=0.02 * np.abs(expected).max())
    with pytest.raises(InputError, match="not two folds of one judge"):
        merge_probes(run.backbone, folds[::-1], tmp_path / "other", settings=settings)


def test_a_fold_is_scored_by_a_head_that_never_saw_it(make_run: Any, tmp_path: Path) -> None:
    run = make_run("llama")
    probe = fitted(run, tmp_path, 1)
    settings = LogitsSettings(
        version=1, encoding=ENCODING, head=HEAD, precision="fp32", rows=("validation",)
    )
    output = tmp_path / "fold_1.npy"
    score_probe(tmp_path / "features", probe, run.folds, 1, output, settings=settings)
    logits, ids = read_logits(output)
    folds = read_parquet(run.folds)
    rows = validation_rows(folds, 1)
    assert key(ids).to_pylist() == key(folds).take(rows).to_pylist()
    np.testing.assert_array_equal(logits[:, 0], logits[:, 1])
    assert np.isfinite(logits).all()
    assert votes_of(folds).known[rows].all()
    with pytest.raises(InputError, match="another fold"):
        score_probe(tmp_path / "features", probe, run.folds, 0, output, settings=settings)
    (probe / "probe.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="not what the fit wrote"):
        score_probe(tmp_path / "features", probe, run.folds, 1, output, settings=settings)


def test_damaged_features_and_missing_layers_are_refused(make_run: Any, tmp_path: Path) -> None:
    run = make_run("llama")
    folder = written(run, tmp_path)
    np.save(folder / "features.npy", np.zeros(3))
    with pytest.raises(InputError, match="not what was written"):
        Features.read(folder)
    settings = SETTINGS.model_copy(update={"layers": (9,)})
    with pytest.raises(InputError, match="frozen.layers: 9, but .* has 2 layers"):
        write_features(run.backbone, run.tokens, folder, settings=settings, batch_tokens=500)
    assert default_layers(30) == (15, 18, 21)
    assert default_layers(1) == (1,)


def config(**judge: Any) -> Any:
    judges = {"f": {"backbone": {"tiny": "llama"}, "frozen": {}, **judge},
              "g": {"backbone": {"tiny": "llama"}, "frozen": {}, "teachers": ["f"]}}  # fmt: skip
    return load(
        {
            "data": {"arena": {}},
            "defaults": {
                "lora": {"r": 3},
                "training": {"keep": "best", "patience": 2, "seed": 7},
                "logits": {"shards": 3},
                "head": {"kind": "joint", "ties": "rao_kupper"},
            },
            "judges": judges,
            "final": "g",
        }
    )


def test_a_frozen_judge_has_no_adapter() -> None:
    found = config()
    judge = found.judges["f"]
    assert judge.frozen == Frozen()
    assert judge.head.pooling == "layers"
    assert judge.pretraining is None
    assert (judge.training.keep, judge.training.seed, judge.logits.shards) == ("last", 7, 1)
    assert judge.head.ties == "rao_kupper"
    assert found.features_owner("g") == "f"
    assert config(encoding={"max_length": 64}).features_owner("g") == "g"
    assert load(yaml.safe_load(found.described())).judges == found.judges
    assert load(json.loads(found.as_params())).judges == found.judges
    for key_, value, named in (
        ("lora", {"r": 8}, "lora.r"),
        ("pretraining", {}, "pretraining"),
        ("head", "joint", "head"),
        ("head", {"kind": "joint"}, "head.kind"),
        ("training", {"lr": 1e-3, "keep": "best", "share": 0.5}, "training.lr, training.keep"),
        ("logits", {"shards": 2}, "logits.shards"),
        ("merge", {"weights": "greedy"}, "merge.weights"),
    ):
        with pytest.raises(InputError, match=f"judges.f: a frozen judge .* remove {named}$"):
            config(**{key_: value})
    with pytest.raises(InputError, match="nf4"):
        config(precision="nf4")
    with pytest.raises(InputError, match="frozen judge has none to train"):
        config(loss={"features": 1})
    with pytest.raises(InputError, match="pooling: layers: each fold fits such a head"):
        config(frozen=None, head={"kind": "pointwise", "pooling": "layers"})


# --- a whole run ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def frozen_run(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """Of frozen judges and a stack with trees, with battles held out and for choices."""
    checkout = make_checkout(tmp_path_factory.mktemp("frozen") / "checkout")
    given = yaml.safe_load((checkout.folder / "mini.yaml").read_text())
    given["data"]["arena"] |= {"train": 300, "unlabelled": 20}
    given["folds"] |= {"method": "stratified_group", "holdout": 0.3, "choices": 0.1}
    given["defaults"]["training"]["keep"] = "best"
    given["judges"] = {
        "teacher": {"backbone": {"tiny": "llama"}, "frozen": {}, "quantization": None},
        "stack": {"stack": {"judges": ["teacher"], "surface": True}},
        "student": {"backbone": {"tiny": "gemma2"}, "frozen": {"poolings": ["answer"]},
                    "teachers": ["stack"]},
    }  # fmt: skip
    given |= {"final": "student"}
    given["prediction"]["calibration"] = "temperature"
    given["benchmarks"] = {"bar": Path(llmbar(checkout.folder / "bar.json").path).name}
    write(checkout.folder / "mini.yaml", yaml.safe_dump(given).encode())
    checkout.run("all")
    return checkout


@pytest.mark.slow
@pytest.mark.gptq
@pytest.mark.skipif(not GPTQ.exists(), reason=f"no quantisation environment at {GPTQ}")
def test_a_run_of_frozen_judges(frozen_run: Checkout) -> None:
    """Calibrated on held-out battles that no head saw, quantised, finished, submitted."""
    results = frozen_run.results
    held_out = len(held_out_rows(read_parquet(results / "folds.parquet")))
    for kind in ("merged", "gptq"):
        contract = read_contract(results / kind / "student")
        assert contract.calibration and contract.calibration.method == "temperature"
        assert contract.calibration.fitted_on.startswith(f"{held_out} battles")
        assert contract.head.pooling == "layers"
    assert compare_with_vectors(Judge.from_pretrained(results / "merged/student")).within(1e-5)
    assert read_json(results / "checks/student_drift.json")
    assert len((results / "submission.csv").read_text().splitlines()) == 41
    figures = read_json(results / "metrics.json")["judges"]["stack"]
    assert figures["oof"]["log_loss"] == pytest.approx(figures["stack"]["log_loss"], abs=1e-5)
    assert describe(figures["stack"]) in html.unescape((results / "report.html").read_text())
    *_, whole = read_json(results / "metrics.json")["benchmarks"]
    assert (whole["benchmark"], whole["battles"], whole["known"]) == ("bar", len(ROWS), 0)
    assert percent(whole["accuracy"]) in (results / "report.html").read_text()
    llmbar(frozen_run.folder / "bar.json", ROWS[1:])
    assert frozen_run.would_run() == dict.fromkeys(
        ("benchmark_gptq", "evaluate", "render_report"), 1
    )
    refused = frozen_run.snakemake("averaging", "-n")
    assert refused.returncode == 1 and "averaging: student is frozen" in refused.stdout
    frozen_run.edit("mini.yaml", "n: 2", "n: 3")
    assert "read_features" not in frozen_run.would_run(), (
        "features are read once, whatever the folds"
    )


@pytest.mark.slow
@pytest.mark.gptq
@pytest.mark.skipif(not GPTQ.exists(), reason=f"no quantisation environment at {GPTQ}")
def test_a_stack_is_submitted(frozen_run: Checkout) -> None:
    """Its members' scores are combined, calibrated and scored; its folder says the same."""
    results = frozen_run.results
    given = yaml.safe_load((frozen_run.folder / "mini.yaml").read_text()) | {"final": "stack"}
    given["folds"]["n"] = 2
    given["prediction"]["model"] = "merged"
    write(frozen_run.folder / "mini.yaml", yaml.safe_dump(given).encode())
    before = (results / "submission.csv").read_text()
    frozen_run.run("all")
    assert (results / "submission.csv").read_text() != before
    judge = Judge.from_pretrained(results / "merged/stack")
    assert compare_with_vectors(judge).within(1e-6)
    battles = read_parquet(results / "battles.parquet")
    said = judge.predict(battles.filter(pc.equal(battles["source"], "test")))
    predicted = read_parquet(results / "predictions/stack/merged.parquet")
    predicted = predicted.filter(predicted["submitted"])
    assert predicted["id"].to_pylist() == said.ids.to_pylist()
    expected = np.column_stack([predicted[name].to_numpy() for name in WINNERS])
    np.testing.assert_allclose(said.probabilities, expected, rtol=0, atol=1e-6)
    scores = judge.contract.scores
    assert scores and scores.of == "test" and scores.battles == 40
    figures = read_json(results / "metrics.json")
    assert figures["headline"]["battles"] == "test"
    assert figures["held_out"]["models"]["merged"]["judge"] == "stack"
    assert figures["final"]["gptq"] is None
    assert "which combines teacher and surface trees," in (results / "report.html").read_text()
    logits, _ = read_logits(results / "logits/stack/merged_test.npy")
    assert logits.shape == (40, 2, 2, 3)
    np.testing.assert_allclose(said.logits, logits, rtol=0, atol=1e-6)
    assert set(frozen_run.would_run("merged")) <= {"merged"}, "its member is a judge of its own"
    refused = frozen_run.snakemake("compare", "-n")
    assert refused.returncode == 1 and "stack is a stack, which is not trained" in refused.stdout
