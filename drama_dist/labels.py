"""What systems, collections and endpoints are called: in the settings, and in folders and tables.

What a system is, is in search/systems.py; how an endpoint is asked, in encoder/endpoint.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from urllib.parse import urlsplit

OWN_COLLECTIONS = ("corpus", "windows")  # of every run: their labels are not for evaluate.collections
SYSTEMS = ("drama", "asymmetric", "ridge", "random-init", "llm-unpruned", "teacher", "bm25")
OTHER_MODEL = "model:"
MIX = "+"  # drama+bm25: a mix of two systems' scores
HUB, IR_DATASETS = "huggingface:", "ir_datasets:"  # collections by name
NAMED_FORMS = f"{HUB}OWNER/NAME[@REVISION][/SUBSET][/SPLIT] or {IR_DATASETS}ID"
_HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:@(refs/[\w.-]+/[\w.-]+|[\w.-]+))?((?:/[\w.+=-]+){0,2})")
_ID = re.compile(r"[\w.+-]+(/[\w.+-]+)*")


@dataclass(frozen=True)
class HubName:
    """A data set on the Hugging Face hub: OWNER/NAME, a revision, and what follows: a subset, a split, or both."""

    repository: str
    revision: str | None
    parts: tuple[str, ...]


def is_named(collection: str) -> bool:
    """Whether a collection is named by its place in a library, not by its path."""
    return collection.startswith((HUB, IR_DATASETS))


def hub_name(collection: str) -> HubName:
    """The parts of a name that begins with HUB; raises ValueError as `checked_collection` does."""
    match = _HUB_NAME.fullmatch(collection.removeprefix(HUB))
    if not match:
        raise ValueError(f"must be {NAMED_FORMS}")
    repository, revision, parts = match.groups()
    return HubName(repository, revision, tuple(parts.split("/")[1:]))


def checked_collection(name: str) -> str:
    """The name itself; raises ValueError where it begins as one of a library, and does not go on as one."""
    rest = name.partition(":")[2]
    if is_named(name) and ("--" in rest or {"", ".", ".."} & {*rest.split("/")}):
        raise ValueError(f"must be {NAMED_FORMS}, without --")  # which stands for / in the names of folders
    if name.startswith(HUB):
        hub_name(name)
    elif name.startswith(IR_DATASETS) and not _ID.fullmatch(rest):
        raise ValueError(f"must be {NAMED_FORMS}")
    return name


def checked_suite(name: str) -> str:
    """The name itself; raises ValueError where it begins as a list of named collections, and is none."""
    if is_named(name):
        parts = names_of(name)
        if not all(is_named(checked_collection(part)) for part in parts) or len({*parts}) < len(parts):
            raise ValueError(f"must be different collections, each {NAMED_FORMS}, with commas between")
    return name


def names_of(suite: str) -> list[str]:
    """The collections of a suite that names them, with commas between."""
    return [name.strip() for name in suite.split(",")]


def _label_of_named(collection: str) -> str:
    """What the data set is called, without owner and revision, and what of it is meant."""
    if collection.startswith(HUB):
        name = hub_name(collection)
        return "-".join([name.repository.partition("/")[2], *name.parts])
    return collection.removeprefix(IR_DATASETS).replace("/", "-")


def is_endpoint(name: str) -> bool:
    """Whether a model's name is an endpoint's: URL#MODEL, as https://api.openai.com/v1#text-embedding-3-small."""
    return name.startswith(("http://", "https://"))


def checked_endpoint(name: str) -> str:
    """The name itself; raises ValueError where it is of an endpoint, and not a whole one."""
    if is_endpoint(name):
        url, _, model = name.partition("#")
        try:
            has_host = bool(urlsplit(url).hostname) and urlsplit(url).port != 0
        except ValueError:
            has_host = False
        if not has_host or not model:
            raise ValueError("must be URL#MODEL, as http://localhost:8000/v1#NAME")
    return name


def without_url(name: str) -> str:
    """An endpoint's model as #MODEL, since servers move; any other name as it is."""
    return f"#{name.partition('#')[2]}" if is_endpoint(name) else name


def mixed(name: str) -> tuple[str, ...]:
    """The two systems of a mix; empty for what is none."""
    parts = tuple(name.split(MIX))
    return parts if len(parts) == 2 and len({*parts} & {*SYSTEMS}) == 2 else ()


def known_system(name: str) -> str:
    """The name itself; raises ValueError where no system is called so."""
    if name not in SYSTEMS and not mixed(name) and name.removeprefix(OTHER_MODEL) in ("", name):
        raise ValueError(f"must be {', '.join(SYSTEMS)}, two of these as drama{MIX}bm25, or {OTHER_MODEL}NAME")
    return name


def labels_of(names: Sequence[str], reserved: Sequence[str]) -> dict[str, str]:
    """Label → name: last parts of paths, names of data sets, with a hash of the whole where a label is reserved or
    taken before.
    """
    labels: dict[str, str] = {}
    for name in names:
        path = Path(name.removeprefix(OTHER_MODEL))
        label = path.name if path.name not in ("", "..") else path.resolve().name
        label = _label_of_named(name) if is_named(name) else label
        is_system = name in SYSTEMS or bool(mixed(name))
        label = name if is_system else label
        taken = label in labels or ((label in reserved or bool(mixed(label))) and not is_system)
        if taken or not label:
            label = f"{label or 'root'}-{sha256(name.encode()).hexdigest()[:6]}"
        labels[label] = name
    return labels
