"""Publish a finished judge on the Hugging Face hub or Kaggle, and submit predictions to a competition.

Nothing is sent before all of it is shown and somebody agrees. A judge is sent only if it is the one of its
test vectors and fingerprints, and no file but its own. What is new is private.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import pyarrow.csv as pa_csv

from arena_distill.errors import InputError, refusing, shown
from arena_distill.files import hub, kaggle
from arena_distill.judging.contract import FILE, MEMBERS, StackContract, read_contract
from arena_distill.judging.judge import Judge
from arena_distill.judging.vectors import print_verification
from arena_distill.layout import Layout
from arena_distill.verdicts import WINNERS

Agree = Callable[[str], bool]
"""A question → whether somebody says yes."""

OWN = (".safetensors", ".json", ".jinja", ".model", ".txt", ".md")
"""Suffixes of a judge's files."""

WEIGHTS = ".safetensors"

CARD = "README.md"

COLUMNS = (["id", *WINNERS], ["id", "winner"])
"""Of submissions, with ties and of two classes."""

_NAME = r"[\w.-]+"
_FORMS = {
    "hub": ("hub:ORG/NAME", f"{_NAME}/{_NAME}"),
    "kaggle": ("kaggle:OWNER/MODEL/VARIATION", f"{_NAME}/{_NAME}/{_NAME}"),
}


@dataclass(frozen=True)
class Address:
    """Where a judge is published; `name` is ``ORG/NAME``, or on Kaggle ``OWNER/MODEL/VARIATION``."""

    service: Literal["hub", "kaggle"]
    name: str

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read ``hub:…`` or ``kaggle:…``.

        Raises:
            InputError: it is neither.
        """
        service, _, name = text.partition(":")
        if service in ("hub", "kaggle") and re.fullmatch(_FORMS[service][1], name):
            return cls(cast(Literal["hub", "kaggle"], service), name)
        forms = " or ".join(form for form, _ in _FORMS.values())
        raise InputError(f"--to {shown(text)}: {forms} expected")

    def __str__(self) -> str:
        return f"{self.service}:{self.name}"


@dataclass(frozen=True)
class Place:
    """What is found at an address.

    new: whether there is nothing yet.
    private: what it is, or will be.
    remove: files of the judge that is there, which the new one does not have.
    """

    new: bool
    private: bool
    remove: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{'new, ' if self.new else ''}{'private' if self.private else 'PUBLIC'}"


def push(folder: Path, to: Address, *, public: bool, agree: Agree) -> None:
    """Publish a finished judge.

    Args:
        public: whether anybody may read it.
        agree: is asked once all is shown, and before anything is sent.

    Raises:
        InputError: the folder is not the judge of its `judge.json`, or holds something else; a package or
            a token is missing; the place holds something else, or is public without `public`; nobody
            agrees; the service refuses.
    """
    contract, files = read_contract(folder), judge_files(folder)
    place = (_on_the_hub if to.service == "hub" else _on_kaggle)(to, files, public)
    if not (place.private or public):
        raise InputError(f"{to} is public: give another name, or --public")
    if not print_verification(Judge.from_pretrained(folder), folder=folder):
        raise InputError(f"{folder}: not the judge of its {FILE}; nothing was sent")
    print(f"{to} ({place}), from {folder}:")
    for name, file in files.items():
        print(f"{file.stat().st_size:>18,} bytes  {name}")
    for name in place.remove:
        print(f"{'is removed':>24}  {name}")
    if not agree(f"Send {len(files)} files to {to}?"):
        raise InputError(f"{to}: nothing was sent")
    message = f"{contract.judge} of {contract.run}"
    if to.service == "kaggle":
        kaggle.upload_model(to.name, files, notes=message)
        print(f"{to}: sent; Kaggle now processes the files")
        return
    visible: Literal["private", "public"] = "private" if place.private else "public"
    create = visible if place.new else None
    sent = hub.upload(to.name, files, remove=place.remove, create=create, message=message)
    print(f"{to}: {sent}")


def submit(run: Path, to: str, *, message: str | None, agree: Agree) -> None:
    """Submit the predictions of a run to a competition of Kaggle.

    Args:
        run: the folder of the run, which has a `submission.csv`.
        to: ``kaggle:COMPETITION``.
        message: what the submission is called there; by default by the run.
        agree: is asked once all is shown, and before anything is sent.

    Raises:
        InputError: there is no submission; a package or a token is missing; nobody agrees; Kaggle refuses.
    """
    if not re.fullmatch(f"kaggle:{_NAME}", to):
        raise InputError(f"--to {shown(to)}: kaggle:COMPETITION expected")
    file = Path(Layout(str(run)).submission)
    if not file.exists():
        raise InputError(f"{file}: no such file; give the folder of a whole run, results/<run>")
    with refusing(f"{file}: not a submission"):
        table = pa_csv.read_csv(file)
    if table.column_names not in COLUMNS:
        raise InputError(
            f"{file}: no submission of a run: it has the columns {', '.join(table.column_names)}"
        )
    kaggle.check_publishing(to)
    size, columns = file.stat().st_size, ", ".join(table.column_names)
    print(f"{to}, from {file}: {len(table):,} battles, {size:,} bytes, columns {columns}")
    if not agree(f"Submit it to {to}?"):
        raise InputError(f"{to}: nothing was sent")
    name = message or f"arena-distill, {run.resolve().name}"
    said = kaggle.submit_file(to.removeprefix("kaggle:"), file, message=name)
    print(f"{to}: {said}")


def judge_files(folder: Path) -> dict[str, Path]:
    """The files of a finished judge, without hidden ones, by their paths in it.

    Raises:
        InputError: there is something that is no part of a judge: a folder, a link to elsewhere, another
            kind of file, weights without a fingerprint.
    """
    contract = read_contract(folder)
    files: dict[str, Path] = {}
    known = contract.fingerprints
    for file in sorted(path for path in folder.iterdir() if not path.name.startswith(".")):
        if isinstance(contract, StackContract) and file.name == MEMBERS and not file.is_symlink():
            for member in sorted(file.iterdir()):
                if member.name not in contract.members or member.is_symlink():
                    raise InputError(f"{member}: no member of this stack; nothing was sent")
                inner = judge_files(member)
                files |= {f"{MEMBERS}/{member.name}/{name}": path for name, path in inner.items()}
            continue
        weights = file.suffix == WEIGHTS
        if not file.is_file() or file.is_symlink() or file.suffix not in OWN:
            raise InputError(f"{file}: no part of a judge; move it elsewhere: nothing was sent")
        if weights and file.name not in known:
            raise InputError(f"{file}: {FILE} does not know these weights; nothing was sent")
        files[file.name] = file
    return files


def _on_the_hub(to: Address, files: Mapping[str, Path], public: bool) -> Place:
    found = hub.find_repository(to.name)
    if found is None:
        return Place(new=True, private=not public)
    others = set(found.files) - {".gitattributes"}
    if FILE not in others and (strange := others - {CARD}):
        raise InputError(
            f"{to} holds something else than a judge ({shown(min(strange))}): give another name"
        )
    remove = sorted(others - {*files})
    return Place(new=False, private=found.private, remove=tuple(remove))


def _on_kaggle(to: Address, files: Mapping[str, Path], public: bool) -> Place:
    kaggle.check_publishing(str(to))
    private = kaggle.model_is_private(to.name.rpartition("/")[0])
    if private is None and public:
        raise InputError(f"{to}: new models of Kaggle are private; publish it there, on its page")
    return Place(new=private is None, private=private is not False)
