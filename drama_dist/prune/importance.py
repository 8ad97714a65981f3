"""Importance of every part of a language model, measured on calibration text with forward passes only.

After Minitron (Muralidharan et al. 2024, arXiv 2407.14679, section 2.2): hidden dimensions by mean |RMSNorm output|,
heads by the L2 norm of their context, MLP neurons by mean |activation|, layers by block influence, 1 − cosine of a
block's input and output (Men et al. 2024, arXiv 2403.03853).
Shapes: L layers, H hidden, A query heads, F MLP neurons, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cosine_similarity

from drama_dist.encoder.families import Config, LanguageModel
from drama_dist.encoder.packing import pack, token_budget_chunks
from drama_dist.run.progress import progress_bar

_CHUNK_TOKENS = 4096


@dataclass(frozen=True)
class Importance:
    """Means over calibration tokens, float32.

    energy: mean square of each RMSNorm's input, (2L + 1) × H, in order of use; it gives the fraction of the norm that a
    subset of hidden dimensions retains. config: the model's.
    """

    hidden_H: torch.Tensor
    heads_LA: torch.Tensor
    mlp_LF: torch.Tensor
    layers_L: torch.Tensor
    energy: torch.Tensor
    config: Config


@torch.no_grad()
def measure_importance(model: LanguageModel, sequences: Sequence[Sequence[int]]) -> Importance:
    """Run the model over token id sequences and measure the importance of its parts."""
    sums: dict[str, torch.Tensor] = {}

    def add(name: str, values: torch.Tensor) -> None:
        total = values.float().sum(0).cpu()
        sums[name] = sums[name] + total if name in sums else total

    handles = _watch(model, add)
    run_over(model, sequences, "prune: importance")
    for handle in handles:
        handle.remove()
    tokens = sum(len(sequence) for sequence in sequences)
    return _collect(sums, model.config, tokens)


@torch.no_grad()
def run_over(model: LanguageModel, sequences: Sequence[Sequence[int]], what: str) -> list[int]:
    """Call the model, but for its head, on token id sequences, for hooks that watch it. what: beside the bar.

    Returns the positions of the sequences in the order in which the model read them.
    """
    bar = progress_bar(len(sequences), what, "passages")
    chunks = token_budget_chunks([len(sequence) for sequence in sequences], _CHUNK_TOKENS)
    for chunk in chunks:
        packed = pack([sequences[i] for i in chunk], model.device)
        model.model(
            input_ids=packed.token_ids_T.unsqueeze(0),
            position_ids=packed.position_ids_T.unsqueeze(0),
            use_cache=False,
            packed=packed,
        )
        bar.update(len(chunk))
    bar.close()
    return [position for chunk in chunks for position in chunk]


def norms_in_order(model: LanguageModel) -> list[Any]:
    """The 2L + 1 RMSNorms in order of use."""
    pairs = [(layer.input_layernorm, layer.post_attention_layernorm) for layer in model.model.layers]
    return [norm for pair in pairs for norm in pair] + [model.model.norm]


def _watch(model: LanguageModel, add: Callable[[str, torch.Tensor], None]) -> list[Any]:
    handles = []
    for index, norm in enumerate(norms_in_order(model)):

        def after_norm(_: Any, args: Any, output: torch.Tensor, index: int = index) -> None:
            add("hidden", output[0].float().abs())
            add(f"energy {index}", args[0][0].float().square())

        handles.append(norm.register_forward_hook(after_norm))
    for index, layer in enumerate(model.model.layers):

        def before_output(_: Any, args: Any, index: int = index) -> None:
            context = args[0][0].float().unflatten(-1, (model.config.num_attention_heads, -1))
            add(f"heads {index}", context.norm(dim=-1))

        def before_down(_: Any, args: Any, index: int = index) -> None:
            add(f"mlp {index}", args[0][0].float().abs())

        def after_layer(_: Any, args: Any, output: Any, index: int = index) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            add(f"layer {index}", 1 - cosine_similarity(args[0][0].float(), hidden[0].float(), dim=-1))

        handles.append(layer.self_attn.o_proj.register_forward_pre_hook(before_output))
        handles.append(layer.mlp.down_proj.register_forward_pre_hook(before_down))
        handles.append(layer.register_forward_hook(after_layer))
    return handles


def _collect(sums: dict[str, torch.Tensor], config: Config, tokens: int) -> Importance:
    layers = config.num_hidden_layers

    def stacked(name: str, count: int) -> torch.Tensor:
        return torch.stack([sums[f"{name} {index}"] for index in range(count)]) / tokens

    return Importance(
        hidden_H=sums["hidden"] / (tokens * (2 * layers + 1)),
        heads_LA=stacked("heads", layers),
        mlp_LF=stacked("mlp", layers),
        layers_L=stacked("layer", layers),
        energy=stacked("energy", 2 * layers + 1),
        config=config,
    )
