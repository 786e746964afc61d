"""The same battles through every door: workflow, class, command line, servers, plain transformers.

    pytest tests/test_doors.py -s

prints the table of docs/serving.md. The battles are those of each judge's test vectors, on which every
door answers within 1e-5 of what `judge.json` says, and vLLM within 1e-4.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from checkouts import ROOT
from conftest import FAMILIES, battles_table
from judges import Finished, finished_judge
from servers import our_server, vllm_server

from arena_distill.cli import app
from arena_distill.config.backbone import TINY
from arena_distill.config.encoding import Encoding
from arena_distill.config.head import JOINT, Head
from arena_distill.config.phases.encoding import TokensSettings
from arena_distill.config.phases.prediction import PredictionSettings
from arena_distill.encoding.sequences import FIELDS, Sequences
from arena_distill.encoding.tokenization import load_tokenizer, tokenize_battles
from arena_distill.files.artifacts import write_parquet
from arena_distill.judging.clients import judge_on
from arena_distill.judging.contract import read_contract
from arena_distill.judging.judge import ModelJudge
from arena_distill.prediction.test_time import predict_test, score_test
from arena_distill.verdicts import WINNERS

pytestmark = [pytest.mark.real, pytest.mark.slow]

KINDS = {
    "joint": (JOINT, Encoding()),
    "pointwise": (Head(kind="pointwise"), Encoding(template="winners")),
}
JUDGES = list(product(FAMILIES, KINDS))


@dataclass
class Visit:
    """A judge, and a folder for what a door writes."""

    judge: Finished
    folder: Path

    @property
    def rows(self) -> list[dict[str, object]]:
        """The battles of the judge's test vectors."""
        vectors = read_contract(self.judge.folder).vectors
        return [
            {"id": str(row)} | {name: list(getattr(vector, name)) for name in FIELDS}
            for row, vector in enumerate(vectors)
        ]

    def of_table(self, table: pa.Table) -> np.ndarray:
        assert table["id"].to_pylist() == [row["id"] for row in self.rows]
        return np.column_stack([table[name] for name in WINNERS])


# --- the doors: each gives probabilities, float64 (battles, 3) ---------------------------------------


def workflow(visit: Visit) -> np.ndarray:
    judge, battles, tokens = visit.judge, visit.folder / "b.parquet", visit.folder / "t.parquet"
    write_parquet(battles_table([{"source": "test", **row} for row in visit.rows]), battles, {})
    tokenize_battles(battles, judge.weights, tokens, settings=TokensSettings(version=1))
    logits, output = visit.folder / "test.npy", visit.folder / "p.parquet"
    score_test(
        judge.weights, tokens, logits, quantized=False, settings=judge.scoring, batch_tokens=512
    )
    asked = judge.settings.model_dump(include={"max_lengths", "orders", "average"})
    predict_test(logits, output, model="merged", settings=PredictionSettings(version=1, **asked))
    table = pq.read_table(output)
    return visit.of_table(table.filter(table["submitted"]))


def class_judge(visit: Visit) -> np.ndarray:
    return visit.judge.judge.predict(visit.rows).probabilities


def predict(visit: Visit) -> np.ndarray:
    file, output = visit.folder / "battles.jsonl", visit.folder / "out.parquet"
    file.write_text("".join(json.dumps(row) + "\n" for row in visit.rows))
    words = ["predict", str(visit.judge.folder), str(file), "-o", str(output)]
    app(words, standalone_mode=False)
    return visit.of_table(pq.read_table(output))


def serve(visit: Visit) -> np.ndarray:
    with our_server(visit.judge.folder, visit.folder / "log") as address:
        return judge_on(visit.judge.folder, address).predict(visit.rows).probabilities


def vllm(visit: Visit) -> np.ndarray:
    with vllm_server(visit.judge.folder, visit.folder / "log") as address:
        return judge_on(visit.judge.folder, address).predict(visit.rows).probabilities


def plain(environment: str) -> Callable[[Visit], np.ndarray]:
    """transformers alone, in an environment: it runs the ids of `judge.json`."""

    def asked(visit: Visit) -> np.ndarray:
        python, folder = ROOT / environment / "bin/python", visit.judge.folder
        if not python.exists():
            pytest.skip(f"no {python}: `make {environment.removeprefix('.venv-')}` sets it up")
        script = ROOT / "tests/ask_in_transformers.py"
        done = subprocess.run([python, script, folder], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        said = json.loads(Path(f"{folder}.outputs.json").read_text())
        contract = read_contract(folder)
        outputs = {
            ids: said[f"{row}/{view}"]
            for row, vector in enumerate(contract.vectors)
            for view, ids in vector.ids.items()
        }

        def forward(sequences: Sequences) -> np.ndarray:
            rows = range(len(sequences))
            return np.array([outputs[tuple(sequences[row].tolist())] for row in rows], np.float32)

        return (
            ModelJudge(contract, load_tokenizer(folder), forward).predict(visit.rows).probabilities
        )

    return asked


DOORS: dict[str, tuple[Callable[[Visit], np.ndarray], float]] = {
    "workflow": (workflow, 1e-5),
    "`Judge`": (class_judge, 1e-5),
    "`predict`": (predict, 1e-5),
    "`serve`": (serve, 1e-5),
    "vLLM": (vllm, 1e-4),
    "transformers": (plain(".venv"), 1e-5),
    "transformers 4": (plain(".venv-transformers4"), 1e-5),
}


# --- the differences --------------------------------------------------------------------------------


@dataclass
class Differences:
    """The largest difference of a probability by judge and door."""

    found: dict[tuple[str, str], dict[str, float]] = field(default_factory=dict)

    def print(self) -> None:
        print(f"\n| judge | {' | '.join(DOORS)} |\n|---|{'---|' * len(DOORS)}")
        for judge, by_door in self.found.items():
            cells = [f"{by_door[d]:.0e}" if d in by_door else "not run" for d in DOORS]
            print(f"| {', '.join(judge)} | {' | '.join(cells)} |")


@pytest.fixture(scope="module")
def differences() -> Iterator[Differences]:
    found = Differences()
    yield found
    found.print()


@pytest.fixture(scope="module", params=JUDGES, ids="-".join)
def judge(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    family, kind = request.param
    head, encoding = KINDS[kind]
    folder = tmp_path_factory.mktemp(f"{family}_{kind}")
    return finished_judge(folder, TINY / family, head=head, encoding=encoding)


@pytest.mark.parametrize("door", DOORS)
def test_every_door_leads_to_the_same_judge(
    judge: Finished, door: str, differences: Differences, tmp_path: Path
) -> None:
    ask, allowed = DOORS[door]
    expected = np.array([v.probabilities for v in read_contract(judge.folder).vectors])
    assert np.ptp(expected, axis=0).max() > 0.02, "a judge without an opinion shows nothing"
    found = float(np.abs(ask(Visit(judge, tmp_path)) - expected).max())
    name = judge.settings.backbone, judge.settings.head.kind
    differences.found.setdefault(name, {})[door] = found
    assert found <= allowed
