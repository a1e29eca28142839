"""What an MLP is made of: recognised by structure, verified by running it.

A module is taken for an MLP when it holds two linears (or three: gated), no other parameters, and computes
what the formula says. Names of attributes and classes are never trusted. To verify, the module is run once
with random weights in place of its own (`torch.func.functional_call`), so the answer depends neither on the
values of its weights (all zero, not a number) nor on their precision: in bfloat16, gelu and gelu_tanh are
hard to tell apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import permutations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy

from wemoe_fast.activations import ACTIVATIONS
from wemoe_fast.errors import InputError

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# With unit-gain weights, rounding stays below 1e-6 and gelu differs from gelu_tanh by more than 1e-4.
TOLERANCE = 2e-5
# Rms of what the activation sees, token by token: small ones tell smooth activations apart, large ones show
# clipping (relu6). Every token comes with both signs: a narrow MLP might see only one otherwise.
TOKEN_SCALES = (0.7, 1.5, 3.0, 30.0, 100.0)


@dataclass(frozen=True)
class MLPParts:
    """y = down(act(up(x))) or, gated, down(act(gate(x)) * up(x)). No copies: the module's own."""

    up: nn.Linear
    down: nn.Linear
    activation: str
    gate: nn.Linear | None = None

    def linears(self) -> dict[str, nn.Linear]:
        """{"up": ..., "down": ...} and, if gated, "gate"."""
        linears = {"up": self.up, "down": self.down}
        if self.gate is not None:
            linears["gate"] = self.gate
        return linears

    @property
    def in_features(self) -> int:
        return self.up.in_features

    @property
    def hidden_features(self) -> int:
        return self.up.out_features

    @property
    def out_features(self) -> int:
        return self.down.out_features


@dataclass(frozen=True)
class _Layout:
    """Which linear plays which part, by name; without down, the module ends after the activation."""

    up: str
    gate: str | None = None
    down: str | None = None

    def __str__(self) -> str:
        hidden = "act({up}(x))" if self.gate is None else "act({gate}(x)) * {up}(x)"
        formula = hidden if self.down is None else f"{{down}}({hidden})"
        return formula.format(up=self.up, gate=self.gate, down=self.down)


def parse_mlp(module: nn.Module) -> MLPParts:
    """The parts of an MLP module, its activation found by running it.

    The module holds two nn.Linear, or three if gated, in any order, and no other parameters (so no PReLU, no
    norm); it maps [1, N, in] to [1, N, out]. It runs in eval mode, so dropout is a no-op, and is left as it
    was, training flags and the global random state included.

    Raises InputError: other linears or parameters; linears that are shared, tied or do not chain; a formula
    or an activation that is not known; weights that are not finite, on the meta device, quantised, or of
    several dtypes or devices.
    """
    parts = recognise(module)
    if problems := value_problems(dict(module.named_parameters())):
        raise InputError.of(_describe(module), problems)
    return parts


def parse_split_mlp(site: nn.Module, down: nn.Linear) -> MLPParts:
    """The parts of an MLP in two modules: `site` computes act(up(x)); `down` comes right after it, elsewhere.

    `site` is verified as in `parse_mlp`; that `down` is applied to its output is the caller's knowledge.
    InputError as in `parse_mlp`.
    """
    parts = recognise_split(site, down)
    if problems := value_problems(
        {f"{role}.{name}": p for role, linear in parts.linears().items() for name, p in linear.named_parameters()}
    ):
        raise InputError.of(_describe(site), problems)
    return parts


def recognise(module: nn.Module) -> MLPParts:
    """`parse_mlp` without a look at the weights' values, dtype or device."""
    linears = _linears(module)
    if problems := _structure_problems(module, linears, expected=(2, 3)):
        raise InputError.of(_describe(module), problems)
    layouts = list(_layouts(linears))
    if not layouts:
        wanted = "up: d -> h, down: h -> k" + (", gate: d -> h" if len(linears) == 3 else "")
        raise InputError(f"{_describe(module)}: expected linears that chain ({wanted}); found {_shapes(linears)}")
    layout, activation = _probe(module, linears, layouts)
    return MLPParts(
        up=linears[layout.up],
        down=linears[layout.down or ""],
        activation=activation,
        gate=None if layout.gate is None else linears[layout.gate],
    )


def recognise_split(site: nn.Module, down: nn.Linear) -> MLPParts:
    """`parse_split_mlp` without a look at the weights' values, dtype or device."""
    linears = _linears(site)
    problems = _structure_problems(site, linears, expected=(1,))
    problems += _structure_problems(down, {"": down}, expected=(1,))
    if len(linears) == 1:
        [up] = linears.values()
        if up is down:
            problems.append("expected two linears, up and down; found one in both roles")
        elif up.out_features != down.in_features:
            problems.append(
                f"expected linears that chain (up: d -> h, down: h -> k); found {_shape(up)} and {_shape(down)}"
            )
    if problems:
        raise InputError.of(_describe(site), problems)
    layout, activation = _probe(site, linears, [_Layout(up=next(iter(linears)))])
    return MLPParts(up=linears[layout.up], down=down, activation=activation)


