"""Labels as they stand in files, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import InputError

_LISTED = 10  # problems quoted from one data file


def class_index(label: object, classes: Sequence[str]) -> int:
    if isinstance(label, str) and label in classes:
        return classes.index(label)
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(classes):
        return label
    raise InputError(
        f"label {label!r} is not a class of the head: expected one of {', '.join(classes)},"
        f" or an index from 0 to {len(classes) - 1}"
    )


def listed(path: Path, problems: Sequence[str]) -> InputError:
    """One error for the problems of a data file, the first of them quoted."""
    quoted = list(problems[:_LISTED])
    if len(problems) > _LISTED:
        quoted.append(f"and {len(problems) - _LISTED} more")
    return InputError(quoted[0]) if len(quoted) == 1 else InputError.of(str(path), quoted)
