"""The augment stage: passages in, training examples out.

Queries are written or read. Test queries among them and near duplicates are set aside, quotas leave some out, and
passages are ranked for the rest; queries whose passage does not come back may go, too. Finished parts of the work are
stored as they come, so that an interrupted stage resumes from them.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from drama_dist.augment.parts import in_parts
from drama_dist.augment.rank_passages import Ranker, comes_back, example
from drama_dist.augment.selection import row_of, within_quotas, without_near_duplicates
from drama_dist.augment.sources.crop import crops
from drama_dist.augment.sources.labelled import labelled_queries, read_log
from drama_dist.augment.sources.queries import write_queries
from drama_dist.augment.sources.rerank import rerank
from drama_dist.augment.triplet_stage import triplet_queries
from drama_dist.augment.writers.choice import check_writer, writer_of
from drama_dist.augment.written import WrittenQuery, folded
from drama_dist.corpus.collection import PassageTable, open_collection
from drama_dist.corpus.judgements import read_judgements
from drama_dist.corpus.read import SetAside
from drama_dist.distributed import ranks
from drama_dist.encoder.failures import named_by
from drama_dist.encoder.sources import model_fingerprint
from drama_dist.records import BadRecord, Example, Query, write_records
from drama_dist.run.artefact import CHECKPOINTS
from drama_dist.run.files import write_text
from drama_dist.run.folder import StageFolder, fingerprint
from drama_dist.run.graph import CORPUS, TRAINING_TEXTS, TRIPLETS, collections_to_leave_out
from drama_dist.run.progress import say
from drama_dist.run.runner import Run
from drama_dist.search.lexical import LexicalIndex
from drama_dist.search.shards import QUERY_VECTORS, EmbeddingShards, shard_path, write_shard
from drama_dist.search.systems import SYSTEMS, DenseSystem
from drama_dist.settings import Settings, SettingsError

_PART = 512
_UNFIT = "unfit_queries.jsonl"  # records of people's queries that cannot be used


def inputs(run: Run) -> dict[str, str]:
    """The fingerprints of the LLM that writes queries, if it is to write any, and of files of people's queries."""
    settings = run.settings
    files = {"queries": settings.augment.queries, "judgements": settings.augment.judgements}
    found = {name: run.once(fingerprint, path) for name, path in files.items() if path is not None}
    if settings.augment.asks_a_writer:
        found["writer"] = run.once(model_fingerprint, settings.writer)
    return found


def check(settings: Settings) -> None:
    """Raise SettingsError if the teacher, the LLM that is to write, or a file of people's queries cannot be used."""
    augment = settings.augment
    SYSTEMS["teacher"].check(settings)
    for key, path in (("queries", augment.queries), ("judgements", augment.judgements)):
        if path is not None and not Path(path).is_file():
            raise SettingsError(f"augment.{key}={path}: no such file")
    if augment.queries:
        with named_by("augment.queries", augment.queries):
            read_log(augment, settings.corpus, SetAside())
    if augment.judgements:
        with named_by("augment.judgements", augment.judgements):
            if all(isinstance(row, BadRecord) for _, row in read_judgements(Path(augment.judgements))):
                raise ValueError("has no judgement that can be read")
    if augment.asks_a_writer:
        check_writer(settings, augment.max_new_tokens)


