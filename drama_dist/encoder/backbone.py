"""The encoder: a Llama-type backbone with packed attention, mean pooling and the Matryoshka cut.

Covers loading (with a probe that refuses causal attention and leaks between packed sequences),
encoding texts to unit vectors, and saving. Training wraps this same module. Shapes: T tokens,
B sequences, K hidden components.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from drama_dist.distributed import ranks
from drama_dist.encoder import attention
from drama_dist.encoder.contract import check_dims, read_contract, wire_tokenizer, write_contract
from drama_dist.encoder.fused_layers import fuse_layers
from drama_dist.encoder.packing import Packed, filled, pack, token_budget_chunks
from drama_dist.encoder.pooling import mean_pool, unit_vectors
from drama_dist.encoder.sources import resolve
from drama_dist.encoder.threads import side_by_side
from drama_dist.run.progress import Progress
from drama_dist.settings import EncoderSettings

_TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 8192}  # what stays in a CPU's cache is fastest: benchmarks/encode.py
_TOKENS_PER_THREAD = 1024  # the same, of a CPU thread with chunks of its own
_LEAST_PER_THREAD = 256  # with fewer every thread reads all weights for too little


class LeakError(RuntimeError):
    """Attention is causal where it must be bidirectional, or packed sequences see each other."""


class Encoder(nn.Module):
    """A backbone with its tokenizer and contract.

    Calling it with packed sequences gives pooled float32 vectors, B × K, not normalised: the
    training loss and the Matryoshka cut normalise for each dim.
    """

    def __init__(self, backbone: LlamaModel, tokenizer: PreTrainedTokenizerBase, contract: EncoderSettings):
        super().__init__()
        backbone.config._attn_implementation = attention.NAME
        self.backbone = backbone
        self.tokenizer = wire_tokenizer(tokenizer)
        self.contract = check_dims(contract, backbone.config.hidden_size, "the encoder")
        self.tokens_per_batch: int | None = None  # None: what suits the device

    @property
    def hidden_size(self) -> int:
        return int(self.backbone.config.hidden_size)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def checkpoint_layers(self) -> None:
        """From now on keep only each layer's input for the backward pass, and compute the layer again there."""
        self.train()  # transformers checkpoints layers in training mode only
        self.backbone.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})

    def hidden_states(self, packed: Packed, embedded_TK: torch.Tensor | None = None) -> torch.Tensor:
        """Last hidden states of all tokens, T × K, in the backbone's dtype.

        embedded_TK: the tokens' embeddings, where the caller has looked them up already.
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

    def forward(self, packed: Packed) -> torch.Tensor:
        return mean_pool(self.hidden_states(packed), packed)

    def tokenize_queries(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of BOS + query prefix + text + EOS, cut at max_query_tokens, EOS kept."""
        return self._tokenize(texts, self.contract.query_prefix, self.contract.max_query_tokens)

    def tokenize_passages(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of BOS + passage prefix + text + EOS, cut at max_passage_tokens, EOS kept."""
        return self._tokenize(texts, self.contract.passage_prefix, self.contract.max_passage_tokens)

    def _tokenize(self, texts: Sequence[str], prefix: str, limit: int) -> list[list[int]]:
        if not texts:
            return []
        ids: list[list[int]] = self.tokenizer(
            [prefix + text for text in texts], truncation=True, max_length=limit, return_attention_mask=False
        )["input_ids"]
        return ids

    def encode_queries(self, texts: Sequence[str], dim: int | None = None) -> np.ndarray:
        """Unit vectors of queries, float32 (n, dim); dim None is the hidden size.

        Raises ValueError where dim is larger than the hidden size.
        """
        return self._encode(self.tokenize_queries(texts), dim)

    def encode_passages(
        self, texts: Sequence[str], dim: int | None = None, progress: Progress | None = None
    ) -> np.ndarray:
        """Unit vectors of passages, float32 (n, dim); dim None is the hidden size.

        progress: told the number of texts of each batch when they are encoded.
        Raises ValueError where dim is larger than the hidden size.
        """
        return self._encode(self.tokenize_passages(texts), dim, progress)

    def pack(self, sequences: Sequence[Sequence[int]]) -> Packed:
        """Pack token id lists for this encoder, perhaps with one sequence more at the end, of which to take nothing.

        In bfloat16 on the CPU oneDNN compiles its products for each number of tokens, which takes time, and keeps a
        thousand of them, which took 0.8 GB in a training step.
        """
        compiles = self.device.type == "cpu" and self.backbone.dtype == torch.bfloat16
        return pack(filled(sequences) if compiles and self._fixed_positions() else sequences, self.device)

    @torch.no_grad()
    def _encode(self, sequences: list[list[int]], dim: int | None, progress: Progress | None = None) -> np.ndarray:
        vectors_ND = np.zeros((len(sequences), dim or self.hidden_size), dtype=np.float32)

        def encode(chunk: list[int]) -> int:
            packed = self.pack([sequences[position] for position in chunk])
            vectors_ND[chunk] = unit_vectors(self.hidden_states(packed), packed, vectors_ND.shape[1])[: len(chunk)]
            return len(chunk)

        own, shared = self._cut([len(ids) for ids in sequences])
        with closing(side_by_side(encode, own)) as counts:
            for count in chain(counts, map(encode, shared)):
                if progress is not None:
                    progress(count)
        return vectors_ND

    def _cut(self, lengths: list[int]) -> tuple[list[list[int]], list[list[int]]]:
        """Chunks of which each CPU thread takes its own, where there are enough, and chunks that all threads share.

        A set number of tokens is what all threads hold together; longer sequences than a thread's part are shared.
        """
        budget = self.tokens_per_batch or _TOKENS_PER_BATCH[self.device.type]
        threads = torch.get_num_threads() if self._thread_safe() else 1
        part = min(_TOKENS_PER_THREAD, (self.tokens_per_batch or threads * _TOKENS_PER_THREAD) // threads)
        if threads > 1 and part >= _LEAST_PER_THREAD:
            chunks = token_budget_chunks(lengths, part)
            own = [chunk for chunk in chunks if lengths[chunk[-1]] <= part]
            if len(own) >= 2 * threads:
                long = [position for (position,) in chunks[len(own) :]]
                shared = token_budget_chunks([lengths[position] for position in long], budget)
                return own[::-1], [[long[place] for place in chunk] for chunk in shared]  # the longest first
        return [], token_budget_chunks(lengths, budget)

    def _thread_safe(self) -> bool:
        """Whether calls from several threads at once do the same as one call after another from the caller's."""
        return (
            self.device.type == "cpu"
            and not torch.is_autocast_enabled("cpu")  # a thread's own
            and self._fixed_positions()
            and not any(module._forward_hooks or module._forward_pre_hooks for module in self.modules())
        )

    def _fixed_positions(self) -> bool:
        """Whether a token's rotation is the same whatever lengths come with it, and came before."""
        rope = self.backbone.rotary_emb.rope_type
        return not ("dynamic" in rope or rope == "longrope")

    def save(self, folder: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
        """Write weights (safetensors), tokenizer and contract; `load` and transformers read them back.

        weights: by this module's names, in the place of its own, which may be split over ranks or rounded.
        """
        backbone = self.backbone
        if weights is not None:
            with torch.device("meta"):
                backbone = LlamaModel(self.backbone.config)
            prefix = "backbone."
            backbone.load_state_dict(
                {name.removeprefix(prefix): values for name, values in weights.items()}, assign=True
            )
        backbone.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        write_contract(folder, self.contract)


def load(
    folder_or_name: str | Path,
    dtype: torch.dtype | str = torch.float32,
    contract: EncoderSettings | None = None,
    bidirectional: bool = True,
    device: torch.device | str | None = None,
) -> Encoder:
    """Load an encoder: one of ours, a Llama-type sentence-transformers or Hugging Face folder, GGUF, or hub name.

    contract: replaces the folder's own. bidirectional: False keeps a language model causal, as it is.
    Raises ValueError where the model is not of Llama type, LeakError where the probe fails.
    """
    source = resolve(str(folder_or_name))
    config = _llama_config(source)
    config.is_causal = not bidirectional
    tokenizer = AutoTokenizer.from_pretrained(source)
    backbone = LlamaModel.from_pretrained(source, config=config, dtype=dtype, use_safetensors=True)
    folder = Path(source) if Path(source).is_dir() else Path(str(cached_file(source, "config.json"))).parent
    encoder = Encoder(backbone, tokenizer, contract or read_contract(folder, config.hidden_size))
    encoder.to(device or ranks.device()).eval()
    fuse_layers(encoder.backbone)
    probe(encoder)
    return encoder


def from_config(
    config: LlamaConfig, tokenizer: PreTrainedTokenizerBase, contract: EncoderSettings, seed: int
) -> Encoder:
    """A randomly initialised encoder of a given shape, bidirectional, float32."""
    config.is_causal = False
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder = Encoder(LlamaModel(config), tokenizer, contract)
    fuse_layers(encoder.backbone)
    return encoder.eval()


def random_twin(encoder: Encoder, seed: int) -> Encoder:
    """A randomly initialised encoder of another's shape, tokenizer and contract."""
    config = AutoConfig.for_model(**encoder.backbone.config.to_dict())
    return from_config(config, encoder.tokenizer, encoder.contract, seed).to(encoder.device)


@torch.no_grad()
def probe(encoder: Encoder) -> None:
    """Check by experiment what attention sees; raises LeakError.

    The last token of a sequence must move the first position's output exactly where the config says
    bidirectional, and must not move another packed sequence's.
    """
    half = min(1000, encoder.backbone.config.vocab_size // 2)
    first, second = list(range(3, 11)), list(range(12, 21))
    changed = [*first[:-1], first[-1] + half]
    before, after = (encoder.hidden_states(pack([ids, second], encoder.device)).float() for ids in (first, changed))
    sees_ahead = not torch.equal(before[0], after[0])
    if sees_ahead == encoder.backbone.config.is_causal:
        raise LeakError(
            f"attention is {'causal' if not sees_ahead else 'bidirectional'}, but the config says "
            f"is_causal={encoder.backbone.config.is_causal}; this transformers version does not honour it"
        )
    if not torch.equal(before[len(first) :], after[len(first) :]):
        raise LeakError("a packed sequence's output depends on its neighbour: packed attention leaks")


def _llama_config(source: str) -> LlamaConfig:
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    if not isinstance(config, LlamaConfig):
        raise ValueError(f"{source}: model type {config.model_type!r}; the encoder takes Llama-type models")
    return config
