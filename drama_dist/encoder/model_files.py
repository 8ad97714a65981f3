"""The files of a local model folder: there, whole, and what the weights' headers say; no weight is read.

Covers config.json, safetensors files and their index, and files that Git LFS has not fetched. What the names in them
mean is in pretrained.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_LFS = b"version https://git-lfs"
_LFS_LONGEST = 1024  # bytes of a pointer, by its specification

Shapes = dict[str, tuple[int, ...]]


def check_model_files(folder: Path) -> Shapes:
    """The shape of every stored weight, by name.

    Raises FileNotFoundError where config.json or weights are missing, ValueError where a file is a pointer of Git LFS,
    is not JSON, or is cut short, or weights are whole numbers though config.json says nothing of quantization.
    """
    refuse_pointers(folder)
    quantized = "quantization_config" in read_json_object(folder / "config.json")
    shapes: Shapes = {}
    for path in _weight_files(folder):
        try:
            with safe_open(path, "pt") as file:
                stored = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                shapes |= {name: tuple(part.get_shape()) for name, part in stored.items()}
                dtypes = {name: part.get_dtype() for name, part in stored.items()}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: not a whole safetensors file ({error}); fetch it again") from error
        if not quantized:
            _refuse_whole_numbers(path, dtypes)
    return shapes


def _refuse_whole_numbers(path: Path, dtypes: dict[str, str]) -> None:
    """Buffers may be such, as BERT's position_ids are."""
    for name, dtype in sorted(dtypes.items()):
        if name.endswith((".weight", ".bias")) and not dtype.startswith(("F", "BF")):
            raise ValueError(
                f"{path}: {name} is stored as {dtype}, not in floating point; take the model in bfloat16 or float32"
            )


def has_weights(folder: Path) -> bool:
    """Whether the folder has all files of weights that it names."""
    try:
        return bool(_weight_files(folder))
    except FileNotFoundError:
        return False


def refuse_pointers(path: Path) -> None:
    """Raise ValueError where a file, or a file of a folder that is read, is a pointer of Git LFS."""
    files = [path] if path.is_file() else [file for end in ("*.json", "*.safetensors") for file in path.glob(end)]
    for file in sorted(files):
        if file.is_file() and file.stat().st_size <= _LFS_LONGEST and file.read_bytes().startswith(_LFS):
            raise ValueError(f"{file}: a pointer of Git LFS, not the file itself; fetch it with `git lfs pull`")


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file with an object; raises FileNotFoundError where there is none, ValueError where it is something else.

    Both name the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; a model's folder has this file")
    value = read_json_file(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_json_file(path: Path) -> Any:
    """Any JSON; raises ValueError, naming the file, where it is none."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}); fetch it again") from error


def _weight_files(folder: Path) -> list[Path]:
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    if (folder / _INDEX).is_file():
        return _shards(folder)
    others = sorted(path.name for end in ("*.bin", "*.pt", "*.pth") for path in folder.glob(end))
    hint = f"; {others[0]} is not read, as such files can run code: convert it to safetensors" if others else ""
    raise FileNotFoundError(f"{folder}: no weights: neither {_WEIGHTS} nor {_INDEX} is there{hint}")


def _shards(folder: Path) -> list[Path]:
    named = read_json_object(folder / _INDEX).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
        raise ValueError(f"{folder / _INDEX}: weight_map must say for each weight which file has it")
    files = [folder / name for name in sorted(set(named.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder}: {len(missing)} of {len(files)} files of the weights are missing, first {missing[0]}"
        )
    return files
