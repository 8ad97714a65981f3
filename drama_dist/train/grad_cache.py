"""Gradient cache: any batch size in the memory of a few chunks (Gao et al. 2021, arXiv 2101.06983).

Texts are encoded in chunks of a token budget, equal ones once; the loss gives gradients for the embeddings; one
backward pass takes them through all chunks, so that ranks reduce their gradients once a step, however many chunks
each has. The graphs of as many chunks as the activation budget holds are kept; the others are checkpoints: encoded
again when the backward pass reaches them. Either way the gradients are the same. Autograd adds the chunks' gradients
in the weights' precision: in bfloat16 keep to at most some hundred chunks.

The step's words are looked up once, and chunks take theirs from these: a chunk's gradient of the embeddings is
then as large as the step's words, not as the vocabulary. Shapes: W different words of a step, K components.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import embedding
from torch.utils.checkpoint import checkpoint

from drama_dist.encoder.backbone import Encoder
from drama_dist.encoder.packing import Packed, pack, token_budget_chunks
from drama_dist.encoder.pooling import mean_pool
from drama_dist.engine import Engine
from drama_dist.train.memory import free_bytes

_SHARE_OF_FREE = 0.5  # what the budget "auto" takes; the rest is for one more chunk, the loss and the optimiser


class GradCache:
    """One step's sequences: `encode`, then `backward` with the embeddings' gradients.

    activation_budget: bytes that kept graphs may hold; None measures what is free when the first chunk has been
    encoded.
    """

    def __init__(self, encoder: Encoder, engine: Engine, chunk_tokens: int, activation_budget: float | None):
        self.encoder, self.engine = encoder, engine
        self.chunk_tokens, self.activation_budget = chunk_tokens, activation_budget
        self.held_bytes = 0  # by the graphs of the last `encode`
        self._bytes_per_token: float | None = None  # of the longest texts, which need most
        self._row_of = torch.empty(0, dtype=torch.int64)
        self._encoded: list[tuple[list[int], torch.Tensor]] = []

    def encode(self, sequences: Sequence[Sequence[int]]) -> Encoded:
        """Encode all sequences, in the given order."""
        row_of: dict[tuple[int, ...], int] = {}
        rows = [row_of.setdefault(tuple(sequence), len(row_of)) for sequence in sequences]
        self._row_of, self._encoded = torch.tensor(rows, device=self.encoder.device), []
        distinct = list(row_of)
        lengths = [len(sequence) for sequence in distinct]
        embeddings = torch.empty(len(distinct), self.encoder.hidden_size, device=self.encoder.device)
        words = self._look_up(distinct)
        chunks = token_budget_chunks(lengths, self.chunk_tokens)
        packs = [pack([distinct[row] for row in chunk], self.encoder.device) for chunk in chunks]
        if self._bytes_per_token is None:
            self._bytes_per_token = self._measure(packs[-1], words)
        self.held_bytes, repeated = 0, 0
        for chunk, packed in zip(chunks, packs, strict=True):
            keep = self.held_bytes + sum(packed.lengths) * self._bytes_per_token <= self._budget()
            kept = _Kept(self.encoder)
            with kept:
                pooled = self._forward(packed, words, keep)
            if keep:
                self.held_bytes += kept.bytes
            else:
                repeated += sum(packed.lengths)
            self._encoded.append((chunk, pooled))
            embeddings[chunk] = pooled.detach()
        return Encoded(embeddings[self._row_of], lengths, repeated / sum(lengths))

    def backward(self, gradients: torch.Tensor) -> None:
        """Backpropagate the embeddings' gradients, n × K."""
        of_rows = gradients.new_zeros(int(self._row_of.max()) + 1, gradients.shape[1])
        of_rows.index_add_(0, self._row_of, gradients)
        surrogate = torch.stack([(pooled * of_rows[chunk]).sum() for chunk, pooled in self._encoded]).sum()
        self._encoded = []
        self.engine.backward(surrogate, last=True)

    def _budget(self) -> float:
        if self.activation_budget is None:
            self.activation_budget = _SHARE_OF_FREE * free_bytes(self.encoder.device)
        return self.activation_budget

    def _measure(self, longest: Packed, words: _Words) -> float:
        """Bytes for each token that autograd keeps for the backward pass of a chunk."""
        kept = _Kept(self.encoder)
        with kept:
            graph = self._forward(longest, words, keep=True)
        del graph
        return kept.bytes / sum(longest.lengths)

    def _look_up(self, sequences: Sequence[Sequence[int]]) -> _Words:
        used_W = torch.tensor(
            sorted({token for sequence in sequences for token in sequence}), device=self.encoder.device
        )
        place_V = torch.zeros(self.encoder.backbone.config.vocab_size, dtype=torch.int64, device=used_W.device)
        place_V[used_W] = torch.arange(len(used_W), device=used_W.device)
        return _Words(place_V, self.encoder.backbone.embed_tokens(used_W))

    def _forward(self, packed: Packed, words: _Words, keep: bool) -> torch.Tensor:
        def encoded(embedding_WK: torch.Tensor) -> torch.Tensor:
            embedded_TK = embedding(words.place_V[packed.token_ids_T], embedding_WK)
            return _pool(self.encoder.hidden_states(packed, embedded_TK), packed)

        if keep:
            return encoded(words.embedding_WK)
        random = self.encoder.training and self.encoder.backbone.config.attention_dropout > 0
        return checkpoint(encoded, words.embedding_WK, use_reentrant=False, preserve_rng_state=random)


def _pool(hidden_TK: torch.Tensor, packed: Packed) -> torch.Tensor:
    """B × K float32; of unit length where one kernel does both, which is the same to the loss."""
    if hidden_TK.is_cuda:
        from drama_dist.kernels.pooling import mean_pool_unit

        return mean_pool_unit(hidden_TK, packed.boundaries_B1, hidden_TK.shape[1])
    return mean_pool(hidden_TK, packed)


@dataclass(frozen=True)
class Encoded:
    """embeddings_NK: float32, without graph. lengths: of the sequences that were encoded, in tokens; of these tokens
    the `recomputed` share will be encoded twice.
    """

    embeddings_NK: torch.Tensor
    lengths: list[int]
    recomputed: float


@dataclass(frozen=True)
class _Words:
    """place_V: row of each token id of the vocabulary among the step's words; embedding_WK: their embeddings."""

    place_V: torch.Tensor
    embedding_WK: torch.Tensor


class _Kept(saved_tensors_hooks):
    """Counts the bytes that autograd saves inside, without the weights; each memory once."""

    def __init__(self, encoder: Encoder):
        weights = {weight.untyped_storage().data_ptr() for weight in encoder.parameters()}
        self._storages: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                self._storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        super().__init__(note, lambda tensor: tensor)

    @property
    def bytes(self) -> int:
        return sum(self._storages.values())
