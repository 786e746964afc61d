"""Compare the usual row-wise preparation of sequences, in both orders, with this workflow's.

    python benchmarks/preparation.py TOKENIZER_FOLDER BATTLES.csv [--max-length 1024]

The row-wise side follows the published solutions: each row's text is cut by words, each of its fields is
tokenised and cut, decoded, put into the template and tokenised again, once per order. Both sides run in
this process, on the same rows. Times depend on the machine: compare the ratio.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from arena_distill.battles.reading import read_battles
from arena_distill.config.judge import Encoding
from arena_distill.config.phases import TokensSettings
from arena_distill.encoding.sequences import read_tokens
from arena_distill.encoding.templates import TEMPLATES
from arena_distill.encoding.tokenization import WORD_CAPS, load_tokenizer, tokenize_battles
from arena_distill.encoding.truncation import PROMPT_TOKENS
from arena_distill.encoding.views import encode


def row_wise(battles: pa.Table, tokenizer: Any, max_length: int) -> int:
    """Tokens made row by row."""
    total = 0
    head, before_a, before_b, tail = TEMPLATES["winners"]
    for row in battles.to_pylist():
        texts = {n: " ".join("\n".join(row[n]).split(" ")[:cap]) for n, cap in WORD_CAPS.items()}
        for first, second in (("response_a", "response_b"), ("response_b", "response_a")):
            ids = [
                tokenizer(texts[n], add_special_tokens=False)["input_ids"]
                for n in ("prompt", first, second)
            ]
            if sum(map(len, ids)) > max_length:
                ids[0] = ids[0][:PROMPT_TOKENS]
                room = max(max_length - len(ids[0]), 0)
                while len(ids[1]) + len(ids[2]) > room:
                    max(ids[1:], key=len).pop()
            q, a, b = (tokenizer.decode(part) for part in ids)
            text = f"{head}{q}{before_a}{a}{before_b}{b}{tail}"
            total += len(tokenizer(text, max_length=max_length, truncation=True)["input_ids"])
    return total


def once(battles: Path, tokenizer: Path, scratch: Path, max_length: int) -> int:
    """Tokens made by this workflow: tokenise to a file, read it, assemble both orders."""
    tokenize_battles(battles, tokenizer, scratch, settings=TokensSettings(version=0))
    tokens = read_tokens(scratch)
    encoding = Encoding(template="winners", truncation="winners", max_length=max_length)
    return sum(len(encode(tokens, encoding, order).ids) for order in ("AB", "BA"))


def timed(make: Callable[[], int]) -> tuple[float, int]:
    start = time.perf_counter()
    total = make()
    return time.perf_counter() - start, total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("battles", type=Path)
    parser.add_argument("--max-length", type=int, default=1024)
    arguments = parser.parse_args()
    import tempfile

    from arena_distill.files.artifacts import provenance, write_parquet

    battles, _ = read_battles({"train": [arguments.battles]})
    tokenizer = load_tokenizer(arguments.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "battles.parquet"
        write_parquet(battles, path, provenance("battles", {}))
        scratch = Path(folder) / "tokens.parquet"
        ours, n = timed(lambda: once(path, arguments.tokenizer, scratch, arguments.max_length))
    rows, m = timed(lambda: row_wise(battles, tokenizer, arguments.max_length))
    for name, seconds, tokens in (("row by row", rows, m), ("once", ours, n)):
        print(f"{name:12} {len(battles) / seconds:9,.0f} battles/s   {tokens:,} tokens")
    print(f"ratio        {rows / ours:9.1f}")


if __name__ == "__main__":
    main()
