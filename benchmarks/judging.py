"""When a result counts as right, beside the float64 oracle.

The bar is what plain PyTorch achieves: the merged weights materialised by an einsum and multiplied by bmm, in the same
dtype on the same device. With u a quarter of a unit in the last place of that dtype (for tf32 a whole one, tensor cores
truncate), K the longest chain of a sum and errors relative to the oracle's own size:

    RMS error     at most  (1.05 + 4 / sqrt(n)) x that of plain PyTorch + u + 2^-24 sqrt(K / 6)
    largest error at most  (1.5  + 4 / sqrt(n)) x that of plain PyTorch + u + 2^-24 sqrt(K / 6)

u is about the RMS of rounding the result, the last term what adding K numbers one after the other in float32 costs (a
random walk): plain PyTorch may add them up in a luckier order. 4 / sqrt(n) are four standard deviations of the quotient
of two RMS over n independent numbers.
Whoever is not ours, and may round as it likes, has to compute the same function (``SAME_FUNCTION``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "tf32": torch.float32}
UNITS = {"bfloat16": 2.0**-9, "float16": 2.0**-12, "float32": 2.0**-25, "tf32": 2.0**-10}
SAME_FUNCTION = {"bfloat16": 0.05, "float16": 0.05, "float32": 1e-4, "tf32": 0.05}
"""Relative RMS error up to which a peer counts as computing the same function; its errors are not ours to judge."""
Tensors = dict[str, Tensor]
Verdicts = dict[str, dict[str, float | bool | None]]


def judge(
    actual: list[Tensor],
    plain: list[Tensor],
    expected: list[Tensor],
    dtype: str,
    chain: int,
    independent: int | None = None,
) -> dict[str, float | bool | None]:
    """Errors of ``actual`` and their bars, by the rule at the top of this module; each a list of draws."""
    for ours, exact in zip(actual, expected, strict=True):
        if ours.shape != exact.shape:
            raise ValueError(f"shape {tuple(ours.shape)}, expected {tuple(exact.shape)}")
    exact = torch.cat([t.double().flatten() for t in expected])
    size, largest = max(float(exact.square().mean().sqrt()), 1e-300), max(float(exact.abs().max()), 1e-300)
    floor = UNITS[dtype] + 2.0**-24 * (chain / 6) ** 0.5
    errors = []
    for values in (actual, plain):
        difference = torch.cat([t.double().flatten() for t in values]) - exact
        errors.append((float(difference.square().mean().sqrt()) / size, float(difference.abs().max()) / largest))
    (rms_error, max_error), (plain_rms, plain_max) = errors
    luck = 4 / (independent or exact.numel()) ** 0.5
    rms_bar, max_bar = (1.05 + luck) * plain_rms + floor, (1.5 + luck) * plain_max + floor
    passed = rms_error <= rms_bar and max_error <= max_bar  # NaN never passes
    figures = {"rms": rms_error, "rms_bar": rms_bar, "max": max_error, "max_bar": max_bar}
    return {"passed": passed} | {name: value if value < float("inf") else None for name, value in figures.items()}


def judge_all(
    actual: Tensors, plain: Tensors, expected: Tensors, dtype: str, chain: int, independent: int | None
) -> Verdicts:
    """``judge`` for each of the ``results`` of one draw."""
    return {
        name: judge(
            [value], [plain[name]], [expected[name]], dtype, chain,
            independent if name.startswith("d_parameter") else None,
        )
        for name, value in actual.items()
    }  # fmt: skip


def wrong_outputs(verdicts: Verdicts, dtype: str, ours: bool) -> list[str]:
    """The results that do not pass: ours by the bars above, those of others as the same function."""
    if ours:
        return [name for name, found in verdicts.items() if not found["passed"]]
    limit = SAME_FUNCTION[dtype]
    return [name for name, found in verdicts.items() if not (found["rms"] is not None and found["rms"] < limit)]


def outer_rows(x: Tensor) -> list[int]:
    """The first and the last sample of a batch."""
    return sorted({0, x.shape[0] - 1})


def results(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    dy: Tensor | None,
    parameters: Sequence[nn.Parameter],
    rows: Sequence[int] | None = None,
) -> Tensors:
    """``y``, or with dy the gradients of the input and of these parameters; of the samples ``rows`` only."""
    mine = slice(None) if rows is None else list(rows)
    if dy is None:
        with torch.inference_mode():
            return {"y": function(x)[mine]}
    x = x.detach().requires_grad_()
    y = function(x)
    d_x, *rest = torch.autograd.grad(y, [x, *parameters], dy.to(y.dtype))
    return {"d_x": d_x[mine]} | {f"d_parameter {i}": gradient for i, gradient in enumerate(rest)}


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """ "highest", or "high": TensorFloat-32 allowed."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
