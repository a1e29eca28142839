import pytest
import torch
from torch import nn

from wemoe_fast.activations import ACTIVATIONS, lookup
from wemoe_fast.errors import InputError

TORCH = {
    "none": nn.Identity(),
    "relu": nn.ReLU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "silu": nn.SiLU(),
    "tanh": nn.Tanh(),
    "mish": nn.Mish(),
}


@pytest.mark.parametrize("name", TORCH)
def test_same_as_the_module_of_torch(name):
    x = torch.linspace(-6, 6, 101)
    assert torch.equal(lookup(name)(x), TORCH[name](x))


def test_quick_gelu():
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)
    torch.testing.assert_close(lookup("quick_gelu")(x), x / (1 + torch.exp(-1.702 * x)))


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_dtype_and_shape_are_kept(name, dtype):
    y = lookup(name)(torch.ones(2, 3, dtype=dtype))
    assert y.dtype == dtype
    assert y.shape == (2, 3)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gradcheck(name):
    x = torch.tensor([-2.5, -0.3, 0.2, 1.7], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lookup(name), x)


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(InputError, match=r"expected one of none, relu, gelu, .*mish; found 'swish'"):
        lookup("swish")
