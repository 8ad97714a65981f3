"""The linear head: from pooled hidden states to the components of an encoder's vectors.

Covers its file form, which is that of sentence-transformers' Dense module, so that a folder loads there without remote
code. What a head begins as is in train/token_start.py.
Shapes: K hidden components, J components of the vectors.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import linear

from drama_dist.encoder.contract import read_modules
from drama_dist.encoder.model_files import check_model_files, read_json_object
from drama_dist.run.files import write_text

HEAD_FOLDER = "2_Dense"  # as sentence-transformers names its third module
_WEIGHTS = "model.safetensors"
_PREFIX = "linear."  # of the weights' names
_OWN_MODULES = "sentence_transformers."
_IDENTITY = "torch.nn.modules.linear.Identity"


class LinearHead(nn.Linear):
    """A linear map of pooled states, computed in float32 whatever its weights' dtype."""

    def forward(self, pooled_BK: torch.Tensor) -> torch.Tensor:
        """B × K float32 to B × J float32."""
        return linear(pooled_BK, self.weight.float(), None if self.bias is None else self.bias.float())


def head_folder(folder: Path) -> Path | None:
    """Where a model folder keeps its head; None if it has none.

    Raises ValueError where modules.json has a Dense module that is not sentence-transformers' own, or stands elsewhere
    than between pooling and normalisation.
    """
    file = folder / "modules.json"
    if not file.is_file():
        return folder / HEAD_FOLDER if (folder / HEAD_FOLDER).is_dir() else None
    modules = read_modules(folder)
    kinds = [module["type"].rpartition(".")[2] for module in modules]
    if "Dense" not in kinds:
        return None
    place = kinds.index("Dense")
    own = modules[place]["type"].startswith(_OWN_MODULES)
    if not own or kinds[place - 1 : place] != ["Pooling"] or kinds[place + 1 :] not in ([], ["Normalize"]):
        raise ValueError(
            f"{file}: has {', '.join(module['type'] for module in modules)}; only one Dense module of "
            "sentence-transformers, between Pooling and Normalize, is supported"
        )
    return folder / modules[place]["path"]


def head_size(folder: Path, hidden_size: int) -> int:
    """Components of the vectors of the model in a folder: its head's, or the hidden size. Reads no weights.

    Raises ValueError where the head is none that we compute, does not fit the hidden size, or its weights are damaged;
    FileNotFoundError where they are missing.
    """
    place = head_folder(folder)
    return hidden_size if place is None else _checked(place, hidden_size)[0]


def read_head(folder: Path, hidden_size: int) -> LinearHead | None:
    """The head of the model in a folder, float32; None if it has none. Raises as `head_size` does."""
    place = head_folder(folder)
    if place is None:
        return None
    size, bias = _checked(place, hidden_size)
    head = LinearHead(hidden_size, size, bias=bias)
    head.load_state_dict({name.removeprefix(_PREFIX): part for name, part in load_file(place / _WEIGHTS).items()})
    return head


def _checked(place: Path, hidden_size: int) -> tuple[int, bool]:
    """Components of the head's vectors, and whether it has a bias."""
    file = place / "config.json"
    config = read_json_object(file)
    size, bias = config.get("out_features"), config.get("bias", True)
    if config.get("activation_function", _IDENTITY) != _IDENTITY or config.get("use_residual"):
        raise ValueError(f"{file}: is more than a linear map; only a Dense with Identity for activation is supported")
    if config.get("in_features") != hidden_size or type(size) is not int or size < 1:
        raise ValueError(f"{file}: maps {config.get('in_features')} to {size} components, after {hidden_size}")
    expected = {f"{_PREFIX}weight": (size, hidden_size), **({f"{_PREFIX}bias": (size,)} if bias else {})}
    if check_model_files(place) != expected:
        raise ValueError(
            f"{place / _WEIGHTS}: expected a weight of {size} × {hidden_size}{' and a bias' if bias else ''}; "
            "fetch it again"
        )
    return size, bool(bias)


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
    save_file({f"{_PREFIX}{name}": tensor.contiguous() for name, tensor in weights.items()}, place / _WEIGHTS)
    write_text(place / "config.json", json.dumps(config, indent=2) + "\n")
