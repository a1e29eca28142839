"""A tiny merged model and two tasks on disk, as a user would have them: what faults and loads are tried on.

The model is one WEMoE layer on ready hidden states. One task is a safetensors file, which has a fingerprint; the
other an entry point whose samples differ in length and are padded, without one. Padding reaches the mean of the
outputs, so a sample that changes its company changes its result.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from wemoe_fast import FastWEMoEMLP, save
from wemoe_fast.tasks import Head

FEATURES, CLASSES, EXPERTS = 8, ("red", "green", "blue"), ("still", "ragged", "other")
RAGGED = """
import torch
from wemoe_fast.tasks import Head, Task


class Ragged:
    def __init__(self, n):
        self.lengths = [1 + (7 * i) % 9 for i in range(n)]

    def __len__(self):
        return len(self.lengths)

    def batch(self, indices):
        longest = max(self.lengths[i] for i in indices)
        states = torch.zeros(len(indices), longest, {features})
        mask = torch.zeros(len(indices), longest, dtype=torch.long)
        for row, i in enumerate(indices):
            length = self.lengths[i]
            noise = torch.randn(length + 1, {features}, generator=torch.Generator().manual_seed(i))
            states[row, :length] = noise[1:] + 2 * noise[0]
            mask[row, :length] = 1
        return {{"hidden_states": states, "token_mask": mask}}, torch.tensor(indices) % 3


def task():
    return Task("ragged", Head.load("{head}"), Ragged({n}))
"""


def write_project(directory: Path, samples: int = 480, batch_size: int = 8) -> None:
    """Write ``model/`` and ``tasks.yaml`` with two tasks of `samples` samples each. Takes torch's global seed.

    The module of the second task has a name that no other project's has, so that one process may load several.
    """
    directory.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    base, *experts = (
        nn.Sequential(nn.Linear(FEATURES, 16), nn.GELU(), nn.Linear(16, FEATURES)) for _ in range(1 + len(EXPERTS))
    )
    layer = FastWEMoEMLP.from_mlps(base, dict(zip(EXPERTS, experts, strict=True)), router_depth=2)
    with torch.no_grad():
        for parameter in layer.router.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    save(layer, directory / "model")
    head = directory / "head.safetensors"
    Head(torch.randn(len(CLASSES), FEATURES), None, CLASSES).save(head)
    states = torch.randn(samples, 5, FEATURES) + 2 * torch.randn(samples, 1, FEATURES)
    save_file({"hidden_states": states, "labels": torch.arange(samples) % 3}, directory / "still.safetensors")
    module = f"ragged_{zlib.crc32(str(directory).encode()):08x}"
    (directory / f"{module}.py").write_text(RAGGED.format(features=FEATURES, head=head, n=samples))
    (directory / "tasks.yaml").write_text(
        "tasks:\n"
        f"  - {{name: still, head: head.safetensors, data: still.safetensors, batch_size: {batch_size}}}\n"
        f"  - {{name: ragged, entry: '{module}:task', batch_size: {batch_size}}}\n"
    )
