from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wemoe_fast.adapt import DRIFT_LIMIT, Adaptation, Draw, adapt, entropy
from wemoe_fast.errors import InputError, WEMoEError
from wemoe_fast.tasks import Head, Task, TensorSamples
from wemoe_fast.upscale import upscale, wemoe_layers

D = 4


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(D, 8), nn.GELU(), nn.Linear(8, D)) for _ in range(2))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.dropout(x + block(x))
        return x


def build(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    base = Model()
    experts = {name: copy.deepcopy(base) for name in ("a", "b")}
    for expert in experts.values():
        for parameter in expert.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
    return upscale(base, experts, **{"router_depth": 1, **options})


@pytest.fixture
def model() -> nn.Module:
    return build()


def make_tasks(n: int = 10) -> list[Task]:
    generator = torch.Generator().manual_seed(3)
    tasks = []
    for name, classes in (("one", 3), ("two", 2)):
        head = Head(torch.randn(classes, D, generator=generator), None, tuple(map(str, range(classes))))
        tasks.append(Task(name, head, TensorSamples({"x": torch.randn(n, 3, D, generator=generator)})))
    return tasks


@pytest.fixture
def tasks() -> list[Task]:
    return make_tasks()


def routers(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for layer in wemoe_layers(model).values() for p in layer.router.parameters()]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(left, right, strict=True))


def test_entropy_is_that_of_the_softmax() -> None:
    logits = torch.randn(5, 3, dtype=torch.float64)
    expected = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(entropy(logits), expected)
    assert entropy(torch.zeros(1, 7)).item() == pytest.approx(math.log(7))
    assert entropy(torch.tensor([[1e4, 0.0]])).item() == 0


@pytest.mark.parametrize("penalty", [0.0, 2.0])
def test_it_is_the_published_procedure(penalty: float, model: nn.Module, tasks: list[Task]) -> None:
    """Against a plain rendering of it: one graph over all tasks, backward, Adam; and with a drift penalty."""
    expected = copy.deepcopy(model).eval()
    moved: list[Tensor] = []
    for layer in wemoe_layers(expected).values():
        first = copy.deepcopy(layer.router).requires_grad_(False)
        layer.router.register_forward_hook(
            lambda _m, inputs, weights, first=first: moved.append(weights - first(*inputs).detach())
        )
    parameters = [p for layer in wemoe_layers(expected).values() for p in layer.router.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=0.01)
    draws = {task.name: Draw(10, 4, 5, task.name) for task in tasks}
    losses: dict[str, list[float]] = {task.name: [] for task in tasks}
    for step in range(1, 7):
        optimizer.zero_grad()
        total = torch.zeros(())
        for task in tasks:
            inputs, _ = task.data.batch(draws[task.name].indices(step))
            p = (expected(**inputs).mean(1) @ task.head.weight.T).softmax(-1)
            loss = -(p * p.log()).sum(-1).mean()
            losses[task.name].append(loss.item())
            squares = [difference.square().mean() for difference in moved]
            moved.clear()
            total = total + loss + penalty * sum(squares) / len(squares)
        total.backward()
        optimizer.step()
    before = routers(model)
    found = adapt(model, tasks, steps=6, lr=0.01, batch_size=4, seed=5, drift_penalty=penalty, progress=False)
    for name, values in losses.items():
        assert found.entropy[name] == pytest.approx(values, rel=1e-4)
    for left, right in zip(routers(model), routers(expected), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-5)
    assert not any(torch.equal(x, y) for x, y in zip(before, routers(model), strict=True))


def test_entropy_falls(model: nn.Module, tasks: list[Task]) -> None:
    found = adapt(model, tasks, steps=40, lr=0.003, batch_size=10, progress=False)
    for values in found.entropy.values():
        assert values[-1] < values[0] - 0.01


def test_only_routers_change_and_everything_is_put_back(tasks: list[Task]) -> None:
    model = build().train()
    model.get_submodule("dropout").eval()
    for layer in wemoe_layers(model).values():
        layer.batch_reduce = True
    next(model.parameters()).requires_grad_(False)
    held = next(wemoe_layers(model)[name].router.output.weight for name in wemoe_layers(model))
    held.grad = torch.ones_like(held)
    chosen = {id(p) for layer in wemoe_layers(model).values() for p in layer.router.parameters()}
    state = {k: v.clone() for k, v in model.state_dict().items() if ".router." not in k}
    flags = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    tasks[0].head.weight.requires_grad_()
    adapt(model, tasks, steps=2, batch_size=4, progress=False)
    assert flags == ([m.training for m in model.modules()], [p.requires_grad for p in model.parameters()])
    assert all(layer.batch_reduce for layer in wemoe_layers(model).values())
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())
    assert torch.equal(held.grad, torch.ones_like(held))
    assert all(p.grad is None for p in model.parameters() if p is not held)
    assert tasks[0].head.weight.grad is None
    assert any(id(p) not in chosen for p in model.parameters()) or state


