"""What systems, collections and endpoints are called: in the settings, and in folders and tables.

What a system is, is in search/systems.py; how an endpoint is asked, in encoder/endpoint.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from urllib.parse import urlsplit

OWN_COLLECTIONS = ("corpus", "windows")  # of every run: their labels are not for evaluate.collections
SYSTEMS = ("drama", "asymmetric", "ridge", "random-init", "llm-unpruned", "teacher", "bm25")
OTHER_MODEL = "model:"
MIX = "+"  # drama+bm25: a mix of two systems' scores


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
    """Label → name: last parts of names, with a hash of the whole where a label is reserved or taken before."""
    labels: dict[str, str] = {}
    for name in names:
        path = Path(name.removeprefix(OTHER_MODEL))
        label = path.name if path.name not in ("", "..") else path.resolve().name
        is_system = name in SYSTEMS or bool(mixed(name))
        label = name if is_system else label
        taken = label in labels or ((label in reserved or bool(mixed(label))) and not is_system)
        if taken or not label:
            label = f"{label or 'root'}-{sha256(name.encode()).hexdigest()[:6]}"
        labels[label] = name
    return labels
