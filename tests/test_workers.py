from __future__ import annotations

import os
import threading

import pytest
import torch
from conftest import merged_inputs, relative_rms

from wemoe_fast import merged_linear, reference
from wemoe_fast.workers import MAX_WORKERS, for_each, worker_count


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_every_item_once_and_the_callers_threads_stay(threads):
    seen: list[int] = []
    for_each(seen.append, list(range(20)), worker_count(torch.device("cpu")))
    assert sorted(seen) == list(range(20))
    assert torch.get_num_threads() == threads


def test_workers_are_other_threads_with_their_share(threads):
    found = set()
    barrier = threading.Barrier(threads)

    def look(_: int) -> None:
        barrier.wait(timeout=30)
        found.add((threading.get_ident(), torch.get_num_threads()))

    for_each(look, list(range(threads)), threads)
    assert len(found) == threads
    assert {count for _, count in found} == {1}
    assert (threading.get_ident() in {ident for ident, _ in found}) == (threads == 1)


def test_no_more_workers_than_worth_it_and_none_on_a_gpu():
    before = torch.get_num_threads()
    torch.set_num_threads(MAX_WORKERS + 3)
    try:
        assert worker_count(torch.device("cpu")) == MAX_WORKERS
    finally:
        torch.set_num_threads(before)
    assert worker_count(torch.device("cuda")) == 1


def test_an_error_in_a_worker_reaches_the_caller():
    def fail(item: int) -> None:
        raise ValueError(f"item {item}")

    with pytest.raises(ValueError, match="item"):
        for_each(fail, [0, 1, 2], 2)


@pytest.mark.parametrize("inference", [True, False])
def test_the_same_result_with_any_number_of_threads(threads, inference):
    inputs = merged_inputs(33, 20, 3, d=24, h=64)
    expected = reference.merged_linear(**{name: value.double() for name, value in inputs.items()})
    with torch.inference_mode(inference):
        assert relative_rms(merged_linear(**inputs, strategy="chunked"), expected) < 1e-6
    y = merged_linear(**inputs, strategy="chunked")
    grads = torch.autograd.grad(y.square().sum(), list(inputs.values()))
    wanted = torch.autograd.grad(expected.square().sum(), list(inputs.values()))
    for ours, theirs in zip(grads, wanted, strict=True):
        assert relative_rms(ours, theirs) < 1e-5


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_has_workers_of_its_own():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for_each(lambda item: None, [1, 2], 2)
        child = os.fork()
        if child == 0:
            seen: list[int] = []
            for_each(seen.append, [1, 2, 3], 2)
            os._exit(0 if sorted(seen) == [1, 2, 3] else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        torch.set_num_threads(before)
