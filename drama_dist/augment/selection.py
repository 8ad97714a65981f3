"""Which of the written queries stay: near duplicates go, and what is beyond a quota.

Covers what a query's text, source and language decide, before passages are ranked for it. The round trip is in
rank_passages.py; test queries are left out by stage.py.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from drama_dist.augment.written import WrittenQuery, folded
from drama_dist.run.progress import progress_bar, say

PEOPLES = ("labelled", "logged")  # sources of queries that people asked
_PIECE = 3  # letters
_PERMUTATIONS = 128  # more find a larger share of the near duplicates
_HIGHEST = 0.95  # threshold of the index: above, too few bands of hashes are left
_WEIGHTS = 0.02, 0.98  # of finding too many and too few: those found are compared, and few are missed, 2% at `share`


def without_near_duplicates(
    written: Sequence[WrittenQuery], share: float
) -> tuple[list[WrittenQuery], list[dict[str, Any]]]:
    """The queries that stay, in order, and a row {passage, reason, value} for each that goes.

    Two are near duplicates where the Jaccard index of their sets of three-letter pieces, capitals and blanks apart, is
    `share` or more. MinHash (Broder 1997) finds them: with locality-sensitive hashing most, not each; those found are
    compared exactly.
    """
    from datasketch import MinHash, MinHashLSH

    index, none = MinHashLSH(min(share, _HIGHEST), _PERMUTATIONS, _WEIGHTS), MinHash(_PERMUTATIONS)
    gone: set[int] = set()
    bar = progress_bar(len(written), "augment: near duplicates", "queries")
    for position in _peoples_first(written):
        query = written[position]
        pieces = _pieces(query.query)
        hashes = none.copy()
        hashes.update_batch([piece.encode() for piece in pieces])
        alike = (_jaccard(pieces, _pieces(written[other].query)) >= share for other in index.query(hashes))
        if query.source not in PEOPLES and any(alike):
            gone.add(position)
        else:
            index.insert(position, hashes)
        bar.update()
    bar.close()
    kept = [query for position, query in enumerate(written) if position not in gone]
    return kept, [row_of(written[position], "nearly the same as another query") for position in sorted(gone)]


def within_quotas(
    written: Sequence[WrittenQuery], quotas: Mapping[str, int], seed: int
) -> tuple[list[WrittenQuery], Counter[str]]:
    """The queries that stay, in order, and how many went by each quota, which are a sample's rest and not listed.

    quotas: of sources and languages.
    """
    kept, notes = list(written), Counter[str]()
    for name, quota in sorted(quotas.items()):
        of_name = [position for position, query in enumerate(kept) if name in (query.source, query.language)]
        if not of_name:
            say(f"augment.quotas: no query is of {name!r}, neither as its source nor as its language")
        drawn = random.Random(f"{seed} quota {name}").sample(of_name, min(quota, len(of_name)))
        gone = set(of_name).difference(drawn)
        notes[f"beyond the quota of {name}"] += len(gone)
        kept = [query for position, query in enumerate(kept) if position not in gone]
    return kept, +notes


def row_of(query: WrittenQuery, reason: str) -> dict[str, Any]:
    """What set_aside.jsonl says of a query that goes."""
    return {"passage": query.passage_id, "reason": reason, "value": query.query}


def _peoples_first(written: Sequence[WrittenQuery]) -> Iterable[int]:
    return sorted(range(len(written)), key=lambda position: written[position].source not in PEOPLES)


def _pieces(text: str) -> set[str]:
    plain = folded(text)
    return {plain[begin : begin + _PIECE] for begin in range(max(1, len(plain) - _PIECE + 1))}


def _jaccard(one: set[str], other: set[str]) -> float:
    return len(one & other) / len(one | other)
