"""Embedding shards: writing them, resumable and split over ranks, and reading them a block at a time.

A shard is a .npy file with the unit vectors of consecutive passages; the shards of a folder in order are the corpus in
order, and all but the last have as many rows. How they are searched is in dense.py.
Shapes: N passages, K components, n passages of one shard or block.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from drama_dist.corpus.collection import PassageTable
from drama_dist.distributed import ranks
from drama_dist.encoder.cut_texts import CutTexts, counting
from drama_dist.run.artefact import CHECKPOINTS, PROVENANCE, SHARDS, read_provenance
from drama_dist.run.files import matches_checksum, put_in_place, write_checksum, write_text
from drama_dist.run.progress import Progress, progress_bar
from drama_dist.run.shares import WHOLE, Share

QUERY_VECTORS = "query_vectors"  # a folder in RUN/augment: the teacher's of the examples' queries, in their order
_NORM_TOLERANCE = 1e-3
_CUT = ".cut.json"


class TextEncoder(Protocol):
    """Turns texts into unit vectors, float32 (n, dim); dim None is the encoder's full size.

    progress: told the number of texts of each batch when they are encoded.
    """

    def encode_queries(self, texts: Sequence[str], dim: int | None = None) -> np.ndarray: ...

    def encode_passages(
        self, texts: Sequence[str], dim: int | None = None, progress: Progress | None = None
    ) -> np.ndarray: ...


class EmbeddingShards:
    """The vectors of a corpus on disk, float32 (N, K); memory holds what is asked for, and nothing else.

    Raises FileNotFoundError where the folder has no shard, ValueError where one is missing, cut short, of another width
    or type, or where provenance.json says that there are more or fewer vectors.
    """

    def __init__(self, folder: Path):
        # By length first: from 100,000 shards on, their numbers have six digits.
        self._paths = sorted(folder.glob(SHARDS), key=lambda path: (len(path.name), path.name))
        if not self._paths:
            raise FileNotFoundError(f"{folder}: no embedding shards; run `drama encode` for this run first")
        self._shard_rows, self.dim = _map_shard(self._paths[0]).shape
        self._offsets: list[int] = []  # where the vectors begin in each file
        self._count = 0
        for index, path in enumerate(self._paths):
            if path != shard_path(folder, index):
                raise ValueError(f"{shard_path(folder, index)}: missing, though later shards are there; encode again")
            shard = _map_shard(path)  # open no longer than this: there may be more shards than a process may open files
            self._check_shape(path, shard.shape, is_last=path == self._paths[-1])
            self._offsets.append(shard.offset)
            self._count += len(shard)
        finished = (folder / PROVENANCE).exists()
        expected = read_provenance(folder).get("passages", len(self)) if finished else len(self)
        if expected != len(self):
            raise ValueError(f"{folder}: {len(self)} vectors, but provenance.json says {expected}; encode again")

    def _check_shape(self, path: Path, shape: tuple[int, ...], is_last: bool) -> None:
        rows_fit = shape[0] == self._shard_rows or (is_last and 0 < shape[0] < self._shard_rows)
        if not rows_fit or shape[1] != self.dim:
            expected = (self._shard_rows, self.dim)
            raise ValueError(f"{path}: shape {shape} after shards of {expected}; encode again")

    def __len__(self) -> int:
        return self._count

    def blocks(self, rows: int) -> Iterator[tuple[int, np.ndarray]]:
        """All vectors in order, `rows` at a time whatever the shards' size: (position of the first, float32 (n, K)).

        The next block overwrites the array.
        """
        buffer_nK = np.empty((min(rows, len(self)), self.dim), dtype=np.float32)
        for first in range(0, len(self), rows):
            block_nK = buffer_nK[: len(self) - first]
            self._read(first, block_nK)
            yield first, block_nK

    def sample(self, count: int, seed: int) -> np.ndarray:
        """`count` vectors drawn without replacement, in the order of the corpus; all where there are no more."""
        chance = np.random.default_rng(seed)
        return self.rows(np.sort(chance.choice(len(self), min(count, len(self)), replace=False, shuffle=False)))

    def rows(self, positions: Sequence[int] | np.ndarray) -> np.ndarray:
        """The vectors at some positions, in their order, float32 (n, K)."""
        positions = np.asarray(positions, dtype=np.int64)
        order = np.argsort(positions, kind="stable")
        rows_nK = np.empty((len(positions), self.dim), dtype=np.float32)
        cuts = np.searchsorted(positions[order], self._shard_rows * np.arange(1, len(self._paths)))
        for path, places in zip(self._paths, np.split(order, cuts), strict=True):
            if len(places):
                rows_nK[places] = _map_shard(path)[positions[places] % self._shard_rows]
        return rows_nK

    def _read(self, first: int, out_nK: np.ndarray) -> None:
        """Fill `out_nK` from position `first` on. Files are read, not mapped: a map's pages count as memory held."""
        filled = 0
        while filled < len(out_nK):
            index, row = divmod(first + filled, self._shard_rows)
            part_nK = out_nK[filled : filled + self._shard_rows - row]
            with open(self._paths[index], "rb") as file:
                file.seek(self._offsets[index] + row * part_nK.strides[0])
                if file.readinto(part_nK.data) != part_nK.nbytes:
                    raise ValueError(f"{self._paths[index]}: cut short while it was read; encode again")
            filled += len(part_nK)


