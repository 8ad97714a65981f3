"""Texts of natural lengths for the benchmarks, from BEIR folders: queries, their passages, hard negatives.

The folder DATA holds one folder a collection: corpus.jsonl, queries.jsonl, qrels/test.tsv. Nothing is cut or
made up; where a collection has too few judged queries, sentences of its own passages stand for queries.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from drama_dist.augment.sources.crop import Pieces
from drama_dist.corpus.read import RawCorpus, SetAside, read_corpus
from drama_dist.records import Passage
from drama_dist.search.lexical import build_lexical_index
from drama_dist.settings import AugmentSettings, CorpusSettings

_NEGATIVE_RANKS = slice(10, 30)
Row = TypeVar("Row")


@dataclass(frozen=True)
class Texts:
    """queries; columns: for each query a positive, and a hard negative where the set has them."""

    name: str
    queries: list[str]
    columns: tuple[list[str], ...]

    @property
    def passages(self) -> list[str]:
        """All columns, one after another."""
        return [text for column in self.columns for text in column]

    def first(self, count: int) -> Texts:
        """The first `count` queries with their passages."""
        return Texts(self.name, self.queries[:count], tuple(column[:count] for column in self.columns))


def questions(data: Path, count: int) -> Texts:
    """XQuAD in English: `count` questions, each with its paragraph; a paragraph comes as often as it is asked about.

    Raises ValueError where there are fewer.
    """
    raw = _read(data / "xquad-en")
    contents = {passage.id: passage.content for passage in raw.passages}
    pairs = [(query.text, contents[next(iter(raw.qrels[query.id]))]) for query in raw.queries]
    chosen = _sample(pairs, count, data / "xquad-en")
    return Texts("XQuAD-en", [query for query, _ in chosen], ([passage for _, passage in chosen],))


def abstracts(data: Path, count: int) -> Texts:
    """CISI: a sentence of each of `count` abstracts, the abstract, and a hard negative from BM25's ranks 11 to 30."""
    passages = _read(data / "cisi").passages
    crops = [Pieces(passage, AugmentSettings()).sentence(random.Random(passage.id)) or "" for passage in passages]
    with TemporaryDirectory() as folder:
        index = build_lexical_index((passage.content for passage in passages), "en", Path(folder))
        _, ranks = index.search(crops, _NEGATIVE_RANKS.stop)
    negatives = [_far(passages, row[_NEGATIVE_RANKS], own) for row, own in zip(ranks.tolist(), passages, strict=True)]
    contents = [passage.content for passage in passages]
    usable = [row for row in zip(crops, contents, negatives, strict=True) if row[0] and row[2]]
    queries, positives, negatives = map(list, zip(*_sample(usable, count, data / "cisi"), strict=True))
    return Texts("CISI + 1 hard negative", queries, (positives, negatives))


def corpus(data: Path, name: str) -> list[str]:
    """All passages of a collection."""
    return [passage.content for passage in _read(data / name).passages]


def _read(folder: Path) -> RawCorpus:
    return read_corpus(folder, CorpusSettings(path=str(folder)), SetAside())


def _far(passages: list[Passage], ranks: list[int], own: Passage) -> str:
    """Empty where the query's words are in too few passages."""
    return next((passages[place].content for place in ranks if place >= 0 and passages[place] is not own), "")


def _sample(rows: list[Row], count: int, where: Path) -> list[Row]:
    if len(rows) < count:
        raise ValueError(f"{where}: {len(rows)} usable queries, a batch of {count} needs as many")
    return random.Random(0).sample(rows, count)
