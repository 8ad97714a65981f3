"""Rank, world size and collectives: the only module that calls torch.distributed.

Covers the variables of torchrun, the DeepSpeed launcher, slurm and Open MPI. Collectives are
plain functions on tensors; with one process each is the identity. Gradients are not
tracked through them: the caller owns the backward pass.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections import Counter
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist

_RANK_NAMES = ("RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")
_WORLD_NAMES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
_LOCAL_NAMES = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID")
_LOCAL_WORLD_NAMES = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "SLURM_NTASKS_PER_NODE")

VARIABLES = (*_RANK_NAMES, *_WORLD_NAMES, *_LOCAL_NAMES, *_LOCAL_WORLD_NAMES)
_PATIENCE = timedelta(days=2)  # others wait for what rank 0 does alone; launchers end them where one dies

_LAUNCHER = os.getppid()

_sent: Counter[str] = Counter()


def _from_environment(names: tuple[str, ...], default: int) -> int:
    for name in names:
        if os.environ.get(name):
            return int(os.environ[name])
    return default


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else _from_environment(_RANK_NAMES, 0)


def world_size() -> int:
    """How many processes work together."""
    return dist.get_world_size() if dist.is_initialized() else _from_environment(_WORLD_NAMES, 1)


def local_rank() -> int:
    """This process's number on its own machine, from 0: the GPU that it takes."""
    return _from_environment(_LOCAL_NAMES, 0)


def local_world_size() -> int:
    """How many processes of the job share this machine."""
    return _from_environment(_LOCAL_WORLD_NAMES, world_size())


def device() -> torch.device:
    """The GPU of this rank, or the CPU."""
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def start() -> None:
    """Join the process group (NCCL on GPUs, gloo elsewhere); safe to call again.

    With one process a local group is made, because DeepSpeed asks for one.
    """
    if dist.is_initialized():
        return
    if "MASTER_PORT" not in os.environ:
        _meet()
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    number, size = rank(), world_size()
    if size > 1:
        _end_with_the_launcher()
    os.environ.update(RANK=str(number), WORLD_SIZE=str(size), LOCAL_RANK=str(local_rank()))
    if device().type == "cuda":
        torch.cuda.set_device(device())
    backend = "nccl" if device().type == "cuda" else "gloo"
    dist.init_process_group(backend, rank=number, world_size=size)
    dist.distributed_c10d._set_pg_timeout(_PATIENCE, dist.group.WORLD)  # from here on, not for meeting


def _meet() -> None:
    """Choose where the ranks meet, which mpirun and srun do not say."""
    if world_size() == 1:
        os.environ["MASTER_PORT"] = str(_free_port())
    elif "OMPI_COMM_WORLD_RANK" in os.environ:
        _meet_by_mpi()
    elif "SLURM_STEP_NODELIST" in os.environ:
        _meet_in_slurm()
    else:
        raise ValueError("MASTER_PORT is not set: start several ranks with deepspeed, torchrun, srun or mpirun")


def _meet_in_slurm() -> None:
    """On the step's first node, at a port made of the job's number, below those that systems give out by themselves."""
    nodes = os.environ["SLURM_STEP_NODELIST"]
    if "MASTER_ADDR" not in os.environ:
        named = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
        os.environ["MASTER_ADDR"] = named.stdout.split()[0]
    number = 7 * int(os.environ["SLURM_JOB_ID"]) + int(os.environ["SLURM_STEP_ID"])
    os.environ["MASTER_PORT"] = str(12000 + number % 20000)


def _meet_by_mpi() -> None:
    """Where rank 0 chooses; it tells the others through MPI."""
    try:
        import mpi4py

        mpi4py.rc.initialize = mpi4py.rc.finalize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            f"ranks under mpirun need mpi4py to find each other ({error}): pip install mpi4py, "
            "or say where they meet: mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=29500"
        ) from error
    MPI.Init()
    here = "127.0.0.1" if local_world_size() == world_size() else MPI.Get_processor_name()
    address, port = MPI.COMM_WORLD.bcast((here, _free_port()))
    MPI.Finalize()  # now: at its end a rank that fails would wait here for the others, and they for it
    os.environ.setdefault("MASTER_ADDR", address)
    os.environ["MASTER_PORT"] = str(port)


