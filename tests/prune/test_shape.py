"""A budget of weights: what it leaves of a model, counted in models that are built, and what it cannot do."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from drama_dist.encoder.backbone import load
from drama_dist.encoder.families import Config, backbone_class
from drama_dist.encoder.pretrained import read_llama_config
from drama_dist.plan.devices import device
from drama_dist.plan.report import read_shape, report, step_cost
from drama_dist.prune.mask_stage import masked_model
from drama_dist.prune.shape import Shape, as_config, parameters_of, requested_shape, shape_of
from drama_dist.run.runner import make
from drama_dist.settings import PruneSettings, Settings, SettingsError
from tests.prune.test_published import LLAMA

FREE: dict[str, Any] = {"layers": None, "hidden": None, "heads": None, "mlp": None}
LARGE = LlamaConfig(**LLAMA)
NULLS = ("prune.layers=null", "prune.hidden=null", "prune.heads=null", "prune.mlp=null")


def within(budget: int, config: Config, **given: int) -> Shape:
    return requested_shape(PruneSettings(**{**FREE, **given}, parameters=budget), config)


def built(shape: Shape, config: Config) -> int:
    """Weights beside the embeddings of a model that is really there."""
    backbone = backbone_class(config)(as_config(shape, config))
    weights = dict(backbone.named_parameters())
    return sum(weight.numel() for name, weight in weights.items() if "embed_tokens" not in name)


def test_weights_are_counted_as_they_are_built(family: Path) -> None:
    config = read_llama_config(str(family))
    counts = []
    for budget in range(9_000, 140_000, 20_000):
        shape = within(budget, config)
        counts.append(parameters_of(shape, config))
        assert counts[-1] == built(shape, config) <= budget
    assert len(set(counts)) > 3 and all(one <= more for one, more in itertools.pairwise(counts))
    whole = parameters_of(Shape(4, 48, 6, 96, 6), config)
    assert within(whole, config) == within(10 * whole, config) == Shape(4, 48, 6, 96, 6)
    assert within(whole - 1, config) != Shape(4, 48, 6, 96, 6)


def test_the_shape_has_the_llms_proportions() -> None:
    for budget in (20_000_000, 113_300_000, 500_000_000):
        shape = within(budget, LARGE)
        scale = shape.hidden / 2048
        assert shape.hidden == 64 * shape.heads and shape.mlp % 64 == 0 and shape.kv_heads == shape.heads
        assert abs(shape.layers - 16 * scale) <= 1 and abs(shape.mlp - 8192 * scale) <= 2 * 64 * 4
        assert 0.8 * budget < parameters_of(shape, LARGE) <= budget


def test_the_papers_shape_has_its_weights() -> None:
    assert parameters_of(Shape(12, 768, 12, 3072, 12), LARGE) == 113_265_408
    deep = within(113_300_000, LARGE, layers=12, hidden=768, heads=12)
    assert deep == Shape(12, 768, 12, 3072, 12)


def test_numbers_that_are_given_stay() -> None:
    for part, size in (("layers", 3), ("hidden", 512), ("heads", 12), ("mlp", 1000)):
        shape = within(60_000_000, LARGE, **{part: size})
        assert getattr(shape, part) == size and shape.hidden % shape.heads == 0
        assert 45_000_000 < parameters_of(shape, LARGE) <= 60_000_000
    assert within(60_000_000, LARGE, hidden=512).heads == 8


def test_groups_of_heads_can_be_kept_within_a_budget(family: Path) -> None:
    config = read_llama_config(str(family))
    for budget in (30_000, 60_000):
        shape = within(budget, config, kv_heads=2)
        assert shape.kv_heads == 2 and shape.heads in (2, 4, 6) and built(shape, config) <= budget
    assert within(10**9, LARGE, kv_heads=8) == shape_of(LARGE)


def test_what_a_budget_cannot_do_is_told() -> None:
    smallest = parameters_of(Shape(1, 64, 1, 64, 1), LARGE)
    with pytest.raises(SettingsError, match=rf"^prune\.parameters=9: the smallest shape, .* has {smallest} weights"):
        within(9, LARGE)
    assert within(smallest, LARGE) == Shape(1, 64, 1, 64, 1)
    with pytest.raises(SettingsError, match=rf"prune\.parameters={10**6}: the smallest shape, .* has 4\d{{6}} weights"):
        within(10**6, LARGE, hidden=2048, heads=8)
    with pytest.raises(SettingsError, match=r"prune\.layers=17: the model has only 16"):
        within(10**8, LARGE, layers=17)
    with pytest.raises(SettingsError, match=r"prune\.kv_heads=33: the model has 8"):
        within(10**8, LARGE, kv_heads=33)


def test_stages_and_the_plan_take_the_same_shape(small_settings: Callable[..., Settings], llm: Path) -> None:
    budget = ("prune.parameters=30000", *NULLS, "encoder.dims=[16]", "prune.heal_steps=0")
    settings = small_settings(*budget)
    pruned = load(make(settings, "prune")).backbone
    expected = within(30_000, read_llama_config(str(llm)))
    assert shape_of(pruned.config) == expected == shape_of(read_shape(settings))
    assert built(expected, pruned.config) <= 30_000
    lines = list(report(step_cost(settings, 1, device("cpu", 1), read_shape(settings))))
    assert f"shape       {expected.layers} layers of {expected.hidden}, {expected.heads} heads over" in lines[1]
    masks = small_settings(*budget, "prune.mask_steps=2", f"run={settings.run}-masks")
    small, kept = masked_model(make(masks, "masks"))
    assert shape_of(small.config) == expected and len(kept["layers"]) == expected.layers
    recorded = (Path(masks.run) / "masks" / "settings.yaml").read_text("utf-8")
    assert "prune.parameters: 30000" in recorded
    with pytest.raises(SettingsError, match=r"^prune\.parameters=9: the smallest shape"):
        make(small_settings("prune.parameters=9", *NULLS, f"run={settings.run}-none"), "prune")


def test_counting_takes_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    devices: set[str] = set()
    empty = torch.nn.Linear.__init__

    def noted(self: torch.nn.Linear, *args: Any, **options: Any) -> None:
        empty(self, *args, **options)
        devices.add(self.weight.device.type)

    monkeypatch.setattr(torch.nn.Linear, "__init__", noted)
    parameters_of(shape_of(LARGE), LARGE)
    assert devices == {"meta"}
