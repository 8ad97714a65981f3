"""BM25: the formula, tokens of several scripts, ties and queries without hits."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest

from drama_dist.search.lexical import LexicalIndex

TEXTS = [
    "Invert a matrix",
    "The determinant of a matrix, a matrix norm",
    "Read a table from disk",
    "invert a MATRIX",
]


def test_scores_follow_the_formula() -> None:
    index = LexicalIndex(TEXTS, "")
    tokens = [index.tokenize(text) for text in TEXTS]
    mean = sum(map(len, tokens)) / len(tokens)
    df = sum("matrix" in words for words in tokens)
    idf = math.log(1 + (len(TEXTS) - df + 0.5) / (df + 0.5))
    scores, positions = index.search(["matrix"], 4)
    for score, position in zip(scores[0], positions[0], strict=True):
        if position >= 0:
            tf, length = tokens[position].count("matrix"), len(tokens[position])
            expected = idf * tf / (tf + 1.5 * (1 - 0.75 + 0.75 * length / mean))
            assert score == pytest.approx(expected, rel=1e-5)
    assert sorted(positions[0]) == [-1, 0, 1, 3]


def test_ties_are_in_order_of_position_and_what_shares_no_word_is_no_hit() -> None:
    index = LexicalIndex([*TEXTS, *["invert a matrix"] * 30], "en")
    scores, positions = index.search(["inverting", "zebra", ""], 5)
    assert positions[0].tolist() == [0, 3, 4, 5, 6] and len(set(scores[0])) == 1
    assert positions[1].tolist() == positions[2].tolist() == [-1] * 5 and not scores[1:].any()


def test_k_larger_than_the_corpus() -> None:
    scores, positions = LexicalIndex(TEXTS, "en").search(["matrix"], 100)
    assert scores.shape == positions.shape == (1, 4)
    assert scores.dtype == np.float32 and positions.dtype == np.int64


def test_words_are_stemmed_where_snowball_has_the_language() -> None:
    assert LexicalIndex(TEXTS, "en").tokenize("the inverted matrices") == ["invert", "matric"]
    assert LexicalIndex(TEXTS, "english").tokenize("Inverting") == ["invert"]
    assert LexicalIndex(TEXTS, "de").tokenize("Die Matrizen") == ["die", "matriz"]
    assert LexicalIndex(TEXTS, "sw").tokenize("the inverted matrices") == ["the", "inverted", "matrices"]


def test_scripts_without_spaces_become_pairs() -> None:
    tokens = LexicalIndex(TEXTS, "zh").tokenize
    assert tokens("北京大学 GPU 7号") == ["北京", "京大", "大学", "gpu", "号"]
    assert tokens("データ") == ["デー", "ータ"]
    assert tokens("ที่นี่") == ["ที่นี่"]  # two letters, each with its signs
    index = LexicalIndex(["我喜欢北京", "上海的天气", "北京的天气很好"], "zh")
    assert index.search(["北京天气"], 3)[1][0].tolist() == [2, 0, 1]


def test_words_with_vowel_signs_stay_whole() -> None:
    assert LexicalIndex(["हिन्दी में लिखा"], "bn").tokenize("हिन्दी में") == ["हिन्दी", "में"]


def test_a_corpus_without_words_is_refused() -> None:
    with pytest.raises(ValueError, match="has a word"):
        LexicalIndex(["a", "!?"], "en")


def test_the_hash_seed_changes_nothing() -> None:
    code = (
        "from drama_dist.search.lexical import LexicalIndex\n"
        "t = ['a red fox jumps over dogs', 'dogs and a fox', 'red dogs', 'blue whales sing', 'fox dogs red over']\n"
        "s, p = LexicalIndex(t, 'en').search(['red fox over dogs and whales'], 5); print(s.tobytes().hex(), p.tolist())"
    )
    answers = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed, "PATH": ""}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(answers) == 1
