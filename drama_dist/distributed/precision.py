"""What `auto` means for a dtype in the settings: bfloat16 where this device computes in it at speed, else float32.

A processor without bfloat16 instructions takes a hundred times as long for a product in bfloat16 as in float32.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from drama_dist.distributed import ranks

AUTO = "auto"
_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")  # as /proc/cpuinfo names them; the last is Arm's


def dtype_name(setting: str) -> str:
    """bfloat16 or float32: what the setting says, or suits this rank's device where it says auto."""
    if setting != AUTO:
        return setting
    return "bfloat16" if _fast_in_bfloat16() else "float32"


def agreed_dtype_name(setting: str) -> str:
    """The same for ranks that exchange what they compute: bfloat16 only if it suits all. Every rank must call it."""
    names = ranks.on_every_rank(int(dtype_name(setting) == "bfloat16"))
    return "bfloat16" if all(names) else "float32"


def dtype_of(setting: str) -> torch.dtype:
    """The same as PyTorch's dtype."""
    found: torch.dtype = getattr(torch, dtype_name(setting))
    return found


def bfloat16_instructions() -> list[str]:
    """Those of this processor; none where the system does not tell."""
    flags = (cpuinfo("flags") or cpuinfo("Features")).split()
    return [name for name in _INSTRUCTIONS if name in flags]


def cpuinfo(field: str) -> str:
    """A line of /proc/cpuinfo; empty where there is none."""
    path = Path("/proc/cpuinfo")
    text = path.read_text("utf-8") if path.exists() else ""
    found = re.search(rf"^{field}\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else ""


def _fast_in_bfloat16() -> bool:
    if ranks.device().type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(bfloat16_instructions())
