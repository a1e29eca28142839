from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wemoe_fast.batching import Batches
from wemoe_fast.errors import InputError


class Lengths:
    def __init__(self, lengths: Any, n: int | None = None) -> None:
        self.lengths, self.n = lengths, len(lengths) if n is None else n

    def __len__(self) -> int:
        return self.n

    def batch(self, indices: Any) -> Any:
        raise AssertionError("forming batches reads no data")


class Bare:
    def __len__(self) -> int:
        return 5

    def batch(self, indices: Any) -> Any:
        raise AssertionError


def test_as_many_samples_as_the_budget_has_room_for_when_padded() -> None:
    batches = Batches.of(Lengths([1, 5, 2, 2, 5, 1, 3]), batch_size=9, batch_tokens=6)
    assert list(batches) == [[1], [4], [6, 2], [3, 0, 5]]


def test_the_default_budget_is_batch_size_of_the_longest() -> None:
    assert list(Batches.of(Lengths([4, 1, 1, 1, 1, 4, 2]), batch_size=2)) == [[0, 5], [6, 1, 2, 3], [4]]
    assert list(Batches.of(Lengths([3] * 5), batch_size=2)) == [[0, 1], [2, 3], [4]]


def test_without_lengths_samples_stay_in_order() -> None:
    batches = Batches.of(Bare(), batch_size=2)
    assert list(batches) == [[0, 1], [2, 3], [4]]
    assert (len(batches), batches[2]) == (3, [4])
    with pytest.raises(IndexError):
        batches[3]
    assert list(Batches.of(Bare(), batch_size=2, batch_tokens=1)) == list(batches), "a budget is for lengths"


@settings(derandomize=True, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=80), st.integers(1, 9), st.none() | st.integers(1, 200))
def test_every_sample_once_longest_first_within_the_budget(lengths: list[int], size: int, tokens: int | None) -> None:
    batches = list(Batches.of(Lengths(np.array(lengths)), size, tokens))
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    order = [lengths[index] for batch in batches for index in batch]
    assert order == sorted(lengths, reverse=True)
    budget = size * max(lengths) if tokens is None else tokens
    for batch, following in zip(batches, [*batches[1:], None], strict=True):
        cost = len(batch) * lengths[batch[0]]
        assert cost <= budget or len(batch) == 1
        assert following is None or cost + lengths[batch[0]] > budget


@pytest.mark.parametrize(("lengths", "n"), [([1, 2], 3), ([1, 0, 2], 3), ([1.0, 2.0], 2), ([[1], [2]], 2)])
def test_lengths_that_do_not_fit(lengths: Any, n: int) -> None:
    with pytest.raises(InputError, match=rf"lengths: expected {n} integers of at least 1, one per sample, found"):
        Batches.of(Lengths(lengths, n), 2)
