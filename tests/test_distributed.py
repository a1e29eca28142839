from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import running, wait_for

from wemoe_fast.distributed import World, world
from wemoe_fast.errors import InputError, WEMoEError

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_one_process_has_everything_and_starts_nothing() -> None:
    with world() as found:
        assert (found.rank, found.size, found.first, found.device) == (0, 1, True, torch.device("cpu"))
        tensor = torch.tensor([1.0, 2.0])
        assert found.add(tensor) is tensor
        assert found.share([3, 4]) == [3, 4]
        assert found.gather("x") == ["x"]
        assert found.on_first(lambda: 5) == 5
        found.wait()
        assert not dist.is_initialized()


def test_a_world_of_one_is_alone_even_with_torchruns_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with world() as found:
        assert found.size == 1
        assert not dist.is_initialized()


def test_shares_are_every_item_once() -> None:
    items = list(range(7))
    shares = [World(rank, 3).share(items) for rank in range(3)]
    assert shares == [[0, 3, 6], [1, 4], [2, 5]]
    assert World(2, 4).share([1, 2]) == []


def talk() -> dict[str, Any]:
    with world() as found:
        mine = torch.tensor([1.0, 10.0]) * (found.rank + 1)
        strided = torch.arange(6).view(2, 3).t()
        result: dict[str, Any] = {
            "rank": (found.rank, found.size, found.first),
            "add": found.add(mine).tolist(),
            "kept": mine.tolist(),
            "strided": found.add(strided).tolist(),
            "gather": found.gather({"rank": found.rank}),
            "on_first": found.on_first(lambda: os.getpid()),
            "pid": os.getpid(),
        }
        found.wait()
        try:
            found.on_first(refuse)
        except WEMoEError as error:
            result["refused"] = f"{type(error).__name__}: {error}"
        result["after"] = found.add(torch.ones(1)).item()
    result["left"] = not dist.is_initialized()
    return result


def refuse() -> None:
    raise InputError("the file is missing")


def test_two_processes_agree() -> None:
    with running(2, talk) as processes:
        found = processes.results()
    assert [result["rank"] for result in found] == [(0, 2, True), (1, 2, False)]
    assert [result["kept"] for result in found] == [[1.0, 10.0], [2.0, 20.0]]
    for result in found:
        assert result["add"] == [3.0, 30.0]
        assert result["strided"] == [[0, 6], [2, 8], [4, 10]]
        assert result["gather"] == [{"rank": 0}, {"rank": 1}]
        assert result["on_first"] == found[0]["pid"]
        assert result["refused"] == "InputError: the file is missing"
        assert result["after"] == 2.0
        assert result["left"]


def add_for_ever(directory: Path) -> None:
    with world() as found:
        while True:
            found.add(torch.ones(3))
            (directory / str(found.rank)).touch()
            time.sleep(0.01)


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_other_with_a_clear_word(killed: int, tmp_path: Path) -> None:
    with running(2, add_for_ever, tmp_path) as processes:
        wait_for(lambda: len(list(tmp_path.iterdir())) == 2)
        processes.kill(killed)
        with pytest.raises(WEMoEError, match=r"another process of this run ended .* start the same command again") as e:
            processes.result(1 - killed)
        assert ".cc:" not in str(e.value)


def leave_early() -> float:
    with world() as found:
        if found.rank == 1:
            raise InputError("this process alone has a broken file")
        return float(found.add(torch.ones(1)))


def test_a_process_that_fails_says_why_and_the_other_that_it_is_gone() -> None:
    with running(2, leave_early) as processes:
        with pytest.raises(InputError, match="broken file"):
            processes.result(1)
        with pytest.raises(WEMoEError, match="another process of this run ended"):
            processes.result(0)


def test_half_of_torchruns_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"MASTER_ADDR.*start the processes with torchrun"), world():
        pass


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match="expected a GPU for process 3 of this machine, found 2"), world("cuda"):
        pass
