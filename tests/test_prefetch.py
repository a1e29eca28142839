from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from wemoe_fast.prefetch import Prefetched


def threads() -> int:
    return sum(thread.name == "wemoe-fast-prefetch" for thread in threading.enumerate())


def until(condition: object) -> None:
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:  # type: ignore[operator]
        time.sleep(0.005)


def test_items_come_in_order() -> None:
    with Prefetched(iter(range(100))) as items:
        assert list(items) == list(range(100))
    assert threads() == 0


def test_items_are_made_ahead_but_only_so_many() -> None:
    made: list[int] = []

    def make() -> Iterator[int]:
        for number in range(50):
            made.append(number)
            yield number

    with Prefetched(make(), depth=2) as items:
        until(lambda: len(made) == 3)  # two wait, one is held until there is room
        time.sleep(0.05)
        assert made == [0, 1, 2]
        assert next(items) == 0
        until(lambda: len(made) == 4)
        assert len(made) == 4
    assert threads() == 0
    assert len(made) < 50


def test_what_reading_raises_asking_raises() -> None:
    def make() -> Iterator[int]:
        yield 1
        raise KeyError("gone")

    with Prefetched(make()) as items:
        assert next(items) == 1
        with pytest.raises(KeyError, match="gone"):
            next(items)
    assert threads() == 0


def test_exceptions_may_be_items() -> None:
    error = ValueError("an item")
    with Prefetched([error]) as items:
        assert list(items) == [error]


def test_leaving_early_by_an_error_ends_the_thread() -> None:
    def leave() -> None:
        with Prefetched(iter(range(1000))) as items:
            next(items)
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        leave()
    assert threads() == 0
