"""Decoding a batch of answers by a model that is made of Llama's layers.

What all prompts of a batch begin with is read once for all of them at each step, keys and values are written in their
place, and answers that have ended leave the batch. Prompts are read by the model's own forward pass. Other models, and
settings of generation beyond temperature, top-k and top-p, are left to transformers' `generate`, which gives the same
up to rounding.
Shapes: B answers, T tokens of the longest prompt: P that all prompts share, and others; S of these others and the
answers, K hidden components, A heads in G groups of E, D head size, V tokens.
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

    mask_BT: 0 for padding. cache: of the P tokens that all prompts share, for each of them; is used up. told: how many
    tokens each step has written.
    """
    shared = 0 if cache is None else cache.get_seq_length()
    positions_BT = (mask_BT.cumsum(1) - 1).clamp_min(0)
    prompts = model(
        tokens_BT[:, shared:],
        attention_mask=mask_BT,
        position_ids=positions_BT[:, shared:],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    batch = Decoding(model, prompts.past_key_values, mask_BT, shared, sampling.max_new_tokens)
    scores_BV, ends = prompts.logits[:, -1].float(), model.generation_config.eos_token_id
    ends = set(ends) if isinstance(ends, list) else {ends}
    answers: list[list[int]] = [[] for _ in tokens_BT]
    going = list(range(len(answers)))
    for left in reversed(range(sampling.max_new_tokens)):
        drawn_B = draw(scores_BV, sampling, model.generation_config.top_k)
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
        scores_BV = batch.step(drawn_B)
    return answers


class Decoding:
    """A batch of answers that go on.

    cache: of the prompts, B × G × T × D of each layer; is emptied. mask_BT: 0 for padding, of which there is none among
    the first `shared`. most: how many steps there can be.
    """

    def __init__(self, model: Any, cache: DynamicCache, mask_BT: torch.Tensor, shared: int, most: int):
        self._model = model
        self._shared, self._own, room = [], [], (0, 0, 0, most)
        for layer in cache.layers:
            keys, values = layer.keys, layer.values
            layer.keys = layer.values = None  # layer by layer, or there would be two of each
            self._shared.append((keys[0, :, :shared].clone(), values[0, :, :shared].clone()))
            self._own.append((pad(keys[:, :, shared:], room), pad(values[:, :, shared:], room)))
        self._seen = mask_BT.shape[1] - shared
        self._positions_B = mask_BT.sum(1)
        closed_BS = pad((mask_BT[:, shared:] == 0).float(), (0, most))
        self._penalty_BS = closed_BS * torch.finfo(torch.float32).min

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these answers alone."""
        for index, (keys, values) in enumerate(self._own):
            self._own[index] = keys[rows], values[rows]
        self._positions_B, self._penalty_BS = self._positions_B[rows], self._penalty_BS[rows]

    def step(self, tokens_B: torch.Tensor) -> torch.Tensor:
        """Take in the newest token of each answer; returns scores of the next one, B × V float32."""
        backbone = self._model.model
        x_BK = backbone.embed_tokens(tokens_B)
        rotary = backbone.rotary_emb(x_BK[None], self._positions_B[None])
        for layer, shared, own in zip(backbone.layers, self._shared, self._own, strict=True):
            x_BK = x_BK + self._attended(layer.self_attn, layer.input_layernorm(x_BK), rotary, shared, own)
            x_BK = x_BK + layer.mlp(layer.post_attention_layernorm(x_BK))
        self._seen += 1
        self._positions_B = self._positions_B + 1
        scores_BV: torch.Tensor = self._model.lm_head(backbone.norm(x_BK)).float()
        return scores_BV

    def _attended(self, attention: Any, x_BK: torch.Tensor, rotary: Any, shared: Any, own: Any) -> torch.Tensor:
        """What attention adds, B × K; the new keys and values are written into `own`."""
        seen, parts = self._seen + 1, []
        for name in "qkv":
            part = getattr(attention, f"{name}_proj")(x_BK).unflatten(1, (-1, attention.head_dim))
            norm = getattr(attention, f"{name}_norm", None)  # Qwen3's
            parts.append(part if norm is None else norm(part))
        q_1ABD, k_1GBD = apply_rotary_pos_emb(*(part.transpose(0, 1)[None] for part in parts[:2]), *rotary)
        keys, values = (states[:, :, :seen] for states in own)
        keys[:, :, -1], values[:, :, -1] = k_1GBD[0].transpose(0, 1), parts[2]
        q_BGED = q_1ABD[0].transpose(0, 1).unflatten(1, (keys.shape[1], -1))
        of_shared = torch.einsum("bged,gpd->bgep", q_BGED, shared[0])
        of_own = torch.einsum("bged,bgsd->bges", q_BGED, keys)
        scores = torch.cat([of_shared, of_own], -1).float() * attention.scaling
        scores[..., -seen:] += self._penalty_BS[:, None, None, :seen]
        of_shared, of_own = scores.softmax(-1).to(x_BK.dtype).split([of_shared.shape[-1], seen], -1)
        read_BGED = torch.einsum("bgep,gpd->bged", of_shared, shared[1])
        read_BGED = read_BGED + torch.einsum("bges,bgsd->bged", of_own, values)
        output: torch.Tensor = attention.o_proj(read_BGED.flatten(1))
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
