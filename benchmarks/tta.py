"""Compare test-time augmentation with a full forward pass for every length and order.

    python benchmarks/tta.py [--battles FILE.csv …] [--max-lengths 1024 2000] [--rows 48]

Ours scores each distinct sequence once, and sequences of all lengths and orders in the same batches. The
other side cuts, batches and scores all battles for one length and order after the other. The fewer battles
are longer than the shorter length, the less ours has to score. Battles and tokenizer are the last of those
in `preparation.py`; the model has a million random weights.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import inputs
import made_up
import numpy as np
import pyarrow as pa
import torch
from measured import by_turns, keep, ratio, seconds

from arena_distill.battles.reading import read_battles
from arena_distill.config.encoding import Encoding
from arena_distill.config.head import JOINT
from arena_distill.config.phases.prediction import ScoringSettings
from arena_distill.encoding.sequences import Sequences, Vocabulary, tokens_of
from arena_distill.encoding.tokenization import load_tokenizer, tokenize, vocabulary_of
from arena_distill.encoding.views import encode
from arena_distill.models.scoring import score
from arena_distill.prediction.test_time import score_variants
from arena_distill.verdicts import ORDERS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--battles", type=Path, nargs="+")
    parser.add_argument("--tokenizer", type=Path, default=inputs.TOKENIZERS[-1])
    parser.add_argument("--max-lengths", type=int, nargs="+", default=[1024, 2000])
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        files = arguments.battles or inputs.battles(Path(folder))
        battles, _ = read_battles({"train": files})
    some = np.random.default_rng(0).permutation(len(battles))[: arguments.rows]
    tokenizer = load_tokenizer(arguments.tokenizer)
    tokens = tokens_of(
        tokenize(battles.take(pa.array(some)), tokenizer), Vocabulary.of(vocabulary_of(tokenizer))
    )
    encoding, lengths = Encoding(template="winners", truncation="winners"), arguments.max_lengths
    settings = ScoringSettings(
        version=0,
        encoding=encoding,
        head=JOINT,
        max_lengths=lengths,
        orders=ORDERS,
        precision="fp32",
    )
    model = made_up.backbone("1m")

    def forward(sequences: Sequences) -> np.ndarray:
        known = Sequences(sequences.ids % (made_up.IDS - 1) + 1, sequences.offsets)  # 0: padding
        return score(model, known, batch_tokens=16_384, progress=False)

    def passes() -> None:
        for length in lengths:
            for order in ORDERS:
                forward(encode(tokens, encoding, order, length))

    ways = {
        "each sequence once": lambda: seconds(lambda: score_variants(tokens, settings, forward)),
        "full passes": lambda: seconds(passes),
    }
    taken = by_turns(ways, arguments.rounds)
    longer = (encode(tokens, encoding, "AB", 10**6).lengths > min(lengths)).mean()
    what = f"{len(tokens)} battles, {longer:.0%} of them longer than {min(lengths)} tokens"
    keep(__file__, [ratio(what, taken, "each sequence once", "full passes", aim=0.55)])


if __name__ == "__main__":
    main()
