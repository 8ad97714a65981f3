"""Embedding shards: whole, resumed, split over ranks, and refused where they are not."""

from __future__ import annotations

import resource
import threading
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import Mock, call

import numpy as np
import pytest
from datasets import Dataset

from drama_dist.corpus.collection import PassageTable
from drama_dist.distributed import ranks
from drama_dist.encoder import cut_texts
from drama_dist.records import Passage
from drama_dist.run.artefact import read_provenance
from drama_dist.run.folder import StageFolder, fingerprint, open_stage
from drama_dist.run.progress import Progress
from drama_dist.run.shares import WHOLE, Share
from drama_dist.search import shards as shards_module
from drama_dist.search.shards import EmbeddingShards, StoredVectors, texts_cut, write_shard, write_shards
from tests.conftest import gathering


class LetterCounts:
    """Encodes a text by its letters; keeps what it was asked for, and can fail or spoil a vector."""

    def __init__(self, fail_after: int | None = None, spoil: str | None = None):
        self.seen: list[str] = []
        self.fail_after, self.spoil = fail_after, spoil

    def encode_passages(
        self, texts: Sequence[str], dim: int | None = None, progress: Progress | None = None
    ) -> np.ndarray:
        if self.fail_after is not None and len(self.seen) >= self.fail_after:
            raise RuntimeError("power cut")
        self.seen += texts
        cut_texts.note(map(len, texts), 13)
        if progress is not None:
            for _ in texts:
                progress(1)
        rows = np.array([[1.0 + text.count(letter) for letter in "abcdefgh"] for text in texts], dtype=np.float32)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        for row, text in enumerate(texts):
            if text == self.spoil:
                rows[row, 3] = np.nan
        return rows

    def encode_queries(self, texts: Sequence[str], dim: int | None = None) -> np.ndarray:
        return self.encode_passages(texts, dim)


def texts_of(count: int) -> list[str]:
    random = np.random.default_rng(7)
    return ["".join(random.choice(list("abcdefgh"), 12)) + f" {number}" for number in range(count)]


@pytest.fixture
def passages(tmp_path: Path) -> PassageTable:
    PassageTable.write(tmp_path / "passages", [Passage(f"p{n}", text) for n, text in enumerate(texts_of(10))])
    return PassageTable.open(tmp_path / "passages")


def encode_corpus(
    stage: StageFolder, passages: PassageTable, encoder: LetterCounts, shard_passages: int, share: Share = WHOLE
) -> Path:
    """What a stage does: write the shards, and finish where they are all there."""
    shards = write_shards(stage.folder, passages, encoder, shard_passages, share, stage.name)
    if shards is None:
        return stage.folder
    return stage.finish(passages=len(shards), dim=shards.dim, cut=texts_cut(stage.folder))


def cut_of(folder: Path) -> dict[str, int]:
    counted: dict[str, int] = read_provenance(folder)["cut"]
    return counted


def vectors_of(folder: Path, rows: int = 3) -> np.ndarray:
    """All vectors, read in blocks."""
    shards = EmbeddingShards(folder)
    blocks = [(first, block.copy()) for first, block in shards.blocks(rows)]
    assert [first for first, _ in blocks] == list(range(0, len(shards), rows))
    return np.concatenate([block for _, block in blocks])


def open_encode(tmp_path: Path, name: str = "encode/letters") -> StageFolder:
    return open_stage(tmp_path / "run", name, {"dtype": "float32"}, {"corpus": "abc"})


def test_embeddings_are_the_encoders_in_corpus_order(tmp_path: Path, passages: PassageTable) -> None:
    folder = encode_corpus(open_encode(tmp_path), passages, LetterCounts(), shard_passages=4)
    assert {path.name for path in folder.iterdir()} == {
        *(f"shard-0000{n}.npy" for n in range(3)),
        "settings.yaml",
        "provenance.json",
    }
    shards = EmbeddingShards(folder)
    assert (len(shards), shards.dim) == (10, 8)
    assert cut_of(folder) == {"texts": 10, "tokens": 10 * 14, "cut_texts": 10, "cut_tokens": 10}
    for rows in (1, 3, 4, 9, 10, 1000):
        vectors = vectors_of(folder, rows)
        assert vectors.dtype == np.float32
        np.testing.assert_array_equal(vectors, LetterCounts().encode_passages(texts_of(10)))


