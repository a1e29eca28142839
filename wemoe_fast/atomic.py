"""Directories that appear under their names only when they are complete.

What is written goes to a sibling, `.NAME.partial-XXXXXXXX`, locked while its writer lives, synced to the disk and
renamed. A writer that was killed leaves such a sibling without a lock: the next writer removes it.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows: leftovers cannot be told from work in progress and stay
    fcntl = None  # type: ignore[assignment]

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextmanager
def replaced_directory(directory: Path, *, overwrite: bool) -> Iterator[Path]:
    """A new sibling of ``directory`` to write to, which takes its place only when the block ends well.

    Whatever ends the process and whenever, ``directory`` is what it was or complete, and on the disk.

    Raises:
        CheckpointError: ``directory`` holds something and may not be replaced.
    """
    check_output(directory, overwrite=overwrite)
    directory = directory.resolve()
    directory.parent.mkdir(parents=True, exist_ok=True)
    _restore(directory)
    remove_leftovers(directory)
    temporary, lock = _locked_sibling(directory)
    try:
        yield temporary
        temporary.chmod(0o777 & ~umask())
        _sync_tree(temporary)
        check_output(directory, overwrite=overwrite)
        if overwrite and directory.exists():
            _swap(temporary, directory)
        else:
            os.replace(temporary, directory)
        _sync(directory.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def check_output(directory: Path, *, overwrite: bool) -> None:
    """Refuse an output directory that holds something, unless it may be replaced."""
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"{directory}: expected a directory to write to, found a file")
    if not overwrite and directory.is_dir() and any(directory.iterdir()):
        raise CheckpointError(
            f"{directory}: expected a new or empty directory, found {len(list(directory.iterdir()))} entries; "
            "name another or pass overwrite (--overwrite)"
        )


def leftovers(directory: Path) -> list[Path]:
    """Siblings in which somebody writes, or wrote until killed, what was to become ``directory``."""
    name = re.compile(rf"\.{re.escape(directory.name)}\.partial-\w{{8}}")
    if not directory.parent.is_dir():
        return []
    return sorted(path for path in directory.parent.iterdir() if name.fullmatch(path.name))


def remove_leftovers(directory: Path) -> None:
    """Remove the siblings that writers of ``directory`` left when they were killed; a living writer's stay."""
    for path in leftovers(directory):
        lock = _lock(path)
        if lock is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)


def locked(directory: Path) -> int | None:
    """A descriptor that locks a directory until it is closed, at the latest by the end of the process; None on a
    system or file system without locks.

    Raises:
        BlockingIOError: somebody else holds the lock.
    """
    if fcntl is None:
        return None
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def umask() -> int:
    """The process's file mode mask."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _locked_sibling(directory: Path) -> tuple[Path, int | None]:
    """A new sibling and its lock; without one on a file system that has no locks, where leftovers stay."""
    prefix = f".{directory.name}.partial-"
    for _ in range(5):
        path = Path(tempfile.mkdtemp(prefix=prefix, dir=directory.parent))
        lock = _lock(path)
        if lock is not None and path.is_dir():
            return path, lock
        if lock is not None:
            os.close(lock)  # another writer took it for a leftover before it was locked
        shutil.rmtree(path, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=prefix, dir=directory.parent)), None


def _lock(path: Path) -> int | None:
    """See ``locked``; None, too, where somebody else holds the lock or has removed the directory."""
    try:
        return locked(path)
    except OSError:
        return None


def _swap(new: Path, directory: Path) -> None:
    """Put ``new`` in the place of a directory, in one step where the system has it, or leave that one where it is."""
    if _exchange(new, directory):
        return  # what was there is now under the temporary name, which is removed
    retired = _retired(directory)
    os.replace(directory, retired)
    try:
        os.replace(new, directory)
    except BaseException:
        os.replace(retired, directory)
        raise
    shutil.rmtree(retired)


def _exchange(one: Path, other: Path) -> bool:
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    done: int = rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    return done == 0


def _retired(directory: Path) -> Path:
    return directory.parent / f".{directory.name}.replaced"


def _restore(directory: Path) -> None:
    """End what a writer killed between the two renames of ``_swap`` began."""
    retired = _retired(directory)
    if not retired.is_dir():
        return
    if directory.exists():
        shutil.rmtree(retired, ignore_errors=True)
    else:
        os.replace(retired, directory)


def _sync_tree(directory: Path) -> None:
    for folder, _, files in os.walk(directory, topdown=False):
        for name in files:
            _sync(Path(folder, name))
        _sync(Path(folder))


def _sync(path: Path) -> None:
    if os.name == "nt":  # no descriptors of directories there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
