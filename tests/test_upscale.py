import copy
import pickle
import sys

import pytest
import torch
from family_models import PIXELS, TEXT
from torch import nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from wemoe_fast import (
    FastWEMoEMLP,
    InputError,
    UnknownArchitectureError,
    accelerate_,
    expert_names,
    task_arithmetic,
    upscale,
    weight_average,
    wemoe_layers,
)
from wemoe_fast.families import find_mlps

HF = ("BertModel", "BertForSequenceClassification", "ViTModel", "CLIPVisionModel", "CLIPModel", "LlamaModel")
ALL = (*HF, "stack", "mlp")


class Block(nn.Module):
    def __init__(self, d: int = 6, act=None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d)
        self.mlp = nn.Sequential(nn.Linear(d, 10), act or nn.GELU(), nn.Dropout(0.1), nn.Linear(10, d))

    def forward(self, x):
        return x + self.mlp(self.norm(x))


class Free(nn.Module):
    """An MLP whose activation is no module."""

    def __init__(self, act) -> None:
        super().__init__()
        self.act, self.up, self.down = act, nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x):
        return self.down(self.act(self.up(x)))


def build(name, **changes):
    """A small random model and inputs for it."""
    torch.manual_seed(0)
    x = torch.randn(3, 5, 6)
    if name == "stack":
        return nn.Sequential(nn.Linear(6, 6), Block(), Block(), nn.Linear(6, 4)), {"input": x}
    if name == "mlp":
        return nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 6)), {"input": x}
    transformers = pytest.importorskip("transformers")
    ids = torch.randint(10, 40, (3, 7))
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    text, pixels = {"input_ids": ids, "attention_mask": mask}, {"pixel_values": torch.randn(3, 3, 8, 8)}
    if name == "CLIPModel":
        config = transformers.CLIPConfig(
            text_config=TEXT | {"eos_token_id": 39, "hidden_size": 12}, vision_config=PIXELS, projection_dim=8
        )
        return transformers.CLIPModel(config), text | pixels
    family = name.removesuffix("Model").split("For")[0]
    vision = family in ("CLIPVision", "ViT")
    config = getattr(transformers, f"{family}Config")(**((PIXELS if vision else TEXT) | changes))
    return getattr(transformers, name)(config), pixels if vision else text


def tuned(base, seed, scale=0.1):
    generator = torch.Generator().manual_seed(seed)
    expert = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in expert.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
    return expert


def experts_of(base, count=2):
    return {f"task{t}": tuned(base, t + 1) for t in range(count)}


def tensors(output):
    """All tensors of an output, nested ones too."""
    if isinstance(output, torch.Tensor):
        return [output]
    return [t for value in (output.values() if hasattr(output, "values") else output or ()) for t in tensors(value)]


def run(model, inputs):
    output = model(inputs["input"]) if "input" in inputs else model(**inputs)
    return [t for t in tensors(output) if t.is_floating_point()]


def close(ours, theirs, tolerance=2e-5):
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


