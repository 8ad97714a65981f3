"""The augment stage: crops, ranking, negatives, resumption, and test queries kept out."""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from drama_dist.augment import stage as build_examples
from drama_dist.augment.rank_passages import Ranker, example
from drama_dist.augment.sources.crop import KINDS, crops
from drama_dist.augment.written import WrittenQuery
from drama_dist.corpus.collection import Collection, open_collection
from drama_dist.distributed import ranks
from drama_dist.records import Example, Query, read_records
from drama_dist.run.folder import fingerprint
from drama_dist.run.progress import Progress
from drama_dist.run.runner import Run, make
from drama_dist.run.shares import Share
from drama_dist.search.lexical import LexicalIndex, build_lexical_index
from drama_dist.search.shards import EmbeddingShards, write_shard
from drama_dist.search.systems import TeacherSystem
from drama_dist.settings import AugmentSettings, Settings
from tests.conftest import gathering

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
        text = corpus.passages[corpus.passages.position(row.provenance["passage"])].text.lower()
        assert set(re.findall(r"\w+", row.query.lower())) <= set(re.findall(r"\w+", text))
    most = Counter(row.positives[0] == row.provenance["passage"] for row in examples)
    assert most[True] > most[False]
    counts = json.loads((Path(settings.run) / "augment" / "counts.json").read_text("utf-8"))
    of_kinds = {f"{kind} crops": number for kind, number in kinds_of(examples).items()}
    assert set(kinds_of(examples)) == set(KINDS) and of_kinds.items() <= counts.items()
    assert counts["crop examples"] == len(examples) == 128 - counts["repeated crops"]


def kinds_of(examples: Sequence[Example]) -> Counter[str]:
    return Counter(row.provenance["kind"] for row in examples)


def test_a_test_query_never_becomes_an_example(
    settings: Settings, corpus: Collection, run: Augment, monkeypatch: pytest.MonkeyPatch
) -> None:
    lexical = LexicalIndex(make(settings, "encode", system="bm25"))
    written, _ = crops(corpus.passages, lexical, settings.augment, settings.seed)
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
    first, second = (tmp_path / name / "augment" for name in "ab")
    assert fingerprint(first) == fingerprint(second) and not list((second / "query_vectors").glob("*.sha256"))
    vectors = EmbeddingShards(second / "query_vectors")
    assert len(vectors) == len(examples) > 60 and len(examples) % 20  # the last part is shorter
    expected = LetterCounts().encode_queries([example.query for example in examples])
    np.testing.assert_array_equal(vectors.rows(range(len(examples))), expected)


@pytest.mark.parametrize("damage", ["missing", "lowest bit"])
def test_a_part_whose_vectors_are_damaged_is_made_again(
    damage: str, settings: Settings, run: Augment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_examples, "_PART", 20)
    with pytest.raises(RuntimeError, match="power cut"):
        run(settings, LetterCounts(fail_after=45))
    shard = Path(settings.run) / "augment.partial" / "checkpoints" / "query_vectors" / "shard-00001.npy"
    contents = shard.read_bytes()
    if damage == "missing":
        shard.unlink()
    else:
        shard.write_bytes(contents[:-4] + bytes([contents[-4] ^ 1]) + contents[-3:])
    teacher = LetterCounts()
    examples = run(settings, teacher)
    assert teacher.seen == len(examples) - 40  # parts 0 and 2 are kept
    vectors = EmbeddingShards(Path(settings.run) / "augment" / "query_vectors")
    expected = LetterCounts().encode_queries([example.query for example in examples])
    np.testing.assert_array_equal(vectors.rows(range(len(examples))), expected)


def test_ranks_share_the_parts(
    small_settings: Callable[..., Settings], run: Augment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_examples, "_PART", 20)
    alone, shared = (small_settings("augment.synthetic_queries=0", f"run={tmp_path / n}") for n in ("alone", "shared"))
    examples = run(alone, LetterCounts())
    for name in ("corpus", "encode/corpus/teacher", "encode/corpus/bm25"):
        Run(shared).make(name)
    world, own = 3, threading.local()
    meeting = threading.Barrier(world, timeout=20)
    on_every_rank = gathering(own, meeting)
    teachers = {rank: LetterCounts() for rank in range(world)}

    def work(rank: int) -> None:
        own.rank = rank
        Run(shared).make("augment")

    with monkeypatch.context() as patch:
        patch.setattr(TeacherSystem, "load", lambda system, settings: teachers[own.rank])
        patch.setattr(ranks, "rank", lambda: own.rank)
        patch.setattr(ranks, "world_size", lambda: world)
        patch.setattr(ranks, "barrier", meeting.wait)
        patch.setattr(ranks, "on_every_rank", on_every_rank)
        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert fingerprint(tmp_path / "shared" / "augment") == fingerprint(tmp_path / "alone" / "augment")
    seen = [teacher.seen for teacher in teachers.values()]
    assert sum(seen) == len(examples) and max(seen) - min(seen) <= 20 and min(seen) > 0


