"""What `drama doctor` tries: each function imports, runs or compiles something, and says what it saw.

A probe returns one line where the thing is there and works, and raises where it is not; the exception's text is the
finding. Probes are run by doctor.py, each in a process of its own, so they may set variables and crash.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

_SECONDS = 20  # that a command may take


class Missing(RuntimeError):
    """What was looked for is not there; the message says what was seen instead."""


def cores() -> str:
    """Cores that this process may use, and what they compute with."""
    import torch

    from drama_dist.distributed.precision import cpuinfo

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    processor = cpuinfo("model name") or "processor without a name"
    instructions = torch.backends.cpu.get_cpu_capability()
    return f"{usable} of {os.cpu_count()}, {processor}, {instructions}, PyTorch uses {torch.get_num_threads()}"


def memory() -> str:
    """Bytes that are left here, within the limits of control groups."""
    import psutil
    import torch

    from drama_dist.train.memory import free_bytes

    free, total = free_bytes(torch.device("cpu")), psutil.virtual_memory().total
    return f"{free / 2**30:.1f} GiB free of {total / 2**30:.1f}"


def gpu() -> str:
    """CUDA devices, after a product on the first."""
    import torch

    if not torch.cuda.is_available():
        raise Missing(f"torch {torch.__version__} finds no CUDA device")
    ones = torch.ones(64, 64, device="cuda")
    assert float((ones @ ones)[0, 0]) == 64
    gpus = (torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count()))
    return ", ".join(f"{gpu.name} {gpu.total_memory / 2**30:.0f} GiB" for gpu in gpus)


def bfloat16() -> str:
    """What dtype: auto takes, and the same matrix product in bfloat16 and float32, timed."""
    import torch

    from drama_dist.distributed import ranks
    from drama_dist.distributed.precision import AUTO, bfloat16_instructions, dtype_name
    from drama_dist.train.telemetry import matrix_product_peak

    device = ranks.device()
    narrow, wide = (matrix_product_peak(dtype, device) / 1e9 for dtype in (torch.bfloat16, torch.float32))
    seen = f"products run at {narrow:.0f} Gflop/s, in float32 at {wide:.0f}"
    if device.type == "cpu":
        seen += f" ({', '.join(bfloat16_instructions()) or 'no bfloat16 instructions in /proc/cpuinfo'})"
    if dtype_name(AUTO) != "bfloat16":
        raise Missing(seen)
    return seen


def compiler() -> str:
    """A library of one function, built with OpenMP as kernels/native.py does, loaded and called."""
    from torch.utils import cpp_extension

    name = cpp_extension.get_cxx_compiler()
    with tempfile.TemporaryDirectory() as folder:
        source, built = Path(folder) / "seven.cpp", Path(folder) / "seven.so"
        source.write_text('extern "C" int seven() { return 7; }\n', "utf-8")
        _command(name, "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-o", str(built), str(source))
        assert ctypes.CDLL(str(built)).seven() == 7
    return _first_line(_command(name, "--version"))


def flash_attention() -> str:
    """Packed attention of one sequence on the GPU: flash-attn's, or PyTorch's own where that is not installed."""
    import torch

    from drama_dist.encoder.attention import flash_attn_is_installed, packed_attention
    from drama_dist.encoder.packing import pack

    name = f"flash-attn {_version('flash-attn')}" if flash_attn_is_installed() else "PyTorch's own"
    if not torch.cuda.is_available():
        raise Missing(f"{name} is here, but no CUDA device for it")
    heads = torch.ones(1, 1, 8, 64, device="cuda", dtype=torch.bfloat16)
    layer = torch.nn.Module()
    layer.config = SimpleNamespace(is_causal=False)  # type: ignore[assignment]
    attended, _ = packed_attention(layer, heads, heads, heads, None, 1.0, pack([[1] * 8], "cuda"))
    assert bool((attended == 1).all())
    return name


def triton() -> str:
    """The loss in Triton: on a GPU it runs, elsewhere one kernel is compiled for an H100."""
    import torch

    if not torch.cuda.is_available():
        from drama_dist.kernels.info_nce.ahead_of_time import compile_variant, variants

        norms = next(variant for variant in variants() if variant.kernel == "norms")
        registers = compile_variant(norms, "sm_90").registers
        raise Missing(
            f"{_version('triton')} compiles for sm_90 ({norms.name}: {registers} registers), but nothing here runs it"
        )
    difference = _loss_difference("cuda", torch.device("cuda"))
    return f"{_version('triton')}, loss differs from the reference by {difference:.0e}"


def faiss() -> str:
    """An exact search among four vectors."""
    library = importlib.import_module("faiss")
    _search(library)
    return str(library.__version__)


def faiss_gpu() -> str:
    """The same search in a GPU's memory."""
    library = importlib.import_module("faiss")
    if not hasattr(library, "StandardGpuResources"):
        raise Missing("this faiss was built without CUDA")
    if not library.get_num_gpus():
        raise Missing("faiss finds no CUDA device")
    _search(library, library.StandardGpuResources())
    return f"{library.get_num_gpus()} devices"


def training_engine() -> str:
    """Three optimiser steps of ZeRO 2 on one small matrix, in bfloat16; the weights must move."""
    import torch

    from drama_dist.distributed import ranks
    from drama_dist.distributed.engine import Engine, OptimiserSettings

    module = torch.nn.Linear(8, 8).to(ranks.device())
    before = module.weight.detach().clone()
    engine = Engine(module, OptimiserSettings("bfloat16", 2, 0.0, 1.0))
    for _ in range(3):
        ones = torch.ones(2, 8, device=ranks.device(), dtype=torch.bfloat16)
        engine.backward(engine.module(ones).sum(), last=True)
        engine.step(0.1)
    assert not torch.equal(before, module.weight.float())
    ranks.stop()
    return f"DeepSpeed {_version('deepspeed')}, three ZeRO 2 steps"


