"""From passages to embedding shards: resumable, split over ranks.

A shard is a .npy file with the unit vectors of consecutive passages; the shards of a folder in order
are the corpus in order. Covers writing and reading them. Searching them is search.py's affair.
Shapes: N passages, K components, n passages of one shard.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from drama_dist.corpus.collection import PassageTable
from drama_dist.distributed import ranks
from drama_dist.run.folder import StageFolder
from drama_dist.run.progress import Progress, progress_bar
from drama_dist.run.shares import WHOLE, Share
from drama_dist.search.dense import write_index

_NORM_TOLERANCE = 1e-3


class TextEncoder(Protocol):
    """Turns texts into unit vectors, float32 (n, dim); dim None is the encoder's full size.

    progress: told the number of texts of each batch when they are encoded.
    """

    def encode_queries(self, texts: Sequence[str], dim: int | None = None) -> np.ndarray: ...

    def encode_passages(
        self, texts: Sequence[str], dim: int | None = None, progress: Progress | None = None
    ) -> np.ndarray: ...


def encode_corpus(
    stage: StageFolder,
    passages: PassageTable,
    encoder: TextEncoder,
    shard_passages: int,
    share: Share = WHOLE,
    **facts: Any,
) -> Path:
    """Encode every passage into shards in the stage's folder, add a search index, finish the stage.

    facts: for the stage's provenance.
    Each rank encodes the shards whose number modulo the world size is its own. Shards that an earlier
    attempt left whole are kept. A share that is not the whole is left
    in the folder, and the stage not finished. Raises ValueError where a vector is not finite or not of length 1,
    naming the passage, and where there is no passage.
    """
    if stage.done:
        return stage.final
    if not len(passages):
        raise ValueError(f"{stage.name}: the corpus has no passages to encode")
    own = share.indices_of(-(-len(passages) // shard_passages))
    spans = {n: range(n * shard_passages, min((n + 1) * shard_passages, len(passages))) for n in own}
    missing = [number for number in own if not _is_whole(_shard(stage.folder, number), len(spans[number]))]
    total = sum(len(span) for span in spans.values())
    bar = progress_bar(total, stage.name, "passages", done=total - sum(len(spans[number]) for number in missing))
    for number in missing:
        vectors_nK = encoder.encode_passages(passages.contents(spans[number]), progress=bar.update)
        _check(vectors_nK, passages, spans[number])
        _write(_shard(stage.folder, number), vectors_nK)
    bar.close()
    ranks.barrier()
    if not share.whole:
        return stage.folder
    shards = _open_shards(stage.folder)
    if sum(map(len, shards)) != len(passages):
        raise ValueError(
            f"{stage.folder}: the shards hold {sum(map(len, shards))} vectors for {len(passages)} passages; "
            f"start all ranks together, or delete the folder and encode again"
        )
    if ranks.rank() == 0:
        write_index(np.concatenate(shards), stage.folder)
    return stage.finish(passages=len(passages), dim=int(shards[0].shape[1]), **facts)


def load_embeddings(folder: Path) -> np.ndarray:
    """All shards of a folder in the order of the corpus: float32 (N, K).

    Raises FileNotFoundError where there is no shard, ValueError where one is missing, cut short or of
    another width.
    """
    embeddings_NK: np.ndarray = np.concatenate(_open_shards(folder))
    record = folder / "provenance.json"
    expected = json.loads(record.read_text("utf-8"))["passages"] if record.exists() else len(embeddings_NK)
    if expected != len(embeddings_NK):
        raise ValueError(f"{folder}: {len(embeddings_NK)} vectors, but provenance.json says {expected}; encode again")
    return embeddings_NK


def _open_shards(folder: Path) -> list[np.ndarray]:
    """The shards in order, memory-mapped; raises as `load_embeddings` does."""
    paths = sorted(folder.glob("shard-*.npy"))
    if not paths:
        raise FileNotFoundError(f"{folder}: no embedding shards; run `drama encode` for this run first")
    shards: list[np.ndarray] = []
    for number, path in enumerate(paths):
        if path != _shard(folder, number):
            raise ValueError(f"{_shard(folder, number)}: missing, though later shards are there; encode again")
        shards.append(np.load(path, mmap_mode="r", allow_pickle=False))
        rows, width = shards[-1].shape[0], shards[-1].shape[1:]
        cut_short = rows != len(shards[0]) and not (path == paths[-1] and 0 < rows < len(shards[0]))
        if len(width) != 1 or width != shards[0].shape[1:] or cut_short:
            raise ValueError(f"{path}: shape {shards[-1].shape} after shards of {shards[0].shape}; encode again")
    return shards


def _shard(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.npy"


def _is_whole(path: Path, rows: int) -> bool:
    if not path.is_file():
        return False
    try:
        found = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError):
        return False
    return found.ndim == 2 and len(found) == rows and found.dtype == np.float32 and not len(_unfit(found))


def _unfit(vectors_nK: np.ndarray) -> np.ndarray:
    """Rows that are not unit vectors; NaN and infinity are among them."""
    with np.errstate(over="ignore", invalid="ignore"):
        norms_n = np.linalg.norm(vectors_nK, axis=1)
        return np.flatnonzero(~(np.abs(norms_n - 1) <= _NORM_TOLERANCE))


def _check(vectors_nK: np.ndarray, passages: PassageTable, span: range) -> None:
    if vectors_nK.ndim != 2 or len(vectors_nK) != len(span):
        raise ValueError(f"the encoder returned shape {vectors_nK.shape} for {len(span)} passages")
    for row in _unfit(vectors_nK)[:1]:
        passage = passages[span[int(row)]]
        raise ValueError(
            f"passage {passage.id!r}: its vector has norm {np.linalg.norm(vectors_nK[row])}, expected 1; "
            f"try dtype float32 (the text begins {passage.content[:60]!r})"
        )


def _write(path: Path, vectors_nK: np.ndarray) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as out:
        np.save(out, vectors_nK.astype(np.float32, copy=False), allow_pickle=False)
    temporary.replace(path)
