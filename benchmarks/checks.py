"""Correctness cases for every kernel and strategy, each against the float64 oracle.

The bars are those of ``judging``; small results are drawn again until n is 64 at least. Every result is computed
twice, in memory poisoned with NaN, and must be the same bit for bit.
"""

from __future__ import annotations

import copy
import time
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from wemoe_fast import FastWEMoEMLP, kernels, ops, packed, reference
from wemoe_fast.kernels.launch import Batch, Routing
from wemoe_fast.kernels.merge import merge
from wemoe_fast.kernels.merged_linear import merged_linear
from wemoe_fast.kernels.merged_linear_dw import merged_linear_dw
from wemoe_fast.kernels.router import route, token_mean
from wemoe_fast.normalization import Normalization

from . import peers
from .judging import DTYPES, Tensors, float32_products, judge, outer_rows, results
from .peers import Materialised, materialised_linear, modules, with_strategy

FEW_DRAWS = ("mlp", "compile", "capture", "peer", "wide")
"""Drawn once: they are large, and what they are made of is drawn often."""
STRATEGIES = ("chunked", "fused", "factored", "auto")
NEEDS = {
    "chunked": ("merge", "router", "ops/chunked", "mlp/chunked"),
    "fused": ("merged_linear", "router", "ops/fused", "mlp/fused"),
    "factored": ("router", "ops/factored", "mlp/factored"),
    "auto": ("merged_linear", "merge", "router", "ops/auto", "mlp/auto"),
}
"""The subjects whose checks must pass before a strategy is timed."""
NEEDS_BACKWARD = {name: (*subjects, f"{subjects[-2]}/gradients", f"{subjects[-1]}/gradients", "token_mean")
                  for name, subjects in NEEDS.items()}  # fmt: skip
NEEDS_BACKWARD["fused"] += ("dx", "dw")
NEEDS_BACKWARD["auto"] += ("dx", "dw")
Shape = tuple[int, int, int, int, int]
"""B, N, T, d, h."""


class SkippedError(Exception):
    """The case cannot be run here; the text says why."""


@dataclass(frozen=True)
class Case:
    """What to check; the subject says how. Shapes: x [B, N, d], stack [1+T, h, d]."""

    subject: str
    dtype: str
    B: int
    N: int
    T: int
    d: int
    h: int
    bias: bool = True
    activation: str = "none"
    normalization: Normalization = ops.IDENTITY
    layout: str = "contiguous"
    lengths: tuple[int, ...] = ()
    shared: bool = False
    nonzero: int | None = None
    gated: bool = False
    depth: int = 2
    masked: bool = False
    strategy: str = "auto"

    @property
    def name(self) -> str:
        """Subject, dtype, sizes and whatever is not usual."""
        norm = self.normalization
        parts = [self.subject, self.dtype, *(f"{size}{getattr(self, size)}" for size in "BNTdh")]
        if norm != ops.IDENTITY:
            parts.append(norm.kind + (f"-{norm.temperature:g}" if norm.temperature != 1 else ""))
            parts += [f"top{norm.top_k}"] if norm.top_k else []
        for f in fields(self)[7:]:
            value = getattr(self, f.name)
            if value != f.default and f.name != "normalization":
                parts.append(f.name if value is True else f"no {f.name}" if value is False else f"{f.name}={value}")
        return " ".join(parts)


@dataclass
class Trial:
    """One draw of a case: three ways to compute the same results by name, and the longest chain of their sums."""

    actual: Callable[[], Tensors]
    plain: Callable[[], Tensors]
    expected: Callable[[], Tensors]
    chain: int
    independent: int | None = None

    def independent_errors(self, name: str) -> int | None:
        """None for as many as there are numbers; the gradients of the router's parameters have but those of w."""
        return self.independent if name.startswith("d_parameter") else None


