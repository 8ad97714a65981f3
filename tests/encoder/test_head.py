"""The linear head of a model folder: written, read, and refused where it is not one that we compute."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from drama_dist.encoder.head import head_size, read_head, write_head


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    write_head(tmp_path, dict(nn.Linear(6, 9).state_dict()))
    return tmp_path


def test_a_head_comes_back_from_its_folder(folder: Path) -> None:
    torch.manual_seed(0)
    expected, found = nn.Linear(6, 9), read_head(folder, 6)
    assert found is not None and head_size(folder, 6) == 9
    assert torch.equal(found.weight, expected.weight) and torch.equal(found.bias, expected.bias)


def test_a_folder_without_one_has_vectors_of_the_hidden_size(tmp_path: Path) -> None:
    assert read_head(tmp_path, 6) is None and head_size(tmp_path, 6) == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation_function": "torch.nn.modules.activation.Tanh"}, "more than a linear map"),
        ({"use_residual": True}, "more than a linear map"),
        ({"in_features": 7}, "maps 7 to 9 components, after 6"),
        ({"out_features": "9"}, "maps 6 to 9 components"),
    ],
)
def test_what_we_do_not_compute_is_refused(folder: Path, change: dict[str, object], message: str) -> None:
    file = folder / "2_Dense" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | change), "utf-8")
    with pytest.raises(ValueError, match=f"^{file}: .*{message}"):
        read_head(folder, 6)


def test_damaged_weights_are_named(folder: Path) -> None:
    file = folder / "2_Dense" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match=f"^{file}: not a whole safetensors file"):
        read_head(folder, 6)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=f"^{file.parent}: no weights"):
        read_head(folder, 6)


DENSE, POOLING, NORMALIZE = (f"sentence_transformers.models.{name}" for name in ("Dense", "Pooling", "Normalize"))


def list_modules(folder: Path, *kinds: str) -> None:
    modules = [{"type": kind, "path": "elsewhere" if kind.endswith(".Dense") else ""} for kind in kinds]
    (folder / "modules.json").write_text(json.dumps(modules), "utf-8")


def test_modules_say_where_the_head_is(folder: Path) -> None:
    (folder / "2_Dense").rename(folder / "elsewhere")
    list_modules(folder, POOLING, DENSE, NORMALIZE)
    assert head_size(folder, 6) == 9 and read_head(folder, 6) is not None
    list_modules(folder, POOLING, NORMALIZE)
    assert head_size(folder, 6) == 6 and read_head(folder, 6) is None


@pytest.mark.parametrize(
    "kinds",
    [
        (POOLING, DENSE, DENSE),
        (POOLING, NORMALIZE, DENSE),
        (DENSE, POOLING),
        (POOLING, "own.code.Dense", NORMALIZE),
        (POOLING, DENSE, "sentence_transformers.models.LayerNorm"),
    ],
)
def test_a_dense_module_that_is_not_the_head_is_refused(kinds: tuple[str, ...], folder: Path) -> None:
    list_modules(folder, *kinds)
    for use in (head_size, read_head):
        with pytest.raises(ValueError, match=r"modules\.json: has .*; only one Dense module .* is supported"):
            use(folder, 6)


def test_a_head_without_a_bias_has_none(tmp_path: Path) -> None:
    plain = nn.Linear(6, 9, bias=False)
    write_head(tmp_path, dict(plain.state_dict()))
    found = read_head(tmp_path, 6)
    assert found is not None and found.bias is None and torch.equal(found(torch.eye(6)), plain.weight.T)


def test_weights_of_another_shape_are_refused(folder: Path, tmp_path: Path) -> None:
    config = (folder / "2_Dense" / "config.json").read_text("utf-8")
    write_head(folder, dict(nn.Linear(6, 8).state_dict()))
    (folder / "2_Dense" / "config.json").write_text(config, "utf-8")
    with pytest.raises(ValueError, match="expected a weight of 9 × 6"):
        read_head(folder, 6)
