"""Mistakes that can be found at once are, before anything is made; what is finished is not checked again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from drama_dist.run import runner
from drama_dist.run.runner import make
from drama_dist.search.systems import SYSTEMS, DenseSystem
from drama_dist.settings import Settings, SettingsError


@pytest.mark.parametrize(
    ("verb", "overrides", "message"),
    [
        ("run", ["llm=models/typo"], r"llm=models/typo: no such folder, and not available from the hub \("),
        ("run", ["llm=package:no_such/model"], "llm=package:no_such/model: the Python package 'no_such' is not"),
        ("run", ["llm={cut}"], "llm={cut}: {cut}/model.safetensors: not a whole safetensors file"),
        ("run", ["prune.layers=5"], "prune.layers=5: the model has only 4"),
        ("run", ["prune.hidden=49"], "prune.hidden=49: the model has only 48"),
        ("run", ["prune.heads=7"], "prune.heads=7: the model has only 6"),
        ("run", ["prune.mlp=97"], "prune.mlp=97: the model has only 96"),
        ("run", ["prune.hidden=31", "encoder.dims=[16]"], "prune.hidden=31: must be a multiple of prune.heads=4, or"),
        ("prune", ["prune.heads=5"], "prune.hidden=32: must be a multiple of prune.heads=5, or"),
        ("run", ["llm=~no-such-user/x"], "llm=~no-such-user/x: no folder of that user"),
        ("run", ["teacher.model=~no-such-user/x"], "teacher.model=~no-such-user/x: no folder of that user"),
        ("run", ["train.start={cut}"], "train.start={cut}: {cut}/model.safetensors: not a whole"),
        ("train", ["train.start={llm}", "encoder.dims=[64]"], "train.start={llm}: encoder.dims=.* asks for 64"),
        ("run", ["teacher.model=a/b"], "teacher.model=a/b: no such folder"),
        ("augment", ["teacher.model={cut}"], "teacher.model={cut}: {cut}/model.safetensors: not a whole"),
        ("run", ["augment.writer={cut}"], "augment.writer={cut}: {cut}/model.safetensors: not a whole"),
        ("run", ["evaluate.systems=[drama,model:{cut}]"], "evaluate.systems=model:{cut}: {cut}/model.safetensors: not"),
    ],
)
def test_a_mistake_is_found_before_anything_is_made(
    verb: str,
    overrides: list[str],
    message: str,
    small_settings: Callable[..., Settings],
    llm: Path,
    tmp_path: Path,
) -> None:
    cut = tmp_path / "cut"
    shutil.copytree(llm, cut)
    whole = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    settings = small_settings(*(override.format(cut=cut, llm=llm) for override in overrides))
    with pytest.raises(SettingsError, match=f"^{message.format(cut=cut, llm=llm)}") as failure:
        make(settings, verb)
    assert len(str(failure.value).splitlines()) == 1
    assert not Path(settings.run).exists()


def test_the_unpruned_llm_is_compared_whatever_dims_a_linear_head_gives(
    small_settings: Callable[..., Settings],
) -> None:
    settings = small_settings("train.regression_weight=1", "encoder.dims=[64]", "evaluate.systems=[llm-unpruned]")
    system = SYSTEMS["llm-unpruned"]
    system.check(settings)
    assert isinstance(system, DenseSystem) and system.load(settings).encode_queries(["x"]).shape == (1, 48)


def test_what_is_finished_is_not_checked(
    small_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = small_settings("prune.heal_steps=0")
    make(settings, "prune")
    called: list[str] = []
    named = runner.function_named

    def noting(name: str) -> Callable[..., object]:
        called.append(name)
        return named(name)

    monkeypatch.setattr(runner, "function_named", noting)
    make(settings, "prune")
    assert "drama_dist.prune.source:check" not in called