def value_problems(parameters: Mapping[str, Tensor]) -> list[str]:
    """What is wrong with the dtypes, devices and values of one MLP's parameters; empty if nothing is."""
    problems = []
    for what in ("dtype", "device"):
        found = {name: str(getattr(p, what)).removeprefix("torch.") for name, p in parameters.items()}
        if len(set(found.values())) > 1:
            listed = ", ".join(f"{name} {value}" for name, value in found.items())
            problems.append(f"expected parameters of one {what}; found {listed}; module.to(...) makes them so")
    for name, parameter in parameters.items():
        if parameter.is_meta:
            problems.append(f"{name}: expected values; found none (meta device): load or materialise the weights")
        elif parameter.numel() and not all(end.isfinite() for end in torch.aminmax(parameter.detach())):
            count = int((~parameter.detach().isfinite()).sum())
            problems.append(f"{name}: expected finite values; {count} of {parameter.numel()} are NaN or infinite")
    return problems


def mlp_like(module: nn.Module) -> str | None:
    """The two or three linears of a module that might be an MLP, "a: 4 -> 16, b: 16 -> 4"; else None."""
    everywhere = _linears(module)
    own = {name: child for name, child in module.named_children() if isinstance(child, nn.Linear)}
    linears = everywhere if len(everywhere) in (2, 3) else own
    chained = any(
        up.out_features == down.in_features and up.in_features == down.out_features != up.out_features
        for up, down in permutations(linears.values(), 2)
    )
    return _shapes(linears) if chained and len(linears) in (2, 3) else None


def _linears(module: nn.Module) -> dict[str, nn.Linear]:
    found = module.named_modules(remove_duplicate=False)
    return {name: child for name, child in found if isinstance(child, nn.Linear)}


def _structure_problems(module: nn.Module, linears: Mapping[str, nn.Linear], expected: tuple[int, ...]) -> list[str]:
    problems = []
    if len(linears) not in expected:
        numbers = " or ".join(str(n) for n in expected)
        problems.append(f"expected {numbers} nn.Linear; found {len(linears)}{_listed(linears)}")
    owner: dict[int, str] = {}
    own: set[str] = set()
    for name, linear in linears.items():
        for kind in ("weight", "bias"):
            parameter = linear._parameters.get(kind)
            if parameter is None:
                continue
            full = f"{name}.{kind}".removeprefix(".")
            own.add(full)
            if is_lazy(parameter):
                problems.append(f"{full}: expected a shape; found a lazy parameter: run the model once first")
            elif parameter.dtype not in DTYPES:
                known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
                problems.append(f"{full}: expected dtype {known}; found {parameter.dtype} (quantised?)")
            if id(parameter) in owner:
                problems.append(f"{full}: expected a parameter of its own; it is shared with {owner[id(parameter)]}")
            owner.setdefault(id(parameter), full)
    others = [name for name, _ in module.named_parameters(remove_duplicate=False) if name not in own]
    if others:
        problems.append(f"expected no parameters but those of linears; found{_listed(others).removeprefix(':')}")
    return problems


def _layouts(linears: Mapping[str, nn.Linear]) -> Iterator[_Layout]:
    """Every assignment of roles that fits the shapes."""
    for names in permutations(linears):
        up, down, *rest = (linears[name] for name in names)
        gate = rest[0] if rest else up
        if up.out_features == down.in_features and _shape(gate) == _shape(up):
            yield _Layout(up=names[0], down=names[1], gate=names[2] if rest else None)


