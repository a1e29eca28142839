"""What an evaluation has computed so far, on disk: append-only lines that survive whatever ends the process.

    records/<model>-<task>/process-00000.jsonl      one file for each process

A line is ``<checksum> <JSON>`` and holds one batch. It is handed to the system at once, so that it outlives the
process, and brought to the disk by a thread while the next batch is computed, so that it outlives a power cut. The
checksum covers the key as well, so that a line counts only where it was written: for the same model, task and
settings. A last line that was cut off is nothing; a line that was damaged is left out with a warning, and what it
held is computed again.
"""

from __future__ import annotations

import json
import os
import threading
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

from .errors import CheckpointError


@dataclass(frozen=True)
class Record:
    """One batch: its samples by index, what they are and what the model said, and what its routers did.

    `routing` holds, by layer, the sums over the batch of the routing weights [T] and at the end how many rows they
    are sums of. `data` is the digest of the batch as it was read, where the data set has no fingerprint.
    """

    batch: int
    samples: list[int]
    labels: list[int]
    predictions: list[int]
    routing: dict[str, list[float]]
    data: str | None = None


class RecordLog:
    """The records of one model on one task, under one key; read from every process's file, written to one's own.

    Use it as a context; the file is opened at the first `append`. Raises CheckpointError where it cannot be read
    or written.
    """

    def __init__(self, directory: str | Path, key: str, process: int = 0) -> None:
        self._directory = Path(directory)
        self._seed = zlib.crc32(key.encode())
        self._path = self._directory / f"process-{process:05d}.jsonl"
        self._file: FileIO | None = None
        self._disk: _Disk | None = None

    def __enter__(self) -> RecordLog:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if self._file is not None and self._disk is not None:
            try:
                self._disk.close()
            except OSError as error:
                raise _unusable(self._path, "written", error) from error
            finally:
                self._file.close()
                self._file = self._disk = None

    def read(self) -> Iterator[Record]:
        """Every record that is whole, file by file in the order of their names, each in the order of its writing."""
        for path in sorted(self._directory.glob("process-*.jsonl")):
            damaged: list[int] = []
            try:
                with path.open("rb") as file:
                    for number, line in enumerate(file, 1):
                        if not line.endswith(b"\n"):
                            break
                        record = self._parsed(line[:-1])
                        if record is None:
                            damaged.append(number)
                        else:
                            yield record
            except OSError as error:
                raise _unusable(path, "read", error) from error
            if damaged:
                lines = ", ".join(map(str, damaged[:5])) + (", ..." if len(damaged) > 5 else "")
                warnings.warn(
                    f"{path}: {len(damaged)} damaged records (line {lines}) are left out and computed again",
                    RuntimeWarning,
                    stacklevel=2,
                )

    def append(self, record: Record) -> None:
        """Write one record; what is written is on the disk when the context is left, and mostly much sooner."""
        content = json.dumps(vars(record), separators=(",", ":")).encode()
        line = b"%08x %b\n" % (zlib.crc32(content, self._seed), content)
        try:
            if self._file is None or self._disk is None:
                self._file = self._open()
                self._disk = _Disk(self._file.fileno())
            while line:
                line = line[self._file.write(line) :]
            self._disk.written()
        except OSError as error:
            raise _unusable(self._path, "written", error) from error

    def _open(self) -> FileIO:
        """Append to this process's file, without the last line where that was cut off.

        Every write goes to the end, whoever else writes: two runs by mistake at once record some batches twice.
        """
        self._directory.mkdir(parents=True, exist_ok=True)
        file = FileIO(self._path, "ab+")
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = file.seek(max(0, end - (1 << 16)))
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        file.truncate(end)
        return file

    def _parsed(self, line: bytes) -> Record | None:
        checksum, _, content = line.partition(b" ")
        if checksum != b"%08x" % zlib.crc32(content, self._seed):
            return None
        try:
            return _checked(json.loads(content))
        except (ValueError, RecursionError):
            return None


class _Disk:
    """A thread that brings what was written to the disk; several writes at once where the disk is slower."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._news, self._closing = threading.Event(), False
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._work, name="wemoe-fast-records", daemon=True)
        self._thread.start()

    def written(self) -> None:
        """There is something to bring. Raises what the thread has met so far."""
        self._news.set()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Return when everything is on the disk."""
        self._closing = True
        self._news.set()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        last = False
        while not last:
            self._news.wait()
            self._news.clear()
            last = self._closing
            try:
                os.fsync(self._descriptor)
            except OSError as error:
                self._error = error
                return


def _checked(content: Any) -> Record | None:
    if not isinstance(content, dict) or set(content) != {
        "batch",
        "samples",
        "labels",
        "predictions",
        "routing",
        "data",
    }:
        return None
    lists = [content[name] for name in ("samples", "labels", "predictions")]
    numbers = all(isinstance(found, list) and all(type(value) is int for value in found) for found in lists)
    routing = content["routing"]
    sums = isinstance(routing, dict) and all(
        isinstance(found, list) and all(type(value) in (float, int) for value in found) for found in routing.values()
    )
    if not numbers or not sums or type(content["batch"]) is not int or len({len(found) for found in lists}) != 1:
        return None
    return Record(**content)


def _unusable(path: Path, what: str, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path}: records cannot be {what}: {error.strerror or error}")