def test_everything_is_put_back_after_an_error(model: nn.Module, tasks: list[Task]) -> None:
    model.train()
    flags = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    tasks[1].head = Head(torch.zeros(2, D + 1), None, ("0", "1"))
    with pytest.raises(InputError, match="expects features of size 5"):
        adapt(model, tasks, steps=2, routing="batch_reduce", progress=False)
    assert flags == ([m.training for m in model.modules()], [p.requires_grad for p in model.parameters()])
    assert not any(layer.batch_reduce for layer in wemoe_layers(model).values())


def test_no_dropout_and_no_global_randomness(tasks: list[Task]) -> None:
    found = []
    for seed in (1, 2):
        model = build().train()
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        adapt(model, tasks, steps=3, batch_size=4, progress=False)
        assert torch.equal(torch.get_rng_state(), state)
        found.append(routers(model))
    assert same(*found)


def test_the_same_seed_gives_the_same_bits_and_another_does_not(tasks: list[Task]) -> None:
    found = []
    for seed in (0, 0, 1):
        model = build(router_depth=2)
        result = adapt(model, tasks, steps=8, lr=0.01, batch_size=4, seed=seed, progress=False)
        found.append((routers(model), result.entropy))
    assert same(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    assert not same(found[0][0], found[2][0])


@pytest.mark.parametrize("routing", ["per_sample", "batch_reduce"])
def test_the_routing_asked_for_is_used(model: nn.Module, tasks: list[Task], routing: str) -> None:
    rows: list[int] = []
    for layer in wemoe_layers(model).values():
        layer.batch_reduce = routing == "per_sample"  # the opposite
        layer.router.register_forward_hook(lambda _m, _i, output: rows.append(output.shape[0]))
    adapt(model, tasks, steps=1, batch_size=4, routing=routing, progress=False)
    assert rows == [4 if routing == "per_sample" else 1] * 4
    assert all(layer.batch_reduce == (routing == "per_sample") for layer in wemoe_layers(model).values())


def test_a_router_shared_by_two_layers_is_trained_once(model: nn.Module, tasks: list[Task]) -> None:
    first, second = wemoe_layers(model).values()
    second.router = first.router
    before = first.router.output.bias.detach().clone()
    adapt(model, tasks, steps=1, lr=0.01, batch_size=4, progress=False)
    # Adam's first step is lr, whatever the gradient; trained twice, it would be more
    moved = (first.router.output.bias.detach() - before).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.01), rtol=1e-3, atol=0)


def test_it_works_under_no_grad_and_inference_mode(tasks: list[Task]) -> None:
    expected = build()
    adapt(expected, tasks, steps=2, batch_size=4, progress=False)
    for mode in (torch.no_grad, torch.inference_mode):
        model = build()
        with mode():
            adapt(model, tasks, steps=2, batch_size=4, progress=False)
        assert same(routers(model), routers(expected))


def test_unlabelled_data_is_preferred_and_labels_are_not_read(model: nn.Module, tasks: list[Task]) -> None:
    class Labels:
        def __init__(self, data: Any) -> None:
            self.data = data

        def __len__(self) -> int:
            return len(self.data)

        def batch(self, indices: Sequence[int]) -> tuple[dict[str, Tensor], Tensor | None]:
            return self.data.batch(indices)[0], torch.full((len(indices),), 10**6)

    class Never:
        def __len__(self) -> int:
            return 5

        def batch(self, indices: Sequence[int]) -> tuple[dict[str, Tensor], Tensor | None]:
            raise AssertionError

    expected = build()
    adapt(expected, tasks, steps=2, batch_size=4, progress=False)
    changed = [Task(task.name, task.head, Never(), unlabelled=Labels(task.data)) for task in tasks]
    adapt(model, changed, steps=2, batch_size=4, progress=False)
    assert same(routers(model), routers(expected))


def test_no_step_changes_nothing(model: nn.Module, tasks: list[Task]) -> None:
    before = routers(model)
    found = adapt(model, tasks, steps=0, progress=False)
    assert same(before, routers(model))
    assert found.entropy == {"one": [], "two": []}
    assert found.routing_drift == []


