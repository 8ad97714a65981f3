"""The ceiling of a recipe: what its targets would reach if a student met them exactly, and what they are made of.

python benchmarks/ceilings.py RUN ...

RUN is a finished run whose training has a regression, and whose `evaluate.systems` has the teacher and BM25; the table
goes to the standard output. A passage of several windows has the mean of their targets. Figures of the other systems
are read from the run's results.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np

from drama_dist.corpus.collection import Collection, open_collection
from drama_dist.corpus.windows import windows_by_passage
from drama_dist.encoder.pooling import matryoshka_cut_array
from drama_dist.evaluate.scoring import score
from drama_dist.run.graph import is_finished
from drama_dist.run.runner import Run
from drama_dist.search.lexical import LexicalIndex
from drama_dist.search.ranking import top_positions
from drama_dist.search.systems import SYSTEMS, DenseSystem, Ranking
from drama_dist.search.target_space import TargetSpace
from drama_dist.settings import read_settings
from drama_dist.train.target_vectors import VectorTargets

DEPTH = 1000


def of_targets(run: Run) -> list[tuple[int, float]]:
    """nDCG@10 of the targets, by dim."""
    settings, collection = run.settings, open_collection(run.path("corpus"))
    teacher = SYSTEMS["teacher"]
    assert isinstance(teacher, DenseSystem)
    texts = [query.text for query in collection.queries]
    counts = LexicalIndex(run.path("encode/windows/bm25")).counts(texts) if settings.targets.uses_bm25 else None
    space = TargetSpace.open(run.path("targets"))
    queries_QK = space.targets("query", teacher.load(settings).encode_queries(texts), counts)
    passages_NK = passage_means(run, collection)
    dims = sorted(settings.encoder.dims, reverse=True)
    return [(dim, ndcg(collection, queries_QK, passages_NK, dim)) for dim in dims]


def passage_means(run: Run, collection: Collection) -> np.ndarray:
    """The sum of the targets of each passage's windows, in the order of the corpus."""
    windows = open_collection(run.path("windows")).passages
    vectors = VectorTargets.open(run.path("targets")).passages
    own = {id: position for position, id in enumerate(collection.passages.ids)}
    row_of = {id: row for row, id in enumerate(windows.ids)}
    by_passage = windows_by_passage(windows.ids, own)
    kept = [(own[passage], row_of[id]) for passage, ids in by_passage.items() for id in ids]
    sums_NK = np.zeros((len(own), vectors.dim), dtype=np.float32)
    np.add.at(sums_NK, [passage for passage, _ in kept], vectors.rows([row for _, row in kept]))
    return sums_NK


def ndcg(collection: Collection, queries_QK: np.ndarray, passages_NK: np.ndarray, dim: int) -> float:
    """nDCG@10 of exact search with the first `dim` components."""
    scores_QN = matryoshka_cut_array(queries_QK, dim) @ matryoshka_cut_array(passages_NK, dim).T
    positions_Qk = np.stack([top_positions(scores_N, min(DEPTH, len(scores_N))) for scores_N in scores_QN])
    ranking = Ranking(dim, np.take_along_axis(scores_QN, positions_Qk, 1), positions_Qk)
    with tempfile.TemporaryDirectory() as folder:
        return score("targets", ranking, collection, Path(folder)).metrics["ndcg@10"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    for folder in map(Path, parser.parse_args().runs):
        run = Run(read_settings(folder / "settings.yaml"))
        if not is_finished(folder, "evaluate/corpus"):
            raise SystemExit(f"{folder}: not finished; run first: drama run {folder / 'settings.yaml'}")
        run.make("evaluate/corpus")  # makes nothing; then the run tells where its artefacts are
        results = json.loads((run.path("evaluate/corpus") / "results.json").read_text("utf-8"))
        rows = [("targets", dim, value) for dim, value in of_targets(run)]
        rows += [(row["system"], row["dim"], row["ndcg@10"]) for row in results]
        for system, dim, value in rows:
            print(f"{folder.name}\t{system}\t{dim or '-'}\t{value:.3f}")


if __name__ == "__main__":
    main()