def _probe(module: nn.Module, linears: Mapping[str, nn.Linear], layouts: Sequence[_Layout]) -> tuple[_Layout, str]:
    """The layout and activation whose formula gives what the module gives, on random weights and input."""
    device, dtype = _probe_on(next(iter(linears.values())).weight)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype, device="cpu").to(device)

    weights: dict[str, tuple[Tensor, Tensor | None]] = {}
    for name, linear in linears.items():
        rows, columns = linear.out_features, linear.in_features
        # A Hankel matrix: as good as a random one here, at the cost of one vector of random numbers.
        weight = (random(rows + columns - 1) / columns**0.5).as_strided((rows, columns), (1, 1)).contiguous()
        weights[name] = (weight, None if linear.bias is None else 0.3 * random(rows))

    fits: list[tuple[float, _Layout, str]] = []
    failures: list[str] = []
    for width in dict.fromkeys(linears[layout.up].in_features for layout in layouts):
        x = random(1, len(TOKEN_SCALES), width)
        x = x / x.square().mean(-1, keepdim=True).sqrt()
        x = x * torch.tensor(TOKEN_SCALES, dtype=dtype, device=device)[:, None]
        x = torch.cat([x, -x], 1)  # [1, tokens, width]
        try:
            y = _run(module, weights, x)
        except InputError as failure:
            failures.append(str(failure))
            continue
        for layout in layouts:
            if linears[layout.up].in_features == width:
                candidates = _candidates(layout, weights, x)
                if candidates.shape[1:] == y.shape:
                    fits += [(error, layout, name) for name, error in _errors(candidates, y).items()]
                else:
                    failures.append(f"expected an output {list(candidates.shape[1:])}; found {list(y.shape)}")

    if not fits:
        raise InputError.of(_describe(module), failures)
    error, layout, activation = min(fits, key=lambda fit: fit[0])
    if error > TOLERANCE:
        formula = str(layout).replace("act(", f"{activation}(")
        raise InputError(
            f"{_describe(module)}: expected {layout}; found another function of {_shapes(linears)}: "
            f"the closest is {formula}, relative error {error:.1e} (at most {TOLERANCE:.0e} fits). "
            f"Known activations: {', '.join(ACTIVATIONS)}. A residual, a norm or a scale does not fit either"
        )
    return layout, activation


def _probe_on(weight: Tensor) -> tuple[torch.device, torch.dtype]:
    device = torch.device("cpu") if weight.is_meta else weight.device
    # float64 on CUDA: float32 may be TF32 there, too coarse.
    wide = weight.dtype == torch.float64 or device.type == "cuda"
    return device, torch.float64 if wide else torch.float32


def _run(module: nn.Module, weights: Mapping[str, tuple[Tensor, Tensor | None]], x: Tensor) -> Tensor:
    """The module's output with other weights."""
    parameters = {}
    for name, (weight, bias) in weights.items():
        parameters[f"{name}.weight".removeprefix(".")] = weight
        if bias is not None:
            parameters[f"{name}.bias".removeprefix(".")] = bias
    devices = [x.device] if x.device.type == "cuda" else []
    with (
        torch.no_grad(),
        torch.autocast(x.device.type, enabled=False),
        torch.random.fork_rng(devices),
        _eval_mode(module),
    ):
        try:
            y = torch.func.functional_call(module, parameters, (x.clone(),))
        except Exception as error:
            raise InputError(
                f"expected a function of one tensor; running it on {list(x.shape)} failed: "
                f"{type(error).__name__}: {error}"
            ) from error
    if not isinstance(y, Tensor):
        raise InputError(f"expected a tensor as output; found {type(y).__name__}")
    return y


@contextmanager
def _eval_mode(module: nn.Module) -> Iterator[None]:
    modes = [(child, child.training) for child in module.modules()]
    try:
        for child, _ in modes:
            child.training = False
        yield
    finally:
        for child, training in modes:
            child.training = training


def _candidates(layout: _Layout, weights: Mapping[str, tuple[Tensor, Tensor | None]], x: Tensor) -> Tensor:
    """[activations, 1, tokens, out]: what the layout gives with each of the activations."""
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        up = F.linear(x, *weights[layout.up])
        if layout.gate is None:
            hidden = torch.stack([act(up) for act in ACTIVATIONS.values()])
        else:
            gate = F.linear(x, *weights[layout.gate])
            hidden = torch.stack([act(gate) for act in ACTIVATIONS.values()]) * up
        return hidden if layout.down is None else F.linear(hidden, *weights[layout.down])


def _errors(candidates: Tensor, y: Tensor) -> dict[str, float]:
    """How far y [1, tokens, out] is from each activation's candidate: the worst token, by its size."""
    size = y.abs().amax(-1, keepdim=True).clamp_min(1)
    errors = ((candidates - y) / size).abs().flatten(1).amax(1).nan_to_num(nan=torch.inf)
    return dict(zip(ACTIVATIONS, errors.tolist(), strict=True))


def _describe(module: nn.Module) -> str:
    return f"MLP ({type(module).__name__})"


def _shape(linear: nn.Linear) -> str:
    return f"{linear.in_features} -> {linear.out_features}"


def _shapes(linears: Mapping[str, nn.Linear]) -> str:
    return ", ".join(f"{name or 'itself'}: {_shape(linear)}" for name, linear in linears.items())


def _listed(names: Mapping[str, nn.Linear] | Sequence[str], most: int = 6) -> str:
    shown = [name or "itself" for name in list(names)[:most]]
    if len(names) > most:
        shown.append(f"{len(names) - most} more")
    return f": {', '.join(shown)}" if shown else ""
