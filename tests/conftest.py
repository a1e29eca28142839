from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

if "OMP_WAIT_POLICY" not in os.environ:
    # Read as PyTorch is loaded: threads that wait busily are in the way of the tests beside them.
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton: without a GPU kernels are interpreted

from wemoe_fast import chunked, factored, plan, reference, token_mean
from wemoe_fast.kernels import native


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _patient_interpreter() -> Iterator[None]:
    """Triton's interpreter prepares its language at every call of a device function: once a kernel is enough."""
    try:
        import triton.language as language
        from triton.runtime import interpreter
    except ImportError:
        yield
        return
    prepare = interpreter._patch_lang

    def once(function: Any) -> Any:
        used = [m for m in function.__globals__.values() if inspect.ismodule(m) and m in (language, language.core)]
        if used and not any(language.core.is_builtin(module.load) for module in used):
            return interpreter._LangPatchScope()
        return prepare(function)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", once)
        yield


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Several threads would only slow small models down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class _Poisoned(native._Memory):
    def take(self, role: str, numbers: int, dtype: torch.dtype) -> Tensor:
        return super().take(role, numbers, dtype).fill_(torch.nan)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh memory, and what the CPU kernels keep, holds NaN, so that an element nobody writes shows."""
    torch.use_deterministic_algorithms(True)
    monkeypatch.setattr(native, "_memory", _Poisoned())
    try:
        fresh = torch.empty(3), torch.zeros(3).new_empty(3), torch.empty_like(torch.zeros(3))
        assert all(t.isnan().all() for t in fresh)
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def set_plan(monkeypatch: pytest.MonkeyPatch, **constants: int) -> None:
    """Constants of the plan, in every module that reads them."""
    for name, value in constants.items():
        for module in (plan, chunked, factored, token_mean):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)


@pytest.fixture
def tiny_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of 3 samples, slabs of 8 rows for all workers, blocks of a few tokens: every loop, with ragged ends."""
    set_plan(monkeypatch, GROUP=3, WORKSPACE_BYTES=2048, WORTH_SHARING=0)


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected| over all elements; 0 for no elements; NaN is infinite."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if not actual.numel():
        return 0.0
    error = (actual.detach().double() - expected.detach().double()).norm() / (
        expected.detach().double().norm() + 1e-300
    )
    return float("inf") if error.isnan() else float(error)


def max_error(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference."""
    assert actual.shape == expected.shape
    if not actual.numel():
        return 0.0
    error = (actual.detach().double() - expected.detach().double()).abs().max()
    return float("inf") if error.isnan() else float(error)


def assert_no_worse(actual, expected, plain):
    """Relative RMS and largest error, against float64, at most those of the plain formula in the same dtype."""
    for name, value in expected.items():
        dtype = actual[name].dtype
        assert dtype == plain[name].dtype, name
        slack = 2e-6 if dtype == torch.float32 else 1e-5
        if name == "routing_weights":
            # A handful of numbers: the plain formula may be lucky, so allow the rounding of the result itself.
            slack = max(slack, torch.finfo(plain["y"].dtype).eps / 2)
        assert relative_rms(actual[name], value) <= 1.05 * relative_rms(plain[name], value) + slack, name
        # The largest error is one element: noisier than the RMS.
        bound = 1.5 * max_error(plain[name], value) + slack * float(value.abs().max())
        assert max_error(actual[name], value) <= bound, name


def merged_inputs(
    B: int, N: int, T: int, *, d: int = 13, h: int = 21, bias: bool = True, rows: int | None = None, **options: Any
) -> dict[str, Tensor]:
    """Inputs of merged_linear that all require grad; ``rows`` of routing weights, B unless given."""
    values = {
        "x": torch.randn(B, N, d),
        "stack": torch.randn(1 + T, h, d) / d**0.5,
        "routing_weights": 0.3 + 0.3 * torch.randn(B if rows is None else rows, T),
    }
    values["stack"][1:] *= 0.3
    if bias:
        values["bias"] = torch.randn(1 + T, h) * 0.5
    return {name: leaf(value.to(**options)) for name, value in values.items()}


def leaf(value: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return value.detach().clone().to(dtype or value.dtype).requires_grad_()


def gradients(
    function: Callable[..., Tensor], inputs: dict[str, Tensor], dy: Tensor | None = None, **settings: Any
) -> dict[str, Tensor]:
    """The result "y" of function(**inputs, **settings) and the gradients by input name; dy is all ones unless given."""
    y = function(**inputs, **settings)
    wanted = {name: value for name, value in inputs.items() if value.requires_grad}
    grads = torch.autograd.grad(y, list(wanted.values()), torch.ones_like(y) if dy is None else dy.to(y.dtype))
    return {"y": y.detach(), **dict(zip(wanted, grads, strict=True))}


def oracle(inputs: dict[str, Tensor], activation: str | None = None, dy: Tensor | None = None) -> dict[str, Tensor]:
    """The reference in float64, on the same rounded inputs."""
    return in_dtype(torch.float64, inputs, activation, dy)


def in_dtype(
    dtype: torch.dtype, inputs: dict[str, Tensor], activation: str | None = None, dy: Tensor | None = None
) -> dict[str, Tensor]:
    """The reference in another dtype."""
    converted = {name: value.detach().to(dtype).requires_grad_(value.requires_grad) for name, value in inputs.items()}
    return gradients(reference.merged_linear, converted, dy, activation=activation)


def peak_bytes(function: Callable[[], Any]) -> tuple[int, int, Any]:
    """Largest number of bytes allocated at once, bytes still allocated at the end, and the result.

    Read off the CPU allocator, so it sees what happens inside of registered operators; on one thread, because it
    does not see what workers allocate (they share what one may use, see test_plan).
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            result = function()
    finally:
        torch.set_num_threads(threads)
    now = peak = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak, now, result