@dataclass
class Verdict:
    """What became of a case; ``passed`` is None where it was skipped."""

    name: str
    subject: str
    dtype: str
    passed: bool | None
    outputs: dict[str, dict[str, float | bool | None]] = field(default_factory=dict)
    problem: str | None = None
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def run(case: Case, device: str, enough: int = 64) -> Verdict:
    """Check a case. Whatever goes wrong is in the verdict; only a CUDA error, after which nothing runs, is raised."""
    start = time.perf_counter()
    verdict = Verdict(case.name, case.subject, case.dtype, passed=False)
    try:
        with float32_products("high" if case.dtype == "tf32" else "highest"):
            verdict.outputs = _run(case, torch.device(device), enough)
        wrong = [f"{name}: {_what(found)}" for name, found in verdict.outputs.items() if not found["passed"]]
        verdict.passed, verdict.problem = not wrong, "; ".join(wrong) or None
    except (SkippedError, torch.OutOfMemoryError) as reason:
        verdict.passed, verdict.problem = None, str(reason) or "out of memory"
    except Exception as error:
        if "CUDA error" in str(error) or "device-side assert" in str(error):
            raise
        verdict.problem = "".join(traceback.format_exception(error))[-2000:]
    verdict.seconds = time.perf_counter() - start
    if device == "cuda":
        torch.cuda.empty_cache()
    return verdict


def _run(case: Case, device: torch.device, enough: int) -> dict[str, dict[str, float | bool | None]]:
    kind = case.subject.split("/")[0]
    draws: list[tuple[Tensors, Tensors, Tensors]] = []
    differing: set[str] = set()
    while not draws or (kind not in FEW_DRAWS and _numbers(draws) < enough):
        torch.manual_seed(zlib.crc32(f"{case.name} {len(draws)}".encode()))
        trial = SUBJECTS[kind](case, device)
        with poisoned():
            actual, again = trial.actual(), trial.actual()
        draws.append((actual, trial.plain(), trial.expected()))
        differing |= {name for name, value in actual.items() if not same(value, again[name])}
    verdicts = {}
    for name in draws[0][0]:
        ours, plain, exact = ([tensors[i][name] for tensors in draws] for i in range(3))
        found = judge(ours, plain, exact, case.dtype, trial.chain, trial.independent_errors(name))
        found["identical"] = name not in differing
        found["passed"] = bool(found["passed"] and found["identical"])
        verdicts[name] = found
    return verdicts


def _numbers(draws: list[tuple[Tensors, Tensors, Tensors]]) -> int:
    """How many numbers the smallest result has so far."""
    return min(sum(actual[name].numel() for actual, _, _ in draws) for name in draws[0][0])


def _what(found: dict[str, float | bool | None]) -> str:
    figures = ", ".join(f"{name} {found[name]}" for name in ("rms", "rms_bar", "max", "max_bar"))
    return figures if found.get("identical", True) else f"two runs differ ({figures})"


def same(one: Tensor, other: Tensor) -> bool:
    """Bit for bit, but for NaN."""
    return one.shape == other.shape and bool(torch.equal(one.nan_to_num(), other.nan_to_num()))


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN, so that an element nobody writes shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(False)


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same values with other strides; memory between them holds NaN."""
    if layout == "transposed":
        return values.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "features":
        wide = values.new_full((*values.shape[:-1], 2 * values.shape[-1]), float("nan"))
        wide[..., ::2] = values
        return wide[..., ::2]
    if layout == "inside":
        wide = values.new_full([size + 3 for size in values.shape], float("nan"))
        place = wide[tuple(slice(1, 1 + size) for size in values.shape)]
        return place.copy_(values)
    return values


def material(case: Case, device: torch.device) -> Tensors:
    """Random x, stack, logits, dy, and whatever else the case has."""
    dtype, B, T = DTYPES[case.dtype], case.B, case.T
    total = (sum(case.lengths),) if case.lengths else (B, case.N)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, device=device) * scale

    def stack() -> Tensor:
        values = draw(1 + T, case.h, case.d, scale=case.d**-0.5)
        values[1:] *= 0.3
        return laid_out(values.to(dtype), case.layout)

    logits = 0.3 + 0.3 * draw(1 if case.shared else B, T)
    if case.nonzero is not None:
        logits = Normalization(top_k=case.nonzero)(logits)
    tensors = {
        "x": laid_out(draw(*total, case.d).to(dtype), case.layout),
        "dy": laid_out(draw(*total, case.h).to(dtype), case.layout),
        "stack": stack(),
        "logits": logits,
    }
    if case.gated:
        tensors["gate_stack"] = stack()
    if case.bias:
        for name in ("bias", "gate_bias") if case.gated else ("bias",):
            tensors[name] = draw(1 + T, case.h, scale=0.5).to(dtype)
    if case.lengths:
        ends = torch.tensor((0, *case.lengths), device=device).cumsum(0)
        tensors["cu_seqlens"] = ends.to(torch.int32)
    return tensors


def double(tensors: Tensors) -> Tensors:
    return {name: value.double() if value.is_floating_point() else value for name, value in tensors.items()}


def formula(linear: Callable[..., Tensor], case: Case, t: Tensors) -> Tensor:
    """The case's forward with this way to compute a merged linear of padded samples."""
    x = t["x"]
    if case.lengths:
        x = packed.pad(x, t["cu_seqlens"], max(case.lengths))
    weights = case.normalization(t["logits"])
    if case.gated:
        y = linear(x, t["gate_stack"], weights, t.get("gate_bias"), case.activation)
        y = y * linear(x, t["stack"], weights, t.get("bias"), "none")
    else:
        y = linear(x, t["stack"], weights, t.get("bias"), case.activation)
    return packed.unpad(y, t["cu_seqlens"], len(t["x"])) if case.lengths else y


