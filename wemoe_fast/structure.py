"""What an MLP is made of: recognised by structure, verified by running it.

A module is taken for an MLP when it holds two linears (or three: gated), no other parameters, and computes
what the formula says. Names of attributes and classes are never trusted. To verify, the module is run once
with random weights in place of its own (`torch.func.functional_call`), so the answer depends neither on the
values of its weights (all zero, not a number) nor on their precision: in bfloat16, gelu and gelu_tanh are
hard to tell apart.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise, permutations
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy

from wemoe_fast.activations import ACTIVATIONS
from wemoe_fast.errors import InputError
from wemoe_fast.linears import bias_of, is_linear, is_transposed, sizes, weight_of

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# With unit-gain weights, rounding stays below 1e-6 and gelu differs from gelu_tanh by more than 1e-4.
TOLERANCE = 2e-5
# Rms of what the activation sees, token by token: small ones tell smooth activations apart, large ones show
# clipping (relu6). Every token comes with both signs: a narrow MLP might see only one otherwise.
TOKEN_SCALES = (0.7, 1.5, 3.0, 30.0, 100.0)


@dataclass(frozen=True)
class MLPParts:
    """y = down(act(up(x))) or, gated, down(act(gate(x)) * up(x)). No copies: the module's own linears."""

    up: nn.Module
    down: nn.Module
    activation: str
    gate: nn.Module | None = None

    def linears(self) -> dict[str, nn.Module]:
        """{"up": ..., "down": ...} and, if gated, "gate"; see ``wemoe_fast.linears``."""
        linears = {"up": self.up, "down": self.down}
        if self.gate is not None:
            linears["gate"] = self.gate
        return linears

    @property
    def in_features(self) -> int:
        return sizes(self.up)[0]

    @property
    def hidden_features(self) -> int:
        return sizes(self.up)[1]

    @property
    def out_features(self) -> int:
        return sizes(self.down)[1]


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

    The module holds two linears, or three if gated, in any order, and no other parameters (so no PReLU, no
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


def parse_split_mlp(site: nn.Module, down: nn.Module) -> MLPParts:
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


def recognise_split(site: nn.Module, down: nn.Module) -> MLPParts:
    """`parse_split_mlp` without a look at the weights' values, dtype or device."""
    linears = _linears(site)
    problems = _structure_problems(site, linears, expected=(1,))
    problems += _structure_problems(down, {"": down}, expected=(1,))
    if len(linears) == 1:
        [up] = linears.values()
        if up is down:
            problems.append("expected two linears, up and down; found one in both roles")
        elif sizes(up)[1] != sizes(down)[0]:
            problems.append(
                f"expected linears that chain (up: d -> h, down: h -> k); found {_shape(up)} and {_shape(down)}"
            )
    if problems:
        raise InputError.of(_describe(site), problems)
    layout, activation = _probe(site, linears, [_Layout(up=next(iter(linears)))])
    return MLPParts(up=linears[layout.up], down=down, activation=activation)


def check_chain(host: nn.Module, chain: Sequence[nn.Module]) -> None:
    """Raise InputError unless `host`, run once, hands every module of `chain` just what the one before it gave.

    It must be the very tensor (dropout in evaluation mode returns what it is given). The first of `chain` is a
    linear; `host` is run on zeros [1, 2, in] of its dtype and device, None for whatever else it asks for.
    """
    seen: list[tuple[nn.Module, Any, Any]] = []
    weight = weight_of(chain[0])
    x = torch.zeros(1, 2, weight.shape[1], dtype=weight.dtype, device=weight.device)
    arguments = inspect.signature(host.forward).parameters.values()
    needed = [a for a in arguments if a.kind is a.POSITIONAL_OR_KEYWORD and a.default is a.empty]
    handles = [
        module.register_forward_hook(lambda module, args, output: seen.append((module, args[0], output)))
        for module in chain
    ]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), _eval_mode(host):
            host(x, *[None] * (len(needed) - 1))
    except Exception as error:
        raise InputError(
            f"{_describe(host)}: expected a function of hidden states; running it on {list(x.shape)} failed: "
            f"{type(error).__name__}: {error}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    ran = [module for module, _, _ in seen]
    if ran != list(chain) or any(given is not gave for (_, _, gave), (_, given, _) in pairwise(seen)):
        names = " -> ".join(type(module).__name__ for module in chain)
        raise InputError(f"{_describe(host)}: expected {names} one after the other; found something in between")


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
    own = {name: child for name, child in module.named_children() if is_linear(child)}
    linears = everywhere if len(everywhere) in (2, 3) else own
    chained = any(
        sizes(up) == sizes(down)[::-1] and sizes(up)[0] != sizes(up)[1]
        for up, down in permutations(linears.values(), 2)
    )
    return _shapes(linears) if chained and len(linears) in (2, 3) else None


def _linears(module: nn.Module) -> dict[str, nn.Module]:
    found = module.named_modules(remove_duplicate=False)
    return {name: child for name, child in found if is_linear(child)}


def _structure_problems(module: nn.Module, linears: Mapping[str, nn.Module], expected: tuple[int, ...]) -> list[str]:
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


def _layouts(linears: Mapping[str, nn.Module]) -> Iterator[_Layout]:
    """Every assignment of roles that fits the shapes."""
    for names in permutations(linears):
        up, down, *rest = (linears[name] for name in names)
        gate = rest[0] if rest else up
        if sizes(up)[1] == sizes(down)[0] and sizes(gate) == sizes(up):
            yield _Layout(up=names[0], down=names[1], gate=names[2] if rest else None)


def _probe(module: nn.Module, linears: Mapping[str, nn.Module], layouts: Sequence[_Layout]) -> tuple[_Layout, str]:
    """The layout and activation whose formula gives what the module gives, on random weights and input."""
    device, dtype = _probe_on(weight_of(next(iter(linears.values()))))
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype, device="cpu").to(device)

    weights: dict[str, tuple[Tensor, Tensor | None]] = {}
    for name, linear in linears.items():
        columns, rows = sizes(linear)
        # A Hankel matrix: as good as a random one here, at the cost of one vector of random numbers.
        weight = (random(rows + columns - 1) / columns**0.5).as_strided((rows, columns), (1, 1)).contiguous()
        weights[name] = (weight, None if bias_of(linear) is None else 0.3 * random(rows))

    fits: list[tuple[float, _Layout, str]] = []
    failures: list[str] = []
    for width in dict.fromkeys(sizes(linears[layout.up])[0] for layout in layouts):
        x = random(1, len(TOKEN_SCALES), width)
        x = x / x.square().mean(-1, keepdim=True).sqrt()
        x = x * torch.tensor(TOKEN_SCALES, dtype=dtype, device=device)[:, None]
        x = torch.cat([x, -x], 1)  # [1, tokens, width]
        try:
            y = _run(module, linears, weights, x)
        except InputError as failure:
            failures.append(str(failure))
            continue
        for layout in layouts:
            if sizes(linears[layout.up])[0] == width:
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


def _run(
    module: nn.Module,
    linears: Mapping[str, nn.Module],
    weights: Mapping[str, tuple[Tensor, Tensor | None]],
    x: Tensor,
) -> Tensor:
    """The module's output with other weights."""
    parameters = {}
    for name, (weight, bias) in weights.items():
        parameters[f"{name}.weight".removeprefix(".")] = weight.t() if is_transposed(linears[name]) else weight
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


def _shape(linear: nn.Module) -> str:
    return "{} -> {}".format(*sizes(linear))


def _shapes(linears: Mapping[str, nn.Module]) -> str:
    return ", ".join(f"{name or 'itself'}: {_shape(linear)}" for name, linear in linears.items())


def _listed(names: Mapping[str, nn.Module] | Sequence[str], most: int = 6) -> str:
    shown = [name or "itself" for name in list(names)[:most]]
    if len(names) > most:
        shown.append(f"{len(names) - most} more")
    return f": {', '.join(shown)}" if shown else ""
