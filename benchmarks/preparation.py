"""Compare the usual row-wise preparation of sequences, in both orders, with this workflow's.

    python benchmarks/preparation.py BATTLES.csv … --tokenizer models/tokenizers/{llama3,gemma2,qwen2_5}

The row-wise side follows the published solutions: each row's text is cut by words, each of its fields is
tokenised and cut, decoded, put into the template and tokenised again, once per order; it gets battles that
are read already, at most 1,000 of them. Our side reads the files, tokenises all battles to a file, reads
that and assembles both orders: at first with the time to load the tokenizer's libraries, then without.
Both sides run in this process by turns. Seconds are of the CPU, and depend on it: compare the ratios.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from arena_distill.battles.reading import read_battles
from arena_distill.config.judge import Encoding
from arena_distill.config.phases.encoding import TokensSettings
from arena_distill.encoding import tokenization
from arena_distill.encoding.sequences import read_tokens
from arena_distill.encoding.templates import TEMPLATES
from arena_distill.encoding.tokenization import WORD_CAPS, tokenize_battles
from arena_distill.encoding.truncation import PROMPT_TOKENS
from arena_distill.encoding.views import encode
from arena_distill.files.artifacts import provenance, write_parquet

ROW_BY_ROW = 1_000
"""The most battles that are prepared row by row."""


def row_wise(battles: pa.Table, tokenizer: Any, max_length: int) -> int:
    """Battles prepared row by row."""
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
            tokenizer(text, max_length=max_length, truncation=True)["input_ids"]
    return len(battles)


def once(files: list[Path], tokenizer: Path, max_length: int) -> int:
    """Battles prepared by this workflow: read, tokenise to a file, read it, assemble both orders."""
    battles, _ = read_battles({"train": files})
    with tempfile.TemporaryDirectory() as folder:
        path, scratch = Path(folder) / "battles.parquet", Path(folder) / "tokens.parquet"
        write_parquet(battles, path, provenance("battles", {}))
        tokenize_battles(path, tokenizer, scratch, settings=TokensSettings(version=0))
        tokens = read_tokens(scratch)
    encoding = Encoding(template="winners", truncation="winners", max_length=max_length)
    for order in ("AB", "BA"):
        encode(tokens, encoding, order)
    return len(battles)


def rate(prepare: Callable[..., int], *arguments: Any) -> float:
    """Battles per second of the CPU."""
    start = time.process_time()
    battles = prepare(*arguments)
    return battles / (time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("battles", type=Path, nargs="+")
    parser.add_argument("--tokenizer", type=Path, nargs="+", required=True)
    parser.add_argument("--max-length", type=int, default=1024)
    arguments = parser.parse_args()
    battles, _ = read_battles({"train": arguments.battles})
    some = np.random.default_rng(0).permutation(len(battles))[:ROW_BY_ROW]
    few = battles.take(pa.array(some))
    ratios = []
    for folder in arguments.tokenizer:
        load = tokenization.load_tokenizer = cache(tokenization.load_tokenizer)  # once per folder
        first, warm = (
            rate(once, arguments.battles, folder, arguments.max_length) for _ in range(2)
        )
        slow = rate(row_wise, few, load(folder), arguments.max_length)
        ratios.append((first / slow, warm / slow))
        print(f"{folder.name:10} row by row {slow:7,.0f} battles/s; once {warm:7,.0f}", end="")
        print(f", ratio {warm / slow:.1f}; with loading {first:7,.0f}, ratio {first / slow:.1f}")
    with_loading, without = np.exp(np.log(ratios).mean(axis=0))
    print(
        f"geometric means: {without:.1f}, with loading {with_loading:.1f}; {len(battles):,} battles"
    )


if __name__ == "__main__":
    main()
