from __future__ import annotations

import pytest
import torch
from conftest import relative_rms
from torch import nn

from wemoe_fast import reference
from wemoe_fast.errors import InputError
from wemoe_fast.task_vectors import MergedLinear, check_experts, task_vectors


def test_base_first_then_differences():
    base, experts = torch.randn(6, 5), [torch.randn(6, 5) for _ in range(3)]
    stack = task_vectors(base, experts)
    assert stack.shape == (4, 6, 5)
    assert torch.equal(stack[0], base)
    for tau, expert in zip(stack[1:], experts, strict=True):
        assert torch.equal(tau, expert - base)


def test_differences_of_16_bit_weights_are_rounded_once():
    base = torch.randn(500).bfloat16()
    expert = (base.float() * (1 + 0.01 * torch.randn(500))).bfloat16()
    stack = task_vectors(base, [expert])
    assert stack.dtype == torch.bfloat16
    assert torch.equal(stack[1], (expert.double() - base.double()).bfloat16())
    half = torch.tensor([60000.0]).half()
    assert task_vectors(half, [half])[1] == 0


def test_float64_stays_float64():
    base = torch.randn(5, dtype=torch.float64)
    assert torch.equal(task_vectors(base, [base + 1e-12])[1], (base + 1e-12) - base)


def test_nothing_given_is_referenced_or_tracked():
    base, expert = nn.Linear(5, 6), nn.Linear(5, 6)
    merged = MergedLinear.from_linears(base, [expert])
    assert not any(p.requires_grad for p in merged.parameters())
    before = merged.stack.clone()
    with torch.no_grad():
        base.weight.zero_()
        expert.weight.zero_()
    assert torch.equal(merged.stack, before)


@pytest.mark.parametrize("bias", [True, False])
def test_merged_linear_module(bias):
    base = nn.Linear(5, 6, bias=bias).double()
    experts = [nn.Linear(5, 6, bias=bias).double() for _ in range(3)]
    merged = MergedLinear.from_linears(base, experts)
    x, weights = torch.randn(4, 7, 5, dtype=torch.float64), torch.randn(4, 3)
    weight = (
        base.weight
        + torch.einsum("bt,thd->bhd", weights.double(), torch.stack([e.weight for e in experts]))
        - (weights.double().sum(1)[:, None, None] * base.weight)
    )
    expected = x @ weight.mT
    if bias:
        shift = weights.double() @ torch.stack([e.bias - base.bias for e in experts])
        expected = expected + (base.bias + shift).unsqueeze(1)
    for strategy in ("auto", "chunked", "factored", "reference"):
        assert relative_rms(merged(x, weights, "tanh", strategy), expected.tanh()) <= 1e-12
    assert repr(merged) == f"MergedLinear(in_features=5, out_features=6, bias={bias}, experts=3)"
    assert relative_rms(merged(x, weights), reference.merged_linear(x, merged.stack, weights, merged.bias)) <= 1e-12


def test_empty_is_filled_by_a_state_dict():
    full = MergedLinear.from_linears(nn.Linear(5, 6), [nn.Linear(5, 6)])
    empty = MergedLinear.empty(1, 6, 5, True)
    empty.load_state_dict(full.state_dict())
    assert torch.equal(empty.stack, full.stack)
    assert torch.equal(empty.bias, full.bias)
    assert MergedLinear.empty(1, 6, 5, False).bias is None


def test_experts_that_fit_pass():
    base = {"w": torch.ones(2, 3), "ids": torch.arange(3)}
    check_experts(base, {"a": base, "b": {"w": torch.zeros(2, 3), "ids": torch.zeros(3, dtype=torch.long)}}, "here")


def test_experts_of_another_floating_dtype_pass_and_are_subtracted_in_float32():
    base, expert = torch.ones(3).bfloat16(), 1 + torch.tensor([2.0**-12, 0.25, -1.0])
    check_experts({"w": base}, {"a": {"w": expert}}, "here")
    assert torch.equal(task_vectors(base, [expert])[1], torch.tensor([2.0**-12, 0.25, -1.0]).bfloat16())
    assert torch.equal(task_vectors(base.float(), [base])[1], torch.zeros(3))


def test_every_problem_of_every_expert_at_once():
    base = {"w": torch.tensor([1.0, float("inf")]), "v": torch.ones(2, 3), "u": torch.ones(4), "m": torch.ones(1)}
    experts = {
        "a": {"w": torch.ones(2), "v": torch.ones(3, 2), "u": torch.ones(4).char(), "m": torch.ones(1)},
        "b": {"w": torch.ones(2), "v": torch.full((2, 3), float("nan")), "extra": torch.ones(1), "m": torch.ones(1)},
        "c": {**base, "w": torch.ones(2), "m": torch.ones(1, device="meta")},
    }
    with pytest.raises(InputError) as caught:
        check_experts(base, experts, "layer 3")
    message = str(caught.value)
    assert "layer 3: 7 problems" in message
    for line in (
        "base: w: expected finite numbers, found 1 NaN or infinite",
        "expert 'a': v: expected shape (2, 3) as in the base, found (3, 2)",
        "expert 'a': u: expected a dtype like torch.float32 of the base, found torch.int8 (quantised?)",
        "expert 'b': u is missing",
        "expert 'b': extra is not in the base",
        "expert 'b': v: expected finite numbers, found 6 NaN or infinite",
        "expert 'c': m: expected device cpu, found meta",
    ):
        assert line in message


def test_no_experts():
    with pytest.raises(InputError, match="layer 3: expected at least one expert, found none"):
        check_experts({"w": torch.ones(2)}, {}, "layer 3")
