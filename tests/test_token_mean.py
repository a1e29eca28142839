"""The mean over tokens by itself; as an operator test_ops has it."""

import pytest
import torch
from conftest import relative_rms, set_plan

from wemoe_fast import kernels, native, token_mean


def expected(hidden, mask, weight, bias):
    tokens = hidden.double()
    if weight is not None:
        tokens = (tokens @ weight.double().mT + bias.double()).relu()
    kept = torch.ones(hidden.shape[:2]) if mask is None else mask.double()
    return torch.einsum("bn,bnm->bm", kept.double(), tokens) / kept.sum(dim=1, keepdim=True).clamp(min=1)


@pytest.mark.parametrize("width", [1, 5, 64])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("in_c", [False, True])
def test_groups_of_samples(width, masked, in_c, monkeypatch, poisoned):
    """Two samples at once; the CPU kernels take parts of one as well."""
    set_plan(monkeypatch, WORKSPACE_BYTES=8 * 2 * 9 * (12 + width) * 4)
    if not in_c:
        monkeypatch.setattr(kernels.native, "why_not", lambda *_: "not wanted")
    hidden, weight, bias = torch.randn(5, 9, 12), torch.randn(width, 12), torch.randn(width)
    mask = torch.rand(5, 9) < 0.6 if masked else None
    if mask is not None:
        mask[3] = False
        hidden[~mask] = torch.nan
    shown = hidden if mask is None else hidden.masked_fill(~mask.unsqueeze(2), 0)
    for tokens in (1, 4, 9, 20, 100):
        monkeypatch.setattr(native, "SHARE", tokens * max(12, width) * 4)
        found = token_mean.forward(hidden, mask, weight, bias)
        assert found.dtype == torch.float32
        assert relative_rms(found, expected(shown, mask, weight, bias)) <= 1e-6
    found = token_mean.forward(hidden, mask, None, None)
    assert relative_rms(found, expected(shown, mask, None, None)) <= 1e-6
