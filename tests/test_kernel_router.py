from __future__ import annotations

import pytest
import torch
from conftest import relative_rms

from wemoe_fast import reference
from wemoe_fast.normalization import KINDS, Normalization

pytest.importorskip("triton")
from wemoe_fast.kernels import router as module
from wemoe_fast.kernels.launch import Batch
from wemoe_fast.kernels.router import route, token_mean
from wemoe_fast.kernels.tuning import Tile

pytestmark = pytest.mark.usefixtures("poisoned")

TILE = Tile(rows=16, tokens=32, depth=16, group=2)
D, M = 35, 21


def router(depth, T, dtype=torch.float32):
    tensors = {"output_weight": torch.randn(T, M if depth == 2 else D), "output_bias": torch.randn(T)}
    if depth == 2:
        tensors |= {"hidden_weight": torch.randn(M, D) / D**0.5, "hidden_bias": 0.3 * torch.randn(M)}
    return {name: value.to(dtype) for name, value in tensors.items()}


def oracle(hidden, parameters, normalization=None, mask=None):
    exact = {name: value.double() for name, value in parameters.items()}
    return reference.route(hidden.double(), exact, normalization or Normalization(), mask)


def mask_of(B, N):
    mask = torch.rand(B, N) > 0.4
    mask[0] = False  # a sample without tokens
    return mask


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("T", [1, 3, 8])
@pytest.mark.parametrize("N", [1, 7, 50, 65])
def test_it_is_the_reference(N, T, depth, masked):
    hidden, parameters, mask = torch.randn(3, N, D), router(depth, T), mask_of(3, N) if masked else None
    weights = route(hidden, **parameters, token_mask=mask, tile=TILE)
    assert weights.dtype == torch.float32
    assert relative_rms(weights, oracle(hidden, parameters, mask=mask)) < 1e-6


@pytest.mark.parametrize("top_k", [None, 1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_every_normalization(kind, top_k):
    hidden, parameters = torch.randn(3, 7, D), router(2, 8)
    normalization = Normalization(kind, 0.7 if kind == "softmax" else 1.0, top_k)
    weights = route(hidden, **parameters, kind=kind, temperature=normalization.temperature, top_k=top_k, tile=TILE)
    expected = oracle(hidden, parameters, normalization)
    assert relative_rms(weights, expected) < 1e-6
    assert torch.equal(weights == 0, expected == 0)


@pytest.mark.parametrize("programs", [1, 7, 10_000])
@pytest.mark.parametrize("depth", [1, 2])
def test_any_number_of_parts_gives_the_same(depth, programs, monkeypatch):
    monkeypatch.setattr(module, "PROGRAMS", programs)
    hidden, parameters, mask = torch.randn(3, 130, D), router(depth, 3), mask_of(3, 130)
    weights = route(hidden, **parameters, token_mask=mask, tile=Tile(16, 16, 16, 2))
    assert relative_rms(weights, oracle(hidden, parameters, mask=mask)) < 1e-6


@pytest.mark.parametrize("tile", [None, Tile(32, 16, 64, 1), Tile(16, 64, 16, 4)], ids=str)
def test_any_tile_gives_the_same(tile):
    hidden, parameters = torch.randn(5, 20, D), router(2, 3)
    assert relative_rms(route(hidden, **parameters, tile=tile), oracle(hidden, parameters)) < 1e-6


@pytest.mark.parametrize("depth", [1, 2])
def test_token_mean(depth):
    hidden, mask = torch.randn(3, 50, D), mask_of(3, 50)
    layer = [router(2, 3)[name] for name in ("hidden_weight", "hidden_bias")] if depth == 2 else [None, None]
    mean = token_mean(hidden, mask, *layer, tile=TILE)
    features = hidden.double()
    if depth == 2:
        features = torch.relu(features @ layer[0].double().mT + layer[1].double())
    counts = mask.sum(1, keepdim=True).clamp(min=1)
    assert relative_rms(mean, (features * mask.unsqueeze(2)).sum(1) / counts) < 1e-6


def test_what_stands_at_masked_tokens_does_not_matter():
    hidden, mask = torch.randn(3, 50, D), mask_of(3, 50)
    for depth in (1, 2):
        parameters = router(depth, 3)
        expected = route(hidden, **parameters, token_mask=mask, tile=TILE)
        poisoned = hidden.masked_fill(~mask.unsqueeze(2), float("nan"))
        assert torch.equal(route(poisoned, **parameters, token_mask=mask, tile=TILE), expected)


def test_a_token_that_is_not_finite_shows_in_its_sample():
    hidden = torch.randn(3, 7, D)
    hidden[1, 2, 5] = float("nan")
    for depth in (1, 2):
        weights = route(hidden, **router(depth, 3), tile=TILE)
        assert weights[1].isnan().all()
        assert weights[[0, 2]].isfinite().all()


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("depth", [1, 2])
def test_packed_samples(depth, masked):
    lengths = [5, 0, 33, 1, 7]
    hidden, parameters = torch.randn(sum(lengths), D), router(depth, 3)
    mask = torch.rand(sum(lengths)) > 0.4 if masked else torch.ones(sum(lengths), dtype=torch.bool)
    batch = Batch.of(hidden, torch.tensor([0, *lengths]).cumsum(0), max(lengths))
    weights = route(hidden, **parameters, token_mask=mask if masked else None, batch=batch, tile=TILE)
    for b, (sample, kept) in enumerate(zip(hidden.split(lengths), mask.split(lengths), strict=True)):
        expected = oracle(sample[None], parameters, mask=kept[None])
        assert relative_rms(weights[b : b + 1], expected) < 1e-6


def test_strided_inputs():
    hidden, parameters, mask = torch.randn(7, 3, D).transpose(0, 1), router(2, 3), mask_of(7, 3).T
    parameters["hidden_weight"] = parameters["hidden_weight"].T.contiguous().T
    parameters["output_weight"] = parameters["output_weight"].T.contiguous().T
    weights = route(hidden, **parameters, token_mask=mask, tile=TILE)
    assert relative_rms(weights, oracle(hidden, parameters, mask=mask)) < 1e-6
    wider = torch.stack([hidden, hidden], dim=-1)[..., 1]
    weights = route(wider, **parameters, token_mask=mask, tile=TILE)
    assert relative_rms(weights, oracle(hidden, parameters, mask=mask)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_of_16_bit_tensors(dtype):
    """The mean and the last layer are in float32, so it is as exact as its inputs."""
    hidden, parameters = torch.randn(3, 50, D).to(dtype), router(2, 3, dtype)
    assert relative_rms(route(hidden, **parameters, tile=TILE), oracle(hidden, parameters)) < 1e-6


@pytest.mark.parametrize(("B", "N"), [(0, 5), (3, 0)])
def test_no_samples_and_no_tokens(B, N):
    for depth in (1, 2):
        parameters = router(depth, 3)
        weights = route(torch.randn(B, N, D), **parameters)
        assert weights.shape == (B, 3)
        assert relative_rms(weights, parameters["output_bias"].expand(B, 3)) == 0
