"""What docs/evaluation.md shows works as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from wemoe_fast import load
from wemoe_fast.benchmarks.project import write_project
from wemoe_fast.cli import _parser
from wemoe_fast.evaluate import evaluate
from wemoe_fast.tasks import Head, Samples, load_tasks

TEXT = (Path(__file__).parent.parent / "docs" / "evaluation.md").read_text()


def blocks(language: str) -> list[str]:
    return [
        text
        for found, text in re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
        if found == language
    ]


def test_the_data_set_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = blocks("python")
    lines = [line for line in code.splitlines() if line.strip() and not line.startswith(("import", "from"))]
    assert len(lines) <= 20, "a data set is twenty lines"
    write_project(tmp_path, samples=4)
    (tmp_path / "tones.py").write_text(code)
    Head(torch.tensor([[1.0], [-1.0]]).expand(2, 8), None, ("low", "high")).save(tmp_path / "heads/tones.safetensors")
    (yaml,) = blocks("yaml")
    entry = yaml[yaml.index("  - name: tones") :]
    (tmp_path / "own.yaml").write_text("tasks:\n" + entry)
    monkeypatch.chdir(tmp_path)
    (task,) = load_tasks("own.yaml", "model")
    assert (task.name, task.batch_size) == ("tones", 64)
    assert isinstance(task.data, Samples)
    inputs, labels = task.data.batch([0, 16, 1])
    assert inputs["hidden_states"].shape == (3, 6, 8)
    assert labels is not None
    found = evaluate(load("model"), [task], progress=False, records="records")
    assert found.n == {"tones": 1000}
    assert evaluate(load("model"), [task], progress=False, records="records").computed == {"tones": 0}


def test_the_tasks_shown_are_read(tmp_path: Path) -> None:
    (yaml,) = blocks("yaml")
    (tmp_path / "tasks.yaml").write_text(yaml)
    (tmp_path / "heads").mkdir()
    (tmp_path / "data").mkdir()
    Head(torch.ones(2, 8), None, ("a", "b")).save(tmp_path / "heads/sentiment.safetensors")
    (tmp_path / "data/sentiment.jsonl").write_text('{"text": "a", "label": "a"}\n')
    from wemoe_fast.config import load_task_configs

    one, other = load_task_configs(tmp_path / "tasks.yaml")
    assert (one.max_length, one.batch_size, other.entry) == (128, 64, "tones:tones")


def test_the_commands_shown_are_taken() -> None:
    commands = [block.replace("\\\n", " ").strip() for block in blocks("")]
    assert len(commands) == 3
    for command in commands:
        arguments = command.split()
        options = _parser().parse_args(arguments[arguments.index("evaluate") :])
        assert options.verb == "evaluate"
