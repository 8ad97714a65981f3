"""Sentences and crops, in scripts with and without spaces."""

from __future__ import annotations

import random

from drama_dist.corpus.split import count_words, random_crop, sentences

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


def test_a_crop_is_one_of_the_sentences_that_are_long_enough() -> None:
    crops = {random_crop(TEXT + " Yes.", "en", random.Random(seed), 4, 40) for seed in range(30)}
    assert crops == set(sentences(TEXT, "en"))


def test_a_long_sentence_is_cropped_to_a_span_of_it() -> None:
    words = [f"w{number}" for number in range(50)]
    for text, joint, units in ((" ".join(words), " ", 10), ("文" * 120, "", 40)):
        crop = random_crop(text, "en", random.Random(1), 4, 10)
        assert crop is not None and crop in text and len(crop.split(joint) if joint else crop) == units


def test_without_a_fitting_sentence_there_is_no_crop() -> None:
    assert random_crop("Too short. Also.", "en", random.Random(1), 4, 40) is None
