from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from wemoe_fast.routing import RoutingRecord, record_routing
from wemoe_fast.upscale import upscale, wemoe_layers


class Tokens(nn.Module):
    """Two residual MLP blocks over tokens [B, N, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    base = Tokens()
    experts = {}
    for name in ("a", "b", "c"):
        experts[name] = copy.deepcopy(base)
        for parameter in experts[name].parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    merged = upscale(base, experts, router_depth=1)
    for layer in wemoe_layers(merged).values():
        nn.init.normal_(layer.router.output.weight)
    return merged


def decisions(model: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    """All routing weights [samples, T], layer by layer, taken without the code under test."""
    seen: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for x in batches:
            for name, layer in wemoe_layers(model).items():
                seen.setdefault(name, []).append(layer.routing_weights(x))
                x = x + layer(x)
    return {name: torch.cat(parts) for name, parts in seen.items()}


def test_means_are_over_all_samples_whatever_the_batches(model: nn.Module) -> None:
    batches = [torch.randn(5, 3, 4), torch.randn(2, 7, 4)]
    with record_routing(model) as record:
        for x in batches:
            model(x)
    expected = decisions(model, batches)
    assert list(record.means()) == list(wemoe_layers(model)) == list(expected)
    for name, mean in record.means().items():
        torch.testing.assert_close(torch.tensor(mean), expected[name].mean(0))
        total, rows = record.totals()[name]
        assert total / rows == pytest.approx(float(expected[name].abs().mean()), rel=1e-5)
        assert total / rows > 1.1 * abs(float(expected[name].mean()))  # signs do not cancel


def test_one_routing_for_a_batch_counts_once(model: nn.Module) -> None:
    for layer in wemoe_layers(model).values():
        layer.batch_reduce = True
    batches = [torch.randn(5, 3, 4), torch.randn(1, 3, 4)]
    with record_routing(model) as record:
        for x in batches:
            model(x)
    for name, rows in decisions(model, batches).items():
        torch.testing.assert_close(torch.tensor(record.means()[name]), (rows[0] + rows[5]) / 2)


def test_layers_that_share_a_router_are_told_apart(model: nn.Module) -> None:
    first, second = wemoe_layers(model).values()
    second.router = first.router
    x = torch.randn(5, 3, 4)
    with record_routing(model) as record:
        model(x)
    expected = decisions(model, [x])
    for name, mean in record.means().items():
        torch.testing.assert_close(torch.tensor(mean), expected[name].mean(0))


def test_nothing_is_recorded_outside_and_no_hook_stays(model: nn.Module) -> None:
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    records: list[RoutingRecord] = []

    def stopped() -> None:
        with record_routing(model) as record:
            records.append(record)
            model(torch.randn(2, 3, 4))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stopped()
    (record,) = records
    before = record.means()
    assert len(before) == 2
    model(torch.randn(2, 3, 4))
    assert record.means() == before
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks


def test_a_failed_forward_does_not_shift_later_ones(model: nn.Module) -> None:
    first, second = wemoe_layers(model)
    layers = wemoe_layers(model)
    with record_routing(model) as record:
        with pytest.raises(ValueError, match="expected"):
            layers[second](torch.randn(2, 3, 9))
        layers[first].router(torch.randn(2, 3, 4), None)  # not as part of a layer
        assert record.means() == {}
        model(torch.randn(2, 3, 4))
    assert list(record.means()) == [first, second]


def test_no_graph_is_kept_and_inference_mode_is_fine(model: nn.Module) -> None:
    with record_routing(model) as record:
        model(torch.randn(2, 3, 4, requires_grad=True)).sum().backward()
        with torch.inference_mode():
            model(torch.randn(2, 3, 4))
        model(torch.randn(2, 3, 4))
        assert not any(s.requires_grad for sums in record._sums.values() for s in sums)
    assert len(record.means()) == 2


def test_reset_forgets(model: nn.Module) -> None:
    with record_routing(model) as record:
        model(torch.randn(2, 3, 4))
        record.reset()
        assert record.means() == {}
        x = torch.randn(3, 3, 4)
        model(x)
    name = next(iter(wemoe_layers(model)))
    torch.testing.assert_close(torch.tensor(record.means()[name]), decisions(model, [x])[name].mean(0))


def test_sums_do_not_lose_small_parts() -> None:
    record = RoutingRecord(["layer"])
    record.add("layer", torch.full((1, 1), 1e8))
    for _ in range(100):
        record.add("layer", torch.full((1, 1), 1.0))
    assert record.means()["layer"][0] == pytest.approx((1e8 + 100) / 101, rel=1e-12)


def test_a_model_without_wemoe_layers() -> None:
    with record_routing(nn.Linear(2, 2)) as record:
        pass
    assert record.means() == {}
