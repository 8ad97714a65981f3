"""Where a model comes from: GGUF files, local folders, files inside installed packages, hub names.

Covers resolving a name from the settings to something that transformers loads, converting a GGUF file once, and
fingerprints. Does not load the model: backbone.py, prune/stage.py and augment/writers do.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path

from drama_dist.encoder.contract import has_files, read_modules
from drama_dist.encoder.failures import reason, told_as
from drama_dist.encoder.model_files import has_weights, refuse_pointers
from drama_dist.labels import is_endpoint, without_url
from drama_dist.run.folder import fingerprint
from drama_dist.run.progress import say

_PACKAGE = "package:"
_ALWAYS_READ = ("config.json", "tokenizer_config.json", "tokenizer.json")
# What an encoder may say of itself
_DESCRIPTIONS = ("drama.json", "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")
_TIMEOUT = 10  # seconds, for the hub's answer


def cache_folder() -> Path:
    """Where converted models are kept: $DRAMA_CACHE, or ~/.cache/drama-dist."""
    return Path(os.environ.get("DRAMA_CACHE") or Path.home() / ".cache" / "drama-dist")


def resolve(name: str) -> str:
    """Return a local folder, or the hub name unchanged.

    `package:IMPORT_NAME/PATH` is looked up inside an installed package; a `.gguf` file is converted once to
    safetensors. Raises FileNotFoundError, naming the path, if it does not exist.
    """
    source = locate(name)
    if isinstance(source, Path) and source.is_file():
        return str(_converted(source))
    return str(source)


def locate(name: str) -> Path | str:
    """A local folder, an unconverted GGUF file, or the hub name; raises FileNotFoundError as `resolve` does."""
    path = _inside_package(name) if name.startswith(_PACKAGE) else _expanded(name)
    if path.is_dir() or (path.suffix == ".gguf" and path.is_file()):
        return path
    looks_like_a_path = name.startswith((_PACKAGE, "/", ".", "~")) or name.endswith(".gguf") or name.count("/") != 1
    if path.exists() or looks_like_a_path:
        raise FileNotFoundError(f"{name}: expected a model folder or a .gguf file at {path}")
    return name


def _expanded(name: str) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError as error:  # there is no such user, or no home
        raise FileNotFoundError(f"{name}: no folder of that user is known; write the path out") from error


def model_fingerprint(name: str) -> str:
    """What identifies a model as an input of a stage: the hash of its files, or its hub name and revision.

    Of an endpoint no more is known than the model's name.
    Raises FileNotFoundError as `resolve` does, and if the hub does not know the name or cannot be reached.
    """
    if is_endpoint(name):
        return without_url(name)
    source = resolve(name)
    return fingerprint(source) if Path(source).exists() else f"hub:{source}@{_revision(source)}"


def reachable(source: str, also: Iterable[str] = ()) -> str:
    """Return what `resolve` returned, or the cached copy's folder where it is a hub name of which all files are cached.

    also: further files that are read if the model has them. The folder is the commit that `model_fingerprint` names,
    and loading from it asks the hub nothing, which without a network takes minutes.
    Raises FileNotFoundError where it is a hub name that nothing is known of: transformers would try again for half a
    minute, and say only that the hub cannot be reached.
    """
    if Path(source).exists():
        return source
    _revision(source)
    return str(_whole_snapshot(source, also) or source)


def fetched(source: str) -> Path:
    """The folder of what `resolve` returned; of a hub name with the modules' files, which transformers does not fetch.

    Where the hub cannot be reached, which a single request tells, the folder is as it was cached.
    """
    from huggingface_hub import snapshot_download

    if Path(source).exists():
        return Path(source)
    whole = _whole_snapshot(source, _DESCRIPTIONS)
    return whole or Path(snapshot_download(source, allow_patterns=["*.json", "*/model.safetensors"]))


def _whole_snapshot(name: str, also: Iterable[str]) -> Path | None:
    """The folder of the cached copy, if nothing is missing that loading would fetch."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(name, "config.json")
    unknown = [file for file in also if try_to_load_from_cache(name, file) is None]  # known to be missing is known
    if not isinstance(config, str) or unknown:
        return None
    folder = Path(config).parent
    whole = all((folder / file).is_file() for file in _ALWAYS_READ) and has_weights(folder)
    if not whole or any(b'"auto_map"' in (folder / file).read_bytes() for file in _ALWAYS_READ[:2]):
        return None  # code of the model, which auto_map names, may be in further files
    modules = read_modules(folder) if (folder / "modules.json").is_file() else []
    return folder if all((folder / module["path"]).is_dir() for module in modules if has_files(module)) else None


def _revision(name: str) -> str:
    """The commit of a hub model: of the cached copy or, if there is none yet, on the hub, in a single request."""
    from huggingface_hub import model_info, try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(name, "config.json")
        return Path(cached).parent.name if isinstance(cached, str) else str(model_info(name, timeout=_TIMEOUT).sha)
    except Exception as error:  # which types the network library raises changes between versions
        raise FileNotFoundError(
            f"{name}: no such folder, and not available from the hub ({reason(error)}); correct the path from "
            f"{Path.cwd()}, or the hub name, or use a local folder"
        ) from error


def _inside_package(name: str) -> Path:
    package, _, inner = name.removeprefix(_PACKAGE).partition("/")
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):  # of a parent that is not installed, of a name that is none
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"{name}: the Python package {package!r} is not installed; `make` installs those that quickstart needs"
        )
    return Path(spec.submodule_search_locations[0]) / inner


def _converted(gguf: Path) -> Path:
    target = cache_folder() / f"{gguf.stem}-{fingerprint(gguf)[:16]}"
    if target.is_dir():
        return target
    refuse_pointers(gguf)
    say(f"converting {gguf.name} to safetensors (once) -> {target}")
    temporary = target.with_name(f"{target.name}.tmp-{uuid.uuid4().hex[:8]}")
    _convert(gguf, temporary)
    try:
        temporary.rename(target)
    except OSError:  # another process got there first
        shutil.rmtree(temporary)
    return target


def _convert(gguf: Path, target: Path) -> None:
    import torch
    from gguf import GGUFReader
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from drama_dist.encoder.pretrained import refuse_unfit

    folder, file, dtype = gguf.parent, gguf.name, torch.bfloat16
    with told_as(f"{gguf}: cannot be read as a GGUF file of a model that transformers knows"):
        stored = [tensor.name for tensor in GGUFReader(gguf).tensors]
        config = AutoConfig.from_pretrained(folder, gguf_file=file, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file, trust_remote_code=False)
        quantized, found = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=file, trust_remote_code=False, dtype=dtype, output_loading_info=True
        )
    refuse_unfit(str(gguf), found, optional=())
    plain = AutoModelForCausalLM.from_config(config, trust_remote_code=False, dtype=dtype)
    if _has_biases(stored) and not _has_biases(plain.state_dict()):
        raise ValueError(f"{gguf}: has biases, which transformers leaves out of GGUF files; use the model's own folder")
    plain.load_state_dict(quantized.state_dict())  # transformers does not save a model that it loaded from GGUF
    plain.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _has_biases(names: Iterable[str]) -> bool:
    return any(name.endswith(".bias") for name in names)
