"""The demo's four classification tasks, read from the data files of `sources`.

Every task has four splits: `train` (for its expert), `adapt` (used without labels), `tuning` (for choosing
settings) and `test`. Which texts may go into which split is fixed, whatever the seed; the seed draws from
these pools. So no text used to train, adapt or choose anything, under any seed, is ever a test text.
"""

from __future__ import annotations

import csv
import hashlib
import html
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError
from .sources import Sources

SPLITS = ("train", "adapt", "tuning", "test")
MAX_WORDS = 30  # what a model limited to 32 tokens can see at most; texts equal so far count as the same
MIN_WORDS = 3
_FIELD_LIMIT = 1 << 24
_KEY_CHARACTERS = 600  # enough for MAX_WORDS
_NOISE = re.compile(r"https?://\S*|@\w+|\brt\b")
_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True)
class Example:
    text: str
    label: int


@dataclass(frozen=True)
class TaskSpec:
    """What makes a task: a prompt for the zero-shot head, and the labels of its file with readable names."""

    name: str
    prompt: str  # with {} for the class
    classes: Mapping[str, str]  # label in the file -> readable class name

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(self.classes.values())

    @property
    def prompts(self) -> tuple[str, ...]:
        return tuple(self.prompt.format(name) for name in self.class_names)


@dataclass(frozen=True)
class TaskTexts:
    spec: TaskSpec
    splits: Mapping[str, tuple[Example, ...]]


@dataclass(frozen=True)
class Sizes:
    """How many texts each split takes per task."""

    train: int = 720
    adapt: int = 400
    tuning: int = 500
    test: int = 500


COMPUTERS = TaskSpec(
    "computers",
    "a newsgroup post about {}",
    {
        "comp.graphics": "computer graphics",
        "comp.os.ms-windows.misc": "Microsoft Windows",
        "comp.sys.ibm.pc.hardware": "IBM PC hardware",
        "comp.sys.mac.hardware": "Apple Macintosh hardware",
        "comp.windows.x": "the X Window System",
    },
)
DEBATE = TaskSpec(
    "debate",
    "a newsgroup post about {}",
    {
        "alt.atheism": "atheism",
        "soc.religion.christian": "Christianity",
        "talk.religion.misc": "religion",
        "talk.politics.guns": "guns and gun control",
        "talk.politics.mideast": "Middle East politics",
        "talk.politics.misc": "politics",
    },
)
NEWS = TaskSpec(
    "news",
    "a news story about {}",
    {
        "earn": "company earnings",
        "acq": "corporate acquisitions",
        "crude": "crude oil",
        "trade": "international trade",
        "money-fx": "the money market and foreign exchange",
        "interest": "interest rates",
        "ship": "shipping",
        "grain": "grain",
    },
)
SENTIMENT = TaskSpec(
    "sentiment",
    "a tweet with {} sentiment",
    {"negative": "negative", "neutral": "neutral", "positive": "positive"},
)
TASKS = (COMPUTERS, DEBATE, NEWS, SENTIMENT)

_HELD_OUT = {"adapt": 0.25, "tuning": 0.30, "test": 0.45}
_POOLED = {"train": 0.40, "adapt": 0.15, "tuning": 0.20, "test": 0.25}


def load_texts(sources: Sources, *, seed: int, sizes: Sizes | None = None) -> list[TaskTexts]:
    """The four tasks. Newsgroups and news keep their published train/test division; tweets have none."""
    sizes = sizes or Sizes()
    newsgroups = read_tab(sources.newsgroups_train), read_tab(sources.newsgroups_test)
    reuters = read_tab(sources.reuters_train), read_tab(sources.reuters_test)
    tweets = read_tweets(sources.tweets)
    return [
        build_task(COMPUTERS, *newsgroups, seed=seed, sizes=sizes),
        build_task(DEBATE, *newsgroups, seed=seed, sizes=sizes),
        build_task(NEWS, *reuters, seed=seed, sizes=sizes),
        build_task(SENTIMENT, tweets, seed=seed, sizes=sizes),
    ]