def test_a_query_vector_that_is_not_finite_is_refused(settings: Settings, run: Augment) -> None:
    class Spoilt(LetterCounts):
        def encode_queries(self, texts: Sequence[str], dim: int | None = None) -> np.ndarray:
            return np.full_like(super().encode_queries(texts, dim), np.nan)

    with pytest.raises(ValueError, match=r"a query of training: its vector has norm nan, expected 1"):
        run(settings, Spoilt())


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
    kinds = "augment.crop_kinds={sentence: 1, joined: 1}"
    settings = small_settings("augment.synthetic_queries=0", "augment.min_crop_words=40", kinds)
    with pytest.raises(ValueError, match="no training query is left"):
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
    vectors_QT, lexical = teacher.encode_queries(query), build_lexical_index(contents, "en", tmp_path / "bm25")
    alone = Ranker(teacher, shards, None, 60).rank(query, vectors_QT, 10)
    fused = Ranker(teacher, shards, lexical, 60).rank(query, vectors_QT, 10)
    assert alone.shape == fused.shape == (1, 10) and fused[0, 0] == 7
    cosines_N = embeddings_NK @ vectors_QT[0]
    assert alone[0].tolist() == np.argsort(-cosines_N, kind="stable")[:10].tolist()
    assert alone.tolist() != fused.tolist()


def test_checkpoints_that_a_kill_left_in_the_finished_folder_are_no_damage(settings: Settings, run: Augment) -> None:
    examples = run(settings, LetterCounts())
    left = Path(settings.run) / "augment" / "checkpoints" / "query_vectors"
    left.mkdir(parents=True)
    (left / "shard-00000.npy").write_bytes(b"half of it")
    assert run(settings, LetterCounts(fail_after=0)) == examples
    assert not left.exists()


def test_only_queries_whose_passage_comes_back_stay(
    small_settings: Callable[..., Settings], run: Augment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_examples, "_PART", 20)
    whole = run(small_settings("augment.synthetic_queries=0", f"run={tmp_path / 'whole'}"), LetterCounts())
    settings = small_settings("augment.synthetic_queries=0", "augment.round_trip=2")
    rows = run(settings, LetterCounts())
    assert rows == [row for row in whole if row.provenance["rank"] in (1, 2)] and 20 < len(rows) < len(whole) - 5
    vectors = EmbeddingShards(Path(settings.run) / "augment" / "query_vectors")
    np.testing.assert_array_equal(
        vectors.rows(range(len(rows))), LetterCounts().encode_queries([r.query for r in rows])
    )
    lines = (Path(settings.run) / "augment" / "set_aside.jsonl").read_text("utf-8").splitlines()
    gone = [row.query for row in whole if row not in rows]
    assert [json.loads(line)["value"] for line in lines] == gone
    counts = json.loads((Path(settings.run) / "augment" / "counts.json").read_text("utf-8"))
    assert counts["set aside: its passage does not come back"] == len(gone)


def test_near_duplicates_and_quotas_are_taken_out_before_ranking(
    small_settings: Callable[..., Settings], run: Augment
) -> None:
    teacher = LetterCounts()
    settings = small_settings("augment.synthetic_queries=0", "augment.near_duplicates=0.5", "augment.quotas={crop: 30}")
    assert len(run(settings, teacher)) == teacher.seen == 30
    counts = json.loads((Path(settings.run) / "augment" / "counts.json").read_text("utf-8"))
    assert counts["set aside: nearly the same as another query"] > 5
    near, beyond = counts["set aside: nearly the same as another query"], counts["beyond the quota of crop"]
    assert near + beyond + 30 == 128 - counts["repeated crops"]


