from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from wemoe_fast import comparison, load
from wemoe_fast.benchmarks.project import write_project
from wemoe_fast.comparison import check_resumable, compare, speeds, write_comparison
from wemoe_fast.errors import CheckpointError
from wemoe_fast.evaluate import Evaluation
from wemoe_fast.tasks import load_tasks

pytest.importorskip("matplotlib")


@pytest.fixture
def results(tmp_path: Path) -> tuple[dict[str, Evaluation], dict[str, tuple[str, ...]]]:
    write_project(tmp_path, samples=12)
    tasks = load_tasks(tmp_path / "tasks.yaml", tmp_path / "model")
    return compare([("one", load(tmp_path / "model"))], tasks, progress=False)


def test_what_is_written(results: Any, tmp_path: Path) -> None:
    rows, experts = results
    files = write_comparison(rows, experts, tmp_path / "out")
    assert set(files) == {"metrics", "predictions", "table", "timing", "routing", "routing one"}
    lines = [json.loads(line) for line in files["predictions"].read_text().splitlines()]
    assert len(lines) == 24
    row = rows["one"]
    expected = {"row": "one", "task": "ragged", "index": 3, "label": "red"}
    assert lines[15] == expected | {"prediction": ("red", "green", "blue")[row.predictions["ragged"][3]]}
    right = [line["label"] == line["prediction"] for line in lines[:12]]
    metrics = json.loads(files["metrics"].read_text())["rows"]["one"]
    assert metrics["accuracy"]["still"] == sum(right) / 12
    assert "seconds" not in files["metrics"].read_text()
    routing = json.loads(files["routing"].read_text())
    assert routing["one"] == {"experts": list(experts["one"]), "tasks": metrics["routing"]}
    assert json.loads(files["timing"].read_text())["rows"]["one"]["computed"] == {"still": 12, "ragged": 12}


def test_metrics_come_last(results: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, experts = results
    out = tmp_path / "out"
    write_comparison(rows, experts, out)

    def fails(*_: object) -> None:
        raise OSError("stopped")

    monkeypatch.setattr(comparison, "write_routing", fails)
    with pytest.raises(OSError, match="stopped"):
        write_comparison(rows, experts, out, overwrite=True)
    assert not (out / "metrics.json").exists(), "old metrics beside new predictions"
    assert (out / "predictions.jsonl").exists()


def test_without_matplotlib_everything_but_the_pictures(
    results: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, experts = results
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.warns(RuntimeWarning, match=r'no heat maps without matplotlib: pip install "wemoe-fast\[plot\]"'):
        files = write_comparison(rows, experts, tmp_path / "out")
    assert set(files) == {"metrics", "predictions", "table", "timing", "routing"}
    assert all(path.is_file() for path in files.values())


def test_where_an_evaluation_may_go_on(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert check_resumable(out) == out / "records"
    (out / "records").mkdir(parents=True)
    (out / "predictions.jsonl").touch()
    assert check_resumable(out) == out / "records"
    (out / "metrics.json").touch()
    with pytest.raises(CheckpointError, match=r"this evaluation is complete; .*--overwrite"):
        check_resumable(out)
    check_resumable(out, overwrite=True)
    os.unlink(out / "metrics.json")
    (out / "thesis.tex").touch()
    with pytest.raises(CheckpointError, match="expected a new or empty directory"):
        check_resumable(out)


def test_speeds() -> None:
    rows = {
        "a": Evaluation(n={"x": 1500, "y": 500}, computed={"x": 1000, "y": 0}, task_seconds={"x": 4.0, "y": 0.0}),
        "b": Evaluation(n={"x": 3}, computed={"x": 0}, task_seconds={"x": 0.01}),
    }
    assert speeds(rows).splitlines()[2:] == [
        "a        2,000            1,000      4.0               250.0",
        "b            3                3      0.0                   -",
    ]
