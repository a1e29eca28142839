"""One evaluation on two processes (gloo), as torchrun starts them: the same bytes, whoever did what and was lost."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.synthetic import write_project
from wemoe_fast.errors import InputError
from wemoe_fast.evaluate import evaluate

pytest.importorskip("matplotlib")
COMPARED = ("metrics.json", "predictions.jsonl", "routing.json", "table.md")
STALLING = """
import os, time
from ragged_samples import task as whole

def task():
    made = whole()
    batch = made.data.batch

    def stalling(indices):
        if os.environ.get("RANK") == os.environ.get("STALLED_RANK") and indices[0] in made.stalled:
            time.sleep(600)
        return batch(indices)

    made.data.batch, made.stalled = stalling, {65, 66}
    return made
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("project")
    write_project(directory, samples=90, batch_size=4)
    return directory


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def start(project: Path, out: Path, size: int, tasks: str = "tasks.yaml", **more: str) -> list[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "wemoe_fast", "evaluate", "model", "--tasks", tasks, "--out", str(out)]
    settings = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **more}
    return [
        subprocess.Popen(
            [*command, "--threads", "1", "--quiet"],
            cwd=project,
            env={**os.environ, **settings, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def finish(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    done = [process.communicate(timeout=120) for process in processes]
    return [(process.returncode, *texts) for process, texts in zip(processes, done, strict=True)]


def contents(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in COMPARED}


def computed(out: Path) -> int:
    (row,) = json.loads((out / "timing.json").read_text())["rows"].values()
    return sum(row["computed"].values())


@pytest.fixture(scope="module")
def expected(project: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("alone") / "out"
    ((status, _, error),) = finish(start(project, out, 1))
    assert status == 0, error
    return contents(out)


def test_two_processes_write_what_one_writes(project: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    (status, shown, error), (other, silent, _) = finish(start(project, tmp_path / "out", 2))
    assert (status, other) == (0, 0), error
    assert "samples per second" in shown
    assert silent == ""
    assert contents(tmp_path / "out") == expected
    assert computed(tmp_path / "out") == 180
    files = sorted(path.name for path in tmp_path.glob("out/records/*/*"))
    assert files == ["process-00000.jsonl"] * 2 + ["process-00001.jsonl"] * 2 or len(files) == 4


def test_a_lost_process_ends_the_run_and_one_alone_completes_it(
    project: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    (project / "stalling_samples.py").write_text(STALLING)
    tasks = (project / "tasks.yaml").read_text().replace("ragged_samples:task", "stalling_samples:task")
    (project / "lost").mkdir(exist_ok=True)
    (project / "stalling.yaml").write_text(tasks)
    out = tmp_path / "out"
    kept, lost = processes = start(project, out, 2, "stalling.yaml", STALLED_RANK="1")
    end = time.monotonic() + 60
    while len(list(out.glob("records/*/process-00001.jsonl"))) < 2 and time.monotonic() < end:
        assert kept.poll() is None
        time.sleep(0.02)
    os.kill(lost.pid, signal.SIGKILL)
    (status, _, error), (killed, _, _) = finish(processes)
    assert killed == -signal.SIGKILL
    assert status == 1
    assert "another process of this run ended" in error
    assert "start the same command again" in error
    assert not (out / "metrics.json").exists()

    ((status, _, error),) = finish(start(project, out, 1, "stalling.yaml"))
    assert status == 0, error
    assert 0 < computed(out) < 90, "all of the first task and much of the second were recorded"
    found = contents(out)
    assert found.pop("metrics.json").replace(b"stalling.yaml", b"tasks.yaml") == expected["metrics.json"]
    assert found == {name: content for name, content in expected.items() if name != "metrics.json"}


def test_processes_that_compute_differently_are_refused() -> None:
    import torch

    from wemoe_fast.distributed import World
    from wemoe_fast.tasks import Head, Task, TensorSamples

    class Two(World):
        def gather(self, value: object) -> list[object]:
            return [value, ["another key", {"threads": 7}]] if isinstance(value, list) else [value, value]

    task = Task(
        "t",
        Head(torch.ones(2, 4), None, ("a", "b"), pooling="none"),
        TensorSamples({"input": torch.ones(3, 4)}, torch.tensor([0, 1, 0])),
    )
    with pytest.raises(InputError, match=r"task 't': the processes of a run need the same model.*\n.*\n.*'threads': 7"):
        evaluate(torch.nn.Linear(4, 4), [task], records="nowhere", world=Two(0, 2), progress=False)
