from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from wemoe_fast import reference
from wemoe_fast.activations import ACTIVATIONS
from wemoe_fast.normalization import Normalization


def test_merge_weights_by_hand():
    stack = torch.tensor([[[1.0, 2.0]], [[10.0, 0.0]], [[0.0, 100.0]]])
    assert torch.equal(reference.merge_weights(stack, torch.tensor([0.5, -0.25])), torch.tensor([[6.0, -23.0]]))


def test_merged_linear_by_hand():
    x = torch.tensor([[[1.0, 1.0], [2.0, 0.0]], [[1.0, 1.0], [2.0, 0.0]]])
    stack = torch.tensor([[[1.0, 2.0]], [[10.0, -40.0]]])
    bias = torch.tensor([[3.0], [1.0]])
    weights = torch.tensor([[0.0], [1.0]])
    y = reference.merged_linear(x, stack, weights, bias)
    assert torch.equal(y, torch.tensor([[[6.0], [5.0]], [[11.0 - 38.0 + 4.0], [26.0]]]))
    assert torch.equal(reference.merged_linear(x, stack, weights, bias, "relu"), y.relu())
    assert torch.equal(reference.merged_linear(x, stack, weights), y - torch.tensor([[[3.0]], [[4.0]]]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_merged_linear_is_one_einsum(dtype):
    x, stack, weights = torch.randn(3, 5, 7), torch.randn(4, 6, 7) * 0.4, torch.randn(3, 3) * 0.3
    bias = torch.randn(4, 6)
    x, stack, weights, bias = (t.to(dtype) for t in (x, stack, weights, bias))
    y = reference.merged_linear(x, stack, weights, bias, "gelu")
    coefficient = F.pad(weights, (1, 0), value=1.0).double()
    exact = torch.einsum("bnd,bt,thd->bnh", x.double(), coefficient, stack.double())
    exact = F.gelu(exact + (coefficient @ bias.double()).unsqueeze(1))
    assert y.dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 3e-2)
    torch.testing.assert_close(y.double(), exact, atol=tolerance, rtol=tolerance)


def test_merged_linear_shared_weights_and_empty_batch():
    x, stack, weights = torch.randn(3, 5, 7), torch.randn(4, 6, 7), torch.randn(1, 3)
    for activation in ACTIVATIONS:
        shared = reference.merged_linear(x, stack, weights, None, activation)
        assert torch.equal(shared, reference.merged_linear(x, stack, weights.expand(3, -1), None, activation))
    assert reference.merged_linear(x[:0], stack, weights[:0]).shape == (0, 5, 6)


def test_router_of_every_depth_by_hand():
    h = torch.tensor([[1.0, -1.0]])
    output = {"output_bias": torch.tensor([0.3, 0.4])}
    assert torch.equal(reference.router_logits(h, output), torch.tensor([[0.3, 0.4]]))
    output["output_weight"] = torch.tensor([[1.0, 0.0], [2.0, 5.0]])
    assert torch.equal(reference.router_logits(h, output), torch.tensor([[1.3, 0.4 - 3.0]]))
    hidden = {"hidden_weight": torch.eye(2), "hidden_bias": torch.tensor([1.0, 0.0])}
    assert torch.equal(reference.router_logits(h, output | hidden), torch.tensor([[2.3, 4.4]]))


def test_route_is_the_normalised_mean_over_tokens_that_count():
    hidden = torch.tensor([[[1.0, 0.0], [3.0, 2.0], [100.0, float("nan")]]])
    parameters = {"output_bias": torch.zeros(2), "output_weight": torch.eye(2)}
    mask = torch.tensor([[1, 1, 0]])
    assert torch.equal(reference.route(hidden, parameters, token_mask=mask), torch.tensor([[2.0, 1.0]]))
    softmax = reference.route(hidden, parameters, Normalization("softmax"), mask)
    assert torch.equal(softmax, torch.tensor([[2.0, 1.0]]).softmax(-1))
    assert torch.equal(reference.route(hidden[:, :0], parameters), torch.zeros(1, 2))
    assert reference.route(hidden[:0], parameters).shape == (0, 2)
