"""Which writer the settings mean."""

from __future__ import annotations

from drama_dist.augment.writers.endpoint import EndpointWriter
from drama_dist.augment.writers.local import LocalWriter
from drama_dist.augment.writers.writer import Writer
from drama_dist.endpoints import is_endpoint
from drama_dist.settings import Settings


def writer_of(settings: Settings) -> Writer:
    """The LLM of augment.writer, or the one that is pruned; not loaded yet."""
    name = settings.writer
    if is_endpoint(name):
        return EndpointWriter(name, settings.augment.requests)
    return LocalWriter(name, settings.trust_remote_code)
