import copy
import gc
import pickle

import pytest
import torch
from family_models import PIXELS, TEXT
from torch import nn
from torch.utils.checkpoint import checkpoint

from wemoe_fast import InputError, upscale, wemoe_layers

transformers = pytest.importorskip("transformers")


def perturbed(base, scale=0.1):
    expert = copy.deepcopy(base)
    for parameter in expert.parameters():
        parameter.data += scale * torch.randn_like(parameter)
    return expert


def merged(base, **options):
    """A merged model whose routers tell samples apart, without dropout."""
    torch.manual_seed(0)
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model = upscale(base, {name: perturbed(base) for name in "ab"}, **options)
    for layer in wemoe_layers(model).values():
        for parameter in layer.router.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def bert(**options):
    torch.manual_seed(0)
    return merged(transformers.BertModel(transformers.BertConfig(**TEXT, attention_probs_dropout_prob=0.0)), **options)


def clip(**options):
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config=TEXT | {"eos_token_id": 39, "hidden_size": 12},
        vision_config=PIXELS,
        projection_dim=8,
    )
    return merged(transformers.CLIPModel(config), **options)


def text(padded=(0, 3), side="right", batch=3, tokens=8):
    """Ids and mask; sample ``padded[0]`` has ``padded[1]`` padding tokens."""
    ids = torch.randint(10, 39, (batch, tokens), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    sample, count = padded
    mask[sample, tokens - count :] = 0
    return (ids, mask) if side == "right" else (ids, mask.flip(1))


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


def equal(ours, theirs, tolerance=1e-6):
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=1e-4)


def stacks(model):
    return {id(layer.token_masks): layer.token_masks for layer in wemoe_layers(model).values() if layer.token_masks}


def watch(model):
    """The masks that routers get from now on."""
    seen = []
    for layer in wemoe_layers(model).values():
        layer.router.register_forward_hook(lambda module, args, output: seen.append(args[1]))
    return seen


def assert_forgotten(model):
    assert all(masks.calls == [] for masks in stacks(model).values())


# Padding


@pytest.mark.parametrize("kind", ["int", "bool", "float"])
@pytest.mark.parametrize("positional", [False, True])
def test_padding_does_not_change_a_sample(kind, positional):
    model, (ids, mask) = bert(), text()
    mask = mask.to({"int": torch.int64, "bool": torch.bool, "float": torch.float32}[kind])
    output = model(ids, mask) if positional else model(input_ids=ids, attention_mask=mask)
    alone = model(input_ids=ids[:1, :5], attention_mask=mask[:1, :5]).last_hidden_state[0]
    torch.testing.assert_close(output.last_hidden_state[0, :5], alone, atol=1e-5, rtol=1e-5)
    unmasked = model(input_ids=ids).last_hidden_state
    assert (unmasked[0, :5] - alone).abs().max() > 1e-3
    assert_forgotten(model)


def test_padding_on_the_left_does_not_change_a_sample():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**TEXT, num_key_value_heads=2)
    model, (ids, mask) = merged(transformers.LlamaModel(config)), text(side="left")
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    output = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).last_hidden_state
    alone = model(input_ids=ids[:1, 3:], attention_mask=mask[:1, 3:], use_cache=False).last_hidden_state[0]
    torch.testing.assert_close(output[0, 3:], alone, atol=1e-5, rtol=1e-5)
    assert (model(input_ids=ids, use_cache=False).last_hidden_state[0, 3:] - alone).abs().max() > 1e-3


def test_the_mask_of_cached_tokens_is_longer():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**TEXT, num_key_value_heads=2)
    model, (ids, mask) = merged(transformers.LlamaModel(config)), text(padded=(0, 1))
    first = model(input_ids=ids[:, :6], attention_mask=mask[:, :6], use_cache=True)
    seen = watch(model)
    second = model(input_ids=ids[:, 6:], attention_mask=mask, past_key_values=first.past_key_values, use_cache=True)
    assert [m.tolist() for m in seen] == [mask[:, 6:].tolist()] * 2
    assert second.last_hidden_state.shape[1] == 2
    assert_forgotten(model)


