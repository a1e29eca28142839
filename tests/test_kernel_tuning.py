from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from wemoe_fast.kernels import tuning
from wemoe_fast.kernels.tuning import Device, Problem, Tile

DEVICES = [
    Device("a", 163 << 10, "ampere"),
    Device("b", 99 << 10, "ampere"),
    Device("h", 227 << 10, "hopper"),
    Device("c", 64 << 10, "cdna"),
]


def problem(kernel="merged_linear", device=DEVICES[2], dtype=torch.bfloat16, **changes):
    sizes = {"samples": 64, "tokens": 50, "rows": 3072, "depth": 768, "experts": 8, "kept": 8}
    size = dtype.itemsize
    return Problem(kernel, device, dtype, **{**sizes, "element_size": size, **changes})


PROBLEMS = [
    problem(kernel, device, dtype, samples=B, tokens=N, experts=T, kept=kept, gated=gated, precision=precision)
    for kernel in ("merged_linear", "merged_linear_dw", "router")
    for device in DEVICES
    for dtype, precision in ((torch.bfloat16, "ieee"), (torch.float32, "ieee"), (torch.float32, "tf32"))
    for B in (1, 3, 64)
    for N in (1, 50, 257)
    for T, kept in ((1, 1), (8, 8), (8, 2), (20, 20))
    for gated in (False, True)
    if kernel == "merged_linear" or not gated
]


def test_every_default_fits_its_device():
    for asked in PROBLEMS:
        tile = tuning.default(asked)
        assert tuning.fits(tile, asked), asked
        assert tile.tokens >= 16
        assert tile.group < 2 * asked.samples


def test_a_default_is_no_larger_than_the_samples_need():
    assert tuning.default(problem(tokens=1)).tokens == 16
    assert tuning.default(problem(tokens=50)).tokens == 64
    assert tuning.default(problem(tokens=257)).tokens == 128
    assert tuning.default(problem(samples=1)).group == 1


def test_samples_share_tiles_of_weights_where_they_have_few_tokens():
    assert tuning.default(problem(tokens=50)).group == 4
    assert tuning.default(problem(tokens=257)).group == 2
    assert tuning.default(problem(tokens=50, device=DEVICES[3])).group == 2


def test_what_does_not_fit():
    asked = problem()
    assert tuning.fits(Tile(64, 64, 32, 4, 3, 8), asked)
    assert not tuning.fits(Tile(128, 64, 64, 4, 4, 8), asked), "shared memory"
    assert not tuning.fits(Tile(128, 128, 16, 4, 2, 4), asked), "registers of the sums"
    assert not tuning.fits(Tile(16, 16, 16, 8, 2, 4), problem(experts=20, kept=20)), "registers of the weights"
    assert tuning.fits(Tile(16, 16, 16, 8, 2, 4), problem(experts=20, kept=1)), "only slots count"


def test_a_gated_pair_needs_twice_the_shared_memory_for_weights():
    tile = Tile(64, 64, 32, 1, 3, 8)
    plain, gated = (tuning.shared_bytes(tile, problem(gated=flag)) for flag in (False, True))
    assert gated - plain == 2 * 9 * 64 * 32 * 2


def test_candidates_begin_with_the_default_and_all_fit():
    for asked in (problem(), problem(tokens=1, samples=1), problem("merged_linear_dw"), problem(experts=20, kept=20)):
        tiles = list(tuning.candidates(asked))
        assert tiles[0] == tuning.default(asked)
        assert len(tiles) == len(set(tiles)) > 5
        assert all(tuning.fits(tile, asked) for tile in tiles)


def test_bucket():
    numbers = {0: 1, 1: 1, 2: 2, 3: 4, 50: 64, 64: 64, 65: 100, 9999: 100}
    assert {number: tuning.bucket(number, 100) for number in numbers} == numbers


@pytest.fixture
def user_tables(tmp_path, monkeypatch):
    monkeypatch.setenv("WEMOE_FAST_TUNING", str(tmp_path))
    tuning.forget_tables()
    yield tmp_path
    tuning.forget_tables()


def write(directory, device, tiles=(), strategies=()):
    table = {"tiles": list(tiles), "strategies": list(strategies)}
    (directory / f"{tuning.slug(device)}.json").write_text(json.dumps(table))
    tuning.forget_tables()


def test_a_table_comes_before_the_default(user_tables):
    asked, tile = problem(device=replace(DEVICES[2], name="NVIDIA H100 80GB HBM3")), Tile(32, 32, 16, 1, 2, 4)
    assert tuning.choose(asked) == tuning.default(asked) != tile
    assert tuning.user_table(asked.device.name) == user_tables / "nvidia-h100-80gb-hbm3.json"
    write(user_tables, asked.device.name, [tuning.entry(asked, tile)])
    assert tuning.choose(asked) == tile
    assert tuning.choose(replace(asked, tokens=60, samples=50)) == tile, "the same buckets"
    for other in ({"tokens": 65}, {"dtype": torch.float16}, {"experts": 9}, {"kept": 2}, {"gated": True}):
        changed = replace(asked, **other)
        assert tuning.choose(changed) == tuning.default(changed), other


def test_shipped_tables_come_after_the_users(user_tables, tmp_path, monkeypatch):
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    monkeypatch.setattr(tuning, "CONFIGS", shipped)
    asked, ours, theirs = problem(), Tile(32, 32, 16), Tile(16, 32, 16)
    write(shipped, asked.device.name, [tuning.entry(asked, ours)])
    assert tuning.choose(asked) == ours
    write(user_tables, asked.device.name, [tuning.entry(asked, theirs)])
    assert tuning.choose(asked) == theirs


def test_measured_strategies(user_tables):
    asked = problem()
    assert tuning.measured_strategy(asked, False) is None
    write(user_tables, "h", strategies=[{**tuning.strategy_key(asked, False), "strategy": "factored"}])
    assert tuning.measured_strategy(asked, False) == "factored"
    assert tuning.measured_strategy(asked, True) is None
    assert tuning.measured_strategy(replace(asked, rows=512), False) is None


def test_shipped_tables_are_readable():
    for path in tuning.CONFIGS.glob("*.json"):
        for entry in json.loads(path.read_text())["tiles"]:
            Tile(**entry["tile"])


def test_float32_products_are_full_unless_the_user_allowed_less():
    assert tuning.float32_precision(torch.float32) == "ieee"
    torch.set_float32_matmul_precision("high")
    try:
        assert tuning.float32_precision(torch.float32) == "tf32"
        assert tuning.float32_precision(torch.bfloat16) == "ieee"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_off_the_gpu_the_limits_are_those_of_an_h100():
    assert tuning.device_of(torch.device("cpu")) == Device("interpreter", 227 << 10, "hopper")
