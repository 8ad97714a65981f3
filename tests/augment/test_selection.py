"""Which written queries stay: near duplicates go, people's queries never do, and quotas hold."""

from __future__ import annotations

import random
from itertools import combinations

import pytest

from drama_dist.augment.selection import _jaccard, _pieces, within_quotas, without_near_duplicates
from drama_dist.augment.written import WrittenQuery, folded


def queries(*texts: str, source: str = "crop", language: str = "en") -> list[WrittenQuery]:
    return [WrittenQuery(text, f"p{number}", source, language) for number, text in enumerate(texts)]


def test_of_near_duplicates_the_first_stays() -> None:
    first, near, other = "how long does dough rise in the oven", "How long does  dough rise in the oven?", "river banks"
    written = queries(first, other, near, "面团在温暖的地方发酵两个小时", "面团在温暖的地方发酵两个小时。")
    kept, aside = without_near_duplicates(written, 0.8)
    assert [query.query for query in kept] == [first, other, written[3].query]
    assert [(row["passage"], row["value"]) for row in aside] == [("p2", near), ("p4", written[4].query)]
    assert {row["reason"] for row in aside} == {"nearly the same as another query"}
    assert without_near_duplicates(kept, 0.8) == (kept, [])


def test_peoples_queries_stay_and_what_is_like_them_goes() -> None:
    text = "how long does dough rise in the oven"
    written = queries(text, source="synthetic") + queries(f"{text}?", text, source="logged")
    kept, aside = without_near_duplicates(written, 0.7)
    assert kept == written[1:] and [row["value"] for row in aside] == [text]


def test_what_stays_is_as_far_apart_as_asked_and_what_goes_was_too_near() -> None:
    """Against all pairs, of spans that overlap by everything between nothing and all."""
    chance = random.Random(1)
    words = [f"{chance.choice('bcdfgl')}{chance.choice('aeiou')}{number}" for number in range(120)]
    spans = [(begin, chance.randint(4, 12)) for begin in (chance.randrange(100) for _ in range(400))]
    written = queries(*dict.fromkeys(" ".join(words[begin : begin + length]) for begin, length in spans))
    kept, aside = without_near_duplicates(written, 0.6)
    pieces = {query.query: _pieces(query.query) for query in written}
    near = [pair for pair in combinations(kept, 2) if _jaccard(*(pieces[query.query] for query in pair)) >= 0.6]
    nearest = [max(_jaccard(pieces[row["value"]], pieces[query.query]) for query in kept) for row in aside]
    assert len(aside) > 50 and len(near) <= 0.02 * len(aside) and min(nearest) >= 0.6


@pytest.mark.parametrize("text", ["", "a", "ab", "面"])
def test_short_queries_have_a_piece(text: str) -> None:
    assert _pieces(text) == {text}
    assert len(without_near_duplicates(queries(text, text), 1.0)[0]) == 1


def test_quotas_of_sources_and_languages_hold_and_the_rest_stays() -> None:
    written = queries(*(f"a {n}" for n in range(40))) + queries(*(f"b {n}" for n in range(30)), language="de")
    written += queries(*(f"c {n}" for n in range(5)), source="synthetic")
    kept, notes = within_quotas(written, {"crop": 50, "de": 10, "fr": 0, "synthetic": 9}, seed=1)
    of = [
        sum(getattr(query, name) == value for query in kept)
        for name, value in (("source", "synthetic"), ("language", "de"))
    ]
    assert of == [5, 10] and notes == {
        "beyond the quota of crop": 20,
        "beyond the quota of de": 70 - 20 - len(kept) + 5,
    }
    assert kept == [query for query in written if query in kept]
    assert within_quotas(written, {"crop": 50, "de": 10}, seed=1)[0] == kept
    assert within_quotas(written, {"crop": 50, "de": 10}, seed=2)[0] != kept
    assert within_quotas(written, {}, seed=1) == (written, {})


def test_capitals_and_blanks_do_not_count() -> None:
    assert folded("  Two\tWORDS \n") == "two words"