def augment(run: Run, folder: StageFolder) -> None:
    """Write training examples: RUN/augment with examples.jsonl, query_vectors, set_aside.jsonl and counts.json.

    query_vectors are embedding shards of the teacher's; the row of a query is the number of its example.
    A share of the work writes only its synthetic queries, since the rest needs all of them. Raises ValueError if no
    query could be written, or too many of the LLM's answers are unusable.
    """
    settings, table = run.settings, open_collection(run.path(TRAINING_TEXTS)).passages
    if not folder.share.whole:
        _synthetic(settings, folder, table)
        return
    collections = [CORPUS, *collections_to_leave_out(settings)]
    tests = [query for name in collections for query in open_collection(run.path(name)).queries]
    written, aside, notes = _write(run, folder, table, tests)
    ranker = _ranker(run)
    examples, lost = _rank(settings, folder, table, written, ranker)
    aside += lost
    if settings.augment.rerank:
        examples, unusable, mended = _rerank(settings, folder, table, examples, ranker)
        aside, notes = aside + unusable, {**notes, **mended}
    counts = _counts(examples, aside) | notes
    if ranks.rank() == 0:
        write_records(folder.folder / "examples.jsonl", examples)
        write_records(folder.folder / "set_aside.jsonl", aside)
        write_text(folder.folder / "counts.json", json.dumps(counts, indent=2) + "\n")
    say("augment: " + ", ".join(f"{count} {name}" for name, count in counts.items()))
    folder.finish(examples=len(examples), set_aside=len(aside))


def _ranker(run: Run) -> Ranker:
    teacher, settings = SYSTEMS["teacher"], run.settings
    assert isinstance(teacher, DenseSystem)
    lexical = _words(run) if settings.teacher.fuse_bm25 else None
    shards = EmbeddingShards(run.path(f"encode/{TRAINING_TEXTS}/teacher"))
    return Ranker(teacher.load(settings), shards, lexical, settings.teacher.rrf_k)


def _words(run: Run) -> LexicalIndex:
    return LexicalIndex(run.path(f"encode/{TRAINING_TEXTS}/bm25"))


def _write(
    run: Run, folder: StageFolder, table: PassageTable, test_queries: Sequence[Query]
) -> tuple[list[WrittenQuery], list[dict[str, Any]], dict[str, int]]:
    """The queries to train on, what was set aside, and what else is to be counted."""
    settings = run.settings
    lexical = _words(run) if settings.augment.draws_keywords else None
    written, notes = crops(table, lexical, settings.augment, settings.seed)
    # Before an LLM writes for hours: of people's queries too many may be unusable.
    asked, aside = _asked(run, folder, table) if settings.augment.queries else ([], [])
    if settings.augment.synthetic_queries:
        synthetic, unusable = _synthetic(settings, folder, table)
        written += synthetic
        aside += unusable
    written += asked
    if settings.augment.brings_texts:
        written += triplet_queries(run.path(TRIPLETS))
    tests = {folded(query.text) for query in test_queries}
    aside += [row_of(query, "is a test query") for query in written if folded(query.query) in tests]
    kept = [query for query in written if folded(query.query) not in tests]
    if settings.augment.near_duplicates is not None:
        kept, near = without_near_duplicates(kept, settings.augment.near_duplicates)
        aside += near
    kept, beyond = within_quotas(kept, settings.augment.quotas, settings.seed)
    notes += beyond
    if not kept:
        raise ValueError(
            "no training query is left: raise augment.crops, augment.synthetic_queries or augment.quotas, lower "
            "augment.min_crop_words, or name more kinds in augment.crop_kinds; or name queries in augment.queries"
        )
    return kept, aside, notes


def _asked(run: Run, folder: StageFolder, table: PassageTable) -> tuple[list[WrittenQuery], list[dict[str, Any]]]:
    """People's queries, and rows of the records that cannot be used."""
    settings, aside = run.settings, SetAside()
    passages = open_collection(run.path(CORPUS)).passages
    written = labelled_queries(settings.augment, settings.corpus, passages, table, aside)
    rows, unfit = list(aside.as_rows()), folder.folder / CHECKPOINTS / _UNFIT
    if ranks.rank() == 0:
        unfit.parent.mkdir(exist_ok=True)
        write_records(unfit, rows)
    aside.refuse_beyond(settings.corpus.bad_record_limit, unfit)
    return written, rows


def _synthetic(
    settings: Settings, folder: StageFolder, table: PassageTable
) -> tuple[list[WrittenQuery], list[dict[str, Any]]]:
    parts, llm = folder.folder / CHECKPOINTS / "synthetic", writer_of(settings)
    try:
        return write_queries(parts, table, llm, settings.augment, settings.seed, folder.share)
    finally:
        llm.tell_cost()


