"""What `drama plan` knows of devices: this machine by measuring it, others by their data sheets.

Covers memory, the peak of products, and links. Figures of data sheets are without sparsity, and one way for links.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from drama_dist.distributed.precision import dtype_of
from drama_dist.train.memory import free_bytes
from drama_dist.train.telemetry import matrix_product_peak

CPU = "cpu"
_RANKS_OF_A_MACHINE = 8


@dataclass(frozen=True)
class Device:
    """One rank's. memory: bytes that it may use; peaks: operations a second of a product, by dtype, tf32 on GPUs.

    links: bytes a second that a rank sends to others of its machine, and to other machines; None: not known.
    """

    name: str
    memory: float
    peaks: dict[str, float]
    links: tuple[float, float] | None
    source: str

    @property
    def is_cpu(self) -> bool:
        return self.name == CPU

    def seconds_to_send(self, count: int, ranks: int) -> float:
        """Over the slowest link between so many ranks, eight a machine; 0 where links are not known."""
        return count / self.links[ranks > _RANKS_OF_A_MACHINE] if self.links else 0.0


_H100 = {"bfloat16": 989.4e12, "tf32": 494.7e12, "float32": 66.9e12}
_A100 = {"bfloat16": 312e12, "tf32": 156e12, "float32": 19.5e12}
_DGX_H100, _DGX_A100 = (450e9, 50e9), (300e9, 25e9)  # NVLink, and InfiniBand for each GPU
_H100_SHEETS = "NVIDIA H100 Tensor Core GPU Architecture, table 2; DGX H100 data sheet"
_A100_SHEETS = "NVIDIA A100 data sheet; DGX A100 data sheet"
_GPUS = (
    Device("h100-80g", 80e9, _H100, _DGX_H100, _H100_SHEETS),
    Device("h200", 141e9, _H100, _DGX_H100, "NVIDIA H200 data sheet; DGX H200 data sheet"),
    Device("a100-80g", 80e9, _A100, _DGX_A100, _A100_SHEETS),
    Device("a100-40g", 40e9, _A100, _DGX_A100, _A100_SHEETS),
)
SHEETS = {gpu.name: gpu for gpu in _GPUS}
NAMES = (CPU, *SHEETS)


def device(name: str, ranks: int) -> Device:
    """A device of NAMES; of this machine's processor each of `ranks` has an equal part.

    Raises ValueError where there is no such device, or no rank.
    """
    if ranks < 1:
        raise ValueError(f"{ranks} ranks: expected 1 or more")
    if name in SHEETS:
        return SHEETS[name]
    if name != CPU:
        raise ValueError(f"device {name!r}: expected one of {', '.join(NAMES)}")
    cpu = torch.device(CPU)
    peaks = {dtype: matrix_product_peak(dtype_of(dtype), cpu) / ranks for dtype in ("bfloat16", "float32")}
    return Device(CPU, free_bytes(cpu) / ranks, peaks, None, "measured now on this machine, shared by all ranks")
