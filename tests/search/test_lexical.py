"""BM25: the formula, tokens of several scripts, ties and queries without hits."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import bm25s
import numpy as np
import pytest

from drama_dist.search.lexical import Analyzer, LexicalIndex, build_lexical_index

TEXTS = [
    "Invert a matrix",
    "The determinant of a matrix, a matrix norm",
    "Read a table from disk",
    "invert a MATRIX",
]


def test_scores_follow_the_formula(tmp_path: Path) -> None:
    index = build_lexical_index(iter(TEXTS), "", tmp_path)
    tokens = [Analyzer("").tokenize(text) for text in TEXTS]
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


def test_ties_are_in_order_of_position_and_what_shares_no_word_is_no_hit(tmp_path: Path) -> None:
    index = build_lexical_index([*TEXTS, *["invert a matrix"] * 30], "en", tmp_path)
    scores, positions = index.search(["inverting", "zebra", ""], 5)
    assert positions[0].tolist() == [0, 3, 4, 5, 6] and len(set(scores[0])) == 1
    assert positions[1].tolist() == positions[2].tolist() == [-1] * 5 and not scores[1:].any()


def test_k_larger_than_the_corpus(tmp_path: Path) -> None:
    scores, positions = build_lexical_index(TEXTS, "en", tmp_path).search(["matrix"], 100)
    assert scores.shape == positions.shape == (1, 4)
    assert scores.dtype == np.float32 and positions.dtype == np.int64


def test_words_are_stemmed_where_snowball_has_the_language() -> None:
    assert Analyzer("en").tokenize("the inverted matrices") == ["invert", "matric"]
    assert Analyzer("english").tokenize("Inverting") == ["invert"]
    assert Analyzer("de").tokenize("Die Matrizen") == ["die", "matriz"]
    assert Analyzer("sw").tokenize("the inverted matrices") == ["the", "inverted", "matrices"]


def test_scripts_without_spaces_become_pairs(tmp_path: Path) -> None:
    tokens = Analyzer("zh").tokenize
    assert tokens("北京大学 GPU 7号") == ["北京", "京大", "大学", "gpu", "号"]
    assert tokens("データ") == ["デー", "ータ"]
    assert tokens("ที่นี่") == ["ที่นี่"]  # two letters, each with its signs
    index = build_lexical_index(["我喜欢北京", "上海的天气", "北京的天气很好"], "zh", tmp_path)
    assert index.search(["北京天气"], 3)[1][0].tolist() == [2, 0, 1]


def test_words_with_vowel_signs_stay_whole() -> None:
    assert Analyzer("bn").tokenize("हिन्दी में") == ["हिन्दी", "में"]


def test_a_corpus_without_words_is_refused(tmp_path: Path) -> None:
    for texts in ([], ["a", "!?"]):
        with pytest.raises(ValueError, match=f"none of {len(texts)} passages has a word"):
            build_lexical_index(iter(texts), "en", tmp_path)


def test_opened_it_is_the_index_that_bm25s_makes_of_the_tokens_in_memory(tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    texts = [" ".join(f"w{n}" for n in random.zipf(1.5, random.integers(0, 30)) % 500) for _ in range(700)]
    queries = [" ".join(f"w{n}" for n in random.zipf(1.3, 6) % 600) for _ in range(50)]
    analyzer = Analyzer("en")
    other = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
    other.index([analyzer.tokenize(text) for text in texts], show_progress=False)
    build_lexical_index(iter(texts), "en", tmp_path / "bm25")
    index = LexicalIndex(tmp_path / "bm25")
    assert len(index) == 700 and isinstance(index._bm25.scores["data"], np.memmap)
    for row, query in enumerate(queries):
        expected = other.get_scores(analyzer.tokenize(query))
        scores, positions = index.search([query], 700)
        hits = positions[0] >= 0
        assert hits.sum() == (expected > 0).sum() > 0, row
        np.testing.assert_array_equal(scores[0, hits], expected[positions[0, hits]])
        np.testing.assert_array_equal(positions[0, hits], np.argsort(-expected, kind="stable")[: hits.sum()])


def test_the_language_is_the_one_that_it_was_built_with(tmp_path: Path) -> None:
    build_lexical_index(TEXTS, "en", tmp_path)
    assert LexicalIndex(tmp_path).search(["inverting the"], 2)[1].tolist() == [[0, 3]]
    record = json.loads((tmp_path / "lexical.json").read_text("utf-8"))
    assert record == {"language": "en", "passages": 4, "tokens": 12}


def test_a_part_of_an_index_does_not_open_and_is_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="no BM25 index"):
        LexicalIndex(tmp_path)
    build_lexical_index(TEXTS, "en", tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(self: bm25s.BM25, *_: object, **__: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(bm25s.BM25, "save", fail)
        with pytest.raises(OSError, match="disk full"):
            build_lexical_index(["other texts"], "en", tmp_path)
    with pytest.raises(FileNotFoundError, match="or a part of one"):
        LexicalIndex(tmp_path)
    build_lexical_index(TEXTS, "en", tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_hash_seed_changes_nothing(tmp_path: Path) -> None:
    code = (
        "import sys, hashlib\nfrom pathlib import Path\nfrom drama_dist.search.lexical import build_lexical_index\n"
        "t = ['a red fox jumps over dogs', 'dogs and a fox', 'red dogs', 'blue whales sing', 'fox dogs red over']\n"
        "folder = Path(sys.argv[1]) / str(hash('seed')); i = build_lexical_index(t, 'en', folder)\n"
        "s, p = i.search(['red fox over dogs and whales'], 5); print(s.tobytes().hex(), p.tolist())\n"
        "print([hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.iterdir())])"
    )
    answers = {
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)],
            env={"PYTHONHASHSEED": seed, "PATH": ""},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(answers) == 1 and len(list(tmp_path.iterdir())) == 3


def test_sparse_scores_are_those_of_the_search(tmp_path: Path) -> None:
    index = build_lexical_index(TEXTS, "en", tmp_path)
    queries = ["invert a matrix matrix", "zebra", "", "table norm of the disk"]
    scores, found = index.search(queries, 4)
    whole = np.zeros((4, 4), dtype=np.float32)
    for row in range(4):
        there = found[row] >= 0
        whole[row, found[row][there]] = scores[row][there]
    for positions in ([0, 1, 2, 3], [3, 1], [2]):
        sparse = index.sparse_scores(queries, positions)
        np.testing.assert_allclose(sparse.toarray(), whole[:, positions], rtol=1e-6)
        assert sparse.nnz == np.count_nonzero(whole[:, positions]) and sparse.has_sorted_indices
