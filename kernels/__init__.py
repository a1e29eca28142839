"""GPU kernels of wemoe_fast, installed as ``wemoe_fast.kernels``.

One file per fused operation; no model code. Importing this package needs neither a GPU nor Triton.
"""

from __future__ import annotations

from importlib.util import find_spec


def triton_available() -> bool:
    """True where Triton can be imported (it is imported only where a kernel is launched)."""
    return find_spec("triton") is not None
