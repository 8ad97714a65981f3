"""How long the texts are that the encoder reads: histograms for the report."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from drama_dist.corpus.collection import PassageTable
from drama_dist.encoder.backbone import Encoder
from drama_dist.records import Example

_TEXTS = 10_000
_BINS = 32


def token_lengths(encoder: Encoder, table: PassageTable, examples: Sequence[Example]) -> dict[str, list[float]]:
    """Histograms of lengths after truncation, prefix and special tokens included, of the first 10,000 of each.

    Returns the counts of `passages` and `queries` between `edges`, of which there is one more.
    """
    contract = encoder.contract
    edges = np.linspace(0, max(contract.max_passage_tokens, contract.max_query_tokens) + 1, _BINS + 1)
    passages = encoder.tokenize_passages(table.contents(range(min(len(table), _TEXTS))))
    queries = encoder.tokenize_queries([example.query for example in examples[:_TEXTS]])
    counts = {
        name: np.histogram([len(ids) for ids in sequences], edges)[0].tolist()
        for name, sequences in (("passages", passages), ("queries", queries))
    }
    return {"edges": edges.tolist(), **counts}
