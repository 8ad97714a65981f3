"""Gradient cache: any batch size in the memory of a few chunks (Gao et al. 2021, arXiv 2101.06983).

Texts are encoded in chunks of a token budget, equal ones once; the loss gives gradients for the embeddings; one
backward pass takes them through all chunks, so that ranks reduce their gradients once a step, however many chunks
each has. The graphs of as many chunks as the activation budget holds are kept; the others are checkpoints: encoded
again when the backward pass reaches them. Either way the gradients are the same. Autograd adds the chunks' gradients
in the weights' precision: in bfloat16 keep to at most some hundred chunks.

The step's vocabulary, the token ids that come in it, is looked up once, and chunks take their tokens' embeddings from
there: a chunk's gradient of them is then as large as the step's vocabulary, not as the model's.
Shapes: N sequences, T tokens of a chunk, W token ids of the step's vocabulary, V of the model's, K components.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import embedding
from torch.utils.checkpoint import checkpoint

from drama_dist.distributed import ranks
from drama_dist.distributed.engine import Engine
from drama_dist.encoder.backbone import Encoder
from drama_dist.encoder.packing import Packed, token_budget_chunks
from drama_dist.train.memory import free_bytes

SHARE_OF_FREE = 0.5  # what the budget "auto" takes; the rest is for one more chunk, the loss and the optimiser


class GradCache:
    """One step's sequences: `encode`, then `backward` with the embeddings' gradients.

    activation_budget: bytes that kept graphs may hold; None measures what is free when the
    longest chunk's graph has been tried.
    """

    def __init__(self, encoder: Encoder, engine: Engine, chunk_tokens: int, activation_budget: float | None):
        self.encoder, self.engine = encoder, engine
        self.chunk_tokens, self.activation_budget = chunk_tokens, activation_budget
        self.held_bytes = 0  # by the graphs of the last `encode`
        self._bytes_per_token = math.inf  # the most that was seen; not yet known
        self._row_of = self._times = torch.empty(0, dtype=torch.int64)  # of each text; how often a row's text comes
        self._encoded: list[tuple[list[int], torch.Tensor]] = []

    def encode(self, sequences: Sequence[Sequence[int]]) -> Encoded:
        """Encode all sequences, in the given order."""
        row_of: dict[tuple[int, ...], int] = {}
        rows = [row_of.setdefault(tuple(sequence), len(row_of)) for sequence in sequences]
        self._row_of, self._encoded = torch.tensor(rows, device=self.encoder.device), []
        self._times = self._row_of.bincount()
        distinct = list(row_of)
        lengths = [len(sequence) for sequence in distinct]
        embeddings = torch.empty(len(distinct), self.encoder.size, device=self.encoder.device)
        vocabulary = self._look_up(distinct)
        chunks = token_budget_chunks(lengths, self.chunk_tokens)
        packs = [self.encoder.pack([distinct[row] for row in chunk]) for chunk in chunks]
        self._try_longest(packs[-1], vocabulary)
        for _ in range(self._missing(len(chunks))):  # the shortest text again, of which nothing is taken
            chunks.insert(0, [])
            packs.insert(0, self.encoder.pack([min(distinct, key=len)]))
        self.held_bytes, repeated = 0, 0
        for chunk, packed in zip(chunks, packs, strict=True):
            tokens = sum(packed.lengths)
            if self._keeps(tokens):
                pooled, held = self._keep(packed, vocabulary)
                self.held_bytes += held
                self._bytes_per_token = max(self._bytes_per_token, held / tokens)
            else:
                pooled = self._forward(packed, vocabulary, keep=False)
                repeated += sum(lengths[row] for row in chunk)
            self._encoded.append((chunk, pooled[: len(chunk)]))
            embeddings[chunk] = pooled[: len(chunk)].detach()
        return Encoded(embeddings[self._row_of], lengths, repeated / sum(lengths))

    def backward(self, gradients: torch.Tensor) -> None:
        """Backpropagate the embeddings' gradients, n × K."""
        of_rows = torch.segment_reduce(gradients[self._row_of.argsort(stable=True)], "sum", lengths=self._times)
        surrogate = torch.stack([(pooled * of_rows[chunk]).sum() for chunk, pooled in self._encoded]).sum()
        self._encoded = []
        self.engine.backward(surrogate, last=True)

    def _missing(self, chunks: int) -> int:
        """Where ranks go in lockstep, how many chunks fewer than the rank with the most has."""
        return max(ranks.on_every_rank(chunks)) - chunks if self.engine.lockstep else 0

    def _keeps(self, tokens: int) -> bool:
        """Whether the budget holds the graph of so many tokens more; in lockstep, everybody's."""
        exceeds = self.held_bytes + tokens * self._bytes_per_token > self._budget()
        return not (max(ranks.on_every_rank(int(exceeds))) if self.engine.lockstep else exceeds)

    def _budget(self) -> float:
        if self.activation_budget is None:
            self.activation_budget = SHARE_OF_FREE * free_bytes(self.encoder.device)
        return self.activation_budget

    def _try_longest(self, packed: Packed, vocabulary: _Vocabulary) -> None:
        """Before anything is kept, see what the longest texts need: the most for each token."""
        if math.isinf(self._bytes_per_token) and self.activation_budget != 0:
            _, held = self._keep(packed, vocabulary)
            self._bytes_per_token = held / sum(packed.lengths)

    def _keep(self, packed: Packed, vocabulary: _Vocabulary) -> tuple[torch.Tensor, int]:
        """Encode a chunk with its graph; and the bytes that the graph holds, without the weights."""
        storages: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            if isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter):
                return tensor  # with ZeRO 3 its storage comes and goes
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            return tensor.detach()  # the tensor itself could hold the graph that holds it

        with saved_tensors_hooks(note, lambda tensor: tensor):
            pooled = self._forward(packed, vocabulary, keep=True)
        return pooled, sum(storages.values())

    def _look_up(self, sequences: Sequence[Sequence[int]]) -> _Vocabulary:
        device = self.encoder.device
        token_ids_W = torch.tensor(sorted({token for sequence in sequences for token in sequence}), device=device)
        row_V = torch.zeros(self.encoder.backbone.config.vocab_size, dtype=torch.int64, device=device)
        row_V[token_ids_W] = torch.arange(len(token_ids_W), device=device)
        return _Vocabulary(row_V, self.encoder.backbone.embed_tokens(token_ids_W))

    def _forward(self, packed: Packed, vocabulary: _Vocabulary, keep: bool) -> torch.Tensor:
        def encoded(embedding_WK: torch.Tensor) -> torch.Tensor:
            embedded_TK = embedding(vocabulary.row_V[packed.token_ids_T], embedding_WK)
            return self.encoder.vectors(packed, embedded_TK)

        if keep:
            return encoded(vocabulary.embedding_WK)
        random = self.encoder.training and self.encoder.backbone.config.attention_dropout > 0
        return checkpoint(encoded, vocabulary.embedding_WK, use_reentrant=False, preserve_rng_state=random)


@dataclass(frozen=True)
class Encoded:
    """embeddings_NK: float32, without graph. lengths: of the sequences that were encoded, in tokens; of these tokens
    the `recomputed` share will be encoded twice.
    """

    embeddings_NK: torch.Tensor
    lengths: list[int]
    recomputed: float


@dataclass(frozen=True)
class _Vocabulary:
    """Of a step. row_V: of each of the model's token ids; embedding_WK: the rows."""

    row_V: torch.Tensor
    embedding_WK: torch.Tensor
