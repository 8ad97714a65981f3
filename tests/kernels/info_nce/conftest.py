"""The backends under test, in chunks small enough that there are several."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from drama_dist.kernels import select_backend
from drama_dist.kernels.info_nce.cpu import CPUTiles
from drama_dist.kernels.info_nce.eager import EagerTiles
from drama_dist.kernels.info_nce.tiles import Chunking

sys.path.insert(0, str(Path(__file__).parent))
from cases import DIMS


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name that info_nce knows."""
    monkeypatch.setattr(EagerTiles, "chunking", Chunking(4 * 3 * 70 * 5, most_rows=512, row_step=1))
    monkeypatch.setattr(CPUTiles, "chunking", Chunking(4 * 3 * 70 * 12, most_rows=576, row_step=12))
    if request.param == "cpu":
        selected = select_backend(torch.device("cpu"), torch.float32)
        assert selected.name == "cpu"
        assert selected.chunks(33, 70, DIMS) == [slice(0, 12), slice(12, 24), slice(24, 33)]
    return str(request.param)
