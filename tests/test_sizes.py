"""Much data a part at a time: the parts are what the whole would be, and no column is too long."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, made_up_battles
from hypothesis import given
from hypothesis import strategies as st

from arena_distill.battles import audit
from arena_distill.battles.audit import write_audit
from arena_distill.battles.folds import write_folds
from arena_distill.battles.formats import columns
from arena_distill.battles.prompts import distinct_prompts, prompt_groups
from arena_distill.battles.reading import write_battles
from arena_distill.battles.similarity import near_groups
from arena_distill.config.data import Audit
from arena_distill.config.phases.battles import AuditSettings, BattlesSettings, FoldsSettings
from arena_distill.config.phases.encoding import TokensSettings
from arena_distill.encoding import sequences, text_encoder, tokenization
from arena_distill.encoding.sequences import gather, read_tokens
from arena_distill.encoding.tokenization import tokenize_battles
from arena_distill.files import artifacts, parquet_files
from arena_distill.files.artifacts import (
    Spill,
    read_json,
    read_parquet,
    read_parquet_parts,
    write_parquet,
    write_parquet_parts,
)

TINY = ROOT / "workflow/arena_distill/models/tiny/llama"
LIMITS = (
    *((columns, "ROWS_AT_ONCE"), (parquet_files, "ROWS_AT_ONCE"), (artifacts, "ROW_GROUP")),
    *(
        (audit, "SLICE"),
        (tokenization, "ROWS"),
        (text_encoder, "CHARACTERS"),
        (sequences, "TOKENS"),
    ),
)
"""What bounds a part, where it is read."""


# --- files ------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 7), min_size=1, max_size=6), st.integers(1, 8))
def test_parts_are_written_as_the_whole_is(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], group: int
) -> None:
    folder = tmp_path_factory.mktemp("parts")
    rows = pa.table({"row": range(sum(sizes)), "turns": [["é", None]] * sum(sizes)})
    rows = rows.replace_schema_metadata({"own": "kept"})
    ends = np.cumsum(sizes)
    parts = [rows.slice(end - size, size) for end, size in zip(ends, sizes, strict=True)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(artifacts, "ROW_GROUP", group)
        write_parquet(rows, folder / "whole", {"phase": "p"})
        write_parquet_parts(parts, folder / "parts", {"phase": "p"})
    assert (folder / "parts").read_bytes() == (folder / "whole").read_bytes()
    read = list(read_parquet_parts(folder / "parts", ["turns", "row"]))
    assert max(map(len, read)) <= group
    assert pa.concat_tables(read).equals(rows.select(["turns", "row"]))


def test_what_is_set_aside_comes_back_and_leaves_nothing(tmp_path: Path) -> None:
    tables = [pa.table({"turns": [["é", str(n)], None] * n}) for n in (3, 0, 5)]
    spill = Spill(tables[0].schema, tmp_path)
    first, none, last = (spill.add(table) for table in tables)
    assert next(iter(last)).equals(tables[2])
    assert pa.concat_tables(first).equals(tables[0])
    assert pa.concat_tables(first).equals(tables[0])
    assert not list(none)
    assert not list(tmp_path.iterdir())


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 9)), max_size=12), st.integers(1, 30))
def test_slices_are_gathered_in_parts(wanted: list[tuple[int, int]], most: int) -> None:
    pool = np.arange(100, 130, dtype=np.int32)
    starts, lengths = np.array(wanted, np.int64).reshape(-1, 2).T
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sequences, "TOKENS", most)
        found = gather(pool, starts, lengths)
    assert found.ids.dtype == np.int32
    assert [ids.tolist() for ids in found] == [pool[s : s + n].tolist() for s, n in wanted]


# --- phases -----------------------------------------------------------------------------------------


def phases(raw: Path, folder: Path) -> None:
    """Every phase that reads all texts, from raw files to tokens."""
    files: dict[str, list[Any]] = {path.stem.split("-")[0]: [] for path in sorted(raw.iterdir())}
    for path in sorted(raw.iterdir()):
        files[path.stem.split("-")[0]].append(path)
    battles, folds = folder / "battles.parquet", folder / "folds.parquet"
    names = (battles, folder / "rejected.parquet", folder / "reading.json")
    write_battles(files, *names, BattlesSettings(version=1, max_refused=1))
    kept = {"method": "stratified_group", "n": 2, "near_duplicates": True, "audit": Audit()}
    write_folds(battles, folds, settings=FoldsSettings(version=1, **kept))
    how = AuditSettings(version=1)
    write_audit(battles, folds, folder / "audit.json", folder / "leaks.csv", settings=how)
    tokenize_battles(
        battles, TINY, folder / "tokens.parquet", settings=TokensSettings(version=1, names=True)
    )


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Files of battles that share prompts, some nearly the same, some with faults, with large strings."""
    battles = made_up_battles(train=60, extra=20, ut=30, test=9)
    prompts = battles["prompt"].to_pylist()
    likes = [[*prompts[n % 7][:-1], prompts[n % 7][-1] + " ﬁn Straße"[: n % 11]]
             for n in range(len(prompts))]  # fmt: skip
    mixed = [a if n % 3 else b for n, (a, b) in enumerate(zip(prompts, likes, strict=True))]
    winners = pa.array(["model_a", "model_b", "tie", None]).take(pc.fill_null(
        pa.array([n * 7 % 4 if n % 5 else n % 3 for n in range(len(battles))]), 3))  # fmt: skip
    texts = pa.large_list(pa.large_string())
    answers = [["I do not  know."] if n % 2 else turns
               for n, turns in enumerate(battles["response_b"].to_pylist())]  # fmt: skip
    (folder := tmp_path / "raw").mkdir()
    for source in ("train", "extra", "ut", "test"):
        mine = pc.equal(battles["source"], source)
        table = pa.table(
            {
                "id": battles["id"],
                "prompt": pa.array(mixed, texts),
                "response_a": battles["response_a"].cast(texts),
                "response_b": pa.array(answers, texts),
                "winner": winners,
            }
        ).filter(mine)
        half = len(table) // 2 + 1
        for number, start in enumerate((0, half)):  # the second file repeats an id of the first
            some = table.slice(max(start - (source != "test"), 0), half)
            pq.write_table(some, folder / f"{source}-{number}.parquet", row_group_size=8)
    return folder


