"""Learned masks: their formulas, the model that is made of them, and the stage that trains them."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from drama_dist.distributed import precision
from drama_dist.encoder.backbone import load
from drama_dist.encoder.families import LanguageModel
from drama_dist.prune import language_batches, language_loss
from drama_dist.prune.extractor import shrink
from drama_dist.prune.language_batches import LanguageBatches
from drama_dist.prune.mask_stage import masked_model
from drama_dist.prune.masks import LearnedMasks, folded, masked
from drama_dist.prune.shape import Shape, shape_of
from drama_dist.run import interrupts
from drama_dist.run.runner import make
from drama_dist.settings import Settings, SettingsError, write_settings
from tests.prune.test_extractor import IDS

WHOLE = Shape(layers=4, hidden=48, heads=6, mlp=96, kv_heads=2)
TARGET = Shape(layers=2, hidden=20, heads=4, mlp=33, kv_heads=4)


def learned(target: Shape = TARGET, spread: float = 3.0) -> LearnedMasks:
    """Masks at random places."""
    masks = LearnedMasks(WHOLE, target, seed=1, rate=1.0)
    torch.manual_seed(3)
    for location in masks.locations.values():
        location.data.normal_(std=spread)
    return masks


@torch.no_grad()
def logits(model: LanguageModel) -> torch.Tensor:
    model.config._attn_implementation = "eager"
    return model.eval()(IDS).logits


@pytest.mark.parametrize(
    "target",
    [
        TARGET,
        replace(TARGET, layers=4),
        replace(WHOLE, hidden=20, kv_heads=6),
        replace(WHOLE, heads=4, kv_heads=4),
    ],
    ids=str,
)
def test_the_masked_model_and_the_small_one_agree(model: LanguageModel, target: Shape) -> None:
    masks = learned(target).final()
    whole, selection = folded(model, masks)
    small = shrink(whole, selection)
    assert shape_of(small.config) == target
    with masked(model, lambda: masks):
        expected = logits(model)
    torch.testing.assert_close(logits(small), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(whole), expected, rtol=1e-5, atol=1e-5)
    assert (logits(model) - expected).abs().max() > 1e-3  # without masks it is what it was
    if "hidden" in masks:  # once in training, and again where it is folded
        twice, _ = folded(whole, {"hidden": masks["hidden"]})
        assert (logits(twice) - expected).abs().max() > 1e-3


def test_shares_and_drawn_masks_are_those_of_the_distribution() -> None:
    masks = learned()
    drawn = {name: torch.stack([masks.sampled(f"{seed}")[name] for seed in range(4000)]) for name in masks.wanted}
    for name, kept_R in masks.kept_shares().items():
        values = drawn[name].detach()
        assert float(values.min()) == 0 and float(values.max()) == 1
        measured_R = (values > 0).float().mean(0).mean(1)
        np.testing.assert_allclose(measured_R.numpy(), kept_R.detach().numpy(), atol=0.02)
        location = masks.locations[name].detach().double()
        expected = 1 / (1 + torch.exp(2 / 3 * math.log(0.1 / 1.1) - location))
        np.testing.assert_allclose(kept_R.detach(), expected.mean(1), rtol=1e-5)
    again = learned().sampled("7")
    for name, values in masks.sampled("7").items():
        assert torch.equal(values, again[name]) and not torch.equal(values, masks.sampled("8")[name])


def test_final_masks_are_the_likeliest_and_as_many_as_wanted() -> None:
    masks = learned()
    for name, values in masks.final().items():
        location = masks.locations[name].detach()
        assert ((values > 0).sum(1) == masks.wanted[name]).all()
        lowest = location.masked_fill(values == 0, math.inf).amin(1)
        assert (location.masked_fill(values > 0, -math.inf).amax(1) <= lowest).all()
        inside = (values > 0.02) & (values < 1)
        expected = torch.special.expit(location.double()) * 1.2 - 0.1
        np.testing.assert_allclose(values[inside], expected[inside], rtol=1e-5)


def test_what_is_to_stay_whole_has_no_masks() -> None:
    assert set(LearnedMasks(WHOLE, replace(WHOLE, mlp=33), 1, 1.0).wanted) == {"mlp"}
    assert not LearnedMasks(WHOLE, WHOLE, 1, 1.0).wanted


@pytest.mark.parametrize("progress", [0.0, 0.4, 1.0])
def test_the_penalty_descends_for_masks_and_ascends_for_multipliers(progress: float) -> None:
    masks = learned()
    for multiplier in masks.multipliers.values():
        multiplier.data.normal_()
    penalty = masks.penalty(progress)
    penalty.backward()
    expected, parts = 0.0, {name: kept.detach() for name, kept in masks.kept_shares().items()}
    for name, kept_R in parts.items():
        wanted = {"layers": 2 / 4, "hidden": 20 / 48, "heads": 4 / 6, "mlp": 33 / 96}[name]
        beyond_R = (1 - kept_R) - progress * (1 - wanted)
        first_R, second_R = masks.multipliers[name].detach()
        expected += float((first_R * beyond_R + second_R * beyond_R**2).sum())
        ascent = torch.stack([beyond_R, beyond_R**2])
        torch.testing.assert_close(masks.multipliers[name].grad, -ascent)
    assert float(penalty) == pytest.approx(expected, rel=1e-5)
    location = masks.locations["hidden"]
    step = 1e-2
    kept = location.data[0, 5].item()
    values = []
    for change in (step, -step):
        location.data[0, 5] = kept + change
        values.append(float(masks.penalty(progress)))
    assert location.grad is not None
    assert float(location.grad[0, 5]) == pytest.approx((values[0] - values[1]) / (2 * step), rel=2e-2, abs=1e-4)


MASKS = ["prune.mask_steps=60", "prune.heal_steps=0", "prune.heal_tokens=128"]


def test_the_stage_reaches_the_wanted_shares_and_shape(small_settings: Callable[..., Settings]) -> None:
    settings = small_settings(*MASKS)
    folder = make(settings, "masks")
    lines = metrics(folder)
    wanted = {"layers": 2 / 4, "hidden": 32 / 48, "heads": 4 / 6, "mlp": 48 / 96}
    assert lines[0]["kept"].keys() == wanted.keys() and min(lines[0]["kept"].values()) > 0.95
    for name, share in wanted.items():
        assert lines[-1]["kept"][name] == pytest.approx(share, abs=0.12)
    small, record = masked_model(folder)
    assert shape_of(small.config) == Shape(layers=2, hidden=32, heads=4, mlp=48, kv_heads=4)
    pruned = load(make(settings, "prune"))
    assert shape_of(pruned.backbone.config) == shape_of(small.config)
    assert json.loads((folder.parent / "prune" / "selection.json").read_text()) == record
    np.testing.assert_allclose(
        pruned.backbone.layers[1].mlp.up_proj.weight.detach(), small.model.layers[1].mlp.up_proj.weight.detach()
    )


def stopped_and_resumed(settings: Settings, stage: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stage's folder, made in two attempts: the first is stopped after three steps."""
    make(settings, "corpus")
    wanted = iter([False, False, True])
    with monkeypatch.context() as patch:
        patch.setattr(interrupts, "wanted", lambda: next(wanted))
        with pytest.raises(interrupts.Stopped):
            make(settings, stage)
    return make(settings, stage)


