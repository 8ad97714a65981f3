"""Compiling the Triton kernels without a GPU, and reading off what the compilers made of them.

Covers the variants (kernel, options, tile shape, precision) that the launchers can choose, and the
compilers' own reports: registers, spills, shared memory, matrix instructions. Says nothing of speed.
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

from drama_dist.kernels import (
    info_nce_backward,
    info_nce_forward,
    info_nce_streaming,
    norms,
    pooling,
    streaming_tiles,
    triton_tiles,
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
_STRIDES = {"x_stride", "y_stride", "stride", "dim_stride", "vector_stride", "teacher_size", "width"}
_ALIGNED = {*_STRIDES, "padded_rows", "padded_columns", "columns_per_split", "rows_per_split"}
_INTEGERS = {*_ALIGNED, "dims", "row_count", "column_count", "excluded_count", "dim", "rows", "columns"}
_INPUTS = {"x_ptr", "y_ptr", "teacher_x_ptr", "teacher_y_ptr", "vectors_ptr", "upstream_ptr", "result_ptr"}
_HIDDEN = {"hidden_ptr", "hidden_gradient_ptr"}
_IDS = {"positives_ptr", "passage_ids_ptr", "own_ids_ptr", "excluded_ptr"}
_INTEGER_POINTERS = {*_IDS, "left_out_ptr", "segments_ptr", "bounds_ptr", "boundaries_ptr"}


@dataclass(frozen=True)
class Variant:
    """One compilation: constants are the kernel's constexpr arguments."""

    kernel: str
    precision: str  # of the inputs: bf16, fp16 or fp32
    constants: tuple[tuple[str, Any], ...]
    warps: int
    stages: int

    @property
    def name(self) -> str:
        """Kernel, precision, tile, and the options that are on."""
        chosen = dict(self.constants)
        blocks = "×".join(str(value) for key, value in self.constants if key.startswith("BLOCK"))
        options = [key.removeprefix("HAS_").lower() for key in chosen if chosen[key] is True]
        return " ".join([self.kernel, self.precision, blocks, *options])


@dataclass(frozen=True)
class Compiled:
    """registers: for each thread; spilled and shared in bytes; matrix_instructions: how many, by kind."""

    registers: int
    spilled: int
    shared: int
    matrix_instructions: dict[str, int]


def variants(target: str) -> list[Variant]:
    """What the launchers ship for a target of TARGETS: every kernel and shape, with all options off, and on."""
    return list(_variants(hip=target.startswith("gfx")))


def _variants(hip: bool) -> Iterator[Variant]:
    for precision in ("bf16", "fp16", "fp32"):
        table = triton_tiles.shapes(precision == "fp32", hip)
        # Half precisions differ in their products only: of fp16 one shape, without options.
        flags, most = ((False,), 1) if precision == "fp16" else ((False, True), None)
        for flag in flags:
            options = {"HAS_TEACHER": flag, "HAS_SYMMETRIC": flag}
            for transposed in (False, True):
                sided = {**options, "TRANSPOSED": transposed, "MP": 4, "SEGMENT": table.segment}
                yield from _shaped("forward", precision, table.forward[:most], sided)
                yield from _shaped("separate", precision, table.separate[:most], sided)
            yield from _shaped("shared", precision, table.shared[:most], {**options, "ENDS": DIMS})
        yield from _streaming(precision)
        for kernel in ("pool_forward", "pool_backward"):
            yield Variant(kernel, precision, (("BLOCK_K", pooling.BLOCK_K), ("BLOCK_T", pooling.BLOCK_T)), 4, 2)


def _streaming(precision: str) -> Iterator[Variant]:
    """Products are float32, whatever the inputs; only vectors and the gradients' operands are in their precision."""
    for dims, flag in ((3, False), (3, True), (5, True)):
        options = {"M": dims, "HAS_IDS": flag, "HAS_EXCLUDED": flag, "HAS_TEACHER": flag, "HAS_SYMMETRIC": flag}
        along, down = streaming_tiles.tiles_of(dims, flag, flag, flag)
        tiles = {"gradients": down}
        if precision == "fp32":
            tiles |= {"rows": along, "columns": down} if flag else {"rows": along}  # columns: the symmetric term's
        for kernel, tile in tiles.items():
            blocks = {name: size for name, size in tile.items() if name.startswith("BLOCK")}
            yield Variant(kernel, precision, tuple({**options, **blocks}.items()), tile["num_warps"], 3)
    for kernel in ("norms", "finish"):
        yield Variant(kernel, precision, (("DIMS", DIMS), ("BLOCK_K", 256)), 4, 3)


