from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from conftest import set_plan

from wemoe_fast import plan
from wemoe_fast.errors import InputError
from wemoe_fast.slabs import coefficients, spans, wide


@pytest.fixture(autouse=True)
def _without_compiler(monkeypatch):
    """The choice between the strategies in plain PyTorch; test_native has the other."""
    monkeypatch.setattr(plan.native, "why_not", lambda x, stack: "there is no C compiler")


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def cpu(*shape, dtype=torch.float32):
    """A tensor of one element's memory: the plan looks at shapes, dtypes and the device."""
    return torch.zeros(1, dtype=dtype).expand(shape)


def choose(B, N, T, d=768, h=3072, rows=None, strategy="auto", dtype=torch.float32):
    stack = cpu(1 + T, h, d, dtype=dtype)
    return plan.choose(cpu(B, N, d, dtype=dtype), stack, cpu(B if rows is None else rows, T), strategy)


def test_auto_shares_one_row_of_weights():
    for N in (1, 50, 257):
        assert choose(32, N, 8, rows=1).strategy == "shared"
    assert choose(1, 50, 8).strategy == "shared"


def test_auto_merges_for_many_tokens_and_multiplies_by_every_expert_for_few():
    assert choose(32, 1, 8).strategy == "factored"
    for N in (20, 50, 197, 257):
        assert choose(32, N, 8).strategy == "chunked"
    for T in (1, 3, 8, 20):
        picked = [choose(32, N, T).strategy for N in range(1, 60)]
        assert picked == sorted(picked, reverse=True), "factored, then chunked, from some number of tokens on"


def test_auto_never_picks_the_reference():
    for B, N, T, rows in itertools.product((1, 2, 33), (1, 4, 300), (1, 20), (1, None)):
        assert choose(B, N, T, rows=rows).strategy in ("shared", "chunked", "factored")


def test_what_is_asked_for_is_done_and_every_plan_gives_its_reason():
    for strategy in ("chunked", "factored"):
        chosen = choose(32, 50, 8, strategy=strategy)
        assert chosen.strategy == strategy
        assert chosen.reason == "asked for"
    assert "50 tokens" in choose(32, 50, 8).reason
    assert "1 tokens" in choose(32, 1, 8).reason
    assert "whole batch" in choose(32, 1, 8, rows=1).reason


def test_shared_needs_one_row_or_one_sample():
    assert choose(1, 50, 8, strategy="shared").group == 1
    assert choose(9, 50, 8, rows=1, strategy="shared").group == 1
    with pytest.raises(InputError, match=r"found \(9, 8\) for 9 samples; use 'chunked' or 'auto'"):
        choose(9, 50, 8, strategy="shared")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("strategy", ["chunked", "factored"])