def _rank(
    settings: Settings, folder: StageFolder, table: PassageTable, written: list[WrittenQuery], ranker: Ranker
) -> tuple[list[Example], list[dict[str, Any]]]:
    """The examples in order, and a row for each query whose passage does not come back.

    The teacher's vectors of the examples' queries are stored in the same order.
    """
    section, checkpoints = settings.augment, folder.folder / CHECKPOINTS
    vectors = checkpoints / QUERY_VECTORS
    vectors.mkdir(parents=True, exist_ok=True)
    scored = section.negative_strata > 1 or section.max_negative_score is not None

    def rank(index: int, part: Sequence[WrittenQuery]) -> list[Example]:
        queries = [query.query for query in part]
        vectors_QT = ranker.encode(queries)
        write_shard(vectors, index, vectors_QT)
        rankings = ranker.rank(queries, vectors_QT, section.negatives_to_rank)
        scores = [partial(ranker.scores, vector_T) if scored else None for vector_T in vectors_QT]
        return [
            example(query, ranking_D, table, section, settings.seed, score)
            for query, ranking_D, score in zip(part, rankings, scores, strict=True)
        ]

    parts = checkpoints / "ranked"
    rows = in_parts(parts, written, _PART, "queries", rank, also=lambda index: shard_path(vectors, index))
    examples = [Example.from_json(row) for row in rows]
    back = [section.round_trip is None or comes_back(example, section.round_trip) for example in examples]
    kept = np.flatnonzero(back)
    if not len(kept):
        raise ValueError(
            f"augment.round_trip={section.round_trip}: the passage of none of {len(back)} queries comes back; raise it"
        )
    ranks.by_rank_0(lambda: _store_vectors(EmbeddingShards(vectors), kept, folder.folder / QUERY_VECTORS))
    gone = np.flatnonzero(~np.array(back)).tolist()
    lost = [row_of(written[number], "its passage does not come back") for number in gone]
    return [examples[number] for number in kept.tolist()], lost


def _store_vectors(vectors: EmbeddingShards, kept: np.ndarray, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for index, begin in enumerate(range(0, len(kept), _PART)):
        write_shard(folder, index, vectors.rows(kept[begin : begin + _PART]))


def _rerank(
    settings: Settings, folder: StageFolder, table: PassageTable, examples: list[Example], ranker: Ranker
) -> tuple[list[Example], list[dict[str, Any]], Counter[str]]:
    """The examples, some of them as the LLM ranks; unusable answers; what was mended."""
    vectors = EmbeddingShards(folder.folder / QUERY_VECTORS)

    def rank(numbers: Sequence[int], depth: int) -> np.ndarray:
        # As deep as for the examples: fusion depends on it.
        deep = max(depth, settings.augment.negatives_to_rank)
        return ranker.rank([examples[number].query for number in numbers], vectors.rows(numbers), deep)[:, :depth]

    unjudged = [number for number, example in enumerate(examples) if example.source in ("crop", "synthetic")]
    count = min(settings.augment.rerank, len(unjudged))
    numbers = sorted(random.Random(f"{settings.seed} rerank").sample(unjudged, count))
    parts, llm = folder.folder / CHECKPOINTS / "reranked", writer_of(settings)
    try:
        reranked, aside, mended = rerank(parts, numbers, examples, rank, table, llm, settings.augment)
    finally:
        llm.tell_cost()
    return [reranked.get(number, example) for number, example in enumerate(examples)], aside, mended


def _counts(examples: list[Example], aside: list[dict[str, Any]]) -> dict[str, int]:
    by_source = Counter(f"{example.source} examples" for example in examples)
    by_kind = Counter(f"{example.provenance['kind']} crops" for example in examples if example.source == "crop")
    by_reason = Counter(f"set aside: {row['reason']}" for row in aside)
    return {**by_source, **by_kind, **by_reason}
