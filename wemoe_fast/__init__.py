"""WEMoE at close to the speed of a single model.

Weight-Ensembling Mixture of Experts (Tang et al., ICML 2024, arXiv 2402.00433): models fine-tuned from one
pretrained Transformer as one model, whose MLPs are merged for every sample.
"""

from __future__ import annotations

__version__ = "0.1.0"

from .checkpoint import load, save
from .errors import CheckpointError, ConfigError, InputError, UnknownArchitectureError, WEMoEError
from .generation import PromptRouting
from .mlp import FastWEMoEMLP
from .ops import merged_linear, route
from .router import Router
from .shared import share
from .upscale import accelerate_, expert_names, task_arithmetic, upscale, weight_average, wemoe_layers

__all__ = [
    "CheckpointError",
    "ConfigError",
    "FastWEMoEMLP",
    "InputError",
    "PromptRouting",
    "Router",
    "UnknownArchitectureError",
    "WEMoEError",
    "accelerate_",
    "expert_names",
    "load",
    "merged_linear",
    "route",
    "save",
    "share",
    "task_arithmetic",
    "upscale",
    "weight_average",
    "wemoe_layers",
]
