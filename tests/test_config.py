from __future__ import annotations

from pathlib import Path

import pytest

from wemoe_fast.config import Recipe, TaskConfig, data_kind, did_you_mean, load_recipe, load_task_configs
from wemoe_fast.errors import ConfigError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("base", "a", "b"):
        (tmp_path / "models" / name).mkdir(parents=True)
    for name in ("head.safetensors", "data.jsonl", "inputs.safetensors", "data.csv"):
        (tmp_path / name).touch()
    (tmp_path / "images").mkdir()
    return tmp_path


LETTERS = list(zip("bcdefghijklmnopqrstuvw", "cdefghijklmnopqrstuvwx", strict=True))
MODELS = "base: models/base\nexperts:\n  a: models/a\n  b: models/b\n"


def recipe(root: Path, text: str | bytes) -> Recipe:
    path = root / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_recipe(path)


def recipe_error(root: Path, text: str | bytes) -> str:
    with pytest.raises(ConfigError) as caught:
        recipe(root, text)
    assert str(root / "recipe.yaml") in str(caught.value)
    return str(caught.value)


def tasks(root: Path, text: str) -> list[TaskConfig]:
    path = root / "tasks.yaml"
    path.write_text(text)
    return load_task_configs(path)


def tasks_error(root: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        tasks(root, text)
    return str(caught.value)


def test_recipe_defaults_and_paths_relative_to_the_file(root: Path) -> None:
    models = root / "models"
    assert recipe(root, MODELS) == Recipe(base=models / "base", experts={"a": models / "a", "b": models / "b"})


def test_recipe_with_every_key_keeps_the_order_of_experts(root: Path) -> None:
    found = recipe(
        root,
        f"base: {root}/models/base\nexperts: {{b: models/b, a: models/a}}\nmerge_lambda: 0.25\nrouter_depth: 1\n"
        "init_lambda: 1\nnormalization: softmax\ntemperature: 0.5\ntop_k: 2\nbatch_reduce: true\nseed: 7\n"
        "decode_routing: step\nshare: true\n",
    )
    assert list(found.experts) == ["b", "a"]
    assert found == Recipe(
        base=root / "models/base",
        experts={"a": root / "models/a", "b": root / "models/b"},
        merge_lambda=0.25,
        router_depth=1,
        init_lambda=1.0,
        normalization="softmax",
        temperature=0.5,
        top_k=2,
        batch_reduce=True,
        decode_routing="step",
        share=True,
        seed=7,
    )
    assert isinstance(found.init_lambda, float)


def test_all_problems_of_a_recipe_come_at_once(root: Path) -> None:
    message = recipe_error(
        root,
        "base: models/nowhere\nexperts: {a: models/a, b: head.safetensors}\nmerge_lamda: 0.3\nrouter_depth: 3\n"
        "normalization: softmx\ntemperature: -1\ntop_k: 1.5\nbatch_reduce: 1\nseed: -1\ninit_lambda: .nan\n",
    )
    for part in (
        "10 problems",
        f"base: expected a directory, found {root}/models/nowhere, which does not exist",
        "experts.b: expected a directory",
        "which is not a directory",
        "unknown key 'merge_lamda', did you mean 'merge_lambda'?",
        "router_depth: expected an integer from 0 to 2, found 3",
        "normalization: expected one of identity, softmax, sigmoid, found 'softmx' (a text); did you mean",
        "temperature: expected a number above 0, found -1",
        "top_k: expected an integer of at least 1, found 1.5",
        "batch_reduce: expected true or false, found 1 (an integer)",
        "seed: expected an integer",
        "init_lambda: expected a finite number",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("top_k: 3", "top_k: expected at most the number of experts, 2, found 3"),
        ("top_k: true", "top_k: expected an integer of at least 1, found True (a boolean)"),
        ("router_depth: true", "router_depth: expected an integer from 0 to 2, found True (a boolean)"),
        ("merge_lambda: 3e-1", "write 0.001 or 1.0e-3"),
        ("merge_lambda: [0.3]", "merge_lambda: expected a number, found [0.3] (a list)"),
        ("merge_lambda: 1" + "0" * 400, "merge_lambda: expected a finite number"),
        ("temperature: 2.0", "temperature: only softmax has one, found 2.0 with identity"),
        ("share: all", "share: expected true or false, found 'all' (a text)"),
        ("decode_routing: steps", "decode_routing: expected one of prompt, step, found 'steps' (a text); did you mean"),
        ("colour: red", "unknown key 'colour'; known: base, experts, merge_lambda"),
        ("3: red", "unknown key 3"),
        ("base: models/a", "key 'base' appears twice, on lines 1 and 5; keep one"),
    ],
)
def test_one_problem_of_a_recipe(root: Path, line: str, part: str) -> None:
    message = recipe_error(root, MODELS + line + "\n")
    assert part in message
    assert "problems" not in message


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("experts: {a: models/a}", "base is missing"),
        ("base: models/base", "experts is missing"),
        (
            "base: models/base\nexperts: {}",
            "experts: expected at least one expert (name: directory), found none",
        ),
        (
            "base: models/base\nexperts:",
            "experts: expected at least one expert (name: directory), found none",
        ),
        ("base: models/base\nexperts: [models/a]", "found ['models/a'] (a list)"),
        ("base: 3\nexperts: {a: models/a}", "base: expected a path, found 3 (an integer)"),
        ("base: models/base\nexperts: {no: models/a}", "expected a name, found False (a boolean)"),
        (
            "base: models/base\nexperts:\n  a: models/a\n  a: models/b",
            "key 'a' appears twice, on lines 3 and 4",
        ),
        ("", "found an empty file"),
        ("- base", "expected a mapping (key: value) at the top, found ['base'] (a list)"),
    ],
)
def test_missing_and_misplaced_parts_of_a_recipe(root: Path, text: str, part: str) -> None:
    assert part in recipe_error(root, text)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("base: models/base\nexperts: {a: models/a\n", "line 3, column 1"),
        ("base: [models", "not valid YAML: line 1, column"),
        ("base: !!python/object:os.system {}", "not valid YAML: line 1, column 7"),
        ("base: models/base\n\tx: 1", "line 2, column 1"),
        (b"base: \xff\xfe", "not valid YAML"),
        ("when: 2001-99-99", "not valid YAML"),
        ("[" * 5000, "nested too deeply"),
        ("a: &a [*a]", "an alias inside of what it stands for"),
        ("b: &b [1, 1]\n" + "\n".join(f"{a}: &{b} [*{a}, *{a}]" for a, b in LETTERS), "more than 100000 values"),
        ("seed: " + ":".join(["59"] * 3000), "more than 10000 bits"),
        ("x: '" + "x" * (1 << 20) + "'", "at most 1048576 bytes"),
        ("a: 1\n---\nb: 2", "not valid YAML: line 2, column 1"),
    ],
)
def test_malformed_yaml_says_where(root: Path, text: str | bytes, part: str) -> None:
    assert part in recipe_error(root, text)


