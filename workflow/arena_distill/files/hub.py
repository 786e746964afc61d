"""Download from the Hugging Face hub, check access to its repositories, and publish models there."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from arena_distill.errors import InputError, brief

Kind = Literal["model", "dataset"]

ATTEMPTS = 5
"""Attempts at a download; each resumes where the last one stopped."""


def download(
    repo: str,
    revision: str,
    folder: Path,
    *,
    patterns: Sequence[str],
    repo_type: Kind = "model",
    advice: str,
) -> str:
    """Download files of a repository into a folder.

    Args:
        revision: a commit, or a tag or branch, which is resolved to its current commit.
        patterns: glob patterns of the files.
        advice: what to do if the download fails.

    Returns:
        The commit.

    Raises:
        InputError: it cannot be downloaded.
    """
    from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential

    def passing(error: BaseException) -> bool:
        """Whether to try again: on broken connections and busy servers, not on refusals."""
        if isinstance(error, OfflineModeIsEnabled | LocalEntryNotFoundError):
            return False
        if isinstance(error, HfHubHTTPError):
            return error.response.status_code >= 500 or error.response.status_code == 429
        return isinstance(error, OSError) and not isinstance(error, FileNotFoundError)

    retrying = Retrying(
        retry=retry_if_exception(passing),
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_exponential(max=60),
        reraise=True,
    )
    try:
        if re.fullmatch("[0-9a-f]{40}", revision):
            commit = revision
        else:
            found = huggingface_hub.HfApi().repo_info(repo, revision=revision, repo_type=repo_type)
            commit = str(found.sha)
        retrying(
            huggingface_hub.snapshot_download,
            repo,
            revision=commit,
            repo_type=repo_type,
            local_dir=folder,
            allow_patterns=list(patterns),
        )
    except Exception as error:  # the client raises many types; the advice is the same
        raise InputError(
            f"{repo}@{revision}: cannot be downloaded: {_refusal(error)}; check the network and HF_TOKEN, "
            f"or {advice}"
        ) from error
    return commit


def check_sums(repo: str, commit: str, sums: Mapping[str, str], *, repo_type: Kind) -> None:
    """Compare files with the sums that the hub publishes, which it does for large files.

    Args:
        sums: SHA-256 by the file's name in the repository.

    Raises:
        InputError: a file is another one, or the hub does not answer.
    """
    try:
        found = huggingface_hub.HfApi().get_paths_info(
            repo, list(sums), revision=commit, repo_type=repo_type
        )
    except Exception as error:
        raise InputError(
            f"{repo}@{commit}: no sums to compare with: {_refusal(error)}; try again"
        ) from error
    for file in found:
        published = getattr(file, "lfs", None)
        if published and published.sha256 != sums[file.path]:
            raise InputError(
                f"{repo}@{commit}: {file.path} did not arrive as it is published: its SHA-256 is "
                f"{sums[file.path]}, not {published.sha256}; try again"
            )


def access_problem(repo: str, kind: Kind) -> str | None:
    """Ask the hub for access to a repository; returns the problem, or None."""
    try:
        huggingface_hub.HfApi().auth_check(repo, repo_type=kind)
    except Exception as error:
        page = f"huggingface.co/{'datasets/' if kind == 'dataset' else ''}{repo}"
        return (
            f"{repo}: no access on the hub: {_refusal(error)}; check the network, accept the terms at "
            f"{page} if there are any, and export HF_TOKEN"
        )
    return None


@dataclass(frozen=True)
class Repository:
    """What a model repository holds: the names of its files, and whether it is private."""

    private: bool
    files: tuple[str, ...]


def find_repository(repo: str) -> Repository | None:
    """Look at a model repository before something is sent to it; None: there is none.

    Raises:
        InputError: HF_TOKEN is not set, or the hub refuses, or does not answer.
    """
    try:
        found = _writer(repo).model_info(repo)
    except RepositoryNotFoundError as error:
        if error.response.status_code == 404:
            return None
        raise _unpublished(repo, error) from error
    except Exception as error:
        raise _unpublished(repo, error) from error
    names = tuple(file.rfilename for file in found.siblings or ())
    return Repository(bool(found.private), names)


def upload(
    repo: str,
    files: Mapping[str, Path],
    *,
    remove: Sequence[str],
    create: Literal["private", "public"] | None,
    message: str,
) -> str:
    """Send files to a model repository, as one commit.

    Args:
        files: what is sent, and nothing else, by its path there.
        remove: the names of files there that the commit removes.
        create: make the repository first, which is not there; None: it is.

    Returns:
        The address of the commit.

    Raises:
        InputError: HF_TOKEN is not set, or the hub refuses, or does not answer.
    """
    added = [huggingface_hub.CommitOperationAdd(name, file) for name, file in files.items()]
    removed = [huggingface_hub.CommitOperationDelete(name) for name in remove]
    api = _writer(repo)
    try:
        if create:
            api.create_repo(repo, private=create == "private")
        done = api.create_commit(repo, [*added, *removed], commit_message=message)
    except Exception as error:
        raise _unpublished(repo, error) from error
    return str(done.commit_url)


def _writer(repo: str) -> huggingface_hub.HfApi:
    """A client with the token of the environment, and no other."""
    if not (token := os.environ.get("HF_TOKEN")):
        raise InputError(
            f"hub:{repo} needs a token that may write: export HF_TOKEN (huggingface.co/settings/tokens)"
        )
    return huggingface_hub.HfApi(token=token)


def _unpublished(repo: str, error: Exception) -> InputError:
    return InputError(
        f"hub:{repo}: cannot be published: {_refusal(error)}; check the network, the name, and that "
        "HF_TOKEN may write there"
    )


_REFUSALS: dict[type[Exception], str] = {
    OfflineModeIsEnabled: "HF_HUB_OFFLINE is set",
    GatedRepoError: "it is gated, and HF_TOKEN is missing or its owner has not accepted the terms",
    RepositoryNotFoundError: "it is not there, or private and HF_TOKEN may not read it",
    RevisionNotFoundError: "it has no such revision",
    LocalEntryNotFoundError: "the hub does not answer",
}
"""What the client's errors mean; a gated repository is one kind of those not found."""


def _refusal(error: BaseException) -> str:
    """What the hub said, in a few words."""
    return next((text for kind, text in _REFUSALS.items() if isinstance(error, kind)), brief(error))
