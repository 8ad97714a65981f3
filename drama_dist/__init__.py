"""DRAMA: turn a large language model and unlabelled text into a small, fast dense retriever.

import drama_dist
encoder = drama_dist.load("runs/quickstart/export")
vectors = encoder.encode_queries(["how do I invert a matrix"], dim=256)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from drama_dist.encoder.backbone import Encoder, load

__all__ = ["Encoder", "load"]


def __getattr__(name: str) -> Any:
    """Import the encoder on first use: `drama --help` must not wait for torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from drama_dist.encoder import backbone

    return getattr(backbone, name)
