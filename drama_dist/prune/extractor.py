"""The extractor: selects the most important parts of a language model and makes a smaller one of them, of its type.

Covers the selection by importance and slicing the weights. Grouped-query attention becomes multi-head attention
(key-value heads are copied to the query heads they serve, then heads are selected), unless prune.kv_heads keeps groups;
the head size does not change, so neither do rotary embeddings.
Shapes: L layers, H hidden, A query heads in G groups, D head size, F MLP neurons.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from drama_dist.encoder.families import LanguageModel, language_model_class
from drama_dist.prune.importance import Importance, norms_in_order
from drama_dist.prune.shape import Shape, as_config, requested_shape, shape_of
from drama_dist.settings import PruneSettings

SELECTION = "selection.json"


@dataclass(frozen=True)
class Selection:
    """Indices to keep, ascending: hidden dimensions, layers, and heads and neurons of each selected layer.

    kv_heads: key-value heads of the small model; each serves equally many of the selected heads, from one old group.
    norm_gains: for each RMSNorm of the small model, the square root of the fraction of its input's energy that is in
    the selected hidden dimensions.
    """

    hidden: torch.Tensor
    layers: list[int]
    heads: list[torch.Tensor]
    mlp: list[torch.Tensor]
    kv_heads: int
    norm_gains: torch.Tensor

    @property
    def shape(self) -> Shape:
        return Shape(len(self.layers), len(self.hidden), len(self.heads[0]), len(self.mlp[0]), self.kv_heads)

    def as_record(self) -> dict[str, Any]:
        """As plain JSON."""
        return {
            "layers": self.layers,
            "hidden": self.hidden.tolist(),
            "heads": [heads.tolist() for heads in self.heads],
            "mlp": [neurons.tolist() for neurons in self.mlp],
            "kv_heads": self.kv_heads,
            "norm_gains": self.norm_gains.tolist(),
        }


def select(importance: Importance, prune: PruneSettings, residuals: torch.Tensor | None = None) -> Selection:
    """Select the most important parts; layers evenly spaced, with the first and the last, the first ones, by block
    influence, or by how much the residual falls; of a rotated model the first hidden dimensions.

    residuals: of the teacher's vectors before the first layer and after each (L + 1), where prune.layer_choice asks for
    them. Raises SettingsError as `requested_shape` does.
    """
    whole, shape = shape_of(importance.config), requested_shape(prune, importance.config)
    principal = prune.hidden_choice == "rotation"
    hidden = torch.arange(shape.hidden) if principal else _top(importance.hidden_H, shape.hidden)
    assert (residuals is not None) == (prune.layer_choice == "residual")
    scores_L = importance.layers_L if residuals is None else -residuals.diff()
    layers = _layers(scores_L, shape.layers, prune.layer_choice)
    norms = [2 * layer + offset for layer in layers for offset in (0, 1)] + [len(importance.energy) - 1]
    energy = importance.energy[norms]
    return Selection(
        hidden,
        layers,
        [best_heads(importance.heads_LA[layer], shape, whole.kv_heads) for layer in layers],
        [_top(importance.mlp_LF[layer], shape.mlp) for layer in layers],
        shape.kv_heads,
        (energy[:, hidden].sum(1) / energy.sum(1)).sqrt(),
    )


@torch.no_grad()
def shrink(model: LanguageModel, selection: Selection) -> LanguageModel:
    """Slice the model down to the selection; float32, on the CPU.

    The result equals the model with all other parts masked to zero and each RMSNorm's gain times `norm_gains`. The full
    model's RMSNorm divides the sum of squares over the selected dimensions by H, the small one's by h. Hence all that
    is added to the residual stream has the factor √(h/H) here, and the gains have √(H/h). Epsilon is unchanged; it
    also applies to the norms of heads.
    """
    hidden = selection.hidden
    narrowing = (len(hidden) / model.config.hidden_size) ** 0.5
    config = as_config(selection.shape, model.config)
    config.dtype = "float32"
    small = language_model_class(config)(config).float()
    small.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight[:, hidden] * narrowing)
    if not model.config.tie_word_embeddings:
        small.lm_head.weight.copy_(model.lm_head.weight[:, hidden])
    for index, layer in enumerate(selection.layers):
        _copy_layer(small.model.layers[index], model.model.layers[layer], selection, index)
        for product in (small.model.layers[index].self_attn.o_proj, small.model.layers[index].mlp.down_proj):
            for weight in product.parameters():
                weight *= narrowing
    old_norms = norms_in_order(model)
    selected = [old_norms[2 * layer + offset] for layer in selection.layers for offset in (0, 1)] + [old_norms[-1]]
    for new, old, gain in zip(norms_in_order(small), selected, selection.norm_gains, strict=True):
        new.weight.copy_(old.weight[hidden].float() * gain / narrowing)
    if model.config.tie_word_embeddings:
        small.model.norm.weight /= narrowing  # since the tied head is scaled as well
    return small


def best_heads(scores_A: torch.Tensor, shape: Shape, groups: int) -> torch.Tensor:
    """The heads with the highest scores, ascending; where groups are kept, equally many of each of the best groups.

    groups: G, the model's key-value heads.
    """
    if shape.kv_heads == shape.heads:
        return _top(scores_A, shape.heads)
    each, scores_GS = shape.heads // shape.kv_heads, scores_A.unflatten(0, (groups, -1))
    best_GE = scores_GS.argsort(dim=1, descending=True, stable=True)[:, :each]
    kept = _top(scores_GS.gather(1, best_GE).sum(1), shape.kv_heads)
    return (kept[:, None] * scores_GS.shape[1] + best_GE[kept]).flatten().sort().values


def _layers(scores_L: torch.Tensor, count: int, choice: str) -> list[int]:
    if choice in ("influence", "residual"):
        return _top(scores_L, count).tolist()
    if choice == "first":
        return list(range(count))
    return torch.linspace(0, len(scores_L) - 1, count).round().long().tolist()


def _top(scores: torch.Tensor, count: int) -> torch.Tensor:
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def _copy_layer(new: Any, old: Any, selection: Selection, index: int) -> None:
    hidden, heads, neurons = selection.hidden, selection.heads[index], selection.mlp[index]
    for name in ("q_norm", "k_norm"):  # Qwen3's, the same for all heads
        if hasattr(old.self_attn, name):
            getattr(new.self_attn, name).weight.copy_(getattr(old.self_attn, name).weight)
    size = old.self_attn.head_dim
    each = len(heads) // selection.kv_heads  # heads of a group follow one another
    served = _components(heads[::each] // old.self_attn.num_key_value_groups, size)
    queries = _components(heads, size)
    for name, rows in {"q_proj": queries, "k_proj": served, "v_proj": served}.items():
        _copy_product(getattr(new.self_attn, name), getattr(old.self_attn, name), rows, hidden)
    _copy_product(new.self_attn.o_proj, old.self_attn.o_proj, hidden, queries)
    for name in ("gate_proj", "up_proj"):
        _copy_product(getattr(new.mlp, name), getattr(old.mlp, name), neurons, hidden)
    _copy_product(new.mlp.down_proj, old.mlp.down_proj, hidden, neurons)


def _components(heads: torch.Tensor, size: int) -> torch.Tensor:
    """Where the heads' components lie in their concatenation."""
    return (heads[:, None] * size + torch.arange(size)).flatten()


def _copy_product(new: nn.Linear, old: nn.Linear, rows: torch.Tensor, columns: torch.Tensor) -> None:
    """Selected rows and columns of a matrix, and of its bias, if it has one, the rows."""
    new.weight.copy_(old.weight[rows][:, columns])
    if old.bias is not None:
        new.bias.copy_(old.bias[rows])
