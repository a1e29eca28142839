from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
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


def test_outputs_that_are_no_numbers_are_not_counted_as_predictions(model: Model, tmp_path: Path) -> None:
    values = samples()
    values[6] = values[6] * torch.nan
    task = Task("t", head(), Padded(values, [0] * 11), batch_size=4)
    with pytest.raises(InputError, match="task 't': the model's output for sample 6 is not a number"):
        evaluate(model, [task], records=tmp_path, progress=False)
    (path,) = tmp_path.glob("*/*.jsonl")
    assert len(path.read_bytes().splitlines()) == 1, "the batch before it"


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


# resumed


class StoppedError(Exception):
    pass


class Counting(nn.Module):
    """Counts the samples it is given, and gives up at a call."""

    def __init__(self, model: nn.Module, calls: int = 10**9) -> None:
        super().__init__()
        self.model, self.calls, self.samples = model, calls, 0

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if self.calls == 0:
            raise StoppedError
        self.calls -= 1
        self.samples += len(x)
        return self.model(x, attention_mask)


class Known(Sorted):
    """With a fingerprint."""

    def fingerprint(self) -> str:
        return f"{[sample.sum().item() for sample in self.samples]} {self.labels}"


LABELS = [i % 3 for i in range(11)]


def content(found: Evaluation) -> str:
    return json.dumps(found.to_json(predictions=True))


@pytest.mark.parametrize("kind", [Padded, Sorted, Known])
@pytest.mark.parametrize("calls", [0, 1, 2, 5])
def test_an_interrupted_run_goes_on_where_it_was(
    merged: nn.Module, tmp_path: Path, kind: type[Padded], calls: int
) -> None:
    tasks = [Task(name, head(), kind(samples(seed=seed), LABELS), batch_size=4) for seed, name in enumerate("ab")]
    expected = evaluate(Counting(merged), tasks, progress=False)
    with pytest.raises(StoppedError):
        evaluate(Counting(merged, calls), tasks, records=tmp_path, progress=False)
    model = Counting(merged)
    found = evaluate(model, tasks, records=tmp_path, progress=False)
    assert content(found) == content(expected)
    assert sum(found.computed.values()) == model.samples
    assert model.samples == 22 if calls == 0 else 0 < model.samples < 22
    again = Counting(merged, calls=0)
    found = evaluate(again, tasks, records=tmp_path, progress=False)
    assert content(found) == content(expected)
    assert found.computed == {"a": 0, "b": 0}
    assert found.samples_per_second == 0


def test_a_damaged_record_is_computed_again(merged: nn.Module, tmp_path: Path) -> None:
    task = Task("t", head(), Known(samples(), LABELS), batch_size=4)
    expected = evaluate(merged, [task], records=tmp_path, progress=False)
    (path,) = tmp_path.glob("*/*.jsonl")
    path.write_bytes(path.read_bytes().replace(b'"predictions":[', b'"predictions":[ ', 1))
    with pytest.warns(RuntimeWarning, match="1 damaged records"):
        found = evaluate(merged, [task], records=tmp_path, progress=False)
    assert content(found) == content(expected)
    assert 0 < found.computed["t"] < 11


def flip(tensor: Tensor) -> None:
    tensor.detach().view(-1).view(torch.uint8)[0] ^= 1


@pytest.mark.parametrize(
    "change", ["model", "flag", "dtype", "data", "labels", "head", "bias", "scale", "size", "tokens", "alone"]
)
@pytest.mark.parametrize("kind", [Sorted, Known])
def test_nothing_stale_is_used(merged: nn.Module, tmp_path: Path, change: str, kind: type[Padded]) -> None:
    def run(records: Path | None) -> Evaluation:
        data = kind(values, labels)
        task = Task("t", classifier, data, batch_size=5 if change == "size" and changed else 4)
        options: dict[str, Any] = {"batch_tokens": 12} if change == "tokens" and changed else {}
        options |= {"batch_invariant": True} if change == "alone" and changed else {}
        return evaluate(merged, [task], records=records, progress=False, **options)

    changed, values, labels, classifier = False, samples(), list(LABELS), head()
    classifier.bias = torch.zeros(3) if change == "bias" else None
    run(tmp_path)
    changed = True
    if change == "model":
        flip(next(iter(merged.parameters())))
    elif change == "flag":
        next(iter(wemoe_layers(merged).values())).batch_invariant = True
    elif change == "dtype":
        merged.double()
    elif change == "data":
        values[-1] = values[-1] + 1.0
    elif change == "labels":
        labels[0] = 1
    elif change == "head":
        flip(classifier.weight)
    elif change == "bias":
        classifier.bias = torch.tensor([0.0, 0.5, 0.0])
    elif change == "scale":
        classifier.scale, classifier.normalize = 2.0, True
    found = run(tmp_path)
    assert content(found) == content(run(None))
    if kind is Sorted and change in ("data", "labels"):
        assert 0 < found.computed["t"] < 11, "only the batch that changed"
    else:
        assert found.computed["t"] == 11


class Neighbourly(nn.Module):
    """What a sample gets depends on its company, and on its padding."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.model(x, attention_mask) + x.sum((0, 1)) * x.shape[1]


class Scarce(Neighbourly):
    """Has memory for two samples."""

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(x, attention_mask)


@pytest.mark.parametrize("calls", [1, 3, 8])
def test_halved_batches_are_resumed_to_the_same_bits(merged: nn.Module, tmp_path: Path, calls: int) -> None:
    task = Task("t", head(), Sorted(samples(), LABELS), batch_size=5)
    expected = evaluate(Counting(Scarce(merged)), [task], progress=False)
    assert expected.n == {"t": 11}
    with pytest.raises(StoppedError):
        evaluate(Counting(Scarce(merged), calls), [task], records=tmp_path, progress=False)
    found = evaluate(Counting(Scarce(merged)), [task], records=tmp_path, progress=False)
    assert content(found) == content(expected)


def test_two_rows_of_one_model_share_records(merged: nn.Module, tmp_path: Path) -> None:
    task = Task("t", head(), Known(samples(), LABELS))
    evaluate(merged, [task], records=tmp_path, progress=False)
    assert evaluate(copy.deepcopy(merged), [task], records=tmp_path, progress=False).computed == {"t": 0}


def test_batch_invariant_results_hang_on_no_batch(merged: nn.Module) -> None:
    def run(batch_invariant: bool) -> set[str]:
        found = set()
        for kind, size, tokens in ((Padded, 1, None), (Padded, 5, None), (Sorted, 4, None), (Sorted, 4, 17)):
            task = Task("t", head(), kind(samples(), LABELS), batch_size=size)
            options: dict[str, Any] = {"batch_tokens": tokens, "batch_invariant": batch_invariant}
            found.add(content(evaluate(Neighbourly(merged), [task], progress=False, **options)))
        return found

    assert len(run(True)) == 1
    assert len(run(False)) > 1


def test_progress_counts_what_was_recorded(
    merged: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = Task("t", head(), Padded(samples(), LABELS), batch_size=4)
    with pytest.raises(StoppedError):
        evaluate(Counting(merged, 2), [task], records=tmp_path, progress=False)
    evaluate(Counting(merged), [task], records=tmp_path)
    shown = capsys.readouterr().err
    assert "8/11" in shown
    assert "11/11" in shown
