from __future__ import annotations

import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_adapt import Poison, build, make_tasks, routers, same
from torch import Tensor, nn

from wemoe_fast.adapt import Adaptation, adapt
from wemoe_fast.adapt_state import (
    JSON_FILE,
    TENSORS_FILE,
    Checkpoints,
    State,
    fingerprint,
    generators,
    set_generators,
)
from wemoe_fast.errors import CheckpointError, WEMoEError
from wemoe_fast.tasks import Head, Task, TensorSamples
from wemoe_fast.upscale import wemoe_layers

FINGERPRINT = {"model": "m", "tasks": {"one": "1", "two": "2"}, "settings": {"lr": 0.1}}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Many threads take longer for models this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def state(step: int) -> State:
    return State(step, {"router.a": torch.full((3,), float(step))}, {"fingerprint": FINGERPRINT})


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def run(directory: Path, *, every: int = 2, model: nn.Module | None = None, **options: Any) -> tuple[Any, Adaptation]:
    model = build() if model is None else model
    settings: dict[str, Any] = {"lr": 0.02, "batch_size": 4, "seed": 1, "progress": False, **options}
    found = adapt(
        model, settings.pop("tasks", None) or make_tasks(), checkpoints=Checkpoints(directory, every=every), **settings
    )
    return routers(model), found


def test_what_is_written_is_read_and_the_newest_two_are_kept(tmp_path: Path) -> None:
    with Checkpoints(tmp_path / "c") as store:
        assert store.read(FINGERPRINT, 100) is None
        for step in (1, 2, 3):
            store.write(state(step))
        assert names(tmp_path / "c") == ["step-00000002", "step-00000003"]
        found = store.read(FINGERPRINT, 100)
        assert found is not None
        assert found.step == 3
        assert torch.equal(found.tensors["router.a"], torch.full((3,), 3.0))
        older = store.read(FINGERPRINT, 2)
        assert older is not None
        assert older.step == 2
        with pytest.raises(CheckpointError, match=r"its checkpoints have 2 and 3 steps, more than the 1 asked for"):
            store.read(FINGERPRINT, 1)


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def flip(path: Path) -> None:
    """One bit: of the last number, or of a setting that goes on being JSON."""
    content = bytearray(path.read_bytes())
    content[content.find(b'"lr": 0.1') + 8 if path.name == JSON_FILE else -1] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("file", [JSON_FILE, TENSORS_FILE])
