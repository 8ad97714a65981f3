"""Searching more vectors than memory should hold: exact over shards, a compressed index, and faiss' flat index.

python benchmarks/search.py [--vectors 10000000] [--peer-vectors 2000000] [--dim 256] [--index IVF4096,PQ64np]

Made-up unit vectors: around 20,000 centres, in 64 directions, since an approximate index finds little in noise without
structure. They are written as shards into a temporary folder (10 GB), which is deleted. Each side runs in a process of
its own, whose peak is the most memory that the whole process held; exact search of all vectors ends the program with an
error where that is above 4 GiB. "cold": no file in the page cache. The peer, faiss.IndexFlatIP, holds a part that fits,
in turns with ours on the same part; its speed-up is printed only where both find the same.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from measure import add_row, arguments, by_run, circumstances, earlier_rows, in_turns, peak_megabytes, use, write_rows
from tqdm import tqdm

from drama_dist.search.dense import build_index, faiss, open_index, recall_against_exact, search_exact
from drama_dist.search.shards import EmbeddingShards, write_shard

SHARD_ROWS = 1024  # encode.shard_passages
CENTRES, DIRECTIONS, NOISE = 20_000, 64, 1.0
K = 100
MOST_MEGABYTES = 4 * 2**30 / 1e6


class MadeUp:
    """Unit vectors around centres; the block `index` is the same whenever it is asked for."""

    def __init__(self, dim: int):
        chance = np.random.default_rng(0)
        self._centres = _unit(chance.standard_normal((CENTRES, dim), dtype=np.float32))
        self._directions = chance.standard_normal((DIRECTIONS, dim), dtype=np.float32) / np.sqrt(DIRECTIONS * dim)

    def block(self, index: int, rows: int) -> np.ndarray:
        chance = np.random.default_rng((1, index))
        noise = chance.standard_normal((rows, DIRECTIONS), dtype=np.float32) @ self._directions
        return _unit(self._centres[chance.integers(0, CENTRES, rows)] + NOISE * noise)

    def queries(self, count: int) -> np.ndarray:
        """Not among the vectors."""
        return self.block(2**40, count)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def write(folder: Path, vectors: int, dim: int) -> float:
    """Write the shards; returns seconds."""
    began, made_up = time.perf_counter(), MadeUp(dim)
    for index, first in enumerate(tqdm(range(0, vectors, SHARD_ROWS), desc="writing", unit=" shards", mininterval=5)):
        write_shard(folder, index, made_up.block(index, min(SHARD_ROWS, vectors - first)))
    return time.perf_counter() - began


def exact(folder: Path, queries_QK: np.ndarray, rounds: int) -> dict[str, Any]:
    """Exact search of all shards, from the disk and from the page cache, and of one query alone."""
    shards = EmbeddingShards(folder)
    _forget(folder)
    cold = _seconds(lambda: search_exact(shards, queries_QK, K))
    warm = [_seconds(lambda: search_exact(shards, queries_QK, K)) for _ in range(rounds)]
    single = [_seconds(lambda: search_exact(shards, queries_QK[:1], K)) for _ in range(rounds)]
    return {"cold": cold, "seconds": warm, "one_query": single, "megabytes": _megabytes(folder, "shard-*.npy")}


def build(folder: Path, factory: str, parameters: str) -> dict[str, Any]:
    """Build and write the index."""
    shards = EmbeddingShards(folder)
    seconds = _seconds(lambda: build_index(shards, factory, folder, parameters))
    return {"seconds": seconds}


def indexed(folder: Path, queries_QK: np.ndarray, rounds: int) -> dict[str, Any]:
    """Search the index."""
    index = open_index(folder)
    times = [_seconds(lambda: index.search(queries_QK, K)) for _ in range(rounds)]
    single = [_seconds(lambda: index.search(queries_QK[:1], K)) for _ in range(rounds)]
    return {"seconds": times, "one_query": single, "megabytes": _megabytes(folder, "index.faiss")}


def recall(folder: Path, queries_QK: np.ndarray) -> dict[str, Any]:
    """What the index finds of the exact hits."""
    found = recall_against_exact(open_index(folder), EmbeddingShards(folder), queries_QK, (10, K))
    return {f"recall@{k}": value for k, value in found.items()}


def against_peer(folder: Path, queries_QK: np.ndarray, rounds: int) -> dict[str, Any]:
    """Ours and the flat index in memory, in turns."""
    shards = EmbeddingShards(folder)
    flat = _flat(shards)
    sides = {"ours": lambda: search_exact(shards, queries_QK, K), "peer": lambda: flat.search(queries_QK, K)}
    same = all(map(np.array_equal, sides["ours"](), sides["peer"]()))
    return {name: one.seconds for name, one in in_turns(sides, rounds).items()} | {"agree": same}


def peer(folder: Path, queries_QK: np.ndarray, rounds: int) -> dict[str, Any]:
    """The flat index alone; all queries at once make the peak."""
    flat = _flat(EmbeddingShards(folder))
    flat.search(queries_QK, K)
    return {"one_query": [_seconds(lambda: flat.search(queries_QK[:1], K)) for _ in range(rounds)]}


def _flat(shards: EmbeddingShards) -> faiss.IndexFlatIP:
    flat = faiss.IndexFlatIP(shards.dim)
    for _, block_nK in shards.blocks(2**16):
        flat.add(block_nK)
    return flat


def _forget(folder: Path) -> None:
    """Take the shards out of the page cache."""
    for path in folder.glob("shard-*.npy"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _megabytes(folder: Path, pattern: str) -> float:
    return sum(path.stat().st_size for path in folder.glob(pattern)) / 1e6


def _alone(function: Callable[..., dict[str, Any]], *given: Any) -> dict[str, Any]:
    """What `function` returns in a process of its own, and that process's peak memory."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        figures, peak = pool.submit(_with_peak, function, given).result()
    print(function.__name__, figures, f"peak {peak:.0f} MB", flush=True)
    return figures | {"peak": peak}


