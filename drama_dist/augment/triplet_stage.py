"""The triplets stage: RUN/triplets, texts and queries from elsewhere than the corpus.

An LLM makes them up, or people's triples bring them. Its texts join those that training reads (corpus/stage.py), and
its queries the examples (stage.py). They are never searched.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from drama_dist.augment.sources.triples import SETTING, Text, Triple, read_triples
from drama_dist.augment.sources.triplets import provenance, write_triplets
from drama_dist.augment.writers.choice import check_writer, writer_of
from drama_dist.augment.written import WrittenQuery
from drama_dist.corpus.collection import PassageTable
from drama_dist.corpus.layout import find_sources
from drama_dist.corpus.read import SetAside, first_of
from drama_dist.distributed import ranks
from drama_dist.encoder.failures import named_by
from drama_dist.encoder.sources import model_fingerprint
from drama_dist.records import Passage, read_records, write_records
from drama_dist.run.artefact import CHECKPOINTS
from drama_dist.run.files import write_text
from drama_dist.run.folder import StageFolder, fingerprint_of_files
from drama_dist.run.progress import say
from drama_dist.run.runner import Run
from drama_dist.setting_types import recorded
from drama_dist.settings import Settings, SettingsError

_QUERIES = "queries.jsonl"
_ASIDE = "set_aside.jsonl"
_OF_TRIPLES = ("labelled_triples", "triple_query_keys", "triple_positive_keys", "triple_negative_keys")
_OF_READING = ("lower_capitals", "text_keys", "title_keys", "language_keys")
_OF_WRITING = ("writer", "triplets", "triplet_tokens", "temperature", "top_p", "generation_batch", "json_answers")

Found = tuple[list[Passage], list[WrittenQuery]]


def sections(settings: Settings) -> dict[str, Any]:
    """The settings that they depend on."""
    augment, corpus = settings.augment, settings.corpus
    names = [*(_OF_TRIPLES if augment.labelled_triples else ()), *(_OF_WRITING if augment.triplets else ())]
    chosen = {name: value for name, value in recorded(augment).items() if name in names}
    of_corpus = ["language", *(_OF_READING if augment.labelled_triples else ())]
    reading = {name: getattr(corpus, name) for name in of_corpus}
    return {"seed": settings.seed, "corpus": reading, "augment": chosen}


def inputs(run: Run) -> dict[str, str]:
    """The fingerprints of the LLM and of the files of triples, where there are any."""
    settings, found = run.settings, {}
    if settings.augment.triplets:
        found["writer"] = run.once(model_fingerprint, settings.writer)
    if settings.augment.labelled_triples:
        sources = find_sources(Path(settings.augment.labelled_triples), SETTING)
        found["triples"] = fingerprint_of_files([*sources.passages, *sources.dataset_files])
    return found


def check(settings: Settings) -> None:
    """Raise SettingsError if the LLM or the file cannot be used, or nothing is asked for."""
    augment = settings.augment
    if not augment.brings_texts:
        raise SettingsError(f"augment.triplets=0, {SETTING}=null: set one of them to have texts made up or read")
    if augment.labelled_triples:
        if not Path(augment.labelled_triples).exists():
            raise SettingsError(f"{SETTING}={augment.labelled_triples}: no such file or folder")
        with named_by(SETTING, augment.labelled_triples):
            aside = SetAside()
            if next(read_triples(augment, settings.corpus, aside), None) is None:
                raise ValueError(f"no usable triple among {aside.seen} records{first_of(aside.unusable)}")
    if augment.triplets:
        check_writer(settings, augment.triplet_tokens)


def triplets(run: Run, folder: StageFolder) -> None:
    """Do the stage: texts in passages/, queries.jsonl, set_aside.jsonl and counts.json.

    Raises as `write_triplets` does; ValueError where no triple of people can be used, or too many cannot.
    """
    settings, aside = run.settings, list[dict[str, Any]]()
    passages, queries, counts = list[Passage](), list[WrittenQuery](), dict[str, int]()
    if settings.augment.labelled_triples:
        found, unfit = _peoples(settings, folder)
        passages, queries, aside = [*found[0]], [*found[1]], unfit
        counts["queries of people's triples"] = len(queries)
    if settings.augment.triplets:
        found, unusable = _made_up(settings, folder)
        passages, queries, aside = passages + found[0], queries + found[1], aside + unusable
        counts["triplets"] = len(found[1])
    counts |= Counter(f"set aside: {row['reason']}" for row in aside)
    if ranks.rank() == 0:
        PassageTable.write(folder.folder / "passages", passages)
        write_records(folder.folder / _QUERIES, queries)
        write_records(folder.folder / _ASIDE, aside)
        write_text(folder.folder / "counts.json", json.dumps(counts, indent=2) + "\n")
    say("triplets: " + ", ".join(f"{count} {name}" for name, count in counts.items()))
    folder.finish(triplets=len(queries), set_aside=len(aside))


def triplet_queries(folder: Path) -> list[WrittenQuery]:
    """What the stage wrote."""
    lists = ("judged", "irrelevant")
    return [
        WrittenQuery(**{**row, **{name: tuple(row[name]) for name in lists}})
        for row in read_records(folder / _QUERIES, dict)
    ]


def with_ids(triples: Iterable[Triple]) -> Found:
    """The texts, each once, and the queries of triples; equal queries are one, with the texts of all."""
    ids: dict[Text, str] = {}
    passages: list[Passage] = []
    queries: dict[str, WrittenQuery] = {}

    def ids_of(texts: Iterable[Text], language: str) -> Iterator[str]:
        for title, text in texts:
            if (title, text) not in ids:
                ids[title, text] = f"labelled:{len(ids)}"
                passages.append(Passage(ids[title, text], text, title, language))
            yield ids[title, text]

    for triple in triples:
        told = {"file": triple.file, "line": triple.line}
        before = queries.get(triple.query, WrittenQuery(triple.query, "", "labelled", triple.language, told))
        judged = dict.fromkeys([*before.judged, *ids_of(triple.positives, triple.language)])
        others = dict.fromkeys([*before.irrelevant, *ids_of(triple.negatives, triple.language)])
        irrelevant = tuple(id for id in others if id not in judged)
        queries[triple.query] = replace(before, judged=tuple(judged), irrelevant=irrelevant)
    return passages, list(queries.values())


def _peoples(settings: Settings, folder: StageFolder) -> tuple[Found, list[dict[str, Any]]]:
    path, aside = settings.augment.labelled_triples, SetAside()
    assert path is not None
    for note in find_sources(Path(path), SETTING).notes:
        say(f"{path}: {note}")
    found = with_ids(read_triples(settings.augment, settings.corpus, aside))
    rows = list(aside.as_rows())
    if ranks.rank() == 0:
        write_records(folder.folder / _ASIDE, rows)
    aside.refuse_beyond(settings.corpus.bad_record_limit, folder.folder / _ASIDE)
    aside.tell_mended(folder.name)
    if not found[1]:
        raise ValueError(f"{SETTING}={path}: no usable triple among {aside.seen} records")
    return found, rows


def _made_up(settings: Settings, folder: StageFolder) -> tuple[Found, list[dict[str, Any]]]:
    llm, language = writer_of(settings), settings.corpus.language
    parts = folder.folder / CHECKPOINTS
    try:
        rows, unusable = write_triplets(parts, llm, settings.augment, language, settings.seed)
    finally:
        llm.tell_cost()
    passages, queries = [], []
    for number, row in enumerate(rows):
        positive, negative = (f"triplet:{number}:{part}" for part in ("positive", "negative"))
        passages.append(Passage(positive, row["positive"], language=language))
        passages.append(Passage(negative, row["negative"], language=language))
        told = provenance(row, llm.name, settings.seed)
        judged = {"judged": (positive,), "irrelevant": (negative,)}
        queries.append(WrittenQuery(row["query"], "", "triplet", language, told, **judged))
    return (passages, queries), unusable
