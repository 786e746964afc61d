"""Files between phases: complete or absent, with their provenance."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from arena_distill.errors import InputError
from arena_distill.files.artifacts import (
    ROW_GROUP,
    atomic_directory,
    provenance,
    read_json,
    read_parquet,
    read_provenance,
    report_full_disk,
    write_json,
    write_parquet,
    write_text,
)
from arena_distill.files.logits import ids_path, read_logits, write_logits

TABLE = pa.table({"id": ["a", "b"], "fold": pa.array([0, 1], pa.int8())})


def some_logits(rows: int = 2) -> np.ndarray:
    return np.arange(rows * 6, dtype=np.float32).reshape(rows, 2, 3)


def test_provenance_says_phase_settings_and_versions() -> None:
    origin = provenance("folds", {"n": 5})
    assert origin["phase"] == "folds"
    assert origin["settings"] == {"n": 5}
    assert origin["versions"]["pyarrow"] == pa.__version__
    assert {"python", "arena_distill", "numpy"} <= set(origin["versions"])
    assert json.loads(json.dumps(origin)) == origin == provenance("folds", {"n": 5})


def test_parquet_comes_back_with_its_origin(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder=1" / "t.parquet"
    table = TABLE.replace_schema_metadata({b"own": b"kept"})
    write_parquet(table, path, provenance("p", {"é": 1}))
    assert read_parquet(path).equals(TABLE)
    assert read_parquet(path).schema.metadata[b"own"] == b"kept"
    assert read_parquet(path, ["fold", "id"]).column_names == ["fold", "id"]
    assert read_provenance(path)["settings"] == {"é": 1}


def test_long_tables_are_read_group_by_group(tmp_path: Path) -> None:
    """Arrow reads no list of texts of more than 2 GB at once."""
    table = pa.table({"row": range(2 * ROW_GROUP + 1), "turns": [["é", ""]] * (2 * ROW_GROUP + 1)})
    write_parquet(table, tmp_path / "t.parquet", {})
    assert pq.ParquetFile(tmp_path / "t.parquet").num_row_groups == 3
    assert read_parquet(tmp_path / "t.parquet").equals(table)
    assert read_parquet(tmp_path / "t.parquet", ["row"])["row"].num_chunks == 3
    write_parquet(table.slice(0, 0), tmp_path / "t.parquet", {})
    assert read_parquet(tmp_path / "t.parquet", ["turns"]).equals(
        table.slice(0, 0).select(["turns"])
    )


def test_same_table_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_parquet(TABLE, tmp_path / name, provenance("p", {}))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_damaged_parquet_is_named(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    with pytest.raises(InputError, match=r"t\.parquet: no such file"):
        read_parquet(path)
    with pytest.raises(InputError, match=r"t\.parquet: no such file"):
        read_provenance(path)
    write_parquet(pa.table({"x": np.arange(1000)}), path, {})
    whole = path.read_bytes()
    with pytest.raises(InputError, match="no column y; the file has x"):
        read_parquet(path, ["y"])
    flipped = bytearray(whole)
    flipped[200] ^= 1
    for content in (b"", whole[:-9], whole[: len(whole) // 2], bytes(flipped)):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"t\.parquet: not a whole parquet file.* delete it"):
            read_parquet(path)


def test_pickle_named_parquet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    path.write_bytes(pickle.dumps(TABLE.to_pydict()))
    with pytest.raises(InputError, match="not a whole parquet file"):
        read_parquet(path)


def test_foreign_parquet_has_no_provenance(tmp_path: Path) -> None:
    pq.write_table(TABLE, tmp_path / "t.parquet")
    with pytest.raises(InputError, match="not written by Arena Distill"):
        read_provenance(tmp_path / "t.parquet")


def test_failed_write_leaves_the_old_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.json"
    write_json({"b": 1, "a": "é"}, path)
    assert path.read_text() == '{\n  "b": 1,\n  "a": "é"\n}\n'
    with pytest.raises(ValueError):
        write_json({"x": float("nan")}, path)
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_text("half", path)
    with pytest.raises(OSError, match="disk full"):
        write_parquet(TABLE, path, {})
    assert read_json(path) == {"b": 1, "a": "é"}
    assert os.listdir(tmp_path) == ["t.json"]


def test_broken_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text("{")
    with pytest.raises(InputError, match=r"t\.json: not a JSON file"):
        read_json(tmp_path / "t.json")
    with pytest.raises(InputError, match=r"u\.json: no such file"):
        read_json(tmp_path / "u.json")


def test_files_get_the_usual_permissions(tmp_path: Path) -> None:
    write_text("x", tmp_path / "file")
    (tmp_path / "other").write_text("x")
    with atomic_directory(tmp_path / "folder"):
        pass
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("file", "other")]
    assert modes[0] == modes[1]
    assert (tmp_path / "folder").stat().st_mode & 0o055


def test_directory_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "model"
    with atomic_directory(path) as folder:
        (folder / "old").write_text("1")
        assert not path.exists()
    with atomic_directory(path) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "new").write_text("2")
        assert os.listdir(path) == ["old"]
    assert os.listdir(path) == ["sub"]
    with pytest.raises(RuntimeError), atomic_directory(path) as folder:
        (folder / "half").write_text("3")
        raise RuntimeError
    assert os.listdir(path) == ["sub"]
    assert os.listdir(tmp_path) == ["model"]


@settings(max_examples=15, deadline=None)
@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(0, 4), st.integers(1, 2), st.just(3)),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
    )
)
def test_logits_come_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, logits: np.ndarray
) -> None:
    path = tmp_path_factory.mktemp("logits") / "fold_0.npy"
    ids = pa.table({"id": pa.array([str(i) for i in range(len(logits))], pa.string())})
    write_logits(path, logits, ids, provenance("logits", {}))
    again, ids_again = read_logits(path)
    assert again.dtype == np.float32
    assert again.tobytes() == logits.tobytes()
    assert ids_again.equals(ids)
    assert ids_path(path).name == "fold_0.ids.parquet"
    assert read_provenance(ids_path(path))["phase"] == "logits"


@pytest.mark.parametrize(
    ("logits", "fault"),
    [
        (some_logits().astype(np.float64), "float64, float32 expected"),
        (some_logits()[:, 0], "shape"),
        (some_logits()[..., :1], "shape"),
        (some_logits(3), "3 rows of logits for 2 ids"),
        (some_logits() * np.float32("nan"), "2 rows of logits are not finite"),
    ],
)
def test_wrong_logits_are_not_written(tmp_path: Path, logits: np.ndarray, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        write_logits(tmp_path / "fold_0.npy", logits, TABLE, {})
    assert not os.listdir(tmp_path)


def test_logits_and_ids_of_two_runs_are_never_mixed(tmp_path: Path) -> None:
    path = tmp_path / "fold_0.npy"
    write_logits(path, some_logits(), TABLE, {})
    old = path.read_bytes()
    write_logits(path, -some_logits(), TABLE, {})
    for content in (old, old[:-1], b"", pickle.dumps(old)):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"fold_0\.npy: damaged, or not.* delete it"):
            read_logits(path)
    path.unlink()
    with pytest.raises(InputError, match=r"fold_0\.npy: cannot be read"):
        read_logits(path)
    ids_path(path).unlink()
    with pytest.raises(InputError, match=r"fold_0\.ids\.parquet: no such file"):
        read_logits(path)


# --- a full disk --------------------------------------------------------------------------------------


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk with little free space."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "arena", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def write_weights(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"w": torch.rand(100_000)}, folder / "w.safetensors")


def write_optimizer(folder: Path) -> None:
    import torch

    torch.save(torch.rand(100_000), folder / "optimizer.pt")


@pytest.mark.parametrize("write", [write_weights, write_optimizer])
@pytest.mark.parametrize("name", ["adapter", "x.npy", "x.parquet", "x.txt"])
def test_a_full_disk_is_told_and_leaves_nothing_half_written(
    name: str, write: Any, full_disk: Path
) -> None:
    path = full_disk / name
    with pytest.raises(InputError, match=f"{name}: no space left on its disk"):
        if name == "adapter":
            with atomic_directory(path) as folder:
                write(folder)
        elif name == "x.npy":
            ids = pa.table({"id": np.arange(50_000)})
            write_logits(path, np.zeros((50_000, 2, 3), np.float32), ids, {})
        elif name == "x.parquet":
            write_parquet(pa.table({"x": np.random.default_rng(0).random(99_000)}), path, {})
        else:
            write_text("x" * 999_999, path)
    assert not [file for file in full_disk.rglob("*") if file.name != "x.ids.parquet"]


@pytest.mark.parametrize("write", [write_weights, write_optimizer])
def test_a_full_disk_is_told_whoever_writes(write: Any, full_disk: Path) -> None:
    with pytest.raises(InputError, match="no space left"), report_full_disk(full_disk):
        write(full_disk)


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="mine"), report_full_disk(tmp_path):
        raise RuntimeError("mine")
