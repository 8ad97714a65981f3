"""Queries cropped from passages: what each kind is, how many there are, and in which shares."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from drama_dist.augment.sources import crop as source
from drama_dist.augment.sources.crop import KINDS, crops
from drama_dist.augment.written import WrittenQuery
from drama_dist.corpus.collection import PassageTable
from drama_dist.records import Passage
from drama_dist.search.lexical import LexicalIndex, build_lexical_index
from drama_dist.setting_types import CROP_KINDS
from drama_dist.settings import AugmentSettings

WORDS = [f"w{number}" for number in range(400)]


def passage_of(number: int, title: str = "") -> Passage:
    """Three sentences of six words that no other passage has, each but the last with `common`, and one of two words."""
    own = WORDS[18 * number : 18 * number + 18]
    parts = [" ".join(["Common", *own[at : at + 6]]) for at in (0, 6)]
    text = f"{parts[0]}. {parts[1]}.\nThe {' '.join(own[12:])}. Too short."
    return Passage(f"p{number}", text, title, "en")


PASSAGES = [passage_of(number, "Its Title" if number % 2 else "") for number in range(20)]


@pytest.fixture(scope="module")
def lexical(tmp_path_factory: pytest.TempPathFactory) -> LexicalIndex:
    folder = tmp_path_factory.mktemp("bm25")
    return build_lexical_index((passage.content for passage in PASSAGES), "en", folder)


def cropped(
    lexical: LexicalIndex | None, count: int, passages: list[Passage] = PASSAGES, seed: int = 1, **kinds: float
) -> tuple[list[WrittenQuery], Counter[str]]:
    augment = AugmentSettings(crops=count, synthetic_queries=1, crop_kinds=kinds or dict(CROP_KINDS))
    return crops(PassageTable.in_memory(passages), lexical, augment, seed)


def test_the_kinds_are_those_of_the_settings() -> None:
    assert list(KINDS) == list(CROP_KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_taken_from_its_passage(kind: str, lexical: LexicalIndex) -> None:
    written, _ = cropped(lexical, 2000, **{kind: 1})
    of_passage = {passage.id: passage for passage in PASSAGES}
    lengths = Counter(len(query.query.split()) for query in written)
    for query in written:
        assert query.source == "crop" and query.language == "en"
        passage = of_passage[query.passage_id]
        assert query.provenance == {"kind": kind, "passage": passage.id, "seed": 1}
        text = " ".join(passage.text.split())
        first, second, third, _ = re.findall(r"[^.]+\.", text)
        whole = [sentence.strip() for sentence in (first, second, third)]
        if kind == "span":
            assert query.query in text and 2 <= len(query.query.split()) <= 23
        elif kind == "sentence":
            assert query.query in whole
        elif kind == "joined":
            assert query.query in [f"{whole[a]} {whole[b]}" for a, b in ((0, 1), (0, 2), (1, 2))]
        elif kind == "keywords":
            words = query.query.split()
            assert len(set(words)) == len(words) and set(words) <= set(re.findall(r"\w+", passage.content.lower()))
        else:
            assert query.query == (passage.title or whole[0])
    expected = {"span": range(2, 24), "sentence": [7], "joined": [14], "keywords": range(2, 9), "title": [2, 7]}
    assert set(lengths) == set(expected[kind])
    if kind == "joined":  # sentences that are no neighbours, too
        assert any(query.query == f"{whole[0]} {whole[2]}" for query in written if query.passage_id == passage.id)


def test_keywords_are_the_rarest_words_in_any_order(lexical: LexicalIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "_RAREST", 18)
    written, _ = cropped(lexical, 4000, **{"keywords": 1})
    drawn = [query.query.split() for query in written if query.passage_id == "p0"]
    assert {word for words in drawn for word in words} == set(WORDS[:18])  # neither "common" nor "short"
    assert any(words != sorted(words, key=WORDS.index) for words in drawn)


def test_kinds_come_by_weight(lexical: LexicalIndex) -> None:
    passages = [Passage(f"p{n}", PASSAGES[n % 20].text, f"Title {n}", "en") for n in range(4000)]
    written, notes = cropped(lexical, 4000, passages, span=4, sentence=0, keywords=1.5, title=0.5)
    counts = Counter(query.provenance["kind"] for query in written)
    assert set(counts) == {"span", "keywords", "title"} and sum(counts.values()) == 4000 and not notes
    for kind, share in (("span", 4 / 6), ("keywords", 1.5 / 6), ("title", 0.5 / 6)):
        assert abs(counts[kind] / 4000 - share) < 0.03, kind  # four standard deviations


@pytest.mark.parametrize(("count", "each"), [(20, {1}), (7, {0, 1}), (50, {2, 3}), (0, {0})])
def test_passages_are_visited_evenly(count: int, each: set[int], lexical: LexicalIndex) -> None:
    written, notes = cropped(lexical, count, span=1)
    visits = Counter(query.passage_id for query in written)
    assert len(written) + notes["repeated crops"] == count
    assert {visits[passage.id] for passage in PASSAGES} == each
    assert list(visits) == sorted(visits, key=lambda id: int(id[1:]))  # in order of the corpus
    if count in (7, 50):  # which get one more, the seed says
        assert visits != Counter(query.passage_id for query in cropped(lexical, count, seed=2, span=1)[0])


def test_at_least_so_many_of_each_passage_in_a_large_corpus() -> None:
    augment = AugmentSettings(crops=10, crops_per_passage=1)
    assert augment.crops_of(8) == 10 and augment.crops_of(8_000_000) == 8_000_000


def test_the_seed_alone_decides(lexical: LexicalIndex) -> None:
    written, notes = cropped(lexical, 60)
    assert (written, notes) == cropped(lexical, 60) and written != cropped(lexical, 60, seed=2)[0]
    # Whatever order the settings name the kinds in.
    assert written == cropped(lexical, 60, **dict(reversed(CROP_KINDS.items())))[0]


def test_a_kind_that_a_passage_cannot_give_gives_way_to_another(lexical: LexicalIndex) -> None:
    short = [Passage("s", "Too short. Also this.", "", "en"), Passage("t", "", "Title", "en")]
    written, notes = cropped(lexical, 40, short, sentence=1, title=1)
    assert {(query.passage_id, query.query) for query in written} == {("s", "Too short."), ("t", "Title")}
    assert 10 < notes["crops of another kind than drawn"] < 30 and notes["repeated crops"] == 38
    written, notes = cropped(lexical, 40, short, sentence=1, joined=1)
    assert written == [] and notes == {"draws without a crop": 40}


def test_scripts_without_spaces(tmp_path: Path) -> None:
    text = "矩阵的逆矩阵是线性代数中的概念。只有行列式不为零的方阵才可能有逆矩阵。\n行列式为零的方阵没有逆矩阵。"
    passages = [Passage("a", text, "", "zh"), Passage("b", "矩阵的行列式是一个数。它等于特征值的乘积。", "", "zh")]
    lexical = build_lexical_index((passage.content for passage in passages), "zh", tmp_path)
    written, _ = cropped(lexical, 400, passages)
    assert {query.provenance["kind"] for query in written} == set(KINDS)
    spans = [query.query for query in written if query.provenance["kind"] == "span" and query.passage_id == "a"]
    assert len(set(spans)) > 20 and all(span.replace(" ", "") in text.replace("\n", "") for span in spans)
    assert min(map(len, spans)) <= 8