@pytest.mark.parametrize(("stage", "several"), [("masks", False), ("masks", True), ("prune", True)])
def test_it_resumes_to_the_same_model(
    stage: str,
    several: bool,
    small_settings: Callable[..., Settings],
    two_languages: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(language_batches, "_UPDATE_EVERY", 2)  # so that it stops between two updates
    steps = ["prune.mask_steps=8"] if stage == "masks" else ["prune.mask_steps=0", "prune.heal_steps=8"]
    overrides = [*MASKS, *steps, *(["prune.heal_tokens=512", *two_languages] if several else [])]
    whole = make(small_settings(*overrides), stage)
    capsys.readouterr()
    run = whole.parent.parent
    again = stopped_and_resumed(small_settings(*overrides, f"run={run / 'again'}"), stage, monkeypatch)
    assert "resuming from step 3" in "".join(capsys.readouterr())
    assert files_of(again) == files_of(whole)
    held = shares_in(whole)
    assert shares_in(again) == held and len({str(each) for each in held}) >= (3 if several else 1)
    if several:
        with monkeypatch.context() as patch:
            patch.setattr(LanguageBatches, "load_state_dict", lambda self, state: None)
            forgot = stopped_and_resumed(small_settings(*overrides, f"run={run / 'forgot'}"), stage, patch)
        assert shares_in(forgot) != held


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]


