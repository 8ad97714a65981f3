"""What launchers tell a process of its place among the others: rank, world size, and both on its machine.

Covers the variables of torchrun, the DeepSpeed launcher, Open MPI, MVAPICH, MPICH and slurm. Does not cover how ranks
find each other (ranks.py).
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Launcher:
    """The names of the variables that one family of launchers sets."""

    rank: str
    size: str
    local_rank: str
    local_size: tuple[str, ...]

    @property
    def variables(self) -> tuple[str, ...]:
        return (self.rank, self.size, self.local_rank, *self.local_size)


TORCHRUN = Launcher("RANK", "WORLD_SIZE", "LOCAL_RANK", ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"))  # and deepspeed
OPEN_MPI = Launcher(
    "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", ("OMPI_COMM_WORLD_LOCAL_SIZE",)
)
MPICH = Launcher("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", ("MPI_LOCALNRANKS",))  # and Intel MPI
MVAPICH = Launcher(
    "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", ("MV2_COMM_WORLD_LOCAL_SIZE",)
)
SLURM = Launcher("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", ("SLURM_NTASKS_PER_NODE",))
MPI = (OPEN_MPI, MVAPICH, MPICH)
_LAUNCHERS = (TORCHRUN, *MPI, SLURM)  # inner ones first: srun may start each of the others
_OF_TORCHRUN = "TORCHELASTIC_RUN_ID"  # it sets this one, too

VARIABLES = tuple(name for launcher in _LAUNCHERS for name in launcher.variables)


@dataclass(frozen=True)
class Place:
    """local_rank, local_size: on this machine; None where no launcher says so. launchers: those that say all this."""

    rank: int
    size: int
    local_rank: int | None = None
    local_size: int | None = None
    launchers: tuple[Launcher, ...] = ()


def place() -> Place:
    """This process's place.

    The first launcher that tells both rank and world size is believed, and one before it must not contradict it. A size
    of 1 is believed beside a larger one only of torchrun: others' variables stay in a shell, and whatever starts ranks
    from there passes them on. Where none tells both, rank 0 or size 1 is a single process: slurm gives rank 0 to a
    batch script. Raises ValueError, naming variables and values, where anything else is told: the process would take
    itself for another, or for the only one.
    """
    told = {launcher: (_number(launcher.rank), _number(launcher.size)) for launcher in _LAUNCHERS}
    whole = [launcher for launcher in _LAUNCHERS if None not in told[launcher]]
    rank, size = (told[whole[0]][0] or 0, told[whole[0]][1] or 0) if whole else (0, 1)
    for launcher in _LAUNCHERS[: _LAUNCHERS.index(whole[0])] if whole else _LAUNCHERS:
        if told[launcher][0] not in (None, rank) or told[launcher][1] not in (None, size):
            raise ValueError(_contradiction(launcher, whole[:1]))
    larger = [launcher for launcher in whole if (told[launcher][1] or 0) > 1]
    if size == 1 and larger and not (whole[0] is TORCHRUN and os.environ.get(_OF_TORCHRUN)):
        raise ValueError(_contradiction(whole[0], larger[:1]))
    if rank >= size:
        raise ValueError(f"{said(whole[0])}: a rank must be less than the world size; check how ranks are started")
    return _with_local(Place(rank, size, launchers=tuple(each for each in whole if told[each] == (rank, size))))


def said(*launchers: Launcher) -> str:
    """The variables of launchers that are set, with their values."""
    names = [name for launcher in launchers for name in launcher.variables if os.environ.get(name)]
    return ", ".join(f"{name}={os.environ[name]}" for name in names)


def _with_local(place: Place) -> Place:
    """The place with its local rank and size; raises ValueError as `place` does."""
    local_rank = local_size = None
    for launcher in place.launchers or _LAUNCHERS:
        rank = _number(launcher.local_rank)
        sizes = [size for size in map(_number, launcher.local_size) if size is not None]
        limits = sizes if launcher is not SLURM else []  # slurm's is the job's, and a step may have more
        if 0 in sizes or (rank is not None and rank >= min([place.size, *limits])):
            raise ValueError(
                f"{said(launcher)}: a local rank must be less than the number of ranks on the machine; "
                "check how ranks are started"
            )
        local_rank = rank if local_rank is None else local_rank
        local_size = min(sizes[0], place.size) if local_size is None and sizes else local_size
    return replace(place, local_rank=local_rank, local_size=local_size)


def _number(name: str) -> int | None:
    """A variable's value; None where it is not set, or empty."""
    text = os.environ.get(name)
    if not text:
        return None
    if not re.fullmatch("[0-9]{1,9}", text):
        raise ValueError(f"{name}={text!r}: expected a whole number, 0 or more; check how ranks are started")
    return int(text)


def _contradiction(launcher: Launcher, believed: Sequence[Launcher]) -> str:
    if believed:
        return (
            f"{said(launcher)}, but {said(*believed)}: variables of two launchers contradict each other; "
            "unset those that do not belong to this job"
        )
    missing = launcher.size if os.environ.get(launcher.rank) else launcher.rank
    return (
        f"{said(launcher)}, but {missing} is not set: one of several processes needs both; start ranks with deepspeed, "
        "torchrun, srun or mpirun, or unset the variables for a single process"
    )
