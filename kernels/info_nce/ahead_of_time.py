"""Compiling the Triton kernels without a GPU, and reading off what the compilers made of them.

Covers the variants (kernel, options, tile shape, precision) that cuda.py and fused.py can choose, the compilers' own
reports (registers, spills, shared memory), and the instructions of a tile of the fused kernels, counted in the machine
code. Says nothing of speed.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from drama_dist.kernels.info_nce import (
    cuda,
    fused,
    fused_kernels,
    fused_row_kernels,
    machine_code,
    norm_kernels,
    score_kernels,
)

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
_ENDS = {1: (768,), 3: DIMS, 5: (64, 128, 256, 512, 768)}
_FUSED_OPTIONS = ((3, True, False), (3, True, True), (1, True, False), (5, True, False))
_PRECISIONS = ("bf16", "fp16", "fp32")
_OPERANDS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_STRIDES = {"stride", "dim_stride", "vector_stride", "x_stride", "y_stride", "r_stride", "terms_stride"}
_ALIGNED = {*_STRIDES, "width", "rows_per_split", "columns_per_split"}
_INTEGERS = {*_ALIGNED, "rows", "columns", "excluded_count", "splits", "dims"}
_INPUTS = {"vectors_ptr", "upstream_ptr", "result_ptr"}
_INTEGER_POINTERS = {"positives_ptr", "positive_ids_ptr", "passage_ids_ptr", "excluded_ptr", "left_out_ptr"}
_INTEGER_POINTERS |= {"columns_ptr"}
_DESCRIPTORS = {  # what their tiles hold
    "x": ("BLOCK_R", "BLOCK_K"),
    "y": ("BLOCK_C", "BLOCK_K"),
    "positive": ("BLOCK_R", "BLOCK_K"),
    "logits": ("BLOCK_R", "BLOCK_C"),
    "upstream": ("BLOCK_C", "BLOCK_R"),
}
_OPTIONS = (  # of the score kernels: dims, ids, excluded ids
    (3, False, False),
    (3, True, False),
    (3, True, True),
    (5, True, False),
    (5, True, True),
    (1, False, False),
)


@dataclass(frozen=True)
class Variant:
    """One compilation: constants are the kernel's constexpr arguments."""

    kernel: str
    precision: str  # of the inputs: bf16, fp16 or fp32
    constants: tuple[tuple[str, Any], ...]
    warps: int
    stages: int = 3  # of software pipelining: Triton's default

    @property
    def name(self) -> str:
        """Kernel, precision, tile, and the options that are on."""
        chosen = dict(self.constants)
        blocks = "×".join(str(value) for key, value in self.constants if key.startswith("BLOCK"))
        options = [key.removeprefix("HAS_").lower() for key in chosen if chosen[key] is True]
        dims = next(one if name == "M" else len(one) for name, one in chosen.items() if name in ("M", "DIMS", "ENDS"))
        return " ".join([self.kernel, self.precision, f"{dims} dims", blocks, *options])


@dataclass(frozen=True)
class Compiled:
    """registers: for each thread; spilled and shared in bytes.

    Of the fused kernels that see all columns, for each score and dim: instructions outside the loops over components,
    of which exponentials; in these loops; and the matrix instruction's name.
    """

    registers: int
    spilled: int
    shared: int
    outside: float | None = None
    exponentials: float | None = None
    in_loops: float | None = None
    matrix: str | None = None


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


def fused_variants(target: str) -> list[Variant]:
    """The same of what fused.py can compile for a target: the usual one first."""
    return [*_fused_variants(target in ("sm_90", "sm_100"))]


def _fused_variants(large_shared: bool) -> Iterator[Variant]:
    """Training's own is with ids, and bfloat16 operands."""
    for dims, ids, excluded in _FUSED_OPTIONS:
        options = {"HAS_IDS": ids, "HAS_EXCLUDED": excluded}
        yield _fused("fused rows", "bf16", large_shared, dims, options)
        yield _fused("fused gradients", "bf16", large_shared, dims, {"HAS_TEACHER": False, **options})
    teacher = {"HAS_TEACHER": True, "HAS_IDS": False, "HAS_EXCLUDED": False}
    yield _fused("fused soft rows", "bf16", large_shared, 3, {})
    yield _fused("fused gradients", "bf16", large_shared, 3, teacher)
    options = {"HAS_IDS": True, "HAS_EXCLUDED": False}
    yield _fused("fused rows", "fp32", large_shared, 3, options)
    yield _fused("fused gradients", "fp32", large_shared, 3, {"HAS_TEACHER": False, **options})
    for precision in ("bf16", "fp32"):
        yield _fused("fused positives", precision, large_shared, 3, {})
    yield Variant("fused merge", "bf16", (("BLOCK_R", 128), ("M", 3)), 4)
    yield Variant("fused shifts", "bf16", (("HAS_TEACHER", False), ("BLOCK_R", 128), ("M", 3)), 4)