def shares_in(folder: Path) -> list[dict[str, float] | None]:
    return [line.get("language_shares") for line in metrics(folder)]


def files_of(folder: Path) -> dict[str, bytes]:
    """What the stage has made, without records of how and when."""
    files = [path for path in folder.rglob("*") if path.suffix in (".safetensors", ".json") and path.is_file()]
    assert len(files) > 2
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in sorted(files) if path.name != "provenance.json"
    }


def test_a_model_of_the_wanted_shape_is_refused_at_once(small_settings: Callable[..., Settings]) -> None:
    settings = small_settings(*MASKS, "prune.layers=null", "prune.hidden=null", "prune.heads=null", "prune.mlp=96")
    with pytest.raises(SettingsError, match=r"prune\.mask_steps=60: .* has the wanted shape already"):
        make(settings, "masks")
    assert not Path(settings.run).joinpath("corpus").exists()


def test_no_steps_are_refused_at_once(small_settings: Callable[..., Settings]) -> None:
    with pytest.raises(SettingsError, match=r"prune\.mask_steps=0: there is nothing to learn"):
        make(small_settings(), "masks")


def test_masks_that_are_not_there_yet_are_told(
    small_settings: Callable[..., Settings], capsys: pytest.CaptureFixture[str]
) -> None:
    make(small_settings(*MASKS, "prune.mask_steps=1"), "masks")
    told = "".join(capsys.readouterr())
    assert "masks: 100% of hidden are open, and 67% stay; more prune.mask_steps bring them nearer" in told


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("prune.layer_choice=first", r"prune\.layer_choice=first with prune\.mask_steps=60: masks choose"),
        ("prune.kv_heads=2", r"prune\.kv_heads=2 with prune\.mask_steps=60: .* set it to null"),
    ],
)
def test_choices_beside_masks_are_refused(change: str, problem: str, small_settings: Callable[..., Settings]) -> None:
    with pytest.raises(SettingsError, match=problem):
        small_settings(*MASKS, change)


def test_other_settings_of_healing_keep_the_masks(small_settings: Callable[..., Settings]) -> None:
    steps = "prune.mask_steps=2"
    folder = make(small_settings(*MASKS, steps), "masks")
    before = (folder / "provenance.json").read_bytes()
    make(small_settings(*MASKS, steps, "prune.heal_steps=1", "prune.heal_kl_weight=0.3"), "prune")
    assert (folder / "provenance.json").read_bytes() == before


def test_two_ranks_learn_the_masks_of_one(
    small_settings: Callable[..., Settings], two_languages: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "bfloat16_instructions", list)
    monkeypatch.setattr(language_loss, "_CHUNK_TOKENS", 48)  # several chunks a step, mostly an odd number
    monkeypatch.setattr(language_batches, "_UPDATE_EVERY", 4)
    overrides = [*MASKS, *two_languages, "prune.mask_steps=12"]
    one, two = (small_settings(f"run={tmp_path / name}", *overrides) for name in ("one", "two"))
    found = [make(one, "masks"), tmp_path / "two" / "masks"]
    make(two, "corpus")
    write_settings(two, tmp_path / "two.yaml")
    program = Path(__file__).parent / "mask_ranks.py"
    command = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node", "2", str(program)]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(Path(__file__).parents[2])}
    command.append(str(tmp_path / "two.yaml"))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    lines = [metrics(folder) for folder in found]
    assert len(lines[0]) == len(lines[1]) == 12
    for one, two in zip(*lines, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4) and two["tokens"] == one["tokens"]
        assert two["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=1e-3)
        assert two["kept"] == pytest.approx(one["kept"], abs=2e-4)
        assert two["language_shares"] == one["language_shares"]
    assert len({line["language_shares"]["de"] for line in lines[0]}) == 3
    assert json.loads((found[1] / "provenance.json").read_text())["world_size"] == 2
    records = [json.loads((folder / "selection.json").read_text()) for folder in found]
    assert records[0] == records[1]
    weights = [load_file(folder / "model" / "model.safetensors") for folder in found]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-3, atol=1e-4)
