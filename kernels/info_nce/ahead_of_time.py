"""Compiling the Triton kernels without a GPU, and reading off what the compilers made of them.

Covers the variants (kernel, options, tile shape, precision) that cuda.py can choose, and the compilers' own reports:
registers, spills, shared memory. Says nothing of speed; matrix products are the library's.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from drama_dist.kernels.info_nce import cuda, norm_kernels, score_kernels

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes of shared memory that one program may use: NVIDIA's tuning guides for Ampere, Hopper and
# Blackwell (section "Shared Memory"); 64 KiB of LDS for each workgroup on CDNA 3 (AMD's ISA guide).
SHARED_LIMITS = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
DIMS = (256, 512, 768)
_PRECISIONS = ("bf16", "fp16", "fp32")
_ALIGNED = {"stride", "dim_stride", "vector_stride", "width", "rows_per_split", "columns_per_split"}
_INTEGERS = {*_ALIGNED, "rows", "columns", "excluded_count"}
_INPUTS = {"vectors_ptr", "upstream_ptr", "result_ptr"}
_INTEGER_POINTERS = {"positives_ptr", "positive_ids_ptr", "passage_ids_ptr", "excluded_ptr", "left_out_ptr"}
_OPTIONS = (  # of the score kernels: dims, ids, excluded ids
    (3, False, False),
    (3, True, False),
    (3, True, True),
    (5, True, False),
    (5, True, True),
    (1, False, False),
)
_STAGES = 3  # of software pipelining: Triton's default


@dataclass(frozen=True)
class Variant:
    """One compilation: constants are the kernel's constexpr arguments."""

    kernel: str
    precision: str  # of the inputs: bf16, fp16 or fp32
    constants: tuple[tuple[str, Any], ...]
    warps: int

    @property
    def name(self) -> str:
        """Kernel, precision, tile, and the options that are on."""
        chosen = dict(self.constants)
        blocks = "×".join(str(value) for key, value in self.constants if key.startswith("BLOCK"))
        options = [key.removeprefix("HAS_").lower() for key in chosen if chosen[key] is True]
        dims = chosen.get("M") or len(chosen["DIMS"])
        return " ".join([self.kernel, self.precision, f"{dims} dims", blocks, *options])


@dataclass(frozen=True)
class Compiled:
    """registers: for each thread; spilled and shared in bytes."""

    registers: int
    spilled: int
    shared: int


def variants() -> list[Variant]:
    """A selection of what cuda.py can compile: every kernel and tile, few and many dims, the usual one first."""
    return [*_score_variants(), *_norm_variants()]


def _score_variants() -> Iterator[Variant]:
    """Products are float32, whatever the inputs; the gradients' operands are float32 too, but for bfloat16 inputs."""
    for dims, ids, excluded in _OPTIONS:
        options = {"HAS_IDS": ids, "HAS_EXCLUDED": excluded}
        along, down = cuda.tile_shapes(dims, excluded)
        yield _variant("rows", "fp32", dims, options, along)
        for precision in ("bf16", "fp32"):
            yield _variant("gradients", precision, dims, {"HAS_TEACHER": False, **options}, down)
    for dims in (3, 5, 1):
        along, down = cuda.tile_shapes(dims, excluded=False)
        yield _variant("soft rows", "fp32", dims, {}, along)
        for precision in ("bf16", "fp32"):
            options = {"HAS_TEACHER": True, "HAS_IDS": False, "HAS_EXCLUDED": False}
            yield _variant("gradients", precision, dims, options, down)


def _variant(kernel: str, precision: str, dims: int, options: dict[str, bool], tile: dict[str, int]) -> Variant:
    blocks = {name: size for name, size in tile.items() if name.startswith("BLOCK")}
    return Variant(kernel, precision, tuple({"M": dims, **options, **blocks}.items()), tile["num_warps"])


def _norm_variants() -> Iterator[Variant]:
    for kernel in ("norms", "finish"):
        for precision in _PRECISIONS:
            yield Variant(kernel, precision, (("DIMS", DIMS), ("BLOCK_K", 256)), 4)


def compile_variant(variant: Variant, target: str) -> Compiled:
    """Compile for a target of TARGETS and read the compilers' reports."""
    kernel = _kernels()[variant.kernel]
    constants = dict(variant.constants)
    signature = {name: _type_of(name, variant.precision, constants) for name in kernel.arg_names}
    # As the launchers pad them; Triton finds it out from the numbers at run time.
    aligned = [
        index for index, (name, kind) in enumerate(signature.items()) if kind.startswith("*") or name in _ALIGNED
    ]
    source = ASTSource(kernel, signature, constants, {(index,): [["tt.divisibility", 16]] for index in aligned})
    options = {"num_warps": variant.warps, "num_stages": _STAGES, "enable_fp_fusion": True}
    report = io.StringIO()
    with knobs.nvidia.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(report):
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True  # from the cache there is no report
        built = triton.compile(source, target=TARGETS[target], options=options)
    return _nvidia(built, report.getvalue()) if target.startswith("sm") else _amd(built)


@cache
def _kernels() -> dict[str, Any]:
    return {
        "rows": score_kernels.rows_kernel,
        "soft rows": score_kernels.soft_rows_kernel,
        "gradients": score_kernels.gradients_kernel,
        "norms": norm_kernels.norms_kernel,
        "finish": norm_kernels.finish_kernel,
    }


def _type_of(name: str, precision: str, constants: dict[str, Any]) -> str:
    if name in constants:
        return "constexpr"
    if name in _INTEGERS:
        return "i32"
    if name in _INPUTS:
        return f"*{precision}"
    if name in _INTEGER_POINTERS:
        return "*i32"
    return "*fp32" if name.endswith("_ptr") else "fp32"


def _nvidia(built: Any, report: str) -> Compiled:
    registers = re.search(r"Used (\d+) registers", report)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", report)
    assert registers is not None and spills, report
    return Compiled(int(registers[1]), sum(map(int, spills)), built.metadata.shared)


def _amd(built: Any) -> Compiled:
    assembly = built.asm["amdgcn"]
    registers = re.search(r"\.vgpr_count:\s+(\d+)", assembly)
    spills = re.search(r"\.vgpr_spill_count:\s+(\d+)", assembly)
    assert registers is not None and spills is not None
    return Compiled(int(registers[1]), 4 * int(spills[1]), built.metadata.shared)