def wake(model):
    """Routers that route: every sample differently."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for layer in wemoe_layers(model).values():
            for parameter in layer.router.parameters():
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


def hooks(model):
    kinds = [name for name in vars(nn.Module()) if name.endswith("hooks")]
    return {(path, kind): len(getattr(module, kind)) for path, module in model.named_modules() for kind in kinds}


def everything(model):
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        {name: module.training for name, module in model.named_modules()},
        {name: id(parameter) for name, parameter in model.named_parameters()},
        hooks(model),
    )


def static(base, experts, chosen):
    """Task arithmetic, with the MLPs of one of the models."""
    model = task_arithmetic(base, experts, 0.3)
    ours = dict(model.named_parameters())
    for site in find_mlps(base):
        names = {parameter: name for name, parameter in base.named_parameters()}
        for linear in site.parts.linears().values():
            for parameter in linear.parameters():
                ours[names[parameter]].data = dict(chosen.named_parameters())[names[parameter]].data.clone()
    return model


@pytest.mark.parametrize("name", ALL)
def test_the_models_given_are_left_as_they_were(name):
    base, _ = build(name)
    experts = experts_of(base)
    next(base.parameters()).requires_grad_(False)
    base.train()
    experts["task1"].eval()
    before = [everything(model) for model in (base, *experts.values())]
    model = upscale(base, experts)
    for m in wemoe_layers(model).values():
        m.up.stack.data.fill_(7)
    for parameter in model.parameters():
        parameter.data.zero_()
    for (state, *rest), given in zip(before, (base, *experts.values()), strict=True):
        now, *others = everything(given)
        assert others == rest
        assert state.keys() == now.keys()
        assert all(torch.equal(state[key], now[key]) for key in state)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("weights", [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0)])
def test_constant_routing_is_a_static_model(name, weights):
    base, inputs = build(name)
    experts = experts_of(base)
    model = upscale(base, experts, router_depth=0)
    for layer in wemoe_layers(model).values():
        layer.router.constant.data = torch.tensor(weights)
    chosen = base if not any(weights) else experts[f"task{weights.index(1.0)}"]
    close(run(model, inputs), run(static(base, experts, chosen), inputs))
    assert len(wemoe_layers(model)) == len(find_mlps(base))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("depth", [1, 2])
def test_the_whole_model_agrees_with_the_loop_over_samples(name, depth):
    base, inputs = build(name)
    # transformers 4 cannot make CLIP's causal mask in float64
    dtype, tolerance = (torch.float32, 1e-4) if name == "CLIPModel" else (torch.float64, 1e-9)
    base = base.to(dtype)
    inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    fresh = upscale(base, experts_of(base, 3), router_depth=depth, seed=0)
    model = wake(copy.deepcopy(fresh))
    oracle = copy.deepcopy(model)
    for layer in wemoe_layers(oracle).values():
        layer.strategy = "reference"
    ours, theirs = run(model, inputs), run(oracle, inputs)
    close(ours, theirs, tolerance)
    assert (ours[0] - run(fresh, inputs)[0]).abs().max() > 1e-3
    for out in (ours, theirs):
        sum((t**2).sum() for t in out).backward()
    ours, theirs = ([p.grad for p in m.parameters() if p.grad is not None] for m in (model, oracle))
    close(ours, theirs, 10 * tolerance)
    assert any(gradient.abs().max() > 1e-3 for gradient in ours)


@pytest.mark.parametrize("name", ALL)
def test_only_routers_are_trained_and_the_model_knows_itself(name):
    base, _ = build(name)
    base.train()
    model = upscale(base, experts_of(base), merge_lambda=0.25, router_depth=1)
    layers = wemoe_layers(model)
    routers = {id(p) for layer in layers.values() for p in layer.router.parameters()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == routers
    assert not any(module.training for module in model.modules())
    assert expert_names(model) == ("task0", "task1")
    assert list(layers) == [site.path for site in find_mlps(base)]
    assert all((layer.router.output.bias == 0.25).all() for layer in layers.values())


def test_a_model_that_is_an_mlp_becomes_one_layer():
    base, _ = build("mlp")
    assert isinstance(upscale(base, experts_of(base)), FastWEMoEMLP)


def test_settings_reach_every_router():
    base, _ = build("stack")
    settings = {"normalization": "softmax", "temperature": 2.0, "top_k": 1, "batch_reduce": True}
    model = upscale(base, experts_of(base), router_depth=1, init_lambda=0.7, **settings)
    for layer in wemoe_layers(model).values():
        found = layer.router.normalization
        assert (found.kind, found.temperature, found.top_k, layer.batch_reduce) == ("softmax", 2.0, 1, True)
        assert (layer.router.output.bias == 0.7).all()
    invariant = upscale(base, experts_of(base), batch_invariant=True)
    assert all(layer.batch_invariant for layer in wemoe_layers(invariant).values())


def test_a_seed_makes_routers_repeatable_and_leaves_the_global_generator_alone():
    base, _ = build("stack")
    experts = experts_of(base)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one = upscale(base, experts, seed=1)
    assert torch.equal(torch.rand(3), expected)
    two, three = upscale(base, experts, seed=1), upscale(base, experts, seed=2)

    def weight(model):
        return next(iter(wemoe_layers(model).values())).router.hidden.weight

    assert torch.equal(weight(one), weight(two))
    assert not torch.equal(weight(one), weight(three))


@pytest.mark.parametrize("name", ["BertModel", "CLIPVisionModel"])
def test_the_whole_model_compiles_without_a_graph_break(name):
    base, inputs = build(name)
    model = wake(upscale(base, experts_of(base)))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        close(run(compiled, inputs), run(model, inputs))
        if name == "BertModel":
            other = inputs | {"attention_mask": torch.ones_like(inputs["attention_mask"])}
            close(run(compiled, other), run(model, other))
            assert (run(compiled, other)[0] - run(compiled, inputs)[0]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles_are_whole_models_of_their_own(name, copied):
    base, inputs = build(name)
    model = wake(upscale(base, experts_of(base)))
    expected = [t.detach().clone() for t in run(model, inputs)]
    twin = copied(model)
    assert hooks(twin) == hooks(model)
    assert expert_names(twin) == expert_names(model)
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    assert all(torch.equal(a, b) for a, b in zip(run(twin, inputs), expected, strict=True))


def test_hooks_registered_after_unpickling_do_not_take_the_masks_place(monkeypatch):
    monkeypatch.setattr(RemovableHandle, "next_id", 0)
    base, inputs = build("BertModel")
    model = wake(upscale(base, experts_of(base)))
    expected, data = run(model, inputs), pickle.dumps(model)
    monkeypatch.setattr(RemovableHandle, "next_id", 0)  # as in a new process
    twin = pickle.loads(data)
    for module in twin.modules():
        for _ in range(3):
            module.register_forward_pre_hook(lambda module, args: None)
            module.register_forward_hook(lambda module, args, output: None)
    assert all(torch.equal(a, b) for a, b in zip(run(twin, inputs), expected, strict=True))


@pytest.mark.parametrize("scaling", [0.0, 0.3, 1.0])
def test_task_arithmetic_is_its_formula(scaling):
    base, _ = build("stack")
    base.register_buffer("count", torch.tensor(3))
    experts = experts_of(base, 3)
    merged = task_arithmetic(base.train(), experts, scaling)
    for name, parameter in merged.named_parameters():
        start = base.get_parameter(name).double()
        expected = start + scaling * sum(expert.get_parameter(name).double() - start for expert in experts.values())
        torch.testing.assert_close(parameter.double(), expected, atol=1e-6, rtol=1e-6)
    assert merged.count == 3
    assert not merged.training
    assert base.training


def test_weight_average_is_the_mean():
    base, _ = build("stack")
    experts = experts_of(base, 3)
    merged = weight_average(base, experts)
    for name, parameter in merged.named_parameters():
        mean = torch.stack([expert.get_parameter(name) for expert in experts.values()]).mean(0)
        torch.testing.assert_close(parameter, mean, atol=1e-6, rtol=1e-6)


def test_sums_in_half_precision_are_formed_in_float32():
    base = nn.Linear(2, 2, bias=False).to(torch.bfloat16)
    base.weight.data.fill_(1.0)
    experts = {str(t): copy.deepcopy(base) for t in range(9)}
    for expert in experts.values():
        expert.weight.data.fill_(1 + 2**-7)  # lost when added to 2 in bfloat16, eight times
    experts["0"].weight.data.fill_(3.0)
    assert (task_arithmetic(base, experts, 0.5).weight == 1 + 0.5 * (2 + 8 * 2**-7)).all()


def test_tied_weights_stay_tied():
    transformers = pytest.importorskip("transformers")
    base = transformers.BertForMaskedLM(transformers.BertConfig(**TEXT))
    model = upscale(base, experts_of(base))
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight


# What is refused


def refused(match, base, experts, error=InputError):
    with pytest.raises(error, match=match) as caught:
        upscale(base, experts)
    return str(caught.value)


def test_no_expert_is_refused():
    refused("at least one expert", build("stack")[0], {})


def test_everything_wrong_with_the_experts_is_listed_at_once():
    base, _ = build("stack")
    experts = experts_of(base, 5)
    experts["task0"][0] = nn.Linear(6, 7)
    experts["task1"][3] = nn.Linear(6, 4, bias=False)
    experts["task2"][3].weight = nn.Parameter(torch.ones(4, 6, dtype=torch.int8), requires_grad=False)
    experts["task3"][1].mlp[0].weight.data[0, 0] = float("nan")
    experts["task3"][3].bias.data[1] = float("inf")
    experts["task4"][2].extra = nn.Linear(1, 1)
    message = refused("problems", base, experts)
    for part in (
        "'task0': 0.weight: expected shape (6, 6) as in the base, found (7, 6)",
        "'task1': 3.bias is missing",
        "'task2': 3.weight: expected a dtype like torch.float32",
        "'task3': 1.mlp.0.weight: expected finite",
        "'task3': 3.bias: expected finite",
        "'task4': 2.extra.weight is not in the base",
    ):
        assert part in message


def test_experts_of_another_dtype_give_a_model_in_the_dtype_of_the_base():
    base, _ = build("stack")
    experts = experts_of(base)
    narrow = copy.deepcopy(base).bfloat16()
    model = upscale(narrow, experts, seed=0)
    exact = upscale(copy.deepcopy(narrow).double(), experts, seed=0)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    for name, parameter in model.named_parameters():
        if ".router." not in name:  # one rounding of the exact value
            torch.testing.assert_close(parameter, exact.get_parameter(name).bfloat16(), rtol=2**-8, atol=1e-7)


def test_a_base_with_nan_is_refused():
    base, _ = build("stack")
    experts = experts_of(base)
    base[0].weight.data[0, 0] = float("nan")
    refused("base: 0.weight: expected finite", base, experts)


def test_an_unknown_architecture_is_refused_with_what_looks_like_an_mlp():
    base = nn.Sequential(nn.Conv1d(3, 3, 1), nn.Sequential(nn.Linear(4, 8), nn.Softplus(), nn.Linear(8, 4)))
    assert "4 -> 8" in refused("Softplus|Sequential", base, experts_of(base), UnknownArchitectureError)


def test_models_merged_already_are_refused():
    base, _ = build("stack")
    experts = experts_of(base)
    merged = upscale(base, experts)
    message = refused("not merged yet", merged, {"a": merged})
    assert "base" in message
    assert "expert 'a'" in message
    assert "1.mlp and 1 more" in message
    refused("expert 'task1': expected a model that is not merged", base, experts | {"task1": merged})
    mlp, _ = build("mlp")
    refused("the model itself", upscale(mlp, experts_of(mlp)), experts_of(mlp))


@pytest.mark.parametrize("act", [nn.ReLU(), nn.Softplus()])
def test_an_expert_with_another_activation_is_named(act):
    base, _ = build("stack")
    experts = experts_of(base)
    experts["task1"][2].mlp[1] = act
    message = refused("task1", base, experts)
    assert "2.mlp" in message
    assert "task0" not in message
    assert "1.mlp'" not in message


@pytest.mark.parametrize(("act", "fits"), [(F.gelu, True), (lambda x: F.gelu(x), True), (F.relu, False)])
def test_activations_that_are_no_modules_are_compared_by_what_they_do(act, fits):
    base = nn.Sequential(Free(F.gelu), Free(F.gelu))
    expert = nn.Sequential(Free(F.gelu), Free(act))
    if fits:
        assert len(wemoe_layers(upscale(base, {"a": expert}))) == 2
    else:
        assert "MLP '1'" in refused("'a'.*expected activation 'gelu'|activation", base, {"a": expert})


def test_private_attributes_can_be_activations_too():
    class Private(Free):
        def __init__(self, act) -> None:
            super().__init__(act)
            self._act = act

        def forward(self, x):
            return self.down(self._act(self.up(x)))

    refused("activation", nn.Sequential(Private(F.gelu)), {"a": nn.Sequential(Private(F.relu))})


def test_an_expert_whose_gate_and_up_changed_places_is_refused():
    class Gated(nn.Module):
        def __init__(self, swapped) -> None:
            super().__init__()
            self.swapped = swapped
            self.one, self.two, self.down = nn.Linear(6, 10), nn.Linear(6, 10), nn.Linear(10, 6)

        def forward(self, x):
            gate, up = (self.two, self.one) if self.swapped else (self.one, self.two)
            return self.down(F.silu(gate(x)) * up(x))

    base = nn.Sequential(Gated(False))
    assert wemoe_layers(upscale(base, {"a": nn.Sequential(Gated(False))}))
    refused("roles", base, {"a": nn.Sequential(Gated(True))})


def test_experts_are_not_probed_where_they_look_like_the_base(monkeypatch):
    base, _ = build("BertModel")
    experts = experts_of(base)
    seen = []
    for name in ("parts_of",):
        monkeypatch.setattr(sys.modules["wemoe_fast.upscale"], name, lambda *args: seen.append(args))
    upscale(base, experts)
    assert not seen


def test_chunks_of_tokens_are_not_routed_by_themselves():
    base, inputs = build("BertModel")
    chunked, _ = build("BertModel", chunk_size_feed_forward=1)
    experts = experts_of(base)
    model = upscale(chunked, experts, seed=0)
    close(run(model, inputs), run(upscale(base, experts, seed=0), inputs))
    assert model.config.chunk_size_feed_forward == 0
    assert chunked.config.chunk_size_feed_forward == chunked.encoder.layer[0].chunk_size_feed_forward == 1


def test_depths_and_options_that_do_not_fit_are_refused():
    base, _ = build("stack")
    with pytest.raises(InputError, match="depth"):
        upscale(base, experts_of(base), router_depth=3)
    with pytest.raises(InputError, match="top_k"):
        upscale(base, experts_of(base), top_k=3)
    with pytest.raises(InputError, match="batch_reduce"):
        upscale(base, experts_of(base), batch_reduce=True, batch_invariant=True)


# accelerate_


def with_fusion_bench(name="CLIPVisionModel", kind="dense", **options):
    """A small model with FusionBench's modules in it, and inputs."""
    pytest.importorskip("fusion_bench")
    from fusion_bench.models.sparse_we_moe import SparseWeightEnsemblingMoE, construct_weight_ensembling_gate
    from fusion_bench.models.sparse_we_moe import SparseWeightEnsemblingMoE_ShardGate as Shared
    from fusion_bench.models.we_moe import WeightEnsemblingMoE

    base, inputs = build(name)
    base.eval()
    sites = [
        path
        for path, module in base.named_modules()
        if type(module).__name__ == "CLIPMLP" or path in ("1.mlp", "2.mlp")
    ]
    options = {"batch_first": True, "router_hidden_layers": 2} | options
    gate = construct_weight_ensembling_gate(16 + 4, 2, init_lambda=0.3, num_hidden_layers=2)
    for index, path in enumerate(sites):
        mlp = base.get_submodule(path)
        experts = [tuned(mlp, 10 * index + t) for t in range(2)]
        width = next(mlp.parameters()).shape[1]
        if kind == "dense":
            module = WeightEnsemblingMoE(width, mlp, experts, 0.3, **options)
        elif kind == "sparse":
            module = SparseWeightEnsemblingMoE(width, mlp, experts, 0.3, layer_idx=index, tv_prune_ratio=0.5, **options)
        else:
            module = Shared(
                width, mlp, experts, 0.3, layer_idx=index, tv_prune_ratio=0.5, sharedgate=gate,
                position_encoding=True, position_encoding_dim=4, **options,
            )  # fmt: skip
        owner, _, attribute = path.rpartition(".")
        setattr(base.get_submodule(owner), attribute, module)
    generator = torch.Generator().manual_seed(3)
    for path, parameter in base.named_parameters():
        parameter.requires_grad_("gate" in path)
        if "gate" in path:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return base.eval(), inputs