def test_passages_that_are_stored_with_a_vector_are_not_encoded_again(tmp_path: Path, passages: PassageTable) -> None:
    texts = texts_of(10)
    others = {"new": "xyz", "p3": texts[3], "p7": "changed", "p0": texts[0], "p9": texts[9], "p8": texts[8]}
    table = PassageTable.in_memory(Passage(id, text) for id, text in others.items())
    (tmp_path / "others").mkdir()
    np.save(tmp_path / "others" / "shard-00000.npy", np.eye(6, 8, dtype=np.float32))
    stored, encoder = StoredVectors(table, EmbeddingShards(tmp_path / "others")), LetterCounts()
    (tmp_path / "own").mkdir()
    write_shards(tmp_path / "own", passages, encoder, 4, stored=stored)  # the last shard is copied whole
    expected = LetterCounts().encode_passages(texts)
    expected[[3, 0, 9, 8]] = np.eye(6, 8)[[1, 3, 4, 5]]
    np.testing.assert_array_equal(vectors_of(tmp_path / "own"), expected)
    assert encoder.seen == [texts[row] for row in (1, 2, 4, 5, 6, 7)] and texts_cut(tmp_path / "own")["texts"] == 6
    (tmp_path / "unlike").mkdir()
    unlike = StoredVectors(PassageTable.in_memory([Passage("p0", "other")]), stored.shards)
    write_shards(tmp_path / "unlike", passages, LetterCounts(), 4, stored=unlike)
    np.testing.assert_array_equal(vectors_of(tmp_path / "unlike"), LetterCounts().encode_passages(texts))


def test_the_bar_moves_within_a_shard_and_begins_at_what_is_there(
    tmp_path: Path, passages: PassageTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RuntimeError):
        encode_corpus(open_encode(tmp_path), passages, LetterCounts(fail_after=5), shard_passages=5)
    bars: list[Mock] = []

    def bar(total: int, what: str, unit: str, done: int) -> Mock:
        bars.append(Mock(total=total, done=done))
        return bars[-1]

    monkeypatch.setattr(shards_module, "progress_bar", bar)
    encode_corpus(open_encode(tmp_path), passages, LetterCounts(), shard_passages=5)
    assert (bars[0].total, bars[0].done) == (10, 5)
    assert bars[0].update.call_args_list == [call(1)] * 5


def test_an_interrupted_run_encodes_only_what_is_missing_and_ends_the_same(
    tmp_path: Path, passages: PassageTable
) -> None:
    whole = encode_corpus(open_encode(tmp_path, "encode/whole"), passages, LetterCounts(), shard_passages=3)
    with pytest.raises(RuntimeError, match="power cut"):
        encode_corpus(open_encode(tmp_path), passages, LetterCounts(fail_after=6), shard_passages=3)
    stage, encoder = open_encode(tmp_path), LetterCounts()
    assert stage.resumed
    folder = encode_corpus(stage, passages, encoder, shard_passages=3)
    assert encoder.seen == texts_of(10)[6:]
    assert fingerprint(folder) == fingerprint(whole) and cut_of(folder) == cut_of(whole)


def test_a_shard_without_its_count_is_encoded_again(tmp_path: Path, passages: PassageTable) -> None:
    stage = open_encode(tmp_path)
    with pytest.raises(RuntimeError):
        encode_corpus(stage, passages, LetterCounts(fail_after=5), shard_passages=5)
    (left,) = (stage.folder / "checkpoints").glob("*.cut.json")
    left.unlink()
    encoder = LetterCounts()
    assert cut_of(encode_corpus(open_encode(tmp_path), passages, encoder, shard_passages=5))["texts"] == 10
    assert encoder.seen == texts_of(10)


