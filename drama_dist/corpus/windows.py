"""Windows: the texts of a corpus to train on, in which long passages are several overlapping parts.

Covers where windows begin and end and what their ids are. What counts as a word is in split.py.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from dataclasses import replace

from drama_dist.corpus.collection import PassageTable
from drama_dist.corpus.split import word_spans
from drama_dist.records import Passage


def windows(table: PassageTable, words: int, step: int) -> Iterator[Passage]:
    """The passages of a table, in order; one of more than `words` words, its title's among them, as its windows.

    Windows have the title and language of their passage, and ids "ID#0", "ID#1", ...; where the corpus has a passage of
    that id already, "ID##0", "ID##1" and so on. step: at most `words`.
    """
    taken = set(table.ids)
    for position in range(len(table)):
        passage = table[position]
        room = max(step, words - len(word_spans(passage.title)))  # each window has the title as well
        texts = cut(passage.text, room, step)
        if len(texts) == 1:
            yield passage
            continue
        ids = _free_ids(passage.id, len(texts), taken)
        taken.update(ids)
        for id, text in zip(ids, texts, strict=True):
            yield replace(passage, id=id, text=text)


def windows_by_passage(window_ids: Iterable[str], passage_ids: Iterable[str]) -> dict[str, list[str]]:
    """Passage → its windows, for ids that `windows` gave for a table of these passages, both in their order.

    Windows of other passages may follow. Ids alone do not tell: a passage may be called as another's window would be.
    """
    found: dict[str, list[str]] = {}
    coming = iter(passage_ids)
    expected, current = next(coming, None), None
    for id in window_ids:
        if expected is not None and (id == expected or _is_window(id, expected, 0)):
            found[expected], current, expected = [id], expected, next(coming, None)
        elif current is not None and _is_window(id, current, len(found[current])):
            found[current].append(id)
        else:
            current = None
    return found


def _is_window(id: str, passage: str, number: int) -> bool:
    rest = id[len(passage) :]
    return id.startswith(passage) and rest.startswith("#") and rest.lstrip("#") == str(number)


def cut(text: str, words: int, step: int) -> list[str]:
    """The windows of a text: `words` words from every `step`th on, as they stand there, with what is between them.

    The last one ends with the text, and may be shorter; each has words that the one before it has not. A text of no
    more words is one window, as it is.
    """
    spans = word_spans(text)
    if len(spans) <= words:
        return [text]
    begins = range(0, len(spans) - words + step, step)
    return [text[spans[begin][0] : spans[min(begin + words, len(spans)) - 1][1]] for begin in begins]


def _free_ids(id: str, count: int, taken: Container[str]) -> list[str]:
    mark = "#"
    while any(f"{id}{mark}{number}" in taken for number in range(count)):
        mark += "#"
    return [f"{id}{mark}{number}" for number in range(count)]
