"""Layers by the residual of the teacher's vectors: its value against other code, planted layers, and the stage."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from sklearn.linear_model import Ridge
from transformers import LlamaForCausalLM

from drama_dist.encoder import attention
from drama_dist.encoder.backbone import load
from drama_dist.encoder.families import LanguageModel
from drama_dist.prune import importance as importance_module
from drama_dist.prune.extractor import select
from drama_dist.prune.importance import measure_importance
from drama_dist.prune.residual import pooled_states, residuals
from drama_dist.run.graph import order_of
from drama_dist.run.runner import make
from drama_dist.settings import PruneSettings, Settings, SettingsError

CHANCE = random.Random(5)
SEQUENCES = [[0, *CHANCE.choices(range(2, 300), k=CHANCE.randint(3, 12)), 1] for _ in range(240)]
TEACHER = ("encode/windows/teacher", "windows")
RESIDUAL = ("prune.layer_choice=residual", "prune.calibration_passages=64", "prune.heal_steps=0")


def unit_rows(rows_NK: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(rows_NK, dim=1)


def chosen(model: LanguageModel, choice: str, layers: int, teacher_nK: torch.Tensor) -> list[int]:
    prune = PruneSettings(layers=layers, hidden=48, heads=6, mlp=96, layer_choice=choice)
    unexplained = residuals(model, SEQUENCES, teacher_nK) if choice == "residual" else None
    return select(measure_importance(model, SEQUENCES), prune, unexplained).layers


@pytest.fixture
def planted(llm: Path) -> tuple[LlamaForCausalLM, torch.Tensor]:
    """A model of which only layer 1 does anything, nothing linear; vectors (n, 8), linear in the states after it."""
    model = LlamaForCausalLM.from_pretrained(llm, attn_implementation=attention.NAME).eval()
    torch.manual_seed(4)
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            for product in (layer.self_attn.o_proj, layer.mlp.down_proj):
                product.weight *= 5 if index == 1 else 0
            for product in (layer.mlp.gate_proj, layer.mlp.up_proj):
                product.weight *= 10
    return model, unit_rows(pooled_states(model, SEQUENCES)[2] @ torch.randn(48, 8))


def test_states_are_those_of_unpacked_sequences(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importance_module, "_CHUNK_TOKENS", 40)
    pooled = pooled_states(model, SEQUENCES[:9])
    model.config._attn_implementation = "eager"
    read: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, args: read.append(args[0][0]))
    model.model.norm.register_forward_pre_hook(lambda _, args: read.append(args[0][0]))
    with torch.no_grad():
        for position, ids in enumerate(SEQUENCES[:9]):
            read.clear()
            model(torch.tensor([ids]))
            assert len(read) == len(pooled) == 5
            for states_TH, of_all in zip(read, pooled, strict=True):
                torch.testing.assert_close(of_all[position], unit_rows(states_TH).mean(0), rtol=1e-4, atol=1e-5)


def test_the_residual_is_that_of_another_ridge_regression(model: LanguageModel) -> None:
    torch.manual_seed(6)
    teacher_nK = unit_rows(torch.randn(len(SEQUENCES), 8) + pooled_states(model, SEQUENCES)[3] @ torch.randn(48, 8))
    found = residuals(model, SEQUENCES, teacher_nK)
    for states_nH, share in zip(pooled_states(model, SEQUENCES), found.tolist(), strict=True):
        inputs, targets = states_nH.double().numpy(), teacher_nK.double().numpy()
        errors, total = dict.fromkeys((0.1, 0.3, 1.0, 3.0), 0.0), 0.0
        for first in (0, 1):
            fitted, scored = slice(first, None, 2), slice(1 - first, None, 2)
            spread = ((inputs[fitted] - inputs[fitted].mean(0)) ** 2).sum(0).mean()
            for penalty in errors:
                ridge = Ridge(alpha=penalty * spread).fit(inputs[fitted], targets[fitted])
                errors[penalty] += ((targets[scored] - ridge.predict(inputs[scored])) ** 2).sum()
            total += ((targets[scored] - targets[fitted].mean(0)) ** 2).sum()
        assert share == pytest.approx(min(errors.values()) / total, rel=1e-6)
    assert found.min() > 0 and len(found) == 5


def test_the_layer_that_makes_what_the_teacher_sees_is_kept(planted: tuple[LlamaForCausalLM, torch.Tensor]) -> None:
    model, teacher_nK = planted
    found = residuals(model, SEQUENCES, teacher_nK)
    assert found[2] < 0.3 < 0.6 < found[1] == found[0] and found[3] == found[4] == found[2]
    assert chosen(model, "residual", 1, teacher_nK) == chosen(model, "influence", 1, teacher_nK) == [1]


def test_a_loud_layer_that_says_nothing_to_the_teacher_is_not_kept(
    planted: tuple[LlamaForCausalLM, torch.Tensor],
) -> None:
    model, teacher_nK = planted
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight.normal_(std=20.0)
    found = residuals(model, SEQUENCES, teacher_nK)
    assert found[4] > found[3] + 0.1
    assert chosen(model, "influence", 1, teacher_nK) == [3]
    assert chosen(model, "residual", 1, teacher_nK) == [1]
    assert chosen(model, "residual", 3, teacher_nK) == [0, 1, 2]


def test_too_few_texts_are_refused(model: LanguageModel) -> None:
    with pytest.raises(
        SettingsError, match=r"prune\.layer_choice=residual: needs 32 texts to fit to, and there are 31"
    ):
        residuals(model, SEQUENCES[:31], torch.ones(31, 8))


def test_the_teacher_is_needed_only_where_it_is_asked(small_settings: Callable[..., Settings]) -> None:
    for choice in ("even", "first", "influence", "residual"):
        names = [artefact.name for artefact in order_of(small_settings(f"prune.layer_choice={choice}"), "prune")]
        assert all((name in names) == (choice == "residual") for name in TEACHER)


def test_it_is_refused_before_anything_is_made(small_settings: Callable[..., Settings]) -> None:
    settings = small_settings(*RESIDUAL, "prune.calibration_passages=24")
    with pytest.raises(SettingsError, match=r"needs 32 texts to fit to, and there are 24: .*calibration_passages"):
        make(settings, "prune")
    assert not Path(settings.run).exists()
    with pytest.raises(SettingsError, match=r"prune\.layer_choice=residual with prune\.mask_steps=3: masks choose"):
        small_settings(*RESIDUAL, "prune.mask_steps=3")
    few = small_settings(*RESIDUAL, "corpus.max_passages=30", "corpus.held_out_queries=0")
    with pytest.raises(SettingsError, match=r"needs 32 texts to fit to, and there are 30: .* trains on"):
        make(few, "prune")


@pytest.mark.parametrize("hidden_choice", ["importance", "rotation"])
def test_the_stage_chooses_layers_by_it(hidden_choice: str, small_settings: Callable[..., Settings]) -> None:
    settings = small_settings(*RESIDUAL, f"prune.hidden_choice={hidden_choice}")
    folder = make(settings, "prune")
    record = json.loads((folder / "selection.json").read_text("utf-8"))
    shares = torch.tensor(record["residuals"])
    assert len(shares) == 5 and (shares > 0).all() and (shares < 1).all()
    assert record["layers"] == sorted((shares[:-1] - shares[1:]).topk(2).indices.tolist())
    assert len(load(folder).backbone.layers) == 2
    inputs = json.loads((folder / "provenance.json").read_text("utf-8"))["inputs"]
    assert set(TEACHER) < set(inputs)
    plain = make(small_settings("prune.heal_steps=0", f"run={settings.run}-plain"), "prune")
    assert "residuals" not in json.loads((plain / "selection.json").read_text("utf-8"))
    assert not (plain.parent / "windows").exists()
