"""The encode stage: a collection encoded by a system, RUN/encode/COLLECTION/SYSTEM.

The system (systems.py) decides what is written: embedding shards, or a lexical index.
"""

from __future__ import annotations

from typing import Any

from drama_dist.corpus.collection import open_collection
from drama_dist.run.folder import StageFolder
from drama_dist.run.graph import stored_collection
from drama_dist.run.runner import Run
from drama_dist.search.systems import system_called
from drama_dist.settings import Settings


def sections(settings: Settings, collection: str, system: str) -> dict[str, Any]:
    """The settings that the encoding depends on."""
    return system_called(system, settings).sections(settings)


def inputs(run: Run, collection: str, system: str) -> dict[str, str]:
    """The fingerprint of the system's external model, if it has one."""
    model = system_called(system, run.settings).model(run.settings)
    return {} if model is None else {"model": run.model_fingerprint(model)}


def encode(run: Run, folder: StageFolder, collection: str, system: str) -> None:
    """Encode the collection, or a share of it."""
    stored = open_collection(run.path(stored_collection(collection)))
    system_called(system, run.settings).encode(run.settings, folder, stored)
