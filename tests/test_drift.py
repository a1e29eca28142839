from __future__ import annotations

import torch
from test_adapt import D, build
from torch import nn

from wemoe_fast.drift import DriftPenalty
from wemoe_fast.upscale import wemoe_layers


def moved(by: float, **options: object) -> tuple[nn.Module, DriftPenalty]:
    """A model whose routing weights, of any sample, are this far from those at the start."""
    model = build(**options)
    penalty = DriftPenalty(wemoe_layers(model))
    for layer in wemoe_layers(model).values():
        layer.router.output.bias.data += by
    return model, penalty


def test_it_is_the_mean_over_samples_layers_and_experts_of_what_was_seen_since_the_last_call() -> None:
    model, penalty = moved(0.5)
    first = next(iter(wemoe_layers(model).values()))
    first.router.output.bias.data[0] += 0.5  # 1.0, 0.5 and 0.5, 0.5
    with penalty.watch():
        model(torch.randn(3, 5, D))
        model(torch.randn(2, 5, D))
        torch.testing.assert_close(penalty.take(), torch.tensor((1 + 3 * 0.25) / 4))
        model(torch.randn(1, 5, D))
        torch.testing.assert_close(penalty.take(), torch.tensor((1 + 3 * 0.25) / 4))
    assert not any(layer.router._forward_hooks for layer in wemoe_layers(model).values())


def test_gradients_reach_the_routers_and_not_the_copies() -> None:
    model, penalty = moved(0.5)
    with penalty.watch():
        model(torch.randn(3, 5, D))
        penalty.take().backward()
    first, last = (layer.router.output.bias.grad for layer in wemoe_layers(model).values())
    torch.testing.assert_close(last, torch.full((2,), 2 * 0.5 / 4))  # of the mean over two layers and two experts
    assert (first - last).abs().max() < 0.01, "but for what it does to the last one's hidden states"
    assert all(p.grad is None for _, copy in penalty._routers for p in copy.parameters())


def test_weights_are_compared_after_their_normalisation_and_in_the_batch_s_routing() -> None:
    model, penalty = moved(0.5, normalization="softmax")
    with penalty.watch():
        model(torch.randn(3, 5, D))
        torch.testing.assert_close(penalty.take(), torch.tensor(0.0))
        for layer in wemoe_layers(model).values():
            layer.batch_reduce = True
            layer.router.output.weight.data += 1.0
            layer.router.output.bias.data[0] += 1.0
        model(torch.randn(3, 5, D))
        assert [rows.shape for rows in penalty._rows] == [(1,), (1,)]
        assert penalty.take() > 0.01


def test_a_router_shared_by_two_layers_is_compared_in_both() -> None:
    model = build()
    first, second = wemoe_layers(model).values()
    second.router = first.router
    penalty = DriftPenalty(wemoe_layers(model))
    first.router.output.bias.data += 0.5
    with penalty.watch():
        model(torch.randn(3, 5, D))
        assert len(penalty._rows) == 2
        torch.testing.assert_close(penalty.take(), torch.tensor(0.25))