def gradients(function: Callable[[Tensors], Tensor], t: Tensors, names: tuple[str, ...]) -> Tensors:
    """Gradients of <dy, function(t)> by name."""
    leaves = {name: t[name].detach().requires_grad_() for name in names if name in t}
    y = function({**t, **leaves})
    found = torch.autograd.grad(y, list(leaves.values()), t["dy"].to(y.dtype))
    return {f"d_{name}": value for name, value in zip(leaves, found, strict=True)}


def _both(
    case: Case, t: Tensors, names: tuple[str, ...] | None = None
) -> tuple[Callable[[], Tensors], Callable[[], Tensors]]:
    """Plain PyTorch and the oracle: the forward, or gradients by these names."""

    def compute(linear: Callable[..., Tensor], tensors: Tensors) -> Tensors:
        if names is None:
            return {"y": formula(linear, case, tensors)}
        return gradients(lambda t: formula(linear, case, t), tensors, names)

    return lambda: compute(materialised_linear, t), lambda: compute(reference.merged_linear, double(t))


def _routing(case: Case, t: Tensors) -> Routing:
    norm = case.normalization
    return Routing(t["logits"].contiguous(), norm.kind, norm.temperature, norm.top_k, case.nonzero)


def _batch(case: Case, t: Tensors) -> Batch:
    return Batch.of(t["x"], t.get("cu_seqlens"), max(case.lengths, default=0))


def check_merged_linear(case: Case, device: torch.device) -> Trial:
    t = material(case, device)

    def actual() -> Tensors:
        y = merged_linear(
            t["x"], t["stack"], _routing(case, t), t.get("bias"), case.activation,
            gate_stack=t.get("gate_stack"), gate_bias=t.get("gate_bias"), batch=_batch(case, t),
        )  # fmt: skip
        return {"y": y}

    return Trial(actual, *_both(case, t), chain=case.d)


def check_dx(case: Case, device: torch.device) -> Trial:
    t = material(case, device)

    def actual() -> Tensors:
        return {"d_x": merged_linear(t["dy"], t["stack"].mT, _routing(case, t), batch=_batch(case, t))}

    return Trial(actual, *_both(case, t, ("x",)), chain=case.h)


def check_dw(case: Case, device: torch.device) -> Trial:
    t = material(case, device)

    def actual() -> Tensors:
        found = merged_linear_dw(t["dy"], t["x"], t["stack"], _routing(case, t), t.get("bias"), batch=_batch(case, t))
        return {"d_logits": found.sum(0, keepdim=True) if case.shared else found}

    return Trial(actual, *_both(case, t, ("logits",)), chain=case.N + case.h)


