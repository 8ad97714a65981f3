"""Vectors in float32, int8 and binary at every dim: size, quality and speed.

python benchmarks/quantised.py [--vectors 1000000] [--depth 100] [--multiplier 4] RUN ...

RUNs are finished runs with one recipe, of as many seeds for each corpus. Quality is nDCG@10 of their own vectors of the
corpus, mean of its queries, of seeds, and of corpora; nothing is encoded but the queries. Speed is of searching made-up
vectors (those of search.py): float32 in shards, which are written into a temporary folder and read from the page cache;
all else in memory, with faiss' flat index for float32. --vectors 0 leaves speed out. "binary, bits alone" is put in
order by Hamming distance, without rescoring.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from measure import Measured, arguments, as_row, circumstances, in_turns, rate_of, use, write_results
from search import MadeUp, write
from tqdm import tqdm

from drama_dist.corpus.collection import Collection, open_collection
from drama_dist.encoder.pooling import matryoshka_cut_array
from drama_dist.evaluate.metrics import mean_over_queries, per_query
from drama_dist.records import Hit
from drama_dist.run.graph import CORPUS
from drama_dist.search.dense import faiss, search_exact
from drama_dist.search.quantised import BinaryIndex, Int8Index
from drama_dist.search.shards import EmbeddingShards
from drama_dist.search.systems import SYSTEMS, DenseSystem
from drama_dist.settings import read_settings

Search = Callable[[np.ndarray], np.ndarray]  # queries (Q, K) → positions (Q, k), best first
QUERIES = 100  # of made-up vectors
FLOAT, FLAT, INT8, BINARY, BITS = "float32", "float32, in memory", "int8", "binary", "binary, bits alone"
BYTES = {FLOAT: 4.0, FLAT: 4.0, INT8: 1.0, BINARY: 1 / 8, BITS: 1 / 8}  # of a component


def searches(shards: EmbeddingShards, dim: int, options: argparse.Namespace) -> dict[str, Search]:
    """Side → its search."""
    int8, binary, depth = Int8Index(shards, dim), BinaryIndex(shards, dim), min(options.depth, len(shards))
    return {
        FLOAT: lambda queries: search_exact(shards, queries, depth, dim)[1],
        INT8: lambda queries: int8.search(queries, depth)[1],
        BINARY: lambda queries: binary.search(queries, depth, options.multiplier * depth)[1],
        BITS: lambda queries: binary.nearest(queries, depth)[1],
    }


def quality(run: Path, options: argparse.Namespace) -> dict[str, float]:
    """DIM SIDE → nDCG@10 of the run's corpus."""
    settings, system = replace(read_settings(run / "settings.yaml"), run=str(run)), SYSTEMS["drama"]
    assert isinstance(system, DenseSystem)
    collection, shards = open_collection(run / CORPUS), EmbeddingShards(run / "encode" / CORPUS / system.name)
    queries_QK = system.load(settings).encode_queries([query.text for query in collection.queries])
    values = {}
    for dim in settings.encoder.dims:
        for side, search in searches(shards, dim, options).items():
            values[f"{dim} {side}"] = ndcg(collection, search(matryoshka_cut_array(queries_QK, dim)))
    return values


def ndcg(collection: Collection, positions_Qk: np.ndarray) -> float:
    """nDCG@10, mean of queries."""
    ids = collection.passages.ids
    hits = {
        query.id: [Hit(ids[position], 0.0) for position in positions]
        for query, positions in zip(collection.queries, positions_Qk.tolist(), strict=True)
    }
    return mean_over_queries(per_query(collection.qrels, hits))["ndcg@10"]


def speed(folder: Path, dims: list[int], options: argparse.Namespace) -> dict[str, tuple[Measured, Measured]]:
    """DIM SIDE → searching all queries at once, and one alone."""
    write(folder, options.vectors, max(dims))
    shards, queries_QK = EmbeddingShards(folder), MadeUp(max(dims)).queries(QUERIES)
    measured = {}
    for dim in dims:
        cut, flat = matryoshka_cut_array(queries_QK, dim), faiss.IndexFlatIP(dim)
        for _, block_nK in shards.blocks(2**16):
            flat.add(matryoshka_cut_array(block_nK, dim))
        sides = {FLAT: partial(_flat, flat, options.depth), **searches(shards, dim, options)}
        for queries in (cut, cut[:1]):
            calls = {side: partial(search, queries) for side, search in sides.items()}
            for side, one in in_turns(calls, options.rounds).items():
                measured.setdefault(f"{dim} {side}", []).append(one)
    return {name: (both[0], both[1]) for name, both in measured.items()}


