"""What one rank's training step costs, from its shapes: parameters, memory by part, operations. Traffic: traffic.py.

Memory is an estimate in simple terms, each named beside what it stands for; where it differs from what the code
allocates it is mostly larger. On two CPU cores it was 0.94 to 1.10 of what steps held (benchmarks/plan.py); on a GPU
nothing was measured. Does not cover what libraries hold (CUDA's context, NCCL's buffers), nor a batch's texts as Python
objects.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import torch

from drama_dist.distributed.precision import AUTO, dtype_name
from drama_dist.encoder.families import Config
from drama_dist.encoder.flops import forward_flops, layer_weights
from drama_dist.encoder.fused_layers import is_plain
from drama_dist.encoder.packing import token_budget_chunks
from drama_dist.kernels import select_backend
from drama_dist.kernels.llama_cpu import attention, layers
from drama_dist.plan.devices import Device
from drama_dist.settings import EncoderSettings, TrainSettings
from drama_dist.train.batches import share_of_passages
from drama_dist.train.grad_cache import SHARE_OF_FREE
from drama_dist.train.info_nce_term import gathers_queries

SINGLE = 4  # bytes of a float32
_INDEX = 8  # of an int64
_HOLES = 10**8  # bytes between blocks that the CPU's allocator keeps; the most seen was 1.2e8, in a step of 1.2e9
PARTS = ("weights", "optimiser", "gradients", "activations", "embeddings", "loss tiles", "exchange", "allocator")
Memory = Counter[str]  # bytes by part


@dataclass(frozen=True)
class StepCost:
    """A training step of rank 0, whose share of the batch is the largest.

    config: the encoder's backbone; a linear head is counted where regression gives it one. lengths: tokens of each of
    the rank's texts, of which no two are equal; lengths_from: where they come from.
    """

    config: Config
    encoder: EncoderSettings
    train: TrainSettings
    ranks: int
    device: Device
    lengths: tuple[int, ...]
    lengths_from: str

    @property
    def dtype(self) -> str:
        """bfloat16 or float32; `auto` is settled by this machine where the plan is for it."""
        return "bfloat16" if self.train.dtype == AUTO and not self.device.is_cpu else dtype_name(self.train.dtype)

    @property
    def weight_size(self) -> int:
        """Bytes of a weight, an activation or a gradient."""
        return SINGLE if self.dtype == "float32" else SINGLE // 2

    @property
    def embedding_parameters(self) -> int:
        return int(self.config.vocab_size * self.config.hidden_size)

    @property
    def layer_parameters(self) -> int:
        """Of all layers and the last norm."""
        hidden = self.config.hidden_size
        return int(self.config.num_hidden_layers * (layer_weights(self.config) + 2 * hidden) + hidden)

    @property
    def vector_size(self) -> int:
        """Components of the vectors."""
        return max(self.encoder.dims) if self.train.regression_weight else int(self.config.hidden_size)

    @property
    def head_parameters(self) -> int:
        """Of the linear head, which only regression has."""
        return self.vector_size * (int(self.config.hidden_size) + 1) if self.train.regression_weight else 0

    @property
    def parameters(self) -> int:
        return self.embedding_parameters + self.layer_parameters + self.head_parameters

    @property
    def batch(self) -> tuple[int, int]:
        """Queries and passages of all ranks."""
        return self.train.batch_size, passages_of_batch(self.train)

    @property
    def gathers_queries(self) -> bool:
        """Whether every rank has all queries for the loss, and its own passages; else all passages, and its queries."""
        return self.ranks > 1 and gathers_queries(*self.batch, self.vector_size, self.encoder, self.train)

    @property
    def scores_shape(self) -> tuple[int, int]:
        """Rows and columns of the scores that the rank forms."""
        queries, passages = self.batch
        if self.gathers_queries:
            return queries, largest_share(passages, self.ranks)
        return largest_share(queries, self.ranks), passages

    @cached_property
    def chunks(self) -> list[int]:
        """Tokens of each chunk, in the order in which they are encoded."""
        lengths = self.lengths
        return [sum(lengths[i] for i in chunk) for chunk in token_budget_chunks(lengths, self.train.chunk_tokens)]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @cached_property
    def kept_tokens(self) -> int:
        """Tokens whose graphs the activation budget holds, as GradCache goes through the chunks."""
        kept, most = 0, self.activation_budget / self.graph_bytes
        for tokens in self.chunks:
            kept += tokens * (kept + tokens <= most)
        return kept

    @property
    def activation_budget(self) -> float:
        """Bytes for kept graphs; "auto", as in GradCache: a share of what the longest chunk's graph leaves free."""
        if self.train.activation_budget != AUTO:
            return float(self.train.activation_budget) * 2**30
        held = self.state.total() + self._embedding_bytes + max(self.chunks) * self.graph_bytes
        return max(0.0, SHARE_OF_FREE * (self.device.memory - held))

    @property
    def layer_bytes(self) -> int:
        """What autograd keeps of a layer for each token."""
        config, size = self.config, self.weight_size
        hidden, inner = config.hidden_size, config.intermediate_size
        attended, keys = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
        of_attention = size * (2 * attended + 2 * keys) + SINGLE * config.num_attention_heads  # with its normalisers
        if self.device.is_cpu and self.train.zero_stage < 3 and layers_fuse(config):  # ZeRO 3's hooks undo the fusing
            return int(of_attention + size * (2 * hidden + 2 * inner))  # both parts' inputs; gate and up
        # The input in float32, the normalised, the result; a factor.
        norms = 2 * (hidden * (SINGLE + 2 * size) + SINGLE)
        return int(of_attention + norms + size * (attended + 4 * inner))  # by token; gate, its silu, up, the product

    @property
    def graph_bytes(self) -> int:
        """What a chunk's graph holds for each token: what GradCache measures."""
        config, size = self.config, self.weight_size
        ends = config.hidden_size * (2 * SINGLE + size) + SINGLE + 2 * _INDEX  # the last norm; pooling; token ids
        if self.train.checkpoint_layers:
            return int(config.num_hidden_layers * size * config.hidden_size + ends)
        return int(config.num_hidden_layers * self.layer_bytes + 2 * size * config.head_dim + ends)  # rotary embeddings

    @property
    def state(self) -> Memory:
        """Weights and optimiser, held all the time; with ZeRO 3 a buffer for this rank's gradients, too."""
        count, stage = self.parameters, self.train.zero_stage
        split = largest_share(count, self.ranks)
        optimiser = 3 * SINGLE * split if stage else 2 * SINGLE * count  # moments; with ZeRO float32 weights, too
        return Counter(
            weights=self.weight_size * (split if stage == 3 else count),
            optimiser=0 if self.offloaded_bytes else optimiser,
            gradients=self.weight_size * split if stage == 3 else 0,
        )

    @property
    def offloaded_bytes(self) -> int:
        """In the machine's memory, for each rank: master weights, moments and gradients in float32."""
        offloads = self.train.offload_optimizer and self.train.zero_stage > 0
        return 4 * SINGLE * largest_share(self.parameters, self.ranks) * offloads

    @cached_property
    def phases(self) -> dict[str, Memory]:
        """Memory by part in the loss, the backward pass and the update; encoding needs less than the backward pass.

        On the CPU the process is taken to keep what the backward pass has freed, except with ZeRO 3, where the engine
        has it given back (engine.py).
        """
        whole_weights = self.weight_size * self.parameters if self.train.zero_stage == 3 and self.ranks > 1 else 0
        held = self.state + Counter(embeddings=self._embedding_bytes, exchange=whole_weights)
        loss = held + Counter(activations=self.kept_tokens * self.graph_bytes) + self._loss_parts
        backward = held + Counter(
            activations=self._graphs, gradients=self.weight_size * (self.layer_parameters + self.head_parameters)
        )
        update = self.state + Counter(gradients=self._update_bytes)
        if self.device.is_cpu and self.train.zero_stage < 3:
            update |= backward + Counter(allocator=_HOLES)
        return {"loss": loss, "backward": backward, "update": update}

    @property
    def peak(self) -> tuple[str, Memory]:
        """The phase that needs most, and its memory by part."""
        return max(self.phases.items(), key=lambda phase: phase[1].total())

    @property
    def fits(self) -> bool:
        return self.peak[1].total() <= self.device.memory

    @property
    def operations(self) -> float:
        """Of a step of this rank, loss included: forward, backward (twice that), and what is computed again."""
        again = 1 - self.kept_tokens / self.tokens + self.train.checkpoint_layers
        return forward_flops(self.config, self.lengths) * (3 + again) + self.loss_operations

    @property
    def loss_operations(self) -> float:
        """Of the products of scores and of both gradients."""
        rows, columns = self.scores_shape
        return 3 * 2.0 * rows * columns * max(self.encoder.dims)

    @property
    def _embedding_bytes(self) -> int:
        """Different tokens and, twice, texts' vectors, with gradients; an index by token; token ids and positions."""
        hidden, different = self.config.hidden_size, min(self.tokens, self.config.vocab_size)
        integers = _INDEX * (self.config.vocab_size + 2 * self.tokens)
        return int(
            2 * self.weight_size * different * hidden + integers + 4 * SINGLE * len(self.lengths) * self.vector_size
        )

    @property
    def _loss_parts(self) -> Memory:
        rows, columns = self.scores_shape
        gathered = rows if self.gathers_queries else columns
        backend = select_backend(torch.device("cpu" if self.device.is_cpu else "cuda"), torch.float32)
        tiles = backend.held_bytes(rows, columns, self.encoder.dims, torch.get_num_threads())
        copies = 3 * gathered if self.ranks > 1 else 0  # each rank's part padded, the parts, and joined
        return Counter({"loss tiles": tiles, "exchange": copies * SINGLE * self.vector_size})

    @property
    def _graphs(self) -> int:
        """Kept graphs and one more of the longest chunk, with the widest operands of a layer's backward pass."""
        longest, config = max(self.chunks), self.config
        graphs = min(self.tokens, self.kept_tokens + longest) * self.graph_bytes
        operands = longest * self.weight_size * (4 * config.hidden_size + 3 * config.intermediate_size)
        return int(graphs + operands + longest * self.layer_bytes * self.train.checkpoint_layers)

    @property
    def _update_bytes(self) -> int:
        """Gradients of the rank's part, and the largest of what is made of them."""
        size, stage = self.weight_size, self.train.zero_stage
        count, embeddings = self.parameters, self.embedding_parameters
        if stage == 0:
            return 2 * size * count  # DeepSpeed lays them side by side before it reduces them, even on one rank
        split = largest_share(count, self.ranks)
        made = [
            size * embeddings,
            0 if self.offloaded_bytes else (SINGLE + 2) * split,
        ]  # in float32, and as new weights
        if stage == 3:
            return max(made)
        made += [8 * min(split, embeddings)]  # for a norm, in float64
        made += [size * count] if self.device.is_cpu and self.ranks > 1 else []  # gloo copies what it gathers
        return size * min(count, split + embeddings) + max(made)  # a matrix of which another rank has a part is whole


def passages_of_batch(train: TrainSettings) -> int:
    """Positives and hard negatives of a batch of all ranks that are encoded."""
    return share_of_passages(round(train.batch_size * (1 + train.hard_negatives)), train.passage_share)


def largest_share(count: int, ranks: int) -> int:
    """What a rank has at most of something split over ranks."""
    return -(-count // ranks)


def layers_fuse(config: Config) -> bool:
    """Whether this machine's CPU trains such an encoder with fused layers and its own attention."""
    fits = is_plain(config) and layers.fits(config.hidden_size, config.intermediate_size, config.head_dim)
    own = config.head_dim == attention.HEAD and config.num_attention_heads == config.num_key_value_heads
    return fits and own and layers.extension() is not None and attention.extension() is not None
