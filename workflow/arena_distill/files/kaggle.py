"""Talk to Kaggle by its own clients: tokens, models, submissions.

The clients are no part of a plain installation (``pip install 'arena-distill[publish]'``; to fetch,
``[fetch]`` is enough).
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from collections.abc import Mapping
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from arena_distill.errors import InputError, brief

if TYPE_CHECKING:
    from kaggle.api.kaggle_api_extended import KaggleApi

FRAMEWORK = "transformers"
"""What Kaggle files our models under."""


def client_problem(what: str, extra: Literal["fetch", "publish"]) -> str | None:
    """Which package of `extra` is missing here; None: none is."""
    needed = ("kaggle",) if extra == "fetch" else ("kaggle", "kagglehub")
    if all(importlib.util.find_spec(name) for name in needed):
        return None
    return (
        f"{what} needs Kaggle's client, which is not installed for "
        f"{sys.executable}: pip install 'arena-distill[{extra}]'"
    )


def token_exported() -> bool:
    """Whether the environment holds a token of Kaggle."""
    return "KAGGLE_API_TOKEN" in os.environ or {"KAGGLE_USERNAME", "KAGGLE_KEY"} <= set(os.environ)


def check_publishing(what: str) -> None:
    """Check client and token before anything is sent.

    Raises:
        InputError: a package, or a token in the environment, is missing.
    """
    if problem := client_problem(what, "publish"):
        raise InputError(problem)
    if not token_exported():
        raise InputError(
            f"{what} needs a token of Kaggle (kaggle.com/settings): export KAGGLE_API_TOKEN, or "
            "KAGGLE_USERNAME and KAGGLE_KEY"
        )


def model_is_private(name: str) -> bool | None:
    """Whether a model, ``OWNER/MODEL``, is private; None: there is none that this token may see.

    Raises:
        InputError: Kaggle does not answer.
    """
    from requests import HTTPError

    try:
        return bool(_client().model_get(name).is_private)
    except HTTPError as error:
        status = None if error.response is None else error.response.status_code
        if status in (HTTPStatus.NOT_FOUND, HTTPStatus.FORBIDDEN):
            return None
        raise _refused(f"kaggle:{name}", error) from error
    except Exception as error:  # of the client, of the network
        raise _refused(f"kaggle:{name}", error) from error


def upload_model(name: str, files: Mapping[str, Path], *, notes: str) -> None:
    """Send a new version of a model; a model that is not there is made, private.

    Args:
        name: ``OWNER/MODEL/VARIATION``.
        files: what is sent, and nothing else, by its path there.

    Raises:
        InputError: Kaggle refuses it, or does not answer.
    """
    import kagglehub

    owner, model, variation = name.split("/")
    with tempfile.TemporaryDirectory() as folder:  # the client sends folders whole
        for path, file in files.items():
            target = Path(folder, path)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.symlink(file.resolve(), target)
        try:
            kagglehub.model_upload(
                f"{owner}/{model}/{FRAMEWORK}/{variation}", folder, version_notes=notes
            )
        except Exception as error:
            raise _refused(f"kaggle:{name}", error) from error


def submit_file(competition: str, file: Path, *, message: str) -> str:
    """Submit a file to a competition; returns what Kaggle says of it.

    Raises:
        InputError: Kaggle refuses it, or does not answer.
    """
    try:
        api = _client()
        said = str(api.competition_submit(str(file), message, competition, quiet=True).message)
        if said == api.COMPETITION_SUBMIT_UPLOAD_FAILED_MESSAGE:
            raise ConnectionError(said)
    except Exception as error:
        raise _refused(
            f"kaggle:{competition}",
            error,
            f"; have you accepted the rules at kaggle.com/competitions/{competition}, and does it take "
            "files, not notebooks alone?",
        ) from error
    return said


def _client() -> KaggleApi:
    from kaggle.api.kaggle_api_extended import KaggleApi

    api = KaggleApi()
    try:
        api.authenticate()
    except SystemExit:  # after a page of advice
        raise PermissionError(
            "it does not know this token, or the token is no longer valid"
        ) from None
    return api


def _refused(
    where: str, error: Exception, advice: str = "; check the token and the name"
) -> InputError:
    return InputError(f"{where}: Kaggle refused it, or does not answer: {brief(error)}{advice}")
