"""Rules where a storage carries the files of a job (`--default-storage-provider`)."""

from __future__ import annotations

import re

import pytest
from checkouts import ROOT

RULES = [
    (file.name, block)
    for file in sorted(ROOT.glob("rules/*.smk"))
    for block in re.split(r"\n(?=rule |use rule )", file.read_text(encoding="utf-8"))[1:]
]
READERS = [
    pytest.param(inputs.group(), id=f"{name}: {block.splitlines()[0]}")
    for name, block in RULES
    if (inputs := re.search(r"    input:\n(.*?)(?=^    \w)", block, re.DOTALL | re.MULTILINE))
    and re.search(r"^ +(\w*logits|shards)=", inputs.group(), re.MULTILINE)
]


def test_there_are_rules_that_read_logits() -> None:
    assert len(READERS) >= 12


@pytest.mark.parametrize("inputs", READERS)
def test_who_reads_logits_names_the_ids_beside_them(inputs: str) -> None:
    """Without a storage they lie beside; a storage carries only what is named."""
    assert "ids=carried_ids(" in inputs
