"""The encoder: a Llama-type backbone with packed attention, mean pooling and the Matryoshka cut.

Covers loading (with a probe that detects causal attention and leaks between packed sequences), encoding texts to unit
vectors, and saving. Training uses the same module. Shapes: T tokens, B sequences, K hidden components.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from contextlib import closing, nullcontext
from copy import deepcopy
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, PreTrainedTokenizerBase

from drama_dist.distributed import ranks
from drama_dist.encoder import attention
from drama_dist.encoder.contract import check_dims, read_contract, save_tokenizer, wire_tokenizer, write_contract
from drama_dist.encoder.families import Backbone, Config, backbone_class
from drama_dist.encoder.fused_layers import fuse_layers
from drama_dist.encoder.head import LinearHead, read_head, write_head
from drama_dist.encoder.packing import Packed, filled, pack, token_budget_chunks
from drama_dist.encoder.pooling import checked_dim, matryoshka_cut_array, mean_pool
from drama_dist.encoder.pretrained import absent_from, load_weights, read_llama_config, read_tokenizer
from drama_dist.encoder.sources import fetched, reachable, resolve
from drama_dist.encoder.texts import TextTokenizer, as_texts
from drama_dist.encoder.threads import side_by_side
from drama_dist.run.progress import Progress
from drama_dist.settings import EncoderSettings

_TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 8192}  # on a CPU the largest that stays in cache: benchmarks/encode.py
_TOKENS_PER_THREAD = 1024  # the same for a CPU thread that encodes chunks alone
_LEAST_PER_THREAD = 256  # with fewer tokens, reading all weights in every thread does not pay off
_ONE_AT_A_TIME = threading.Lock()  # for rotary embeddings that change with the texts: they are state of the backbone


class LeakError(RuntimeError):
    """Attention is causal instead of bidirectional (or the reverse), or packed sequences see each other."""


class Encoder(nn.Module):
    """A backbone with its tokenizer and contract.

    Calling it with packed sequences gives float32 vectors, B × J, not normalised: the training loss and the Matryoshka
    cut normalise for each dim. head: a linear map of the pooled states; without one these are the vectors. Several
    threads may tokenise and encode with one encoder at once.
    """

    def __init__(
        self,
        backbone: Backbone,
        tokenizer: PreTrainedTokenizerBase,
        contract: EncoderSettings,
        head: LinearHead | None = None,
    ):
        super().__init__()
        backbone.config._attn_implementation = attention.NAME
        self.backbone, self.head = backbone, head
        self._tokenizer = wire_tokenizer(tokenizer, contract.lower_case)
        self._token_ids = TextTokenizer(tokenizer)
        self.contract = check_dims(contract, self.size, "the encoder")
        self.tokens_per_batch: int | None = None  # None: what suits the device

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """What is saved with the encoder. It cannot be replaced: texts are tokenised by a copy of it."""
        return self._tokenizer

    @property
    def hidden_size(self) -> int:
        return int(self.backbone.config.hidden_size)

    @property
    def size(self) -> int:
        """Components of the vectors."""
        return self.hidden_size if self.head is None else self.head.out_features

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def checkpoint_layers(self) -> None:
        """Turn on activation checkpointing: store only each layer's input, and recompute the layer when going back."""
        self.train()  # transformers checkpoints layers in training mode only
        self.backbone.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})

    def hidden_states(self, packed: Packed, embedded_TK: torch.Tensor | None = None) -> torch.Tensor:
        """Last hidden states of all tokens, T × K, in the backbone's dtype.

        embedded_TK: the tokens' embeddings, if the caller has already looked them up.
        """
        if embedded_TK is None:
            embedded_TK = self.backbone.embed_tokens(packed.token_ids_T)
        output = self.backbone(
            inputs_embeds=embedded_TK.unsqueeze(0),
            position_ids=packed.position_ids_T.unsqueeze(0),
            use_cache=False,
            packed=packed,
        )
        hidden: torch.Tensor = output.last_hidden_state[0]
        return hidden

    def vectors(self, packed: Packed, embedded_TK: torch.Tensor | None = None) -> torch.Tensor:
        """B × J float32, not normalised; embedded_TK as in `hidden_states`."""
        pooled_BK = mean_pool(self.hidden_states(packed, embedded_TK), packed)
        vectors_BJ: torch.Tensor = pooled_BK if self.head is None else self.head(pooled_BK)
        return vectors_BJ

    def forward(self, packed: Packed) -> torch.Tensor:
        return self.vectors(packed)

    def tokenize_queries(self, texts: Iterable[str]) -> list[list[int]]:
        """Token ids of BOS, query prefix, text, EOS, cut at max_query_tokens, EOS kept; raises as `as_texts`."""
        return self._tokenize(texts, self.contract.query_prefix, self.contract.max_query_tokens)

    def tokenize_passages(self, texts: Iterable[str]) -> list[list[int]]:
        """Token ids of BOS, passage prefix, text, EOS, cut at max_passage_tokens, EOS kept; raises as `as_texts`."""
        return self._tokenize(texts, self.contract.passage_prefix, self.contract.max_passage_tokens)

    def _tokenize(self, texts: Iterable[str], prefix: str, limit: int) -> list[list[int]]:
        return self._token_ids([prefix + text for text in as_texts(texts)], limit)

    def encode_queries(self, texts: Iterable[str], dim: int | None = None) -> np.ndarray:
        """Unit vectors of queries, float32 (n, dim); dim None is all of them.

        Raises TypeError or ValueError for texts as `as_texts` does, for the dim as `checked_dim` does.
        """
        return self._encode(self.tokenize_queries(texts), dim)

    def encode_passages(
        self, texts: Iterable[str], dim: int | None = None, progress: Progress | None = None
    ) -> np.ndarray:
        """Unit vectors of passages, float32 (n, dim); dim None is all of them.

        progress: called with the number of texts of each encoded batch.
        Raises TypeError or ValueError for texts as `as_texts` does, for the dim as `checked_dim` does.
        """
        return self._encode(self.tokenize_passages(texts), dim, progress)

    def pack(self, sequences: Sequence[Sequence[int]]) -> Packed:
        """Pack token id lists for this encoder, possibly with a padding sequence at the end, to be ignored.

        In bfloat16 on the CPU oneDNN compiles its matrix products for each number of tokens, which takes time, and
        caches a thousand of them, which took 0.8 GB in a training step; padding rounds the numbers.
        """
        compiles = self.device.type == "cpu" and self.backbone.dtype == torch.bfloat16
        return pack(filled(sequences) if compiles and self._fixed_positions() else sequences, self.device)

    @torch.no_grad()
    def _encode(self, sequences: list[list[int]], dim: int | None, progress: Progress | None = None) -> np.ndarray:
        vectors_ND = np.zeros((len(sequences), checked_dim(dim, self.size)), dtype=np.float32)

        def encode(chunk: list[int]) -> int:
            packed = self.pack([sequences[position] for position in chunk])
            vectors_BJ = self.vectors(packed)[: len(chunk)].cpu().numpy()
            vectors_ND[chunk] = matryoshka_cut_array(vectors_BJ, vectors_ND.shape[1])
            return len(chunk)

        threaded, shared = self._chunks([len(ids) for ids in sequences])
        turn = nullcontext() if self._fixed_positions() else _ONE_AT_A_TIME
        with turn, closing(side_by_side(encode, threaded)) as counts:
            for count in chain(counts, map(encode, shared)):
                if progress is not None:
                    progress(count)
        return vectors_ND

    def _chunks(self, lengths: list[int]) -> tuple[list[list[int]], list[list[int]]]:
        """Chunks that one CPU thread each encodes, if there are enough of them, and chunks that all threads share.

        `tokens_per_batch` is divided among the threads; sequences longer than a thread's part are in shared chunks.
        """
        budget = self.tokens_per_batch or _TOKENS_PER_BATCH[self.device.type]
        threads = torch.get_num_threads() if self._thread_safe() else 1
        part = min(_TOKENS_PER_THREAD, (self.tokens_per_batch or threads * _TOKENS_PER_THREAD) // threads)
        if threads > 1 and part >= _LEAST_PER_THREAD:
            chunks = token_budget_chunks(lengths, part)
            threaded = [chunk for chunk in chunks if lengths[chunk[-1]] <= part]
            if len(threaded) >= 2 * threads:
                long = [position for (position,) in chunks[len(threaded) :]]
                shared = token_budget_chunks([lengths[position] for position in long], budget)
                return threaded[::-1], [[long[index] for index in chunk] for chunk in shared]  # longest first
        return [], token_budget_chunks(lengths, budget)

    def _thread_safe(self) -> bool:
        """Whether concurrent calls from several threads do the same as successive calls from the caller's thread."""
        return (
            self.device.type == "cpu"
            and not torch.is_autocast_enabled("cpu")  # autocast is per thread
            and self._fixed_positions()
            and not any(module._forward_hooks or module._forward_pre_hooks for module in self.modules())
        )

    def _fixed_positions(self) -> bool:
        """Whether rotary embeddings depend on positions only, not on the lengths in this batch or earlier ones."""
        rope = self.backbone.rotary_emb.rope_type
        return not ("dynamic" in rope or rope == "longrope")

    def save(self, folder: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
        """Write weights (safetensors), tokenizer and contract; `load` and transformers read them back.

        weights: written instead of this module's, by the same names: its own may be partitioned over ranks or rounded.
        """
        weights = self.state_dict() if weights is None else weights
        with torch.device("meta"):
            backbone = backbone_class(self.backbone.config)(self.backbone.config)
        backbone.load_state_dict(_within("backbone", weights), assign=True)
        backbone.save_pretrained(folder)
        if self.head is not None:
            write_head(folder, _within("head", weights))
        save_tokenizer(self.tokenizer, folder)
        write_contract(folder, self.contract)


def _within(module: str, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    prefix = f"{module}."
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def load(
    folder_or_name: str | Path,
    dtype: torch.dtype | str = torch.float32,
    contract: EncoderSettings | None = None,
    bidirectional: bool = True,
    device: torch.device | str | None = None,
) -> Encoder:
    """Load an encoder: one of ours, a Llama-type sentence-transformers or Hugging Face folder, GGUF, or hub name.

    contract: replaces the folder's. bidirectional: False keeps a language model causal. Code in the folder never runs.
    Raises FileNotFoundError if there is no such model, or files of it are missing; ValueError if it is not of Llama
    type, or its files are damaged or do not fit each other; LeakError if the probe fails.
    """
    resolved = resolve(str(folder_or_name))
    source = reachable(resolved)
    config = read_llama_config(source)
    config.is_causal = not bidirectional
    tokenizer = read_tokenizer(source, config)
    kind, absent = backbone_class(config), absent_from(source)
    backbone = load_weights(kind, source, trust_remote_code=False, optional=absent, config=config, dtype=dtype)
    folder = fetched(resolved)
    head = read_head(folder, config.hidden_size)
    size = config.hidden_size if head is None else head.out_features
    encoder = Encoder(backbone, tokenizer, contract or read_contract(folder, size), head)
    encoder.to(device or ranks.device()).eval()
    fuse_layers(encoder.backbone)
    probe(encoder)
    return encoder


def from_config(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    contract: EncoderSettings,
    seed: int,
    head: LinearHead | None = None,
) -> Encoder:
    """A randomly initialised encoder of a given shape, bidirectional, float32. head: its weights are drawn anew."""
    config.is_causal = False
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        backbone = backbone_class(config)(config)
        if head is not None:
            head.reset_parameters()
    encoder = Encoder(backbone, tokenizer, contract, head)
    fuse_layers(encoder.backbone)
    return encoder.eval()


def random_twin(encoder: Encoder, seed: int) -> Encoder:
    """A randomly initialised encoder of another's shape, linear head included, tokenizer and contract."""
    config = AutoConfig.for_model(**encoder.backbone.config.to_dict())
    head = deepcopy(encoder.head).cpu() if encoder.head is not None else None  # drawn by the CPU's generator
    return from_config(config, encoder.tokenizer, encoder.contract, seed, head).to(encoder.device)


@torch.no_grad()
def probe(encoder: Encoder) -> None:
    """Test what attention sees; raises LeakError, or ValueError where outputs are no numbers to compare.

    Changing the last token of a sequence must change outputs before it if and only if the config says bidirectional,
    and must not change another packed sequence's output. Layers that add nothing to the embeddings, as before training
    by regression, show nothing.
    """
    half = min(1000, encoder.backbone.config.vocab_size // 2)
    first, second = list(range(3, 11)), list(range(12, 21))
    changed = [*first[:-1], first[-1] + half]
    before, after = (encoder.hidden_states(pack([ids, second], encoder.device)).float() for ids in (first, changed))
    if not (before.isfinite().all() and after.isfinite().all()):
        raise ValueError(
            f"{encoder.backbone.name_or_path or 'the encoder'}: its outputs are NaN or infinite, in "
            f"{encoder.backbone.dtype}; its weights are damaged, or too large for this dtype: fetch the model again"
        )
    embedded_TK = encoder.backbone.embed_tokens(pack([first, second], encoder.device).token_ids_T)
    if torch.equal(encoder.backbone.norm(embedded_TK).float(), before):
        return
    earlier = slice(len(first) - 1)
    sees_ahead = not torch.equal(before[earlier], after[earlier])
    if sees_ahead == encoder.backbone.config.is_causal:
        raise LeakError(
            f"attention is {'causal' if not sees_ahead else 'bidirectional'}, but the config says "
            f"is_causal={encoder.backbone.config.is_causal}; this transformers version does not honour it"
        )
    if not torch.equal(before[len(first) :], after[len(first) :]):
        raise LeakError("a packed sequence's output depends on its neighbour: packed attention leaks")
