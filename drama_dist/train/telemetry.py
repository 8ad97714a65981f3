"""What a training step costs: tokens a second, share of the machine's peak, padding saved, memory.

Covers the figures of a step, and writing them to TensorBoard. It measures the peak of matrix products
once; floating-point operations are counted from shapes (encoder/flops.py), recomputation not included.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

import numpy as np
import torch

from drama_dist.distributed import ranks
from drama_dist.encoder.backbone import Encoder
from drama_dist.encoder.cut_texts import CutTexts
from drama_dist.encoder.flops import training_flops
from drama_dist.train.memory import peak_bytes, reset_peak
from drama_dist.train.step import StepResult
from drama_dist.train.term import TermResult

_SMALLEST_PRODUCT = 256  # rows of the square matrices whose product shows the peak
_LARGEST_PRODUCT = {"cpu": 2048, "cuda": 8192}
_LONG_ENOUGH = 0.05  # seconds
_REPEATS = 8
_HISTOGRAM_BINS = 20


class Telemetry:
    """Figures of every step of one training run; `folder` None writes no event files."""

    def __init__(self, encoder: Encoder, folder: Path | None, first_step: int):
        self.encoder = encoder
        self.peak = matrix_product_peak(next(encoder.parameters()).dtype, encoder.device)
        reset_peak(encoder.device)
        self._writer = None
        if folder is not None and ranks.rank() == 0:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder), purge_step=first_step + 1)

    def figures(self, result: StepResult, seconds: float) -> dict[str, Any]:
        """What metrics.jsonl holds of a step's cost, and of its distributions. All ranks must call it."""
        tokens, flops = sum(result.lengths), training_flops(self.encoder.backbone.config, result.lengths)
        cut = [*astuple(result.queries_cut), *astuple(result.passages_cut)]
        on_this_rank = torch.tensor(
            [tokens, len(result.lengths), flops, result.recomputed * tokens, *cut],
            dtype=torch.float64,
            device=self.encoder.device,
        )
        tokens, sequences, operations, repeated, *cut = ranks.sum_over_ranks(on_this_rank).tolist()
        queries_cut, passages_cut = (CutTexts(*map(int, part)) for part in (cut[: len(cut) // 2], cut[len(cut) // 2 :]))
        longest = max(ranks.on_every_rank(max(result.lengths)))
        return {
            "tokens": int(tokens),
            "tokens_per_second": round(tokens / seconds, 1),
            "peak_share": round(operations / seconds / (self.peak * ranks.world_size()), 4),
            "padding_avoided": round(1 - tokens / (sequences * longest), 4),
            "recomputed_share": round(repeated / tokens, 4),
            "peak_memory_gib": round(peak_bytes(self.encoder.device) / 2**30, 3),
            "bytes_sent": ranks.take_traffic(),
            "queries_cut": asdict(queries_cut),
            "passages_cut": asdict(passages_cut),
            **{name: _histogram(values) for name, values in result.objective.distributions.items()},
        }

    def write(self, step: int, figures: dict[str, Any], objective: TermResult) -> None:
        """Add a step to the event files."""
        if self._writer is None:
            return
        for name, value in figures.items():
            if isinstance(value, (int, float)):
                self._writer.add_scalar(f"train/{name}", value, step)
            elif name not in objective.distributions:
                for key, part in value.items():
                    self._writer.add_scalar(f"{name}/{key}", part, step)
        for name, values in objective.distributions.items():
            if values:
                self._writer.add_histogram(f"train/{name}", np.array(values), step)

    def close(self) -> None:
        """Write out what is still in memory."""
        if self._writer is not None:
            self._writer.close()


def _histogram(values: Sequence[float]) -> dict[str, list[float]]:
    counts, edges = np.histogram(values, bins=_HISTOGRAM_BINS)
    return {"counts": counts.tolist(), "edges": edges.tolist()}


@torch.no_grad()
def matrix_product_peak(dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second of a large product; the best of a few, of several sizes.

    Large: a device that is slow in this dtype is asked for a smaller one, and not for minutes.
    """
    size, peak, seconds = _SMALLEST_PRODUCT, 0.0, 0.0
    while seconds < _LONG_ENOUGH and size <= _LARGEST_PRODUCT[device.type]:
        seconds = _product_seconds(size, dtype, device)
        peak = max(peak, 2 * size**3 / seconds)
        size *= 2
    return peak


def _product_seconds(size: int, dtype: torch.dtype, device: torch.device) -> float:
    generator = torch.Generator(device).manual_seed(0)  # the global one's state belongs to the training
    left, right = (torch.randn(size, size, generator=generator, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(_REPEATS):
        began = time.perf_counter()
        (left @ right)[0, 0].item()  # waits for a GPU
        best = min(best, time.perf_counter() - began)
    return best
