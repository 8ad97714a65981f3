"""A step of training on text as a language model: its sequences, split over ranks, and predictions of their tokens.

Covers what healing and learned masks have in common, but not which texts a step reads: language_batches.py. Attention
is causal here.
Shapes: T tokens of a chunk, S scored ones, V vocabulary.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import nll_loss

from drama_dist.distributed import ranks
from drama_dist.distributed.loop import Schedule
from drama_dist.encoder.families import LanguageModel
from drama_dist.encoder.packing import pack

_WARMUP_SHARE = 0.1
_CHECKPOINT_EVERY = 25
_KEEP_CHECKPOINTS = 1
_CHUNK_TOKENS = 1024  # T × V scores in float32: 200 MB for a vocabulary of 49k


@dataclass(frozen=True)
class Chunk:
    """Sequences to pack, the positions in the packing, ascending, whose next token is predicted, and their languages.

    languages: of each sequence.
    """

    sequences: list[list[int]]
    scored: list[int]
    languages: list[str]

    @property
    def tokens(self) -> int:
        return sum(map(len, self.sequences))


def chunked(
    texts: Iterable[tuple[list[int], str]], tokens: int, scored_share: float, generator: random.Random
) -> list[Chunk]:
    """Chunks of (token ids, language) in this order, until there are so many tokens, or a few more.

    scored_share: of the positions that have a next token, drawn by the generator; at least one of a chunk's.
    """
    chunks: list[list[tuple[list[int], str]]] = [[]]
    taken = of_chunk = 0
    for ids, language in texts:
        if taken >= tokens:
            break
        if of_chunk >= _CHUNK_TOKENS:
            chunks.append([])
            of_chunk = 0
        chunks[-1].append((ids, language))
        taken += len(ids)
        of_chunk += len(ids)
    return [_chunk(chunk, scored_share, generator) for chunk in chunks]


def schedule(steps: int, peak: float) -> Schedule:
    """Of training for so many steps, at this learning rate at most."""
    return Schedule(steps, None, peak, _WARMUP_SHARE, _CHECKPOINT_EVERY, _KEEP_CHECKPOINTS, keep_best=False)


def share_of_this_rank(chunks: Sequence[Chunk]) -> Iterator[tuple[Chunk, float]]:
    """Chunks go round the ranks: with weight 1; one with weight 0 where others have one more."""
    for begin in range(0, len(chunks), ranks.world_size()):
        index = begin + ranks.rank()
        yield (chunks[index], 1.0) if index < len(chunks) else (chunks[0], 0.0)


def token_log_probabilities(model: LanguageModel, chunk: Chunk) -> tuple[torch.Tensor, torch.Tensor]:
    """What the model makes of the scored tokens: log p of every token there (S × V float32), and the tokens (S)."""
    packed = pack(chunk.sequences, model.device)
    output = model.model(
        input_ids=packed.token_ids_T.unsqueeze(0),
        position_ids=packed.position_ids_T.unsqueeze(0),
        use_cache=False,
        packed=packed,
    )
    positions_S = torch.tensor(chunk.scored, device=model.device)
    scores_SV: torch.Tensor = model.lm_head(output.last_hidden_state[0][positions_S]).float()
    return scores_SV.log_softmax(1), packed.token_ids_T[positions_S + 1]


def token_losses(model: LanguageModel, chunk: Chunk) -> torch.Tensor:
    """S float32: the cross-entropy of each scored token."""
    return nll_loss(*token_log_probabilities(model, chunk), reduction="none")


def _chunk(texts: list[tuple[list[int], str]], scored_share: float, generator: random.Random) -> Chunk:
    sequences = [ids for ids, _ in texts]
    return Chunk(sequences, _scored(sequences, scored_share, generator), [language for _, language in texts])


def _scored(sequences: list[list[int]], share: float, generator: random.Random) -> list[int]:
    ends = set(itertools.accumulate(len(ids) for ids in sequences))
    positions = [position for position in range(max(ends)) if position + 1 not in ends]
    return sorted(generator.sample(positions, min(len(positions), max(1, round(share * len(positions))))))
