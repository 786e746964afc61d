"""Read and tokenise battles of a file, for several benchmarks."""

from __future__ import annotations

import tempfile
from pathlib import Path

from arena_distill.battles.reading import read_battles
from arena_distill.config.phases.encoding import TokensSettings
from arena_distill.encoding.sequences import Tokens, read_tokens
from arena_distill.encoding.tokenization import tokenize_battles
from arena_distill.files.artifacts import provenance, write_parquet


def tokenized(tokenizer: Path, file: Path, rows: int | None = None) -> Tokens:
    """The first `rows` battles of a file (None: all), tokenised with the tokenizer in a folder."""
    battles, _ = read_battles({"train": [file]})
    with tempfile.TemporaryDirectory() as folder:
        path, tokens = Path(folder) / "battles.parquet", Path(folder) / "tokens.parquet"
        write_parquet(battles.slice(0, rows), path, provenance("battles", {}))
        tokenize_battles(path, tokenizer, tokens, settings=TokensSettings(version=0))
        return read_tokens(tokens)
