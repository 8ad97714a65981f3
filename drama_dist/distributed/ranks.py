"""Rank, world size and collectives: the only module that calls torch.distributed.

Covers where ranks meet, and how they end. Collectives are plain functions on tensors; with one process each is the
identity. Does not track gradients through them: the caller does the backward pass. What launchers tell a process is
read in launchers.py.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from drama_dist.distributed import launchers
from drama_dist.distributed.launchers import VARIABLES as VARIABLES

_TIMEOUT = timedelta(days=2)  # ranks wait while rank 0 works alone; if a rank dies, the launcher ends the others

_LAUNCHER = os.getppid()

_sent: Counter[str] = Counter()


def rank() -> int:
    """This process's rank, from 0; raises ValueError where launchers' variables make no sense (so do the next ones)."""
    return dist.get_rank() if dist.is_initialized() else launchers.place().rank


def world_size() -> int:
    """Number of processes that work together."""
    return dist.get_world_size() if dist.is_initialized() else launchers.place().size


def local_rank() -> int:
    """This process's rank on its machine, from 0, which is also the index of its GPU."""
    return launchers.place().local_rank or 0


def local_world_size() -> int:
    """Number of the job's processes on this machine."""
    return launchers.place().local_size or world_size()


def device() -> torch.device:
    """The GPU of this rank, or the CPU."""
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def start() -> None:
    """Join the process group (NCCL on GPUs, gloo elsewhere); safe to call again.

    A single process gets a group too, because DeepSpeed requires one.
    """
    if dist.is_initialized():
        return
    if "MASTER_PORT" not in os.environ:
        _rendezvous()
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    this_rank, size = rank(), world_size()
    if size > 1:
        _end_with_the_launcher()
    os.environ.update(RANK=str(this_rank), WORLD_SIZE=str(size), LOCAL_RANK=str(local_rank()))
    if device().type == "cuda":
        torch.cuda.set_device(device())
    backend = "nccl" if device().type == "cuda" else "gloo"
    dist.init_process_group(backend, rank=this_rank, world_size=size)
    dist.distributed_c10d._set_pg_timeout(_TIMEOUT, dist.group.WORLD)  # for collectives, not for the rendezvous


def _rendezvous() -> None:
    """Choose MASTER_ADDR and MASTER_PORT, which mpirun and srun do not set."""
    place = launchers.place()
    if place.size == 1:
        os.environ["MASTER_PORT"] = str(_free_port())
    elif launchers.OPEN_MPI in place.launchers:
        _rendezvous_by_mpi()
    elif launchers.SLURM in place.launchers:
        _rendezvous_in_slurm()
    elif not set(launchers.MPI).isdisjoint(place.launchers):
        _rendezvous_by_mpi()
    else:
        raise ValueError("MASTER_PORT is not set: start several ranks with deepspeed, torchrun, srun or mpirun")


def _rendezvous_in_slurm() -> None:
    """On the step's first node, at a port derived from the job id, below the range of ephemeral ports."""
    nodes = os.environ["SLURM_STEP_NODELIST"]
    if "MASTER_ADDR" not in os.environ:
        hosts = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
        os.environ["MASTER_ADDR"] = hosts.stdout.split()[0]
    offset = 7 * int(os.environ["SLURM_JOB_ID"]) + int(os.environ["SLURM_STEP_ID"])
    os.environ["MASTER_PORT"] = str(12000 + offset % 20000)


def _rendezvous_by_mpi() -> None:
    """At an address that rank 0 chooses and broadcasts through MPI."""
    try:
        import mpi4py

        mpi4py.rc.initialize = mpi4py.rc.finalize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            f"ranks under mpirun need mpi4py to find each other ({error}): pip install mpi4py, "
            "or set the address yourself: mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=29500"
        ) from error
    MPI.Init()
    found = MPI.COMM_WORLD.Get_size()
    if found != world_size():
        raise ValueError(
            f"mpi4py sees {found} of {world_size()} ranks: it was built for another MPI than the one whose mpirun "
            "started them; use the mpirun of its MPI, or build mpi4py again for this one"
        )
    host = "127.0.0.1" if local_world_size() == world_size() else MPI.Get_processor_name()
    address, port = MPI.COMM_WORLD.bcast((host, _free_port()))
    MPI.Finalize()  # now: at exit, a failed rank and the others would wait for each other here
    os.environ.setdefault("MASTER_ADDR", address)
    os.environ["MASTER_PORT"] = str(port)


