"""Instructions of a compiled kernel by the loop they are in, from the chips' own disassembly.

Covers NVIDIA's machine code (cuobjdump comes with Triton) and AMD's assembly. A fused kernel has one loop over tiles,
with loops over components in it; what runs once a tile is what is in the first and in none of the others.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from triton import knobs

_SASS = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.a-z]+)(.*?);")
_MATRIX = re.compile(r"^(HGMMA|HMMA|UTCHMMA|UTCQMMA|v_mfma\w*)")
_EXPONENTIAL = re.compile(r"^(MUFU\.EX2|v_exp_f32)")


@dataclass(frozen=True)
class Instruction:
    """back_to: where it branches to, if that is before it; both are numbers of instructions."""

    name: str
    back_to: int | None = None


@dataclass(frozen=True)
class OfTile:
    """Instructions that a thread runs for one tile: outside the loops over components, of which `exponentials`; in one
    turn of each of these loops, as far as they were not unrolled; and the name of the matrix instruction. A loop over
    excluded ids counts as one turn.
    """

    outside: int
    exponentials: int
    in_loops: tuple[int, ...]
    matrix: str


def of_tile(code: Sequence[Instruction]) -> OfTile:
    """Raises ValueError where there is no loop."""
    loops = [(one.back_to, end) for end, one in enumerate(code) if one.back_to is not None]
    if not loops:
        raise ValueError("no loop in this code")
    first, last = max(loops, key=lambda loop: loop[1] - loop[0])
    inner = [loop for loop in loops if first < loop[0] and loop[1] < last]
    products = [(a, b) for a, b in inner if any(_MATRIX.match(one.name) for one in code[a : b + 1])]
    turns = [loop for loop in products if not any(other != loop and _within(loop, other) for other in products)]
    outside = [one for at, one in enumerate(code[first : last + 1], first) if not any(a <= at <= b for a, b in turns)]
    matrix = next((one.name for one in code[first : last + 1] if _MATRIX.match(one.name)), "")
    return OfTile(
        len(outside),
        sum(bool(_EXPONENTIAL.match(one.name)) for one in outside),
        tuple(end + 1 - begin for begin, end in turns),
        matrix,
    )


def _within(loop: tuple[int, int], other: tuple[int, int]) -> bool:
    return other[0] <= loop[0] and loop[1] <= other[1]


def of_nvidia(cubin: bytes) -> list[Instruction]:
    """Disassembled by cuobjdump."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "-sass", str(path)]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = [match for line in listing.splitlines() if (match := _SASS.match(line))]
    at = {int(match[1], 16): number for number, match in enumerate(found)}
    code = []
    for number, match in enumerate(found):
        target = re.search(r"0x([0-9a-f]+)", match[3]) if match[2].startswith("BRA") else None
        to = at.get(int(target[1], 16)) if target else None
        code.append(Instruction(match[2], to if to is not None and to < number else None))
    return code


def of_amd(assembly: str) -> list[Instruction]:
    """From the compiler's assembly."""
    labels: dict[str, int] = {}
    code: list[Instruction] = []
    for line in assembly.splitlines():
        if label := re.match(r"^(\.LBB\w+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"^\t([vsdgb][a-z_0-9]+)\b(.*)", line):
            target = re.search(r"\.LBB\w+", instruction[2]) if "branch" in instruction[1] else None
            code.append(Instruction(instruction[1], labels.get(target[0]) if target else None))
    return code
