from __future__ import annotations

from pathlib import Path

import pytest

from wemoe_fast.benchmarks import faults_adapt
from wemoe_fast.benchmarks.faults_adapt import contents, faults, kill_and_finish


def test_killed_runs_end_as_if_nobody_had_disturbed_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults_adapt, "STEPS", 12)
    kills, seconds = faults(3, tmp_path, progress=False)
    assert [kill.differences for kill in kills] == [(), (), ()]
    assert all(kill.identical for kill in kills)
    assert set(seconds) == {1, 2}


def test_a_difference_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults_adapt, "STEPS", 2)
    faults_adapt.write_problem(tmp_path / "problem")
    expected = {"adapted/adaptation.json": b"{}", "lost": b""}
    kill = kill_and_finish(tmp_path / "problem", tmp_path / "run", 1, 0.0, expected)
    assert kill is not None
    assert not kill.identical
    assert {"adapted/adaptation.json", "lost", "adapted/model.safetensors"} <= set(kill.differences)
    (tmp_path / "run" / "empty").mkdir()
    assert "empty/" in contents(tmp_path / "run")
