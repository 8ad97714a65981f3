"""The residual of the teacher's vectors at each depth of a language model, by ridge regression on held-out texts.

Covers what prune.layer_choice=residual measures: a block's score is how much the residual falls from the states before
it to the states after it. A text's states are pooled as an encoder that ended there would pool them, and are mapped to
the teacher's vector by ridge regression (Hoerl and Kennard 1970). The LLM is measured as it is, causal and at full
width; which blocks go well together is not tried.
Shapes: L layers, n texts, H hidden, K components of the teacher's vectors, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from drama_dist.encoder.families import LanguageModel
from drama_dist.encoder.packing import Packed
from drama_dist.encoder.pooling import mean_pool
from drama_dist.prune.importance import run_over
from drama_dist.settings import SettingsError

MOST_TEXTS = 4096  # the states of all depths are in memory
_LEAST_TEXTS = 32
# As multiples of the mean diagonal. With 400 fitted texts and SmolLM2-135M's 576 dimensions, 1 leaves least at every
# depth, and with 0.1 the fall is mostly noise.
_PENALTIES = (0.1, 0.3, 1.0, 3.0)


def check_texts(count: int) -> None:
    """Raise SettingsError where there are too few texts to fit to."""
    if count < _LEAST_TEXTS:
        raise SettingsError(
            f"prune.layer_choice=residual: needs {_LEAST_TEXTS} texts to fit to, and there are {count}: so many are "
            "prune.calibration_passages, or the texts that the run trains on"
        )


def residuals(model: LanguageModel, sequences: Sequence[Sequence[int]], teacher_nK: torch.Tensor) -> torch.Tensor:
    """The unexplained share of the teacher's vectors before the first block and after each, float64 (L + 1).

    sequences: token ids of n texts, in random order; teacher_nK: the teacher's vectors of them. Every other text is
    scored by a map that was fitted to the rest, and the other way round, with the penalty that leaves least at this
    depth. 1: no better than the mean vector of the texts that were fitted. Raises SettingsError as `check_texts` does.
    """
    check_texts(len(sequences))
    return torch.tensor(
        [
            min(_unexplained(states_nH, teacher_nK, penalty) for penalty in _PENALTIES)
            for states_nH in pooled_states(model, sequences)
        ],
        dtype=torch.float64,
    )


@torch.no_grad()
def pooled_states(model: LanguageModel, sequences: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Before the first block and after each, n × H: the mean over a text's tokens, each scaled to length 1.

    So RMSNorm scales them before an encoder pools. Without it the few tokens with very long states (Sun et al. 2024,
    Massive Activations, arXiv 2402.17762) would count for all others.
    """
    layers = model.model.layers
    pooled: list[list[torch.Tensor]] = [[] for _ in range(len(layers) + 1)]

    def add(depth: int, states_TH: torch.Tensor, packed: Packed) -> None:
        states_TH = states_TH.float()
        pooled[depth].append(mean_pool(states_TH / states_TH.norm(dim=1, keepdim=True).clamp_min(1e-12), packed).cpu())

    handles = []
    for index, layer in enumerate(layers):

        def before(_: Any, args: Any, options: Any, index: int = index) -> None:
            add(index, args[0][0], options["packed"])

        handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))

    def after(_: Any, args: Any, options: Any, output: Any) -> None:
        add(len(layers), (output[0] if isinstance(output, tuple) else output)[0], options["packed"])

    handles.append(layers[-1].register_forward_hook(after, with_kwargs=True))
    order = torch.tensor(run_over(model, sequences, "prune: residuals"))
    for handle in handles:
        handle.remove()
    return [torch.cat(parts)[order.argsort()] for parts in pooled]


def _unexplained(states_nH: torch.Tensor, teacher_nK: torch.Tensor, penalty: float) -> float:
    """The squared error of held-out texts, as a share of that of the fitted texts' mean."""
    states_nH, teacher_nK = states_nH.double(), teacher_nK.double()
    errors = total = 0.0
    for fitted, scored in ((slice(0, None, 2), slice(1, None, 2)), (slice(1, None, 2), slice(0, None, 2))):
        mean_H, mean_K = states_nH[fitted].mean(0), teacher_nK[fitted].mean(0)
        inputs_mH, targets_mK = states_nH[fitted] - mean_H, teacher_nK[fitted] - mean_K
        products_HH = inputs_mH.T @ inputs_mH
        products_HH.diagonal().add_(penalty * products_HH.diagonal().mean())
        map_HK = torch.cholesky_solve(inputs_mH.T @ targets_mK, torch.linalg.cholesky(products_HH))
        rest_mK = teacher_nK[scored] - mean_K
        total += float(rest_mK.square().sum())
        errors += float((rest_mK - (states_nH[scored] - mean_H) @ map_HK).square().sum())
    return errors / total
