"""Batches: which examples make up each global batch, in an order fixed by the seed; and their texts.

A batch is a pure function of (examples, seed, step), so resuming needs no stored state, and every
rank knows the whole batch and takes its share. Passages that several examples name stand once.
"""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from drama_dist.corpus.collection import PassageTable
from drama_dist.records import Example
from drama_dist.train.term import Relevance


@dataclass(frozen=True)
class Batch:
    """B queries, and N different passages by id.

    positives: for each query the column in `passages` of the positive that was drawn for it. other_positives: the ids
    of all other relevant ones; where they stand in the batch, they are no negatives of this query. examples: where each
    query stands among the examples.
    """

    queries: list[str]
    passages: list[str]
    positives: list[int]
    other_positives: list[tuple[str, ...]]
    examples: list[int]


@dataclass(frozen=True)
class TextBatch:
    """The texts of a global batch, the same on every rank, and which passage answers which query.

    examples: where each query stands among the examples. positions: where each passage stands in the table.
    """

    queries: list[str]
    passages: list[str]
    relevance: Relevance
    examples: list[int]
    positions: list[int]


def check_batch_size(examples: Sequence[Example], batch_size: int, world_size: int) -> None:
    """Raises ValueError where a batch has no query for each rank, or there are too few examples for a batch."""
    if batch_size < world_size:
        raise ValueError(
            f"train.batch_size={batch_size} for {world_size} ranks: each needs a query; "
            "raise the batch size or start fewer ranks"
        )
    distinct = len({example.positives[0] for example in examples})
    if distinct < batch_size:
        raise ValueError(
            f"train.batch_size={batch_size}, but the examples have only {distinct} different first positives: "
            "lower the batch size or write more examples"
        )


def batches(
    examples: Sequence[Example], batch_size: int, hard_negatives: float, seed: int, first_step: int = 0
) -> Iterator[Batch]:
    """Yield global batches without end, beginning with step `first_step`.

    Every epoch is a new shuffle, and draws one positive for every example. No two queries of a batch have the same
    drawn positive: an example whose positive is taken gets its next one that is free, and is put off to the next batch
    where all are taken. Where two epochs meet, an example may come twice in a batch, with two of its positives.
    hard_negatives: per query; of a fraction, that share of the queries gets one. See `check_batch_size` first.
    """
    drawn_batches = itertools.islice(_drawn_batches(examples, batch_size, seed), first_step, None)
    for step, drawn in enumerate(drawn_batches, first_step):
        yield _batch(examples, drawn, hard_negatives, random.Random(f"{seed} negatives {step}"))


def texts_of(batch: Batch, table: PassageTable) -> TextBatch:
    """Look up the texts; equal texts count as one passage, whatever their ids.

    Raises ValueError where the table lacks a passage.
    """
    others = list(dict.fromkeys(itertools.chain(*batch.other_positives)))
    positions = [table.position(passage) for passage in [*batch.passages, *others]]
    contents = table.contents(positions)
    passages = contents[: len(batch.passages)]
    text_of_other = dict(zip(others, contents[len(batch.passages) :], strict=True))
    id_of_text: dict[str, int] = {}
    passage_ids = [id_of_text.setdefault(text, column) for column, text in enumerate(passages)]
    excluded_ids = [
        [id_of_text[text_of_other[other]] for other in ids if text_of_other[other] in id_of_text]
        for ids in batch.other_positives
    ]
    relevance = Relevance(torch.tensor(batch.positives), torch.tensor(passage_ids), _padded(excluded_ids))
    return TextBatch(batch.queries, passages, relevance, batch.examples, positions[: len(passages)])


def with_share_of_passages(batch: TextBatch, share: float) -> TextBatch:
    """The batch with the first of its passages, of which at least one stays.

    For an objective that does not compare queries with passages: the relevance stays that of the whole batch.
    """
    count = share_of_passages(len(batch.passages), share)
    return replace(batch, passages=batch.passages[:count], positions=batch.positions[:count])


def share_of_passages(passages: int, share: float) -> int:
    """How many of a batch's passages are encoded."""
    return max(1, round(share * passages))


def _drawn_batches(examples: Sequence[Example], batch_size: int, seed: int) -> Iterator[list[tuple[int, str]]]:
    """The (index of the example, its drawn positive) of each batch."""
    epochs = _epochs(examples, seed)
    waiting: deque[tuple[int, str]] = deque()
    while True:
        batch: dict[str, tuple[int, str]] = {}
        put_off: list[tuple[int, str]] = []
        while len(batch) < batch_size:
            index, drawn = waiting.popleft() if waiting else next(epochs)
            positive = _free_positive(examples[index].positives, drawn, batch)
            if positive is None:
                put_off.append((index, drawn))
            else:
                batch[positive] = index, positive
        waiting.extendleft(reversed(put_off))
        yield list(batch.values())


def _free_positive(positives: Sequence[str], drawn: str, taken: Container[str]) -> str | None:
    """The drawn positive or, going round from it, the next that is not taken; None where all are."""
    begin = positives.index(drawn)
    return next((positive for positive in (*positives[begin:], *positives[:begin]) if positive not in taken), None)


def _epochs(examples: Sequence[Example], seed: int) -> Iterator[tuple[int, str]]:
    for epoch in itertools.count():
        generator = random.Random(f"{seed} positives {epoch}")
        for index in random.Random(f"{seed} epoch {epoch}").sample(range(len(examples)), len(examples)):
            yield index, generator.choice(examples[index].positives)


def _batch(
    examples: Sequence[Example], drawn: Sequence[tuple[int, str]], hard_negatives: float, generator: random.Random
) -> Batch:
    members = [(examples[index], positive) for index, positive in drawn]
    columns: dict[str, int] = {}
    positives = []
    for example, positive in members:
        positives.append(columns.setdefault(positive, len(columns)))
        # Draws and discards: positives were once drawn here, so the same seed still gives the same negatives as before.
        generator.choice((positive,))
        wanted = int(hard_negatives) + (generator.random() < hard_negatives % 1)
        for negative in generator.sample(example.negatives, min(wanted, len(example.negatives))):
            columns.setdefault(negative, len(columns))
    others = [
        tuple(id for id in (*example.positives, *example.relevant) if id != positive) for example, positive in members
    ]
    queries = [example.query for example, _ in members]
    return Batch(queries, list(columns), positives, others, [index for index, _ in drawn])


def _padded(rows: list[list[int]]) -> torch.Tensor | None:
    """Rows of ids as one tensor, filled up with -1; None where all are empty."""
    width = max(map(len, rows))
    return torch.tensor([row + [-1] * (width - len(row)) for row in rows]) if width else None
