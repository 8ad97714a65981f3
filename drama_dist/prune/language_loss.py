"""A step of training on text as a language model: its sequences, split over ranks, and predictions of their tokens.

Covers what healing and learned masks have in common. Attention is causal here.
Shapes: T tokens of a chunk, S scored ones, V vocabulary.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from drama_dist.distributed import ranks
from drama_dist.distributed.loop import Schedule
from drama_dist.encoder.families import LanguageModel
from drama_dist.encoder.packing import Packed

_WARMUP_SHARE = 0.1
_CHECKPOINT_EVERY = 25
_KEEP_CHECKPOINTS = 1
_CHUNK_TOKENS = 1024  # T × V scores in float32: 200 MB for a vocabulary of 49k


@dataclass(frozen=True)
class Chunk:
    """Sequences to pack, and the positions in the packing, ascending, whose next token is predicted."""

    sequences: list[list[int]]
    scored: list[int]

    @property
    def tokens(self) -> int:
        return sum(map(len, self.sequences))


def step_chunks(sequences: Sequence[list[int]], tokens: int, scored_share: float, seed: str) -> list[Chunk]:
    """A step's chunks, the same on every rank. tokens: so many, where there are, or a few more. seed: of the step."""
    generator = random.Random(seed)
    chunks: list[list[list[int]]] = [[]]
    taken = of_chunk = 0
    for index in generator.sample(range(len(sequences)), min(len(sequences), tokens)):  # each has a token
        if taken >= tokens:
            break
        if of_chunk >= _CHUNK_TOKENS:
            chunks.append([])
            of_chunk = 0
        chunks[-1].append(sequences[index])
        taken += len(sequences[index])
        of_chunk += len(sequences[index])
    return [Chunk(chunk, _scored(chunk, scored_share, generator)) for chunk in chunks]


def schedule(steps: int, peak: float) -> Schedule:
    """Of training for so many steps, at this learning rate at most."""
    return Schedule(steps, None, peak, _WARMUP_SHARE, _CHECKPOINT_EVERY, _KEEP_CHECKPOINTS, keep_best=False)


def share_of_this_rank(chunks: Sequence[Chunk]) -> Iterator[tuple[Chunk, float]]:
    """Chunks go round the ranks: with weight 1; one with weight 0 where others have one more."""
    for begin in range(0, len(chunks), ranks.world_size()):
        index = begin + ranks.rank()
        yield (chunks[index], 1.0) if index < len(chunks) else (chunks[0], 0.0)


def token_scores(model: LanguageModel, packed: Packed, positions_S: torch.Tensor) -> torch.Tensor:
    """S × V float32: the model's scores of the tokens behind these positions."""
    output = model.model(
        input_ids=packed.token_ids_T.unsqueeze(0),
        position_ids=packed.position_ids_T.unsqueeze(0),
        use_cache=False,
        packed=packed,
    )
    scores_SV: torch.Tensor = model.lm_head(output.last_hidden_state[0][positions_S]).float()
    return scores_SV


def _scored(sequences: list[list[int]], share: float, generator: random.Random) -> list[int]:
    ends = set(itertools.accumulate(len(ids) for ids in sequences))
    positions = [position for position in range(max(ends)) if position + 1 not in ends]
    return sorted(generator.sample(positions, min(len(positions), max(1, round(share * len(positions))))))
