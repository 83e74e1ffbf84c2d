"""One-line hardware description for benchmark figures, without the machine's name."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

_TELLING = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
"""CPU features that most affect the speed of matrix products in bf16 and fp32."""


def machine(device: torch.device | None = None) -> str:
    """Return architecture, cores, threads and CPU features; for a GPU its name too."""
    path = Path("/proc/cpuinfo")
    flags = set(path.read_text(encoding="utf-8").split()) if path.exists() else set()
    told = [platform.machine(), f"{os.cpu_count()} cores", f"{torch.get_num_threads()} threads"]
    if device is not None and device.type == "cuda":
        told.append(torch.cuda.get_device_name(device))
    return ", ".join(told + [flag for flag in _TELLING if flag in flags])
