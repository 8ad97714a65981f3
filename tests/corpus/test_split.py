"""Sentences and crops, in scripts with and without spaces."""

from __future__ import annotations

import random

import pytest

from drama_dist.corpus.split import about_tokens, count_words, crop, random_span, sentences, word_spans

TEXT = "Dr. Smith computes the inverse. It needs a square matrix! Does it always exist?"


def test_sentences_end_where_readers_end_them() -> None:
    assert sentences(TEXT, "en") == [
        "Dr. Smith computes the inverse.",
        "It needs a square matrix!",
        "Does it always exist?",
    ]


def test_a_blank_line_ends_a_sentence_and_a_line_break_does_not() -> None:
    assert sentences("A heading\n\nA sentence over\ntwo lines.", "en") == ["A heading", "A sentence over\ntwo lines."]


def test_chinese_sentences_and_words() -> None:
    text = "矩阵的逆矩阵是线性代数中的概念。只有方阵才可能有逆矩阵。"
    assert len(sentences(text, "zh")) == 2
    assert count_words(text) == 7 and count_words("three words here") == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Two  words,\nthree\t", ["Two", "words,", "three"]),
        ("矩阵的逆矩阵是GPU上的", ["矩阵的逆", "矩阵是", "GPU", "上的"]),
        ("행렬의 역행렬", ["행렬의", "역행렬"]),  # Korean has spaces
        ("ที่นี่ที่นี่ที่", ["ที่นี่ที่นี่", "ที่"]),  # letters keep their signs
        (" \n", []),
    ],
)
def test_words_lie_between_spaces_or_are_a_few_letters(text: str, words: list[str]) -> None:
    assert [text[begin:end] for begin, end in word_spans(text)] == words


def test_a_span_comes_from_anywhere_and_is_as_it_stands() -> None:
    text = "a  b\nc d"
    spans = word_spans(text)
    found = {random_span(text, spans, 2, random.Random(seed)) for seed in range(30)}
    assert found == {"a  b", "b\nc", "c d"}
    assert random_span(text, spans, 9, random.Random(1)) == text


def test_a_long_sentence_is_cropped_to_a_span_of_it() -> None:
    words = [f"w{number}" for number in range(50)]
    for text, joint, units in ((" ".join(words), " ", 10), ("文" * 120, "", 40)):
        cut = crop(text, 10, random.Random(1))
        assert cut in text and len(cut.split(joint) if joint else cut) == units
    assert crop(TEXT, 40, random.Random(1)) == TEXT


def test_about_so_many_tokens_in_any_script() -> None:
    assert about_tokens("Flour, yeast and salt.", 4) == "Flour, yeast and"
    assert about_tokens("Flour, yeast.", 400) == "Flour, yeast." and about_tokens("", 4) == ""
    assert len(about_tokens("発酵させた生地を焼く" * 50, 20)) in range(17, 21)
    assert len(about_tokens("x" * 5000, 20)) in range(20, 81)
    mixed = about_tokens("bread 発酵させた生地 " * 50, 40)
    assert mixed.startswith("bread 発酵") and 55 < len(mixed) < 75