def _shaped(
    kernel: str, precision: str, shapes: tuple[triton_tiles.Shape, ...], constants: dict[str, Any]
) -> Iterator[Variant]:
    for shape in shapes:
        blocks = {"BLOCK_R": shape.rows, "BLOCK_C": shape.columns, "BLOCK_K": shape.components}
        yield Variant(kernel, precision, tuple({**constants, **blocks}.items()), shape.warps, shape.stages)


def compile_variant(variant: Variant, target: str) -> Compiled:
    """Compile for a target of TARGETS and read the compilers' reports."""
    kernel = _kernels()[variant.kernel]
    hip = TARGETS[target].backend == "hip"
    constants = dict(variant.constants) | {"PRECISION": triton_tiles.precision_of_products(hip)}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {name: _type_of(name, variant.precision, constants) for name in kernel.arg_names}
    # As the launchers pad them; Triton finds it out from the numbers at run time.
    aligned = [
        place for place, (name, kind) in enumerate(signature.items()) if kind.startswith("*") or name in _ALIGNED
    ]
    source = ASTSource(kernel, signature, constants, {(place,): [["tt.divisibility", 16]] for place in aligned})
    options = {"num_warps": variant.warps, "num_stages": variant.stages, "enable_fp_fusion": True}
    report = io.StringIO()
    with knobs.nvidia.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(report):
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True  # from the cache there is no report
        built = triton.compile(source, target=TARGETS[target], options=options)
    return _nvidia(built, report.getvalue()) if target.startswith("sm") else _amd(built)


@cache
def _kernels() -> dict[str, Any]:
    return {
        "forward": info_nce_forward.forward_kernel,
        "separate": info_nce_backward.separate_kernel,
        "shared": info_nce_backward.shared_kernel,
        "rows": info_nce_streaming.rows_kernel,
        "columns": info_nce_streaming.columns_kernel,
        "gradients": info_nce_streaming.gradients_kernel,
        "norms": norms.norms_kernel,
        "finish": norms.finish_kernel,
        "pool_forward": pooling.forward_kernel,
        "pool_backward": pooling.backward_kernel,
    }


def _type_of(name: str, precision: str, constants: dict[str, Any]) -> str:
    if name in constants:
        return "constexpr"
    if name in _INTEGERS:
        return "i32"
    if name in _INPUTS | _HIDDEN:
        return f"*{precision}"
    if name in _INTEGER_POINTERS:
        return "*i32"
    if name == "above_ptr":
        return "*i8"
    return "*fp32" if name.endswith("_ptr") else "fp32"


def _nvidia(built: Any, report: str) -> Compiled:
    registers = re.search(r"Used (\d+) registers", report)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", report)
    assert registers is not None and spills, report
    kinds = {"wgmma": r"wgmma\.mma_async", "tcgen05": r"tcgen05\.mma", "mma": r"\bmma\.sync", "fma": r"\bfma\.rn\.f32"}
    counts = _counts(built.asm["ptx"], kinds)
    return Compiled(int(registers[1]), sum(map(int, spills)), built.metadata.shared, counts)


def _amd(built: Any) -> Compiled:
    assembly = built.asm["amdgcn"]
    registers = re.search(r"\.vgpr_count:\s+(\d+)", assembly)
    spills = re.search(r"\.vgpr_spill_count:\s+(\d+)", assembly)
    assert registers is not None and spills is not None
    kinds = {"mfma": r"v_mfma", "fma": r"v_(?:pk_)?fma"}
    return Compiled(int(registers[1]), 4 * int(spills[1]), built.metadata.shared, _counts(assembly, kinds))


def _counts(text: str, kinds: dict[str, str]) -> dict[str, int]:
    return {kind: count for kind, pattern in kinds.items() if (count := len(re.findall(pattern, text)))}
