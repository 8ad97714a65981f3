"""Batches: a function of examples, seed and step; no doubled positives; nothing left out; and their texts."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from datasets import Dataset

from drama_dist.corpus.collection import PassageTable
from drama_dist.records import Example, Passage
from drama_dist.train.batches import Batch, Mix, batches, check_batches, texts_of, with_share_of_passages


def examples(count: int, positives: int) -> list[Example]:
    """Examples whose positives repeat every `positives` examples."""
    return [
        Example(f"query {n}", (f"p{n % positives}",), (f"p{(n + 1) % positives}", f"n{n}"), "crop")
        for n in range(count)
    ]


def with_three_positives(count: int) -> list[Example]:
    """Examples of which the next two share two positives, and the one after those one."""
    return [
        Example(f"query {n}", tuple(f"p{(n + i) % count}" for i in range(3)), (f"n{n}",), "crop") for n in range(count)
    ]


def take(count: int, *arguments: object) -> list[Batch]:
    return list(itertools.islice(batches(*arguments), count))  # type: ignore[arg-type]


def test_every_query_points_at_its_own_positive_and_passages_stand_once() -> None:
    rows = examples(20, 20)
    positive_of = {row.query: row.positives[0] for row in rows}
    for batch in take(5, rows, 6, 2, 1):
        assert len(batch.queries) == len(batch.positives) == 6
        assert [batch.passages[column] for column in batch.positives] == [positive_of[query] for query in batch.queries]
        assert len(set(batch.passages)) == len(batch.passages)


@pytest.mark.parametrize("several", [False, True])
def test_a_later_start_gives_the_same_batches(several: bool) -> None:
    rows = with_three_positives(23) if several else examples(23, 11)
    assert take(5, rows, 4, 1, 7, 6) == take(11, rows, 4, 1, 7)[6:]


def test_seeds_differ_and_epochs_differ() -> None:
    rows = examples(12, 12)
    first = take(6, rows, 4, 1, 1)
    assert first != take(6, rows, 4, 1, 2)
    assert first[:3] != first[3:]


def test_no_two_examples_of_a_batch_share_a_positive_and_none_is_lost() -> None:
    rows = examples(40, 10)
    drawn = take(50, rows, 8, 0, 3)
    for batch in drawn:
        assert len(set(batch.positives)) == 8
    counts = Counter(query for batch in drawn for query in batch.queries)
    assert len(counts) == 40 and max(counts.values()) - min(counts.values()) <= 2


def test_negatives_are_as_many_as_asked() -> None:
    rows = [Example(f"q{n}", (f"p{n}",), tuple(f"n{n}-{i}" for i in range(5)), "crop") for n in range(6)]
    (batch,) = take(1, rows, 4, 3, 1)
    assert len(batch.passages) == 4 * (1 + 3)


def test_a_fraction_gives_that_share_of_the_queries_a_negative() -> None:
    rows = [Example(f"q{n}", (f"p{n}",), (f"n{n}",), "crop") for n in range(400)]
    (batch,) = take(1, rows, 400, 0.25, 1)
    assert 460 < len(batch.passages) < 540


def test_too_few_positives_or_queries_for_a_batch_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"train.batch_size=8, but the examples have only 3 different first positives"):
        check_batches(examples(30, 3), 8, 1)
    with pytest.raises(ValueError, match=r"train.batch_size=8 for 9 ranks: each needs a query"):
        check_batches(examples(30, 30), 8, 9)
    check_batches(examples(30, 8), 8, 8)


def test_a_positive_that_all_examples_share_puts_none_off() -> None:
    rows = [Example(f"q{n}", (f"p{n}", "hub"), (), "crop") for n in range(60)]
    drawn = take(90, rows, 10, 0, 1)
    counts = Counter(query for batch in drawn for query in batch.queries)
    assert set(counts.values()) == {15}
    assert all("hub" in batch.passages for batch in drawn)


def test_every_positive_is_drawn_and_no_two_queries_of_a_batch_have_the_same() -> None:
    rows = with_three_positives(30)
    positives_of = {row.query: row.positives for row in rows}
    drawn: Counter[tuple[str, str]] = Counter()
    for batch in take(200, rows, 12, 1, 5):
        assert len(set(batch.positives)) == 12
        for query, column, others in zip(batch.queries, batch.positives, batch.other_positives, strict=True):
            assert {batch.passages[column], *others} == set(positives_of[query]) and len(others) == 2
            drawn[query, batch.passages[column]] += 1
    assert len(drawn) == 90
    by_rank = [sum(drawn[row.query, row.positives[rank]] for row in rows) for rank in range(3)]
    assert min(by_rank) > 0.9 * 200 * 12 / 3


def test_texts_count_as_one_passage_under_any_id() -> None:
    texts = {"a": "one", "b": "two", "b2": "two", "c": "three", "d": "four"}
    table = PassageTable(Dataset.from_list([vars(Passage(id, text)) for id, text in texts.items()]))
    batch = Batch(["q", "r", "s"], ["a", "b2", "c"], [0, 1, 2], [("b", "d"), (), ("d",)], [5, 6, 7])
    looked_up = texts_of(batch, table)
    assert (looked_up.queries, looked_up.passages) == (["q", "r", "s"], ["one", "two", "three"])
    assert looked_up.examples == [5, 6, 7] and looked_up.positions == [0, 2, 3]
    relevance = looked_up.relevance
    assert relevance.positives_B.tolist() == [0, 1, 2] and relevance.passage_ids_N.tolist() == [0, 1, 2]
    assert relevance.excluded_ids_BE is not None
    assert relevance.excluded_ids_BE.tolist() == [[1], [-1], [-1]]  # "b" has the text of "b2", "d" none here
    twins = texts_of(Batch(["q"], ["b", "b2"], [0], [()], [0]), table).relevance
    assert twins.passage_ids_N.tolist() == [0, 0] and twins.excluded_ids_BE is None


@pytest.mark.parametrize(("share", "count"), [(1.0, 6), (0.5, 3), (0.25, 2), (0.01, 1)])
def test_a_share_of_the_passages_is_the_first_of_them(share: float, count: int) -> None:
    table = PassageTable(Dataset.from_list([vars(Passage(f"p{n}", f"text {n}")) for n in range(20)]))
    batch = texts_of(take(1, examples(20, 20), 6, 0, 1)[0], table)
    some = with_share_of_passages(batch, share)
    assert some.passages == batch.passages[:count]
    assert some.positions == batch.positions[:count]
    assert some.queries == batch.queries


def of_sources() -> list[Example]:
    """300 crops, 60 synthetic queries and 40 of people, every other one in German."""
    sources = [*["crop"] * 300, *["synthetic"] * 60, *["logged"] * 40]
    languages = ["en", "de"] * 200
    return [
        Example(f"q{n}", (f"p{n}",), (f"n{n}",), source, language)
        for n, (source, language) in enumerate(zip(sources, languages, strict=True))
    ]


def test_queries_are_drawn_by_their_sources_weights() -> None:
    rows, mix = of_sources(), Mix({"crop": 3, "synthetic": 1, "logged": 0})
    counts = Counter(rows[number].source for batch in take(100, rows, 20, 0, 1, 0, mix) for number in batch.examples)
    assert set(counts) == {"crop", "synthetic"} and 0.22 < counts["synthetic"] / 2000 < 0.28
    per_query = Counter(number for batch in take(100, rows, 20, 0, 1, 0, mix) for number in batch.examples)
    synthetic = [per_query[number] for number in range(300, 360)]
    assert max(synthetic) - min(synthetic) <= 2  # each epoch has each of them


@pytest.mark.parametrize(("alike", "kinds"), [(["language"], 2), (["source"], 3), (["source", "language"], 6)])
def test_a_batch_has_in_common_what_is_asked(alike: list[str], kinds: int) -> None:
    rows = of_sources()
    drawn = take(200, rows, 10, 1, 1, 0, Mix(alike=alike))
    found = Counter(tuple(sorted({tuple(getattr(rows[n], name) for name in alike) for n in b.examples})) for b in drawn)
    assert all(len(kind) == 1 for kind in found) and len(found) == kinds
    assert len({number for batch in drawn for number in batch.examples}) == len(rows)
    if alike == ["source"]:
        assert 0.65 < found[(("crop",),)] / 200 < 0.85  # three quarters of the examples


def test_weights_hold_where_batches_are_of_one_language() -> None:
    rows, mix = of_sources(), Mix({"crop": 1, "synthetic": 1}, ["language"])
    drawn = take(100, rows, 10, 0, 1, 0, mix)
    counts = Counter((rows[n].source, rows[n].language) for batch in drawn for n in batch.examples)
    assert all(180 < count < 320 for count in counts.values()) and len(counts) == 4


@pytest.mark.parametrize("mix", [Mix({"crop": 1, "logged": 2}), Mix(alike=["source"]), Mix({"crop": 1}, ["language"])])
def test_a_later_start_of_a_mix_gives_the_same_batches(mix: Mix) -> None:
    rows = of_sources()
    assert take(5, rows, 8, 1, 7, 6, mix) == take(11, rows, 8, 1, 7, 0, mix)[6:]
    assert take(5, rows, 8, 1, 7, 0, mix) != take(5, rows, 8, 1, 8, 0, mix)


def test_a_mix_that_cannot_fill_batches_is_an_error() -> None:
    rows = of_sources()
    with pytest.raises(
        ValueError, match=r"train.source_weights: no example is from 'triplet'; the sources are crop, logged"
    ):
        check_batches(rows, 10, 1, Mix({"crop": 1, "triplet": 1}))
    with pytest.raises(ValueError, match=r"of 'logged', which are to be 0.5 of a batch, have only 40 different"):
        check_batches(rows, 80, 1, Mix({"crop": 1, "logged": 1}))
    check_batches(rows, 79, 1, Mix({"crop": 1, "logged": 1}))
    with pytest.raises(
        ValueError, match=r"examples of 'logged' and 'en' have only 20 different .* train.same_in_batch"
    ):
        check_batches(rows, 21, 1, Mix(alike=["source", "language"]))
    check_batches(rows, 20, 1, Mix(alike=["source", "language"]))


def test_sources_that_share_their_positives_must_have_enough_together() -> None:
    """Each has more than its share of a batch, but both have the same: a batch would never be full."""
    rows = [Example(f"{source} {n}", (f"p{n}",), (), source) for source in ("crop", "synthetic") for n in range(200)]
    mix = Mix({"crop": 1, "synthetic": 1})
    with pytest.raises(ValueError, match=r"examples of 'crop' and 'synthetic' have only 200 different"):
        check_batches(rows, 256, 1, mix)
    check_batches(rows, 200, 1, mix)
    assert len(take(3, rows, 200, 0, 1, 0, mix)) == 3