@pytest.mark.parametrize("path", ["x" * 300, "~nobody-of-this-name/x"])
def test_paths_that_cannot_be_looked_up_are_refused(root: Path, path: str) -> None:
    assert "base: expected a path that can be looked up" in recipe_error(root, MODELS.replace("models/base", path))


def test_aliases_are_fine(root: Path) -> None:
    assert len(recipe(root, "base: &m models/base\nexperts: {a: *m, b: *m}").experts) == 2


def test_missing_and_unreadable_files_are_config_errors(root: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_recipe(root / "nothing.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_task_configs(root)


def test_tasks_with_every_key(root: Path) -> None:
    found = tasks(
        root,
        "tasks:\n"
        "  - {name: t, head: head.safetensors, data: data.jsonl, unlabelled: data.jsonl, max_length: 32,"
        " batch_size: 64}\n"
        "  - {name: i, head: head.safetensors, data: images}\n"
        "  - {name: x, head: head.safetensors, data: inputs.safetensors}\n"
        "  - {name: e, entry: 'my_package.my_module:my_task'}\n",
    )
    head, text = root / "head.safetensors", root / "data.jsonl"
    assert found == [
        TaskConfig("t", head, text, text, max_length=32, batch_size=64),
        TaskConfig("i", head, root / "images"),
        TaskConfig("x", head, root / "inputs.safetensors"),
        TaskConfig("e", entry="my_package.my_module:my_task"),
    ]
    assert [data_kind(config.data) for config in found[:3] if config.data] == ["text", "images", "tensors"]


def test_all_problems_of_a_task_list_come_at_once(root: Path) -> None:
    message = tasks_error(
        root,
        "tasks:\n"
        "  - {name: a, head: head.safetensors}\n"
        "  - {name: a, head: nowhere.safetensors, data: data.jsonl, batchsize: 3}\n"
        "  - {head: images, data: data.csv, batch_size: 0}\n"
        "  - {name: e, entry: my_task, head: head.safetensors}\n"
        "  - {name: i, head: head.safetensors, data: images, max_length: 3}\n"
        "  - sentiment\n"
        "colour: red\n",
    )
    for part in (
        "13 problems",
        "task 'a': data is missing",
        "task 'a': head: expected a file, found",
        "nowhere.safetensors, which does not exist",
        "task 'a': unknown key 'batchsize', did you mean 'batch_size'?",
        "task 3: name is missing",
        "task 3: head: expected a file, found",
        "data.csv",
        "task 3: data: expected a .jsonl, .parquet or .safetensors file or a folder of images",
        "task 3: batch_size: expected an integer of at least 1, found 0",
        "task 'e': entry: expected \"package.module:function\", found 'my_task'",
        "task 'e': entry builds the whole task; remove head or remove entry",
        "task 'i': max_length is for text (.jsonl, .parquet)",
        "task 6: expected a mapping with name, head and data, found 'sentiment'",
        "task 'a': the name is used 2 times",
        "unknown key 'colour'",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("tasks: []", "tasks: expected a list of at least one task, found none"),
        ("tasks: {name: a}", "tasks: expected a list of at least one task, found {'name': 'a'} (a mapping)"),
        ("task: []", "tasks is missing"),
        ("tasks:\n- {name: a, head: head.safetensors, data: gone.jsonl}", "gone.jsonl, which does not exist"),
        ("tasks:\n- {name: '', head: head.safetensors, data: data.jsonl}", "name: expected a text"),
        ("tasks:\n- {name: a, name: b, head: head.safetensors, data: data.jsonl}", "'name' appears twice"),
    ],
)
def test_one_problem_of_a_task_list(root: Path, text: str, part: str) -> None:
    assert part in tasks_error(root, text)


def test_did_you_mean_names_the_nearest_or_lists_all() -> None:
    assert did_you_mean("topk", ["top_k", "seed"]) == ", did you mean 'top_k'?"
    assert did_you_mean("xyz", ["top_k", "seed"]) == "; known: top_k, seed"