def router_gradients(model, inputs):
    model.zero_grad()
    sum((t**2).sum() for t in run(model, inputs)).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("kind", ["dense", "sparse", "shared"])
@pytest.mark.parametrize("batch_reduce", [False, True])
def test_accelerate_keeps_outputs_and_gradients_and_undo_restores_everything(kind, batch_reduce):
    model, inputs = with_fusion_bench(kind=kind, batch_reduce=batch_reduce)
    before, modules, hooked = run(model, inputs), dict(model.named_modules()), hooks(model)
    expected = router_gradients(model, inputs)
    handle = accelerate_(model)
    assert len(handle.replaced) == len(wemoe_layers(model)) == 2
    close(run(model, inputs), before)
    close(sorted(router_gradients(model, inputs), key=torch.numel), sorted(expected, key=torch.numel), 1e-4)
    assert handle.undo() is model
    after = dict(model.named_modules())
    assert after.keys() == modules.keys()
    assert all(after[path] is modules[path] for path in modules)
    assert hooks(model) == hooked
    assert all(torch.equal(a, b) for a, b in zip(run(model, inputs), before, strict=True))
    handle.undo()
    assert not wemoe_layers(model)


def test_accelerate_as_a_context_manager_undoes_itself_even_on_errors():
    model, _ = with_fusion_bench()
    modules = dict(model.named_modules())
    with accelerate_(model, token_masks=True) as fast:
        assert fast is model
        assert wemoe_layers(model)
    assert all(module is modules[path] for path, module in model.named_modules())
    with pytest.raises(ZeroDivisionError), accelerate_(model):
        raise ZeroDivisionError
    assert all(module is modules[path] for path, module in model.named_modules())


