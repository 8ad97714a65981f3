"""Embedding shards: whole, resumed, split over ranks, and refused where they are not."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import Mock, call

import numpy as np
import pytest

from drama_dist.corpus.collection import PassageTable
from drama_dist.distributed import ranks
from drama_dist.records import Passage
from drama_dist.run.folder import StageFolder, fingerprint, open_stage
from drama_dist.run.progress import Progress
from drama_dist.run.shares import Share
from drama_dist.search import shards as encode
from drama_dist.search.dense import load_index, search_folder
from drama_dist.search.shards import encode_corpus, load_embeddings


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


def open_encode(tmp_path: Path, name: str = "encode/letters") -> StageFolder:
    return open_stage(tmp_path / "run", name, {"dtype": "float32"}, {"corpus": "abc"})


def test_embeddings_are_the_encoders_in_corpus_order(tmp_path: Path, passages: PassageTable) -> None:
    folder = encode_corpus(open_encode(tmp_path), passages, LetterCounts(), shard_passages=4)
    found = load_embeddings(folder)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, LetterCounts().encode_passages(texts_of(10)))
    assert sorted(path.name for path in folder.glob("shard*")) == [f"shard-0000{n}.npy" for n in range(3)]
    assert len(load_index(folder)) == 10


def test_the_bar_moves_within_a_shard_and_begins_at_what_is_there(
    tmp_path: Path, passages: PassageTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RuntimeError):
        encode_corpus(open_encode(tmp_path), passages, LetterCounts(fail_after=5), shard_passages=5)
    bars: list[Mock] = []

    def bar(total: int, what: str, unit: str, done: int) -> Mock:
        bars.append(Mock(total=total, done=done))
        return bars[-1]

    monkeypatch.setattr(encode, "progress_bar", bar)
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
    assert fingerprint(folder) == fingerprint(whole)


@pytest.mark.parametrize("damage", ["cut", "rows", "nan", "float64"])
def test_a_shard_that_is_not_whole_is_encoded_again(tmp_path: Path, passages: PassageTable, damage: str) -> None:
    stage = open_encode(tmp_path)
    with pytest.raises(RuntimeError):
        encode_corpus(stage, passages, LetterCounts(fail_after=5), shard_passages=5)
    shard = stage.folder / "shard-00000.npy"
    vectors = np.load(shard)
    if damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-9])
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
    np.testing.assert_array_equal(load_embeddings(folder), LetterCounts().encode_passages(texts_of(10)))


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
    told = [0, 0]

    def on_every_rank(number: int) -> list[int]:
        told[own.rank] = number
        meeting.wait()
        found = list(told)
        meeting.wait()
        return found

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
    assert fingerprint(tmp_path / "run" / "encode" / "letters") == fingerprint(alone)


def test_tasks_without_a_process_group_leave_shards_and_a_plain_run_finishes(
    tmp_path: Path, passages: PassageTable
) -> None:
    alone = encode_corpus(open_encode(tmp_path, "encode/alone"), passages, LetterCounts(), shard_passages=2)
    encoders = [LetterCounts(), LetterCounts(fail_after=2), LetterCounts()]  # 5 shards; task 1 dies before its second
    for number, encoder in enumerate(encoders):
        try:
            found = encode_corpus(open_encode(tmp_path), passages, encoder, 2, Share(number, 3))
        except RuntimeError:
            continue
        assert found == tmp_path / "run" / "encode" / "letters.partial"
    assert [len(encoder.seen) for encoder in encoders] == [4, 2, 2]
    again = LetterCounts()
    encode_corpus(open_encode(tmp_path), passages, again, 2, Share(0, 3))
    assert not again.seen
    last = LetterCounts()
    folder = encode_corpus(open_encode(tmp_path), passages, last, shard_passages=2)
    assert last.seen == texts_of(10)[8:] and fingerprint(folder) == fingerprint(alone)


def test_a_missing_or_short_shard_is_refused(tmp_path: Path, passages: PassageTable) -> None:
    folder = encode_corpus(open_encode(tmp_path), passages, LetterCounts(), shard_passages=3)
    middle = folder / "shard-00001.npy"
    kept = middle.read_bytes()
    np.save(middle, np.load(middle)[:2])
    with pytest.raises(ValueError, match="shard-00001"):
        load_embeddings(folder)
    middle.unlink()
    with pytest.raises(ValueError, match="shard-00001"):
        load_embeddings(folder)
    middle.write_bytes(kept)
    assert len(load_embeddings(folder)) == 10
    (folder / "shard-00003.npy").unlink()
    with pytest.raises(ValueError, match="9 vectors, but provenance"):
        load_embeddings(folder)
    with pytest.raises(FileNotFoundError, match="drama encode"):
        load_embeddings(tmp_path)


def test_search_in_a_folder_takes_the_dim_of_the_queries(tmp_path: Path, passages: PassageTable) -> None:
    folder = encode_corpus(open_encode(tmp_path), passages, LetterCounts(), shard_passages=4)
    before = fingerprint(folder)
    vectors = load_embeddings(folder)
    for dim in (8, 3):
        cut = vectors[:, :dim] / np.linalg.norm(vectors[:, :dim], axis=1, keepdims=True)
        scores, positions = search_folder(folder, cut[[6]], 1)
        assert positions[0, 0] == np.argmax(cut @ cut[6]) and scores[0, 0] == pytest.approx(1, abs=1e-5)
    assert fingerprint(folder) == before
    with pytest.raises(FileNotFoundError, match="drama encode"):
        search_folder(tmp_path, vectors[:1], 1)
