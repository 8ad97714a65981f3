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
    with pytest.raises(ValueError, match=f"^{file}: not a whole"):
        read_head(folder, 6)


def test_weights_of_another_shape_are_refused(folder: Path, tmp_path: Path) -> None:
    config = (folder / "2_Dense" / "config.json").read_text("utf-8")
    write_head(folder, dict(nn.Linear(6, 8).state_dict()))
    (folder / "2_Dense" / "config.json").write_text(config, "utf-8")
    with pytest.raises(ValueError, match="expected a weight of 9 × 6"):
        read_head(folder, 6)