@pytest.mark.parametrize("limit", [1, 5])
def test_phases_write_the_same_whatever_is_in_memory_at_once(
    limit: int, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    phases(raw, whole)
    before = read_tokens(whole / "tokens.parquet")
    for module, name in LIMITS:
        assert getattr(module, name) > 1_000
        monkeypatch.setattr(module, name, limit)
    phases(raw, parts)
    assert pq.ParquetFile(parts / "tokens.parquet").num_row_groups == -(-len(before) // limit)
    for path in sorted(whole.iterdir()):
        other = parts / path.name
        if path.suffix == ".parquet":
            assert read_parquet(other).equals(read_parquet(path), check_metadata=True), path.name
        else:
            assert other.read_bytes() == path.read_bytes(), path.name
    assert len(read_parquet(whole / "rejected.parquet")) > 3
    relations = read_json(whole / "audit.json")["relations"]
    assert all(any(found[kind] for found in relations) for kind in ("same", "near", "answers"))
    after = read_tokens(parts / "tokens.parquet")
    rows = np.arange(len(after))[::-2]
    for one, two in zip(
        before.take(rows).fields.values(), after.take(rows).fields.values(), strict=True
    ):
        np.testing.assert_array_equal(one.tokens.ids, two.tokens.ids)
        np.testing.assert_array_equal(one.turns.offsets, two.turns.offsets)


@pytest.mark.slow
def test_prompts_of_more_than_2_gb_are_grouped_and_compared() -> None:
    """A column of 2.2 GB that takes 70 MB, as its chunks are one and the same."""
    once = pa.array([[letter * (1 << 22)] for letter in "abcdefghijklmnop"])
    prompts = pa.chunked_array([pa.array([["x"], ["B" * (1 << 22)]]), *[once] * 33])
    assert prompts.nbytes > 1 << 31
    groups = prompt_groups(prompts)
    assert groups.tolist() == [0, 1] + [2, 1, *range(3, 17)] * 33
    battles = pa.table({"prompt": prompts, "group": groups})
    numbers, texts = distinct_prompts(battles)
    assert numbers.tolist() == groups.tolist()
    assert [text[:2] for text in texts.to_pylist()] == [
        "x",
        "bb",
        "aa",
        *(x * 2 for x in "cdefghijklmnop"),
    ]
    assert len(np.unique(near_groups(texts, **Audit().model_dump()))) == 17


# --- the benchmark ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_benchmark_compares_sizes(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks/sizes.py"), "--rows", "300", "600"]
    command += ["--folder", str(tmp_path), "--phases", "read-battles", "tokenize-battles"]
    path = os.environ | {"PYTHONPATH": str(ROOT / "workflow")}
    done = subprocess.run(command, env=path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[2:]]
    assert [row[:2] for row in rows] == [
        *(["300", "read-battles"], ["300", "tokenize-battles"]),
        *(["600", "read-battles"], ["600", "tokenize-battles"]),
    ]
    assert len(read_parquet(tmp_path / "600/battles.parquet", ["id"])) == 600
