"""Memory of this rank: what is free, and the peak so far. On CUDA the GPU's, elsewhere the machine's."""

from __future__ import annotations

import contextlib
import resource
from pathlib import Path

import psutil
import torch

from drama_dist.distributed import ranks

_PROCESS = Path("/proc/self")
_CONTROL_GROUPS = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> float:
    """Bytes that this rank may still take: its part of what the machine, or its control group, has left."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return min(float(psutil.virtual_memory().available), *_left_in_groups(_control_group())) / ranks.local_world_size()


def reset_peak(device: torch.device) -> None:
    """Let `peak_bytes` count from here on; where the system does not offer that, it counts from the process's start."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        (_PROCESS / "clear_refs").write_text("5", "ascii")


def peak_bytes(device: torch.device) -> float:
    """The most that this rank has held at once since `reset_peak`."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    if not _PROCESS.exists():
        return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    lines = (_PROCESS / "status").read_text("utf-8").splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def _control_group() -> Path:
    try:
        lines = Path("/proc/self/cgroup").read_text("utf-8").splitlines()
    except OSError:
        return _CONTROL_GROUPS
    return _CONTROL_GROUPS / next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")


def _left_in_groups(group: Path) -> list[float]:
    """What each limit on the group and on those around it leaves (control groups, version 2: slurm, containers)."""
    left = [float("inf")]
    while group.is_relative_to(_CONTROL_GROUPS):
        try:
            limit, used = ((group / name).read_text("utf-8").strip() for name in ("memory.max", "memory.current"))
            left += [float(limit) - float(used) + _reclaimable(group)] if limit != "max" else []
        except OSError:
            pass
        group = group.parent
    return left


def _reclaimable(group: Path) -> float:
    """Bytes of cached files in a group, which the kernel gives back when they are needed."""
    lines = (group / "memory.stat").read_text("utf-8").splitlines()
    return float(next((line.split()[1] for line in lines if line.startswith("inactive_file ")), 0))