def test_result_and_progress(model: nn.Module, tasks: list[Task], capsys: pytest.CaptureFixture[str]) -> None:
    found = adapt(model, tasks, steps=3, lr=1e-3, batch_size=4, seed=9)
    out, err = capsys.readouterr()
    assert out == ""
    assert "3/3" in err
    assert f"one={found.entropy['one'][-1]:.3f}" in err
    assert isinstance(found, Adaptation)
    assert (found.steps, found.lr, found.batch_size, found.seed, found.routing) == (
        3,
        1e-3,
        4,
        9,
        "per_sample",
    )
    assert [len(values) for values in (*found.entropy.values(), found.routing_drift)] == [3, 3, 3]
    assert found.seconds > 0
    assert json.loads(json.dumps(found.to_json())) == found.to_json()
    adapt(model, tasks, steps=1, progress=False)
    assert capsys.readouterr() == ("", "")


def test_all_bad_arguments_come_at_once(model: nn.Module, tasks: list[Task]) -> None:
    with pytest.raises(InputError) as caught:
        adapt(
            nn.Linear(2, 2),
            [tasks[0], tasks[0]],
            steps=-1,
            lr=math.nan,
            batch_size=0,
            seed=1.5,  # type: ignore[arg-type]
            routing="per_batch",
            drift_penalty=-1.0,
        )
    for part in (
        "adapt: 8 problems",
        "drift_penalty: expected a finite number of at least 0, found -1.0",
        "steps: expected an integer of at least 0, found -1",
        "lr: expected a finite number above 0, found nan",
        "batch_size: expected an integer of at least 1, found 0",
        "seed: expected an integer of at least 0, found 1.5",
        "routing: expected one of per_sample, batch_reduce, found 'per_batch'",
        "model: expected WEMoE layers, found none in Linear",
        "task name 'one' is used twice",
    ):
        assert part in str(caught.value)


def test_batch_reduce_is_refused_for_batch_invariant_layers(model: nn.Module, tasks: list[Task]) -> None:
    name, layer = next(iter(wemoe_layers(model).items()))
    layer.batch_invariant = True
    with pytest.raises(InputError, match=rf"batch_reduce is not for batch-invariant layers \({name}\)"):
        adapt(model, tasks, steps=1, routing="batch_reduce", progress=False)
    adapt(model, tasks, steps=1, batch_size=4, progress=False)


def test_a_task_that_no_router_reaches(model: nn.Module, tasks: list[Task]) -> None:
    class Constant(Task):
        def logits(self, model: nn.Module, inputs: Any) -> Tensor:
            return torch.zeros(4, 3)

    constant = Constant("constant", tasks[0].head, tasks[0].data)
    with pytest.raises(InputError, match="task 'constant': its logits do not depend on any router"):
        adapt(model, [tasks[0], constant], steps=1, progress=False)


class Poison:
    """Good samples, until one call gives something else."""

    def __init__(self, data: Any, call: int) -> None:
        self.data, self.call, self.calls = data, call, 0

    def __len__(self) -> int:
        return len(self.data)

    def batch(self, indices: Sequence[int]) -> tuple[dict[str, Tensor], Tensor | None]:
        self.calls += 1
        inputs, _ = self.data.batch(indices)
        return {"x": inputs["x"] * (torch.nan if self.calls == self.call else 1)}, None


def test_a_loss_that_is_not_finite_names_step_and_task(tasks: list[Task]) -> None:
    expected = build()
    adapt(expected, tasks, steps=2, batch_size=4, progress=False)
    model = build()
    poisoned = [tasks[0], Task("two", tasks[1].head, Poison(tasks[1].data, 4))]
    with pytest.raises(WEMoEError, match=r"step 4: task 'two' has loss nan") as caught:
        adapt(model, poisoned, steps=9, batch_size=4, progress=False)
    assert "'one'" not in str(caught.value)
    adapt(expected := build(), tasks, steps=2, batch_size=4, progress=False)
    assert same(routers(model), routers(expected))  # step 3 was the last to give finite losses, after 2 updates


def test_a_loss_that_is_not_finite_at_once_leaves_the_routers(model: nn.Module, tasks: list[Task]) -> None:
    before = routers(model)
    with pytest.raises(WEMoEError, match="step 1: task 'two' has loss nan"):
        adapt(model, [tasks[0], Task("two", tasks[1].head, Poison(tasks[1].data, 1))], progress=False)
    assert same(before, routers(model))


