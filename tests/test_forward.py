from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from wemoe_fast.errors import InputError, WEMoEError
from wemoe_fast.forward import Forward
from wemoe_fast.routing import record_routing
from wemoe_fast.tasks import Head, Task, TensorSamples
from wemoe_fast.upscale import upscale, wemoe_layers

D = 4


class Small(nn.Module):
    """Has memory for so many tokens; fails after its MLP ran, as attention would."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(D, 8), nn.GELU(), nn.Linear(8, D))
        self.tokens = tokens
        self.tried: list[int] = []

    def forward(self, x: Tensor, step: Tensor | None = None) -> Tensor:
        y = x + self.mlp(x)
        self.tried.append(len(x))
        if x.shape[0] * x.shape[1] > self.tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return y


def merged(tokens: int, **options: bool) -> nn.Module:
    torch.manual_seed(0)
    base = Small(10**9)
    experts = {name: copy.deepcopy(base) for name in ("a", "b")}
    for expert in experts.values():
        for parameter in expert.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
    model = upscale(base, experts, router_depth=1, **options)
    model.tokens, model.tried = tokens, []  # type: ignore[assignment]
    return model


def task() -> Task:
    weight = torch.randn(3, D, generator=torch.Generator().manual_seed(1))
    return Task("t", Head(weight, None, ("a", "b", "c")), TensorSamples({"x": torch.zeros(1, 1, D)}))


def run(model: nn.Module, *batches: Tensor) -> list[tuple[Tensor, dict[str, Tensor]]]:
    with torch.inference_mode(), record_routing(model) as routing:
        forward = Forward(model, task(), routing)
        return [forward({"x": x}) for x in batches]


def tried(model: nn.Module) -> Sequence[int]:
    found: list[int] = model.tried  # type: ignore[assignment]
    return found


def test_halves_until_it_fits_and_nothing_of_the_failures_counts() -> None:
    x = 3 * torch.randn(11, 2, D)
    ((expected, sums),) = run(merged(10**9), x)
    model = merged(6)
    ((found, halved),) = run(model, x)
    assert tried(model) == [11, 5, 2, 3, 3, 3], "6 is not tried, as 5 failed"
    assert torch.equal(found, expected)
    assert len(set(expected.tolist())) > 1
    (layer,) = wemoe_layers(model)
    assert halved[layer][-1] == sums[layer][-1] == 11
    torch.testing.assert_close(halved[layer], sums[layer], rtol=1e-5, atol=0)
    assert halved[layer].dtype == torch.float64


def test_a_shape_is_not_tried_where_a_smaller_one_failed() -> None:
    model = merged(8)
    run(model, torch.zeros(8, 2, D), torch.zeros(8, 2, D), torch.zeros(9, 2, D), torch.zeros(8, 1, D))
    assert tried(model) == [8, 4, 4, 4, 4, 4, 5, 2, 3, 8]


def test_what_came_before_does_not_change_where_a_batch_is_halved() -> None:
    x = [torch.randn(n, t, D) for n, t in ((12, 3), (9, 1), (4, 4), (12, 2), (7, 4))]
    alone = [run(merged(10), value)[0] for value in x]
    after = run(merged(10), *x)
    for (one, sums), (other, same) in zip(alone, after, strict=True):
        assert torch.equal(one, other)
        assert all(torch.equal(sums[layer], same[layer]) for layer in sums)


def test_one_sample_that_does_not_fit() -> None:
    with pytest.raises(WEMoEError, match="task 't': out of memory on cpu with 1 samples: not even one fits"):
        run(merged(1), torch.zeros(4, 2, D))


def test_a_model_that_routes_whole_batches_is_not_halved() -> None:
    with pytest.raises(WEMoEError, match=r"with 4 samples: the model routes whole batches .* smaller batch_size"):
        run(merged(1, batch_reduce=True), torch.zeros(4, 2, D))


def test_inputs_that_cannot_be_halved() -> None:
    model = merged(1)
    with torch.inference_mode(), record_routing(model) as routing:
        forward = Forward(model, task(), routing)
        with pytest.raises(InputError, match=r"first dimension, found x \[4, 2, 4\], step \[1\]"):
            forward({"x": torch.zeros(4, 2, D), "step": torch.zeros(1)})


def test_other_errors_pass() -> None:
    with pytest.raises(InputError, match="expected hidden states"):
        run(merged(100), torch.zeros(4, 2, D + 1))
