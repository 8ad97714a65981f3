"""Packing: sequences of different lengths laid end to end, without padding.

Covers the packed form and dividing a set of sequences into chunks of a token budget.
Shapes: T tokens of all sequences together, B sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch


@dataclass(frozen=True)
class Packed:
    """B sequences end to end.

    token_ids_T, position_ids_T: int64, positions restart at 0 in every sequence.
    boundaries_B1: int32 (B + 1), where each sequence begins, and the end.
    """

    token_ids_T: torch.Tensor
    position_ids_T: torch.Tensor
    boundaries_B1: torch.Tensor
    lengths: tuple[int, ...]

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @cached_property
    def runs(self) -> list[tuple[int, int]]:
        """(number of sequences, length) of each run of adjacent sequences of equal length: one attention call each."""
        return [(len(list(members)), length) for length, members in groupby(self.lengths)]


def filled(sequences: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """The sequences and, if needed to round up the number of tokens, one more; it adds at most 1/16, or 8 tokens.

    For matrix products that are compiled, and cached, for each number of tokens.
    """
    tokens = sum(map(len, sequences))
    missing = -tokens % max(8, 1 << max(0, tokens.bit_length() - 5))
    return [*sequences, [0] * missing] if missing else list(sequences)


def pack(sequences: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> Packed:
    """Pack token id lists; raises ValueError if one is empty or there is none."""
    lengths = tuple(len(sequence) for sequence in sequences)
    if not lengths or min(lengths) == 0:
        raise ValueError(
            f"cannot pack {len(lengths)} sequences, shortest {min(lengths, default=0)}: each needs a token"
        )
    boundaries = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return Packed(
        torch.tensor([token for sequence in sequences for token in sequence], device=device),
        torch.cat([torch.arange(length) for length in lengths]).to(device),
        boundaries.to(device),
        lengths,
    )


def token_budget_chunks(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Divide sequences, sorted by length, into chunks of at most `budget` tokens.

    Returns positions in `lengths`, longest sequences last; a sequence longer than the budget gets its own chunk.
    """
    chunks: list[list[int]] = []
    filled = budget
    for position in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if filled + lengths[position] > budget:
            chunks.append([])
            filled = 0
        chunks[-1].append(position)
        filled += lengths[position]
    return chunks
