"""What needs a GPU as a whole: vectors, training steps and the launcher there against the same on the CPU.

Kernels alone are tested beside their other backends; those files use a GPU where there is one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from drama_dist.distributed import ranks
from drama_dist.encoder.backbone import load
from drama_dist.run.runner import make
from drama_dist.settings import Settings, write_settings

sys.path.insert(0, str(Path(__file__).parent / "train"))
from test_ranks import distance, start_ranks

from drama_dist.kernels import info_nce

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.gpu
ON_CPU = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
ON_GPU = {"DS_ACCELERATOR": "cuda"}
TEXTS = ["the river", "flour and water " * 9, "x", "engine oil and a valve"]


@pytest.mark.parametrize(("dtype", "close"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_vectors_are_those_of_the_cpu(llm: Path, dtype: str, close: float) -> None:
    on_gpu, on_cpu = load(llm, dtype=dtype), load(llm, device="cpu")
    assert on_gpu.device.type == "cuda"
    for dim in (48, 16):
        found, expected = (encoder.encode_passages(TEXTS, dim) for encoder in (on_gpu, on_cpu))
        np.testing.assert_allclose(found, expected, atol=close)


def test_steps_end_in_the_weights_of_the_cpu(llm: Path, tmp_path: Path) -> None:
    """Ten steps in float32, with every ZeRO stage; graphs kept, encoded twice, and layers checkpointed."""
    names = ["0-passages-kept-plain", "1-passages-twice-plain", "2-queries-kept-plain", "3-passages-twice-checkpointed"]
    compare_with_cpu(1, names, llm, tmp_path)


def compare_with_cpu(ranks: int, names: list[str], llm: Path, folder: Path) -> None:
    """Steps of so many ranks on GPUs, and the same on the CPU."""
    results = []
    for place, environment in (("gpu", ON_GPU), ("cpu", ON_CPU)):
        (folder / place).mkdir()
        start_ranks(ranks, llm, folder / place, names, environment)
        results.append([torch.load(folder / place / f"{name}.pt") for name in names])
    for name, found, expected in zip(names, *results, strict=True):
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-4), name
        assert found["norms"] == pytest.approx(expected["norms"], rel=1e-3), name
        assert distance(found["weights"], expected["weights"]) <= 1e-4, name


def test_the_deepspeed_launcher_trains_as_the_cpu_does(
    small_settings: Callable[..., Settings], llm: Path, tmp_path: Path
) -> None:
    changes = [f"teacher.model={llm}", "train.steps=6", "evaluate.systems=[drama]"]
    first = small_settings(f"run={tmp_path / 'gpu'}", *changes)
    make(first, "augment")
    make(first, "prune")
    shutil.copytree(first.run, tmp_path / "cpu")
    programs = {"gpu": ["deepspeed", "--num_gpus", "1"], "cpu": [sys.executable]}
    variables = {*ranks.VARIABLES, "MASTER_ADDR", "MASTER_PORT"}  # this process has become a rank of its own
    own = {name: value for name, value in os.environ.items() if name not in variables}
    losses = []
    for (place, program), environment in zip(programs.items(), (ON_GPU, ON_CPU), strict=True):
        path = tmp_path / f"{place}.yaml"
        write_settings(small_settings(f"run={tmp_path / place}", *changes), path)
        program = [shutil.which(program[0]) or program[0], *program[1:]]
        done = subprocess.run(
            [*program, str(ROOT / "launcher" / "train.py"), str(path)],
            cwd=tmp_path,
            env=own | environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        lines = (tmp_path / place / "train" / "metrics.jsonl").read_text("utf-8").splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert len(losses[0]) == 6
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3)


OF_NCCL = """
import torch
import torch.distributed as dist

from drama_dist.distributed import ranks

ranks.start()
assert dist.get_backend() == "nccl", dist.get_backend()
device = ranks.device()
counts = [torch.zeros(1, dtype=torch.int64, device=device)]
dist.all_gather(counts, torch.tensor([7], device=device))
rows = torch.randn(5, 3, device=device)
parts, received = [torch.empty_like(rows)], torch.empty_like(rows)
dist.all_gather(parts, rows)
dist.all_to_all_single(received, rows, [5], [5])
largest, total = rows.clone(), rows.clone()
dist.all_reduce(largest, dist.ReduceOp.MAX)
dist.all_reduce(total, dist.ReduceOp.SUM)
assert int(counts[0]) == 7 and all(torch.equal(each, rows) for each in (parts[0], received, largest, total))
ranks.stop()
"""


def test_the_collectives_of_ranks_run_in_nccl() -> None:
    """The calls of ranks.py, with their dtypes, on one rank: two need two GPUs, see the next test."""
    variables = {*ranks.VARIABLES, "MASTER_ADDR", "MASTER_PORT"}
    own = {name: value for name, value in os.environ.items() if name not in variables}
    command = [sys.executable, "-c", OF_NCCL]
    done = subprocess.run(command, env=own | ON_GPU, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL takes one rank a GPU, and there are not two")
def test_two_ranks_on_gpus_end_in_the_weights_of_the_cpu(llm: Path, tmp_path: Path) -> None:
    """Both partitions of the loss."""
    compare_with_cpu(2, ["1-passages-kept-plain", "2-queries-twice-plain"], llm, tmp_path)


@pytest.mark.parametrize("backend", ["cuda", "fused"])
def test_rounded_products_are_those_of_bfloat16_vectors(backend: str) -> None:
    """Gradients in float32, those of the rounded vectors up to the rounding of dL/dA."""
    generator = torch.Generator().manual_seed(3)
    queries, passages = (torch.randn(count, 768, generator=generator).cuda() for count in (300, 700))
    positives = torch.arange(300, device="cuda")
    given = {"temperature": 0.05, "dims": [768, 512, 256]}

    def gradients(backend: str, *sides: torch.Tensor, **options: bool) -> tuple[torch.Tensor, ...]:
        leaves = [side.clone().requires_grad_() for side in sides]
        loss = info_nce(*leaves, positives, backend=backend, **given, **options).loss
        return torch.autograd.grad(loss, leaves)

    exact = gradients("reference", *(side.bfloat16().double() for side in (queries, passages)))
    whole = gradients("reference", queries.double(), passages.double())
    rounded = gradients(backend, queries, passages, rounded=True)
    for gradient, its, unrounded in zip(rounded, exact, whole, strict=True):
        assert gradient.dtype == torch.float32
        assert float((gradient - its).norm() / its.norm()) <= 4e-3  # bfloat16's unit is 2^-8
        assert float((gradient - unrounded).norm()) > float((gradient - its).norm())  # it was rounded
