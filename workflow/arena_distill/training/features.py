"""Read the frozen backbone of judges once: features of every battle, which all folds share.

features/<judge>/features.npy      float16 (rows, answers, reads, hidden size)
features/<judge>/ids.parquet       the rows; what was read, and the digest of the other file, beside them
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from arena_distill.config.compute import Attention
from arena_distill.config.model_files import ModelFolder
from arena_distill.config.phases.training import FeatureSettings
from arena_distill.encoding.sequences import read_tokens
from arena_distill.encoding.views import encode_views
from arena_distill.errors import InputError
from arena_distill.files.artifacts import (
    DIGEST,
    REBUILD,
    atomic_directory,
    file_sha256,
    provenance,
    read_parquet,
    write_parquet,
)
from arena_distill.files.keys import key, locate
from arena_distill.models.layer_reads import Read, blocks, cut_after, default_layers, read_features
from arena_distill.models.loading import load_classifier

_READ = b"arena_distill.read"


@dataclass(frozen=True)
class Features:
    """What was read of battles.

    keys: of the battles.
    values: float16 (rows, answers, reads, hidden size), on disk until they are used.
    reads: layer and pooling of each.
    marker: the token ids before an answer.
    about: tokens of all sequences, the backbone's fingerprint and its number of parameters.
    """

    folder: Path
    keys: pa.Array
    values: np.ndarray
    reads: tuple[Read, ...]
    marker: tuple[int, ...]
    about: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Features:
        """Read what :func:`write_features` wrote.

        Raises:
            InputError: it is missing or damaged.
        """
        ids = read_parquet(folder / "ids.parquet")
        metadata = ids.schema.metadata
        file = folder / "features.npy"
        if not file.is_file() or file_sha256(file).encode() != metadata.get(DIGEST):
            raise InputError(f"{file}: is not what was written; {REBUILD}")
        about = json.loads(metadata[_READ])
        reads = tuple((layer, pooling) for layer, pooling in about.pop("reads"))
        marker = tuple(about.pop("marker"))
        values = np.load(file, mmap_mode="r", allow_pickle=False)
        return cls(folder, key(ids), values, reads, marker, about)

    def of(self, rows: pa.Table) -> np.ndarray:
        """The features of battles (`id`, `source`): float32 (rows, answers, reads, hidden size)."""
        place = locate(key(rows), self.keys, f"features in {self.folder}")
        return self.values[place].astype(np.float32)


def write_features(
    backbone: Path,
    tokens: Path,
    output: Path,
    *,
    settings: FeatureSettings,
    batch_tokens: int,
    attention: Attention = "auto",
) -> None:
    """Read every training, extra and unlabelled battle with a frozen backbone → a folder.

    Raises:
        InputError: the backbone has not so many layers, or a state is too large for half precision.
    """
    read = read_tokens(tokens)
    learned = pc.is_in(read.sources, pa.array(["train", "extra", "unlabelled"]))
    read = read.take(learned.to_numpy(zero_copy_only=False))
    base: Any = load_classifier(
        backbone,
        precision=settings.precision,
        attention=attention,
        pad_token_id=read.vocabulary.pad,
        head_seed=0,
    ).base_model
    layers = blocks(base)
    chosen = settings.layers or default_layers(len(layers))
    if max(chosen) > len(layers):
        raise InputError(
            f"config: judges.*.frozen.layers: {max(chosen)}, but {backbone} has {len(layers)} layers: "
            "lower it"
        )
    parameters = sum(p.numel() for p in base.parameters())
    cut_after(base, max(chosen))
    reads: tuple[Read, ...] = tuple((n, pooling) for n in chosen for pooling in settings.poolings)
    marker = read.vocabulary.one_answer[settings.encoding.template][1]
    views = encode_views(read, settings.encoding, settings.head)
    about = {
        "reads": reads,
        "marker": marker,
        "tokens": sum(len(view.ids) for view in views),
        "parameters": parameters,
        "backbone": ModelFolder(backbone).fingerprint(),
    }
    with atomic_directory(output) as folder:
        found = read_features(base, views, reads, marker, batch_tokens=batch_tokens)
        np.save(folder / "features.npy", found, allow_pickle=False)
        ids = pa.table({"id": read.ids, "source": read.sources}).replace_schema_metadata(
            {
                DIGEST: file_sha256(folder / "features.npy").encode(),
                _READ: json.dumps(about).encode(),
            }
        )
        told = provenance("features", settings.model_dump(mode="json"))
        write_parquet(ids, folder / "ids.parquet", told)
    print(f"{output}: {len(read):,} battles, {len(reads)} reads of layers {chosen}")