def check_merge(case: Case, device: torch.device) -> Trial:
    t = material(case, device)
    stack = t["stack"].flatten(1)
    coefficients = torch.cat([t["logits"].new_ones(case.B, 1), t["logits"].expand(case.B, -1)], dim=1)

    def multiply(dtype: torch.dtype) -> Tensors:
        return {"merged": coefficients.to(dtype) @ stack.to(dtype)}

    return Trial(
        lambda: {"merged": merge(coefficients, stack, stack.new_empty(case.B, stack.shape[1]))},
        lambda: multiply(stack.dtype),
        lambda: multiply(torch.float64),
        chain=case.T,
    )


def check_router(case: Case, device: torch.device) -> Trial:
    """``router``: the routing weights; ``token_mean``: the mean before the last layer."""
    t = material(case, device)
    hidden, dtype = t["x"], DTYPES[case.dtype]
    w1, c1 = None, None
    if case.depth == 2:
        w1 = (torch.randn(case.h, case.d, device=device) * case.d**-0.5).to(dtype)
        c1 = (torch.randn(case.h, device=device) * 0.3).to(dtype)
    width = case.h if case.depth == 2 else case.d
    w2 = (torch.randn(case.T, width, device=device) * 0.3).to(dtype)
    c2 = (0.3 + 0.3 * torch.randn(case.T, device=device)).to(dtype)
    mask = None
    if case.masked:
        mask = torch.rand(hidden.shape[:-1], device=device) < 0.7
        mask[-1] = False if not case.lengths else mask[-1]
    norm, batch, mean_only = case.normalization, _batch(case, t), case.subject == "token_mean"

    def actual() -> Tensors:
        if mean_only:
            return {"mean": token_mean(hidden, mask, w1, c1, batch=batch)}
        weights = route(
            hidden, w2, c2, w1, c1, mask, kind=norm.kind, temperature=norm.temperature, top_k=norm.top_k, batch=batch
        )  # fmt: skip
        return {"weights": weights}

    def plain(wide: torch.dtype) -> Tensors:
        tokens, counted = hidden.to(wide), torch.ones(hidden.shape[:-1], device=device).bool() if mask is None else mask
        if case.lengths:
            tokens = packed.pad(tokens, t["cu_seqlens"], max(case.lengths))
            counted = packed.pad(counted, t["cu_seqlens"], max(case.lengths))
        if w1 is not None and c1 is not None:
            tokens = torch.relu(tokens @ w1.to(wide).mT + c1.to(wide))
        chosen = tokens.masked_fill(~counted.unsqueeze(2), 0)
        mean = chosen.sum(dim=1) / counted.sum(dim=1, keepdim=True).clamp(min=1)
        if mean_only:
            return {"mean": mean}
        return {"weights": norm(mean @ w2.to(wide).mT + c2.to(wide))}

    chain = case.N + case.d + (0 if mean_only else width)
    return Trial(actual, lambda: plain(dtype), lambda: plain(torch.float64), chain)


def check_ops(case: Case, device: torch.device) -> Trial:
    """``ops/<strategy>``, or with ``/gradients`` those of everything."""
    t = material(case, device)

    def forward(t: Tensors) -> Tensor:
        settings: dict[str, Any] = {"normalization": case.normalization, "nonzero": case.nonzero}
        if case.lengths:
            settings |= {"cu_seqlens": t["cu_seqlens"], "max_seqlen": max(case.lengths)}
        if case.gated:
            return ops.merged_gated_linear(
                t["x"], t["gate_stack"], t["stack"], t["logits"], t.get("gate_bias"), t.get("bias"),
                case.activation, case.strategy, **settings,
            )  # fmt: skip
        return ops.merged_linear(
            t["x"], t["stack"], t["logits"], t.get("bias"), case.activation, case.strategy, **settings
        )

    if not case.subject.endswith("/gradients"):
        return Trial(lambda: {"y": forward(t)}, *_both(case, t), chain=case.d)
    names = ("x", "stack", "logits", "bias", "gate_stack", "gate_bias")
    chain = max(case.h, case.B * case.N, case.N + case.h)
    return Trial(lambda: gradients(forward, t, names), *_both(case, t, names), chain=chain)


