"""What several kernels' tests need."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def nan_in_new_memory() -> Iterator[None]:
    """torch.empty gives NaN (PyTorch's fill_uninitialized_memory)."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
