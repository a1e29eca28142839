"""Reading ahead: the next items are made by a thread while this one works on the last."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from queue import Empty, Full, Queue
from typing import Generic, TypeVar

Item = TypeVar("Item")
DEPTH = 2
_PATIENCE = 0.1  # seconds until a thread with a full queue looks whether anybody still wants its items


class Prefetched(Generic[Item]):
    """The items of an iterable, in order, at most `depth` of them made before they are asked for.

    What the iterable raises, asking for the next item raises. Use it as a context: leaving ends the thread.
    """

    def __init__(self, items: Iterable[Item], depth: int = DEPTH) -> None:
        self._queue: Queue[tuple[bool, Item | BaseException | None]] = Queue(depth)
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._make, args=(items,), name="wemoe-fast-prefetch", daemon=True)

    def __enter__(self) -> Iterator[Item]:
        self._thread.start()
        return self._items()

    def __exit__(self, *_: object) -> None:
        self._left.set()
        while self._thread.is_alive():
            try:
                self._queue.get_nowait()
            except Empty:
                self._thread.join(_PATIENCE)

    def _items(self) -> Iterator[Item]:
        while True:
            more, found = self._queue.get()
            if isinstance(found, BaseException) and not more:
                raise found
            if not more:
                return
            yield found  # type: ignore[misc]

    def _make(self, items: Iterable[Item]) -> None:
        try:
            for item in items:
                if not self._put((True, item)):
                    return
            self._put((False, None))
        except BaseException as error:  # also what only the caller's thread may act on
            self._put((False, error))

    def _put(self, entry: tuple[bool, Item | BaseException | None]) -> bool:
        while not self._left.is_set():
            try:
                self._queue.put(entry, timeout=_PATIENCE)
                return True
            except Full:
                continue
        return False
