import pytest
import torch

from wemoe_fast import ops, reference
from wemoe_fast.sequences import Budget, SequenceMLP
from wemoe_fast.task_vectors import MergedLinear

D, H, T = 6, 10, 3


def linears(gated=False, bias=True, dtype=torch.float64):
    def linear(rows, columns):
        return MergedLinear(
            torch.randn(1 + T, rows, columns, dtype=dtype), torch.randn(1 + T, rows, dtype=dtype) if bias else None
        )

    return {"up": linear(H, D), "down": linear(D, H)} | ({"gate": linear(H, D)} if gated else {})


def looped(parts, weights, x):
    def linear(role, h, activation=None):
        return reference.merged_linear(h, parts[role].stack, weights, parts[role].bias, activation)

    if "gate" in parts:
        return linear("down", linear("gate", x, "silu") * linear("up", x))
    return linear("down", linear("up", x, "silu"))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("N", [1, 5])
def test_every_sequence_has_its_merged_weights(gated, bias, rows, N):
    parts, weights, x = linears(gated, bias), torch.randn(rows, T).double(), torch.randn(4, N, D).double()
    before = {role: part.stack.clone() for role, part in parts.items()}
    torch.testing.assert_close(SequenceMLP(parts, "silu", weights, x.dtype)(x), looped(parts, weights, x))
    assert all(torch.equal(part.stack, before[role]) for role, part in parts.items())


def test_sums_are_not_rounded_to_sixteen_bits():
    parts, weights, x = linears(bias=False, dtype=torch.bfloat16), torch.rand(2, T), torch.randn(2, 1, D)
    x = x.bfloat16()
    merged = SequenceMLP(parts, "silu", weights, torch.bfloat16)
    for b in range(2):
        exact = reference.merge_weights(parts["up"].stack.double(), weights[b].double())
        assert torch.equal(merged.stacks["up"][b], exact.bfloat16())
    assert merged(x).dtype == torch.bfloat16
    torch.testing.assert_close(merged(x), ops.merged_linear(
        ops.merged_linear(x, parts["up"].stack, weights, None, "silu"), parts["down"].stack, weights
    ), atol=0.5, rtol=0.05)  # fmt: skip


def test_many_sequences_and_large_ones_do_without():
    parts, x = linears(), torch.randn(2, 1, D).double()
    numbers = 2 * D * H
    budget = Budget(5 * numbers * 8)
    first = SequenceMLP.build(parts, "silu", torch.ones(2, T), x, budget)
    assert sum(stack.numel() for stack in first.stacks.values()) == 2 * numbers
    assert budget.left == 3 * numbers * 8
    assert SequenceMLP.build(parts, "silu", torch.ones(4, T), x, budget) is None
    assert SequenceMLP.build(parts, "silu", torch.ones(3, T), x, budget) is not None
    assert budget.left == 0
    assert SequenceMLP.build(parts, "silu", torch.ones(1, T), x, budget) is None
    assert SequenceMLP.build(parts, "silu", torch.ones(9, T), x, Budget(1 << 30)) is None
    assert SequenceMLP.build(parts, "silu", torch.ones(8, T), x, Budget(1 << 30)) is not None
