"""`wemoe-fast adapt` on directories: what it writes, how it goes on, and the same on two processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import running, wait_for

from wemoe_fast import load
from wemoe_fast.benchmarks.faults_adapt import command, contents, write_problem
from wemoe_fast.cli import main
from wemoe_fast.errors import WEMoEError
from wemoe_fast.upscale import wemoe_layers


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("problem")
    write_problem(directory)
    return directory


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def routers(directory: Path) -> torch.Tensor:
    layers = wemoe_layers(load(directory)).values()
    return torch.cat([p.detach().reshape(-1) for layer in layers for p in layer.router.parameters()])


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_the_same_command_goes_on_and_leaves_what_is_finished(problem: Path, tmp_path: Path, capsys: Any) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(command(problem, whole, 3, steps=7)) == 0
    assert names(tmp_path) == ["whole", "whole.checkpoints"]
    assert names(tmp_path / "whole.checkpoints") == ["step-00000006", "step-00000007"]
    assert {"adaptation.json", "adaptation.png", "model.safetensors", "wemoe.json"} <= set(names(whole))
    assert "seconds" not in json.loads((whole / "adaptation.json").read_text())

    assert main(command(problem, parts, 2, steps=4)) == 0
    capsys.readouterr()
    assert main(command(problem, parts, 2, steps=7)) == 1
    assert "--overwrite" in capsys.readouterr().err, "4 steps were asked for and are there"
    assert main(command(problem, parts, 2, "--overwrite", steps=7)) == 0
    assert "7 steps, 4 of them done before" in capsys.readouterr().out
    assert contents(whole) == contents(parts)

    stamp = (parts / "adaptation.json").stat().st_mtime_ns
    assert main(command(problem, parts, 2, steps=7)) == 0
    assert "7 steps, 7 of them done before" in capsys.readouterr().out
    assert (parts / "adaptation.json").stat().st_mtime_ns == stamp

    assert main([*command(problem, parts, 2, "--overwrite", steps=7), "--lr", "0.02"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("wemoe-fast adapt: ")
    assert "lr: expected 0.01 as in that run, found 0.02" in error
    assert contents(whole) == contents(parts)
    assert main([*command(problem, parts, 2, "--overwrite", "--restart", steps=7), "--lr", "0.02"]) == 0
    assert contents(whole) != contents(parts)


def test_an_output_without_its_checkpoints_is_still_known(problem: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(command(problem, out, 2, steps=2)) == 0
    for path in (tmp_path / "out.checkpoints").rglob("*.json"):
        path.unlink()
    assert main(command(problem, out, 2, steps=2)) == 0
    assert main([*command(problem, out, 2, steps=2), "--seed", "4"]) == 1


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("--restart",), "expected checkpoint_every with it"),
        (("--min-delta", "0.1"), "min_delta: expected a patience with it"),
        (("--checkpoint-every", "2", "--out", "MERGED", "--overwrite"), "name another output"),
    ],
)
def test_what_is_refused(options: tuple[str, ...], part: str, problem: Path, tmp_path: Path, capsys: Any) -> None:
    before = contents(problem)
    arguments = ["adapt", problem / "merged", "--tasks", problem / "tasks.yaml", "--out", tmp_path / "out", *options]
    assert main([str(problem / "merged") if argument == "MERGED" else str(argument) for argument in arguments]) == 1
    assert part in capsys.readouterr().err
    assert contents(problem) == before
    assert not (tmp_path / "out").exists()


def test_a_plateau_ends_a_run(problem: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    assert main([*command(problem, out, 50), "--patience", "4", "--min-delta", "0.5"]) == 0
    assert "8 steps, stopped on a plateau" in capsys.readouterr().out
    found = json.loads((out / "adaptation.json").read_text())
    assert (found["steps"], found["stopped_early"], found["patience"]) == (8, True, 4)
    assert main([*command(problem, out, 50), "--patience", "4", "--min-delta", "0.5"]) == 0


def run(arguments: list[str]) -> int:
    return main(arguments)


@pytest.mark.parametrize("penalty", ["0", "5"])
def test_two_processes_give_the_routers_of_one(penalty: str, problem: Path, tmp_path: Path) -> None:
    """Batches of 3: shares of 2 and 1."""
    one, two = (command(problem, tmp_path / n, 4, "--drift-penalty", penalty, steps=10) for n in ("one", "two"))
    assert main(one) == 0
    with running(2, run, two) as processes:
        assert processes.results() == [0, 0]
    assert names(tmp_path) == ["one", "one.checkpoints", "two", "two.checkpoints"]
    assert names(tmp_path / "one.checkpoints") == names(tmp_path / "two.checkpoints")
    torch.testing.assert_close(routers(tmp_path / "one"), routers(tmp_path / "two"), rtol=1e-4, atol=1e-6)
    one, two = (json.loads((tmp_path / n / "adaptation.json").read_text()) for n in ("one", "two"))
    for name, values in one.pop("entropy").items():
        assert two["entropy"][name] == pytest.approx(values, rel=1e-4)
    assert two.pop("routing_drift") == pytest.approx(one.pop("routing_drift"), rel=1e-4)
    assert one["drift_penalty"] == float(penalty)
    assert two.pop("entropy").keys() == {"one", "two", "three"}
    assert one == two


def test_a_killed_process_ends_the_run_and_the_rerun_completes_it(problem: Path, tmp_path: Path) -> None:
    """A batch of 1 leaves the second process without a sample."""
    small = ["--batch-size", "1"]
    steps = 3000
    out, expected = tmp_path / "out", tmp_path / "expected"
    arguments = [*command(problem, out, 1, steps=steps), *small]
    store = tmp_path / "out.checkpoints"
    with running(2, refusing, arguments) as processes:
        wait_for(lambda: any(path.name > "step-00000003" for path in store.glob("step-*")))
        processes.kill(1)
        assert "another process of this run ended" in processes.result(0)
    assert not out.exists()
    done = max(int(path.name[-8:]) for path in store.glob("step-*"))
    assert 3 < done < steps - 5

    with running(2, run, [*command(problem, out, 1, steps=done + 2), *small]) as processes:
        assert processes.results() == [0, 0]
    assert main([*command(problem, out, 1, "--overwrite", steps=done + 4), *small]) == 0
    assert main([*command(problem, expected, 50, steps=done + 4), *small]) == 0
    torch.testing.assert_close(routers(out), routers(expected), rtol=1e-3, atol=1e-5)


def refusing(arguments: list[str]) -> str:
    """What ends up on stderr; the exit status is 1."""
    import io
    import sys

    sys.stderr = io.StringIO()
    status = main(arguments)
    assert status == 1
    return sys.stderr.getvalue()


def test_what_the_first_process_refuses_all_refuse(problem: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with running(2, refusing, command(problem, tmp_path / "out", 2)) as processes:
        assert ["--overwrite" in text for text in processes.results()] == [True, True]
    reduced = [*command(problem, tmp_path / "other", 2), "--routing", "batch_reduce"]
    with running(2, refusing, reduced) as processes:
        for text in processes.results():
            assert "batch_reduce needs the mean over the whole batch, of which each of 2 processes sees a share" in text
    assert not (tmp_path / "other").exists()


def different(problem: Path) -> None:
    import os

    from wemoe_fast.adapt import adapt
    from wemoe_fast.distributed import world
    from wemoe_fast.tasks import load_tasks

    with world() as processes:
        model = load(problem / "merged")
        tasks = load_tasks(problem / "tasks.yaml", problem / "merged")
        adapt(model, tasks, steps=1, seed=int(os.environ["RANK"]), world=processes, progress=False)


def test_processes_with_different_settings_are_refused(problem: Path) -> None:
    with running(2, different, problem) as processes:
        for rank in range(2):
            with pytest.raises(WEMoEError, match="process 1: expected the model, tasks and settings of process 0"):
                processes.result(rank)