def _flat(index: faiss.IndexFlatIP, depth: int, queries_QK: np.ndarray) -> np.ndarray:
    positions_Qk: np.ndarray = index.search(queries_QK, depth)[1]
    return positions_Qk


def rows_of(
    found: dict[str, list[dict[str, float]]], passages: dict[str, int], dims: list[int], times: dict[str, Any]
) -> list[dict[str, Any]]:
    """A row for each dim and side. found: corpus → `quality` of its seeds."""
    rows = []
    for dim in dims:
        for side in BYTES if times else (FLOAT, INT8, BINARY, BITS):
            name, of = f"{dim} {side}", f"{dim} {FLOAT if side == FLAT else side}"
            size = round(dim * BYTES[side])
            row: dict[str, Any] = {"dim": dim, "side": side, "bytes": size}
            row["megabytes"] = {corpus: size * count / 1e6 for corpus, count in passages.items()}
            row["ndcg@10"] = {corpus: float(np.mean([seed[of] for seed in seeds])) for corpus, seeds in found.items()}
            row["measured"] = [as_row(one) for one in times.get(name, ())]
            rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    corpora = list(rows[0]["megabytes"])
    heads = ["dim", "vectors", "bytes", f"MB: {', '.join(corpora)}", "nDCG@10", f"of {', '.join(corpora)}"]
    heads += ["of float's", f"of float's at {rows[0]['dim']}"]
    heads += [f"{QUERIES} queries, queries/s", "one query, ms"] if rows[0]["measured"] else []
    lines = [heads, ["--:", "---", *["--:"] * (len(heads) - 2)]]
    float_of = {row["dim"]: _mean(row) for row in rows if row["side"] == FLOAT}
    for row in rows:
        mean = _mean(row)
        cells = [str(row["dim"]), row["side"], str(row["bytes"]), _each(row["megabytes"], 2), f"{mean:.3f}"]
        cells += [
            _each(row["ndcg@10"], 3),
            f"{mean / float_of[row['dim']]:.1%}",
            f"{mean / float_of[rows[0]['dim']]:.1%}",
        ]
        if row["measured"]:
            many, one = (Measured(**each) for each in row["measured"])
            cells += [rate_of(QUERIES, many), f"{1e3 * one.seconds:.2f}"]
        lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _mean(row: dict[str, Any]) -> float:
    return float(np.mean(list(row["ndcg@10"].values())))


def _each(values: dict[str, float], digits: int) -> str:
    return " / ".join(f"{value:.{digits}f}" for value in values.values())


def main() -> None:
    parser = arguments(__doc__, devices=("cpu",))
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--vectors", type=int, default=1_000_000, help="made up, whose search is timed; 0: none")
    parser.add_argument("--depth", type=int, default=100, help="hits of a query (default 100)")
    parser.add_argument("--multiplier", type=int, default=4, help="as evaluate.rescore_multiplier (default 4)")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    options = parser.parse_args()
    use(options)
    found: dict[str, list[dict[str, float]]] = {}
    passages, dims = {}, sorted(read_settings(options.runs[0] / "settings.yaml").encoder.dims, reverse=True)
    for run in tqdm(options.runs, unit=" runs"):
        corpus = Path(read_settings(run / "settings.yaml").corpus.path).name
        passages[corpus] = len(EmbeddingShards(run / "encode" / CORPUS / "drama"))
        found.setdefault(corpus, []).append(quality(run, options))
    times: dict[str, Any] = {}
    if options.vectors:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            times = speed(Path(folder), dims, options)
    facts = circumstances()
    facts["versions"]["faiss-cpu"] = version("faiss-cpu")
    rows = rows_of(found, passages, dims, times)
    told = f"""{", ".join(f"{corpus} {count} passages" for corpus, count in passages.items())}; means of \
{", ".join(str(len(seeds)) for seeds in found.values())} runs. {options.depth} hits of a query; binary: \
{options.multiplier * options.depth} candidates. Speed: {options.vectors or "no"} made-up vectors."""
    print(table(rows), write_results("quantised-cpu", facts, rows, f"{told}\n\n{table(rows)}"), sep="\n")


if __name__ == "__main__":
    main()