def check_mlp(case: Case, device: torch.device) -> Trial:
    """``mlp/<strategy>``: a whole module with its router; judged by the first and the last sample of the batch."""
    _, _, fast = modules(case, device)
    x = torch.randn(case.B, case.N, case.d, device=device, dtype=DTYPES[case.dtype])
    return mlp_trial(with_strategy(fast, case.strategy), fast, x, backward=case.subject.endswith("/gradients"))


def mlp_trial(module: Callable[[Tensor], Tensor], fast: FastWEMoEMLP, x: Tensor, backward: bool = False) -> Trial:
    """``module``, which computes the same as ``fast``, on x, judged by the first and the last sample.

    Backward: the gradients of these samples' part of the result, of the input and the router's parameters.
    """
    rows = outer_rows(x)
    parameters = list(fast.router.parameters())
    dy = torch.zeros_like(x)
    dy[rows] = torch.randn_like(dy[rows])
    few, given, exact = x[rows], dy[rows] if backward else None, oracle(fast)
    return Trial(
        lambda: results(module, x, dy if backward else None, parameters, rows),
        lambda: results(Materialised(fast), few, given, parameters),
        lambda: results(exact, few.double(), given, list(exact.router.parameters())),
        chain=sum(fast.up.stack.shape[1:]) + x.shape[1],
        independent=len(rows) * fast.num_experts,
    )


def oracle(fast: FastWEMoEMLP) -> FastWEMoEMLP:
    """The paper's loop in float64 over the same (rounded) numbers."""
    return with_strategy(copy.deepcopy(fast).double(), "reference")


