"""What holds for a merged model, for every family of architectures."""

import copy
import inspect
import os

import pytest
import torch
from family_models import MASKED, NAMES, base, experts, inputs, merged, routing, run, sites
from torch import nn

from wemoe_fast import load, save, task_arithmetic, upscale, wemoe_layers
from wemoe_fast.activations import lookup
from wemoe_fast.linears import bias_of, weight_of

EVERY = pytest.mark.parametrize("name", NAMES)
BOTH_SIDES = pytest.mark.parametrize("side", ["right", "left"])
RELATIVE = ("T5", "T5 1.1")
EVERYTHING = "WEMOE_FAST_EVERY_MODEL" in os.environ
ONE_OF_EACH = ("BERT", "Gemma", "DistilBERT", "GPT-2", "T5 1.1", "Whisper", "torchvision", "like old open_clip")

KNOWN = {
    "BERT": ("BERT", "gelu"),
    "RoBERTa": ("BERT", "gelu"),
    "DistilBERT": ("DistilBERT", "gelu"),
    "LLaMA": ("LLaMA", "silu"),
    "Mistral": ("LLaMA", "silu"),
    "Qwen2": ("LLaMA", "silu"),
    "Qwen3": ("LLaMA", "silu"),
    "Gemma": ("LLaMA", "gelu_tanh"),
    "GPT-2": ("GPT-2", "gelu_tanh"),
    "T5": ("T5", "relu"),
    "T5 1.1": ("T5 1.1", "gelu_tanh"),
    "Whisper": ("Whisper", "gelu"),
    "BART": ("Whisper", "gelu"),
    "CLIP": ("CLIP", "quick_gelu"),
    "SigLIP": ("CLIP", "gelu_tanh"),
    "DINOv2": ("CLIP", "gelu"),
    "timm": ("CLIP", "gelu"),
    "torchvision": ("any other", "gelu"),
    "open_clip": ("GPT-2", "quick_gelu"),
    "open_clip, [N, B, d]": ("GPT-2", "quick_gelu"),
    "like old open_clip": ("GPT-2", "gelu"),
}


def close(ours, theirs, tolerance):
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        scale = max(1.0, float(other.detach().abs().max()))
        torch.testing.assert_close(one, other, atol=tolerance * scale, rtol=tolerance)


def static(name, chosen):
    """Task arithmetic, with the MLPs of one of the models."""
    model = task_arithmetic(base(name), experts(name), 0.3)
    ours, theirs = dict(model.named_parameters()), dict(chosen.named_parameters())
    names = {parameter: path for path, parameter in base(name).named_parameters()}
    for site in sites(name):
        for linear in site.parts.linears().values():
            for parameter in linear.parameters():
                ours[names[parameter]].data = theirs[names[parameter]].data.clone()
    return model


@EVERY
def test_the_mlps_are_found(name):
    found = sites(name)
    if name in KNOWN:
        family, activation = KNOWN[name]
        assert {site.family.name.split(",")[0] for site in found} == {family}
        assert {site.parts.activation for site in found} == {activation}
    towers = 2 if name in ("T5", "T5 1.1", "Whisper", "BART", "CLIP") or name.startswith("open_clip") else 1
    assert len(found) == 2 * towers + (name == "SigLIP")
    assert all(site.batch_first == (name not in ("open_clip, [N, B, d]", "like old open_clip")) for site in found)


@EVERY
def test_every_mlp_of_the_running_model_is_its_formula(name):
    model, seen, handles = base(name), {}, []
    for site in sites(name):
        outer = model.get_submodule(site.path)
        last = site.parts.down if site.emptied else outer
        handles.append(
            outer.register_forward_hook(lambda m, args, output, site=site: seen.update({site.path: args[0]}))
        )
        handles.append(last.register_forward_hook(lambda m, args, y, site=site: seen.update({(site.path, "y"): y})))
    with torch.no_grad():
        run(model, inputs(name))
    for handle in handles:
        handle.remove()
    for site in sites(name):
        parts, act = site.parts, lookup(site.parts.activation)
        products = {
            role: nn.functional.linear(seen[site.path], weight_of(linear), bias_of(linear))
            for role, linear in parts.linears().items()
            if role != "down"
        }
        hidden = act(products["up"]) if parts.gate is None else act(products["gate"]) * products["up"]
        expected = nn.functional.linear(hidden, weight_of(parts.down), bias_of(parts.down))
        torch.testing.assert_close(seen[site.path, "y"], expected, atol=1e-5, rtol=1e-4)


@EVERY
def test_constant_routing_is_a_static_model(name):
    model, given = upscale(base(name), experts(name), router_depth=0), inputs(name)
    for weights in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0)):
        for layer in wemoe_layers(model).values():
            layer.router.constant.data = torch.tensor(weights)
        chosen = base(name) if not any(weights) else experts(name)[f"task{weights.index(1.0)}"]
        with torch.no_grad():
            close(run(model, given), run(static(name, chosen), given), 2e-5)
    unchanged = upscale(base(name), {"a": experts(name)["task0"]}, merge_lambda=0, router_depth=0)
    assert not any(layer.router.constant.any() for layer in wemoe_layers(unchanged).values())
    with torch.no_grad():
        close(run(unchanged, given), run(base(name), given), 2e-5)