def test_the_stage_draws_negatives_by_the_teachers_scores(
    small_settings: Callable[..., Settings], run: Augment
) -> None:
    bands = ["augment.negatives=4", "augment.negatives_from_rank=2", "augment.negatives_to_rank=40"]
    more = ["augment.negative_strata=4", "augment.max_negative_score=0.97"]
    settings = small_settings("augment.synthetic_queries=0", *bands, *more)
    rows, teacher = run(settings, LetterCounts()), LetterCounts()
    passages = open_collection(Path(settings.run) / "windows").passages
    fewer = 0
    for row in rows:
        of = [passages[passages.position(id)].content for id in (*row.positives, *row.negatives)]
        positive, *negatives = (teacher.encode_passages(of) @ teacher.encode_queries([row.query])[0]).tolist()
        assert all(score <= 0.97 * positive + 1e-6 for score in negatives)
        assert negatives == sorted(negatives, reverse=True) or len(negatives) < 4
        fewer += len(negatives) < 4
    assert fewer < len(rows) / 2


def test_each_stratum_of_scores_gives_as_many_negatives(corpus: Collection) -> None:
    settings = AugmentSettings(negatives=4, negatives_from_rank=5, negatives_to_rank=24, negative_strata=4)
    ids, chance = corpus.passages.ids, np.random.default_rng(1)
    shuffled = np.r_[np.arange(4), 4 + chance.permutation(20)]  # fusion's order is not the teacher's
    for number in range(50):
        query = WrittenQuery(f"q{number}", "", "crop")
        row = example(query, shuffled, corpus.passages, settings, 1, lambda positions: [-float(p) for p in positions])
        assert [(ids.index(id) - 4) // 5 for id in row.negatives] == [0, 1, 2, 3]


@pytest.mark.parametrize("strata", [1, 4, 9])
def test_strata_that_have_too_few_are_made_up_for_by_others(corpus: Collection, strata: int) -> None:
    settings = AugmentSettings(negatives=9, negatives_from_rank=5, negatives_to_rank=13, negative_strata=strata)
    row = example(WrittenQuery("q", "", "crop"), np.arange(13), corpus.passages, settings, 1, lambda p: [0.5] * len(p))
    assert sorted(row.negatives) == sorted(corpus.passages.ids[4:13])


def test_no_negative_scores_near_a_positive(corpus: Collection) -> None:
    ids, ranks = corpus.passages.ids, np.arange(20)

    def settings(positives: int) -> AugmentSettings:
        bands = {"negatives": 10, "negatives_from_rank": 3, "negatives_to_rank": 20}
        return AugmentSettings(positives=positives, max_negative_score=0.9, **bands)

    def falling(positions: Sequence[int]) -> list[float]:
        return [1 - 0.02 * position for position in positions]

    query = WrittenQuery("q", "", "crop")
    row = example(query, ranks, corpus.passages, settings(1), 1, falling)
    assert min(map(ids.index, row.negatives)) >= 5 and len(row.negatives) == 10  # 5 scores .9
    judged = WrittenQuery("q", "", "labelled", judged=(ids[0], ids[10]))  # which scores .8, and .72 is no negative's
    row = example(judged, ranks, corpus.passages, settings(2), 1, falling)
    assert set(map(ids.index, row.negatives)) <= {14, 15, 16, 17, 18, 19} and len(row.negatives) >= 5
    unranked = WrittenQuery("q", "", "labelled", judged=(ids[25],))  # which scores .5
    assert not example(unranked, ranks, corpus.passages, settings(1), 1, falling).negatives
    below_zero = example(query, ranks, corpus.passages, settings(1), 1, lambda p: [each - 2 for each in falling(p)])
    assert len(below_zero.negatives) == 10


def test_scores_are_the_teachers(corpus: Collection, tmp_path: Path) -> None:
    teacher = LetterCounts()
    passages_NK = teacher.encode_passages(list(corpus.passages.texts()))
    write_shard(tmp_path, 0, passages_NK)
    ranker = Ranker(teacher, EmbeddingShards(tmp_path), None, 60)
    vectors_QT = teacher.encode_queries(["bread and salt", "river"])
    expected = passages_NK[[3, 60, 3]] @ vectors_QT[1]
    np.testing.assert_allclose(ranker.scores(vectors_QT[1], [3, 60, 3]), expected, rtol=1e-6)
    assert ranker.scores(vectors_QT[0], []) == []
