"""The linear head: from pooled hidden states to the components of an encoder's vectors.

Covers its file form, which is that of sentence-transformers' Dense module, so that a folder loads there without remote
code. How a head is fitted is in train/ridge.py.
Shapes: K hidden components, J components of the vectors.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import linear

from drama_dist.encoder.contract import read_modules
from drama_dist.encoder.model_files import read_json_object
from drama_dist.run.files import write_text

HEAD_FOLDER = "2_Dense"  # as sentence-transformers names its third module
_WEIGHTS = "model.safetensors"
_IDENTITY = "torch.nn.modules.linear.Identity"


class LinearHead(nn.Linear):
    """A linear map of pooled states, computed in float32 whatever its weights' dtype."""

    def forward(self, pooled_BK: torch.Tensor) -> torch.Tensor:
        """B × K float32 to B × J float32."""
        return linear(pooled_BK, self.weight.float(), None if self.bias is None else self.bias.float())


def head_folder(folder: Path) -> Path | None:
    """Where a model folder keeps its head; None if it has none."""
    if (folder / "modules.json").is_file():
        paths = [module["path"] for module in read_modules(folder) if module["type"].endswith(".Dense")]
    else:
        paths = [HEAD_FOLDER] if (folder / HEAD_FOLDER).is_dir() else []
    if len(paths) > 1:
        raise ValueError(f"{folder / 'modules.json'}: has {len(paths)} Dense modules; only one is supported")
    return folder / paths[0] if paths else None


def head_size(folder: Path, hidden_size: int) -> int:
    """Components of the vectors of the model in a folder: its head's, or the hidden size.

    Raises ValueError where the head is none that we compute, or does not fit the hidden size.
    """
    place = head_folder(folder)
    if place is None:
        return hidden_size
    config = read_json_object(place / "config.json")
    size, file = config.get("out_features"), place / "config.json"
    if config.get("activation_function", _IDENTITY) != _IDENTITY or config.get("use_residual"):
        raise ValueError(f"{file}: is more than a linear map; only a Dense with Identity for activation is supported")
    if config.get("in_features") != hidden_size or type(size) is not int or size < 1:
        raise ValueError(f"{file}: maps {config.get('in_features')} to {size} components, after {hidden_size}")
    return size


def read_head(folder: Path, hidden_size: int) -> LinearHead | None:
    """The head of the model in a folder, float32; None if it has none.

    Raises ValueError as `head_size` does, and where its weights are damaged or missing.
    """
    place = head_folder(folder)
    if place is None:
        return None
    size = head_size(folder, hidden_size)
    try:
        stored = {name.removeprefix("linear."): tensor for name, tensor in load_file(place / _WEIGHTS).items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{place / _WEIGHTS}: not a whole safetensors file ({error}); fetch it again") from error
    head = LinearHead(hidden_size, size, bias="bias" in stored)
    shapes = {name: tuple(weight.shape) for name, weight in head.named_parameters()}
    if {name: tuple(tensor.shape) for name, tensor in stored.items()} != shapes:
        raise ValueError(f"{place / _WEIGHTS}: expected a weight of {size} × {hidden_size}; fetch it again")
    head.load_state_dict(stored)
    return head.float()


def write_head(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """Write a head's `weight`, J × K, and `bias`, J, if it has one."""
    place = folder / HEAD_FOLDER
    place.mkdir(exist_ok=True)
    size, hidden_size = weights["weight"].shape
    config = {
        "in_features": hidden_size,
        "out_features": size,
        "bias": "bias" in weights,
        "activation_function": _IDENTITY,
        "module_input_name": "sentence_embedding",
        "module_output_name": "sentence_embedding",
    }
    save_file({f"linear.{name}": tensor.contiguous() for name, tensor in weights.items()}, place / _WEIGHTS)
    write_text(place / "config.json", json.dumps(config, indent=2) + "\n")
