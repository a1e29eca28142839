import pytest
import torch
from torch import nn

from wemoe_fast.linears import bias_of, is_linear, is_transposed, sizes, weight_of
from wemoe_fast.structure import parse_mlp


class Conv1D(nn.Module):
    """As in transformers, where it is named so."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


def test_a_transposed_linear_is_a_linear_over_its_own_memory():
    layer, x = Conv1D(5, 3), torch.randn(2, 3)
    assert is_linear(layer)
    assert is_transposed(layer)
    assert sizes(layer) == (3, 5)
    assert weight_of(layer).data_ptr() == layer.weight.data_ptr()
    torch.testing.assert_close(nn.functional.linear(x, weight_of(layer), bias_of(layer)), layer(x))


def test_an_ordinary_linear_is_itself():
    layer = nn.Linear(3, 5, bias=False)
    assert is_linear(layer)
    assert not is_transposed(layer)
    assert sizes(layer) == (3, 5)
    assert weight_of(layer) is layer.weight
    assert bias_of(layer) is None


def test_transformers_own_is_one():
    utils = pytest.importorskip("transformers.pytorch_utils")
    assert is_transposed(utils.Conv1D(5, 3))


@pytest.mark.parametrize("layer", [nn.Conv1d(3, 5, 1), nn.LayerNorm(3), nn.Embedding(3, 5), nn.Bilinear(3, 3, 5)])
def test_other_layers_are_none(layer):
    assert not is_linear(layer)


@pytest.mark.parametrize("change", ["another size", "a third parameter", "a child"])
def test_what_has_more_or_other_shapes_is_none(change):
    layer = Conv1D(5, 3)
    if change == "another size":
        layer.nf = 3
    elif change == "a third parameter":
        layer.scale = nn.Parameter(torch.ones(5))
    else:
        layer.child = nn.Linear(1, 1)
    assert not is_linear(layer)


def test_square_weights_are_not_mistaken_for_their_transpose():
    class MLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = Conv1D(6, 6), Conv1D(6, 6)

        def forward(self, x):
            return self.two(torch.relu(self.one(x)))

    module, x = MLP(), torch.randn(1, 4, 6)
    parts = parse_mlp(module)
    assert (parts.up, parts.down, parts.activation) == (module.one, module.two, "relu")
    torch.testing.assert_close(parts.down(torch.relu(parts.up(x))), module(x))
