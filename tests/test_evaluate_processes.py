"""One evaluation on two processes (gloo), as torchrun starts them: the same bytes, whoever did what and was lost."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch

from wemoe_fast.benchmarks.project import write_project
from wemoe_fast.cli import main
from wemoe_fast.distributed import World
from wemoe_fast.errors import InputError
from wemoe_fast.evaluate import evaluate
from wemoe_fast.tasks import Head, Task, TensorSamples

pytest.importorskip("matplotlib")
if "forkserver" not in multiprocessing.get_all_start_methods():
    pytest.skip("forks processes", allow_module_level=True)
COMPARED = ("metrics.json", "predictions.jsonl", "routing.json", "table.md")
STALLING = """
import os, time
from {module} import task as whole

def task():
    made = whole()
    batch = made.data.batch

    def stalling(indices):
        if made.stalled in indices and os.environ.get("STALLED_RANK", "none") == os.environ.get("RANK"):
            time.sleep(600)
        return batch(indices)

    made.data.batch, made.stalled = stalling, 57
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


def arguments(project: Path, out: Path, tasks: str) -> list[str]:
    named = ["evaluate", project / "model", "--tasks", project / tasks, "--out", out, "--threads", "1", "--quiet"]
    return [str(argument) for argument in named]


def alone(project: Path, out: Path, tasks: str = "tasks.yaml") -> None:
    threads = torch.get_num_threads()
    try:
        assert main(arguments(project, out, tasks)) == 0
    finally:
        torch.set_num_threads(threads)


def rank(arguments: list[str], settings: dict[str, str], shown: Path) -> None:
    """One process: the verb, its output in files."""
    os.environ.update(settings)
    for stream, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(shown.with_suffix(suffix), os.O_WRONLY | os.O_CREAT, 0o666), stream)
    raise SystemExit(main(arguments))


class Run:
    """Processes forked from a server that has imported what they need."""

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["wemoe_fast.cli", "torch._dynamo", "matplotlib.figure", "matplotlib.backends.backend_agg"]
    )

    def __init__(self, project: Path, out: Path, size: int, tasks: str = "tasks.yaml", **more: str) -> None:
        settings = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **more}
        self._shown = [out.parent / f"{out.name}-{size}-{number}" for number in range(size)]
        ranks = [settings | {"RANK": str(number), "LOCAL_RANK": str(number)} for number in range(size)]
        self.processes = [
            self.context.Process(target=rank, args=(arguments(project, out, tasks), own, shown))
            for own, shown in zip(ranks, self._shown, strict=True)
        ]
        for process in self.processes:
            process.start()

    def finish(self) -> list[tuple[int | None, str, str]]:
        """Exit status, stdout and stderr of every process."""
        for process in self.processes:
            process.join(120)
        texts = [[shown.with_suffix(suffix).read_text() for suffix in (".out", ".err")] for shown in self._shown]
        return [(process.exitcode, out, err) for process, (out, err) in zip(self.processes, texts, strict=True)]


def contents(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in COMPARED}


def computed(out: Path) -> int:
    (row,) = json.loads((out / "timing.json").read_text())["rows"].values()
    return sum(row["computed"].values())


@pytest.fixture(scope="module")
def expected(project: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("alone") / "out"
    alone(project, out)
    return contents(out)


def test_two_processes_write_what_one_writes(project: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    (status, shown, error), (other, silent, _) = Run(project, tmp_path / "out", 2).finish()
    assert (status, other) == (0, 0), error
    assert "samples per second" in shown
    assert silent == ""
    assert contents(tmp_path / "out") == expected
    assert computed(tmp_path / "out") == 180
    files = sorted(path.name for path in tmp_path.glob("out/records/*/*"))
    assert files == ["process-00000.jsonl"] * 2 + ["process-00001.jsonl"] * 2

    half = max(tmp_path.glob("out/records/*/process-00001.jsonl"))
    half.write_bytes(half.read_bytes()[: half.stat().st_size // 2])
    (tmp_path / "out" / "metrics.json").unlink()
    (status, _, error), _ = Run(project, tmp_path / "out", 2).finish()
    assert status == 0, error
    assert contents(tmp_path / "out") == expected
    assert 0 < computed(tmp_path / "out") < 45, "what both find recorded is counted once and not computed again"


def test_a_lost_process_ends_the_run_and_one_alone_completes_it(
    project: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    (ragged,) = project.glob("ragged_*.py")
    (project / "stalling_samples.py").write_text(STALLING.format(module=ragged.stem))
    tasks = (project / "tasks.yaml").read_text().replace(ragged.stem, "stalling_samples")
    (project / "stalling.yaml").write_text(tasks)
    out = tmp_path / "out"
    run = Run(project, out, 2, "stalling.yaml", STALLED_RANK="1")
    kept, lost = run.processes
    end = time.monotonic() + 60
    while len(list(out.glob("records/*/process-00001.jsonl"))) < 2 and time.monotonic() < end:
        assert kept.is_alive()
        time.sleep(0.02)
    lost.kill()
    (status, _, error), (killed, _, _) = run.finish()
    assert killed == -signal.SIGKILL
    assert status == 1
    assert "another process of this run ended" in error
    assert "start the same command again" in error
    assert not (out / "metrics.json").exists()

    alone(project, out, "stalling.yaml")
    assert 0 < computed(out) < 90, "all of the first task and much of the second were recorded"
    found = contents(out)
    assert found.pop("metrics.json").replace(b"stalling.yaml", b"tasks.yaml") == expected["metrics.json"]
    assert found == {name: content for name, content in expected.items() if name != "metrics.json"}


def test_processes_that_compute_differently_are_refused() -> None:
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
