from __future__ import annotations

import pytest
import torch

from wemoe_fast.errors import InputError
from wemoe_fast.normalization import KINDS, Normalization

LOGITS = torch.tensor([[0.5, -2.0, 1.0], [0.1, 0.2, 0.0]])


def test_identity_changes_nothing():
    assert torch.equal(Normalization()(LOGITS), LOGITS)


def test_softmax_divides_by_the_temperature():
    expected = (LOGITS / 0.5).exp() / (LOGITS / 0.5).exp().sum(-1, keepdim=True)
    torch.testing.assert_close(Normalization("softmax", 0.5)(LOGITS), expected)


def test_sigmoid_weighs_every_expert_on_its_own():
    torch.testing.assert_close(Normalization("sigmoid")(LOGITS), 1 / (1 + (-LOGITS).exp()))


@pytest.mark.parametrize("kind", KINDS)
def test_top_k_keeps_the_largest_logits(kind):
    weights = Normalization(kind, top_k=2)(LOGITS)
    kept = torch.tensor([[True, False, True], [True, True, False]])
    assert weights[~kept].eq(0).all()
    expected = Normalization(kind)(LOGITS[kept].view(2, 2)).flatten()
    torch.testing.assert_close(weights[kept], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_top_k_of_all_experts_is_none(kind):
    assert torch.equal(Normalization(kind, top_k=3)(LOGITS), Normalization(kind)(LOGITS))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_k", [None, 1, 2])
def test_gradients(kind, top_k):
    normalization = Normalization(kind, 0.7 if kind == "softmax" else 1.0, top_k)
    assert torch.autograd.gradcheck(normalization, LOGITS.double().requires_grad_())


def test_every_problem_at_once():
    with pytest.raises(InputError) as caught:
        Normalization("sofmax", -1.0, 0)
    message = str(caught.value)
    assert "router normalisation: 4 problems" in message
    assert "kind: expected one of identity, softmax, sigmoid, found 'sofmax'" in message
    assert "temperature: expected a number above 0, found -1.0" in message
    assert "temperature: only softmax has one" in message
    assert "top_k: expected at least 1, found 0" in message


@pytest.mark.parametrize("temperature", [0.0, float("nan")])
def test_temperatures_that_divide_by_nothing(temperature):
    with pytest.raises(InputError, match="temperature: expected a number above 0"):
        Normalization("softmax", temperature)


def test_to_dict_rebuilds():
    fields = Normalization("softmax", 0.5, 2).to_dict()
    assert fields == {"normalization": "softmax", "temperature": 0.5, "top_k": 2}
    assert Normalization(fields["normalization"], fields["temperature"], fields["top_k"]) == Normalization(
        "softmax", 0.5, 2
    )
