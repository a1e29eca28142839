"""Batches of a data set: samples of like length together, as many as fit a budget of tokens.

Which samples share a batch depends on the data and the settings alone: not on who computes it, nor on what was
done before. A batch is the unit of sharing out, of recording and of resuming, so that every sample is always
computed in the same company, and comes out the same to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .errors import InputError
from .tasks import Samples


class Batches:
    """The batches of one data set: a sequence of lists of sample indices, held in two compact arrays."""

    def __init__(self, order: np.ndarray, starts: np.ndarray) -> None:
        """`order` [n]: sample indices; batch k is ``order[starts[k]:starts[k + 1]]``."""
        self.order, self._starts = order, starts

    @classmethod
    def of(cls, samples: Samples, batch_size: int, batch_tokens: int | None = None) -> Batches:
        """Longest samples first, so that running out of memory shows at once.

        A batch holds as many samples as `batch_tokens` has room for when all are padded to its longest (one at
        least). By default that is room for `batch_size` samples of the greatest length. Without ``samples.lengths``
        (images) there is no budget: samples stay in their order, `batch_size` to a batch.

        Raises:
            InputError: lengths that are not one per sample and at least 1.
        """
        n = len(samples)
        found = getattr(samples, "lengths", None)
        if found is None:
            return cls(np.arange(n), np.append(np.arange(0, n, batch_size), n))
        lengths = np.asarray(found)
        if lengths.shape != (n,) or lengths.dtype.kind not in "iu" or (n and lengths.min() < 1):
            raise InputError(
                f"lengths: expected {n} integers of at least 1, one per sample, found {lengths.dtype} "
                f"{list(lengths.shape)}" + (f" from {lengths.min()}" if lengths.size else "")
            )
        order = np.argsort(-lengths.astype(np.int64), kind="stable")
        longest = lengths[order].astype(np.int64)
        budget = batch_size * int(longest[0]) if batch_tokens is None else batch_tokens
        starts = [0]
        while starts[-1] < n:
            starts.append(min(n, starts[-1] + max(1, budget // int(longest[starts[-1]]))))
        return cls(order, np.asarray(starts))

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, number: int) -> list[int]:
        if not 0 <= number < len(self):
            raise IndexError(number)
        chosen: list[int] = self.order[self._starts[number] : self._starts[number + 1]].tolist()
        return chosen

    def __iter__(self) -> Iterator[list[int]]:
        return (self[number] for number in range(len(self)))
