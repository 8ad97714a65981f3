"""nDCG@10 of one recipe on several corpora with several seeds: means, and whether differences are chance.

python benchmarks/seeds.py RUN ... --pairs drama-384:bm25 ...

RUNs are finished runs of the same systems; those of one corpus.path differ in their seed. Prints a Markdown table of
means over seeds for each corpus, and the mean of corpora; then, for each pair, the difference and p of a paired
randomisation test over all queries, each query's value being its mean over seeds, and each corpus weighing the same.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from drama_dist.evaluate.metrics import paired_p_value
from drama_dist.run.graph import CORPUS
from drama_dist.settings import read_settings

PerQuery = dict[str, float]


def values(run: Path) -> dict[str, PerQuery]:
    """System with its dim → query → nDCG@10."""
    folder = run / "evaluate" / CORPUS
    return {
        path.name.removesuffix(".ndcg.json"): json.loads(path.read_text("utf-8"))
        for path in folder.glob("*.json")
        if path.name.endswith(".ndcg.json")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--pairs", nargs="*", default=[], metavar="SYSTEM:SYSTEM")
    options = parser.parse_args()
    seeds: dict[str, list[dict[str, PerQuery]]] = {}
    for run in options.runs:
        seeds.setdefault(read_settings(run / "settings.yaml").corpus.path, []).append(values(run))
    for corpus, of_corpus in seeds.items():
        if len({tuple(sorted(found)) for runs in of_corpus for found in runs.values()}) > 1:
            raise SystemExit(f"{corpus}: its runs were evaluated with different queries")
    if len({len(of_corpus) for of_corpus in seeds.values()}) > 1:
        raise SystemExit("not the same number of runs of each corpus")
    systems = sorted(set.intersection(*(set(found) for of_corpus in seeds.values() for found in of_corpus)))
    heads = [f"{Path(corpus).name} ({len(found)} seeds)" for corpus, found in seeds.items()]
    print(f"| system | {' | '.join(heads)} | mean | by seed |")
    print(f"|---|{'--:|' * (len(seeds) + 1)}---|")
    for system in systems:
        means = [[float(np.mean(list(found[system].values()))) for found in of_corpus] for of_corpus in seeds.values()]
        by_seed = [f"{np.mean(each):.3f}" for each in zip(*means, strict=True)]
        of_corpora = [float(np.mean(each)) for each in means]
        cells = [f"{value:.3f}" for value in [*of_corpora, float(np.mean(of_corpora))]]
        print(f"| {system} | {' | '.join(cells)} | {', '.join(by_seed)} |")
    for pair in options.pairs:
        one, other = pair.split(":")
        ours, theirs = [], []
        for of_corpus in seeds.values():
            queries = sorted(of_corpus[0][one])
            for system, kept in ((one, ours), (other, theirs)):
                kept += [
                    float(np.mean([found[system][query] for found in of_corpus])) / len(queries) for query in queries
                ]
        difference = (sum(ours) - sum(theirs)) / len(seeds)
        print(f"{one} - {other}: {difference:+.4f}, p {paired_p_value(ours, theirs, seed=1):.4f}")


if __name__ == "__main__":
    main()
