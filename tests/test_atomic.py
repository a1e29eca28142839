import os
import subprocess
import sys
import threading

import pytest

from wemoe_fast import CheckpointError, atomic
from wemoe_fast.atomic import leftovers, locked, remove_leftovers, replaced_directory


def write(directory, text, overwrite=True):
    with replaced_directory(directory, overwrite=overwrite) as target:
        (target / "file").write_text(text)


def killed(directory):
    """What a process leaves that is killed while it writes."""
    code = f"""
import os, pathlib
from wemoe_fast.atomic import replaced_directory
with replaced_directory(pathlib.Path({str(directory)!r}), overwrite=True) as target:
    (target / "half").write_text("half")
    os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 9


@pytest.mark.parametrize("exchange", [True, False])
def test_a_directory_is_replaced_as_a_whole(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    out = tmp_path / "deep" / "out"
    for text in ("one", "two"):
        write(out, text)
        assert (out / "file").read_text() == text
        assert list(out.parent.iterdir()) == [out]


def test_there_is_no_moment_without_a_directory(tmp_path):
    out = tmp_path / "out"
    write(out, "0")
    stop, missing, seen = threading.Event(), [], 0

    def watch():
        nonlocal seen
        while not stop.is_set():
            seen += 1
            if not out.exists():
                missing.append(seen)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for number in range(100):
        write(out, str(number))
    stop.set()
    watcher.join()
    assert seen > 100
    assert not missing


def test_everything_is_on_the_disk_before_it_is_renamed_and_the_name_after(tmp_path, monkeypatch):
    steps, fsync, exchange = [], os.fsync, atomic._exchange
    write(tmp_path / "out", "old")
    monkeypatch.setattr(os, "fsync", lambda fd: steps.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))))
    monkeypatch.setattr(atomic, "_exchange", lambda one, other: steps.append("exchange") or exchange(one, other))
    with replaced_directory(tmp_path / "out", overwrite=True) as target:
        (target / "inner").mkdir()
        (target / "inner" / "file").write_text("x")
        name = target.name
    assert steps == ["file", "inner", name, "exchange", tmp_path.name]
    assert fsync is not os.fsync


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path):
    out = tmp_path / "out"
    write(out, "old")
    (tmp_path / ".out.partial-mine").write_text("not ours: another name")
    (tmp_path / ".outer.partial-12345678").mkdir()
    killed(out)
    [left] = leftovers(out)
    assert (left / "half").is_file()
    assert (out / "file").read_text() == "old"
    write(out, "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.partial-mine", ".outer.partial-12345678", "out"]


def test_a_living_writer_is_left_alone(tmp_path):
    out = tmp_path / "out"
    with replaced_directory(out, overwrite=True) as target:
        (target / "file").write_text("mine")
        remove_leftovers(out)
        write(out, "another's")
        assert (target / "file").read_text() == "mine"
        assert (out / "file").read_text() == "another's"
    assert (out / "file").read_text() == "mine"


def test_a_lock_lasts_until_it_is_closed(tmp_path):
    lock = locked(tmp_path)
    assert lock is not None
    with pytest.raises(BlockingIOError):
        locked(tmp_path)
    os.close(lock)
    again = locked(tmp_path)
    assert again is not None
    os.close(again)


def test_a_file_system_without_locks_will_do(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "fcntl", None)
    (tmp_path / ".out.partial-12345678").mkdir()
    write(tmp_path / "out", "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.partial-12345678", "out"]


@pytest.mark.parametrize("there", [True, False])
def test_a_replacement_killed_between_its_two_renames_is_ended(tmp_path, there):
    """Where the system cannot exchange two directories in one step."""
    out, retired = tmp_path / "out", tmp_path / ".out.replaced"
    retired.mkdir()
    (retired / "file").write_text("old")
    if there:
        out.mkdir()
        (out / "file").write_text("new")
    with pytest.raises(KeyError), replaced_directory(out, overwrite=True):
        raise KeyError
    assert (out / "file").read_text() == ("new" if there else "old")
    assert list(tmp_path.iterdir()) == [out]


def test_an_interrupt_leaves_nothing(tmp_path):
    write(tmp_path / "out", "old")

    def interrupted():
        with replaced_directory(tmp_path / "out", overwrite=True) as target:
            (target / "half").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "file"]


def test_without_overwrite_nothing_is_replaced(tmp_path):
    write(tmp_path / "out", "old")
    with pytest.raises(CheckpointError, match="--overwrite"):
        write(tmp_path / "out", "new", overwrite=False)
    assert (tmp_path / "out" / "file").read_text() == "old"