@pytest.mark.parametrize("damage", ["cut", "rows", "nan", "float64", "lowest bit"])
def test_a_shard_that_is_not_whole_is_encoded_again(tmp_path: Path, passages: PassageTable, damage: str) -> None:
    stage = open_encode(tmp_path)
    with pytest.raises(RuntimeError):
        encode_corpus(stage, passages, LetterCounts(fail_after=5), shard_passages=5)
    shard = stage.folder / "shard-00000.npy"
    vectors = np.load(shard)
    if damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-9])
    elif damage == "lowest bit":
        contents = bytearray(shard.read_bytes())
        contents[-4] ^= 1
        shard.write_bytes(contents)
    elif damage == "rows":
        np.save(shard, vectors[:4])
    elif damage == "nan":
        vectors[2, 2] = np.nan
        np.save(shard, vectors)
    else:
        np.save(shard, vectors.astype(np.float64))
    encoder = LetterCounts()
    folder = encode_corpus(open_encode(tmp_path), passages, encoder, shard_passages=5)
    assert encoder.seen == texts_of(10)
    np.testing.assert_array_equal(vectors_of(folder), LetterCounts().encode_passages(texts_of(10)))


def test_a_vector_that_is_not_finite_names_its_passage(tmp_path: Path, passages: PassageTable) -> None:
    with pytest.raises(ValueError, match="'p7'"):
        encode_corpus(open_encode(tmp_path), passages, LetterCounts(spoil=texts_of(10)[7]), shard_passages=4)
    assert not (tmp_path / "run" / "encode" / "letters").exists()


def test_ranks_share_the_shards(tmp_path: Path, passages: PassageTable, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = encode_corpus(open_encode(tmp_path, "encode/alone"), passages, LetterCounts(), shard_passages=2)
    own, meeting = threading.local(), threading.Barrier(2, timeout=20)
    monkeypatch.setattr(ranks, "rank", lambda: own.rank)
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    monkeypatch.setattr(ranks, "barrier", meeting.wait)
    on_every_rank = gathering(own, meeting)
    monkeypatch.setattr(ranks, "on_every_rank", on_every_rank)
    encoders = [LetterCounts(), LetterCounts()]

    def work(rank: int) -> None:
        own.rank = rank
        encode_corpus(open_encode(tmp_path), passages, encoders[rank], shard_passages=2)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(encoder.seen) for encoder in encoders] == [6, 4]
    folder = tmp_path / "run" / "encode" / "letters"
    assert fingerprint(folder) == fingerprint(alone) and cut_of(folder) == cut_of(alone)


def test_tasks_without_a_process_group_leave_shards_and_a_plain_run_finishes(
    tmp_path: Path, passages: PassageTable
) -> None:
    alone = encode_corpus(open_encode(tmp_path, "encode/alone"), passages, LetterCounts(), shard_passages=2)
    encoders = [LetterCounts(), LetterCounts(fail_after=2), LetterCounts()]  # 5 shards; task 1 dies before its second
    for number, encoder in enumerate(encoders):
        try:
            folder = encode_corpus(open_encode(tmp_path), passages, encoder, 2, Share(number, 3))
        except RuntimeError:
            continue
        assert folder == tmp_path / "run" / "encode" / "letters.partial"
    assert [len(encoder.seen) for encoder in encoders] == [4, 2, 2]
    again = LetterCounts()
    encode_corpus(open_encode(tmp_path), passages, again, 2, Share(0, 3))
    assert not again.seen
    last = LetterCounts()
    folder = encode_corpus(open_encode(tmp_path), passages, last, shard_passages=2)
    assert last.seen == texts_of(10)[8:] and fingerprint(folder) == fingerprint(alone)
    assert cut_of(folder) == cut_of(alone)


