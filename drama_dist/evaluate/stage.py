"""The evaluate stage: every system on a collection's test queries, RUN/evaluate/COLLECTION.

The artefact is results.json, and for each result a TREC run and its values by query (scoring.py). A collection without
judged queries has no results.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from drama_dist.corpus.collection import open_collection
from drama_dist.distributed import ranks
from drama_dist.encoder.cut_texts import counting
from drama_dist.evaluate.scoring import score, without_own
from drama_dist.labels import mixed
from drama_dist.run.files import write_text
from drama_dist.run.folder import StageFolder
from drama_dist.run.graph import stored_collection
from drama_dist.run.progress import say
from drama_dist.run.runner import Run
from drama_dist.search.systems import rankings
from drama_dist.setting_types import recorded
from drama_dist.settings import Settings
from drama_dist.suites import member_of


def sections(settings: Settings, collection: str) -> dict[str, Any]:
    """What the comparison depends on: the weight of mixes only where there is one, precisions only where they are not
    float32 alone, and whether queries are passages.
    """
    evaluation, encoder = settings.evaluate, recorded(settings.encoder)
    depends = {"evaluate.systems": evaluation.systems, "evaluate.depth": evaluation.depth, "encoder": encoder}
    if any(map(mixed, evaluation.systems)):
        depends["evaluate.mix_weight"] = evaluation.mix_weight
    if evaluation.precisions != ["float32"]:
        depends["evaluate.precisions"] = evaluation.precisions
    if "binary" in evaluation.precisions:
        depends["evaluate.rescore_multiplier"] = evaluation.rescore_multiplier
    if _own_left_out(settings, collection):
        depends["own_passage"] = "left out"
    return depends


def _own_left_out(settings: Settings, collection: str) -> bool:
    """Whether a passage with the query's id is no hit, as it is in some collections of named suites."""
    path = settings.evaluate.collection_labels.get(collection)  # None: the run's own corpus
    member = member_of(path) if path else None
    return member is not None and member.own_left_out


def evaluate(run: Run, folder: StageFolder, collection: str) -> None:
    """Do the stage."""
    settings, stored = run.settings, open_collection(run.path(stored_collection(collection)))

    def encoded(system: str) -> Path:
        return run.path(f"encode/{collection}/{system}")

    if not stored.queries:
        say(f"{folder.name}: the collection has no judged queries, so there is nothing to compare the systems by")
    cut: dict[str, dict[str, int]] = {}
    if ranks.rank() == 0:
        queries = [query.text for query in stored.queries]
        rows, depth, own = [], settings.evaluate.depth, _own_left_out(settings, collection)
        if own:
            say(f"{folder.name}: a passage with the query's id is no hit, as in mteb")
        for label in settings.evaluate.labels if queries else ():
            with counting() as count:
                for ranking in rankings(label, settings, encoded, queries, depth + own):
                    ranking = without_own(ranking, stored, depth) if own else ranking
                    rows.append(score(label, ranking, stored, folder.folder).as_row())
            cut[f"queries of {label}"] = asdict(count)
        write_text(folder.folder / "results.json", json.dumps(rows, indent=2) + "\n")
    folder.finish(queries=len(stored.queries), cut=cut)
