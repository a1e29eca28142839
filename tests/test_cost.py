from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_kernel_tuning import problem

from wemoe_fast import cost, plan
from wemoe_fast.cost import H100, Ceilings, seconds
from wemoe_fast.kernels import tuning
from wemoe_fast.kernels.tuning import Tile

FREE = Ceilings("free", *[float("inf")] * 5, 0.0)
TILE = Tile(64, 64, 32, 4, 3, 8)


def only(**limits):
    """A device on which only this costs anything: one a second."""
    return replace(FREE, **limits)


def test_counted_work_of_the_fused_kernel():
    asked = problem()  # B=64, N=50, h=3072, d=768, T=8, bf16
    weights = 16 * 48 * 64 * 768  # groups x tiles of rows x their weights
    assert seconds("fused", asked, only(products=1), tile=TILE) == 2 * weights * 4 * 64
    assert seconds("fused", asked, only(arithmetic=1), tile=TILE) == 2 * 8 * weights * 4 * 2
    assert seconds("fused", asked, only(l2_bytes=1), tile=TILE) == weights * 9 * 2 + 16 * 48 * 4 * 64 * 768 * 2
    assert seconds("fused", asked, only(memory_bytes=1), tile=TILE) == 2 * (9 * 3072 * 768 + 64 * 50 * (3072 + 768))
    assert seconds("fused", asked, only(launch=1), tile=TILE) == 1


def test_experts_without_a_slot_cost_nothing():
    sparse = replace(problem(), kept=1)
    for limit in ("arithmetic", "l2_bytes"):
        assert seconds("fused", sparse, only(**{limit: 1}), tile=TILE) < seconds(
            "fused", problem(), only(**{limit: 1}), tile=TILE
        )


def test_counted_work_of_the_other_strategies():
    asked = problem()
    size, product = 3072 * 768, 2 * 64 * 50 * 3072 * 768
    assert seconds("chunked", asked, only(products=1), 64, 128) == product
    assert seconds("chunked", asked, only(arithmetic=1), 64, 128) == 2 * 9 * 64 * size
    assert seconds("chunked", asked, only(launch=1), 64, 128) == 2 * 24
    assert seconds("chunked", asked, only(launch=1), 32, 128) == 4 * 24
    assert seconds("factored", asked, only(products=1), 1, 3072) == 9 * product
    assert seconds("shared", asked, only(products=1)) == product
    assert seconds("shared", asked, only(arithmetic=1)) == 2 * 9 * size


def test_counted_work_of_the_backward_pass():
    asked = problem()
    size, product = 3072 * 768, 2 * 64 * 50 * 3072 * 768
    assert seconds("chunked", asked, only(products=1), 64, 128, backward=True) == 2 * product
    assert seconds("factored", asked, only(products=1), 1, 3072, backward=True) == 18 * product
    assert seconds("shared", asked, only(arithmetic=1), backward=True) == 2 * 9 * size
    assert seconds("chunked", asked, only(launch=1), 64, 128, backward=True) == 4 * 24
    padded, samples = 2 * size * 64 * 64, 64
    assert seconds("fused", asked, only(products=1), tile=TILE, backward=True) == 2 * padded
    dx, dw = 2 * 8 * size * samples * 2, 2 * 8 * size * samples
    assert seconds("fused", asked, only(arithmetic=1), tile=TILE, backward=True) == dx + dw
    assert seconds("fused", asked, only(launch=1), tile=TILE, backward=True) == 3


def test_terms_overlap_and_launches_do_not():
    both = only(products=1, l2_bytes=1)
    alone = [seconds("fused", problem(), only(**{name: 1}), tile=TILE) for name in ("products", "l2_bytes")]
    assert seconds("fused", problem(), both, tile=TILE) == max(alone)
    assert seconds("fused", problem(), replace(both, launch=5.0), tile=TILE) == max(alone) + 5


@pytest.mark.parametrize("strategy", ["fused", "chunked", "factored", "shared"])
def test_more_work_never_costs_less(strategy):
    for name in ("samples", "tokens", "experts", "rows", "depth"):
        small = problem()
        grown = {name: 2 * getattr(small, name)} | ({"kept": 16} if name == "experts" else {})
        large = replace(small, **grown)
        assert seconds(strategy, large, H100, 8, 64, TILE) >= seconds(strategy, small, H100, 8, 64, TILE), name


def test_the_cheapest_by_the_model(monkeypatch):
    """As on an H100: few tokens are not merged, many tokens are merged in slabs."""

    def cheapest(B, N, T=8, d=768, h=3072):
        x, stack = (torch.zeros(1, dtype=torch.bfloat16).expand(shape) for shape in ((B, N, d), (1 + T, h, d)))
        return plan._cheapest(x, stack, B, N, T, backward=False)

    monkeypatch.setattr(tuning, "measured_strategy", lambda asked, backward: None)
    monkeypatch.setattr(plan, "compute_dtype", lambda x: x.dtype)
    assert cheapest(64, 1).strategy == "factored"
    assert cheapest(8, 50).strategy == "fused"
    assert cheapest(64, 577, d=1024, h=4096).strategy == "chunked"
    chosen = cheapest(64, 50)
    assert chosen.reason.startswith(f"estimated cheapest, in microseconds: {chosen.strategy} ")
    monkeypatch.setattr(tuning, "measured_strategy", lambda asked, backward: "factored")
    assert cheapest(64, 577).strategy == "factored"
    assert cheapest(64, 577).reason == "measured fastest on interpreter"


def test_ceilings_off_the_gpu_are_those_of_an_h100():
    assert cost.ceilings(torch.device("cpu")) is H100