@EVERY
def test_outputs_and_router_gradients_are_those_of_the_loop_over_samples(name):
    model = copy.deepcopy(merged(name, 2))
    oracle = copy.deepcopy(model)
    for layer in wemoe_layers(oracle).values():
        layer.strategy = "reference"
    given, results, gradients = inputs(name), [], []
    for m in (model, oracle):
        results.append(run(m, given))
        sum(t.square().mean() for t in results[-1]).backward()
        gradients.append([p.grad for layer in wemoe_layers(m).values() for p in layer.router.parameters()])
    close(*results, 2e-5)
    close(*gradients, 1e-4)
    assert all(any(g.abs().max() > 0 for g in layer) for layer in zip(*[iter(gradients[0])] * 4, strict=True))
    weights = routing(model, given)
    assert (weights[:, 0] - weights[:, 1]).abs().amax(1).min() > 1e-4  # every layer tells samples apart


@EVERY
def test_a_sample_is_routed_by_itself(name):
    model, given = merged(name), inputs(name)
    weights = routing(model, given)
    assert weights.shape[1:] == (3, 2)
    alone = routing(model, {key: value[1:2] for key, value in given.items()})
    torch.testing.assert_close(alone[:, 0], weights[:, 1], atol=1e-5, rtol=1e-5)


@EVERY
def test_a_saved_model_is_read_back(name, tmp_path):
    model = merged(name)
    save(model, tmp_path / "merged")
    known = type(model).__module__.startswith("transformers.")
    again = load(tmp_path / "merged", base=None if known else base(name))
    with torch.no_grad():
        ours, theirs = run(model, inputs(name)), run(again, inputs(name))
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    assert list(wemoe_layers(again)) == list(wemoe_layers(model))


def positions(model, given):
    """Position ids that count real tokens, where the model takes them."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return {}
    first = 2 if "Roberta" in type(model).__name__ else 0
    return {"position_ids": first + (given["attention_mask"].cumsum(1) - 1).clamp_min(0)}


@BOTH_SIDES
@pytest.mark.parametrize("name", MASKED)
def test_padding_does_not_change_routing(name, side):
    model, given = merged(name), inputs(name, side)
    extra = positions(model, given)
    other = dict(given)
    for ids, mask in (("input_ids", "attention_mask"), ("decoder_input_ids", "decoder_attention_mask")):
        if ids in given:
            other[ids] = torch.where(given[mask].bool(), given[ids], (given[ids] + 7) % 40)
            assert not torch.equal(other[ids][0], given[ids][0])
    expected = routing(model, given | extra)
    torch.testing.assert_close(routing(model, other | extra), expected, atol=1e-5, rtol=1e-5)
    if side == "right" or extra or name in RELATIVE:
        real = slice(0, 4) if side == "right" else slice(3, 7)
        alone = {key: value[:1, real] for key, value in (given | extra).items()}
        torch.testing.assert_close(routing(model, alone)[:, 0], expected[:, 0], atol=1e-5, rtol=1e-5)
    unmasked = {key: torch.ones_like(value) if "mask" in key else value for key, value in given.items()}
    assert (routing(model, unmasked | extra)[:, 0] - expected[:, 0]).abs().max() > 1e-4


def test_a_mask_of_frames_is_no_token_mask():
    model, given = merged("Whisper"), inputs("Whisper")
    frames = torch.ones(3, 12, dtype=torch.long)
    frames[0, 6:] = 0
    masked = routing(model, given | {"attention_mask": frames})
    assert torch.equal(masked, routing(model, given))
    tokens = torch.ones_like(given["decoder_input_ids"])
    tokens[0, 4:] = 0
    decoded = routing(model, given | {"decoder_attention_mask": tokens})
    changed = (decoded - masked).abs().amax(2) > 1e-5
    assert changed.tolist() == [[False] * 3] * 2 + [[True, False, False]] * 2


@EVERY
def test_the_merged_model_compiles(name):
    if name not in ONE_OF_EACH and not EVERYTHING:
        pytest.skip("one model of each family is compiled; WEMOE_FAST_EVERY_MODEL=1 compiles the others too")
    model, given = merged(name, layers=1), inputs(name)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        close(run(compiled, given), run(model, given), 2e-5)


@pytest.mark.skipif(not EVERYTHING, reason="takes 20 s; WEMOE_FAST_EVERY_MODEL=1 runs it")
def test_inductor_takes_the_merged_model():
    model, given = merged("like old open_clip"), inputs("like old open_clip")
    torch._dynamo.reset()
    with torch.no_grad():
        close(run(torch.compile(model), given), run(model, given), 2e-5)
