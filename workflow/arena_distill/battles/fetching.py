"""Download published battles into files of the Kaggle schema, for ``data.fetch`` only. Besides the download
of backbones, nothing else uses the network.

A file of a Kaggle competition is stored unchanged. Data sets of the Hugging Face hub are stored unchanged
or converted: rated answers (:func:`ultrafeedback_battles`) and conversations with votes
(:func:`arena_battles`). Tokens are read by Kaggle's client and the hub's from their usual places
(environment, home directory), and are never written.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from arena_distill.battles.prompts import normalised
from arena_distill.battles.reading import read_battles
from arena_distill.config.backbone import Backbone
from arena_distill.config.data import Fetch
from arena_distill.config.phases import FetchSettings
from arena_distill.errors import InputError, brief
from arena_distill.files.artifacts import provenance, write_parquet
from arena_distill.files.hub import access_problem, download

_TURNS = pa.list_(pa.string())
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("model_a", pa.string()),
        ("model_b", pa.string()),
        ("prompt", _TURNS),
        ("response_a", _TURNS),
        ("response_b", _TURNS),
        ("winner", pa.string()),  # model_a, model_b or tie
    ]
)

KAGGLE_FILES = ("kaggle.json", "access_token", "credentials.json")
"""The files of Kaggle's credentials below ~/.kaggle (or KAGGLE_CONFIG_DIR)."""


def fetch_battles(output: Path, *, without: Sequence[Path], settings: FetchSettings) -> None:
    """Fetch one file of battles.

    Args:
        output: the file to write.
        without: files of battles, in the Kaggle schema; battles with one of their prompts are omitted.

    Raises:
        InputError: a token or a package is missing, the network does not answer, the file does not
            exist, or it has another format.
    """
    if problem := _problem(settings):
        raise InputError(problem)
    with tempfile.TemporaryDirectory(dir=_folder(output)) as scratch:
        if settings.kaggle:
            _from_kaggle(settings.kaggle, settings.files[0], Path(scratch))
            commit, files = None, [Path(scratch) / Path(settings.files[0]).name]
        else:
            assert settings.hub and settings.revision
            commit = download(
                settings.hub,
                settings.revision,
                Path(scratch),
                patterns=settings.files,
                repo_type="dataset",
                advice="download it elsewhere, and remove it from data.fetch",
            )
            files = sorted(f for p in settings.files for f in Path(scratch).glob(p) if f.is_file())
        if not files:
            raise InputError(
                f"{output}: {settings.source()} has no file {', '.join(settings.files)}"
            )
        if settings.format == "battles":
            if len(files) > 1:
                raise InputError(
                    f"{output}: {len(files)} files of {settings.source()} match; name one of them"
                )
            os.replace(files[0], output)
            print(f"{output}: {settings.source()}")
            return
        rows = (row for file in files for row in _rows(file))
        if settings.format == "ultrafeedback":
            battles = ultrafeedback_battles(rows, seed=settings.seed)
        else:
            battles = arena_battles(rows, without=_prompts(without))
    if not len(battles):
        raise InputError(
            f"{output}: {settings.source()} holds no battle as {settings.format} has them"
        )
    about = {"commit": commit} | settings.model_dump(mode="json")
    write_parquet(battles, output, provenance("fetch", about))
    print(f"{output}: {len(battles):,} battles of {settings.source()}")


def check_access(origins: Iterable[Fetch], backbones: Iterable[Backbone]) -> None:
    """Check access to all downloads before a run starts.

    Raises:
        InputError: a line for each problem: a missing package or token, or a repository without
            access.
    """
    problems = [_problem(origin) for origin in origins]
    wanted = {b.hub for b in backbones if b.hub}
    problems += [access_problem(repo, "model") for repo in sorted(wanted)]
    if found := list(dict.fromkeys(p for p in problems if p)):
        raise InputError("\n".join(found))


def _problem(origin: Fetch) -> str | None:
    """Why this source cannot be fetched; None if it can."""
    if origin.hub:
        return access_problem(origin.hub, "dataset")
    if importlib.util.find_spec("kaggle") is None:
        return (
            f"data.fetch: {origin.source()} needs Kaggle's client, which is not installed for "
            f"{sys.executable}: pip install 'arena-distill[fetch]'"
        )
    by_name = {"KAGGLE_USERNAME", "KAGGLE_KEY"} <= set(os.environ)
    folder = Path(os.environ.get("KAGGLE_CONFIG_DIR", Path.home() / ".kaggle"))
    if (
        by_name
        or "KAGGLE_API_TOKEN" in os.environ
        or any((folder / n).exists() for n in KAGGLE_FILES)
    ):
        return None
    return (
        f"data.fetch: {origin.source()} needs a token of Kaggle (kaggle.com/settings): export "
        f"KAGGLE_API_TOKEN, or KAGGLE_USERNAME and KAGGLE_KEY, or put kaggle.json into {folder}"
    )


