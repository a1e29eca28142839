"""The ablation on a tiny model and tasks made up in their place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import test_vision

from benchmarks import ablation, vision
from benchmarks.ablation import SETTINGS, TOLD, Ablation, Experiment, First, OutOfTimeError, Setting
from wemoe_fast.demo.run import EXPERTS_ROW
from wemoe_fast.tasks import TensorSamples

pytestmark = pytest.mark.usefixtures("one_thread")

SOME = [
    Setting("published, lr 1e-3", 1e-3),
    Setting("softmax", 1e-2, {"router_depth": 1, "normalization": "softmax"}),
    Setting("penalty", 1e-3, {"router_depth": 1}, {"drift_penalty": 1.0}),
]


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    cache = tmp_path_factory.mktemp("cache")

    def prepare(out: Path, seed: int) -> Any:
        return vision.prepare(
            test_vision.pools(), cache, out, seed=seed, sizes=test_vision.SIZES, training=test_vision.TINY,
            progress=False,
        )  # fmt: skip

    return Experiment("tiny", prepare, (1, 3), tuning=10)


@pytest.fixture(scope="module")
def content(experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("out")
    return out, Ablation(experiment, out, seeds=(0, 1), settings=SOME).run()


def test_rows_means_and_deviations(content: tuple[Path, dict[str, Any]]) -> None:
    _, found = content
    assert found["n"]["tuning"] == dict.fromkeys(found["n"]["test"], 10)
    assert set(found["tuning"]) == {s.name for s in SOME}
    for name, by_steps in found["tuning"].items():
        assert set(by_steps) == {"1", "3"}
        best = max(summary["mean"] for summary in by_steps.values())
        assert by_steps[str(found["steps"][name])]["mean"] == best
        for summary in by_steps.values():
            a, b = summary["by_seed"]
            assert summary["mean"] == pytest.approx((a + b) / 2)
            assert summary["std"] == pytest.approx(abs(a - b) / 2**0.5)
    compared = {"pretrained", "weight average", "task arithmetic 0.3", TOLD, EXPERTS_ROW}
    assert set(found["test"]) == compared | set(found["chosen"])
    assert {"published, lr 1e-3", "penalty"} <= set(found["chosen"])
    assert found["settings"]["penalty"]["adapt"] == {"drift_penalty": 1.0}
    told, experts = found["test"][TOLD], found["test"][EXPERTS_ROW]
    assert told["mean"] == pytest.approx(experts["mean"], abs=0.02), "experts differ from the base in their MLPs alone"
    text = ablation.table(found)
    assert [line.split("  ")[0] for line in text.splitlines()[2:]][-1] == EXPERTS_ROW
    assert " ± " in text
    assert ablation.table(found, markdown=True).count("\n") == len(text.splitlines()) - 1


def test_test_samples_are_read_for_what_was_chosen_alone(content: tuple[Path, dict[str, Any]]) -> None:
    out, found = content
    cells = [path.stem for path in (out / "tiny" / "cells").glob("*-test.json")]
    assert len(cells) == 2 * (1 + len(found["chosen"]))
    assert len(list((out / "tiny" / "cells").glob("*-tuning.json"))) == 2 * 2 * len(SOME)


def test_nothing_is_computed_twice_and_a_run_goes_on(
    experiment: Experiment, content: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = Ablation(experiment, tmp_path, seeds=(0, 1), settings=SOME, minutes=0)
    with pytest.raises(OutOfTimeError):
        begun.run()
    begun._until = float("inf")
    first = begun.cell(SOME[1], 3, 0, "tuning")
    out, found = content
    monkeypatch.setattr(ablation, "adapt", lambda *_, **__: pytest.fail("adapted twice"))
    monkeypatch.setattr(ablation, "evaluate", lambda *_, **__: pytest.fail("evaluated twice"))
    again = Ablation(experiment, out, seeds=(0, 1), settings=SOME, minutes=0)
    assert again.run() | {"environment": found["environment"]} == found
    assert again.cell(SOME[1], 3, 0, "tuning") == first, "as one run of 3 steps gives, so does one that went on from 1"


def test_one_seed_has_no_deviation() -> None:
    assert ablation._summary([{"mean": 0.5, "accuracy": {"a": 0.5}}])["std"] == 0


def test_settings_have_names_of_their_own_and_are_picked_by_them() -> None:
    assert len({s.name for s in SETTINGS}) == len(SETTINGS)
    assert sum(s.published for s in SETTINGS) == 2
    assert [s.name for s in ablation._picked(["published, lr"])] == ["published, lr 1e-4", "published, lr 1e-3"]
    assert len(ablation._picked([""])) == len(SETTINGS)


def test_what_is_unknown_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ablation.main(["text", "--out", str(tmp_path), "--settings", "hardmax"]) == 1
    assert "no name begins with hardmax; there are published" in capsys.readouterr().err


def test_the_first_samples() -> None:
    whole = TensorSamples({"x": torch.arange(5.0)}, torch.arange(5))
    assert len(First(whole, 3)) == 3
    assert len(First(whole, 9)) == 5
    assert First(whole, 3).batch([2])[0]["x"].tolist() == [2.0]


def test_a_table_is_written(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ablation, "experiments", lambda *_: {"vision": experiment})
    arguments = ["vision", "--out", str(tmp_path), "--seeds", "0", "--settings", "softmax, lr 5e-3"]
    assert ablation.main([*arguments, "--minutes", "0"]) == 2
    assert "the same command goes on" in capsys.readouterr().err
    assert ablation.main(arguments) == 0
    assert "softmax, lr 5e-3" in capsys.readouterr().out
    assert json.loads((tmp_path / "ablation-vision.json").read_text())["experiment"] == "tiny"
    assert ablation.main(["table", "--out", str(tmp_path)]) == 0
    assert "| softmax, lr 5e-3 |" in capsys.readouterr().out
    assert ablation.main(["table", "--out", str(tmp_path / "vision")]) == 1


def test_experiments_beside_each_other() -> None:
    row = {"mean": 0.5, "std": 0.1, "drift": 1.0}
    one = {
        "experiment": "one", "steps": {"a": 3, "b": 5}, "tuning": {"a": {"3": row}, "b": {"5": row | {"mean": 0.4}}},
        "test": {"b": row, "experts": row},
    }  # fmt: skip
    head, _, *rows = ablation.table(one, one | {"experiment": "two", "test": {"experts": row}}).splitlines()
    assert "one: steps" in head
    assert "two: test" in head
    assert [line.split()[0] for line in rows] == ["b", "a", "experts"], (
        "from worst to best, then what they are compared with"
    )
    assert [line.count(" ± ") for line in rows] == [3, 2, 2]
