import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from wemoe_fast.activations import ACTIVATIONS, lookup
from wemoe_fast.errors import InputError
from wemoe_fast.structure import parse_mlp, parse_split_mlp


class FFN(nn.Module):
    """Two or three linears, registered in any order, under names that say nothing."""

    def __init__(self, act, d=6, h=10, out=None, gated=False, bias=True, order="udg", p=0.0):
        super().__init__()
        out = d if out is None else out
        shapes = {"u": (d, h), "d": (h, out), "g": (d, h)}
        self.roles = {role: f"linear_{i}" for i, role in enumerate(order)}
        for role, name in self.roles.items():
            if role != "g" or gated:
                self.add_module(name, nn.Linear(*shapes[role], bias=bias))
        self.act, self.gated, self.dropout = act, gated, nn.Dropout(p)

    def role(self, role):
        return getattr(self, self.roles[role])

    def forward(self, x):
        hidden = self.act(self.role("g")(x)) * self.role("u")(x) if self.gated else self.act(self.role("u")(x))
        return self.dropout(self.role("d")(self.dropout(hidden)))


def recompute(parts, x):
    act = lookup(parts.activation)
    hidden = act(parts.up(x)) if parts.gate is None else act(parts.gate(x)) * parts.up(x)
    return parts.down(hidden)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("d", "h"), [(6, 10), (10, 6), (8, 8), (1, 1), (2, 1), (64, 200)])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_is_found_whatever_the_sizes(name, d, h, gated):
    module = FFN(ACTIVATIONS[name], d, h, gated=gated)
    parts = parse_mlp(module)
    assert parts.activation == name
    assert (parts.in_features, parts.hidden_features, parts.out_features) == (d, h, d)
    x = torch.randn(2, 5, d)
    torch.testing.assert_close(recompute(parts, x), module(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_is_found_whatever_the_dtype(name, dtype):
    assert parse_mlp(FFN(ACTIVATIONS[name], 16, 32).to(dtype)).activation == name


@pytest.mark.parametrize("order", ["udg", "ugd", "dug", "dgu", "gud", "gdu"])
@pytest.mark.parametrize("h", [6, 10])
def test_roles_are_found_in_any_order_of_registration(order, h):
    module = FFN(F.silu, h=h, gated=True, order=order)
    parts = parse_mlp(module)
    assert parts.linears() == {"up": module.role("u"), "down": module.role("d"), "gate": module.role("g")}
    plain = FFN(F.silu, h=h, order=order)
    parts = parse_mlp(plain)
    assert parts.linears() == {"up": plain.role("u"), "down": plain.role("d")}


def test_without_bias_and_with_another_output_size():
    parts = parse_mlp(FFN(F.relu, 6, 10, out=3, bias=False))
    assert (parts.in_features, parts.hidden_features, parts.out_features) == (6, 10, 3)
    assert parts.up.bias is None


def test_one_bias_only():
    module = FFN(F.relu)
    module.role("d").bias = None
    x = torch.randn(2, 5, 6)
    torch.testing.assert_close(recompute(parse_mlp(module), x), module(x))


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))), "gelu_tanh"),
        (lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))), "gelu"),
        (lambda x: x * torch.sigmoid(x), "silu"),
        (lambda x: x.clamp(min=0), "relu"),
    ],
)
def test_activation_is_recognised_by_its_values(function, name):
    assert parse_mlp(FFN(function)).activation == name


def test_tiny_and_zero_weights_do_not_hide_the_activation():
    for factor in (0.0, 1e-12, 1e12):
        module = FFN(lookup("gelu_tanh"), gated=True)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(factor)
        parts = parse_mlp(module)
        assert parts.activation == "gelu_tanh"
        assert parts.gate is module.role("g")


def test_buffers_are_allowed():
    class Masked(FFN):
        def __init__(self):
            super().__init__(F.gelu)
            self.register_buffer("ones", torch.ones(10))

        def forward(self, x):
            return self.role("d")(self.ones * F.gelu(self.role("u")(x)))

    assert parse_mlp(Masked()).activation == "gelu"
    assert parse_mlp(Masked().double()).activation == "gelu"


def test_sequential_and_subclasses_of_linear():
    class Own(nn.Linear):
        pass

    module = nn.Sequential(Own(4, 8), nn.GELU(), nn.Dropout(0.5), nn.Linear(8, 4))
    parts = parse_mlp(module)
    assert parts.linears() == {"up": module[0], "down": module[3]}
    assert parts.activation == "gelu"


