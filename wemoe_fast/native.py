"""The strategy ``native``: the CPU kernels behind the same interface as the other strategies.

As in ``chunked`` the weights of a sample exist a tile at a time, but a tile stays in the cache of the core that made
it, and 16-bit numbers are widened there. A token's products depend neither on the batch nor on the other tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import chunked
from .activations import lookup
from .kernels import native as kernel
from .plan import WORKSPACE_BYTES, Plan, choose
from .slabs import Gradients, Linear, blocks, coefficients, finish, spans

SHARE = WORKSPACE_BYTES // 5
"""What each of these may take: packed tokens, sums, and what lies between the linears of an MLP."""
WIDTH = 768
"""Columns computed at once, and numbers of a token packed at once, where not all of them leave room for all tokens."""
STEP = 256
"""What pieces of columns and of numbers are a multiple of."""
ACTIVATED_BYTES = WORKSPACE_BYTES // 16
"""What is activated at once: it may need three temporaries as large."""


def forward(
    x: Tensor, stack: Tensor, routing_weights: Tensor, bias: Tensor | None, activation: str, plan: Plan
) -> Tensor:
    """act(x_b W_b^T + c_b): x [B, N, d], routing_weights [B, T] or [1, T] -> [B, N, h] in the dtype of x."""
    stack, h = _side_by_side(stack), stack.shape[1]
    y = x.new_empty(*x.shape[:2], h)
    for here, tokens in _blocks(x, routing_weights, plan, min(h, WIDTH)):
        for columns in tokens.columns(h):
            tokens.linear((stack, bias), columns, activation).store(y[here][:, :, columns])
    return y


def mlp(
    x: Tensor, up: Linear, gate: Linear | None, down: Linear, routing_weights: Tensor, activation: str, plan: Plan
) -> Tensor:
    """down(act(up(x))), with a gate down(act(gate(x)) * up(x)): x [B, N, d] -> [B, N, d'] in the dtype of x.

    Of the hidden states between the linears some columns exist at a time, in the dtype that is computed with: they are
    multiplied with their part of ``down`` at once.
    """
    up, gate = (_side_by_side(up[0]), up[1]), gate and (_side_by_side(gate[0]), gate[1])
    stack, bias, h, J = _side_by_side(down[0]), down[1], up[0].shape[1], down[0].shape[1]
    y = x.new_empty(*x.shape[:2], J)
    for here, tokens in _blocks(x, routing_weights, plan, max(J, min(h, WIDTH))):
        sums = tokens.sums(slice(0, J), "sums of the MLP")
        for columns in tokens.columns(h):
            hidden = tokens.linear(up if gate is None else gate, columns, activation)
            if gate is not None:
                hidden.numbers.mul_(tokens.linear(up, columns, role="sums beside the gate").numbers)
            sums.add(tokens.packed(hidden), stack[:, :, columns], tokens.wide(bias))
        sums.store(y[here])
    return y


def token_sums(x: Tensor, token_mask: Tensor | None, weight: Tensor, bias: Tensor, plan: Plan) -> Tensor:
    """The router's hidden layer: sums over (unmasked) tokens of relu(x weight^T + bias).

    x [B, N, d], token_mask [B, N], weight [m, d], bias [m] -> [B, m] in the dtype that is computed with.
    """
    (B, N, d), m = x.shape, weight.shape[0]
    linear, one = (_side_by_side(weight).unsqueeze(0), bias.unsqueeze(0)), bias.new_ones(1, 1, dtype=plan.compute_dtype)
    found = one.new_zeros(B, m)
    for samples, some in blocks(B, N, max(1, SHARE // one.element_size() // max(min(m, WIDTH), min(d, WIDTH)))):
        here = x[samples, some]
        tokens = _Tokens(here.reshape(1, -1, d), one, plan.workers)
        keep = None if token_mask is None else token_mask[samples, some]
        for columns in tokens.columns(m):
            found[samples, columns] += tokens.linear(linear, columns, "relu").of_samples(here.shape[0], keep)
    return found


def backward(
    dy: Tensor,
    x: Tensor,
    stack: Tensor,
    routing_weights: Tensor,
    bias: Tensor | None,
    needs: tuple[bool, bool, bool, bool],
    plan: Plan,
) -> Gradients:
    """Gradients (x, stack, routing_weights, bias) of ``forward`` without activation, None where not needed.

    The gradient of the stack, frozen where WEMoE is used as published, is left to ``chunked``.
    """
    need_x, need_stack, need_weights, need_bias = needs
    B, _, d = x.shape
    h = stack.shape[1]
    stack, coefficient = stack.contiguous(), coefficients(routing_weights, B, plan.compute_dtype).contiguous()
    dx = d_coefficient = d_stack = None
    if need_x:
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        for here, tokens in _blocks(dy, routing_weights, plan, min(d, WIDTH), lies=True):
            for columns in tokens.columns(d):
                tokens.linear((stack, None), columns).store(dx[here][:, :, columns])
    if need_weights:
        sums = kernel.merged_product_dw(
            _side_by_side(dy), _side_by_side(x), stack, plan.compute_dtype, slice(0, h), most=plan.rows,
            threads=plan.workers,
        )  # fmt: skip
        d_coefficient = sums.to(coefficient.dtype)
    if need_stack:
        slabs = choose(x, stack, routing_weights, "chunked", backward=True)
        d_stack = chunked.backward(dy, x, stack, routing_weights, None, (False, True, False, False), slabs)[1]
    return finish(dy, stack, routing_weights, bias, coefficient, need_bias, dx, d_stack, d_coefficient)


class _Tokens:
    """Tokens x [B, N, K] of some samples with their coefficients [B, 1+T], to be multiplied with stacks."""

    def __init__(self, x: Tensor, coefficient: Tensor, threads: int, lies: bool = False) -> None:
        self._x, self._coefficient, self._lies = _side_by_side(x), coefficient, lies
        self._threads = threads
        room = SHARE // coefficient.element_size() // (x.shape[0] * x.shape[1])
        self._most = max(1, room // STEP) * STEP
        self._whole: kernel.Packed | None = None

    def columns(self, h: int) -> Iterator[slice]:
        """Parts of h columns for which there is room, equal but for what they are a multiple of."""
        return spans(h, -(-kernel.even(h, self._most) // STEP) * STEP)

    def linear(self, linear: Linear, columns: slice, activation: str = "none", role: str = "sums") -> kernel.Sums:
        """act(x_b W_b^T + c_b), x_b W_b + c_b where the stack ``lies``, for some columns."""
        stack, bias = linear[0], self.wide(linear[1])
        sums, K = self.sums(columns, role), self._x.shape[2]
        inside = kernel.activates(activation, self._coefficient.dtype)
        for part in spans(K, self._most):
            then = activation if inside and part.stop == K else "none"
            sums.add(self._part(part), stack[:, part] if self._lies else stack[:, :, part], bias, then)
        if not inside:
            act = lookup(activation)
            for numbers in sums.numbers.split(max(1, ACTIVATED_BYTES // sums.numbers.element_size())):
                numbers.copy_(act(numbers))
        return sums

    def sums(self, columns: slice, role: str) -> kernel.Sums:
        return kernel.Sums(self._coefficient, self._x.shape[1], columns, threads=self._threads, role=role)

    def packed(self, x: Tensor | kernel.Sums, role: str = "packed sums") -> kernel.Packed:
        """Tokens of these samples for products."""
        dtype, experts = self._coefficient.dtype, self._coefficient.shape[1]
        return kernel.Packed(x, dtype, experts, lies=self._lies, threads=self._threads, role=role)

    def wide(self, bias: Tensor | None) -> Tensor | None:
        """The bias as it is computed with."""
        return None if bias is None else bias.to(self._coefficient.dtype).contiguous()

    def _part(self, part: slice) -> kernel.Packed:
        """Some numbers of the tokens; packed once where there is room for all of them."""
        packed = self._whole or self.packed(self._x[:, :, part], "packed")
        if self._most >= self._x.shape[2]:
            self._whole = packed
        return packed


def _blocks(
    x: Tensor, routing_weights: Tensor, plan: Plan, J: int, lies: bool = False
) -> Iterator[tuple[tuple[slice, slice], _Tokens]]:
    """(samples, tokens) of x [B, N, K] and what is there, as many at once as leave room for sums of J columns."""
    B, N, K = x.shape
    coefficient = coefficients(routing_weights, B, plan.compute_dtype).contiguous()
    most = max(1, SHARE // coefficient.element_size() // max(J, min(K, WIDTH)))
    for samples in spans(B, kernel.even(B, most // N)):
        for tokens in spans(N, kernel.even(N, most)):
            yield (samples, tokens), _Tokens(x[samples, tokens], coefficient[samples], plan.workers, lies)


def _side_by_side(x: Tensor) -> Tensor:
    """x [..., n] with the numbers of its last dimension next to each other."""
    return x if x.stride(-1) == 1 else x.contiguous()
