"""The triplets stage: RUN/triplets, texts and queries that an LLM makes up, without a corpus.

Its texts join those that training reads (corpus/stage.py), and its queries the examples (stage.py). They are never
searched.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from drama_dist.augment.sources.triplets import provenance, write_triplets
from drama_dist.augment.writers.choice import check_writer, writer_of
from drama_dist.augment.written import WrittenQuery
from drama_dist.corpus.collection import PassageTable
from drama_dist.distributed import ranks
from drama_dist.encoder.sources import model_fingerprint
from drama_dist.records import Passage, read_records, write_records
from drama_dist.run.files import write_text
from drama_dist.run.folder import CHECKPOINTS, StageFolder
from drama_dist.run.progress import say
from drama_dist.run.runner import Run
from drama_dist.setting_types import recorded
from drama_dist.settings import Settings, SettingsError

_QUERIES = "queries.jsonl"


def sections(settings: Settings) -> dict[str, Any]:
    """The settings that they depend on."""
    of_triplets = ("writer", "triplets", "triplet_tokens", "temperature", "top_p", "generation_batch")
    chosen = {name: value for name, value in recorded(settings.augment).items() if name in of_triplets}
    return {"seed": settings.seed, "corpus.language": settings.corpus.language, "augment": chosen}


def inputs(run: Run) -> dict[str, str]:
    """The fingerprint of the LLM."""
    return {"writer": run.once(model_fingerprint, run.settings.writer)}


def check(settings: Settings) -> None:
    """Raise SettingsError if the LLM cannot be used, or nothing is asked for."""
    if not settings.augment.triplets:
        raise SettingsError("augment.triplets=0: set how many an LLM is to make up")
    check_writer(settings, settings.augment.triplet_tokens)


def triplets(run: Run, folder: StageFolder) -> None:
    """Do the stage: texts in passages/, queries.jsonl, set_aside.jsonl and counts.json. Raises as `write_triplets`."""
    settings, llm = run.settings, writer_of(run.settings)
    parts = folder.folder / CHECKPOINTS
    try:
        rows, aside = write_triplets(parts, llm, settings.augment, settings.corpus.language, settings.seed)
    finally:
        llm.tell_cost()
    counts = {"triplets": len(rows), **Counter(f"set aside: {row['reason']}" for row in aside)}
    if ranks.rank() == 0:
        PassageTable.write(folder.folder / "passages", _passages(rows, settings.corpus.language))
        write_records(folder.folder / _QUERIES, _queries(rows, llm.name, settings))
        write_records(folder.folder / "set_aside.jsonl", aside)
        write_text(folder.folder / "counts.json", json.dumps(counts, indent=2) + "\n")
    say("triplets: " + ", ".join(f"{count} {name}" for name, count in counts.items()))
    folder.finish(triplets=len(rows), set_aside=len(aside))


def triplet_queries(folder: Path) -> list[WrittenQuery]:
    """What the stage wrote."""
    lists = ("judged", "irrelevant")
    return [
        WrittenQuery(**{**row, **{name: tuple(row[name]) for name in lists}})
        for row in read_records(folder / _QUERIES, dict)
    ]


def _passages(rows: list[dict[str, Any]], language: str) -> Iterator[Passage]:
    for number, row in enumerate(rows):
        yield Passage(_id(number, "positive"), row["positive"], language=language)
        yield Passage(_id(number, "negative"), row["negative"], language=language)


def _queries(rows: list[dict[str, Any]], model: str, settings: Settings) -> Iterator[WrittenQuery]:
    for number, row in enumerate(rows):
        yield WrittenQuery(
            row["query"],
            "",
            "triplet",
            settings.corpus.language,
            provenance(row, model, settings.seed),
            judged=(_id(number, "positive"),),
            irrelevant=(_id(number, "negative"),),
        )


def _id(number: int, part: str) -> str:
    return f"triplet:{number}:{part}"