@dataclass(frozen=True)
class StoredVectors:
    """Vectors of passages, in the order of their table."""

    passages: PassageTable
    shards: EmbeddingShards

    def positions(self, ids: Sequence[str], texts: Sequence[str]) -> dict[int, int]:
        """Row → position, for texts that are stored under the same id."""
        found = {row: place for row, id in enumerate(ids) if (place := self.passages.find(id)) is not None}
        contents = self.passages.contents(list(found.values()))
        return {row: place for (row, place), text in zip(found.items(), contents, strict=True) if text == texts[row]}


def write_shards(
    folder: Path,
    passages: PassageTable,
    encoder: TextEncoder,
    shard_passages: int,
    share: Share = WHOLE,
    name: str = "encode",
    stored: StoredVectors | None = None,
) -> EmbeddingShards | None:
    """Encode every passage into shards in `folder`, which is there; return them, or None for a share of the work.

    Each rank encodes the shards whose number modulo the world size is its own. Shards that an earlier attempt left
    whole, as their checksums tell, are kept. name: what the progress bar and errors call the work. stored: the
    encoder's vectors of other passages; those that are the same are copied. Raises ValueError where a vector is not
    finite or not of length 1, naming the passage, and where there is no passage.
    """
    if not len(passages):
        raise ValueError(f"{name}: the corpus has no passages to encode")
    mine = share.indices_of(-(-len(passages) // shard_passages))
    spans = {i: range(i * shard_passages, min((i + 1) * shard_passages, len(passages))) for i in mine}
    missing = [i for i in mine if not _is_whole(folder, i)]
    (folder / CHECKPOINTS).mkdir(exist_ok=True)
    total = sum(map(len, spans.values()))
    bar = progress_bar(total, name, "passages", done=total - sum(len(spans[i]) for i in missing))
    for i in missing:
        with counting() as cut:
            vectors_nK = _encode(encoder, passages, spans[i], bar.update, stored)
        write_shard(folder, i, vectors_nK)
        write_text(_cut_path(folder, i), json.dumps(asdict(cut)))
        write_checksum(shard_path(folder, i), _checksum_path(folder, i))
    bar.close()
    ranks.barrier()
    if not share.whole:
        return None
    shards = EmbeddingShards(folder)
    if len(shards) != len(passages):
        raise ValueError(
            f"{folder}: the shards hold {len(shards)} vectors for {len(passages)} passages; "
            f"start all ranks together, or delete the folder and encode again"
        )
    return shards


def _encode(
    encoder: TextEncoder, passages: PassageTable, span: range, progress: Progress, stored: StoredVectors | None
) -> np.ndarray:
    texts = passages.contents(span)
    copied = {} if stored is None else stored.positions(passages.ids[span.start : span.stop], texts)
    new = [row for row in range(len(texts)) if row not in copied]
    parts = []
    if stored is not None and copied:
        parts.append(stored.shards.rows(list(copied.values())))
        progress(len(copied))
    if new:
        new_texts = [texts[row] for row in new]
        parts.append(encoder.encode_passages(new_texts, progress=progress))
        check_vectors(parts[-1], new_texts, lambda row: f"passage {passages[span[new[row]]].id!r}")
    return np.concatenate(parts)[np.argsort([*copied, *new])]


def check_vectors(vectors_nK: np.ndarray, texts: Sequence[str], name: Callable[[int], str]) -> None:
    """Raise ValueError where a text's vector is not finite or not of length 1. name: of the text in a row."""
    if vectors_nK.ndim != 2 or len(vectors_nK) != len(texts):
        raise ValueError(f"the encoder returned shape {vectors_nK.shape} for {len(texts)} texts")
    for row in map(int, _unfit_rows(vectors_nK)[:1]):
        raise ValueError(
            f"{name(row)}: its vector has norm {np.linalg.norm(vectors_nK[row])}, expected 1; "
            f"try dtype float32 (the text begins {texts[row][:60]!r})"
        )


def texts_cut(folder: Path) -> dict[str, int]:
    """What was cut of the texts of all shards, as the fields of CutTexts, by whatever ranks and attempts.

    folder: of a stage that is not finished: the counts are among its checkpoints.
    """
    counts = [CutTexts(**json.loads(path.read_text("utf-8"))) for path in (folder / CHECKPOINTS).glob(f"*{_CUT}")]
    return asdict(sum(counts, CutTexts()))


def write_shard(folder: Path, index: int, vectors_nK: np.ndarray) -> None:
    """Write the shard `index`, from 0, under a temporary name; rename it when it is on the disk."""
    path = shard_path(folder, index)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as out:
        np.save(out, np.ascontiguousarray(vectors_nK, dtype=np.float32), allow_pickle=False)
    put_in_place(temporary, path)


def shard_path(folder: Path, index: int) -> Path:
    """Where `write_shard` writes."""
    return folder / f"shard-{index:05d}.npy"


def _is_whole(folder: Path, index: int) -> bool:
    checked = matches_checksum(shard_path(folder, index), _checksum_path(folder, index))
    return checked and _cut_path(folder, index).is_file()


def _cut_path(folder: Path, index: int) -> Path:
    """Beside the checksum, which is written after it."""
    return folder / CHECKPOINTS / f"{shard_path(folder, index).name}{_CUT}"


def _checksum_path(folder: Path, index: int) -> Path:
    """Among the checkpoints, since nothing needs it once the stage is finished."""
    return folder / CHECKPOINTS / f"{shard_path(folder, index).name}.sha256"


def _map_shard(path: Path) -> np.memmap:
    """Raises ValueError where the file is not a whole array of float32 vectors."""
    try:
        shard = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path}: not a whole shard ({error}); encode again") from error
    if shard.ndim != 2 or shard.dtype != np.float32 or not shard.flags.c_contiguous:
        raise ValueError(f"{path}: {shard.dtype} of shape {shard.shape}, expected rows of float32; encode again")
    return shard


def _unfit_rows(vectors_nK: np.ndarray) -> np.ndarray:
    """Rows that are not unit vectors; NaN and infinity are among them."""
    with np.errstate(over="ignore", invalid="ignore"):
        norms_n = np.linalg.norm(vectors_nK, axis=1)
        return np.flatnonzero(~(np.abs(norms_n - 1) <= _NORM_TOLERANCE))
