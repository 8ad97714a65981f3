"""The augment stage: crops, ranking, negatives, resumption, and test queries kept out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from drama_dist.augment import stage as build_examples
from drama_dist.augment.rank_passages import Ranker, example
from drama_dist.augment.sources.crop import crops
from drama_dist.augment.written import WrittenQuery
from drama_dist.corpus.collection import Collection, open_collection
from drama_dist.records import Example, Query, read_records
from drama_dist.run.progress import Progress
from drama_dist.run.runner import make
from drama_dist.run.shares import Share
from drama_dist.search.lexical import build_lexical_index
from drama_dist.search.shards import EmbeddingShards, write_shard
from drama_dist.search.systems import TeacherSystem
from drama_dist.settings import AugmentSettings, Settings

SETTINGS = AugmentSettings(positives=2, negatives=3, negatives_from_rank=5, negatives_to_rank=10)


class LetterCounts:
    """A teacher that encodes a text by its letters; can fail after a number of queries."""

    def __init__(self, fail_after: int | None = None):
        self.seen, self.fail_after = 0, fail_after

    def encode_passages(
        self, texts: Sequence[str], dim: int | None = None, progress: Progress | None = None
    ) -> np.ndarray:
        rows = np.array([[text.lower().count(letter) for letter in "abcdefghijklmnopqrstuvwxyz"] for text in texts])
        return (rows / np.linalg.norm(rows + 1e-9, axis=1, keepdims=True)).astype(np.float32)

    def encode_queries(self, texts: Sequence[str], dim: int | None = None) -> np.ndarray:
        if self.fail_after is not None and self.seen >= self.fail_after:
            raise RuntimeError("power cut")
        self.seen += len(texts)
        return self.encode_passages(texts, dim)


@pytest.fixture
def settings(small_settings: Callable[..., Settings]) -> Settings:
    return small_settings("augment.synthetic_queries=0")


@pytest.fixture
def corpus(settings: Settings) -> Collection:
    return open_collection(make(settings, "corpus"))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[[Settings, LetterCounts], list[Example]]:
    """Run the stage with a teacher; returns the examples."""

    def augment(settings: Settings, teacher: LetterCounts) -> list[Example]:
        monkeypatch.setattr(TeacherSystem, "load", lambda system, settings: teacher)
        return read_records(make(settings, "augment") / "examples.jsonl", Example.from_json)

    return augment


Augment = Callable[[Settings, LetterCounts], list[Example]]


def test_every_example_names_real_passages_and_where_it_comes_from(
    settings: Settings, corpus: Collection, run: Augment
) -> None:
    examples = run(settings, LetterCounts())
    known = set(corpus.passages.ids)
    assert len(examples) > 60 and {row.source for row in examples} == {"crop"}
    for row in examples:
        assert set(row.positives) | set(row.negatives) <= known and len(row.positives) == 1
        assert len(set(row.negatives)) == 4 and not set(row.negatives) & {*row.positives, row.provenance["passage"]}
        assert row.provenance["seed"] == 1
        text = corpus.passages[corpus.passages.position(row.provenance["passage"])].text
        assert row.query in text
    most = Counter(row.positives[0] == row.provenance["passage"] for row in examples)
    assert most[True] > most[False]


def test_a_test_query_never_becomes_an_example(
    settings: Settings, corpus: Collection, run: Augment, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = list(crops(corpus.passages, settings.augment, settings.seed))
    corpus.queries.append(Query("t", f"  {written[0].query.upper()} "))
    monkeypatch.setattr(build_examples, "open_collection", lambda folder: corpus)
    examples = run(settings, LetterCounts())
    assert written[0].query not in {row.query for row in examples}
    lines = (Path(settings.run) / "augment" / "set_aside.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["reason"] for line in lines] == ["is a test query"]


def test_an_interrupted_stage_ends_the_same_and_does_not_repeat_its_parts(
    small_settings: Callable[..., Settings], run: Augment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_examples, "_PART", 20)
    whole, broken = (small_settings("augment.synthetic_queries=0", f"run={tmp_path / n}") for n in "ab")
    run(whole, LetterCounts())
    with pytest.raises(RuntimeError, match="power cut"):
        run(broken, LetterCounts(fail_after=45))
    teacher = LetterCounts()
    examples = run(broken, teacher)
    assert teacher.seen == len(examples) - 60
    first, second = (tmp_path / name / "augment" / "examples.jsonl" for name in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_too_many_unusable_answers_stop_the_stage(small_settings: Callable[..., Settings], run: Augment) -> None:
    settings = small_settings("augment.synthetic_queries=3", "augment.bad_answer_limit=0.3")
    with pytest.raises(ValueError, match=r"3 of 3 answers of .* more than augment.bad_answer_limit=0.3 allows"):
        run(settings, LetterCounts())


def test_tasks_write_their_shares_and_a_plain_run_finishes(
    small_settings_in: Callable[..., Settings], run: Augment, tmp_path: Path
) -> None:
    changes = ["augment.synthetic_queries=5", "augment.generation_batch=2"]
    alone, shared = (small_settings_in(tmp_path, f"run={tmp_path / name}", *changes) for name in ("alone", "shared"))
    expected = run(alone, LetterCounts())
    for index, parts in ((1, {"part-00001.jsonl"}), (0, {f"part-0000{n}.jsonl" for n in range(3)})):
        if index:
            make(shared, "encode", collection="windows", system="teacher")
            make(shared, "encode", collection="windows", system="bm25")
        folder = make(shared, "augment", Share(index, 2))
        assert folder == tmp_path / "shared" / "augment.partial" and not (folder / "checkpoints" / "ranked").exists()
        assert {path.name for path in (folder / "checkpoints" / "synthetic").glob("*.jsonl")} == parts
    assert run(shared, LetterCounts()) == expected


def test_nothing_written_is_an_error(small_settings: Callable[..., Settings], run: Augment) -> None:
    settings = small_settings("augment.synthetic_queries=0", "augment.min_crop_words=40")
    with pytest.raises(ValueError, match="no training query could be written"):
        run(settings, LetterCounts())


def test_negatives_come_from_the_requested_ranks(corpus: Collection) -> None:
    ids = corpus.passages.ids
    ranking = np.arange(40)
    seen: Counter[str] = Counter()
    for number in range(200):
        row = example(WrittenQuery(f"q{number}", ids[6], "crop"), ranking, corpus.passages, SETTINGS, seed=1)
        assert row.positives == (ids[0], ids[1]) and len(row.negatives) == 3
        seen.update(row.negatives)
    assert set(seen) == {ids[position] for position in (4, 5, 7, 8, 9)}


def test_ranking_fuses_the_teacher_with_words(corpus: Collection, tmp_path: Path) -> None:
    contents = list(corpus.passages.texts())
    teacher = LetterCounts()
    embeddings_NK = teacher.encode_passages(contents)
    write_shard(tmp_path, 0, embeddings_NK)
    query, shards = [contents[7][:40]], EmbeddingShards(tmp_path)
    alone = Ranker(teacher, shards, None, 60).rank(query, 10)
    fused = Ranker(teacher, shards, build_lexical_index(contents, "en", tmp_path / "bm25"), 60).rank(query, 10)
    assert alone.shape == fused.shape == (1, 10) and fused[0, 0] == 7
    cosines_N = embeddings_NK @ teacher.encode_queries(query)[0]
    assert alone[0].tolist() == np.argsort(-cosines_N, kind="stable")[:10].tolist()
    assert alone.tolist() != fused.tolist()
