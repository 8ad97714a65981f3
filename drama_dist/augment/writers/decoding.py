"""Decoding on the spot: the next tokens of a batch of answers by a model that is made of Llama's layers.

What all prompts of a batch begin with is read once for all of them at each step, keys and values are written in their
place, and answers that have ended leave the batch. Covers steps of one token and drawing it. What comes before, the
prompts, is the model's own forward pass; other models, and settings of generation beyond temperature, top-k and top-p,
are left to transformers' `generate`.
Shapes: B answers, P tokens that all prompts share, S others of a prompt and its answer, K hidden components, A heads in
G groups of E, D head size, V tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import pad
from transformers import DynamicCache, LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from drama_dist.augment.writers.writer import Sampling

_MODELS = (LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)
_ROPES = ("default", "linear", "llama3", "yarn")  # which do not depend on the longest text
_TOP_K = 50  # of `generate`, where a model says nothing of it
# Settings of generation that are heeded here, or that a sampling has in their place; any other is for `generate`.
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


class Decoding:
    """A batch of answers that go on.

    cache: of the prompts, B × G × (P + S) × D of each layer. mask_BT: which of the P + S tokens are no padding; the
    first `shared` are none. most: how many steps there will be.
    """

    def __init__(self, model: Any, cache: DynamicCache, mask_BT: torch.Tensor, shared: int, most: int):
        self._model = model
        self._shared = [
            (layer.keys[0, :, :shared].transpose(1, 2).contiguous(), layer.values[0, :, :shared].contiguous())
            for layer in cache.layers
        ]
        room = (0, 0, 0, most)
        self._own = [
            tuple(pad(states[:, :, shared:], room) for states in (layer.keys, layer.values)) for layer in cache.layers
        ]
        self._seen = mask_BT.shape[1] - shared
        self._positions_B = mask_BT.sum(1)
        closed_BS = (mask_BT[:, shared:] == 0).float()
        self._penalty_BS = pad(closed_BS, (0, most)) * torch.finfo(torch.float32).min

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these answers alone."""
        self._own = [tuple(states[rows] for states in layer) for layer in self._own]
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

    def _attended(
        self, attention: Any, x_BK: torch.Tensor, rotary: Any, shared: tuple[torch.Tensor, ...], own: Any
    ) -> torch.Tensor:
        answers, size = len(x_BK), attention.head_dim
        parts = [getattr(attention, f"{name}_proj")(x_BK).view(answers, -1, size) for name in "qkv"]
        for index, name in enumerate("qk"):
            if hasattr(attention, f"{name}_norm"):  # Qwen3's
                parts[index] = getattr(attention, f"{name}_norm")(parts[index])
        q_1ABD, k_1GBD = apply_rotary_pos_emb(*(part.transpose(0, 1)[None] for part in parts[:2]), *rotary)
        own_keys, own_values = (states[:, :, : self._seen + 1] for states in own)
        own_keys[:, :, -1], own_values[:, :, -1] = k_1GBD[0].transpose(0, 1), parts[2]
        groups = k_1GBD.shape[1]
        q_GEBD = q_1ABD[0].unflatten(0, (groups, -1)) * attention.scaling
        q_BGED = q_GEBD.permute(2, 0, 1, 3)
        of_shared_GEBP = (q_GEBD.flatten(1, 2) @ shared[0]).unflatten(1, (-1, answers))
        of_own_BGES = (q_BGED @ own_keys.transpose(2, 3)).float() + self._penalty_BS[:, None, None, : self._seen + 1]
        scores = torch.cat([of_shared_GEBP.permute(2, 0, 1, 3).float(), of_own_BGES], -1)
        shares = scores.softmax(-1).to(x_BK.dtype).split([of_shared_GEBP.shape[-1], self._seen + 1], -1)
        read_GEBD = (shares[0].permute(1, 2, 0, 3).flatten(1, 2) @ shared[1]).unflatten(1, (-1, answers))
        read_BGED = read_GEBD.permute(2, 0, 1, 3) + shares[1] @ own_values
        output: torch.Tensor = attention.o_proj(read_BGED.flatten(1))
        return output


def draw(scores_BV: torch.Tensor, sampling: Sampling, model: Any) -> torch.Tensor:
    """A token for each answer, by torch's generator: the likeliest at temperature 0, else of the top-k of the model's
    settings of generation, of the fewest that have top-p of their probability (Holtzman et al. 2020, arXiv 1904.09751,
    section 3.1).
    """
    if not sampling.temperature:
        return scores_BV.argmax(1)
    asked = model.generation_config.top_k
    count = min(_TOP_K if asked is None else asked or scores_BV.shape[1], scores_BV.shape[1])
    likely_BV, ids_BV = (scores_BV / sampling.temperature).topk(count)
    likely_BV = likely_BV.softmax(1)
    before_BV = likely_BV.cumsum(1) - likely_BV
    drawn_B1 = torch.multinomial(likely_BV.masked_fill(before_BV >= sampling.top_p, 0), 1)
    return ids_BV.gather(1, drawn_B1)[:, 0]
