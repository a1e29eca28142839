import importlib.util
import subprocess
import sys

import pytest

from wemoe_fast.benchmarks import faults


@pytest.fixture
def commands(monkeypatch):
    """What would be run; the verb that is named here fails."""
    run, failing = [], []

    def pretend(command, check):
        run.append(command)
        return subprocess.CompletedProcess(command, int(any(f"_{verb}" in command[2] for verb in failing)))

    monkeypatch.setattr(faults.subprocess, "run", pretend)
    return run, failing


def test_every_verb_is_killed_as_often(commands, tmp_path):
    run, _ = commands
    assert faults.main(["--kills", "7", "--seed", "3", "--out", str(tmp_path)]) == 0
    for verb, command in zip(("merge", "adapt", "evaluate"), run, strict=True):
        module = f"wemoe_fast.benchmarks.faults_{verb}"
        assert importlib.util.find_spec(module) is not None
        options = ["--kills", "7", "--seed", "3", "--out", str(tmp_path / f"faults-{verb}.json")]
        assert command == [sys.executable, "-m", module, *options]


@pytest.mark.parametrize("verb", faults.VERBS)
def test_one_failure_is_a_failure_of_all_and_ends_nothing(commands, verb):
    run, failing = commands
    failing.append(verb)
    assert faults.main(["--kills", "1"]) == 1
    assert len(run) == 3
    assert not any("--out" in command for command in run)
