"""Measures against values worked out by hand."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from drama_dist.corpus.collection import HIGHEST_GRADE
from drama_dist.evaluate.metrics import mean_over_queries, paired_p_value, per_query
from drama_dist.records import Hit


def hits(*ids: str) -> list[Hit]:
    return [Hit(id, 1.0 / rank) for rank, id in enumerate(ids, 1)]


def test_ndcg_recall_and_reciprocal_rank_by_hand() -> None:
    qrels = {"q": {"a": 2, "b": 1, "c": 1, "d": 0}}
    values = per_query(qrels, {"q": hits("x", "b", "d", "a")})["q"]
    gained = 1 / math.log2(3) + 2 / math.log2(5)
    ideal = 2 / math.log2(2) + 1 / math.log2(3) + 1 / math.log2(4)
    assert values["ndcg@10"] == pytest.approx(gained / ideal)
    assert values["recall@100"] == pytest.approx(2 / 3)
    assert values["mrr@10"] == pytest.approx(1 / 2)


def test_the_cut_offs_are_ten_and_a_hundred() -> None:
    others = [f"x{n}" for n in range(120)]
    eleventh = per_query({"q": {"a": 1}}, {"q": hits(*others[:10], "a")})["q"]
    assert (eleventh["ndcg@10"], eleventh["mrr@10"], eleventh["recall@100"]) == (0, 0, 1)
    assert per_query({"q": {"a": 1}}, {"q": hits(*others[:100], "a")})["q"]["recall@100"] == 0


def test_a_query_without_hits_counts_zero_in_the_mean() -> None:
    assert mean_over_queries(per_query({"q": {"a": 1}, "r": {"b": 1}}, {"q": hits("a")}))["mrr@10"] == 0.5


def test_the_given_order_decides_and_not_the_scores() -> None:
    tied = [Hit("z", 1.0), Hit("a", 1.0)]
    assert per_query({"q": {"z": 1}}, {"q": tied})["q"]["mrr@10"] == 1
    assert per_query({"q": {"a": 1}}, {"q": tied})["q"]["mrr@10"] == 0.5


@pytest.mark.parametrize("low", [-1, -2, -1_000_000])
def test_grades_below_zero_count_as_not_relevant(low: int) -> None:
    qrels = {"good": {"a": 1, "b": low, "c": 2}, "bad": {"a": low, "b": low}, "none": {"a": 0}}
    values = per_query(qrels, {query: hits("b", "a", "c") for query in qrels})
    gained = 1 / math.log2(3) + 2 / math.log2(4)
    assert values["good"]["ndcg@10"] == pytest.approx(gained / (2 + 1 / math.log2(3)))
    assert (values["good"]["recall@100"], values["good"]["mrr@10"]) == (1, 0.5)
    assert values["bad"] == values["none"] == {"ndcg@10": 0, "recall@100": 0, "mrr@10": 0}
    assert mean_over_queries(values)["mrr@10"] == pytest.approx(0.5 / 3)


def test_the_highest_grade_that_is_read_can_be_measured() -> None:
    values = per_query({"q": {"a": HIGHEST_GRADE, "b": 1}}, {"q": hits("b", "a")})["q"]
    best = HIGHEST_GRADE + 1 / math.log2(3)
    assert values["ndcg@10"] == pytest.approx((1 + HIGHEST_GRADE / math.log2(3)) / best)


def test_nothing_judged_and_a_doubled_hit_are_errors() -> None:
    with pytest.raises(ValueError, match="no judged queries"):
        per_query({}, {})
    with pytest.raises(ValueError, match="query 'q': passage 'a' is among the hits twice"):
        per_query({"q": {"a": 1}}, {"q": hits("a", "b", "a")})


def test_p_is_exact_for_few_queries_and_small_for_a_clear_difference() -> None:
    # All 8 sign patterns of equal differences: 2 are as extreme as observed.
    assert paired_p_value([1, 1, 1], [0, 0, 0], seed=1) == 2 / 8
    assert paired_p_value([1, 0.2], [0, 0.2], seed=1) == paired_p_value([0.2], [0.2], seed=1) == 1
    chance = random.Random(1)
    theirs = [chance.random() for _ in range(60)]
    noise = [chance.gauss(0, 0.1) for _ in range(60)]
    assert paired_p_value([t + 0.1 + n for t, n in zip(theirs, noise, strict=True)], theirs, seed=1) < 0.001
    assert paired_p_value([t + n for t, n in zip(theirs, noise, strict=True)], theirs, seed=1) > 0.05
    with pytest.raises(ValueError, match="got 1 and 2"):
        paired_p_value([1], [1, 2], seed=1)


def test_p_counts_every_pattern_of_signs_also_where_sums_differ_by_rounding_only() -> None:
    chance = random.Random(2)
    for _ in range(50):
        ours, theirs = ([chance.randrange(11) / 10 for _ in range(chance.randrange(2, 9))] for _ in range(2))
        theirs = (theirs * 8)[: len(ours)]
        tenths = [round(10 * (our - their)) for our, their in zip(ours, theirs, strict=True)]
        patterns = itertools.product((-1, 1), repeat=len(tenths))
        sums = [abs(sum(sign * tenth for sign, tenth in zip(signs, tenths, strict=True))) for signs in patterns]
        exact = sum(value >= abs(sum(tenths)) for value in sums) / len(sums)
        assert paired_p_value(ours, theirs, seed=1) == pytest.approx(exact)
