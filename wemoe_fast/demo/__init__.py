"""A real pretrained model, real data, one command."""

from __future__ import annotations

from .run import run_demo

__all__ = ["run_demo"]