def test_a_gradient_that_is_not_finite_is_not_applied(model: nn.Module, tasks: list[Task]) -> None:
    class BadGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * torch.inf

    class Bad(Task):
        def logits(self, model: nn.Module, inputs: Any) -> Tensor:
            return BadGradient.apply(super().logits(model, inputs))

    before = routers(model)
    bad = Bad("bad", tasks[1].head, tasks[1].data)
    with pytest.raises(WEMoEError, match="step 1: task 'bad' has a gradient that is not finite"):
        adapt(model, [tasks[0], bad], batch_size=4, progress=False)
    assert same(before, routers(model))


def test_drift_is_the_largest_layers_and_warned_of_once(model: nn.Module, tasks: list[Task]) -> None:
    with pytest.warns(UserWarning, match=r"mean \|routing weight\| of layer 'blocks\.\d'") as caught:
        found = adapt(model, tasks, steps=40, lr=0.2, batch_size=10, progress=False)
    assert len(caught) == 1
    step = next(i for i, value in enumerate(found.routing_drift, 1) if value > DRIFT_LIMIT)
    assert f"step {step}:" in str(caught[0].message)
    assert sum(value > DRIFT_LIMIT for value in found.routing_drift) > 1


def test_drift_is_measured_against_the_first_step_or_one_expert(model: nn.Module, tasks: list[Task]) -> None:
    for layer, bias in zip(wemoe_layers(model).values(), (0.3, 1.5), strict=True):
        nn.init.zeros_(layer.router.output.weight)
        nn.init.constant_(layer.router.output.bias, bias)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = adapt(model, tasks, steps=2, lr=0.1, batch_size=10, progress=False)
    assert found.routing_drift[0] == pytest.approx(1.0)  # layer 2: 1.5 / 1.5; layer 1: 0.3 / 0.5
    for layer in wemoe_layers(model).values():
        nn.init.zeros_(layer.router.output.weight)
        nn.init.constant_(layer.router.output.bias, 0.3)
    found = adapt(model, tasks, steps=1, batch_size=10, progress=False)
    assert found.routing_drift == [pytest.approx(0.6)]


@pytest.mark.parametrize("routing", ["per_sample", "batch_reduce"])
def test_a_penalty_holds_the_routing_near_its_start(routing: str, tasks: list[Task]) -> None:
    def distance(penalty: float) -> float:
        first, model = build(), build()
        adapt(
            model, tasks, steps=30, lr=0.02, batch_size=10, drift_penalty=penalty, routing=routing, progress=False
        )  # fmt: skip
        x = tasks[0].data.batch(range(10))[0]["x"]
        pairs = zip(wemoe_layers(first).values(), wemoe_layers(model).values(), strict=True)
        with torch.no_grad():
            return sum(float((a.routing_weights(x) - b.routing_weights(x)).square().mean()) for a, b in pairs)

    free, held, fixed = (distance(penalty) for penalty in (0.0, 1.0, 100.0))
    assert fixed < held / 4
    assert held < 0.6 * free


def test_a_penalty_needs_logits_that_depend_on_routers_too(model: nn.Module, tasks: list[Task]) -> None:
    class Constant(Task):
        def logits(self, model: nn.Module, inputs: Any) -> Tensor:
            return super().logits(model, inputs).detach()

    with pytest.raises(InputError, match="task 'constant': its logits do not depend on any router"):
        adapt(model, [Constant("constant", tasks[0].head, tasks[0].data)], steps=1, drift_penalty=1.0, progress=False)
    assert not any(layer.router._forward_hooks for layer in wemoe_layers(model).values())


def test_draws_use_every_sample_before_any_again() -> None:
    draw = Draw(10, 4, 0, "t")
    stream = [i for step in range(1, 11) for i in draw.indices(step)]
    rounds = [stream[k : k + 10] for k in range(0, 40, 10)]
    assert all(sorted(part) == list(range(10)) for part in rounds)
    assert len({tuple(part) for part in rounds}) == 4


def test_draws_depend_on_seed_name_and_step_alone() -> None:
    assert Draw(10, 4, 0, "t").indices(7) == [Draw(10, 4, 0, "t").indices(s) for s in range(1, 8)][-1]
    others = [Draw(100, 8, seed, name).indices(1) for seed, name in ((0, "t"), (1, "t"), (0, "u"))]
    assert len({tuple(indices) for indices in others}) == 3


def test_a_batch_larger_than_the_data() -> None:
    assert sorted(Draw(3, 6, 0, "t").indices(5)) == [0, 0, 1, 1, 2, 2]