def test_padding_does_not_change_a_bit_where_batches_must_not_matter():
    model, (ids, mask) = bert(batch_invariant=True), text()
    layer = model.encoder.layer[0].intermediate
    hidden = torch.randn(3, 8, 16)
    assert torch.equal(layer(hidden, mask)[0, :5], layer(hidden[:1, :5])[0])
    model(input_ids=ids, attention_mask=mask)


def test_wrappers_around_the_model_pass_the_mask_on():
    torch.manual_seed(0)
    model = merged(transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT)))
    ids, mask = text()
    logits = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(
        logits[:1], model(input_ids=ids[:1, :5], attention_mask=mask[:1, :5]).logits, atol=1e-5, rtol=1e-5
    )


def test_masks_of_four_dimensions_are_ignored():
    model, (_, mask) = bert(), text()
    hidden, seen = torch.randn(3, 8, 16), watch(model)
    wide = torch.zeros(3, 1, 8, 8).masked_fill(mask[:, None, None] == 0, -1e30)
    model.encoder(hidden, wide)
    assert seen == [None, None]
    assert_forgotten(model)


# Which mask


def test_the_text_mask_of_two_towers_stays_in_the_text_tower():
    model, (ids, mask) = clip(), text()
    pixels = torch.randn(3, 3, 8, 8)
    both = model(input_ids=ids, attention_mask=mask, pixel_values=pixels)
    image = model.vision_model(pixel_values=pixels).last_hidden_state
    torch.testing.assert_close(both.vision_model_output.last_hidden_state, image)
    alone = model.text_model(input_ids=ids[:1, :5], attention_mask=mask[:1, :5]).last_hidden_state[0]
    torch.testing.assert_close(both.text_model_output.last_hidden_state[0, :5], alone, atol=1e-5, rtol=1e-5)
    paths = wemoe_layers(model)
    towers = [{id(m.token_masks) for p, m in paths.items() if p.startswith(name)} for name in ("text", "vision")]
    assert towers[0].isdisjoint(towers[1])


