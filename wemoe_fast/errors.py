"""Errors that say what was expected, what was found and what to do, all problems at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

E = TypeVar("E", bound="WEMoEError")


class WEMoEError(ValueError):
    """Anything this package refuses, with a message meant for its user."""

    @classmethod
    def of(cls: type[E], subject: str, problems: Sequence[str]) -> E:
        """One error for several problems found in one subject (a file, a model, a call)."""
        if len(problems) == 1:
            return cls(f"{subject}: {problems[0]}")
        listed = "\n".join(f"  - {problem}" for problem in problems)
        return cls(f"{subject}: {len(problems)} problems\n{listed}")


class InputError(WEMoEError):
    """A tensor, a module or an argument that does not fit."""


class UnknownArchitectureError(WEMoEError):
    """A model in which no MLP of a known family was found."""


class ConfigError(WEMoEError):
    """A recipe, a task list or another configuration file that does not fit."""


class CheckpointError(WEMoEError):
    """A checkpoint or data file that is missing, damaged, unsafe or does not fit."""
