"""Learned masks: which parts of a language model stay is trained, together with its weights.

After Sheared LLaMA (Xia et al. 2024, arXiv 2310.06694, section 2.1). Every hidden dimension, layer, head and MLP neuron
has a hard-concrete mask (Louizos, Welling and Kingma 2018, arXiv 1712.01312): between 0 and 1, often exactly one of
them. A penalty whose multipliers ascend, while all else descends, brings the expected shares to the wanted ones; for
heads and neurons there is one of each layer, so that all layers end with the same widths. Covers the masks, the masked
model, and making a smaller model of both. The training is in mask_stage.py.
Shapes: L layers, H hidden, A query heads, F MLP neurons; of a group of masks R rows × N masks.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from drama_dist.encoder.families import LanguageModel
from drama_dist.prune.extractor import Selection
from drama_dist.prune.shape import Shape, shape_of

Masks = Mapping[str, torch.Tensor]  # of each group, R × N; 1 stays, 0 goes

_LOW, _HIGH = -0.1, 1.1  # what the concrete variable is stretched to, before it is clipped: its γ and ζ
_TEMPERATURE = 2 / 3  # its β
_START, _NOISE = 5.0, 0.01  # of its location, log α: nearly all is kept
_LEAST = 0.01
# λ₂ in the beginning, and the multipliers' learning rate as a share of the masks'. With 0 and 1, as the paper has them,
# shares fall far below what is wanted, and a few hundred steps do not bring them back.
_QUADRATIC, _MULTIPLIERS_RATE = 10.0, 0.1


class LearnedMasks(nn.Module):
    """The locations of all masks, and two multipliers for each row.

    model, target: shapes; a group of which all is to stay has no masks. rate: of learning the masks, as a multiple of
    the weights'.
    """

    def __init__(self, model: Shape, target: Shape, seed: int, rate: float):
        super().__init__()
        layers = model.layers
        rows = {"layers": 1, "hidden": 1, "heads": layers, "mlp": layers}
        self.wanted = {name: asdict(target)[name] for name in rows if asdict(target)[name] < asdict(model)[name]}
        generator = torch.Generator().manual_seed(seed)
        self.locations, self.multipliers = nn.ParameterDict(), nn.ParameterDict()
        for name in self.wanted:
            count = asdict(model)[name]
            start_RN = _START + _NOISE * torch.randn(rows[name], count, generator=generator)
            self.locations[name] = nn.Parameter(start_RN)
            start_2R = torch.tensor([[0.0], [_QUADRATIC]]).expand(2, rows[name])
            self.multipliers[name] = nn.Parameter(start_2R.clone())
        for parameters, factor in ((self.locations, rate), (self.multipliers, rate * _MULTIPLIERS_RATE)):
            for parameter in parameters.parameters():
                parameter.learning_rate_factor = factor  # type: ignore[attr-defined]  # Engine reads it

    def sampled(self, seed: str) -> Masks:
        """Masks drawn by a seed, the same on every rank (Louizos et al., equation 11)."""
        generator = torch.Generator().manual_seed(random.Random(seed).getrandbits(63))
        masks = {}
        for name, location_RN in self.locations.items():
            uniform_RN = torch.rand(location_RN.shape, generator=generator).clamp(1e-6, 1 - 1e-6)
            drawn_RN = (uniform_RN.logit().to(location_RN.device) + location_RN.float()) / _TEMPERATURE
            masks[name] = _stretched(drawn_RN.sigmoid())
        return masks

    def kept_shares(self) -> dict[str, torch.Tensor]:
        """Of each row the expected share of masks that are not 0 (Louizos et al., equation 12), differentiable."""
        threshold = _TEMPERATURE * math.log(-_LOW / _HIGH)
        return {name: (each.float() - threshold).sigmoid().mean(1) for name, each in self.locations.items()}

    def penalty(self, progress: float) -> torch.Tensor:
        """Σ λ₁(s − t) + λ₂(s − t)² over groups and rows (Xia et al., equation 2): s is the expected sparsity, t the
        wanted one, of which `progress`, 0 to 1, is asked for now. Its gradient with respect to λ has its sign changed.
        """
        total = torch.zeros(())
        for name, kept_R in self.kept_shares().items():
            wanted = self.wanted[name] / self.locations[name].shape[1]
            beyond_R = (1 - kept_R) - progress * (1 - wanted)
            first_R, second_R = _Reversed.apply(self.multipliers[name].float())
            total = total.to(kept_R.device) + (first_R * beyond_R + second_R * beyond_R.square()).sum()
        return total

    @torch.no_grad()
    def final(self) -> Masks:
        """The masks without chance (Louizos et al., equation 13), of which as many as wanted stay in each row.

        One that stays and would be 0, since too few are open, is a little open.
        """
        masks = {}
        for name, location_RN in self.locations.items():
            location_RN = location_RN.float().cpu()
            chosen = location_RN.topk(self.wanted[name], dim=1).indices
            stays_RN = torch.zeros_like(location_RN).scatter(1, chosen, 1.0)
            masks[name] = _stretched(location_RN.sigmoid()).clamp_min(_LEAST) * stays_RN
        return masks


@contextmanager
def masked(model: LanguageModel, current: Callable[[], Masks]) -> Iterator[None]:
    """While the context lasts, the model computes with masks, R × N of each group. current: called for each product."""
    handles = []

    def hidden(states: torch.Tensor, masks: Masks) -> torch.Tensor:
        return states * masks["hidden"][0].to(states.dtype) if "hidden" in masks else states

    def after_embeddings(_: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return hidden(output, current())

    handles.append(model.model.embed_tokens.register_forward_hook(after_embeddings))
    for index, layer in enumerate(model.model.layers):

        def before_output(_: Any, args: Any, index: int = index) -> Any:
            if "heads" not in (masks := current()):
                return None
            heads_A = masks["heads"][index].to(args[0].dtype)
            return (args[0] * heads_A.repeat_interleave(args[0].shape[-1] // len(heads_A)),)

        def before_down(_: Any, args: Any, index: int = index) -> Any:
            masks = current()
            return (args[0] * masks["mlp"][index].to(args[0].dtype),) if "mlp" in masks else None

        def after_part(_: Any, args: Any, output: torch.Tensor, index: int = index) -> torch.Tensor:
            masks = current()
            if "layers" in masks:
                output = output * masks["layers"][0, index].to(output.dtype)
            return hidden(output, masks)

        handles.append(layer.self_attn.o_proj.register_forward_pre_hook(before_output))
        handles.append(layer.mlp.down_proj.register_forward_pre_hook(before_down))
        handles.append(layer.self_attn.o_proj.register_forward_hook(after_part))
        handles.append(layer.mlp.down_proj.register_forward_hook(after_part))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def folded(model: LanguageModel, masks: Masks) -> tuple[LanguageModel, Selection]:
    """A copy in float32 on the CPU that does by its weights what the model does with masks, and the parts that stay.

    The copy and the selection are what `shrink` takes.
    """
    whole = copy.deepcopy(model).float().cpu()
    shape = shape_of(model.config)
    sizes = {"layers": (1, shape.layers), "hidden": (1, shape.hidden)}
    sizes |= {"heads": (shape.layers, shape.heads), "mlp": (shape.layers, shape.mlp)}
    full = {name: masks[name].float().cpu() if name in masks else torch.ones(*sizes[name]) for name in sizes}
    hidden_H = full["hidden"][0]
    whole.model.embed_tokens.weight *= hidden_H
    if model.config.tie_word_embeddings:
        whole.config.tie_word_embeddings = False  # the masked model's head still reads what the mask lets through
        whole.lm_head.weight = nn.Parameter(model.lm_head.weight.float().cpu().clone())
    for index, layer in enumerate(whole.model.layers):
        heads_A, neurons_F = full["heads"][index], full["mlp"][index]
        attended = heads_A.repeat_interleave(layer.self_attn.head_dim)
        added_H1 = (hidden_H * full["layers"][0, index])[:, None]
        for product, inputs in ((layer.self_attn.o_proj, attended), (layer.mlp.down_proj, neurons_F)):
            product.weight.copy_(added_H1 * product.weight * inputs)
            if product.bias is not None:
                product.bias *= added_H1[:, 0]
    layers = _staying(full["layers"][0])
    selection = Selection(
        hidden=torch.tensor(_staying(hidden_H)),
        layers=layers,
        heads=[torch.tensor(_staying(full["heads"][layer])) for layer in layers],
        mlp=[torch.tensor(_staying(full["mlp"][layer])) for layer in layers],
        kv_heads=int((full["heads"][0] > 0).sum()),
        norm_gains=torch.ones(2 * len(layers) + 1),
    )
    return whole, selection


class _Reversed(torch.autograd.Function):
    """The same value, and the negative gradient: an optimiser that descends makes it ascend."""

    @staticmethod
    def forward(_: Any, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(_: Any, gradient: torch.Tensor) -> torch.Tensor:
        return -gradient


def _stretched(concrete: torch.Tensor) -> torch.Tensor:
    return (concrete * (_HIGH - _LOW) + _LOW).clamp(0, 1)


def _staying(masks_N: torch.Tensor) -> list[int]:
    return masks_N.nonzero()[:, 0].tolist()