def test_a_sub_encoder_can_be_called_by_itself():
    model, (ids, mask) = clip(), text()
    tower, hidden = model.text_model, torch.randn(3, 8, 12)
    whole = model(input_ids=ids, attention_mask=mask, pixel_values=torch.randn(3, 3, 8, 8))
    alone = tower(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(alone, whole.text_model_output.last_hidden_state)
    seen = watch(tower)
    tower.encoder(inputs_embeds=hidden)
    assert seen == [None, None]
    other = bert()
    seen = watch(other)
    other.encoder.layer[1](torch.randn(3, 8, 16))
    assert seen == [None]
    assert_forgotten(model)


def test_calls_nest_and_the_inner_mask_counts_inside_only():
    ids, mask = text()
    other = mask.flip(0)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = transformers.BertModel(transformers.BertConfig(**TEXT))

        def forward(self, input_ids, attention_mask=None):
            first = self.inner(input_ids=input_ids, attention_mask=attention_mask)
            self.inner(input_ids=input_ids, attention_mask=other)
            self.inner(input_ids=input_ids)
            self.inner.encoder(torch.zeros(3, 8, 16))
            return first

    outer = merged(Outer())
    seen = watch(outer)
    first = outer(ids, attention_mask=mask).last_hidden_state
    assert [None if m is None else m.tolist() for m in seen[::2]] == [
        mask.tolist(),
        other.tolist(),
        None,
        mask.tolist(),
    ]
    assert torch.equal(first, outer.inner(input_ids=ids, attention_mask=mask).last_hidden_state)
    assert_forgotten(outer)


def test_an_encoder_inherits_the_mask_its_model_was_given():
    """Models drop a mask of ones or widen it on the way down; the routers still see two dimensions."""
    model, (ids, mask) = bert(), text()
    seen = watch(model)
    model(input_ids=ids, attention_mask=mask)
    model(input_ids=ids, attention_mask=torch.ones_like(mask))
    assert [m.sum().item() for m in seen] == [21, 21, 24, 24]


@pytest.mark.parametrize("failing", ["module", "pre-hook", "interrupt"])
def test_a_failed_call_leaves_no_mask_behind(failing):
    model, (ids, mask) = bert(), text()
    expected = model(input_ids=ids).last_hidden_state

    def fail(*_):
        raise KeyboardInterrupt if failing == "interrupt" else ZeroDivisionError

    layer = model.encoder.layer[1]
    hook = layer.register_forward_pre_hook(fail) if failing == "pre-hook" else layer.output.register_forward_hook(fail)
    with pytest.raises((ZeroDivisionError, KeyboardInterrupt)):
        model(input_ids=ids, attention_mask=mask)
    hook.remove()
    if failing != "interrupt":
        assert_forgotten(model)
    assert torch.equal(model(input_ids=ids).last_hidden_state, expected)


def test_an_error_caught_on_the_way_does_not_drop_the_mask_of_the_call_around():
    model, (ids, mask) = bert(), text()
    expected, seen = model(input_ids=ids, attention_mask=mask).last_hidden_state, watch(model)
    first, run = model.encoder.layer[0], model.encoder.layer[0].forward

    def tried_twice(*args, **kwargs):
        def fail(module, args):
            raise ZeroDivisionError

        hook = first.attention.register_forward_pre_hook(fail)
        with pytest.raises(ZeroDivisionError):
            run(*args, **kwargs)
        hook.remove()
        return run(*args, **kwargs)

    first.forward = tried_twice
    assert torch.equal(model(input_ids=ids, attention_mask=mask).last_hidden_state, expected)
    assert len(seen) == 2
    assert_forgotten(model)


def test_a_hook_that_fails_before_ours_does_not_drop_the_mask_of_the_call_around():
    def fail(module, args):
        raise ZeroDivisionError

    torch.manual_seed(0)
    base = transformers.BertModel(transformers.BertConfig(**TEXT))
    base.encoder.layer[0].register_forward_pre_hook(fail)
    layer, mask = merged(base).encoder.layer[0], torch.ones(1, 3)
    layer.intermediate.token_masks.enter(mask, None, False)
    with pytest.raises(ZeroDivisionError):
        layer(torch.zeros(1, 3, 16))
    assert layer.intermediate.token_masks.calls == [mask]


class Deep(nn.Module):
    """A model outside of Hugging Face, its MLP two levels below what takes the mask."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.LayerNorm(6), nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6)))

    def forward(self, x, attention_mask=None):
        return self.block(x + 1)


def test_an_interrupted_call_of_any_model_leaves_nothing_for_the_next():
    model, x, mask = merged(Deep()), torch.randn(2, 4, 6), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    expected, masked = model(x), model(x, mask)
    assert (expected - masked)[0].abs().max() > 1e-4

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = model.block.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(x, mask)
    hook.remove()
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_an_mlp_further_down_may_be_checkpointed(reentrant):
    model, x, mask = merged(Deep()), torch.randn(2, 4, 6, requires_grad=True), torch.tensor([[1, 1, 0, 0], [1] * 4])
    expected = gradients(model, model(x, mask).square().sum())
    model.block[1].forward = lambda h, run=model.block[1].forward: checkpoint(run, h, use_reentrant=reentrant)
    equal(gradients(model, model(x, mask).square().sum()), expected)


@pytest.mark.parametrize("shape", [(2, 5), (3, 4), (1, 5)])
def test_a_mask_of_another_size_is_an_error(shape):
    layer = bert().encoder.layer[0].intermediate
    layer.token_masks.enter(torch.ones(shape), None, False)
    with pytest.raises(InputError, match=r"attention_mask: expected \[B, N\] = \(3, 5\)"):
        layer(torch.zeros(3, 5, 16))


def test_a_model_that_adds_tokens_can_be_given_the_longer_mask_by_hand():
    model = bert()
    layer = wemoe_layers(model)["encoder.layer.0.intermediate"]
    hidden, mask = torch.randn(2, 6, 16), torch.ones(2, 6)
    mask[:, 4:] = 0
    torch.testing.assert_close(layer.routing_weights(hidden, mask), layer.routing_weights(hidden[:, :4]))


# Copies


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_made_in_the_middle_of_a_call_holds_no_mask(copied):
    model, (ids, mask) = bert(), text()
    masks = model.encoder.layer[0].intermediate.token_masks
    masks.enter(mask, torch.randn(2, 2), False)
    twin = copied(model)
    assert_forgotten(twin)
    assert all(not m._by_input for m in stacks(twin).values())
    assert len(stacks(twin)) == 1
    masks.leave()
    expected = model(input_ids=ids, attention_mask=mask).last_hidden_state
    for m in stacks(model).values():
        m.calls.append(torch.zeros_like(mask))
    assert torch.equal(twin(input_ids=ids, attention_mask=mask).last_hidden_state, expected)


# Activation checkpointing

MODES = pytest.mark.parametrize("reentrant", [False, True])


def loss_of(model, ids, mask):
    return model(input_ids=ids, attention_mask=mask).last_hidden_state.square().sum()


def checkpointing(model, reentrant):
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    return model


def count_runs(model):
    runs = []
    first = next(iter(wemoe_layers(model).values()))
    first.router.register_forward_hook(lambda *_: runs.append(0))
    return runs


@MODES
def test_checkpointing_keeps_the_masks(reentrant):
    model, (ids, mask) = bert(), text()
    expected = gradients(model, loss_of(model, ids, mask))
    without = gradients(model, loss_of(model, ids, None))
    assert (expected[0] - without[0]).abs().max() > 1e-3
    checkpointing(model, reentrant)
    runs = count_runs(model)
    equal(gradients(model, loss_of(model, ids, mask)), expected)
    assert len(runs) == 2
    equal(gradients(model, loss_of(model, ids, None)), without)
    equal(gradients(model, loss_of(model, ids, mask)), expected)
    assert_forgotten(model)


@MODES
def test_two_forwards_before_one_backward_keep_their_masks(reentrant):
    model = bert()
    batches = [text((0, 3)), text((1, 5)), (text()[0], None), text((2, 1))]
    expected = gradients(model, sum(loss_of(model, *batch) for batch in batches))
    checkpointing(model, reentrant)
    equal(gradients(model, sum(loss_of(model, *batch) for batch in batches)), expected, 1e-5)


@MODES
def test_two_models_before_one_backward_keep_their_masks(reentrant):
    models, batches = [bert(), bert(router_depth=1)], [text((0, 3)), text((1, 5))]
    expected = [gradients(m, loss_of(m, *batch)) for m, batch in zip(models, batches, strict=True)]
    for m in models:
        m.zero_grad()
        checkpointing(m, reentrant)
    sum(loss_of(m, *batch) for m, batch in zip(models, batches, strict=True)).backward()
    for m, gradient in zip(models, expected, strict=True):
        equal([p.grad for p in m.parameters() if p.requires_grad and p.grad is not None], gradient)


@MODES
def test_backward_after_an_unmasked_forward_does_not_use_an_older_mask(reentrant):
    """Addresses of freed inputs come again; what was there before must not count."""
    model, (ids, mask) = bert(), text()
    expected = gradients(model, loss_of(model, ids, None))
    checkpointing(model, reentrant)
    for _ in range(3):
        gradients(model, loss_of(model, ids, mask))
        equal(gradients(model, loss_of(model, ids, None)), expected)


@pytest.mark.parametrize(
    ("what", "reentrant"),
    [(what, mode) for what in ("layer", "forward", "layers", "mlp", "model") for mode in (False, True)]
    + [("encoder", False)],  # reentrant checkpointing takes functions that return tensors
)
def test_anything_may_be_checkpointed(reentrant, what):
    model, (ids, mask) = bert(), text()
    expected = gradients(model, loss_of(model, ids, mask))
    model.embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_())

    def wrap(module, name="forward"):
        run = getattr(module, name)

        def wrapped(*args, **kwargs):
            return checkpoint(lambda *a: run(*a, **kwargs), *args, use_reentrant=reentrant)

        setattr(module, name, wrapped)

    class Called(nn.Module):
        """Checkpoints a module together with its hooks."""

        def __init__(self, *modules) -> None:
            super().__init__()
            self.inner = nn.ModuleList(modules)

        def forward(self, hidden, *args, **kwargs):
            def run(h):
                for module in self.inner:
                    h = module(h, *args, **kwargs)
                    h = h[0] if isinstance(h, tuple) else h
                return h

            result = checkpoint(run, hidden, use_reentrant=reentrant)
            return result if transformers.__version__[0] >= "5" else (result,)

    layers = model.encoder.layer
    if what == "layer":
        model.encoder.layer = nn.ModuleList([Called(layer) for layer in layers])
    elif what == "layers":
        model.encoder.layer = nn.ModuleList([Called(*layers)])
    elif what == "forward":
        for layer in layers:
            wrap(layer)
    elif what == "encoder":
        wrap(model.encoder)
    elif what == "mlp":
        for layer in layers:
            wrap(layer.intermediate)
    runs = count_runs(model)
    if what == "model":
        dummy = torch.zeros((), requires_grad=True)
        loss = checkpoint(lambda _: loss_of(model, ids, mask), dummy, use_reentrant=reentrant)
    else:
        loss = loss_of(model, ids, mask)
    equal(gradients(model, loss), expected)
    assert len(runs) == 2
    assert_forgotten(model)


def test_backward_can_run_twice():
    model, (ids, mask) = bert(), text()
    expected = gradients(model, loss_of(model, ids, mask))
    loss = loss_of(checkpointing(model, False), ids, mask)
    model.zero_grad()
    loss.backward(retain_graph=True)
    equal(gradients(model, loss), expected)


def test_inputs_that_were_moved_are_an_error_and_not_another_gradient():
    model, (ids, mask) = bert(), text()
    expected = gradients(model, loss_of(model, ids, None))
    model.embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_())
    layer, run = model.encoder.layer[1], model.encoder.layer[1].forward
    layer.forward = lambda *args, **kwargs: checkpoint(lambda *a: run(*a, **kwargs), *args, use_reentrant=False)

    def loss(mask):
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda t: t):
            return loss_of(model, ids, mask)

    equal(gradients(model, loss(None)), expected)
    gradients(model, loss_of(model, ids, mask))
    with pytest.raises(InputError, match="activation checkpointing"):
        loss(mask).backward()


def test_one_input_with_two_masks_is_an_error_and_not_another_gradient():
    model, (_, mask) = bert(), text()
    layer = model.encoder.layer[0].intermediate
    masks, hidden = layer.token_masks, torch.randn(3, 8, 16, requires_grad=True)
    outputs = []
    for m in (mask, mask.flip(0)):
        masks.enter(m, None, False)
        outputs.append(checkpoint(layer.__call__, hidden, use_reentrant=False))
        masks.leave()
    with pytest.raises(InputError, match="several masks"):
        sum(outputs).sum().backward()


def test_nothing_is_remembered_longer_than_its_input():
    model, (ids, mask) = bert(), text()
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    checkpointing(model, False)
    gradients(model, loss_of(model, ids, mask))
    gc.collect()
    assert all(not masks._by_input for masks in stacks(model).values())


def test_an_empty_batch_works():
    model = bert()
    layer = wemoe_layers(model)["encoder.layer.0.intermediate"]
    layer.token_masks.enter(torch.ones(0, 4), torch.zeros(0, 4, 16), False)
    assert layer(torch.zeros(0, 4, 16)).shape == (0, 4, 16)
