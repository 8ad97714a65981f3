"""How many texts a model cuts, and how many tokens they lose."""

from __future__ import annotations

from drama_dist.encoder.contract import wire_tokenizer
from drama_dist.encoder.cut_texts import CutTexts, counting, note
from drama_dist.encoder.texts import TextTokenizer
from tests.conftest import train_tokenizer


def test_texts_beyond_the_limit_are_counted_with_the_tokens_that_they_lose() -> None:
    tokenizer = wire_tokenizer(train_tokenizer(), lower_case=True)
    texts = ["matrix", "the bread has flour", "", "row column inverse rank " * 20]
    lengths = [len(ids) for ids in tokenizer(texts)["input_ids"]]
    limit = lengths[1]
    with counting() as count:
        cut = TextTokenizer(tokenizer)(texts, limit)
    assert count == CutTexts(4, sum(lengths), 1, lengths[3] - limit)
    assert count.tokens - count.cut_tokens == sum(map(len, cut))
    with counting() as shorter:
        TextTokenizer(tokenizer)(texts, limit - 1)
    assert shorter == CutTexts(4, sum(lengths), 2, lengths[3] - limit + 2)


def test_only_what_is_noted_inside_is_counted_and_the_inner_count_has_it() -> None:
    note([9], 4)
    with counting() as outer:
        note([5, 3], 4)
        with counting() as inner:
            note([7], 4)
        note([4], 4)
    note([9], 4)
    assert (outer, inner) == (CutTexts(3, 12, 1, 1), CutTexts(1, 7, 1, 3))
    assert outer + inner == CutTexts(4, 19, 2, 4)
