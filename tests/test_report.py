from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from wemoe_fast.errors import InputError
from wemoe_fast.report import accuracy_table, routing_heatmap, short_names, write_json


def test_write_json(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.json"
    write_json(path, {"b": 1, "a": ["ü", 0.5]})
    text = path.read_text(encoding="utf-8")
    assert text == '{\n  "b": 1,\n  "a": [\n    "ü",\n    0.5\n  ]\n}\n'
    write_json(path, [2])
    assert json.loads(path.read_text()) == [2]
    assert os.listdir(path.parent) == ["results.json"]


def test_write_json_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.json"
    write_json(path, [1])
    for bad in ({"x": object()}, float("nan")):
        with pytest.raises(InputError, match=r"results\.json: cannot be written as JSON"):
            write_json(path, bad)

    def full(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    for last in ("replace", "fsync"):
        monkeypatch.setattr(os, last, full)
        with pytest.raises(OSError, match="No space"):
            write_json(path, [2])
        assert json.loads(path.read_text()) == [1]
        assert os.listdir(tmp_path) == ["results.json"]


ROWS = {"pretrained": {"texts": 0.5, "topics": 1.0}, "WEMoE": {"texts": 0.98765, "topics": 0.04}}


def test_a_plain_table() -> None:
    assert accuracy_table(ROWS) == (
        "model       texts  topics  mean\n"
        "----------  -----  ------  ----\n"
        "pretrained   50.0   100.0  75.0\n"
        "WEMoE        98.8     4.0  51.4"
    )


def test_a_markdown_table() -> None:
    assert accuracy_table(ROWS, ["topics"], markdown=True) == (
        "| model      | topics |  mean |\n"
        "| ---------- | -----: | ----: |\n"
        "| pretrained |  100.0 | 100.0 |\n"
        "| WEMoE      |    4.0 |   4.0 |"
    )
    assert "a\\|b" in accuracy_table({"a|b": {"x": 1.0}}, markdown=True)


def test_a_model_that_lacks_a_task_has_no_mean() -> None:
    lines = accuracy_table({"expert": {"texts": 0.5}, **ROWS}).splitlines()
    assert lines[2].split() == ["expert", "50.0", "-", "-"]
    assert lines[3].split() == ["pretrained", "50.0", "100.0", "75.0"]


def test_an_empty_table() -> None:
    with pytest.raises(InputError, match="at least one model and one task"):
        accuracy_table({})
    with pytest.raises(InputError, match="at least one model and one task"):
        accuracy_table({"a": {}})


@pytest.mark.parametrize(
    ("names", "short", "pattern"),
    [
        (["e.layer.0.mlp", "e.layer.11.mlp"], ["0", "11"], "e.layer.*.mlp"),
        (["0", "1"], ["0", "1"], "*"),
        (["e.0.mlp"], ["e.0.mlp"], ""),
        (["e.0.mlp", "e.0.x.mlp"], ["-", "x"], "e.0.*.mlp"),
        (["a.1.m", "b.2.n"], ["a.1.m", "b.2.n"], "*"),
    ],
)
def test_short_names(names: list[str], short: list[str], pattern: str) -> None:
    assert short_names(names) == (short, pattern)


def routing(
    tasks: int = 2, layers: int = 3, experts: int = 2, offset: float = 0.0
) -> dict[str, dict[str, list[float]]]:
    return {
        f"t{t}": {f"e.{i}.mlp": [offset + 0.1 * (t + i + k) for k in range(experts)] for i in range(layers)}
        for t in range(tasks)
    }


@pytest.mark.parametrize(
    ("tasks", "layers", "experts", "offset"),
    [(1, 1, 1, 0.0), (2, 3, 2, -0.3), (5, 12, 5, 0.2), (2, 2, 2, -9.0)],
)
def test_heat_map_draws_an_image_with_several_colours(
    tmp_path: Path, tasks: int, layers: int, experts: int, offset: float
) -> None:
    pytest.importorskip("matplotlib")
    image = pytest.importorskip("PIL.Image")
    path = tmp_path / "new" / "map.png"
    routing_heatmap(routing(tasks, layers, experts, offset), [f"t{k}" for k in range(experts)], path)
    with image.open(path) as png:
        assert png.format == "PNG"
        assert png.width >= 500
        colours = {colour for _, colour in png.convert("RGB").getcolors(2**24)}
    assert len(colours) > 20


def test_heat_map_with_all_weights_zero_and_dollars_in_names(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    routing_heatmap({"$x^": {"l": [0.0, 0.0]}}, ["$a_$", "b"], tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 0


def test_routing_that_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least one task and one layer"):
        routing_heatmap({}, ["a"], tmp_path / "map.png")
    with pytest.raises(InputError) as caught:
        routing_heatmap({"t": {"l": [1.0]}, "u": {"m": [1.0, float("nan")]}}, ["a", "b"], tmp_path / "map.png")
    assert "task 't', layer 'l': expected 2 weights, found 1" in str(caught.value)
    assert "task 'u': expected the layers of the first task, found m" in str(caught.value)
    assert "task 'u', layer 'm': weights that are not finite" in str(caught.value)
    assert not (tmp_path / "map.png").exists()


def test_without_matplotlib_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in [name for name in sys.modules if name.startswith("matplotlib.")]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=r'pip install "wemoe-fast\[plot\]"'):
        routing_heatmap(routing(), ["a", "b"], tmp_path / "map.png")