def build_task(
    spec: TaskSpec,
    rows: Sequence[tuple[str, str]],
    held_out: Sequence[tuple[str, str]] | None = None,
    *,
    seed: int,
    sizes: Sizes,
) -> TaskTexts:
    """Split (label, text) rows; rows of other tasks' labels are ignored.

    With `held_out`, `rows` are the training pool and the other splits come from `held_out`; else all come
    from `rows`. Raises CheckpointError if a class has no text or a pool is too small.
    """
    seen: set[str] = set()
    if held_out is None:
        pools = _partition(_distinct(spec, rows, seen), _POOLED)
    else:
        kept = _partition(_distinct(spec, held_out, seen), _HELD_OUT)
        pools = {"train": list(_distinct(spec, rows, seen).values())} | kept
    wanted = {split: int(getattr(sizes, split)) for split in SPLITS}
    problems = [
        f"split {split!r} needs {wanted[split]} different texts, found {len(pools[split])}"
        for split in SPLITS
        if len(pools[split]) < wanted[split]
    ]
    labels = {example.label for pool in pools.values() for example in pool}
    problems += [f"no text labelled {name!r} found" for i, name in enumerate(spec.classes) if i not in labels]
    if problems:
        raise CheckpointError.of(f"texts of task {spec.name!r}", problems)
    splits = {}
    for split in SPLITS:
        draw = random.Random(f"{spec.name}/{split}/{seed}")
        splits[split] = tuple(draw.sample(pools[split], wanted[split]))
    return TaskTexts(spec, splits)


def content_key(text: str) -> str:
    """What two texts share that count as one: the first words, less case, punctuation, links, handles."""
    plain = _NOISE.sub(" ", text[:_KEY_CHARACTERS].lower())
    return " ".join(_WORD.findall(plain)[:MAX_WORDS])


def read_tab(path: Path) -> list[tuple[str, str]]:
    """(label, text) rows of an Orange .tab file: names, types and roles of the columns, then the data."""
    rows = _read_csv(path, delimiter="\t", encoding="utf-8")
    if len(rows) < 4 or rows[0] != ["Category", "Text"] or rows[2][:1] != ["class"]:
        raise CheckpointError(
            f"{path}: expected a .tab file with columns Category and Text, their types and their roles, "
            f"then rows; found {len(rows)} rows, the first {str(rows[:3])[:200]}"
        )
    return _two_columns(path, rows[3:], label=0, text=1)


def read_tweets(path: Path) -> list[tuple[str, str]]:
    """(label, text) rows of the tweet file: CSV with columns sentiment, confidence and text.

    Its bytes were recoded more than once; what is left of characters beyond ASCII is dropped.
    """
    rows = _read_csv(path, delimiter=",", encoding="ascii")
    if len(rows) < 2 or rows[0] != ["sentiment", "confidence", "text"]:
        raise CheckpointError(
            f"{path}: expected CSV with columns sentiment, confidence, text; "
            f"found {len(rows)} rows, the first {str(rows[:1])[:200]}"
        )
    return [(label, html.unescape(text)) for label, text in _two_columns(path, rows[1:], label=0, text=2)]


def _read_csv(path: Path, *, delimiter: str, encoding: str) -> list[list[str]]:
    previous = csv.field_size_limit(_FIELD_LIMIT)
    try:
        with open(path, newline="", encoding=encoding, errors="ignore") as file:
            return list(csv.reader(file, delimiter=delimiter))
    except (OSError, csv.Error) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    finally:
        csv.field_size_limit(previous)


def _two_columns(path: Path, rows: Iterable[list[str]], *, label: int, text: int) -> list[tuple[str, str]]:
    """Label and text of every row; rows that are empty or lack the text are no texts at all."""
    found = [(row[label], row[text].strip()) for row in rows if len(row) > text and row[text].strip()]
    if not found:
        raise CheckpointError(f"{path}: no rows with a text")
    return found


def _distinct(spec: TaskSpec, rows: Iterable[tuple[str, str]], seen: set[str]) -> dict[str, Example]:
    """The task's texts by content key, in file order, none already seen.

    A key that occurs with two labels is dropped: nobody could tell its class.
    """
    index = {name: i for i, name in enumerate(spec.classes)}
    first: dict[str, Example] = {}
    ambiguous: set[str] = set()
    for label, text in rows:
        if label not in index:
            continue
        key = content_key(text)
        if key in seen or key.count(" ") < MIN_WORDS - 1:
            continue
        example = first.setdefault(key, Example(text, index[label]))
        if example.label != index[label]:
            ambiguous.add(key)
    seen.update(first)
    return {key: example for key, example in first.items() if key not in ambiguous}


def _partition(examples: Mapping[str, Example], shares: Mapping[str, float]) -> dict[str, list[Example]]:
    """Cut into shares in the order of a hash of the content, so that no seed moves a text to another pool."""
    keys = sorted(examples, key=lambda key: hashlib.sha256(key.encode()).digest())
    ordered = [examples[key] for key in keys]
    pools, start, cumulated = {}, 0, 0.0
    for name, share in shares.items():
        cumulated += share
        end = round(cumulated * len(ordered))
        pools[name] = ordered[start:end]
        start = end
    return pools
