"""The verbs from end to end on a tiny BERT: recipe, merge, inspect, adapt, evaluate; and what they refuse."""

from __future__ import annotations

import argparse
import json

import pytest
import torch

from wemoe_fast import load, wemoe_layers
from wemoe_fast.cli import _size, main
from wemoe_fast.comparison import compare, environment, write_comparison
from wemoe_fast.errors import CheckpointError
from wemoe_fast.inspection import inspect
from wemoe_fast.tasks import Head

transformers = pytest.importorskip("transformers", reason="the verbs read Hugging Face checkpoints")
tokenizers = pytest.importorskip("tokenizers")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "red", "blue", "the", "a"]


@pytest.fixture
def project(tmp_path):
    """Models, heads, texts, recipe.yaml and tasks.yaml, as a user would have them."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    base = transformers.BertModel(config)
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    tokenizers.BertWordPieceTokenizer(str(tmp_path / "vocab.txt")).save(str(tmp_path / "built.json"))
    tokenizer = transformers.BertTokenizerFast(tokenizer_file=str(tmp_path / "built.json"), model_max_length=16)
    for name in ("base", "mood", "colour"):
        base.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        for parameter in base.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    tasks = []
    for name, classes in (("mood", ("good", "bad")), ("colour", ("red", "blue"))):
        Head(torch.randn(2, 16), None, classes, pooling="mean").save(tmp_path / f"{name}.safetensors")
        rows = [{"text": f"the {classes[i % 2]} a", "label": classes[i % 2]} for i in range(6)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        tasks.append(f"  - {{name: {name}, head: {name}.safetensors, data: {name}.jsonl, batch_size: 4}}")
    (tmp_path / "tasks.yaml").write_text("tasks:\n" + "\n".join(tasks) + "\n")
    (tmp_path / "recipe.yaml").write_text("base: base\nexperts: {mood: mood, colour: colour}\nrouter_depth: 1\n")
    return tmp_path


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_the_verbs_from_end_to_end(project, capsys):
    merged, adapted, results = project / "merged", project / "adapted", project / "results"
    tasks = project / "tasks.yaml"
    assert run("merge", project / "recipe.yaml", "--out", merged, "--seed", 3) == 0
    assert "2 experts: mood, colour" in capsys.readouterr().out

    before = load(merged)
    steps = ("--steps", 2, "--lr", 0.01, "--batch-size", 3)
    assert run("adapt", merged, "--tasks", tasks, "--out", adapted, *steps) == 0
    shown = capsys.readouterr()
    assert "2 steps" in shown.out
    assert "adapt" in shown.err, "progress belongs on stderr"
    after = load(adapted)
    changed = {n for n, p in after.named_parameters() if not torch.equal(p, before.get_parameter(n))}
    assert changed
    assert all(".router." in name for name in changed)
    assert (adapted / "tokenizer_config.json").is_file()
    assert json.loads((adapted / "adaptation.json").read_text())["steps"] == 2

    options = ("--recipe", project / "recipe.yaml", "--experts", "--quiet")
    assert run("evaluate", merged, adapted, "--tasks", tasks, "--out", results, *options) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    rows = json.loads((results / "metrics.json").read_text())["rows"]
    assert list(rows) == [
        "pretrained", "expert mood", "expert colour", "weight average", "task arithmetic 0.3", "merged", "adapted"
    ]  # fmt: skip
    assert all(name in shown.out for name in rows)
    assert rows["adapted"]["experts"] == ["mood", "colour"]
    assert (results / "routing-adapted.png").read_bytes().startswith(b"\x89PNG")
    predictions = [json.loads(line) for line in (results / "predictions.jsonl").read_text().splitlines()]
    assert len(predictions) == len(rows) * 2 * 6
    assert predictions[0] == {"row": "pretrained", "task": "mood", "index": 0, "label": "good"} | predictions[0]

    assert run("inspect", adapted) == 0
    assert "encoder.layer.1.intermediate" in capsys.readouterr().out


def test_a_dry_run_says_what_a_merge_will_take_and_writes_nothing(project, capsys):
    before = sorted(project.rglob("*"))
    assert run("merge", project / "recipe.yaml", "--out", project / "merged", "--dry-run") == 0
    shown = capsys.readouterr()
    for part in ("merged by task arithmetic", "upscaled", "peak memory", "of weights in 1 file", "nothing was written"):
        assert part in shown.out
    assert shown.err == ""
    assert sorted(project.rglob("*")) == before


def test_a_merge_in_shards_shows_its_progress_unless_quiet(project, capsys):
    merge = ("merge", project / "recipe.yaml", "--out", project / "merged", "--max-shard-size", "4KiB")
    assert run(*merge) == 0
    shown = capsys.readouterr()
    assert "merge" in shown.err
    assert "written to" in shown.out
    assert len(list((project / "merged").glob("model-*.safetensors"))) > 2
    assert run(*merge, "--overwrite", "--quiet") == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("text", "size"), [("5", 5), ("2GB", 2_000_000_000), ("1.5 MiB", 3 << 19), ("3k", 3000), ("1TB", 10**12)]
)
def test_sizes_are_read_as_people_write_them(text, size):
    assert _size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1GB", "GB", "1 apple", "0.1B"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="2GB"):
        _size(text)


def test_the_seed_makes_merging_repeatable(project):
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        assert run("merge", project / "recipe.yaml", "--out", project / name, "--seed", seed) == 0
    one, again, other = ((project / n / "model.safetensors").read_bytes() for n in ("one", "again", "other"))
    assert one == again
    assert one != other


def test_how_to_route_while_generating_can_be_said_on_the_command_line(project):
    (project / "recipe.yaml").write_text((project / "recipe.yaml").read_text() + "decode_routing: step\n")
    for name, options in (("step", ()), ("prompt", ("--decode-routing", "prompt"))):
        assert run("merge", project / "recipe.yaml", "--out", project / name, *options) == 0
        assert {layer.decode_routing for layer in wemoe_layers(load(project / name)).values()} == {name}


def test_adapt_runs_in_the_dtype_asked_for(project):
    run("merge", project / "recipe.yaml", "--out", project / "merged")
    options = ("--steps", 1, "--dtype", "float64", "--quiet", "--routing", "batch_reduce")
    assert run("adapt", project / "merged", "--tasks", project / "tasks.yaml", "--out", project / "a", *options) == 0
    assert load(project / "a").dtype == torch.float64


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("merge", "nowhere.yaml", "--out", "out"), "nowhere.yaml"),
        (("inspect", "base"), "wemoe.json"),
        (("merge", "recipe.yaml", "--out", "mood"), "mood"),
        (("evaluate", "base", "--tasks", "tasks.yaml", "--out", "out", "--experts"), "--recipe"),
        (("evaluate", "base", "--tasks", "recipe.yaml", "--out", "out"), "tasks"),
    ],
)
def test_what_is_refused_is_said_in_one_message(project, monkeypatch, capsys, arguments, part):
    monkeypatch.chdir(project)
    assert run(*arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"wemoe-fast {arguments[0]}: ")
    assert part in error
    assert not (project / "out").exists()


def test_results_are_not_overwritten_unless_asked(project, capsys):
    run("merge", project / "recipe.yaml", "--out", project / "merged")
    evaluate = ("evaluate", project / "merged", "--tasks", project / "tasks.yaml", "--out", project / "r", "--quiet")
    assert run(*evaluate) == 0
    stamp = (project / "r" / "metrics.json").read_bytes()
    assert run(*evaluate) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert (project / "r" / "metrics.json").read_bytes() == stamp
    assert run(*evaluate, "--overwrite") == 0


def test_threads_are_set(project):
    before = torch.get_num_threads()
    try:
        run("merge", project / "recipe.yaml", "--out", project / "merged", "--threads", 1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    with pytest.raises(SystemExit):
        run("inspect", project / "merged", "--threads", 0)


def test_inspect_counts_parameters_and_memory(project):
    run("merge", project / "recipe.yaml", "--out", project / "merged")
    model = load(project / "merged")
    text = inspect(model)
    assert f"{sum(p.numel() for p in model.parameters()):,} in all" in text
    assert f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,} trainable" in text
    assert "16 -> 24 -> 16" in text


def test_comparison_is_lazy_and_complete(project):
    run("merge", project / "recipe.yaml", "--out", project / "merged")
    from wemoe_fast.tasks import load_tasks

    tasks = load_tasks(project / "tasks.yaml", project / "merged")
    rows, experts = compare(((name, load(project / "merged")) for name in ("x/y", "z")), tasks, progress=False)
    assert rows["x/y"].accuracy == rows["z"].accuracy
    assert experts == {"x/y": ("mood", "colour"), "z": ("mood", "colour")}
    files = write_comparison(rows, experts, project / "c", settings={"seed": 1})
    assert all(path.is_file() for path in files.values())
    assert json.loads(files["timing"].read_text())["environment"] == environment()
    with pytest.raises(CheckpointError, match="overwrite"):
        write_comparison(rows, experts, project / "c")


def test_bench_hands_its_options_to_the_harness(monkeypatch, capsys):
    from wemoe_fast.benchmarks import throughput

    seen = []
    monkeypatch.setattr(throughput, "main", lambda arguments, prog: seen.append((arguments, prog)) or 1)
    assert run("bench", "--suite", "dry", "--threads", 1) == 1
    assert seen == [(["--suite", "dry", "--threads", "1"], "wemoe-fast bench")]


def test_bench_refuses_in_one_message(tmp_path, capsys):
    assert run("bench", "--compare", tmp_path / "nowhere.json", "--out", tmp_path) == 1
    assert capsys.readouterr().err.startswith("wemoe-fast bench: ")
    with pytest.raises(SystemExit):
        run("inspect", tmp_path, "--suite", "dry")
