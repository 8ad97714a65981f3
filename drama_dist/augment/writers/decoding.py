"""Decoding a batch of answers by a model that is made of Llama's layers.

What all prompts of a batch begin with is read once for all of them, keys and values are written in place, and
answers that have ended leave the batch. Other models, and settings of generation beyond temperature, top-k and top-p,
are left to transformers' `generate`, which gives the same up to rounding.
Shapes: B answers, T tokens of the longest prompt, of which all prompts share the first P; S positions of a row's own:
the rest of its prompt, then its answer; N read at once, K hidden components, A heads in G groups of E, D head size, V
tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import DynamicCache, LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from drama_dist.augment.writers.writer import Sampling

_MODELS = (LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)
_ROPES = ("default", "linear", "llama3", "yarn")  # which do not depend on the longest text
_READ_AT_ONCE = 512  # tokens of prompts, padding among them: their attention scores are held
_CLOSED = torch.finfo(torch.float32).min / 2  # is added to scores: half, so that the sum stays finite
_TOP_K = 50  # of `generate`, where a model says nothing of it
# Settings of generation that are heeded here, that a sampling has in their place, or that change no answer.
_HEEDED = {
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "do_sample",
    "temperature",
    "top_p",
    "top_k",
    "max_length",
    "max_new_tokens",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "transformers_version",
    "_from_model_config",
}


def can_decode(model: Any) -> bool:
    """Whether answers of this model can be decoded here."""
    if type(model) not in _MODELS or "sliding_attention" in (getattr(model.config, "layer_types", None) or ()):
        return False
    return _HEEDED.issuperset(model.generation_config.to_diff_dict()) and model.model.rotary_emb.rope_type in _ROPES


@torch.no_grad()
def decode(
    model: Any,
    tokens_BT: torch.Tensor,
    mask_BT: torch.Tensor,
    cache: DynamicCache | None,
    sampling: Sampling,
    told: Callable[[int], object] | None,
) -> list[list[int]]:
    """The tokens of each answer, with the one that ends it, by torch's generator.

    mask_BT: 0 for padding. cache: of the P tokens that all prompts share, of one of them. told: how many tokens each
    step has written.
    """
    shared = 0 if cache is None else cache.get_seq_length()
    longest_first = mask_BT.sum(1).argsort(descending=True, stable=True)  # neighbours need little padding
    going: list[int] = longest_first.tolist()
    batch = Decoding(model, cache, mask_BT[going, shared:], sampling.max_new_tokens)
    states_BK = batch.read_prompts(tokens_BT[going, shared:])
    ends = model.generation_config.eos_token_id
    ends = set(ends) if isinstance(ends, list) else {ends}
    answers: list[list[int]] = [[] for _ in tokens_BT]
    for left in reversed(range(sampling.max_new_tokens)):
        drawn_B = draw(model.lm_head(states_BK).float(), sampling, model.generation_config.top_k)
        drawn = dict(zip(going, drawn_B.tolist(), strict=True))
        for number, token in drawn.items():
            answers[number].append(token)
        if told:
            told(len(drawn))
        stay = [row for row, token in enumerate(drawn.values()) if token not in ends]
        if not (stay and left):
            break
        if len(stay) < len(going):
            rows = torch.tensor(stay, device=drawn_B.device)
            batch.keep(rows)
            going, drawn_B = [going[row] for row in stay], drawn_B[rows]
        states_BK = batch.read(drawn_B)
    return answers


class Decoding:
    """A batch of prompts, and of answers that go on.

    cache: of what all prompts begin with, of one of them; None: nothing. rest_BS: of the rest of the prompts, the
    longest first, a mask with 0 for padding. most: how many tokens an answer can have.
    """

    def __init__(self, model: Any, cache: DynamicCache | None, rest_BS: torch.Tensor, most: int):
        config, weight, batch = model.config, model.lm_head.weight, len(rest_BS)
        groups, size = config.num_key_value_heads, model.model.layers[0].self_attn.head_dim
        empty = weight.new_zeros(groups, 0, size)
        self._model = model
        self._shared = [(empty, empty)] * config.num_hidden_layers
        if cache is not None:
            self._shared = [(layer.keys[0], layer.values[0]) for layer in cache.layers]
        room = batch, groups, rest_BS.shape[1] + most, size
        self._own = [(weight.new_zeros(room), weight.new_zeros(room)) for _ in self._shared]
        self._begins = (rest_BS == 0).sum(1).tolist()
        self._read = rest_BS.shape[1]  # tokens of each row, padding among them
        mask_BS = pad(rest_BS, (0, most), value=1)
        self._positions_BS = self._shared[0][0].shape[1] + (mask_BS.cumsum(1) - 1).clamp_min(0)
        self._penalty_BS = (mask_BS == 0).float() * _CLOSED

    def read_prompts(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        """Take in the rest of the prompts, first of all; returns the model's state after each, B × K."""
        length, row, states = tokens_BS.shape[1], 0, []
        while row < len(tokens_BS):
            first = self._begins[row]  # of the block's longest
            rows = slice(row, row + max(1, _READ_AT_ONCE // (length - first)))
            for begin in range(first, length, _READ_AT_ONCE):
                columns = slice(begin, min(begin + _READ_AT_ONCE, length))
                states_BK = self._states(tokens_BS[rows, columns], rows, columns, first)
            states.append(states_BK)
            row = rows.stop
        return torch.cat(states)

    def read(self, tokens_B: torch.Tensor) -> torch.Tensor:
        """Take in the newest token of each answer; returns the model's states after them, B × K."""
        self._read += 1
        return self._states(tokens_B[:, None], slice(None), slice(self._read - 1, self._read), 0)

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these answers alone."""
        for index, (keys, values) in enumerate(self._own):
            self._own[index] = keys[rows], values[rows]
        self._positions_BS, self._penalty_BS = self._positions_BS[rows], self._penalty_BS[rows]

    def _states(self, tokens_BN: torch.Tensor, rows: slice, columns: slice, first: int) -> torch.Tensor:
        """After the last of tokens, which are in these rows and columns of what is not shared.

        first: column where the longest of the rows begins.
        """
        backbone = self._model.model
        x_BNK = backbone.embed_tokens(tokens_BN)
        rotary = backbone.rotary_emb(x_BNK, self._positions_BS[rows, columns])
        places_S = torch.arange(first, columns.stop, device=tokens_BN.device)
        later_NS = (places_S > places_S[-tokens_BN.shape[1] :, None]).float() * _CLOSED
        penalty_B11NS = torch.minimum(later_NS, self._penalty_BS[rows, None, None, None, first : columns.stop])
        for layer, shared, own in zip(backbone.layers, self._shared, self._own, strict=True):
            of_rows = [states[rows, :, first : columns.stop] for states in own]
            normed_BNK = layer.input_layernorm(x_BNK)
            x_BNK = x_BNK + _attended(layer.self_attn, normed_BNK, rotary, shared, of_rows, penalty_B11NS)
            x_BNK = x_BNK + layer.mlp(layer.post_attention_layernorm(x_BNK))
        states_BK: torch.Tensor = backbone.norm(x_BNK[:, -1])
        return states_BK


def _attended(
    attention: Any, x_BNK: torch.Tensor, rotary: Any, shared: Any, own: Any, penalty_B11NS: torch.Tensor
) -> torch.Tensor:
    """What attention adds, B × N × K; the new keys and values are written at the end of `own`.

    rotary: cosines and sines. shared, own: keys and values, G × P × D and B × G × S × D.
    """
    parts, count = [], x_BNK.shape[1]
    for name in "qkv":
        part = getattr(attention, f"{name}_proj")(x_BNK).unflatten(2, (-1, attention.head_dim))
        norm = getattr(attention, f"{name}_norm", None)  # Qwen3's
        parts.append((part if norm is None else norm(part)).transpose(1, 2))
    q_BAND, k_BGND = apply_rotary_pos_emb(*parts[:2], *rotary)
    keys, values = own
    keys[:, :, -count:], values[:, :, -count:] = k_BGND, parts[2]
    q_BGEND = q_BAND.unflatten(1, (keys.shape[1], -1))
    of_shared = torch.einsum("bgend,gpd->bgenp", q_BGEND, shared[0])
    of_own = torch.einsum("bgend,bgsd->bgens", q_BGEND, keys)
    scores = torch.cat([of_shared, of_own], -1).float() * attention.scaling
    scores[..., of_shared.shape[-1] :] += penalty_B11NS
    shares = scores.softmax(-1).to(x_BNK.dtype)
    of_shared, of_own = shares.split([of_shared.shape[-1], of_own.shape[-1]], -1)
    read_BGEND = torch.einsum("bgenp,gpd->bgend", of_shared, shared[1])
    read_BGEND = read_BGEND + torch.einsum("bgens,bgsd->bgend", of_own, values)
    output: torch.Tensor = attention.o_proj(read_BGEND.flatten(1, 2).transpose(1, 2).flatten(2))
    return output


def draw(scores_BV: torch.Tensor, sampling: Sampling, top_k: int | None) -> torch.Tensor:
    """A token for each answer, B int64: at temperature 0 the likeliest.

    Else it is drawn from the fewest tokens that have top-p of the probability (Holtzman et al. 2020, arXiv 1904.09751,
    section 3.1), among the top_k likeliest: None are as many as `generate` takes, 0 all. Of equal scores at the last
    place some are left out.
    """
    if not sampling.temperature:
        return scores_BV.argmax(1)
    count = min(_TOP_K if top_k is None else top_k or scores_BV.shape[1], scores_BV.shape[1])
    likely_BV, ids_BV = (scores_BV / sampling.temperature).topk(count)
    likely_BV = likely_BV.softmax(1)
    before_BV = likely_BV.cumsum(1) - likely_BV
    drawn_B1 = torch.multinomial(likely_BV.masked_fill(before_BV >= sampling.top_p, 0), 1)
    return ids_BV.gather(1, drawn_B1)[:, 0]
