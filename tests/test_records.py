"""Records on disk, and what becomes of an evaluation when they, or its tasks.yaml, are damaged."""

from __future__ import annotations

import json
import os
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wemoe_fast import load
from wemoe_fast.benchmarks.project import write_project
from wemoe_fast.errors import CheckpointError, ConfigError, WEMoEError
from wemoe_fast.evaluate import evaluate
from wemoe_fast.records import Record, RecordLog
from wemoe_fast.tasks import load_tasks

LIGHT = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
RECORD = Record(3, [4, 9], [0, 1], [1, 1], {"layer": [0.1, 1 / 3, 2.0]})


def written(directory: Path, *records: Record, key: str = "key", process: int = 0) -> Path:
    with RecordLog(directory, key, process) as log:
        for record in records:
            log.append(record)
    return directory / f"process-{process:05d}.jsonl"


def read(directory: Path, key: str = "key") -> list[Record]:
    return list(RecordLog(directory, key).read())


def numbered(n: int) -> list[Record]:
    return [replace(RECORD, batch=number) for number in range(n)]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert read(tmp_path) == []
    written(tmp_path, RECORD, process=1)
    written(tmp_path, *numbered(2), process=0)
    other = replace(RECORD, batch=7, data="digest", routing={})
    written(tmp_path, other, process=0)
    assert read(tmp_path) == [*numbered(2), other, RECORD]


def test_a_record_can_be_read_when_append_returns_and_is_soon_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    path = tmp_path / "process-00000.jsonl"
    with RecordLog(tmp_path, "key") as log:
        for record in numbered(3):
            log.append(record)
            assert read(tmp_path)[-1] == record
            size, end = path.stat().st_size, time.monotonic() + 10
            while synced[-1:] != [size] and time.monotonic() < end:
                time.sleep(0.001)
            assert synced[-1] == size, "not only at the end"
        log.append(RECORD)
    assert synced[-1] == path.stat().st_size


def test_a_line_cut_off_at_the_end_is_nothing_and_makes_room(tmp_path: Path) -> None:
    whole = written(tmp_path, *numbered(3)).read_bytes()
    last = whole[:-1].rfind(b"\n") + 1
    path = tmp_path / "process-00000.jsonl"
    for size in {last, last + 1, last + 9, len(whole) - 1}:
        path.write_bytes(whole[:size])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert read(tmp_path) == numbered(2)
            written(tmp_path, RECORD)
            assert read(tmp_path) == [*numbered(2), RECORD]
    path.write_bytes(b"x" * 200_000)
    assert len(written(tmp_path, RECORD).read_bytes()) < 200, "nothing is left of it"
    assert read(tmp_path) == [RECORD]


def test_two_runs_at_once_do_not_harm_each_other(tmp_path: Path) -> None:
    with RecordLog(tmp_path, "key") as one, RecordLog(tmp_path, "key") as other:
        for first, second in zip(numbered(3), numbered(3), strict=True):
            one.append(first)
            other.append(second)
    assert read(tmp_path) == [record for record in numbered(3) for _ in range(2)]


def test_a_damaged_line_is_left_out_with_a_warning(tmp_path: Path) -> None:
    path = written(tmp_path, *numbered(3))
    lines = path.read_bytes().splitlines(keepends=True)
    for position in range(len(lines[1]) - 1):
        damaged = bytearray(lines[1])
        damaged[position] ^= 1
        if 10 in damaged[:-1]:
            continue
        path.write_bytes(lines[0] + damaged + lines[2])
        with pytest.warns(RuntimeWarning, match=r"00000\.jsonl: 1 damaged records \(line 2\) are left out"):
            assert read(tmp_path) == [numbered(3)[0], numbered(3)[2]]


def test_records_of_another_key_are_not_believed(tmp_path: Path) -> None:
    written(tmp_path, RECORD)
    with pytest.warns(RuntimeWarning, match="damaged"):
        assert read(tmp_path, "another key") == []


@pytest.mark.parametrize(
    "content",
    [
        [],
        {},
        {"batch": 1},
        {"batch": "1"},
        {"samples": [1.5, 2]},
        {"samples": [1]},
        {"labels": None},
        {"routing": [1]},
        {"routing": {"layer": ["a"]}},
        {"more": 1},
    ],
)
def test_a_line_with_a_right_checksum_and_other_content(tmp_path: Path, content: Any, monkeypatch: Any) -> None:
    line = content if isinstance(content, list) or len(content) < 1 else vars(RECORD) | content
    monkeypatch.setattr("wemoe_fast.records.vars", lambda _: line, raising=False)
    written(tmp_path, RECORD)
    if content == {"batch": 1}:
        assert [record.batch for record in read(tmp_path)] == [1]
        return
    with pytest.warns(RuntimeWarning, match="damaged"):
        assert read(tmp_path) == []


def test_files_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "process-00000.jsonl").mkdir()
    with pytest.raises(CheckpointError, match=r"process-00000\.jsonl: records cannot be read"):
        read(tmp_path)
    with pytest.raises(CheckpointError, match=r"process-00000\.jsonl: records cannot be written"):
        written(tmp_path, RECORD)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be written"):
        written(tmp_path / "file", RECORD)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="records cannot be written: No space left on device"):
        written(tmp_path / "new", RECORD)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("project")
    write_project(directory, samples=20, batch_size=4)
    return directory


def mutations(content: bytes) -> st.SearchStrategy[bytes]:
    """Bytes changed, taken out, doubled or put in; a cut; lines in another order."""
    place = st.integers(0, len(content) - 1)
    lines = content.splitlines(keepends=True)
    return st.one_of(
        st.builds(lambda at, value: content[:at] + bytes([value]) + content[at + 1 :], place, st.integers(0, 255)),
        st.builds(lambda at, size: content[:at] + content[at + size :], place, st.integers(1, 40)),
        st.builds(lambda at, size: content[: at + size] + content[at:], place, st.integers(1, 300)),
        st.builds(lambda at, text: content[:at] + text + content[at:], place, st.binary(min_size=1, max_size=12)),
        st.builds(lambda at: content[:at], place),
        st.permutations(lines).map(b"".join),
    )


@LIGHT
@given(st.data())
def test_no_damage_to_records_changes_a_result(project: Path, data: st.DataObject) -> None:
    torch.set_num_threads(1)
    model = load(project / "model")
    tasks = load_tasks(project / "tasks.yaml", project / "model")
    records = project / "records"
    expected = evaluate(model, tasks, progress=False, records=records)
    files = sorted(records.glob("*/*.jsonl"))
    before = {path: path.read_bytes() for path in files}
    path = data.draw(st.sampled_from(files))
    path.write_bytes(data.draw(mutations(before[path])))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        found = evaluate(model, tasks, progress=False, records=records)
    assert json.dumps(found.to_json(predictions=True)) == json.dumps(expected.to_json(predictions=True))
    for path, content in before.items():
        path.write_bytes(content)


@LIGHT
@given(st.data())
def test_a_mutated_tasks_yaml_works_or_gives_one_error(project: Path, data: st.DataObject) -> None:
    content = (project / "tasks.yaml").read_bytes()
    path = project / "mutated.yaml"
    path.write_bytes(data.draw(mutations(content)))
    refused: WEMoEError | None = None
    try:
        tasks = load_tasks(path, project / "model")
    except WEMoEError as error:
        refused = error
    if refused is None:
        assert all(len(task.data) == 20 for task in tasks)
    else:
        assert isinstance(refused, (ConfigError, CheckpointError)) or "entry" in str(refused), refused
