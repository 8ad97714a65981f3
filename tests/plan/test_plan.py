"""The plan: what it reads from settings, what it prints, and what would make a run fit."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from drama_dist.cli import main
from drama_dist.encoder.flops import layer_weights
from drama_dist.plan.devices import SHEETS, Device, device
from drama_dist.plan.report import pruned_shape, read_shape, report, step_cost, what_fits
from drama_dist.settings import Settings, SettingsError, read_settings, write_settings

GPU = SHEETS["h100-80g"]
BASE = Path(__file__).parent.parent.parent / "configs" / "drama-base.yaml"


def base(*overrides: str) -> Settings:
    return read_settings(BASE, ["corpus.path=somewhere", *overrides])


def small_gpu(gigabytes: float) -> Device:
    return replace(GPU, memory=gigabytes * 1e9)


def test_the_papers_shape_has_its_parameters() -> None:
    settings = base()
    shape = pruned_shape(settings, 128_256, 64)
    cost = step_cost(settings, 8, GPU, shape)
    assert cost.embedding_parameters == 128_256 * 768
    assert cost.layer_parameters == 12 * (4 * 768 * 768 + 3 * 768 * 3072 + 2 * 768) + 768  # 0.113 billion
    assert cost.gathers_queries and cost.scores_shape == (2048, 2048) and len(cost.lengths) == 256 + 2048


def test_minutes_are_told_in_steps() -> None:
    def told(*overrides: str) -> str:
        settings = base(*overrides)
        return list(report(step_cost(settings, 8, GPU, pruned_shape(settings, 128_256, 64))))[-1]

    in_steps, in_minutes = told("train.steps=1200"), told("train.steps=null", "train.minutes=150")
    assert re.search(r"expected 2\.6\d s .*; 1200 steps: 53\.\d min", in_steps), in_steps
    assert in_minutes.endswith("2.5 h: 3379 steps"), in_minutes


def test_the_shape_comes_from_the_models_configuration(small_settings: Callable[..., Settings], llm: Path) -> None:
    settings = small_settings()
    shape = read_shape(settings)
    heads = shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim
    assert (shape.hidden_size, shape.num_hidden_layers, *heads) == (32, 2, 4, 4, 8)
    assert read_shape(small_settings(f"train.start={llm}")).hidden_size == 48
    (Path(settings.run) / "no").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"^llm=.* say --vocabulary and --head instead"):
        read_shape(replace(settings, llm=str(Path(settings.run) / "no")))


def test_what_pruning_keeps_is_the_llms(small_settings: Callable[..., Settings]) -> None:
    kept = small_settings("prune.layers=null", "prune.hidden=null", "prune.heads=null", "prune.mlp=null")
    shape = read_shape(kept)
    assert (shape.hidden_size, shape.num_hidden_layers, shape.num_attention_heads) == (48, 4, 6)
    assert shape.intermediate_size == 96
    with pytest.raises(
        SettingsError, match=r"prune\.layers=null depends on the LLM's shape, which --vocabulary and --head do not"
    ):
        pruned_shape(kept, 1000, 8)
    with pytest.raises(SettingsError, match=r"prune\.layers=5: the model has only 4"):
        read_shape(small_settings("prune.layers=5"))


def test_groups_of_heads_that_are_kept_are_counted() -> None:
    whole, grouped = (
        pruned_shape(base("prune.mask_steps=0", *more), 128_256, 64) for more in ([], ["prune.kv_heads=4"])
    )
    assert (whole.num_key_value_heads, grouped.num_key_value_heads) == (12, 4)
    assert layer_weights(whole) - layer_weights(grouped) == 2 * 8 * 64 * 768


def test_lengths_come_from_the_run_where_it_has_them(small_settings: Callable[..., Settings]) -> None:
    settings = small_settings("train.hard_negatives=1")
    shape, on = read_shape(settings), device("cpu", 1)
    limits = step_cost(settings, 1, on, shape)
    assert limits.lengths == (32,) * 12 + (64,) * 24 and "upper bound" in limits.lengths_from
    folder = Path(settings.run) / "train"
    folder.mkdir(parents=True)
    seen = {"edges": [0, 10, 20, 40], "queries": [1, 0, 0], "passages": [0, 5, 5]}
    (folder / "token_lengths.json").write_text(json.dumps(seen))
    lengths = step_cost(settings, 1, on, shape).lengths
    assert max(lengths[:12]) <= 10 and min(lengths[12:]) >= 10 and 30 < max(lengths[12:]) <= 40
    assert sum(lengths[12:]) / 24 == pytest.approx(22.5, abs=1)


@pytest.mark.parametrize("gigabytes", [40, 12, 6, 5, 4, 3])
def test_what_would_make_it_fit_does_and_no_less(gigabytes: float) -> None:
    settings = base("train.activation_budget=70")
    shape = pruned_shape(settings, 128_256, 64)
    cost = step_cost(settings, 8, small_gpu(gigabytes), shape)
    assert not cost.fits
    changes = what_fits(settings, cost)

    def fits(words: list[str]) -> bool:
        ranks = next((int(word.split()[1]) for word in words if word.startswith("--ranks")), 8)
        changed = base("train.activation_budget=70", *(word for word in words if word.startswith("train.")))
        return step_cost(changed, ranks, small_gpu(gigabytes), shape).fits

    assert changes and fits(changes)
    assert not any(fits([word for word in changes if word != left_out]) for left_out in changes)
    for word in changes:  # nor is a number further from the settings' than it must be
        if word.startswith("train.chunk_tokens") and 2 * int(word.split("=")[1]) < settings.train.chunk_tokens:
            doubled = f"train.chunk_tokens={2 * int(word.split('=')[1])}"
            assert not fits([doubled if other == word else other for other in changes])


def test_what_the_settings_say_already_is_not_advised() -> None:
    settings = base("train.activation_budget=0", "train.checkpoint_layers=true", "train.zero_stage=3")
    changes = what_fits(settings, step_cost(settings, 8, small_gpu(2), pruned_shape(settings, 128_256, 64)))
    assert changes and all(change.startswith(("train.chunk_tokens=", "train.offload", "--ranks")) for change in changes)


def test_one_rank_that_is_too_few_gets_more_and_a_stage_that_splits() -> None:
    settings = base("train.zero_stage=0", "train.dtype=float32")
    shape = pruned_shape(settings, 128_256, 64)
    assert what_fits(settings, step_cost(settings, 1, small_gpu(3), shape))


def test_where_nothing_fits_it_says_so() -> None:
    settings = base()
    assert what_fits(settings, step_cost(settings, 1, small_gpu(0.1), pruned_shape(settings, 128_256, 64))) == []


def test_the_command_prints_all_parts_and_names_unknown_devices(
    small_settings: Callable[..., Settings], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "whole.yaml"
    write_settings(small_settings(), file)
    assert main(["plan", str(file), "train.zero_stage=2", "--ranks", "2", "--device", "h100-80g"]) == 0
    out = capsys.readouterr().out
    words = ("weights", "gradients", "optimiser", "activations", "embeddings", "loss tiles", "update", "by DeepSpeed")
    assert all(word in out for word in (*words, "expected", "fits: ")) and "soft targets" not in out
    assert main(["plan", str(file), "train.soft_target_weight=1", "--device", "h100-80g"]) == 0
    assert "left out    soft targets" in capsys.readouterr().out
    assert main(["plan", str(file), "--device", "abacus"]) == 2
    assert "device 'abacus': expected one of cpu, h100-80g" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["plan", str(file), "--ranks", "0"])
    assert "argument --ranks: '0': must be a whole number, 1 or more" in capsys.readouterr().err
    assert main(["plan", str(file), "--head", "64"]) == 2
    assert "--vocabulary and --head go together" in capsys.readouterr().err
    assert main(["plan", str(file), "--ranks", "13"]) == 2
    assert "13 ranks for train.batch_size=12: each needs a query" in capsys.readouterr().err


def test_superwords_and_the_share_of_passages_count(small_settings: Callable[..., Settings]) -> None:
    plain = small_settings("train.info_nce_weight=0", "train.regression_weight=1", "train.hard_negatives=1")
    start = replace(plain, train=replace(plain.train, start=plain.llm))
    for settings in (plain, start):
        more = replace(settings, train=replace(settings.train, superwords=100, passage_share=0.25))
        one, other = (step_cost(each, 1, device("cpu", 1), read_shape(each)) for each in (settings, more))
        assert other.embedding_parameters - one.embedding_parameters == 100 * one.config.hidden_size
        assert (one.batch, other.batch) == ((12, 24), (12, 6))
