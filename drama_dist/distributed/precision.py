"""What `auto` means for a dtype in the settings: bfloat16 if this device is fast in it, else float32.

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
    """bfloat16 or float32: the setting, or the faster one on this rank's device if the setting is auto."""
    if setting != AUTO:
        return setting
    return "bfloat16" if _fast_in_bfloat16() else "float32"


def agreed_dtype_name(setting: str) -> str:
    """The same for ranks that exchange results: bfloat16 only if all ranks choose it. Every rank must call it."""
    flags = ranks.on_every_rank(int(dtype_name(setting) == "bfloat16"))
    return "bfloat16" if all(flags) else "float32"


def dtype_of(setting: str) -> torch.dtype:
    """`dtype_name` as a PyTorch dtype."""
    dtype: torch.dtype = getattr(torch, dtype_name(setting))
    return dtype


def bfloat16_instructions() -> list[str]:
    """This processor's bfloat16 instruction sets; empty if the system does not report them."""
    flags = (cpuinfo("flags") or cpuinfo("Features")).split()
    return [name for name in _INSTRUCTIONS if name in flags]


def cpuinfo(field: str) -> str:
    """The value of a field of /proc/cpuinfo; empty if there is none."""
    path = Path("/proc/cpuinfo")
    text = path.read_text("utf-8") if path.exists() else ""
    match = re.search(rf"^{field}\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1] if match else ""


def _fast_in_bfloat16() -> bool:
    if ranks.device().type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(bfloat16_instructions())