def _with_peak(function: Callable[..., dict[str, Any]], given: tuple[Any, ...]) -> tuple[dict[str, Any], float]:
    figures = function(*given)
    return figures, peak_megabytes("cpu")


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All sides."""
    whole, part = folder / "whole", folder / "part"
    whole.mkdir()
    part.mkdir()
    queries_QK = MadeUp(options.dim).queries(options.queries)
    row: dict[str, Any] = {name: getattr(options, name) for name in ("vectors", "dim", "queries", "index", "search")}
    row["writing"] = write(whole, options.vectors, options.dim)
    for path in sorted(whole.iterdir())[: -(-options.peer_vectors // SHARD_ROWS)]:
        os.link(path, part / path.name)
    row["exact"] = _alone(exact, whole, queries_QK, options.rounds)
    if row["exact"]["peak"] > MOST_MEGABYTES:
        raise SystemExit(f"exact search held {row['exact']['peak']:.0f} MB, more than 4 GiB")
    row["part"] = len(EmbeddingShards(part))
    row["part_exact"] = _alone(exact, part, queries_QK, 1)
    row["part_peer"] = _alone(peer, part, queries_QK, options.rounds)
    row["turns"] = _alone(against_peer, part, queries_QK, options.rounds)
    row["build"] = _alone(build, whole, options.index, options.search)
    row["indexed"] = _alone(indexed, whole, queries_QK, options.rounds)
    row["recall"] = _alone(recall, whole, queries_QK)
    return row


LEGEND = f"""Seconds for all queries, {K} hits each, with the files in the page cache (median of the rounds); for one
query alone; and with no file in the page cache. Peak: of the whole process that searches, and of the one that builds
the index. The seconds of a part are of turns with the peer in one process, the peaks of one for each side."""


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line for each side."""
    heads = ("vectors", "queries", "side", "all queries, s", "one query, s", "cold, s", "peak, MB", "disk, MB")
    heads += ("recall@10", f"recall@{K}", "build, s", "build peak, MB")
    lines = [heads, ("--:", "--:", "---", *["--:"] * (len(heads) - 3))]
    for row in rows:
        lines += _lines(row)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _lines(row: dict[str, Any]) -> list[tuple[str, ...]]:
    whole, index, turns, part, peer = (row[name] for name in ("exact", "indexed", "turns", "part_exact", "part_peer"))
    queries = str(row["queries"])
    sizes = [(f"{count} × {row['dim']}", queries) for count in (row["vectors"], row["part"])]
    times = f"{turns['peer'] / turns['ours']:.2f} times ours" if turns["agree"] else "other hits"
    rest = ("",) * 4
    return [
        (*sizes[0], "ours, exact over shards", f"{_median(whole, 'seconds'):.1f}", *_costs(whole), *rest),
        (
            *sizes[0],
            f"ours, {row['index']}, {row['search']}",
            f"{_median(index, 'seconds'):.3f}",
            *_costs(index),
            *(f"{row['recall'][f'recall@{k}']:.3f}" for k in (10, K)),
            f"{row['build']['seconds']:.0f}",
            f"{row['build']['peak']:.0f}",
        ),
        (*sizes[1], "ours, exact over shards", f"{turns['ours']:.2f}", *_costs(part), *rest),
        (*sizes[1], f"faiss.IndexFlatIP in memory, {times}", f"{turns['peer']:.2f}", *_costs(peer), *rest),
    ]


def _costs(side: dict[str, Any]) -> tuple[str, ...]:
    """One query, cold, peak, disk."""
    one = f"{_median(side, 'one_query'):.4f}" if "one_query" in side else ""
    cold = f"{side['cold']:.1f}" if "cold" in side else ""
    disk = f"{side['megabytes']:.0f}" if "megabytes" in side else ""
    return one, cold, f"{side['peak']:.0f}", disk


def _median(side: dict[str, Any], key: str) -> float:
    return statistics.median(side[key])


def main() -> None:
    parser = arguments(__doc__, rounds=3, devices=("cpu",))
    parser.add_argument("--vectors", type=int, default=10_000_000)
    parser.add_argument("--peer-vectors", type=int, default=2_000_000, help="of them, for the peer that holds all")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--index", default="IVF4096,PQ64np", help="as encode.index")
    parser.add_argument("--search", default="nprobe=16", help="as encode.index_search")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    options = parser.parse_args()
    use(options)
    name, facts = "search-cpu-float32", circumstances()
    facts["versions"]["faiss-cpu"] = version("faiss-cpu")
    rows = earlier_rows(name)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        row = measure(Path(folder), options)
    add_row(rows, row, facts, "vectors", "dim", "queries", "index", "search")
    path = write_rows(name, rows, LEGEND, table)
    print(by_run(rows, table), path, sep="\n")


if __name__ == "__main__":
    main()