def _fused(kernel: str, precision: str, large_shared: bool, dims: int, options: dict[str, bool]) -> Variant:
    of_kernels = fused.shapes(_OPERANDS[precision], large_shared, dims)
    kind = {"fused gradients": "gradients", "fused positives": "positives"}.get(kernel, "rows")
    tile: fused.Shape = getattr(of_kernels, kind)
    sizes = {"BLOCK_R": tile.rows, "BLOCK_C": tile.columns, "BLOCK_K": tile.depth}
    if kind == "positives":
        del sizes["BLOCK_C"]
    constants = {"ENDS": _ENDS[dims], **options, **sizes, "PRECISION": "ieee"}
    return Variant(kernel, precision, tuple(constants.items()), tile.warps, tile.stages)


def compile_variant(variant: Variant, target: str) -> Compiled:
    """Compile for a target of TARGETS and read the compilers' reports."""
    kernel = _kernels()[variant.kernel]
    constants = dict(variant.constants)
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    if variant.kernel == "fused gradients" and not constants["HAS_TEACHER"]:
        constants["logits"] = None
    if variant.kernel == "fused shifts":
        constants["teacher_ptr"] = None
    signature = {name: _type_of(name, variant.precision, constants) for name in kernel.arg_names}
    # As the launchers pad them; Triton finds it out from the numbers at run time.
    aligned = [
        index for index, (name, kind) in enumerate(signature.items()) if kind.startswith("*") or name in _ALIGNED
    ]
    source = ASTSource(kernel, signature, constants, {(index,): [["tt.divisibility", 16]] for index in aligned})
    options = {"num_warps": variant.warps, "num_stages": variant.stages, "enable_fp_fusion": True}
    report = io.StringIO()
    with knobs.nvidia.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(report):
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True  # from the cache there is no report
        built = triton.compile(source, target=TARGETS[target], options=options)
    compiled = _nvidia(built, report.getvalue()) if target.startswith("sm") else _amd(built)
    if "BLOCK_C" not in constants or "ENDS" not in constants:
        return compiled
    of_nvidia = target.startswith("sm")
    code = machine_code.of_nvidia(built.asm["cubin"]) if of_nvidia else machine_code.of_amd(built.asm["amdgcn"])
    return _with_instructions(compiled, machine_code.of_tile(code), variant, 32 if of_nvidia else 64)


def _with_instructions(compiled: Compiled, tile: machine_code.OfTile, variant: Variant, width: int) -> Compiled:
    """width: threads of a warp."""
    constants = dict(variant.constants)
    ends = constants["ENDS"]
    scores = constants["BLOCK_R"] * constants["BLOCK_C"] * len(ends) / (width * variant.warps)
    turns = [(end - begin) // constants["BLOCK_K"] for begin, end in zip((0, *ends), ends, strict=False)]
    in_loops = None  # some were unrolled: their instructions are outside
    if len(tile.in_loops) == len(turns):
        in_loops = sum(many * once for many, once in zip(turns, tile.in_loops, strict=True)) / scores
    return replace(
        compiled,
        outside=tile.outside / scores,
        exponentials=tile.exponentials / scores,
        in_loops=in_loops,
        matrix=tile.matrix,
    )


@cache
def _kernels() -> dict[str, Any]:
    return {
        "rows": score_kernels.rows_kernel,
        "soft rows": score_kernels.soft_rows_kernel,
        "gradients": score_kernels.gradients_kernel,
        "norms": norm_kernels.norms_kernel,
        "finish": norm_kernels.finish_kernel,
        "fused rows": fused_kernels.rows_kernel,
        "fused soft rows": fused_kernels.soft_rows_kernel,
        "fused gradients": fused_kernels.gradients_kernel,
        "fused positives": fused_row_kernels.positives_kernel,
        "fused merge": fused_row_kernels.merge_kernel,
        "fused shifts": fused_row_kernels.shifts_kernel,
    }


def _type_of(name: str, precision: str, constants: dict[str, Any]) -> str:
    if name in constants:
        return "constexpr"
    if name in _INTEGERS:
        return "i32"
    if name in _DESCRIPTORS:
        kind = "fp32" if name == "logits" or (name == "upstream" and precision == "fp16") else precision
        return f"tensordesc<{kind}[{','.join(str(constants[size]) for size in _DESCRIPTORS[name])}]>"
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
