"""Compare our preparation of sequences with the usual row-wise one, and with the bare tokenizer.

    python benchmarks/preparation.py [BATTLES.csv …] [--tokenizer models/tokenizers/{llama3,gemma2,qwen2_5}]

Ours reads the files, tokenises all battles to a file, reads that and assembles and cuts both orders. The
row-wise side follows the published solutions: each row's text is cut by words, each of its fields is
tokenised and cut, decoded, put into the template and tokenised again, once per order; it gets some battles
that are read already, and its seconds are those of all battles at the same speed. The bare tokenizer is one
call of fastokens with all texts, no reading, no cutting, no file. Nobody's time to
load a tokenizer counts.

Without files, the battles are `data/train.csv`, else some of the synthetic arena; the tokenizers are those
that `scripts/fetch_tokenizers.sh` fetched, else those of the tiny backbones.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import fastokens
import inputs
import numpy as np
import pyarrow as pa
from measured import by_turns, keep, ratio, seconds

from arena_distill.battles.reading import read_battles
from arena_distill.config.encoding import Encoding
from arena_distill.config.phases.encoding import TokensSettings
from arena_distill.encoding import text_encoder, tokenization
from arena_distill.encoding.sequences import read_tokens
from arena_distill.encoding.templates import TEMPLATES
from arena_distill.encoding.tokenization import WORD_CAPS, tokenize_battles
from arena_distill.encoding.truncation import PROMPT_TOKENS
from arena_distill.encoding.views import encode
from arena_distill.files.artifacts import provenance, write_parquet

ROW_BY_ROW = 200
"""The most battles that are prepared row by row."""


def row_wise(battles: pa.Table, tokenizer: Any, max_length: int) -> None:
    """Prepare battles row by row."""
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


def ours(files: list[Path], tokenizer: Path, max_length: int) -> None:
    """Read battles, tokenise them to a file, read it, assemble both orders."""
    battles, _ = read_battles({"train": files})
    with tempfile.TemporaryDirectory() as folder:
        path, scratch = Path(folder) / "battles.parquet", Path(folder) / "tokens.parquet"
        write_parquet(battles, path, provenance("battles", {}))
        tokenize_battles(path, tokenizer, scratch, settings=TokensSettings(version=0))
        tokens = read_tokens(scratch)
    encoding = Encoding(template="winners", truncation="winners", max_length=max_length)
    for order in ("AB", "BA"):
        encode(tokens, encoding, order)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("battles", type=Path, nargs="*")
    parser.add_argument("--tokenizer", type=Path, nargs="+", default=inputs.TOKENIZERS)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    tokenization.load_tokenizer = cache(tokenization.load_tokenizer)
    text_encoder.FAST_FROM = 1  # fastokens takes over in the round that is not counted
    with tempfile.TemporaryDirectory() as folder:
        files = arguments.battles or inputs.battles(Path(folder))
        ratios = [
            one
            for tokenizer in arguments.tokenizer
            for one in compared(files, tokenizer, arguments.max_length, arguments.rounds)
        ]
    keep(__file__, ratios)


def compared(files: list[Path], folder: Path, max_length: int, rounds: int) -> list[dict[str, Any]]:
    battles, _ = read_battles({"train": files})
    some = np.random.default_rng(0).permutation(len(battles))[:ROW_BY_ROW]
    few = battles.take(pa.array(some))
    texts = [
        text for name in WORD_CAPS for text in battles[name].combine_chunks().flatten().to_pylist()
    ]
    tokenizer = tokenization.load_tokenizer(folder)
    bare = fastokens.Tokenizer.from_json_str(tokenizer.backend_tokenizer.to_str())
    what = f"{len(battles):,} battles, {folder.name}"
    taken = by_turns(
        {
            "ours": lambda: seconds(lambda: ours(files, folder, max_length)),
            "row by row": lambda: (
                seconds(lambda: row_wise(few, tokenizer, max_length)) * len(battles) / len(few)
            ),
            "fastokens": lambda: seconds(
                lambda: bare.encode_batch_flat(
                    texts, add_special_tokens=False, split_special_tokens=True
                )
            ),
        },
        rounds,
    )
    return [
        ratio(what, taken, "ours", "row by row"),
        ratio(what, taken, "ours", "fastokens", aim=1.25),
    ]


if __name__ == "__main__":
    main()
