"""What the throughput harness runs: shapes of real models, workloads on them, and suites of workloads as data."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Shape:
    """The MLP of a model: N tokens, d -> h -> d; and with ``family`` the rest of its tower."""

    name: str
    N: int
    d: int
    h: int
    gated: bool = False
    family: str = ""
    layers: int = 0
    patch: int = 0

    @property
    def image(self) -> int:
        """Edge of the image that makes N tokens: (image / patch)^2 patches and one for the class."""
        return self.patch * round((self.N - 1) ** 0.5)


B32 = Shape("CLIP-B/32", 50, 768, 3072, family="clip", layers=12, patch=32)
B16 = Shape("CLIP-B/16", 197, 768, 3072, family="clip", layers=12, patch=16)
L14 = Shape("CLIP-L/14", 257, 1024, 4096, family="clip", layers=24, patch=14)
L14_336 = Shape("CLIP-L/14-336", 577, 1024, 4096, family="clip", layers=24, patch=14)
BERT = Shape("BERT-base", 128, 768, 3072, family="bert", layers=12)
LLAMA = Shape("LLaMA-like", 128, 1024, 2816, gated=True)
# The oracle of an adaptation step keeps every sum of weights of every layer: whole towers would not fit.
B32_SHORT = replace(B32, name="CLIP-B/32-3-layers", layers=3)
B16_SHORT = replace(B16, name="CLIP-B/16-3-layers", layers=3)
TOKEN = Shape("single token", 1, 768, 3072)
TINY = Shape("tiny", 5, 16, 32, family="clip", layers=2, patch=4)
TINY_LONG = Shape("tiny-long", 10, 16, 32)
TINY_GATED = Shape("tiny-gated", 6, 16, 24, gated=True)


@dataclass(frozen=True)
class Workload:
    """One thing to time: ``level`` mlp or tower (the whole model), ``step`` forward or adapt (one on the routers)."""

    shape: Shape
    B: int
    T: int = 8
    dtype: str = "float32"
    step: str = "forward"
    level: str = "mlp"

    @property
    def N(self) -> int:  # noqa: N802
        return self.shape.N

    @property
    def d(self) -> int:
        return self.shape.d

    @property
    def h(self) -> int:
        return self.shape.h

    @property
    def gated(self) -> bool:
        return self.shape.gated

    @property
    def name(self) -> str:
        return f"{self.shape.name} {self.level} {self.step} B{self.B} N{self.N} d{self.d} T{self.T} {self.dtype}"

    @property
    def floor(self) -> float | None:
        """Arithmetic of a forward over that of the static MLP: the products 1, the router of depth 2 d^2 over
        2 d h (3 d h gated), merging T/N. None where more than MLPs runs, and for adaptation."""
        if self.level != "mlp" or self.step != "forward":
            return None
        return 1 + self.d / ((3 if self.gated else 2) * self.h) + self.T / self.N

    def to_json(self) -> dict[str, Any]:
        shape = asdict(self.shape)
        return {"name": self.name, **asdict(self), "shape": shape.pop("name"), **shape, "floor": self.floor}


@dataclass(frozen=True)
class Suite:
    """Workloads in order of importance, and what they may take.

    ``patience``: seconds for the repeats of one contender; who takes longer gets fewer, but ``repeats`` at most and two
    at least.
    """

    workloads: tuple[Workload, ...]
    minutes: float
    repeats: int = 7
    patience: float = 10.0


def _all(
    shapes: Iterable[Shape],
    batches: Iterable[int],
    experts: Iterable[int] = (8,),
    dtypes: Iterable[str] = ("float32",),
    step: str = "forward",
    level: str = "mlp",
) -> Iterator[Workload]:
    for shape, T, dtype, B in itertools.product(shapes, experts, dtypes, batches):
        yield Workload(shape, B, T, dtype, step, level)


def _quick() -> Iterator[Workload]:
    yield from _all([B32], [8, 1])
    yield from _all([B16], [8])
    yield from _all([B32], [8], [2])
    yield from _all([B32_SHORT], [8], level="tower")
    yield from _all([B32], [8], step="adapt")
    yield from _all([B32], [32])


def _cpu() -> Iterator[Workload]:
    yield from _all([B32], [32])
    yield from _all([B16], [16])
    yield from _all([L14], [8])
    yield from _all([B32], [1, 8])
    yield from _all([TOKEN], [64])
    yield from _all([BERT], [8])
    yield from _all([B16], [8], step="adapt")
    yield from _all([B32], [8], step="adapt")
    yield from _all([B32], [8], level="tower")
    yield from _all([B16, L14_336, LLAMA], [8])
    yield from _all([B32], [32], dtypes=["bfloat16"])
    yield from _all([B32], [32], level="tower")
    yield from _all([B32], [32], [2, 20])
    yield from _all([B32], [128])
    yield from _all([B16], [16], [2, 20])
    yield from _all([L14], [8], dtypes=["bfloat16"])
    yield from _all([BERT], [8], level="tower")
    yield from _all([B32_SHORT], [8], step="adapt", level="tower")
    yield from _all([B16], [1, 32, 128])
    yield from _all([B32], [1], level="tower")
    yield from _all([B32, B16], [16], step="adapt")
    yield from _all([L14, BERT, LLAMA], [1, 32])
    yield from _all([B16], [16], dtypes=["bfloat16"])
    yield from _all([B16], [8], level="tower")


def _gpu() -> Iterator[Workload]:
    half = ("bfloat16",)
    yield from _all([B16, B32, L14, L14_336], [128], dtypes=half)
    yield from _all([B16, B32], [128], dtypes=half, step="adapt")
    yield from _all([B16, B32], [32], dtypes=half, level="tower")
    yield from _all([B16, B32], [1, 8, 32], dtypes=half)
    yield from _all([BERT, LLAMA], [8, 128], dtypes=half)
    yield from _all([B16, B32], [128], [2, 20], half)
    yield from _all([B16, B32], [128])
    yield from _all([L14, L14_336], [1, 8, 32], dtypes=half)
    yield from _all([L14], [32], dtypes=half, level="tower")
    yield from _all([BERT], [32], dtypes=half, level="tower")
    yield from _all([B16_SHORT], [32], dtypes=half, step="adapt", level="tower")


def _paper() -> Iterator[Workload]:
    """Everything: each shape, batch, number of experts, dtype and step; then towers."""
    shapes = (B32, B16, L14, L14_336, BERT, LLAMA)
    for step, dtype in itertools.product(("forward", "adapt"), ("float32", "bfloat16")):
        yield from _all(shapes, [1, 8, 32, 128], [8, 2, 20], [dtype], step)
    for dtype in ("float32", "bfloat16"):
        yield from _all([B32, B16, L14, L14_336, BERT], [1, 8, 32, 128], [8], [dtype], level="tower")
        yield from _all([B32_SHORT, B16_SHORT], [1, 8, 32, 128], [8], [dtype], "adapt", "tower")


def _dry() -> Iterator[Workload]:
    yield from _all([TINY], [1, 3])
    yield from _all([TINY], [3], [2])
    yield from _all([TINY_LONG, TINY_GATED], [3])
    yield from _all([TINY], [3], step="adapt")
    yield from _all([TINY], [3], [2], level="tower")
    yield from _all([TINY], [2], [2], ["bfloat16"])
    yield from _all([TINY], [2], [2], step="adapt", level="tower")


SUITES = {
    "quick": Suite(tuple(_quick()), minutes=1.75, repeats=5, patience=1.0),
    "cpu": Suite(tuple(_cpu()), minutes=60),
    "gpu": Suite(tuple(_gpu()), minutes=20, patience=2.0),
    "paper": Suite(tuple(_paper()), minutes=24 * 60, repeats=11, patience=20.0),
    "dry": Suite(tuple(_dry()), minutes=2, repeats=2),
}
