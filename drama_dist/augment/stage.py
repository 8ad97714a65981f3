"""The augment stage: written queries in, ranked examples out.

Crops and synthetic queries are written, test queries among them set aside, the rest ranked. Each
part of the work is kept as it is done, so an interrupted stage goes on from there.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from drama_dist.augment.rank_passages import Ranker, example
from drama_dist.augment.sources.crop import crops
from drama_dist.augment.sources.queries import write_queries
from drama_dist.augment.writers.local import LanguageModel
from drama_dist.augment.written import Written, in_parts
from drama_dist.corpus.collection import Corpus
from drama_dist.distributed import ranks
from drama_dist.records import Example, write_records
from drama_dist.run.folder import CHECKPOINTS, StageFolder, open_stage, write_text
from drama_dist.run.progress import say
from drama_dist.run.shares import WHOLE, Share
from drama_dist.search.lexical import LexicalIndex, build_lexical_index
from drama_dist.search.shards import EmbeddingShards, TextEncoder
from drama_dist.settings import Settings, as_dict

_PART = 512


def augment(
    settings: Settings,
    corpus: Corpus,
    teacher: TextEncoder,
    teacher_vectors: Path,
    inputs: dict[str, str],
    share: Share = WHOLE,
) -> Path:
    """Run the stage; the artefact is RUN/augment with examples.jsonl, set_aside.jsonl and counts.json.

    teacher_vectors: the folder with the corpus as the teacher encodes it.
    A share that is not the whole writes its synthetic queries and leaves the rest, which needs all of them.
    Raises ValueError where no query could be written, or too many answers of the LLM are unusable.
    """
    sections = {
        "seed": settings.seed,
        "llm": settings.llm,
        "teacher": as_dict(settings.teacher),
        "augment": as_dict(settings.augment),
    }
    stage = open_stage(settings.run, "augment", sections, inputs, share)
    if stage.done:
        return stage.final
    if not share.whole:
        _synthetic(settings, stage, corpus, share)
        return stage.folder
    written, aside = _write(settings, stage, corpus)
    examples = _rank(settings, stage, corpus, written, teacher, EmbeddingShards(teacher_vectors))
    counts = _counts(examples, aside)
    if ranks.rank() == 0:
        write_records(stage.folder / "examples.jsonl", examples)
        write_records(stage.folder / "set_aside.jsonl", aside)
        write_text(stage.folder / "counts.json", json.dumps(counts, indent=2) + "\n")
    say("augment: " + ", ".join(f"{count} {what}" for what, count in counts.items()))
    return stage.finish(examples=len(examples), set_aside=len(aside))


def _write(settings: Settings, stage: StageFolder, corpus: Corpus) -> tuple[list[Written], list[dict[str, Any]]]:
    """All written queries but those that are test queries; and what was set aside."""
    choice = settings.augment
    written = list(crops(corpus.passages, choice, settings.seed))
    aside: list[dict[str, Any]] = []
    if choice.synthetic_queries:
        synthetic, aside = _synthetic(settings, stage, corpus, WHOLE)
        written += synthetic
    tests = {_folded(query.text) for query in corpus.queries}
    for query in written:
        if _folded(query.query) in tests:
            aside.append({"passage": query.passage_id, "reason": "is a test query", "value": query.query})
    kept = [query for query in written if _folded(query.query) not in tests]
    if not kept:
        raise ValueError(
            "no training query could be written: raise augment.crops_per_passage or augment.synthetic_queries, "
            "or lower augment.min_crop_words"
        )
    return kept, aside


def _synthetic(
    settings: Settings, stage: StageFolder, corpus: Corpus, share: Share
) -> tuple[list[Written], list[dict[str, Any]]]:
    llm = LanguageModel(settings.llm, settings.augment, settings.trust_remote_code)
    folder = stage.folder / CHECKPOINTS / "synthetic"
    return write_queries(folder, corpus.passages, llm, settings.augment, settings.seed, share)


def _rank(
    settings: Settings,
    stage: StageFolder,
    corpus: Corpus,
    written: list[Written],
    teacher: TextEncoder,
    shards: EmbeddingShards,
) -> list[Example]:
    table, choice = corpus.passages, settings.augment
    lexical = None
    if settings.teacher.fuse_bm25:
        if ranks.rank() == 0:
            build_lexical_index(table.texts(), settings.corpus.language, stage.folder / CHECKPOINTS / "bm25")
        ranks.barrier()
        lexical = LexicalIndex(stage.folder / CHECKPOINTS / "bm25")
    ranker = Ranker(teacher, shards, lexical, settings.teacher.rrf_k)

    def rank(_: int, part: Sequence[Written]) -> list[Example]:
        rankings = ranker.rank([query.query for query in part], choice.negatives_to_rank)
        return [example(query, row, table, choice, settings.seed) for query, row in zip(part, rankings, strict=True)]

    rows = in_parts(stage.folder / CHECKPOINTS / "ranked", written, _PART, "queries", rank)
    return [Example.from_json(row) for row in rows]


def _counts(examples: list[Example], aside: list[dict[str, Any]]) -> dict[str, int]:
    by_source = Counter(f"{example.source} examples" for example in examples)
    by_reason = Counter(f"set aside: {row['reason']}" for row in aside)
    return {**by_source, **by_reason}


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())