def check_capture(case: Case, device: torch.device) -> Trial:
    """The router and its merged linears replayed from a CUDA graph, on an input that came after the capture."""
    _, _, fast = modules(case, device)
    module = with_strategy(fast, case.strategy)
    x = torch.randn(case.B, case.N, case.d, device=device, dtype=DTYPES[case.dtype])
    held = torch.randn_like(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        for _ in range(3):
            module(held)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        result = module(held)
    held.copy_(x)

    def replayed(given: Tensor) -> Tensor:
        held.copy_(given)
        graph.replay()
        return result.clone()

    return mlp_trial(replayed, fast, x)


def check_compile(case: Case, device: torch.device) -> Trial:
    """torch.compile(fullgraph=True) of the whole module."""
    _, _, fast = modules(case, device)
    x = torch.randn(case.B, case.N, case.d, device=device, dtype=DTYPES[case.dtype])
    torch._dynamo.reset()
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    module = torch.compile(with_strategy(fast, case.strategy), fullgraph=True, backend=backend)
    return mlp_trial(module, fast, x, backward=case.subject.endswith("/gradients"))


def check_wide(case: Case, device: torch.device) -> Trial:
    """Offsets beyond 2^31 elements: ``layout`` says of which tensor."""
    if torch.cuda.mem_get_info(device)[0] < 24 << 30:
        raise SkippedError("less than 24 GiB of device memory are free")
    far = (1 << 31) + 64
    t = material(replace(case, layout="contiguous"), device)
    if case.layout == "result":
        part = slice(-min(64, case.N), None)
        few = {**t, "x": t["x"][-1:, part], "logits": t["logits"][-1:]}
        last = replace(case, B=1, layout="contiguous")
        return Trial(
            lambda: {"y": merged_linear(t["x"], t["stack"], _routing(case, t), t.get("bias"))[-1:, part].clone()},
            *_both(last, few),
            chain=case.d,
        )
    for name in ("x", "dy") if case.layout == "samples" else ("stack",):
        values = t[name]
        memory = torch.empty(far * (len(values) - 1) + values[0].numel(), dtype=values.dtype, device=device)
        t[name] = memory.as_strided(values.shape, (far, *values.stride()[1:])).copy_(values)
        # Only the places in use are written: reading elsewhere finds old memory, most likely not what belongs there.
    close = {**t, "x": t["x"].contiguous(), "dy": t["dy"].contiguous(), "stack": t["stack"].contiguous()}
    forward, backward = _both(case, close), _both(case, close, ("x", "logits"))

    def actual() -> Tensors:
        return {
            "y": merged_linear(t["x"], t["stack"], _routing(case, t), t.get("bias")),
            "d_x": merged_linear(t["dy"], t["stack"].mT, _routing(case, t)),
            "d_logits": merged_linear_dw(t["dy"], t["x"], t["stack"], _routing(case, t), t.get("bias")),
        }

    return Trial(actual, lambda: forward[0]() | backward[0](), lambda: forward[1]() | backward[1](), case.N + case.h)


def check_peer(case: Case, device: torch.device) -> Trial:
    """``peer/compiled``: compiles what is timed later, so that the timing finds it in the disk cache."""
    _, _, fast = modules(case, device)
    x = torch.randn(case.B, case.N, case.d, device=device, dtype=DTYPES[case.dtype])
    plain = Materialised(fast)
    if device.type == "cuda" and plain.merged_bytes(case.B) > torch.cuda.mem_get_info(device)[0] // 4:
        raise SkippedError("the merged weights of the batch would take a quarter of the free device memory")
    return mlp_trial(peers.compiled(plain, peers.dry_backend(device)), fast, x)


SUBJECTS: dict[str, Callable[[Case, torch.device], Trial]] = {
    "merged_linear": check_merged_linear,
    "dx": check_dx,
    "dw": check_dw,
    "merge": check_merge,
    "router": check_router,
    "token_mean": check_router,
    "ops": check_ops,
    "mlp": check_mlp,
    "capture": check_capture,
    "compile": check_compile,
    "wide": check_wide,
    "peer": check_peer,
}

SOFTMAX, SIGMOID = Normalization("softmax", 0.7), Normalization("sigmoid")
LAYOUTS = ("contiguous", "transposed", "features", "inside")
NORMALIZATIONS = (
    SOFTMAX,
    SIGMOID,
    Normalization(top_k=2),
    Normalization("softmax", top_k=2),
    Normalization("sigmoid", top_k=1),
)
FULL_SHAPES: tuple[Shape, ...] = (
    (64, 50, 8, 768, 3072), (3, 197, 8, 3072, 768), (1, 257, 20, 768, 3072), (64, 1, 8, 768, 3072),
    (3, 65, 3, 200, 136), (3, 7, 1, 84, 100), (1, 50, 20, 84, 100), (64, 7, 20, 136, 264), (64, 65, 3, 84, 200),
    (3, 257, 1, 1000, 520), (1, 1, 3, 40, 72), (64, 197, 3, 72, 40), (1, 7, 8, 1000, 1000),
)  # fmt: skip
GRADIENT_SHAPES: tuple[Shape, ...] = (
    (3, 50, 8, 768, 3072),
    (64, 65, 3, 84, 200),
    (3, 257, 20, 136, 72),
    (1, 7, 1, 100, 84),
)
DRY_SHAPES: tuple[Shape, ...] = ((3, 7, 3, 40, 56), (1, 20, 1, 24, 36))


def cases(suite: str, device: str) -> list[Case]:
    """All cases of a suite, dtype after dtype, kernels before what is built on them."""
    full = suite == "full"
    found: list[Case] = []
    for dtype in DTYPES:
        found += _kernel_cases(dtype, FULL_SHAPES if full else DRY_SHAPES, full)
        found += _ops_cases(dtype, GRADIENT_SHAPES if full else DRY_SHAPES[:1], full)
    middle: Shape = (8, 50, 8, 768, 3072) if full else (2, 5, 2, 40, 56)
    for strategy in STRATEGIES:
        low = "bfloat16" if full else "float32"
        for subject in ("compile", "compile/gradients") if full else ("compile",):
            found += [Case(subject, low, *middle, strategy=strategy)]
        found += [Case("capture", low, *middle, strategy=strategy)] if device == "cuda" else []
    if full and device == "cuda":
        found += [
            Case("wide", "bfloat16", 2, 65, 3, 200, 136, layout="samples"),
            Case("wide", "bfloat16", 3, 65, 2, 200, 136, layout="experts"),
            Case("wide", "float16", 64, 8256, 2, 64, 4096, layout="result"),
        ]
    return found


def _kernel_cases(dtype: str, shapes: tuple[Shape, ...], full: bool) -> Iterator[Case]:
    small: Shape = (3, 65, 8, 104, 88) if full else (3, 7, 3, 40, 56)
    lengths = (7, 0, 65, 1, 33) if full else (5, 0, 7)
    ragged: Shape = (len(lengths), max(lengths), *small[2:])
    for i, shape in enumerate(shapes):
        layout, bias = LAYOUTS[i % 4], i % 3 != 2
        yield Case("merged_linear", dtype, *shape, layout=layout, bias=bias, activation=kernels.ACTIVATIONS[i % 6])
        yield Case("dx", dtype, *shape, layout=layout, bias=False)
        yield Case("dw", dtype, *shape, layout=layout, bias=bias)
        router: Shape = (*shape[:4], shape[3])
        yield Case("router", dtype, *router, layout=layout, depth=2, masked=i % 2 == 1)
        yield Case("router", dtype, *router, layout=layout, depth=1, masked=i % 2 == 0)
    if not full and dtype != "bfloat16":
        return
    for activation in kernels.ACTIVATIONS[1:] if full else kernels.ACTIVATIONS[2:4]:
        yield Case("merged_linear", dtype, *small, activation=activation)
    for norm in NORMALIZATIONS if full else NORMALIZATIONS[3:4]:
        yield Case("merged_linear", dtype, *small, normalization=norm)
        yield Case("dw", dtype, *small, normalization=norm)
        if dtype != "tf32" or norm.top_k is None:
            yield Case("router", dtype, *small[:4], small[3], normalization=norm)
    for subject in ("merged_linear", "dx", "dw"):
        yield Case(subject, dtype, *ragged, lengths=lengths, bias=subject != "dx")
        yield Case(subject, dtype, *small, shared=True, bias=subject != "dx")
    for bias, more in ((True, {}), (False, {"layout": "inside"}), (True, {"lengths": lengths})):
        if full or bias:
            sizes = ragged if more.get("lengths") else small
            yield Case("merged_linear", dtype, *sizes, gated=True, activation="silu", bias=bias, **more)
    yield Case("merged_linear", dtype, *small, nonzero=2)
    for depth in (1, 2):
        yield Case("router", dtype, *ragged[:4], ragged[3], lengths=lengths, depth=depth, masked=True)
        yield Case("token_mean", dtype, *small, depth=depth, masked=depth == 1)
        if full:
            yield Case("token_mean", dtype, 64, 197, 8, 768, 768, depth=depth)
    yield Case("merge", dtype, *small, bias=False)
    if full:
        yield Case("merge", dtype, 64, 1, 20, 768, 520, bias=False)
        yield Case("merge", dtype, 1, 1, 1, 84, 100, bias=False)


def _ops_cases(dtype: str, shapes: tuple[Shape, ...], full: bool) -> Iterator[Case]:
    for i, shape in enumerate(shapes):
        for strategy in ("shared", *STRATEGIES) if full or dtype == "bfloat16" else ("fused",):
            usual: dict[str, Any] = {"strategy": strategy, "shared": strategy == "shared"}
            layout = LAYOUTS[(i + 1) % 4]
            yield Case(f"ops/{strategy}", dtype, *shape, activation="gelu", layout=layout, **usual)
            yield Case(f"ops/{strategy}/gradients", dtype, *shape, activation="gelu", layout=layout, **usual)
    if not full and dtype != "bfloat16":
        return
    lengths = (7, 0, 65, 1, 33) if full else (5, 0, 7)
    _, N, T, d, h = shapes[min(1, len(shapes) - 1)]
    for strategy in STRATEGIES if full else ("fused",):
        packed_case = Case(
            f"ops/{strategy}", dtype, len(lengths), max(lengths), T, d, h, lengths=lengths, strategy=strategy
        )
        softmax = Normalization("softmax", top_k=2)
        for case in (
            packed_case,
            Case(f"ops/{strategy}", dtype, 3, N, T, d, h, normalization=softmax, strategy=strategy),
        ):
            yield case
            yield replace(case, subject=f"{case.subject}/gradients")
        yield Case(f"ops/{strategy}", dtype, 3, N, T, d, h, gated=True, activation="silu", strategy=strategy)
