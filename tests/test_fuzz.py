"""Valid files of every format, changed at random: each is read as something valid, or refused in one line.

`make soak` takes minutes. A failure names its seed: `ARENA_FUZZ_SEED=<seed> pytest tests/test_fuzz.py`.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import made_up_battles, make_backbone

from arena_distill.battles.reading import read_battles
from arena_distill.config.model_files import ModelFolder
from arena_distill.config.run import load
from arena_distill.errors import InputError
from arena_distill.files.artifacts import read_json, read_parquet, write_parquet
from arena_distill.files.logits import ids_path, read_logits, write_logits
from arena_distill.models.loading import load_classifier

SECONDS = float(os.environ.get("ARENA_FUZZ_SECONDS", "2"))
SEED = os.environ.get("ARENA_FUZZ_SEED")

ROWS = [
    {
        "id": str(i),
        "prompt": f'q{i}, "é"',
        "response_a": "a\nb",
        "response_b": "[1]",
        "label": i % 3,
    }
    for i in range(6)
]
PIECES = [
    *(
        b'"',
        b",",
        b"\n",
        b"\r",
        b"\t",
        b"\\",
        b"{",
        b"}",
        b"[",
        b"]",
        b":",
        b"- ",
        b"&a ",
        b"*a",
        b"!!set",
    ),
    *(
        b"\x00",
        b"\xff",
        b"\xef\xbb\xbf",
        b"\xed\xa0\x80",
        b"\x1b[2J",
        "\u2028".encode(),
        "\u0085".encode(),
    ),
    *(
        b"null",
        b"NaN",
        b"1e999",
        b"-0",
        b"true",
        b"9" * 400,
        b"[" * 5000,
        b"\\ud800",
        b"PAR1",
        b"<<: *a",
    ),
]

Read = Callable[[Path], object]


def csv_of(delimiter: str) -> bytes:
    lines = [list(ROWS[0]), *([str(v).replace('"', '""') for v in row.values()] for row in ROWS)]
    return "\n".join(delimiter.join(f'"{cell}"' for cell in line) for line in lines).encode()


def parquet_of(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def read_source(path: Path) -> None:
    battles, rejected = read_battles({"train": [path]})
    battles.validate(full=True)
    rejected.validate(full=True)


def read_configuration(path: Path) -> None:
    try:
        text = yaml.safe_load(path.read_bytes())
    except (yaml.YAMLError, ValueError, RecursionError, TypeError, AttributeError) as error:
        raise InputError("Snakemake refuses it") from error
    load(text, [path])


def read_model(path: Path) -> None:
    for problem in ModelFolder(path.parent).problems():
        raise InputError(problem)
    load_classifier(path.parent, head_seed=0)


def read_ids(path: Path) -> None:
    logits, ids = read_logits(path.with_name("fold_0.npy"))
    assert len(logits) == len(ids)


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, bytes, Read]]:
    """By format: where a file goes, its valid bytes, its reader."""
    folder = tmp_path_factory.mktemp("fuzz")
    lines = "\n".join(map(json.dumps, ROWS)).encode()
    sources = {
        "csv": csv_of(","),
        "tsv": csv_of("\t"),
        "jsonl": lines,
        "json": json.dumps(ROWS).encode(),
    }
    packed = {f"{kind}.gz": gzip.compress(content) for kind, content in sources.items()}
    codec = pa.Codec("zstd")
    packed |= {f"{k}.zst": codec.compress(content, asbytes=True) for k, content in sources.items()}
    sources |= packed | {"parquet": parquet_of(pa.Table.from_pylist(ROWS))}
    found = {
        kind: (folder / f"t.{kind}", content, read_source) for kind, content in sources.items()
    }
    write_parquet(made_up_battles(), folder / "battles.parquet", {"phase": "battles"})
    ids = pa.table({"id": ["1", "2"], "source": ["train", "extra"], "validation": [True, False]})
    for name in ("logits", "ids"):
        write_logits(folder / name / "fold_0.npy", np.ones((2, 2, 3), np.float32), ids, {"a": 1})
    shutil.copytree(make_backbone("llama", folder / "whole", layers=1), folder / "model")
    for name, path, read in (
        ("artifact", folder / "battles.parquet", read_parquet),
        ("npy", folder / "logits/fold_0.npy", read_logits),
        ("ids", ids_path(folder / "ids/fold_0.npy"), read_ids),
        ("safetensors", folder / "model/model.safetensors", read_model),
    ):
        found[name] = path, path.read_bytes(), read
    config = (Path(__file__).parent / "mini.yaml").read_bytes()
    found["yaml"] = folder / "c.yaml", config, read_configuration
    found["artifact json"] = (
        folder / "x.json",
        json.dumps({"a": [1.5, {"b": None}]}).encode(),
        read_json,
    )
    return found


def changed(content: bytes, rng: random.Random) -> bytes:
    """A few changes: bits, pieces put in, cut out or doubled, numbers, an early end."""
    data = bytearray(content)
    # The header of a format is small, and decides most.
    spot = lambda: int(len(data) * rng.random() ** rng.choice((1, 1, 4)))  # noqa: E731
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        at, size = spot(), rng.choice((1, 2, 8, 64, 1024))
        change = rng.randrange(7)
        if change == 0 and data:
            data[min(at, len(data) - 1)] ^= 1 << rng.randrange(8)
        elif change == 1:
            data[at:at] = rng.choice(PIECES)
        elif change == 2:
            del data[at : at + size]
        elif change == 3:
            data[at:at] = data[spot() :][:size]
        elif change == 4:
            data[at : at + 4] = rng.choice(
                (b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff", b"\x80\0\0\0")
            )
        elif change == 5:
            data[at : at + size] = rng.randbytes(size)
        else:
            del data[at:]
    return bytes(data)


def rounds() -> Iterator[int]:
    """Seeds, until the time is over."""
    if SEED is not None:
        yield int(SEED)
        return
    first, end = random.SystemRandom().randrange(1 << 40), time.monotonic() + SECONDS
    while time.monotonic() < end:
        yield first
        first += 1


def test_changed_files_are_read_or_refused(
    seeds: dict[str, tuple[Path, bytes, Read]], capsys: pytest.CaptureFixture[str]
) -> None:
    counts: Counter[tuple[str, str]] = Counter()
    for seed in rounds():
        rng = random.Random(seed)
        for kind, (path, content, read) in seeds.items():
            path.write_bytes(changed(content, rng))
            try:
                read(path)
                counts[kind, "accepted"] += 1
            except InputError as error:
                lines = str(error).split("\n")
                one = len(lines) == 1 or all(line.startswith("config: ") for line in lines)
                assert one, f"seed {seed}, {kind}: {error}"
                counts[kind, "refused"] += 1
            except Exception as error:
                kept = path.with_name(f"fault-{seed}-{path.name}")
                shutil.copy(path, kept)
                raise AssertionError(f"seed {seed}, {kind}: {error!r}; the file: {kept}") from error
            finally:
                path.write_bytes(content)
    with capsys.disabled():
        total = sum(counts.values())
        print(f"\n{total:,} changed files, none with a traceback: accepted + refused")
        told = (f"{k} {counts[k, 'accepted']:,} + {counts[k, 'refused']:,}" for k in seeds)
        print("  " + ", ".join(told))
    assert all(counts[kind, "refused"] for kind in seeds) or SECONDS < 30
