"""Rotation: the turned model does the same, and its first dimensions hold most."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from drama_dist.encoder.families import LanguageModel
from drama_dist.prune.extractor import select, shrink
from drama_dist.prune.importance import measure_importance, norms_in_order
from drama_dist.prune.rotation import principal_basis, rotated
from tests.prune.test_extractor import IDS, SHAPE, masked

SEQUENCES = [row.tolist() for row in IDS]
ROTATED = replace(SHAPE, hidden_choice="rotation")


@torch.no_grad()
def logits(model: LanguageModel) -> torch.Tensor:
    model.config._attn_implementation = "eager"
    return model.eval()(IDS).logits


def test_the_rotated_model_does_the_same(model: LanguageModel) -> None:
    turned = rotated(model, principal_basis(model, SEQUENCES))
    torch.testing.assert_close(logits(turned), logits(model), rtol=1e-5, atol=1e-5)
    turned.model.layers[1].self_attn.o_proj.weight.data = model.model.layers[1].self_attn.o_proj.weight.data
    assert (logits(turned) - logits(model)).abs().max() > 1e-3


def test_the_basis_is_that_of_unpacked_sequences(model: LanguageModel) -> None:
    read: list[torch.Tensor] = []
    basis_HH = principal_basis(model, SEQUENCES).numpy()
    for norm in norms_in_order(model):
        norm.register_forward_pre_hook(lambda _, args: read.append(args[0].flatten(0, 1).double()))
    logits(model)
    rows = np.concatenate([(each / each.norm(dim=1, keepdim=True).clamp_min(1e-12)).numpy() for each in read])
    _, values_H, expected_HH = np.linalg.svd(rows, full_matrices=False)
    held = np.square(rows @ basis_HH).sum(0)
    np.testing.assert_allclose(held, np.square(values_H), rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(np.abs((expected_HH @ basis_HH).diagonal()[:4]), 1, atol=1e-3)


@pytest.mark.parametrize("layer_choice", ["first", "influence"])
def test_masked_and_extracted_models_agree(model: LanguageModel, layer_choice: str) -> None:
    turned = rotated(model, principal_basis(model, SEQUENCES))
    selection = select(measure_importance(turned, SEQUENCES), replace(ROTATED, layer_choice=layer_choice))
    assert selection.hidden.tolist() == list(range(20))
    small, full = shrink(turned, selection), masked(turned, selection)
    torch.testing.assert_close(logits(small), logits(full), rtol=1e-5, atol=1e-5)
    other = shrink(turned, replace(selection, hidden=selection.hidden + 1))
    assert (logits(other) - logits(full)).abs().max() > 1e-3


def test_the_first_dimensions_hold_more_than_any_of_the_models_own(model: LanguageModel) -> None:
    plain, turned = (
        measure_importance(each, SEQUENCES) for each in (model, rotated(model, principal_basis(model, SEQUENCES)))
    )
    torch.testing.assert_close(turned.energy.sum(1), plain.energy.sum(1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(turned.heads_LA, plain.heads_LA, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(turned.layers_L, plain.layers_L, rtol=1e-3, atol=1e-5)
    for size in (5, 20, 47):
        most = plain.energy.sum(0).topk(size).values.sum()
        assert turned.energy.sum(0)[:size].sum() > 0.9 * most  # the basis weighs every norm's tokens alike
    held = [float(turned.energy[:, :size].sum()) for size in range(1, 49)]
    assert all(one < more for one, more in itertools.pairwise(held))
