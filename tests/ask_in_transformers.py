"""Ask judges with transformers alone, of any version, for test_doors.py.

    python tests/ask_in_transformers.py FOLDER…

reads each folder's `judge.json`, runs the token ids of its test vectors, and writes beside the folder
`NAME.outputs.json`: by `<battle>/<length>/<view>` the outputs of the head. Needs nothing of this project.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification


def main(folder: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    vectors = json.loads((folder / "judge.json").read_text())["vectors"]
    with torch.no_grad():
        outputs = {
            f"{row}/{view}": model(torch.tensor([ids])).logits[0].tolist()
            for row, vector in enumerate(vectors)
            for view, ids in vector["ids"].items()
        }
    Path(f"{folder}.outputs.json").write_text(json.dumps(outputs))


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        main(Path(argument))
