"""GPU kernels of wemoe_fast, installed as ``wemoe_fast.kernels``.

One file per fused operation; no model code. Importing this package needs neither a GPU nor Triton; ``why_not`` says
whether its kernels can run somewhere.
"""

from __future__ import annotations

import os
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version

import torch

OLDEST_TRITON = (3, 6)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "quick_gelu", "silu")
"""Those of ``wemoe_fast.activations`` that the kernels apply themselves."""


@lru_cache(maxsize=64)
def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run there; None where they can."""
    try:
        found = version("triton")
    except PackageNotFoundError:
        return "Triton is not installed"
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST_TRITON:
        return f"Triton {OLDEST_TRITON[0]}.{OLDEST_TRITON[1]} or newer is needed, found {found}"
    if dtype not in DTYPES:
        return f"{dtype} is not supported"
    if device.type != "cuda":
        return None if interpreting() else f"a GPU is needed, found device {device}"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"a GPU of compute capability 8.0 is needed, found {torch.cuda.get_device_capability(device)}"
    return None


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU: slow, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"
