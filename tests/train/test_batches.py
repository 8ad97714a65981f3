"""Batches: a function of examples, seed and step; no doubled positives; nothing left out."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from drama_dist.records import Example
from drama_dist.train.batches import Batch, batches


def examples(count: int, positives: int) -> list[Example]:
    """Examples whose positives repeat every `positives` examples."""
    return [
        Example(f"query {n}", (f"p{n % positives}",), (f"p{(n + 1) % positives}", f"n{n}"), "crop")
        for n in range(count)
    ]


def take(count: int, *arguments: object) -> list[Batch]:
    return list(itertools.islice(batches(*arguments), count))  # type: ignore[arg-type]


def test_every_query_points_at_its_own_positive_and_passages_stand_once() -> None:
    rows = examples(20, 20)
    positive_of = {row.query: row.positives[0] for row in rows}
    for batch in take(5, rows, 6, 2, 1):
        assert len(batch.queries) == len(batch.positives) == 6
        assert [batch.passages[place] for place in batch.positives] == [positive_of[query] for query in batch.queries]
        assert len(set(batch.passages)) == len(batch.passages)


def test_a_later_start_gives_the_same_batches() -> None:
    rows = examples(23, 11)
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


def test_too_few_positives_for_a_batch_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"train.batch_size=8, but the examples have only 3 different first positives"):
        take(1, examples(30, 3), 8, 1, 1)