def _from_kaggle(competition: str, name: str, folder: Path) -> None:
    """Download a file of a competition into a folder with Kaggle's own client."""
    command = [sys.executable, "-m", "kaggle", "competitions", "download", competition]
    done = subprocess.run(
        [*command, "-f", name, "-p", str(folder), "-q"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    packed = folder / f"{Path(name).name}.zip"
    if packed.exists():
        with (
            zipfile.ZipFile(packed) as archive,
            archive.open(archive.namelist()[0]) as source,
            open(folder / Path(name).name, "wb") as target,
        ):
            shutil.copyfileobj(source, target)
    if done.returncode or not (folder / Path(name).name).exists():
        said = (done.stderr.strip() or done.stdout.strip() or "nothing was downloaded").splitlines()
        raise InputError(
            f"kaggle {competition}/{name}: cannot be downloaded: {said[-1][:300]}; have you accepted "
            f"the rules at kaggle.com/competitions/{competition}?"
        )


# --- formats ------------------------------------------------------------------------------------------


def ultrafeedback_battles(rows: Iterable[Mapping[str, Any]], *, seed: int) -> pa.Table:
    """Convert UltraFeedback (Cui et al. 2023, arXiv:2310.01377) to battles with GPT-4's ratings as votes.

    A battle has two answers to a prompt; the better rated one wins, and equal ratings are a tie. The two
    answers and their order are drawn from seed and prompt, so they do not depend on other rows.

    Args:
        rows: of `openbmb/UltraFeedback` (`instruction`, `completions` with `model`, `response` and
            `fine-grained_score`, the mean rating of four aspects; `overall_score` is wrong in places),
            or of `HuggingFaceH4/ultrafeedback_binarized` (`chosen`, `rejected` and their scores: the
            best answer and another).

    Returns:
        Table of `SCHEMA`. Prompts without two rated answers are omitted.

    Raises:
        InputError: the rows have neither form.
    """
    battles = []
    for number, row in enumerate(rows, 1):
        if "completions" in row:
            prompt = str(row["instruction"])
            rated = [
                (c.get("model"), str(c["response"]), float(c["fine-grained_score"]))
                for c in row["completions"]
                if c.get("fine-grained_score") is not None and c.get("response") is not None
            ]
        elif "chosen" in row:
            prompt = str(row["prompt"])
            sides = ((row[side], row[f"score_{side}"]) for side in ("chosen", "rejected"))
            rated = [(None, str(turns[-1]["content"]), float(score)) for turns, score in sides]
        else:
            raise InputError(
                f"UltraFeedback: row {number} has neither completions nor chosen and rejected: "
                f"{', '.join(row)}"
            )
        if len(rated) < 2:
            continue
        digest = hashlib.sha256(f"{seed} {prompt}".encode("utf-8", "replace")).digest()
        drawn = np.random.default_rng(list(digest)).permutation(len(rated))[:2]
        (model_a, a, rating_a), (model_b, b, rating_b) = (rated[i] for i in drawn)
        winner = "tie" if rating_a == rating_b else "model_a" if rating_a > rating_b else "model_b"
        battles.append(_battle(f"ut{number}", (model_a, model_b), [prompt], [a], [b], winner))
    return pa.Table.from_pylist(battles, schema=SCHEMA)


def arena_battles(rows: Iterable[Mapping[str, Any]], *, without: Collection[str] = ()) -> pa.Table:
    """Convert conversations with two models to battles, such as `lmsys/chatbot_arena_conversations`.

    Args:
        rows: `question_id`, `model_a`, `model_b`, `conversation_a` and `conversation_b` as lists of
            messages with `role` and `content`, `winner` (model_a, model_b, tie, tie (bothbad)).
        without: prompts, as by :func:`_plain`, of battles that are there already: in such sets whole
            battles come again, and a prompt that also stands in a validation fold is a leak.

    Returns:
        Table of `SCHEMA`. Of rows with the same prompt and answers the first is kept.

    Raises:
        InputError: a row lacks a column.
    """
    battles, seen = [], set()
    for number, row in enumerate(rows, 1):
        try:
            prompt = _said(row["conversation_a"], "user")
            a, b = (_said(row[f"conversation_{side}"], "assistant") for side in "ab")
            models, winner = (row["model_a"], row["model_b"]), str(row["winner"])
        except (KeyError, TypeError) as error:
            raise InputError(f"conversations: row {number} cannot be read: {error!r}") from None
        key = (_plain(prompt), tuple(a), tuple(b))
        if key[0] in without or key in seen:
            continue
        seen.add(key)
        vote = winner if winner in ("model_a", "model_b") else "tie"
        name = str(row.get("question_id") or f"arena{number}")
        battles.append(_battle(name, models, prompt, a, b, vote))
    return pa.Table.from_pylist(battles, schema=SCHEMA)


def _battle(
    name: str,
    models: tuple[str | None, str | None],
    prompt: list[str],
    a: list[str],
    b: list[str],
    winner: str,
) -> dict[str, Any]:
    values = (name, *models, *(list(map(_utf8, turns)) for turns in (prompt, a, b)), winner)
    return dict(zip(SCHEMA.names, values, strict=True))


def _said(conversation: Iterable[Mapping[str, Any]], role: str) -> list[str]:
    return [str(message["content"] or "") for message in conversation if message["role"] == role]


def _plain(prompt: Iterable[str]) -> str:
    """A prompt as it is compared: see `battles.prompts`."""
    return normalised(" ".join(map(_utf8, prompt)))


def _utf8(text: str) -> str:
    """Replace lone surrogates, which JSON may contain but UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _prompts(files: Sequence[Path]) -> set[str]:
    if not files:
        return set()
    battles, _ = read_battles({"extra": list(files)})
    return {_plain(turns) for turns in battles["prompt"].to_pylist()}


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSONL or parquet file."""
    try:
        if file.suffix == ".parquet":
            for batch in pq.ParquetFile(file).iter_batches(1024):
                yield from batch.to_pylist()
            return
        with open(file, encoding="utf-8") as lines:
            for line in lines:
                if line.strip():
                    yield json.loads(line)
    except (ValueError, OSError, pa.ArrowException) as error:
        raise InputError(f"{file.name}: cannot be read: {brief(error)}") from None


def _folder(output: Path) -> Path:
    output.parent.mkdir(parents=True, exist_ok=True)
    return output.parent