def test_accelerate_changes_this_instance_only():
    model, inputs = with_fusion_bench()
    twin = copy.deepcopy(model)
    expected = run(twin, inputs)
    accelerate_(model)
    assert wemoe_layers(model)
    assert not wemoe_layers(twin)
    assert all(torch.equal(a, b) for a, b in zip(run(twin, inputs), expected, strict=True))


def test_an_optimiser_made_before_goes_on_training_the_routers():
    model, inputs = with_fusion_bench()
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = run(model, inputs)
    with accelerate_(model):
        router_gradients(model, inputs)
        optimiser.step()
        trained = run(model, inputs)
    moved = (trained[0] - before[0]).abs().max()
    assert moved > 1e-3
    assert (run(model, inputs)[0] - trained[0]).abs().max() < 1e-3 * moved


def test_a_module_registered_twice_stays_one():
    model, inputs = with_fusion_bench("stack")
    model[2].mlp = model[1].mlp
    before = run(model, inputs)
    original = model[1].mlp
    handle = accelerate_(model)
    assert model[1].mlp is model[2].mlp
    assert handle.replaced == ("1.mlp", "2.mlp")
    close(run(model, inputs), before)
    handle.undo()
    assert model[1].mlp is model[2].mlp is original


def test_a_model_without_wemoe_modules_is_refused():
    with pytest.raises(InputError, match="found none"):
        accelerate_(build("stack")[0])
    model, _ = with_fusion_bench("stack")
    with pytest.raises(InputError, match="from_wemoe"):
        accelerate_(model[1].mlp)


def test_a_base_with_fusion_bench_modules_is_refused():
    model, _ = with_fusion_bench("stack")
    refused("accelerate_", model, {"a": copy.deepcopy(model)})


@pytest.mark.parametrize("token_masks", [True, False])
def test_token_masks_are_a_choice(token_masks):
    model, inputs = with_fusion_bench("CLIPModel")
    pixels = inputs.pop("pixel_values")
    text = model.text_model
    handle = None
    # The vision tower's width differs; only the text tower is compared.
    handle = accelerate_(model, token_masks=token_masks)
    padded = text(**inputs).last_hidden_state[0, :4]
    alone = text(input_ids=inputs["input_ids"][:1, :4], attention_mask=inputs["attention_mask"][:1, :4])
    difference = (padded - alone.last_hidden_state[0]).abs().max()
    assert (difference < 1e-5) == token_masks
    model(**inputs, pixel_values=pixels)
    handle.undo()
    assert not any(hooks(model).values())
