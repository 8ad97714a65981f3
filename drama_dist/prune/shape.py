"""The shape that a language model is pruned to: what settings ask for, part by part or as a number of weights.

Covers reading it from the settings, whether it fits the model, and counting a shape's weights. What is kept of each
part is selected in extractor.py, or by masks.
"""

from __future__ import annotations

import copy
import math
from bisect import bisect_right
from dataclasses import dataclass, replace

import torch
from torch import nn

from drama_dist.encoder.families import Config, backbone_class
from drama_dist.encoder.flops import layer_weights
from drama_dist.settings import PruneSettings, SettingsError

_SCALES = 1000  # of the LLM that a budget chooses from: 0.001, 0.002, ... 1


@dataclass(frozen=True)
class Shape:
    """How many to keep of each part; heads, mlp and kv_heads are those of a layer."""

    layers: int
    hidden: int
    heads: int
    mlp: int
    kv_heads: int


def shape_of(config: Config) -> Shape:
    """That of a model with this configuration."""
    sizes = config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.intermediate_size
    return Shape(*sizes, config.num_key_value_heads)


def as_config(shape: Shape, config: Config) -> Config:
    """The configuration of a model of this shape, and else like another one; head sizes stay."""
    small = copy.deepcopy(config)
    small.num_hidden_layers, small.hidden_size, small.intermediate_size = shape.layers, shape.hidden, shape.mlp
    small.num_attention_heads, small.num_key_value_heads = shape.heads, shape.kv_heads
    if hasattr(config, "layer_types"):  # Qwen3's
        small.layer_types = ["full_attention"] * shape.layers
    return small


def requested_shape(prune: PruneSettings, config: Config) -> Shape:
    """What the settings ask for, of a model with this configuration.

    Parts that are null are the model's, or where there is a budget (prune.parameters) the largest in its proportions
    that stays within it; but each head has a key-value head of its own where kv_heads is null.
    Raises SettingsError, naming the setting, if the requested shape is larger than the model's or than the budget, or
    not a Llama's: a head's size does not depend on either, but transformers refuses a Llama whose heads do not divide
    its hidden size.
    """
    model = shape_of(config)
    for name in ("layers", "hidden", "heads", "mlp"):
        size, asked = getattr(model, name), getattr(prune, name)
        if asked is not None and asked > size:
            raise SettingsError(f"prune.{name}={asked}: the model has only {size}")
    if prune.parameters is not None:
        return _largest_within(prune.parameters, prune, config)
    heads = prune.heads or model.heads
    shape = Shape(
        prune.layers or model.layers,
        prune.hidden or model.hidden,
        heads,
        prune.mlp or model.mlp,
        prune.kv_heads or heads,
    )
    if problem := _problem(shape, model):
        raise SettingsError(problem)
    return shape


def parameters_of(shape: Shape, config: Config) -> int:
    """Weights of a model of this shape, and else like another one, beside its token embeddings and its head."""
    with torch.device("meta"):
        backbone = backbone_class(config)(as_config(replace(shape, layers=1), config))
    layer = _count(backbone.layers[0])
    return _count(backbone) - _count(backbone.embed_tokens) + (shape.layers - 1) * layer


def _largest_within(budget: int, prune: PruneSettings, config: Config) -> Shape:
    """The largest of what `_scaled` gives; by its matrices, since a larger scale may have fewer heads."""
    model = shape_of(config)
    scaled = [_scaled(step / _SCALES, prune, model, config.head_dim) for step in range(1, _SCALES + 1)]
    shapes = [shape for shape in dict.fromkeys(scaled) if not _problem(shape, model)]
    if not shapes:
        raise SettingsError(str(_problem(scaled[-1], model)))
    shapes.sort(key=lambda shape: shape.layers * layer_weights(as_config(shape, config)))
    count = bisect_right(shapes, budget, key=lambda shape: parameters_of(shape, config))
    if not count:
        raise SettingsError(
            f"prune.parameters={budget}: the smallest shape, with what prune.layers, hidden, heads, mlp and kv_heads "
            f"say, has {parameters_of(shapes[0], config)} weights beside the token embeddings; allow as many"
        )
    return shapes[count - 1]


def _scaled(scale: float, prune: PruneSettings, model: Shape, head: int) -> Shape:
    """The model with its null parts scaled, hidden and mlp to multiples of the head size; at scale 1, as they are.

    Of heads there are as many as fit and are nearest to hidden's proportion. head: components of a head.
    """

    def part(size: int, step: int) -> int:
        return size if scale == 1 else min(size, step * max(1, round(scale * size / step)))

    hidden = prune.hidden or part(model.hidden, math.lcm(head, prune.heads or 1))
    layers, mlp = prune.layers or part(model.layers, 1), prune.mlp or part(model.mlp, head)
    wanted = model.heads * hidden / model.hidden
    counts = [prune.heads] if prune.heads else range(1, model.heads + 1)
    shapes = [Shape(layers, hidden, heads, mlp, prune.kv_heads or heads) for heads in counts]
    fitting = [shape for shape in shapes if not _problem(shape, model)]
    return min(fitting or shapes[-1:], key=lambda shape: abs(shape.heads - wanted))


def _problem(shape: Shape, model: Shape) -> str | None:
    """What is wrong with heads and groups of a shape that is not larger than the model's."""
    if shape.kv_heads != shape.heads:
        if shape.kv_heads > min(shape.heads, model.kv_heads):
            return (
                f"prune.kv_heads={shape.kv_heads}: the model has {model.kv_heads}, for prune.heads={shape.heads}; ask "
                "for fewer, or set it to null, and each head has its own"
            )
        if shape.heads % shape.kv_heads or shape.heads // shape.kv_heads > model.heads // model.kv_heads:
            return (
                f"prune.heads={shape.heads} with prune.kv_heads={shape.kv_heads}: each key-value head serves equally "
                f"many heads, at most {model.heads // model.kv_heads} as in the model"
            )
    if shape.hidden % shape.heads:
        return (
            f"prune.hidden={shape.hidden}: must be a multiple of prune.heads={shape.heads}, or transformers loads no "
            "such Llama; change one of them"
        )
    return None


def _count(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())
