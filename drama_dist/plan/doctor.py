"""`drama doctor`: what this machine offers, what takes the place of what is missing, and what to install.

Covers the list of checks, running each in a process of its own (one that crashes or hangs is a line like the
others), and the table. What each check does is in probes.py.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection

from drama_dist.plan import probes

_SECONDS = 180  # for a check; the first in an environment may compile
_WIDTH = 112


@dataclass(frozen=True)
class Check:
    """probe: see probes.py. without: what drama does where the probe fails; install: what changes that."""

    name: str
    probe: Callable[[], str]
    without: str = ""
    install: str = ""


@dataclass(frozen=True)
class Finding:
    """What a check saw; `without` and `install` are empty where it is there."""

    name: str
    there: bool
    seen: str
    without: str = ""
    install: str = ""


_COMPILER = "a C++ compiler with OpenMP (Debian: apt-get install g++)"
_CUDA = "a machine with an NVIDIA GPU and a CUDA build of PyTorch; then pip install '.[cuda]'"
_FAISS = "pip install '.[cpu]' (faiss-cpu), or '.[cuda]' (faiss-gpu-cu12)"
CHECKS = (
    Check("cores", probes.cores),
    Check("memory", probes.memory),
    Check("GPU", probes.gpu, "everything runs on the CPU", _CUDA),
    Check(
        "bfloat16",
        probes.bfloat16,
        "dtype: auto takes float32, which is slower than bfloat16 elsewhere",
        "nothing here: take a processor with AVX512-BF16 or AMX, or a GPU",
    ),
    Check("C++ compiler", probes.compiler, "see loss, attention and layers below", _COMPILER),
    Check("loss on the CPU", probes.loss, "backend eager: PyTorch operations, more time and memory", _COMPILER),
    Check(
        "attention on the CPU",
        probes.attention,
        "encoder/attention.py: PyTorch's flash kernel, plain products for short sequences",
        _COMPILER,
    ),
    Check(
        "layers on the CPU",
        probes.layers,
        "transformers' own layers, which keep more bytes for each token and take more time",
        _COMPILER,
    ),
    Check(
        "Triton",
        probes.triton,
        "on the CPU the loss runs in compiled C++ tiles (above); on a GPU in PyTorch operations, backend eager",
        _CUDA,
    ),
    Check(
        "FlashAttention on the GPU",
        probes.flash_attention,
        "on the CPU attention runs in our kernel (above); on a GPU in half precision encoding and training would fail",
        "on a machine with an NVIDIA GPU: a CUDA build of PyTorch, or pip install '.[cuda]' for flash-attn's",
    ),
    Check("faiss", probes.faiss, "encode, augment and evaluate fail: there is no other search", _FAISS),
    Check(
        "faiss on the GPU",
        probes.faiss_gpu,
        "nothing changes: drama searches on the CPU, exactly",
        "on a machine with an NVIDIA GPU: pip install faiss-gpu-cu12",
    ),
    Check("DeepSpeed", probes.training_engine, "training and healing fail", "pip install 'deepspeed>=0.19'"),
    Check(
        "DeepSpeed's ops",
        probes.deepspeed_ops,
        "nothing changes: the optimiser is PyTorch's fused AdamW, and ranks talk through gloo or NCCL",
        _COMPILER,
    ),
    Check(
        "mpi4py",
        probes.mpi4py,
        "ranks come from torchrun, the deepspeed launcher or srun instead of mpirun",
        "pip install '.[mpi]' (mpi4py and Open MPI as wheels)",
    ),
    Check(
        "mpirun",
        probes.mpirun,
        "start ranks with torchrun, the deepspeed launcher or srun",
        "pip install '.[mpi]', or the machine's own MPI",
    ),
    Check(
        "slurm",
        probes.slurm,
        "start ranks with torchrun, the deepspeed launcher (hostfile) or mpirun",
        "slurm's client commands, on a machine that its cluster knows (Debian: apt-get install slurm-client)",
    ),
)


def doctor(as_json: bool = False) -> None:
    """Print all findings, each as soon as it is there; as_json: one JSON list at the end."""
    if as_json:
        print(json.dumps([asdict(finding) for finding in examine()], indent=2))
        return
    print("yes: tried just now, and it works; no: what was seen, what drama does instead, and what changes that\n")
    for finding in examine():
        print(lines(finding), flush=True)


def examine(checks: Sequence[Check] = CHECKS, seconds: float = _SECONDS) -> Iterator[Finding]:
    """Run checks one after another, each in a process of its own that may take so many seconds."""
    for check in checks:
        there, seen = _outcome(check.probe, seconds)
        yield Finding(check.name, there, seen, *(("", "") if there else (check.without, check.install)))


def lines(finding: Finding) -> str:
    """A finding for the terminal."""
    column = max(len(check.name) for check in CHECKS) + 7
    margin = " " * column
    heading = f"{'yes' if finding.there else 'no '}  {finding.name}".ljust(column)
    text = [textwrap.fill(finding.seen, _WIDTH, initial_indent=heading, subsequent_indent=margin)]
    for lead, part in (("then: ", finding.without), ("to change that: ", finding.install)):
        if part:
            text.append(textwrap.fill(lead + part, _WIDTH, initial_indent=margin, subsequent_indent=f"{margin}  "))
    return "\n".join(text)


def _outcome(probe: Callable[[], str], seconds: float) -> tuple[bool, str]:
    """Whether a probe succeeded, and its line."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])  # once for all checks, in a process that has not used it
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(probe, sender), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(seconds):
            return False, f"no answer in {seconds:g} s"
        there, seen = receiver.recv()
        return bool(there), str(seen)
    except EOFError:
        process.join()
        return False, f"the check's process {_ending(process.exitcode)}"
    finally:
        process.kill()
        process.join()


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        return f"crashed: {signal.Signals(-code).name}"
    return f"ended with status {code}"


def _answer(probe: Callable[[], str], sender: Connection) -> None:
    """In the check's own process: its line is the only thing that comes back; what libraries print is dropped."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for output in (sys.stdout, sys.stderr):
        os.dup2(nowhere, output.fileno())  # for compilers, too, which these processes start
    from drama_dist.distributed import ranks  # here, in a process that has torch already

    for name in ranks.VARIABLES:
        os.environ.pop(name, None)  # an allocation's shell says how many ranks there could be; this is one process
    try:
        answer = True, probe()
    except probes.Missing as reason:
        answer = False, str(reason)
    except Exception as error:
        first = next(iter(str(error).splitlines()), "")
        answer = False, f"{type(error).__name__}: {first}".rstrip(": ")
    sender.send(answer)