@pytest.mark.parametrize("damage", [cut, flip, Path.unlink, lambda path: path.write_bytes(b"")])
def test_a_damaged_newest_gives_way_to_the_one_before(file: str, damage: Callable[[Path], Any], tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as store:
        store.write(state(2))
        store.write(state(4))
        damage(tmp_path / "step-00000004" / file)
        with pytest.warns(UserWarning, match=r"step-00000004.*the checkpoint before it is tried"):
            found = store.read(FINGERPRINT, 100)
        assert found is not None
        assert found.step == 2
        store.write(state(3))
        assert names(tmp_path) == ["step-00000002", "step-00000003"], "the damaged one is of no use"


def test_without_any_complete_checkpoint_nothing_is_begun_anew_unasked(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as store:
        store.write(state(2))
        (tmp_path / "step-00000002" / JSON_FILE).unlink()
        with pytest.warns(UserWarning, match="damaged"), pytest.raises(CheckpointError, match="no checkpoint in it is"):
            store.read(FINGERPRINT, 100)
    with Checkpoints(tmp_path, restart=True) as store:
        assert store.read(FINGERPRINT, 100) is None
    assert names(tmp_path) == []


def test_all_that_differs_from_the_other_run_is_named(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as store:
        store.write(state(2))
        other = {"model": "n", "tasks": {"two": "3", "new": "4"}, "settings": {"lr": 0.2}}
        with pytest.raises(CheckpointError) as caught:
            store.read(other, 100)
        for part in (
            "has checkpoints of another run",
            "--restart",
            "model: other tensors",
            "task 'one': expected as in that run, found none",
            "task 'two': another head or other samples",
            "task 'new': not in that run",
            "lr: expected 0.1 as in that run, found 0.2",
        ):
            assert part in str(caught.value)
        turned = {**FINGERPRINT, "tasks": {"two": "2", "one": "1"}}
        with pytest.raises(CheckpointError, match="expected the order one, two, found two, one"):
            store.read(turned, 100)
    assert names(tmp_path) == ["step-00000002"]


def test_a_second_run_is_kept_out(tmp_path: Path) -> None:
    with (
        Checkpoints(tmp_path) as store,
        store,
        pytest.raises(CheckpointError, match="another run is writing"),
        Checkpoints(tmp_path),
    ):
        pass
    with Checkpoints(tmp_path):
        pass


def test_what_a_killed_run_left_is_cleared_and_other_files_stay(tmp_path: Path) -> None:
    for path in (".step-00000003.partial-1a2b3c4d/state.json", ".step-00000001.replaced/state.json", "mine.txt"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    with Checkpoints(tmp_path) as store:
        store.read(FINGERPRINT, 100)
    assert names(tmp_path) == ["mine.txt"]


@pytest.mark.parametrize("every", [0, True, 1.5])
def test_the_number_of_steps_between_checkpoints(every: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="every: expected a number of steps of at least 1"):
        Checkpoints(tmp_path, every=every)


def test_generators_go_on_where_they_were() -> None:
    before = generators()
    drawn = torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random(), random.gauss(0, 1)
    set_generators(before)
    assert drawn == (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random(), random.gauss(0, 1))


def test_the_fingerprint_sees_every_byte() -> None:
    model, tasks = build(), make_tasks()
    base = fingerprint(model, tasks, {"lr": 0.1})
    assert fingerprint(build(), make_tasks(), {"lr": 0.1}) == base
    with torch.no_grad():
        stack = next(iter(wemoe_layers(model).values())).down.stack
        stack[-1, -1, -1] = torch.nextafter(stack[-1, -1, -1], torch.tensor(9.0))
    changed = fingerprint(model, tasks, {"lr": 0.1})
    assert changed["model"] != base["model"]
    assert changed["tasks"] == base["tasks"]
    tasks[1].head.weight[0, 0] += 1e-6
    found = fingerprint(build(), tasks, {"lr": 0.1})
    assert found["tasks"]["one"] == base["tasks"]["one"]
    assert found["tasks"]["two"] != base["tasks"]["two"]
    inputs, _ = tasks[0].data.batch(list(range(10)))
    inputs["x"][9, 2, 3] += 1e-6
    other = Task("one", tasks[0].head, TensorSamples(inputs))
    assert fingerprint(build(), [other], {})["tasks"]["one"] != base["tasks"]["one"]
    unseen = Task("one", tasks[0].head, TensorSamples(inputs), unlabelled=tasks[0].data)
    assert fingerprint(build(), [unseen], {})["tasks"]["one"] == base["tasks"]["one"]


@pytest.mark.parametrize("penalty", [0.0, 3.0])
@pytest.mark.parametrize("routing", ["per_sample", "batch_reduce"])
def test_more_steps_are_the_same_as_all_at_once(routing: str, penalty: float, tmp_path: Path) -> None:
    options: dict[str, Any] = {"routing": routing, "drift_penalty": penalty}

    def model() -> nn.Module:
        return build(init_lambda=1.0)  # above 1/T: drift is measured against the first step

    expected, whole = run(tmp_path / "whole", steps=5, model=model(), **options)
    run(tmp_path / "parts", steps=2, model=model(), **options)
    found, parts = run(tmp_path / "parts", steps=5, model=model(), **options)
    assert (whole.resumed, parts.resumed) == (0, 2)
    assert same(expected, found)
    assert whole.to_json() == parts.to_json()
    alone = model()
    plain = adapt(alone, make_tasks(), steps=5, lr=0.02, batch_size=4, seed=1, progress=False, **options)
    assert same(expected, routers(alone)), "checkpoints change nothing"
    assert plain.entropy == whole.entropy
    again, _ = run(tmp_path / "parts", steps=5, model=model(), **options)
    assert same(expected, again)


def test_a_run_with_another_penalty_is_refused(tmp_path: Path) -> None:
    run(tmp_path, steps=2, drift_penalty=3.0)
    with pytest.raises(CheckpointError, match=r"drift_penalty: expected 3\.0 as in that run, found 0\.0"):
        run(tmp_path, steps=4)


class Noisy(Task):
    """Draws from the global generators, as augmentation does."""

    def logits(self, model: nn.Module, inputs: Any) -> Tensor:
        scale = 1 + 0.1 * torch.randn(()) + 0.1 * np.random.rand() + 0.1 * random.random()
        return scale * super().logits(model, inputs)


class StoppedError(Exception):
    pass


class Stops(Task):
    """Raises at a call, as a process that ends in the middle of a step."""

    calls = 0

    def logits(self, model: nn.Module, inputs: Any) -> Tensor:
        self.calls += 1
        if self.calls == 6:
            raise StoppedError
        return super().logits(model, inputs)


@pytest.mark.parametrize("every", [1, 3, 50])
def test_a_run_stopped_in_the_middle_goes_on_bit_for_bit(every: int, tmp_path: Path) -> None:
    def tasks(kind: type[Task]) -> list[Task]:
        one, two = make_tasks()
        return [Noisy("one", one.head, one.data), kind("two", two.head, two.data)]

    def seeded() -> None:
        torch.manual_seed(5)
        np.random.seed(5)
        random.seed(5)

    model = build()
    seeded()
    expected, whole = run(tmp_path / "whole", model=model, steps=9, tasks=tasks(Task))
    model = build()
    seeded()
    with pytest.raises(StoppedError):
        run(tmp_path / "parts", model=model, every=every, steps=9, tasks=tasks(Stops))
    model = build()
    seeded()
    found, parts = run(tmp_path / "parts", model=model, every=every, steps=9, tasks=tasks(Task))
    assert parts.resumed == {1: 4, 3: 3, 50: 0}[every]
    assert same(expected, found)
    assert whole.to_json() == parts.to_json()


def test_an_adapted_model_is_not_the_one_the_run_began_with(tmp_path: Path) -> None:
    model = build()
    run(tmp_path, model=model, steps=2)
    with pytest.raises(CheckpointError, match="model: other tensors"):
        run(tmp_path, model=model, steps=4)


def test_what_is_not_finite_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    def tasks(call: int) -> list[Task]:
        one, two = make_tasks()
        return [one, Task("two", two.head, Poison(two.data, call))]

    # call 1 is the fingerprint's, so the 5th step has the 6th
    with pytest.raises(WEMoEError, match=r"step 5: task 'two' has loss nan.*the checkpoint after 3 steps is kept"):
        run(tmp_path, every=1, steps=9, tasks=tasks(6))
    assert names(tmp_path) == ["step-00000002", "step-00000003"]
    model = build()
    adapt(model, make_tasks(), steps=9, lr=0.02, batch_size=4, seed=1, progress=False)
    found, result = run(tmp_path, every=1, steps=9, tasks=tasks(-1))
    assert result.resumed == 3
    assert same(found, routers(model))


def test_routers_that_the_last_step_breaks_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Any, parameters: list[nn.Parameter], __: Any) -> None:
        parameters[-1].data[-1] = torch.inf

    monkeypatch.setattr("wemoe_fast.adapt._step", broken)
    model = build()
    before = routers(model)
    with pytest.raises(WEMoEError, match="step 1: the routers are not finite after it"):
        run(tmp_path, model=model, steps=1)
    assert same(before, routers(model))
    assert names(tmp_path) == []


def test_early_stop_is_the_same_after_a_resume(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"lr": 1e-5, "patience": 3, "min_delta": 0.05}
    expected, whole = run(tmp_path / "whole", steps=30, **settings)
    assert whole.stopped_early
    assert 6 <= whole.steps < 30
    assert all(len(values) == whole.steps for values in whole.entropy.values())
    for steps in (whole.steps - 1, 30, 40):
        found, parts = run(tmp_path / "parts", steps=steps, **settings)
    assert same(expected, found)
    assert whole.to_json() == parts.to_json()


def test_other_samples_to_come_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, steps=2)
    monkeypatch.setattr("wemoe_fast.adapt.Draw._permutation", lambda self, number: list(range(self._n)))
    with pytest.raises(WEMoEError, match="the samples drawn after step 2 are not those that its checkpoint names"):
        run(tmp_path, steps=4)


def test_a_checkpoint_that_cannot_be_written_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with Checkpoints(tmp_path) as store:
        store.write(state(1))
        monkeypatch.setattr("os.fsync", full)
        with pytest.raises(CheckpointError, match=r"step-00000002: cannot be written.*No space.*is kept"):
            store.write(state(2))
    assert names(tmp_path) == ["step-00000001"]


def test_reading_warns_of_nothing_when_all_is_well(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(tmp_path, steps=3)
        run(tmp_path, steps=3)
    shutil.rmtree(tmp_path)
    with Checkpoints(tmp_path / "deep" / "er") as store:
        assert store.read(FINGERPRINT, 1) is None


def test_a_head_with_a_bias_is_another_task() -> None:
    one, _ = make_tasks()
    head = Head(one.head.weight, torch.zeros(3), one.head.classes)
    plain, biased = (fingerprint(build(), [Task("one", h, one.data)], {}) for h in (one.head, head))
    assert plain["tasks"] != biased["tasks"]