def test_linear_with_a_forward_of_its_own_is_refused():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(InputError, match="another function"):
        parse_mlp(nn.Sequential(Scaled(4, 8), nn.GELU(), nn.Linear(8, 4)))


@pytest.mark.parametrize("gated", [False, True])
def test_module_and_random_state_are_left_as_they_were(gated):
    class Careless(FFN):
        def forward(self, x):
            F.dropout(torch.ones(3))  # draws from the global generator even in eval mode
            return super().forward(x)

    module = Careless(F.gelu, gated=gated, p=0.5).train()
    module.role("u").eval()
    module.role("d").weight.requires_grad_(False)
    before = copy.deepcopy(module.state_dict())
    ids = {name: id(parameter) for name, parameter in module.named_parameters()}
    flags = {name: child.training for name, child in module.named_modules()}
    grads = [parameter.requires_grad for parameter in module.parameters()]
    state = torch.get_rng_state()
    assert parse_mlp(module).activation == "gelu"
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: child.training for name, child in module.named_modules()} == flags
    assert {name: id(parameter) for name, parameter in module.named_parameters()} == ids
    assert [parameter.requires_grad for parameter in module.parameters()] == grads
    assert all(parameter.grad is None for parameter in module.parameters())
    assert list(module.state_dict()) == list(before)
    assert all(torch.equal(a, b) for a, b in zip(module.state_dict().values(), before.values(), strict=True))


def test_module_is_restored_when_it_fails():
    class Failing(FFN):
        def forward(self, x):
            raise RuntimeError("no luck")

    module = Failing(F.relu).train()
    weight = module.role("u").weight
    with pytest.raises(InputError, match=r"running it on \[1, 10, 6\] failed: RuntimeError: no luck"):
        parse_mlp(module)
    assert module.training
    assert module.role("u").training
    assert module.role("u").weight is weight


def test_autocast_around_does_not_matter():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert parse_mlp(FFN(lookup("gelu_tanh"))).activation == "gelu_tanh"


def test_deterministic():
    module = nn.Sequential(nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 4))
    messages = set()
    for _ in range(2):
        with pytest.raises(InputError) as caught:
            parse_mlp(module)
        messages.add(str(caught.value))
    assert len(messages) == 1


@pytest.mark.parametrize(
    "function",
    [
        F.elu,
        F.relu6,
        F.hardswish,
        F.selu,
        torch.sigmoid,
        lambda x: F.leaky_relu(x, 0.01),
        lambda x: F.relu(x) ** 2,
        lambda x: F.gelu(x).clamp(-10, 10),
        lambda x: F.layer_norm(F.gelu(x), x.shape[-1:]),
        lambda x: 1.001 * F.gelu(x),
    ],
)
def test_other_functions_are_refused(function):
    with pytest.raises(InputError, match="another function") as caught:
        parse_mlp(FFN(function))
    message = str(caught.value)
    assert "linear_0: 6 -> 10, linear_1: 10 -> 6" in message
    assert "relative error" in message
    assert ", ".join(ACTIVATIONS) in message


def test_residual_inside_is_refused():
    class Residual(FFN):
        def forward(self, x):
            return x + super().forward(x)

    with pytest.raises(InputError, match="another function"):
        parse_mlp(Residual(F.gelu))


def test_three_layers_are_not_a_gated_mlp():
    same = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    with pytest.raises(InputError, match="another function"):
        parse_mlp(same)
    other = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    with pytest.raises(InputError, match=r"expected linears that chain .*gate.*found 0: 4 -> 8, 2: 8 -> 8, 4: 8 -> 4"):
        parse_mlp(other)


def test_linears_that_do_not_chain():
    with pytest.raises(InputError, match=r"expected linears that chain.*found 0: 4 -> 8, 1: 9 -> 5"):
        parse_mlp(nn.Sequential(nn.Linear(4, 8), nn.Linear(9, 5)))


def test_output_that_is_no_tensor_or_has_another_shape():
    class Pair(FFN):
        def forward(self, x):
            return super().forward(x), None

    class Pooled(FFN):
        def forward(self, x):
            return super().forward(x).mean(1)

    with pytest.raises(InputError, match="expected a tensor as output; found tuple"):
        parse_mlp(Pair(F.relu))
    with pytest.raises(InputError, match=r"expected an output \[1, 10, 6\]; found \[1, 6\]"):
        parse_mlp(Pooled(F.relu))