def _end_with_the_launcher() -> None:
    """A launcher that is killed cannot tell its ranks to end: Linux does it (prctl 1 is PR_SET_PDEATHSIG)."""
    if sys.platform == "linux" and _from_environment(_LOCAL_NAMES, -1) >= 0:  # ranks that were started by hand go on
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
        if os.getppid() != _LAUNCHER:
            raise SystemExit("the launcher has ended meanwhile")


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def end(status: int) -> NoReturn:
    """End this process with an exit status; after a failure and among several ranks at once, with no more of Python's.

    Python would wait for threads that encode. And DeepSpeed's engine outlives `stop`, with gloo's threads, which need
    the interpreter to free what a collective has sent: one that asks for it too late aborts the process
    (pytorch/pytorch#190489).
    """
    if world_size() == 1 and status == 0:
        sys.exit()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:  # their reader may be gone
        os._exit(status)


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def barrier() -> None:
    """Wait for every rank."""
    if dist.is_initialized() and world_size() > 1:
        dist.barrier()


def own_share(count: int) -> range:
    """The contiguous positions of `count` items that belong to this rank; sizes differ by one at most."""
    size, number = world_size(), rank()
    base, extra = divmod(count, size)
    begin = number * base + min(number, extra)
    return range(begin, begin + base + (number < extra))


def on_every_rank(number: int) -> list[int]:
    """The number that each rank passes, in order of rank."""
    if world_size() == 1:
        return [number]
    counts = [torch.zeros(1, dtype=torch.int64, device=device()) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([number], dtype=torch.int64, device=device()))
    _count("figures", 8 * (world_size() - 1))
    return [int(count) for count in counts]


def gather_rows(rows_NK: torch.Tensor, kind: str) -> torch.Tensor:
    """Concatenate every rank's rows in order of rank; ranks may hold different numbers of rows.

    kind: what the bytes are counted as (see `take_traffic`).
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


def sum_to_owner(rows_NK: torch.Tensor, own_rows: int, kind: str) -> torch.Tensor:
    """Sum over ranks a tensor of `gather_rows` shape, in order of rank; return the rows that this rank put in.

    Every rank sends each other rank that one's rows: a reduce-scatter that takes uneven rows.
    """
    if world_size() == 1:
        return rows_NK
    counts = on_every_rank(own_rows)
    found = rows_NK.new_empty(world_size() * own_rows, *rows_NK.shape[1:])
    dist.all_to_all_single(found, rows_NK.contiguous(), [own_rows] * world_size(), counts)
    _count(kind, rows_NK.nbytes * (len(rows_NK) - own_rows) // max(1, len(rows_NK)))
    return found.view(world_size(), own_rows, *rows_NK.shape[1:]).sum(0)


def sum_over_ranks(value: torch.Tensor, kind: str = "figures") -> torch.Tensor:
    """Sum a tensor of equal shape over ranks."""
    return _reduced(value, dist.ReduceOp.SUM, kind)


def largest_over_ranks(value: torch.Tensor, kind: str = "figures") -> torch.Tensor:
    """Element by element the largest of a tensor of equal shape over ranks."""
    return _reduced(value, dist.ReduceOp.MAX, kind)


def take_traffic() -> dict[str, int]:
    """Bytes that this rank has sent since the last call, by kind; what DeepSpeed sends is not among them.

    A collective counts as what no algorithm can do with less of: all-gather and reduce-scatter (W − 1) parts,
    all-reduce 2 (W − 1) / W of its tensor.
    """
    taken = dict(_sent)
    _sent.clear()
    return taken


def _count(kind: str, count: int) -> None:
    _sent[kind] += count


def _reduced(value: torch.Tensor, operation: Any, kind: str) -> torch.Tensor:
    if world_size() == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total, operation)
    _count(kind, 2 * (world_size() - 1) * total.nbytes // world_size())
    return total