def test_shards_of_another_number_of_passages_are_refused(tmp_path: Path, passages: PassageTable) -> None:
    write_shard(tmp_path, 2, LetterCounts().encode_passages(texts_of(4)))
    with pytest.raises(ValueError, match="the shards hold 14 vectors for 10 passages; start all ranks together"):
        write_shards(tmp_path, passages, LetterCounts(), 5)


def test_a_corpus_without_passages_is_refused(tmp_path: Path) -> None:
    nothing = PassageTable(Dataset.from_dict({"id": []}))
    with pytest.raises(ValueError, match="encode/x: the corpus has no passages"):
        write_shards(tmp_path, nothing, LetterCounts(), 4, WHOLE, "encode/x")


def test_a_missing_or_short_shard_is_refused(tmp_path: Path, passages: PassageTable) -> None:
    folder = encode_corpus(open_encode(tmp_path), passages, LetterCounts(), shard_passages=3)
    middle = folder / "shard-00001.npy"
    kept, vectors = middle.read_bytes(), np.load(middle)
    for spoiled in (vectors[:2], vectors[:, :7], vectors[0], vectors.astype(np.float64), np.asfortranarray(vectors)):
        np.save(middle, spoiled)
        with pytest.raises(ValueError, match=r"shard-00001\.npy.* encode again"):
            EmbeddingShards(folder)
    for spoiled in (kept[:-9], kept[:90], b"", b"not an array"):
        middle.write_bytes(spoiled)
        with pytest.raises(ValueError, match=r"shard-00001\.npy.* encode again"):
            EmbeddingShards(folder)
    middle.unlink()
    with pytest.raises(ValueError, match=r"shard-00001\.npy: missing"):
        EmbeddingShards(folder)
    middle.write_bytes(kept)
    shards = EmbeddingShards(folder)
    assert len(shards) == 10
    middle.write_bytes(kept[:-9])
    with pytest.raises(ValueError, match=r"shard-00001\.npy: cut short while it was read"):
        list(shards.blocks(4))
    middle.write_bytes(kept)
    (folder / "shard-00003.npy").unlink()
    with pytest.raises(ValueError, match="9 vectors, but provenance"):
        EmbeddingShards(folder)
    with pytest.raises(FileNotFoundError, match="drama encode"):
        EmbeddingShards(tmp_path)


def test_more_shards_than_a_process_may_open_files_and_than_five_digits_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards_module, "shard_path", lambda folder, index: folder / f"shard-{index + 99_950:05d}.npy")
    for index in range(120):
        write_shard(tmp_path, index, np.full((1, 2), index))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (80, hard))
    try:
        assert vectors_of(tmp_path)[:, 0].tolist() == list(range(120))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_sample_has_no_row_twice_keeps_the_order_and_is_the_seeds(tmp_path: Path) -> None:
    for index, rows in enumerate((40, 40, 13)):
        write_shard(tmp_path, index, np.repeat(np.arange(40 * index, 40 * index + rows)[:, None], 3, axis=1))
    shards = EmbeddingShards(tmp_path)
    drawn = shards.sample(30, seed=1)[:, 0]
    assert len(set(drawn)) == 30 and (np.diff(drawn) > 0).all() and drawn.max() > 40 > drawn.min()
    np.testing.assert_array_equal(drawn, shards.sample(30, seed=1)[:, 0])
    assert set(drawn) != set(shards.sample(30, seed=2)[:, 0])
    for count in (93, 1000):
        np.testing.assert_array_equal(shards.sample(count, seed=1)[:, 2], np.arange(93))


def test_rows_are_those_at_the_positions_in_their_order(passages: PassageTable, tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    shards = write_shards(tmp_path / "shards", passages, LetterCounts(), 4)
    assert shards is not None
    whole = LetterCounts().encode_passages(texts_of(10))
    for positions in ([9, 0, 4, 4, 3], [], [8], list(range(10))):
        np.testing.assert_array_equal(shards.rows(positions), whole[positions].reshape(-1, 8))
