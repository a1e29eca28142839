"""Models by their names on the Hugging Face Hub: ``org/name`` or ``org/name@revision``, in huggingface_hub's own cache.

Weights are taken as safetensors alone. huggingface_hub comes with transformers; nothing here is needed for local
directories, which always win over a name on the Hub.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from .adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from .checkpoint import CARRIED, WEMOE_FILE
from .errors import CheckpointError
from .headers import INDEX_FILE, WEIGHTS_FILE

FILES = ("config.json", "generation_config.json", *CARRIED, "*.safetensors", INDEX_FILE, ADAPTER_CONFIG, WEMOE_FILE)
NOT_FILES = ("*/*", "consolidated*")
"""Files in folders (other formats of the same weights), and the weights a second time under their makers' names."""

_ID = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w.-]+(/[\w.-]+)*))?", re.ASCII)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def is_id(text: str, root: Path = Path()) -> bool:
    """True for what reads like a model on the Hub and not like a path here.

    Where there is a directory of the organisation's name it is a path, to a directory or by mistake to none.
    """
    return _ID.fullmatch(text) is not None and not (root / text.partition("/")[0]).is_dir()


def located(text: str | Path) -> Path:
    """The directory of a model given on the command line: itself, or what the Hub has under that name.

    Raises:
        CheckpointError: see :func:`download`.
    """
    return download(str(text)) if is_id(str(text)) else Path(text)


def download(model: str) -> Path:
    """The directory in huggingface_hub's cache that holds a model, downloaded where it is not there yet.

    Args:
        model: ``org/name`` or ``org/name@revision``, a branch, a tag or a commit.

    Raises:
        CheckpointError: no huggingface_hub, no such model, no way to it, or no safetensors in it.
    """
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError as error:
        raise CheckpointError(
            f"{model}: there is no such directory, and for a model of the Hub huggingface_hub is needed: "
            'pip install "wemoe-fast[hf]"'
        ) from error
    found = _ID.fullmatch(model)
    if found is None:
        raise CheckpointError(f"{model}: expected org/name or org/name@revision")
    name, revision = found["name"], found["revision"]
    command = f"hf download {name}" + (f" --revision {revision}" if revision else "")
    try:
        directory = Path(
            snapshot_download(name, revision=revision, allow_patterns=list(FILES), ignore_patterns=list(NOT_FILES))
        )
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{model}: the Hub has {name}, but no revision {revision!r} of it") from error
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{model}: access has to be asked for on https://huggingface.co/{name}; then log in: hf auth login"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{model}: neither a directory here nor a model that the Hub shows you; for a private one log in: "
            "hf auth login"
        ) from error
    except errors.HFValidationError as error:
        raise CheckpointError(f"{model}: neither a directory here nor a name that the Hub allows: {error}") from error
    except OSError as error:  # offline, or the Hub is; what is in the cache has been tried
        raise CheckpointError(
            f"{model}: no such directory here, not wholly in the cache, and the Hub cannot be reached "
            f"({_reason(error)}). Where there is a network, run {command}; "
            "with HF_HUB_OFFLINE=1 the cache alone is used"
        ) from error
    if not any((directory / file).is_file() for file in (WEIGHTS_FILE, INDEX_FILE, ADAPTER_WEIGHTS)):
        raise CheckpointError(f"{model}: {_without_weights(name, directory)}")
    return directory


def origin(directory: Path) -> str | None:
    """``org/name@commit`` of a directory in huggingface_hub's cache; None for any other."""
    repository = directory.parent.parent.name.split("--")
    if directory.parent.name != "snapshots" or repository[0] != "models" or len(repository) != 3:
        return None
    return f"{repository[1]}/{repository[2]}@{directory.name}"


def name_of(directory: Path) -> str:
    """What to call a model without telling where it lies: its name on the Hub and commit, or its directory's name."""
    return origin(directory) or directory.name


def same_model(name: str, directory: Path) -> bool:
    """Whether a model's name, as another configuration gives it, may well mean the one in a directory."""
    known = origin(directory)
    if known is not None and "/" in name and not Path(name).is_absolute():
        return name == known.partition("@")[0]
    last = known.partition("@")[0] if known else directory.resolve().name
    return Path(name).name == Path(last).name


def _reason(error: OSError) -> str:
    sentence = " ".join(str(error).split()).partition(". ")[0]
    return f"{type(error).__name__}: {sentence[:200]}"


def _without_weights(name: str, directory: Path) -> str:
    expected = f"expected safetensors ({WEIGHTS_FILE}, {INDEX_FILE} or {ADAPTER_WEIGHTS})"
    files = _listed(name, directory.name)
    pickles = [file for file in files if file.endswith(_PICKLES)]
    if pickles:
        return (
            f"{expected}, found pickle files only ({', '.join(pickles[:5])}), which can run code when opened. "
            f"Where they can be trusted: hf download {name} --local-dir DIR, then "
            "wemoe-fast convert DIR --out DIR-safetensors"
        )
    return f"{expected}, found none in {directory}"


def _listed(name: str, commit: str) -> list[str]:
    """The files of a model on the Hub; none where it cannot be asked."""
    from huggingface_hub import HfApi

    try:
        listed: Any = HfApi().list_repo_files(name, revision=commit)
        return list(listed)
    except Exception:  # only to say more in a message
        return []
