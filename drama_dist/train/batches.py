"""Batches: which examples make up each global batch, in an order fixed by the seed; and their texts.

A batch is a pure function of (examples, mix, seed, step), so resuming needs no stored state, and every
rank knows the whole batch and takes its share. Passages that several examples name stand once.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter, deque
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, combinations

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


@dataclass(frozen=True)
class Mix:
    """Which examples come how often, and together.

    weights: of sources, by which each query of a batch is drawn; what is not named is not drawn. Empty: all examples
    come equally often. alike: what all queries of a batch have in common, of "source" and "language".
    """

    weights: Mapping[str, float] = field(default_factory=dict)
    alike: Sequence[str] = ()

    def groups(self, examples: Sequence[Example]) -> list[Group]:
        """The examples, by what those of a batch have in common."""
        found: dict[tuple[str, ...], dict[str, list[int]]] = {}
        for number, example in enumerate(examples):
            if not self.weights or self.weights.get(example.source, 0):
                common = tuple(getattr(example, name) for name in self.alike)
                source = example.source if self.weights else ""
                found.setdefault(common, {}).setdefault(source, []).append(number)
        totals = Counter(example.source if self.weights else "" for example in examples)
        rates = {source: self.weights.get(source, 1) / total for source, total in totals.items()}
        return [
            Group(common, numbers, {source: rates[source] * len(own) for source, own in numbers.items()})
            for common, numbers in found.items()
        ]


@dataclass(frozen=True)
class Group:
    """Examples that a batch may be drawn from, and how often by source, relative to those of all groups.

    name: what they have in common. Without weights of sources, "" stands for all of them.
    """

    name: tuple[str, ...]
    numbers: Mapping[str, list[int]]
    rates: Mapping[str, float]

    @property
    def rate(self) -> float:
        """How often a batch is of this group."""
        return sum(self.rates.values())


EVENLY = Mix()


def check_batches(examples: Sequence[Example], batch_size: int, world_size: int, mix: Mix = EVENLY) -> None:
    """Raises ValueError where a batch has no query for each rank, or there are too few examples for a batch."""
    if batch_size < world_size:
        raise ValueError(
            f"train.batch_size={batch_size} for {world_size} ranks: each needs a query; "
            "raise the batch size or start fewer ranks"
        )
    sources = {example.source for example in examples}
    if unknown := [source for source, weight in mix.weights.items() if weight and source not in sources]:
        raise ValueError(
            f"train.source_weights: no example is from {unknown[0]!r}; the sources are {', '.join(sorted(sources))}"
        )
    for group in mix.groups(examples):
        first = {source: {examples[n].positives[0] for n in numbers} for source, numbers in group.numbers.items()}
        for some in chain.from_iterable(combinations(first, size) for size in range(1, len(first) + 1)):
            distinct = len(set().union(*(first[source] for source in some)))
            share = sum(group.rates[source] for source in some) / group.rate
            # A part of the sources that has no more than its share of a batch: ever more would wait for one with room.
            if distinct < batch_size if len(some) == len(first) else distinct <= share * batch_size:
                raise ValueError(_too_few(batch_size, distinct, dict.fromkeys((*group.name, *some)), share))


def _too_few(batch_size: int, distinct: int, names: Iterable[str], share: float) -> str:
    of = " and ".join(repr(name) for name in names if name)
    part = f", which are to be {share:.3g} of a batch," if share < 1 else ""
    mended = " or write more examples" + (", or change train.source_weights or train.same_in_batch" if of else "")
    return (
        f"train.batch_size={batch_size}, but the examples{of and f' of {of}'}{part} have only {distinct} different "
        f"first positives: lower the batch size{mended}"
    )


def batches(
    examples: Sequence[Example],
    batch_size: int,
    hard_negatives: float,
    seed: int,
    first_step: int = 0,
    mix: Mix = EVENLY,
) -> Iterator[Batch]:
    """Yield global batches without end, beginning with step `first_step`.

    Every epoch is a new shuffle, and draws one positive for every example. No two queries of a batch have the same
    drawn positive: an example whose positive is taken gets its next one that is free, and is put off to the next batch
    of its group where all are taken. Where two epochs meet, an example may come twice in a batch, with two of its
    positives.
    hard_negatives: per query; of a fraction, that share of the queries gets one. See `check_batches` first.
    """
    drawn_batches = itertools.islice(_drawn_batches(examples, batch_size, seed, mix), first_step, None)
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


def _drawn_batches(
    examples: Sequence[Example], batch_size: int, seed: int, mix: Mix
) -> Iterator[list[tuple[int, str]]]:
    """The (index of the example, its drawn positive) of each batch."""
    groups = mix.groups(examples)
    rates, chance = [group.rate for group in groups], random.Random(f"{seed} groups")
    queues = [(_stream(examples, group, seed), deque[tuple[int, str]]()) for group in groups]
    while True:
        (stream, waiting), *_ = chance.choices(queues, rates)
        batch: dict[str, tuple[int, str]] = {}
        put_off: list[tuple[int, str]] = []
        while len(batch) < batch_size:
            index, drawn = waiting.popleft() if waiting else next(stream)
            positive = _free_positive(examples[index].positives, drawn, batch)
            if positive is None:
                put_off.append((index, drawn))
            else:
                batch[positive] = index, positive
        waiting.extendleft(reversed(put_off))
        yield list(batch.values())


def _stream(examples: Sequence[Example], group: Group, seed: int) -> Iterator[tuple[int, str]]:
    """The examples of a group without end, of each source as often as its rate says, and a drawn positive of each."""
    rates, chance = list(group.rates.values()), random.Random(f"{seed} sources {group.name}")
    epochs = []
    for source, numbers in group.numbers.items():
        names = [name for name in (*group.name, source) if name]  # none where there is but one stream
        epochs.append(_epochs(examples, numbers, " ".join([str(seed), *names])))
    while True:
        (epoch,) = chance.choices(epochs, rates)
        yield next(epoch)


def _free_positive(positives: Sequence[str], drawn: str, taken: Container[str]) -> str | None:
    """The drawn positive or, going round from it, the next that is not taken; None where all are."""
    begin = positives.index(drawn)
    return next((positive for positive in (*positives[begin:], *positives[:begin]) if positive not in taken), None)


def _epochs(examples: Sequence[Example], numbers: Sequence[int], name: str) -> Iterator[tuple[int, str]]:
    for epoch in itertools.count():
        generator = random.Random(f"{name} positives {epoch}")
        for index in random.Random(f"{name} epoch {epoch}").sample(numbers, len(numbers)):
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
