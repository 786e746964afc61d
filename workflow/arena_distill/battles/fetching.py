"""Download published battles: files of Kaggle competitions, and data sets of the Hugging Face hub.

Only sources with `kaggle` or `hub` are downloaded; besides, only backbones on the hub and endpoints use the
network. Files are stored as they are published; ``battles.formats`` converts them when they are read.
Tokens are read by Kaggle's client and the hub's from their usual places (environment, home directory), and
are never written.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

from arena_distill.config.backbone import Backbone
from arena_distill.config.phases.battles import FetchSettings
from arena_distill.config.source import Origin
from arena_distill.errors import InputError
from arena_distill.files.artifacts import atomic_directory, file_sha256, provenance, write_json
from arena_distill.files.hub import access_problem, check_sums, download
from arena_distill.files.kaggle import client_problem, token_exported

ORIGIN = "_origin.json"
"""In a folder from the hub: its settings, the commit, and the SHA-256 of each file. No file of battles."""

KAGGLE_FILES = ("kaggle.json", "access_token", "credentials.json")
"""The files of Kaggle's credentials below ~/.kaggle (or KAGGLE_CONFIG_DIR)."""


def fetch_battles(output: Path, *, settings: FetchSettings) -> None:
    """Fetch a file from Kaggle, or files of a data set into a folder.

    Args:
        output: the file or the folder, which is replaced as a whole.

    Raises:
        InputError: a token or a package is missing, the network does not answer, the file does not
            exist, or is not what the hub publishes.
    """
    if problem := _problem(settings):
        raise InputError(problem)
    if settings.kaggle:
        _from_kaggle(settings, output)
    else:
        _from_hub(settings, output)


def _from_hub(settings: FetchSettings, output: Path) -> None:
    assert settings.hub and settings.revision
    with atomic_directory(output) as folder:
        commit = download(
            settings.hub,
            settings.revision,
            folder,
            patterns=settings.files,
            repo_type="dataset",
            advice=f"download it elsewhere and put its files into {output}",
        )
        shutil.rmtree(folder / ".cache", ignore_errors=True)  # the client's notes
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        if not files:
            raise InputError(
                f"{output}: {settings.origin()} has no file {', '.join(settings.files)}"
            )
        sums = {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}
        check_sums(settings.hub, commit, sums, repo_type="dataset")
        about = settings.model_dump(mode="json") | {"commit": commit, "sha256": sums}
        write_json(provenance("fetch", about), folder / ORIGIN)
    print(f"{output}: {len(files)} files of {settings.hub}@{commit}")


def check_access(origins: Iterable[Origin], backbones: Iterable[Backbone]) -> None:
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


def _problem(origin: Origin) -> str | None:
    """Why this source cannot be fetched; None if it can."""
    if origin.hub:
        return access_problem(origin.hub, "dataset")
    if problem := client_problem(origin.origin(), "fetch"):
        return problem
    folder = Path(os.environ.get("KAGGLE_CONFIG_DIR", Path.home() / ".kaggle"))
    if token_exported() or any((folder / name).exists() for name in KAGGLE_FILES):
        return None
    return (
        f"{origin.origin()} needs a token of Kaggle (kaggle.com/settings): export "
        f"KAGGLE_API_TOKEN, or KAGGLE_USERNAME and KAGGLE_KEY, or put kaggle.json into {folder}"
    )


def _from_kaggle(settings: FetchSettings, output: Path) -> None:
    """Download a file of a competition with Kaggle's own client."""
    name = settings.files[0] if settings.files else output.name
    command = [sys.executable, "-m", "kaggle", "competitions", "download", str(settings.kaggle)]
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        done = subprocess.run(
            [*command, "-f", name, "-p", folder, "-q"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        file = Path(folder, Path(name).name)
        packed = file.with_name(f"{file.name}.zip")
        if packed.exists():
            with (
                zipfile.ZipFile(packed) as archive,
                archive.open(archive.namelist()[0]) as source,
                open(file, "wb") as target,
            ):
                shutil.copyfileobj(source, target)
        if done.returncode or not file.exists():
            said = (
                done.stderr.strip() or done.stdout.strip() or "nothing was downloaded"
            ).splitlines()
            raise InputError(
                f"{settings.origin()}/{name}: cannot be downloaded: {said[-1][:300]}; have you accepted "
                f"the rules at kaggle.com/competitions/{settings.kaggle}?"
            )
        digest = file_sha256(file)
        os.replace(file, output)
    print(f"{output}: {name} of {settings.origin()}, SHA-256 {digest}")
