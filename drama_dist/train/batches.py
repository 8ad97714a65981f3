"""Batches: which examples make up each global batch, in an order fixed by the seed.

A batch is a pure function of (examples, seed, step), so resuming needs no stored state, and every
rank knows the whole batch and takes its share. Passages that several examples name stand once.
"""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from drama_dist.records import Example


@dataclass(frozen=True)
class Batch:
    """B queries and N different passages.

    positives: for each query the place of its positive in `passages`.
    """

    queries: list[str]
    passages: list[str]
    positives: list[int]


def batches(
    examples: Sequence[Example], batch_size: int, hard_negatives: float, seed: int, first_step: int = 0
) -> Iterator[Batch]:
    """Yield global batches without end, beginning with step `first_step`.

    Every epoch is a new shuffle. No two examples of a batch share a positive; an example that
    would is put off to the next batch. hard_negatives: per query; of a fraction, that share of the
    queries gets one. Raises ValueError where there are too few examples.
    """
    distinct = len({example.positives[0] for example in examples})
    if distinct < batch_size:
        raise ValueError(
            f"train.batch_size={batch_size}, but the examples have only {distinct} different first positives: "
            "lower the batch size or write more examples"
        )
    order = _orders(examples, batch_size, seed)
    for step, members in enumerate(itertools.islice(order, first_step, None), first_step):
        yield _batch([examples[i] for i in members], hard_negatives, random.Random(f"{seed} negatives {step}"))


def _orders(examples: Sequence[Example], batch_size: int, seed: int) -> Iterator[list[int]]:
    """Example numbers of each batch."""
    shuffled = _epochs(len(examples), seed)
    waiting: deque[int] = deque()
    while True:
        chosen: dict[str, int] = {}
        put_off: list[int] = []
        while len(chosen) < batch_size:
            number = waiting.popleft() if waiting else next(shuffled)
            positive = examples[number].positives[0]
            if positive in chosen:
                put_off.append(number)
            else:
                chosen[positive] = number
        waiting.extendleft(reversed(put_off))
        yield list(chosen.values())


def _epochs(count: int, seed: int) -> Iterator[int]:
    for epoch in itertools.count():
        yield from random.Random(f"{seed} epoch {epoch}").sample(range(count), count)


def _batch(members: list[Example], hard_negatives: float, choice: random.Random) -> Batch:
    places: dict[str, int] = {}
    positives = []
    for example in members:
        positive = choice.choice(example.positives)
        positives.append(places.setdefault(positive, len(places)))
        wanted = int(hard_negatives) + (choice.random() < hard_negatives % 1)
        for negative in choice.sample(example.negatives, min(wanted, len(example.negatives))):
            places.setdefault(negative, len(places))
    return Batch([example.query for example in members], list(places), positives)
