"""The mean over tokens by itself; as an operator test_ops has it."""

import pytest
import torch
from conftest import relative_rms, set_plan

from wemoe_fast import token_mean


def expected(hidden, mask, weight, bias):
    tokens = hidden.double()
    if weight is not None:
        tokens = (tokens @ weight.double().mT + bias.double()).relu()
    kept = torch.ones(hidden.shape[:2]) if mask is None else mask.double()
    return torch.einsum("bn,bnm->bm", kept.double(), tokens) / kept.sum(dim=1, keepdim=True).clamp(min=1)


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("width", [1, 5, 64])
@pytest.mark.parametrize("masked", [False, True])
def test_columns_are_shared_by_workers(workers, width, masked, monkeypatch, poisoned):
    set_plan(monkeypatch, WORTH_SHARING=0, WORKSPACE_BYTES=8 * 2 * 9 * (12 + width) * 4)  # two samples at once
    monkeypatch.setattr(token_mean, "worker_count", lambda device: workers)
    seen = []
    for_each = token_mean.for_each
    monkeypatch.setattr(token_mean, "for_each", lambda *given: seen.append(given[1:]) or for_each(*given))
    hidden, weight, bias = torch.randn(5, 9, 12), torch.randn(width, 12), torch.randn(width)
    mask = torch.rand(5, 9) < 0.6 if masked else None
    if mask is not None:
        mask[3] = False
        hidden[~mask] = torch.nan
    found = token_mean.forward(hidden, mask, weight, bias)
    shown = hidden if mask is None else hidden.masked_fill(~mask.unsqueeze(2), 0)
    assert relative_rms(found, expected(shown, mask, weight, bias)) <= 1e-6
    assert len(seen) == 3
    assert all(min(2, workers, width) <= len(parts) <= given == workers for parts, given in seen)


def test_little_work_is_not_shared(monkeypatch):
    monkeypatch.setattr(token_mean, "worker_count", lambda device: pytest.fail("asked for workers"))
    hidden, weight, bias = torch.randn(2, 3, 4), torch.randn(5, 4), torch.randn(5)
    assert relative_rms(token_mean.forward(hidden, None, weight, bias), expected(hidden, None, weight, bias)) <= 1e-6
    set_plan(monkeypatch, WORTH_SHARING=0)
    assert relative_rms(token_mean.forward(hidden, None, None, None), expected(hidden, None, None, None)) <= 1e-6
