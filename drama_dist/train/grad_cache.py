"""Gradient cache: any batch size in the memory of a few chunks (Gao et al. 2021, arXiv 2101.06983).

Texts are encoded in chunks of a token budget; the loss gives gradients for the embeddings; one
backward pass takes them through all chunks, so that ranks reduce their gradients once a step, however
many chunks each has. The graphs of as many chunks as the activation budget holds are kept; the others are
checkpoints: encoded again when the backward pass reaches them. Either way the gradients are the same.
Autograd adds the chunks' gradients in the weights' precision: in bfloat16 keep to at most some hundred chunks.

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
from drama_dist.encoder.packing import pack, token_budget_chunks
from drama_dist.engine import Engine
from drama_dist.train.memory import free_bytes

_SHARE_OF_FREE = 0.5  # what the budget "auto" takes; the rest is for one more chunk, the loss and the optimiser


class GradCache:
    """One step's sequences: `encode`, then `backward` with the embeddings' gradients.

    activation_budget: bytes that kept graphs may hold; None measures what is free when the longest
    chunk has been encoded.
    """

    def __init__(self, encoder: Encoder, engine: Engine, chunk_tokens: int, activation_budget: float | None):
        self.encoder, self.engine = encoder, engine
        self.chunk_tokens, self.activation_budget = chunk_tokens, activation_budget
        self.bytes_per_token: float | None = None
        self._sequences: Sequence[Sequence[int]] = ()
        self._encoded: list[tuple[list[int], torch.Tensor]] = []

    def encode(self, sequences: Sequence[Sequence[int]]) -> tuple[torch.Tensor, float]:
        """Embeddings of all sequences, n × K float32, in the given order and without graph; and the share of
        tokens that will be encoded twice.
        """
        self._sequences, self._encoded = sequences, []
        words = self._look_up(sequences)
        lengths = [len(sequence) for sequence in sequences]
        embeddings = torch.empty(len(sequences), self.encoder.hidden_size, device=self.encoder.device)
        held, repeated = 0.0, 0
        chunks = token_budget_chunks(lengths, self.chunk_tokens)
        if self.bytes_per_token is None:  # the longest texts need most
            self.bytes_per_token = self._measure(chunks[-1], words) / sum(lengths[place] for place in chunks[-1])
        for chunk in chunks:
            tokens = sum(lengths[position] for position in chunk)
            held += tokens * self.bytes_per_token
            keep = held <= self._budget()
            if not keep:
                repeated += tokens
            pooled = self._forward(chunk, words, keep)
            self._encoded.append((chunk, pooled))
            embeddings[chunk] = pooled.detach()
        return embeddings, repeated / sum(lengths)

    def backward(self, gradients: torch.Tensor) -> None:
        """Backpropagate the embeddings' gradients, n × K."""
        surrogate = torch.stack([(pooled * gradients[chunk]).sum() for chunk, pooled in self._encoded]).sum()
        self._encoded = []
        self.engine.backward(surrogate, last=True)

    def _budget(self) -> float:
        if self.activation_budget is None:
            self.activation_budget = _SHARE_OF_FREE * free_bytes(self.encoder.device)
        return self.activation_budget

    def _measure(self, chunk: list[int], words: _Words) -> float:
        """Bytes that autograd keeps for the backward pass of a chunk, without the weights."""
        weights = {weight.untyped_storage().data_ptr() for weight in self.encoder.parameters()}
        storages: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with saved_tensors_hooks(note, lambda tensor: tensor):
            graph = self._forward(chunk, words, keep=True)
        del graph
        return sum(storages.values())

    def _look_up(self, sequences: Sequence[Sequence[int]]) -> _Words:
        used_W = torch.tensor(
            sorted({token for sequence in sequences for token in sequence}), device=self.encoder.device
        )
        place_V = torch.zeros(self.encoder.backbone.config.vocab_size, dtype=torch.int64, device=used_W.device)
        place_V[used_W] = torch.arange(len(used_W), device=used_W.device)
        return _Words(place_V, self.encoder.backbone.embed_tokens(used_W))

    def _forward(self, chunk: list[int], words: _Words, keep: bool) -> torch.Tensor:
        packed = pack([self._sequences[position] for position in chunk], self.encoder.device)

        def encoded(embedding_WK: torch.Tensor) -> torch.Tensor:
            embedded: torch.Tensor = self.encoder(packed, embedding(words.place_V[packed.token_ids_T], embedding_WK))
            return embedded

        if keep:
            return encoded(words.embedding_WK)
        random = self.encoder.training and self.encoder.backbone.config.attention_dropout > 0
        return checkpoint(encoded, words.embedding_WK, use_reentrant=False, preserve_rng_state=random)


@dataclass(frozen=True)
class _Words:
    """place_V: row of each token id of the vocabulary among the step's words; embedding_WK: their embeddings."""

    place_V: torch.Tensor
    embedding_WK: torch.Tensor