def test_all_structural_problems_at_once():
    module = nn.Sequential(nn.Linear(4, 4), nn.PReLU(), nn.LayerNorm(4))
    with pytest.raises(InputError) as caught:
        parse_mlp(module)
    message = str(caught.value)
    assert "2 problems" in message
    assert "expected 2 or 3 nn.Linear; found 1: 0" in message
    assert "expected no parameters but those of linears; found 1.weight, 2.weight, 2.bias" in message


def test_parametric_activation_is_refused():
    with pytest.raises(InputError, match=r"no parameters but those of linears; found 1\.weight"):
        parse_mlp(nn.Sequential(nn.Linear(4, 8), nn.PReLU(), nn.Linear(8, 4)))


def test_parametrised_linear_is_refused():
    module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    nn.utils.parametrizations.weight_norm(module[0])
    with pytest.raises(InputError, match="parametrizations"):
        parse_mlp(module)


def test_shared_linear_and_tied_weight_are_refused():
    linear = nn.Linear(4, 4)
    with pytest.raises(InputError, match=r"2\.weight: expected a parameter of its own; it is shared with 0\.weight"):
        parse_mlp(nn.Sequential(linear, nn.ReLU(), linear))
    tied = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    tied[2].weight = tied[0].weight
    with pytest.raises(InputError, match=r"2\.weight: expected a parameter of its own"):
        parse_mlp(tied)


def test_other_dtypes_are_refused():
    module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    module[2].weight = nn.Parameter(torch.zeros(4, 8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(InputError, match=r"2\.weight: expected dtype float64, .*bfloat16; found torch\.int8"):
        parse_mlp(module)


def test_mixed_dtypes_are_refused():
    module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    module[2].bfloat16()
    with pytest.raises(InputError, match=r"of one dtype; found 0\.weight float32.*2\.bias bfloat16"):
        parse_mlp(module)


def test_lazy_linear_is_refused():
    with pytest.raises(InputError, match=r"0\.weight: expected a shape; found a lazy parameter"):
        parse_mlp(nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 4)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_values_that_are_not_finite_are_named_and_counted(dtype):
    module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)).to(dtype)
    with torch.no_grad():
        module[0].weight[1, 2] = torch.nan
        module[2].bias[:3] = -torch.inf
    with pytest.raises(InputError) as caught:
        parse_mlp(module)
    message = str(caught.value)
    assert "0.weight: expected finite values; 1 of 32 are NaN or infinite" in message
    assert "2.bias: expected finite values; 3 of 4 are NaN or infinite" in message


def test_meta_device_is_refused():
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    with pytest.raises(InputError, match=r"0\.weight: expected values; found none \(meta device\)"):
        parse_mlp(module)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_split(name):
    class Activation(nn.Module):
        def forward(self, x):
            return ACTIVATIONS[name](x)

    site, down = nn.Sequential(nn.Linear(4, 8), Activation()), nn.Linear(8, 4)
    parts = parse_split_mlp(site, down)
    assert parts.activation == name
    assert parts.linears() == {"up": site[0], "down": down}
    x = torch.randn(2, 5, 4)
    torch.testing.assert_close(recompute(parts, x), down(site(x)))


def test_split_is_verified_too():
    down = nn.Linear(8, 4)
    up = nn.Linear(4, 8)
    with pytest.raises(InputError, match="another function"):
        parse_split_mlp(nn.Sequential(up, nn.Sigmoid()), down)
    with pytest.raises(InputError, match=r"expected 1 nn\.Linear; found 2: 0, 1"):
        parse_split_mlp(nn.Sequential(up, down), down)
    with pytest.raises(InputError, match="found 4 -> 8 and 4 -> 4"):
        parse_split_mlp(nn.Sequential(up, nn.ReLU()), nn.Linear(4, 4))
    square = nn.Linear(4, 4)
    with pytest.raises(InputError, match="one in both roles"):
        parse_split_mlp(nn.Sequential(square, nn.ReLU()), square)
    with pytest.raises(InputError, match=r"found 1\.weight, 1\.bias"):
        parse_split_mlp(nn.Sequential(up, nn.LayerNorm(8)), down)


def test_split_values_and_dtypes_are_checked_over_both_modules():
    site, down = nn.Sequential(nn.Linear(4, 8), nn.ReLU()), nn.Linear(8, 4, dtype=torch.float64)
    with torch.no_grad():
        down.bias[0] = torch.nan
    with pytest.raises(InputError) as caught:
        parse_split_mlp(site, down)
    assert "one dtype; found up.weight float32" in str(caught.value)
    assert "down.bias: expected finite values; 1 of 4" in str(caught.value)
