from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wemoe_fast.errors import InputError
from wemoe_fast.evaluate import Evaluation, eval_mode, evaluate
from wemoe_fast.tasks import Head, Task, TensorSamples
from wemoe_fast.upscale import upscale, wemoe_layers

D = 4


class Model(nn.Module):
    """[B, N, 4] tokens and a mask -> [B, N, 4]; tokens of padding do not reach the others."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(D, 8), nn.GELU(), nn.Linear(8, D))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.dropout(x + self.mlp(x))


class Padded:
    """Samples of different lengths, padded to the longest of each batch."""

    def __init__(self, samples: list[Tensor], labels: Sequence[int] | None) -> None:
        self.samples, self.labels = samples, labels
        self.asked: list[list[int]] = []

    def __len__(self) -> int:
        return len(self.samples)

    def batch(self, indices: Sequence[int]) -> tuple[dict[str, Tensor], Tensor | None]:
        self.asked.append(list(indices))
        chosen = [self.samples[i] for i in indices]
        x = nn.utils.rnn.pad_sequence(chosen, batch_first=True)
        mask = nn.utils.rnn.pad_sequence([torch.ones(len(c), dtype=torch.long) for c in chosen], batch_first=True)
        labels = None if self.labels is None else torch.tensor([self.labels[i] for i in indices])
        return {"x": x, "attention_mask": mask}, labels


class Sorted(Padded):
    @property
    def lengths(self) -> list[int]:
        return [len(sample) for sample in self.samples]


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model()


@pytest.fixture
def merged(model: Model) -> nn.Module:
    experts = {name: copy.deepcopy(model) for name in ("a", "b")}
    for expert in experts.values():
        for parameter in expert.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
    return upscale(model, experts, router_depth=1)


def samples(n: int = 11, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1 + i % 5, D, generator=generator) for i in range(n)]


def head(classes: int = 3) -> Head:
    weight = torch.randn(classes, D, generator=torch.Generator().manual_seed(2))
    return Head(weight, None, tuple(f"class {i}" for i in range(classes)))


def by_hand(model: nn.Module, task: Task) -> list[int]:
    model.eval()
    data: Any = task.data
    with torch.no_grad():
        return [int((model(sample[None]).mean(1) @ task.head.weight.T).argmax()) for sample in data.samples]


def test_predictions_and_accuracy(model: Model) -> None:
    labels = [i % 3 for i in range(11)]
    task = Task("t", head(), Padded(samples(), labels), batch_size=4)
    expected = by_hand(model, task)
    found = evaluate(model, [task], progress=False)
    assert found.predictions == {"t": expected}
    assert len(set(expected)) > 1
    assert found.accuracy["t"] == sum(p == y for p, y in zip(expected, labels, strict=True)) / 11
    assert found.n == {"t": 11}
    assert found.routing == {}
    assert found.seconds == found.task_seconds["t"] > 0
    assert found.samples_per_second == pytest.approx(11 / found.seconds)


def test_batches_by_length_give_the_same(merged: nn.Module) -> None:
    labels = [i % 3 for i in range(11)]
    plain = Task("t", head(), Padded(samples(), labels), batch_size=1)
    data = Sorted(samples(), labels)
    found = evaluate(merged, [Task("t", head(), data, batch_size=4)], progress=False)
    lengths = [data.lengths[i] for asked in data.asked[1:] for i in asked]
    assert lengths == sorted(data.lengths, reverse=True)
    assert found.predictions == {"t": by_hand(merged, plain)}
    expected = evaluate(merged, [plain], progress=False)
    assert found.accuracy == expected.accuracy
    for layer, mean in expected.routing["t"].items():
        assert found.routing["t"][layer] == pytest.approx(mean, rel=1e-4)


def test_routing_by_task_and_layer(merged: nn.Module) -> None:
    tasks = [
        Task(name, head(), Padded(samples(seed=seed), [0] * 11), batch_size=4)
        for seed, name in enumerate(("one", "two"))
    ]
    found = evaluate(merged, tasks, progress=False)
    (layer,) = wemoe_layers(merged)
    assert list(found.routing) == ["one", "two"]
    for task in tasks:
        data: Any = task.data
        with torch.no_grad():
            weights = torch.cat([wemoe_layers(merged)[layer].routing_weights(s[None]) for s in data.samples])
        assert found.routing[task.name] == {layer: pytest.approx(weights.mean(0).tolist(), rel=1e-4)}


def test_the_mean_is_over_tasks_not_samples(model: Model) -> None:
    tasks = []
    for name, n, right in (("one", 10, True), ("two", 2, False)):
        task = Task(name, head(2), Padded(samples(n), None))
        labels = [p if right else 1 - p for p in by_hand(model, task)]
        tasks.append(Task(name, head(2), Padded(samples(n), labels)))
    found = evaluate(model, tasks, progress=False)
    assert found.accuracy == {"one": 1.0, "two": 0.0}
    assert found.mean == 0.5


def test_flags_are_restored_and_nothing_is_trained(merged: nn.Module) -> None:
    merged.train()
    merged.get_submodule("dropout").eval()
    flags = [module.training for module in merged.modules()]
    evaluate(merged, [Task("t", head(), Padded(samples(), [0] * 11))], progress=False)
    assert [module.training for module in merged.modules()] == flags
    with pytest.raises(InputError):
        evaluate(merged, [Task("t", head(), Padded(samples(), [7] * 11))], progress=False)
    assert [module.training for module in merged.modules()] == flags


def test_eval_mode_restores_each_flag() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Dropout())
    model[1].eval()
    with eval_mode(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == [True, True, False]


def test_a_model_of_another_dtype(model: Model) -> None:
    model.bfloat16()
    found = evaluate(model, [Task("t", head(), Padded(samples(), [0] * 11))], progress=False)
    assert found.n == {"t": 11}


def test_tasks_without_labels_are_all_named_before_any_work(model: Model) -> None:
    labelled = Padded(samples(), [0] * 11)
    tasks = [
        Task("first", head(), labelled),
        Task("second", head(), Padded(samples(), None)),
        Task("third", head(), TensorSamples({"x": torch.zeros(2, 3, D)})),
    ]
    with pytest.raises(InputError) as caught:
        evaluate(model, tasks, progress=False)
    assert "task 'second': its data has no labels" in str(caught.value)
    assert "task 'third': its data has no labels" in str(caught.value)
    assert labelled.asked == [[0]]


class LosesLabels(Padded):
    def batch(self, indices: Sequence[int]) -> tuple[dict[str, Tensor], Tensor | None]:
        inputs, labels = super().batch(indices)
        return inputs, labels if 0 in indices else None


class FloatLabels(Padded):
    def batch(self, indices: Sequence[int]) -> tuple[dict[str, Tensor], Tensor | None]:
        return super().batch(indices)[0], torch.zeros(len(indices))


def test_labels_that_do_not_fit(model: Model) -> None:
    labels = [0] * 11
    labels[6] = 3
    with pytest.raises(InputError, match=r"task 't': label 3 of sample 6 is outside the head's 3 classes"):
        evaluate(model, [Task("t", head(), Padded(samples(), labels), batch_size=4)], progress=False)
    with pytest.raises(InputError, match="task 't': its data has no labels"):
        evaluate(model, [Task("t", head(), LosesLabels(samples(), labels), batch_size=4)], progress=False)
    with pytest.raises(InputError, match=r"expected 4 integer labels, found torch\.float32 \[4\]"):
        evaluate(model, [Task("t", head(), FloatLabels(samples(), labels), batch_size=4)], progress=False)


def test_no_task_two_of_a_name_and_no_sample(model: Model) -> None:
    with pytest.raises(InputError, match="expected at least one task, found none"):
        evaluate(model, [], progress=False)
    task = Task("t", head(), Padded(samples(), [0] * 11))
    empty = Task("e", head(), Padded([], []), unlabelled=Padded([], None))
    with pytest.raises(InputError) as caught:
        evaluate(model, [task, task, empty], progress=False)
    assert "task name 't' is used twice" in str(caught.value)
    assert "task 'e': its data is empty" in str(caught.value)
    assert "task 'e': its unlabelled data is empty" in str(caught.value)


def test_progress_goes_to_stderr(model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    task = Task("t", head(), Padded(samples(), [0] * 11))
    evaluate(model, [task], progress=False)
    assert capsys.readouterr() == ("", "")
    evaluate(model, [task])
    out, err = capsys.readouterr()
    assert out == ""
    assert "11/11" in err


def test_to_json_is_plain(merged: nn.Module) -> None:
    found = evaluate(merged, [Task("t", head(), Padded(samples(), [0] * 11))], progress=False)
    content = found.to_json()
    assert json.loads(json.dumps(content)) == content
    assert content["mean"] == found.mean
    assert content["n"] == {"t": 11}
    assert "predictions" not in content
    assert found.to_json(predictions=True)["predictions"] == found.predictions
    assert isinstance(found, Evaluation)
