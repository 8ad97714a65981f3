"""People's triples: a query with texts that answer it and texts that do not, as MS MARCO and many datasets have them.

Covers reading them. Their texts get ids in a table of their own, in ../triplet_stage.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from drama_dist.corpus.formats import Columns, shown_names
from drama_dist.corpus.layout import find_sources
from drama_dist.corpus.parts import Unfit, as_unicode, language_of, part, text_of, title_of
from drama_dist.corpus.read import SetAside, rows_of
from drama_dist.corpus.split import lower_if_capitals
from drama_dist.records import BadRecord
from drama_dist.settings import AugmentSettings, CorpusSettings

SETTING = "augment.labelled_triples"
Text = tuple[str, str]  # title and text


@dataclass(frozen=True)
class Triple:
    """file, line: where it stands."""

    query: str
    positives: tuple[Text, ...]
    negatives: tuple[Text, ...]
    language: str
    file: str
    line: int


def read_triples(augment: AugmentSettings, corpus: CorpusSettings, aside: SetAside) -> Iterator[Triple]:
    """The triples of augment.labelled_triples in order.

    A text that is both positive and negative is positive. Raises ValueError where the file cannot be read.
    """
    assert augment.labelled_triples is not None
    kinds = augment.triple_query_keys, augment.triple_positive_keys, augment.triple_negative_keys
    names = frozenset(chain(*kinds, corpus.language_keys))
    remedy = "say in augment.triple_query_keys, triple_positive_keys and triple_negative_keys which to read"
    columns = Columns(names, tuple(keys[0] for keys in kinds), remedy)
    for path, (line, value) in rows_of(find_sources(Path(augment.labelled_triples), SETTING), columns):
        aside.seen += 1
        read = value if isinstance(value, BadRecord) else _triple(path, line, value, augment, corpus, aside)
        if isinstance(read, BadRecord):
            aside.unusable.append(read)
        else:
            yield read


def _triple(
    path: Path, line: int, value: Mapping[str, Any], augment: AugmentSettings, corpus: CorpusSettings, aside: SetAside
) -> Triple | BadRecord:
    try:
        query = " ".join((part(value, augment.triple_query_keys, text_of, "query") or "").split())
        language = part(value, corpus.language_keys, language_of, "language", optional=True)
        positives = _texts(value, augment.triple_positive_keys, corpus)
        negatives = _texts(value, augment.triple_negative_keys, corpus)
    except Unfit as problem:
        return BadRecord(path, line, str(problem), value)
    if not query or not positives:
        what, keys = ("positive", "triple_positive_keys") if query else ("query", "triple_query_keys")
        detail = f"under {', '.join(getattr(augment, keys))} (augment.{keys}); it has {shown_names(value)}"
        return BadRecord(path, line, f"no {what}", value, detail)

    def clean(text: str) -> str:
        mended = as_unicode(text)
        aside.mended += mended != text
        return lower_if_capitals(mended) if corpus.lower_capitals else mended

    answers, others = (
        tuple(dict.fromkeys((clean(title), clean(text)) for title, text in some)) for some in (positives, negatives)
    )
    others = tuple(text for text in others if text not in answers)
    return Triple(clean(query), answers, others, language or corpus.language, path.name, line)


def _texts(value: Mapping[str, Any], names: Sequence[str], corpus: CorpusSettings) -> list[Text]:
    """What is under the first name that is there: a text, an object that has one, or a list of either."""
    name = next((name for name in names if value.get(name) is not None), None)
    if name is None:
        return []
    items = value[name] if isinstance(value[name], list) else [value[name]]
    found = [_text(item, name, corpus) if isinstance(item, Mapping) else ("", _string(item, name)) for item in items]
    return [text for text in found if any(text)]


def _string(item: object, name: str) -> str:
    return part({name: item}, [name], text_of, name) or ""


def _text(item: Mapping[str, Any], name: str, corpus: CorpusSettings) -> Text:
    text = part(item, corpus.text_keys, text_of, name)
    if text is None:
        raise Unfit(f"{name} has no text under {', '.join(corpus.text_keys)} (corpus.text_keys)")
    return part(item, corpus.title_keys, title_of, name, optional=True) or "", text