def deepspeed_ops() -> str:
    """DeepSpeed's own extensions: which of them it could build here."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    builders = importlib.import_module("deepspeed.ops.op_builder.all_ops").ALL_OPS
    names = sorted(name for name in builders if "not_implemented" not in name)
    able = [name for name in names if builders[name].is_compatible(verbose=False)]
    unable = ", ".join(name for name in names if name not in able) or "none"
    if not able:
        raise Missing(f"can build none of {unable}")
    return f"can build {', '.join(able)}; cannot build {unable}"


def mpi4py() -> str:
    """MPI started and left again in this process."""
    library = importlib.import_module("mpi4py.MPI")
    return f"{_version('mpi4py')} with {_first_line(library.Get_library_version())}"


def mpirun() -> str:
    """Two processes, each of which says its rank."""
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    ask = "from drama_dist.distributed import ranks; print(ranks.rank(), ranks.world_size())"
    command = _path_of("mpirun")
    out = _command(command, "-n", "2", "--oversubscribe", sys.executable, "-c", ask, **root)
    if sorted(line for line in out.splitlines() if line.strip()) != ["0 2", "1 2"]:
        raise Missing(f"{command} started two processes, and drama saw: {' / '.join(out.split(chr(10)))}")
    return f"{_first_line(_command(command, '--version', **root))}, two ranks found each other's number"


def slurm() -> str:
    """The commands, and whether a controller answers."""
    versions = {name: _first_line(_command(_path_of(name), "--version")) for name in ("sbatch", "srun")}
    nodes = _command(_path_of("sinfo"), "--noheader", "--format=%D %T").split("\n")
    return f"{versions['sbatch']}, nodes: {', '.join(nodes)}"


def loss() -> str:
    """The loss's kernels for the CPU, against the reference."""
    import torch

    from drama_dist.kernels.info_nce import cpu

    _built(cpu)
    difference = _loss_difference("cpu", torch.device("cpu"))
    return f"tiles.cpp compiled, loss differs from the reference by {difference:.0e}"


def attention() -> str:
    """The CPU's attention kernel, against the formula."""
    import torch

    from drama_dist.encoder.attention import plain_attention
    from drama_dist.kernels.llama_cpu import attention as kernel

    _built(kernel)
    torch.manual_seed(0)
    rows = torch.randn(5, 3 * kernel.HEAD)
    attended = kernel.attend(rows, torch.tensor([0, 5], dtype=torch.int32), 0.125)
    query, key, value = rows.split(kernel.HEAD, 1)
    difference = float((attended - plain_attention(query, key, value, 0.125)).abs().max())
    return f"attention.cpp compiled, differs from the formula by {difference:.0e}"


def layers() -> str:
    """A small Llama whose layers are fused for the CPU."""
    import torch
    from transformers import LlamaConfig, LlamaModel

    from drama_dist.encoder.fused_layers import fuse_layers
    from drama_dist.kernels.llama_cpu import layers as kernel

    _built(kernel)
    config = LlamaConfig(
        vocab_size=8, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1, is_causal=False
    )
    with torch.no_grad():
        if not fuse_layers(LlamaModel(config)):
            raise Missing("layers.cpp compiled, but a small Llama's layers were not fused")
    return "layers.cpp compiled, a small Llama's layers are fused"


def _built(module: Any) -> None:
    """The library's own warning says what goes on without it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*was not compiled.*")
        try:
            module.extension()
        except UserWarning as warning:
            raise Missing(str(warning)) from warning


def _loss_difference(backend: str, device: Any) -> float:
    import torch

    from drama_dist.kernels import info_nce

    torch.manual_seed(0)
    queries, passages = (torch.randn(count, 64, device=device) for count in (3, 5))
    value, exact = (
        float(info_nce(queries, passages, torch.arange(3, device=device), temperature=0.05, backend=name).loss)
        for name in (backend, "reference")
    )
    if not abs(value - exact) < 1e-3 * abs(exact):
        raise Missing(f"the loss is {value}, and {exact} by the reference")
    return abs(value - exact)


def _search(library: Any, resources: Any = None) -> None:
    import numpy as np

    index = library.IndexFlatIP(4)
    index = index if resources is None else library.index_cpu_to_gpu(resources, 0, index)
    index.add(np.eye(4, dtype=np.float32))
    assert index.search(np.eye(4, dtype=np.float32)[2:3], 1)[1].tolist() == [[2]]


def _path_of(command: str) -> str:
    """Where a command lies: on the path, or beside this environment's Python."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    file = shutil.which(command, path=path)
    if file is None:
        raise Missing(f"no {command} on the path")
    return file


def _command(*words: str, **variables: str) -> str:
    """What a command prints; raises Missing with its first line of error where it fails."""
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=_SECONDS, env={**os.environ, **variables}, check=False
        )
    except OSError as error:
        raise Missing(f"{words[0]}: {error.strerror}") from error
    except subprocess.TimeoutExpired as error:
        raise Missing(f"{words[0]} gave no answer in {_SECONDS} s") from error
    if done.returncode:
        raise Missing(f"{Path(words[0]).name}: {_first_line(done.stderr or done.stdout)}")
    return done.stdout.strip()


def _first_line(text: str) -> str:
    return next((line.strip(" -\0") for line in text.splitlines() if line.strip(" -\0")), "no output")


def _version(package: str) -> str:
    return importlib.metadata.version(package)