def _end_with_the_launcher() -> None:
    """Have Linux end this rank when its launcher is killed and cannot do so itself (prctl 1 is PR_SET_PDEATHSIG)."""
    if sys.platform == "linux" and launchers.place().local_rank is not None:  # not ranks that were started by hand
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
        if os.getppid() != _LAUNCHER:
            raise SystemExit("the launcher has already ended")


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def end(status: int) -> NoReturn:
    """Exit with a status; after a failure, and among several ranks, immediately and without Python's own clean-up.

    Python would wait for threads that encode. And DeepSpeed's engine outlives `stop`, with gloo's threads, which need
    the interpreter to free what a collective has sent: a thread that asks for it too late aborts the process
    (pytorch/pytorch#190489).
    """
    if status == 0 and _is_single():
        sys.exit()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:  # flushing fails if the reader of the output is gone
        os._exit(status)


def _is_single() -> bool:
    try:
        return world_size() == 1
    except ValueError:  # a command that has no ranks has ended well
        return True


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def barrier() -> None:
    """Wait for every rank."""
    if dist.is_initialized() and world_size() > 1:
        dist.barrier()


def rank_slice(count: int) -> range:
    """This rank's contiguous indices out of `count` items; ranks' sizes differ by one at most."""
    base, extra = divmod(count, world_size())
    begin = rank() * base + min(rank(), extra)
    return range(begin, begin + base + (rank() < extra))


def on_every_rank(value: int) -> list[int]:
    """All-gather of one integer: the value that each rank passes, in order of rank."""
    if world_size() == 1:
        return [value]
    values = [torch.zeros(1, dtype=torch.int64, device=device()) for _ in range(world_size())]
    dist.all_gather(values, torch.tensor([value], dtype=torch.int64, device=device()))
    _count("figures", 8 * (world_size() - 1))
    return [int(each) for each in values]


def by_rank_0(work: Callable[[], int | None]) -> int:
    """What `work` returns (0 for None), on every rank; rank 0 alone does it.

    What it raises is raised on rank 0, and a ValueError on the others, so that none waits for the rest.
    """
    result, error = 0, None
    if rank() == 0:
        try:
            result = int(work() or 0)
        except Exception as raised:
            error = raised
    failed = on_every_rank(int(error is not None))[0]
    if error is not None:
        raise error
    if failed:
        raise ValueError("rank 0 failed; see its message")
    return on_every_rank(result)[0]


def gather_rows(rows_NK: torch.Tensor, kind: str) -> torch.Tensor:
    """Concatenate every rank's rows in order of rank; ranks may hold different numbers of rows.

    kind: the label under which the bytes are counted (see `take_traffic`).
    """
    if world_size() == 1:
        return rows_NK
    counts = on_every_rank(rows_NK.shape[0])
    padded = rows_NK.new_zeros(max(counts), *rows_NK.shape[1:])
    padded[: rows_NK.shape[0]] = rows_NK
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    _count(kind, (world_size() - 1) * padded.nbytes)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def sum_to_owner(rows_NK: torch.Tensor, local_rows: int, kind: str) -> torch.Tensor:
    """Sum a tensor of the shape that `gather_rows` returns over ranks, in order of rank; return this rank's rows.

    A reduce-scatter that takes uneven numbers of rows: every rank sends each other rank's rows to it.
    """
    if world_size() == 1:
        return rows_NK
    counts = on_every_rank(local_rows)
    received = rows_NK.new_empty(world_size() * local_rows, *rows_NK.shape[1:])
    dist.all_to_all_single(received, rows_NK.contiguous(), [local_rows] * world_size(), counts)
    _count(kind, rows_NK.nbytes * (len(rows_NK) - local_rows) // max(1, len(rows_NK)))
    return received.view(world_size(), local_rows, *rows_NK.shape[1:]).sum(0)


def sum_over_ranks(value: torch.Tensor, kind: str = "figures") -> torch.Tensor:
    """Sum a tensor of equal shape over ranks."""
    return _reduced(value, dist.ReduceOp.SUM, kind)


def largest_over_ranks(value: torch.Tensor, kind: str = "figures") -> torch.Tensor:
    """Elementwise maximum of a tensor of equal shape over ranks."""
    return _reduced(value, dist.ReduceOp.MAX, kind)


def take_traffic() -> dict[str, int]:
    """Bytes that this rank has sent since the last call, by kind; without DeepSpeed's own.

    Each collective counts as the least that any algorithm can send: all-gather and reduce-scatter W − 1 parts,
    all-reduce 2 (W − 1) / W of its tensor.
    """
    taken = dict(_sent)
    _sent.clear()
    return taken


def _count(kind: str, sent_bytes: int) -> None:
    _sent[kind] += sent_bytes


def _reduced(value: torch.Tensor, operation: Any, kind: str) -> torch.Tensor:
    if world_size() == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total, operation)
    _count(kind, 2 * (world_size() - 1) * total.nbytes // world_size())
    return total