def test_slabs_fit_a_quarter_of_the_workspace(strategy, dtype, monkeypatch):
    monkeypatch.setattr(plan, "cpu_has_fast_low_precision", lambda: False)
    shapes = itertools.product((1, 7, 512), (1, 50, 257), (1, 8, 20), ((768, 3072), (3072, 768), (100, 10)))
    for B, N, T, (d, h) in shapes:
        chosen = choose(B, N, T, d, h, strategy=strategy, dtype=dtype)
        assert 1 <= chosen.rows <= h
        assert 1 <= chosen.group <= B * (N if strategy == "factored" else 1)
        assert chosen.rows == h or chosen.rows % 8 == 0
        size = chosen.compute_dtype.itemsize
        slab = (1 if strategy == "factored" else chosen.group) * chosen.rows * d * size
        assert slab <= plan.WORKSPACE_BYTES // 4
        if strategy == "chunked":
            assert chosen.group == min(plan.GROUP if N < plan.MANY_TOKENS else plan.GROUP // 2, B)
            if chosen.compute_dtype != dtype:
                assert (1 + T) * chosen.rows * d * size <= plan.WORKSPACE_BYTES // 4


@pytest.mark.parametrize("N", [1, 100, 257])
def test_a_group_of_factored_products_fits_a_quarter_of_the_workspace(N):
    chosen = choose(512, N, 8, strategy="factored")
    assert chosen.group * (2 * 768 + 6 * chosen.rows) * 4 <= plan.WORKSPACE_BYTES // 4
    assert 8 < chosen.group <= 512 * N


def test_slabs_are_no_smaller_than_eight_rows(monkeypatch):
    set_plan(monkeypatch, WORKSPACE_BYTES=1024)
    assert choose(32, 50, 8, strategy="chunked").rows == 8
    assert choose(32, 50, 8, h=5, strategy="chunked").rows in range(1, 6)


def test_an_empty_batch_has_a_plan():
    for strategy in ("auto", "chunked", "factored"):
        chosen = choose(0, 5, 3, strategy=strategy)
        assert chosen.group >= 1
        assert chosen.rows >= 1


@pytest.mark.parametrize("native", [True, False])
def test_16_bit_products_only_where_the_processor_has_them(native, monkeypatch):
    monkeypatch.setattr(plan, "cpu_has_fast_low_precision", lambda: native)
    for dtype in (torch.bfloat16, torch.float16):
        assert plan.compute_dtype(torch.zeros(1, dtype=dtype)) == (dtype if native else torch.float32)
        assert plan.compute_dtype(meta(1, dtype=dtype)) == dtype
    for dtype in (torch.float32, torch.float64):
        assert plan.compute_dtype(torch.zeros(1, dtype=dtype)) == dtype


def test_the_processor_is_asked_and_answers():
    assert plan.cpu_has_fast_low_precision() in (True, False)


def test_spans_cover_a_range_once():
    for total, step in itertools.product((0, 1, 7, 8, 9), (1, 4, 8, 100)):
        covered = [i for span in spans(total, step) for i in range(total)[span]]
        assert covered == list(range(total))
        assert all(0 < span.stop - span.start <= step for span in spans(total, step))


def test_coefficients_put_one_for_the_base_in_front():
    weights = torch.tensor([[0.5, -0.25]])
    assert coefficients(weights, 3, torch.float64).tolist() == [[1.0, 0.5, -0.25]] * 3
    assert coefficients(weights, 3, torch.float64).dtype == torch.float64
    assert wide(torch.bfloat16) == wide(torch.float32) == torch.float32
    assert wide(torch.float64) == torch.float64


def test_workers_share_the_workspace(monkeypatch):
    alone, shared = (choose_with_workers(monkeypatch, count) for count in (1, 4))
    assert (alone.workers, shared.workers) == (1, 4)
    assert 0 < shared.rows <= alone.rows // 4
    assert plan.tokens_in_a_quarter(10, torch.float32, workers=4) == plan.tokens_in_a_quarter(10, torch.float32) // 4


def choose_with_workers(monkeypatch, count):
    monkeypatch.setattr(plan, "worker_count", lambda device: count)
    return choose(32, 50, 8, 768, 3072, strategy="chunked")


@pytest.mark.parametrize(("cache", "forward", "backward"), [(50 << 20, 24, 12), (6 << 20, 3, 3), (0, 24, 12)])
def test_on_a_gpu_a_slab_stays_in_half_of_its_cache(cache, forward, backward, monkeypatch):
    properties = SimpleNamespace(L2_cache_size=cache)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    gpu = torch.device("cuda", 0)
    assert [plan._slab_bytes(gpu, flag) >> 20 for flag in (False, True)] == [forward, backward]
    assert plan._slab_bytes(torch.device("cpu"), False) == plan.WORKSPACE_BYTES // 4


def test_many_tokens_take_half_a_group():
    assert choose(32, 127, 8, strategy="chunked").group == plan.GROUP
    assert choose(32, 128, 8, strategy="chunked").group == plan.GROUP // 2
    assert choose(32, 128, 8, strategy="chunked").rows > choose(32, 127, 8, strategy="chunked").rows
