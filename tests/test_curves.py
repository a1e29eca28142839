from __future__ import annotations

from pathlib import Path

import pytest

from wemoe_fast.adapt import DRIFT_LIMIT, Adaptation
from wemoe_fast.curves import adaptation_curves, moving_mean
from wemoe_fast.errors import InputError


def adaptation(tasks: int, steps: int) -> Adaptation:
    entropy = {f"task ${n}": [1.0 + n / (1 + step) for step in range(steps)] for n in range(tasks)}
    drift = [1 + 2 * DRIFT_LIMIT * step / max(1, steps) for step in range(steps)]
    return Adaptation(steps, 1e-3, 8, 0, "per_sample", entropy=entropy, routing_drift=drift)


@pytest.mark.parametrize(("tasks", "steps"), [(1, 1), (4, 40), (14, 7)])
def test_a_picture_the_same_every_time(tasks: int, steps: int, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("one.png", "two.png"):
        adaptation_curves(adaptation(tasks, steps), tmp_path / name)
    one, two = ((tmp_path / name).read_bytes() for name in ("one.png", "two.png"))
    assert one.startswith(b"\x89PNG")
    assert one == two


def test_no_steps_no_picture(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected at least one step"):
        adaptation_curves(adaptation(2, 0), tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def test_the_mean_of_neighbours_is_shorter_at_the_ends() -> None:
    assert moving_mean([1.0, 2.0, 6.0, 0.0], 3) == pytest.approx([1.5, 3.0, 8 / 3, 3.0])
    assert moving_mean([1.0, 2.0], 1) == [1.0, 2.0]
