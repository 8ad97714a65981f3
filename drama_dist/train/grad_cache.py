"""Gradient cache: any batch size in the memory of a few chunks (Gao et al. 2021, arXiv 2101.06983).

Texts are encoded in chunks of a token budget; the loss gives gradients for the embeddings; each
chunk is then backpropagated with its own. The graphs of as many chunks as `kept_tokens` allows are
kept from the first pass, and only the rest is encoded again. The encoder runs without dropout,
so the second encoding equals the first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from drama_dist import ranks
from drama_dist.encoder.backbone import Encoder
from drama_dist.encoder.packing import pack, token_budget_chunks
from drama_dist.engine import Engine


class GradCache:
    """One step's sequences: `encode`, then `backward` with the embeddings' gradients."""

    def __init__(self, encoder: Encoder, engine: Engine, chunk_tokens: int, kept_tokens: int):
        self.encoder, self.engine = encoder, engine
        self.chunk_tokens, self.kept_tokens = chunk_tokens, kept_tokens
        self._sequences: Sequence[Sequence[int]] = ()
        self._chunks: list[list[int]] = []
        self._kept: dict[int, torch.Tensor] = {}

    def encode(self, sequences: Sequence[Sequence[int]]) -> torch.Tensor:
        """Embeddings of all sequences, n × K float32, without graph, in the given order."""
        self._sequences = sequences
        lengths = [len(sequence) for sequence in sequences]
        self._chunks = _equally_many(token_budget_chunks(lengths, self.chunk_tokens))
        embeddings = torch.empty(len(sequences), self.encoder.hidden_size, device=self.encoder.device)
        budget = self.kept_tokens
        for number, chunk in enumerate(self._chunks):
            tokens = sum(lengths[position] for position in chunk)
            keep = tokens <= budget
            with torch.set_grad_enabled(keep):
                pooled = self._forward(chunk)
            if keep:
                self._kept[number] = pooled
                budget -= tokens
            embeddings[chunk] = pooled.detach()
        return embeddings

    def backward(self, gradients: torch.Tensor) -> float:
        """Backpropagate the embeddings' gradients, n × K; returns the share of tokens encoded twice."""
        order = [*self._kept, *(number for number in range(len(self._chunks)) if number not in self._kept)]
        repeated = 0
        for place, number in enumerate(order):
            chunk = self._chunks[number]
            if number in self._kept:
                pooled = self._kept.pop(number)
            else:
                pooled = self._forward(chunk)
                repeated += sum(len(self._sequences[position]) for position in chunk)
            surrogate = (pooled * gradients[chunk]).sum()
            self.engine.backward(surrogate, last=place == len(order) - 1)
        return repeated / sum(len(sequence) for sequence in self._sequences)

    def _forward(self, chunk: list[int]) -> torch.Tensor:
        pooled: torch.Tensor = self.encoder(pack([self._sequences[i] for i in chunk], self.encoder.device))
        return pooled


def _equally_many(chunks: list[list[int]]) -> list[list[int]]:
    """Split chunks until every rank has as many as the rank that needs most.

    ZeRO 2 reduces gradients in every backward call, so ranks must make equally many.
    """
    needed = max(ranks.on_every_rank(len(chunks)))
    while len(chunks) < needed:
        largest = max(range(len(chunks)), key=lambda number: len(chunks[number]))
        chunk = chunks.pop(largest)
        if len(chunk) == 1:
            raise ValueError(
                f"this rank has fewer sequences than another rank has chunks ({needed}): "
                "raise train.batch_size or train.chunk_tokens"
            )
        chunks[largest:largest] = [chunk[: len(chunk) // 2], chunk[len(chunk) // 2 :]]
    return chunks
