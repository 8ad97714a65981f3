"""What a training step costs by its shapes: parameters, memory by part, operations. Traffic is in traffic.py.

Every figure follows what the code allocates, named beside it; benchmarks/plan.py compares them with what was measured.
Does not cover what the libraries themselves hold, the batch's texts as Python objects, or what devices are (plan.py).

Shapes: W ranks; B queries and N passages of all ranks; K components, M dims, T tokens of this rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from drama_dist.encoder.packing import token_budget_chunks
from drama_dist.kernels import Backend, select_backend
from drama_dist.kernels.llama_cpu import attention, layers

SINGLE = 4  # bytes of a float32
INDEX = 8  # of an int64
_DOUBLE = 8  # DeepSpeed forms the norms of ZeRO 1 and 2 in float64
_MAPPED = 32 * 2**20  # glibc gives blocks from here on back at once; what is smaller stays with the process
PARTS = ("weights", "gradients", "optimiser", "activations", "embeddings", "loss tiles", "exchange", "freed, kept")
Memory = dict[str, float]  # bytes by part


@dataclass(frozen=True)
class Shape:
    """A Llama-type backbone without its language-model head."""

    vocabulary: int
    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    head: int
    inner: int

    @property
    def layer_matrices(self) -> list[int]:
        """Weights of a layer's products, in the order of its parameters."""
        query, key_value = self.heads * self.head, self.key_value_heads * self.head
        return [self.hidden * width for width in (query, key_value, key_value, query, *3 * [self.inner])]

    @property
    def layer_parameters(self) -> int:
        """Of all layers and the last norm."""
        return self.layers * (sum(self.layer_matrices) + 2 * self.hidden) + self.hidden

    @property
    def word_parameters(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        return self.word_parameters + self.layer_parameters


@dataclass(frozen=True)
class RankShare:
    """One rank's share of a step. lengths: tokens of each of its texts, of which no two are equal; words: different
    tokens among them. Queries and passages are those of all ranks, own ones the rank's.
    """

    ranks: int
    queries: int
    passages: int
    own_queries: int
    own_passages: int
    lengths: tuple[int, ...]
    words: int
    dims: tuple[int, ...]

    @property
    def most_queries(self) -> int:
        return -(-self.queries // self.ranks)

    @property
    def most_passages(self) -> int:
        return -(-self.passages // self.ranks)


@dataclass(frozen=True)
class Way:
    """How it is done. size: bytes of a weight (4 without ZeRO); budget: bytes for kept graphs; threads: PyTorch's.

    loss: the backend that forms it. fused: the CPU's fused layers.
    bucket: elements that go over the network together.
    """

    size: int
    zero: int
    offload: bool
    chunk_tokens: int
    budget: float
    checkpoint_layers: bool
    queries_travel: bool
    loss: Backend
    fused: bool
    bucket: int
    threads: int

    @property
    def on_gpu(self) -> bool:
        return self.loss.name == "cuda"


@dataclass(frozen=True)
class Costs:
    """Everything that follows from a shape, a share and a way."""

    shape: Shape
    share: RankShare
    way: Way

    @cached_property
    def chunks(self) -> list[int]:
        """Tokens of each chunk, in the order in which they are encoded."""
        lengths = self.share.lengths
        return [sum(lengths[i] for i in chunk) for chunk in token_budget_chunks(lengths, self.way.chunk_tokens)]

    @cached_property
    def kept(self) -> list[bool]:
        """Whether the budget holds each chunk's graph, as GradCache goes through them."""
        held, found = 0.0, []
        for tokens in self.chunks:
            found.append(held + tokens * self.graph_bytes <= self.way.budget)
            held += tokens * self.graph_bytes * found[-1]
        return found

    @property
    def tokens(self) -> int:
        return sum(self.share.lengths)

    @property
    def recomputed_tokens(self) -> int:
        return sum(tokens for tokens, kept in zip(self.chunks, self.kept, strict=True) if not kept)

    @property
    def layer_bytes(self) -> int:
        """What autograd keeps of a layer for each token."""
        shape, size = self.shape, self.way.size
        heads, pairs = shape.heads * shape.head, (shape.heads + 2 * shape.key_value_heads) * shape.head
        normalisers = SINGLE * shape.heads  # of attention
        if self._fused:  # both parts' inputs; queries, keys, values, and what attention gives; gate and up
            return size * (2 * shape.hidden + pairs + heads + 2 * shape.inner) + normalisers
        # Of each RMSNorm the input in float32, a factor, the normalised, the result; gate, its silu, up, the product.
        norms = 2 * (shape.hidden * (SINGLE + 2 * size) + SINGLE)
        copied = 0 if self.way.on_gpu else heads  # what attention gives, once more by token
        return norms + size * (pairs + heads + copied + 4 * shape.inner) + normalisers

    @property
    def graph_bytes(self) -> int:
        """What a chunk's graph holds for each token: GradCache measures the same."""
        shape, size = self.shape, self.way.size
        layer = size * shape.hidden if self.way.checkpoint_layers else self.layer_bytes
        last_norm = shape.hidden * (SINGLE + size) + SINGLE
        pooled = SINGLE * shape.hidden + INDEX  # index_add keeps what it adds
        rotary = 0 if self.way.checkpoint_layers else 2 * size * shape.head
        return shape.layers * layer + last_norm + pooled + rotary + INDEX

    @property
    def phases(self) -> dict[str, Memory]:
        """Memory by part while a step encodes, forms the loss, goes back, has all gradients, and updates."""
        return {
            "encoding": self._with(activations=self._kept_bytes + self._working(3), exchange=self._whole_weights),
            "loss": self._with(activations=self._kept_bytes, **self._loss_parts),
            "backward": self._backward,
            "gradients": self._gradients,
            "update": self._update,
        }

    @property
    def peak(self) -> tuple[str, Memory]:
        """The phase that needs most, and its memory by part."""
        return max(self.phases.items(), key=lambda item: sum(item[1].values()))

    @property
    def state(self) -> Memory:
        """Weights and optimiser, held all the time; with ZeRO 3 a place for this rank's gradients, too."""
        ranks, zero, size, count = self.share.ranks, self.way.zero, self.way.size, self.shape.parameters
        master = SINGLE if zero else 0  # weights in float32, which the optimiser changes
        optimiser = (master + 2 * SINGLE) * count / (ranks if zero else 1)
        split = ranks if zero == 3 else 1
        held = {"weights": size * count / split, "optimiser": 0 if self.offloads else optimiser}
        if zero == 3:
            held |= {"gradients": size * count / ranks, "exchange": self._bucket_bytes}
        return held

    @property
    def offloads(self) -> bool:
        return self.way.offload and self.way.zero > 0

    @property
    def offloaded_bytes(self) -> float:
        """In the machine's memory, for each rank: master weights, moments and gradients in float32."""
        return 4 * SINGLE * self.shape.parameters / self.share.ranks if self.offloads else 0

    @property
    def own_gradients(self) -> float:
        """When the backward pass is over: whole without ZeRO, else of the parameters that meet this rank's part."""
        size, count, ranks = self.way.size, self.shape.parameters, self.share.ranks
        if self.way.zero == 3:
            return 0
        if self.way.zero == 0 or ranks == 1:
            return size * count
        return size * max(sum(whole for whole, _ in self._parts_of(rank)) for rank in self._example_ranks)

    @property
    def operations(self) -> float:
        """Of a step of this rank, loss included: forward, backward (twice that), and what is computed again."""
        forward = self._forward_operations(self.share.lengths)
        again = forward * (self.recomputed_tokens / self.tokens + self.way.checkpoint_layers)
        return 3 * forward + again + self.loss_operations

    @property
    def loss_operations(self) -> float:
        """Of the products of scores and of both gradients."""
        rows, columns = self.loss_shape
        return 3 * 2.0 * rows * columns * max(self.share.dims)

    @property
    def loss_shape(self) -> tuple[int, int]:
        """Rows and columns of the scores that this rank forms."""
        share = self.share
        return (share.queries, share.own_passages) if self.way.queries_travel else (share.own_queries, share.passages)

    @property
    def _fused(self) -> bool:
        return self.way.fused and self.way.zero < 3  # ZeRO 3's hooks make fused layers give way

    def _forward_operations(self, lengths: tuple[int, ...]) -> float:
        shape = self.shape
        attention = 4.0 * shape.layers * shape.heads * shape.head * sum(length * length for length in lengths)
        return 2.0 * shape.layers * sum(shape.layer_matrices) * sum(lengths) + attention

    def _with(self, **parts: float) -> Memory:
        """The state, the step's words and vectors, and what a phase adds."""
        held = _add(dict.fromkeys(PARTS, 0.0), self.state)
        named = {name.replace("_", " "): count for name, count in parts.items()}
        return _add(_add(held, {"embeddings": self._embedding_bytes}), named)

    @property
    def _kept_bytes(self) -> float:
        return self.graph_bytes * (self.tokens - self.recomputed_tokens)

    @property
    def _fullest(self) -> tuple[float, float]:
        """Graphs and layers' gradients when both are most. The chunk encoded last goes back first, and has no gradients
        yet; there are a chunk's own graph, and those kept of chunks encoded earlier.
        """
        gradients, held, found = self.way.size * self.shape.layer_parameters, 0.0, []
        for number, (tokens, kept) in enumerate(zip(self.chunks, self.kept, strict=True), 1):
            found.append((held + tokens * self.graph_bytes, gradients * float(number < len(self.chunks))))
            held += tokens * self.graph_bytes * kept
        return max(found, key=sum)

    def _working(self, streams: int) -> float:
        """A feed-forward part's operands, the widest: rows of hidden size, and three of inner size."""
        return max(self.chunks) * self.way.size * (streams * self.shape.hidden + 3 * self.shape.inner)

    @property
    def _embedding_bytes(self) -> float:
        """Words looked up, their places, token ids and positions; vectors once by text and once in order."""
        hidden, texts = self.shape.hidden, len(self.share.lengths)
        words = self.way.size * self.share.words * hidden + INDEX * self.shape.vocabulary
        return words + 2 * INDEX * self.tokens + 2 * SINGLE * texts * hidden

    @property
    def _whole_weights(self) -> float:
        """ZeRO 3 keeps up to 10⁹ weights whole that it will need again."""
        most = min(self.shape.parameters, 10**9)
        return self.way.size * most if self.way.zero == 3 and self.share.ranks > 1 else 0

    @property
    def _bucket_bytes(self) -> float:
        """A copy of a bucket's gradients, which engine.py asks for where there are several ranks."""
        return self.way.size * self.way.bucket if self.share.ranks > 1 else 0

    @property
    def _copied_gradients(self) -> float:
        """Without ZeRO DeepSpeed lays all gradients side by side before it reduces them, even on one rank."""
        return self.way.size * self.shape.parameters if self.way.zero == 0 else self._bucket_bytes

    @property
    def _loss_parts(self) -> Memory:
        rows, columns = self.loss_shape
        travelling, own = (rows, self.share.most_queries)
        if not self.way.queries_travel:
            travelling, own = columns, self.share.most_passages
        width = self.shape.hidden * SINGLE
        several = self.share.ranks > 1
        return {
            "loss_tiles": self.way.loss.held_bytes(rows, columns, self.share.dims, self.way.threads),
            "exchange": width * (own * (self.share.ranks + 1) + travelling) * several,  # padded parts, and joined
        }

    @cached_property
    def _backward(self) -> Memory:
        return self._with(**self._backward_parts)

    @property
    def _backward_parts(self) -> Memory:
        graphs, gradients = self._fullest
        layer = self.layer_bytes * max(self.chunks) if self.way.checkpoint_layers else 0
        of_words = self.way.size * self.share.words * self.shape.hidden
        of_vectors = 2 * SINGLE * len(self.share.lengths) * self.shape.hidden
        return {
            "activations": graphs + layer + self._working(4),
            "gradients": gradients,
            "embeddings": of_words + of_vectors,
            "exchange": self._whole_weights,
        }

    @property
    def _gradients(self) -> Memory:
        """When the graphs are gone; where ranks share gradients out, the words' is there and in this rank's buffer."""
        words = self.way.size * self.shape.word_parameters if self.way.zero and self.share.ranks > 1 else 0
        held = self._with(gradients=self.own_gradients + words, exchange=self._copied_gradients)
        return self._later(held, [words, self._copied_gradients])

    @property
    def _update_blocks(self) -> list[list[float]]:
        """Beside gradients: what is there together for the norm, for float32 gradients, and for collecting weights."""
        count, size, ranks = self.shape.parameters, self.way.size, self.share.ranks
        narrow, wide = size * count / ranks, SINGLE * count / ranks
        if self.way.zero == 0:
            return [[]]
        if self.way.zero == 3:
            return [[wide, narrow]]
        norm = [_DOUBLE * float(max(own for rank in self._example_ranks for _, own in self._parts_of(rank)))]
        if self.offloads:
            return [norm]
        gathered = [] if self.way.on_gpu or ranks == 1 else [[float(size * count)]]  # gloo copies what it gathers
        return [norm, [narrow, wide] if size < SINGLE else [narrow], *gathered]

    @property
    def _update(self) -> Memory:
        start = _add(self.state, {"gradients": self.own_gradients})
        alternatives = [self._later(_add(start, {"gradients": sum(blocks)}), blocks) for blocks in self._update_blocks]
        return max(alternatives, key=lambda memory: sum(memory.values()))

    def _later(self, memory: Memory, blocks: Sequence[float]) -> Memory:
        """A phase after the backward pass, in which `blocks` are new.

        On the CPU the small blocks that the backward pass has freed stay with the process, and large ones come on top;
        not with ZeRO 3, where the engine has blocks of 64 KiB and more given back.
        """
        if self.way.on_gpu or self.way.zero == 3:
            return memory
        gradients: float = self.way.size * self.shape.word_parameters  # of the others each is smaller
        if self.way.zero and self.share.ranks > 1:
            gradients = self.own_gradients  # one buffer
        mapped = sum(block for block in (gradients, *blocks) if block >= _MAPPED)
        return _add(memory, {"freed, kept": max(0.0, sum(self._backward.values()) + mapped - sum(memory.values()))})

    @property
    def _example_ranks(self) -> range:
        """The ranks whose parts hold a piece of the words, and one more: they need most."""
        part = self.shape.parameters / self.share.ranks
        return range(min(self.share.ranks, int(self.shape.word_parameters / part) + 2))

    def _parts_of(self, rank: int) -> list[tuple[int, int]]:
        """(size, elements in the rank's part) of each matrix that meets the part that the rank's optimiser has."""
        sizes = [self.shape.word_parameters, *self.shape.layers * self.shape.layer_matrices]
        part = -(-sum(sizes) // self.share.ranks)
        begin, end, place, found = rank * part, (rank + 1) * part, 0, []
        for size in sizes:
            own = min(end, place + size) - max(begin, place)
            if own > 0:
                found.append((size, own))
            place += size
        return found


def loss_backend(on_gpu: bool) -> Backend:
    """The backend that the loss takes for float32 vectors: see Way."""
    return select_backend(torch.device("cuda" if on_gpu else "cpu"), torch.float32)


def layers_fuse(shape: Shape) -> bool:
    """Whether this machine's CPU trains such an encoder with fused layers and its own attention."""
    fits = layers.fits(shape.hidden, shape.inner, shape.head) and shape.head == attention.HEAD
    compiled = layers.extension() is not None and attention.extension() is not None
    return fits and compiled and shape.heads == shape.key_value_heads


def _add(memory: Memory, more: Mapping[str, float]) -> Memory:
    return {name: memory.get(name, 0.0) + more.get(name, 0.0) for name in PARTS}
