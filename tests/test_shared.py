import copy

import pytest
import torch
from family_models import TEXT
from torch import nn

from wemoe_fast import InputError, load, save, upscale, wemoe_layers
from wemoe_fast.shared import share

transformers = pytest.importorskip("transformers")

IDS = torch.randint(10, 39, (3, 7), generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[1] * 4 + [0] * 3, [1] * 7, [1] * 7])


def classifier(labels, **changes):
    config = transformers.BertConfig(**(TEXT | changes), num_labels=labels)
    return randomised(transformers.BertForSequenceClassification(config))


def randomised(model):
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def encoder(**changes):
    return randomised(transformers.BertModel(transformers.BertConfig(**(TEXT | changes))))


def wake(model):
    for layer in wemoe_layers(model).values():
        for parameter in layer.router.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


@pytest.fixture
def heads():
    """A base without a head, and two classifiers with heads of their own."""
    return encoder(), {"two": classifier(2), "five": classifier(5)}


def test_heads_are_left_to_each_task(heads):
    base, experts = heads
    shared = share(base, experts)
    assert shared.left == dict.fromkeys(experts, ("classifier.weight", "classifier.bias"))
    assert shared.kept == ()
    report = shared.report()
    assert "expert 'two' keeps its own classifier.weight, classifier.bias" in report
    assert "expert 'five' keeps" in report


def test_what_is_shared_is_merged_as_if_there_were_no_heads(heads):
    base, experts = heads
    model = upscale(base, share(base, experts).experts, router_depth=1, seed=0)
    alone = upscale(base, {name: expert.bert for name, expert in experts.items()}, router_depth=1, seed=0)
    ours, theirs = model.state_dict(), alone.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_each_task_has_its_own_head_on_the_same_layers(heads):
    base, experts = heads
    shared = share(base, experts)
    model = wake(upscale(base, shared.experts, router_depth=1))
    for name, expert in experts.items():
        own = shared.model_of(name, model)
        with torch.no_grad():
            pooled = model(input_ids=IDS, attention_mask=MASK).pooler_output
            torch.testing.assert_close(own(input_ids=IDS, attention_mask=MASK).logits, expert.classifier(pooled))
        assert all(any(layer is other for other in model.modules()) for layer in wemoe_layers(own).values())
        assert own.bert.embeddings.word_embeddings.weight is model.embeddings.word_embeddings.weight
        assert {id(p) for p in own.parameters() if p.requires_grad} == {
            id(p) for p in model.parameters() if p.requires_grad
        }
    for layer in wemoe_layers(model).values():  # what is trained in one is trained in all
        layer.router.output.bias.data += 1
    assert (own(input_ids=IDS, attention_mask=MASK).logits - experts["five"].classifier(pooled)).abs().max() > 1e-3


def test_padding_does_not_change_a_task_model(heads):
    base, experts = heads
    shared = share(base, experts)
    own = shared.model_of("two", wake(upscale(base, shared.experts)))
    padded = own(input_ids=IDS, attention_mask=MASK).logits[:1]
    alone = own(input_ids=IDS[:1, :4], attention_mask=MASK[:1, :4]).logits
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=1e-5)


def test_task_models_can_be_run_in_turn_with_masks_of_their_own(heads):
    base, experts = heads
    shared = share(base, experts)
    model = wake(upscale(base, shared.experts))
    tasks = {name: shared.model_of(name, model) for name in experts}
    fresh = {name: copy.deepcopy(task) for name, task in tasks.items()}
    for mask in (MASK, None, MASK.flip(0)):
        for name, task in tasks.items():
            expected = fresh[name](input_ids=IDS, attention_mask=mask).logits
            assert torch.equal(task(input_ids=IDS, attention_mask=mask).logits, expected)
    model(input_ids=IDS, attention_mask=MASK)
    assert all(layer.token_masks.calls == [] for layer in wemoe_layers(model).values())


def test_a_task_model_is_saved_and_read_back(heads, tmp_path):
    base, experts = heads
    shared = share(base, experts)
    own = shared.model_of("five", wake(upscale(base, shared.experts)))
    again = load(save(own, tmp_path / "five"))
    assert type(again) is type(experts["five"])
    assert torch.equal(again(input_ids=IDS, attention_mask=MASK).logits, own(input_ids=IDS, attention_mask=MASK).logits)


def test_another_vocabulary_is_left_to_its_task():
    base, experts = encoder(), {"same": encoder(), "more": encoder(vocab_size=43)}
    shared = share(base, experts)
    words = ("embeddings.word_embeddings.weight",)
    assert shared.left == {"same": words, "more": words}
    assert shared.kept == words
    assert "the base keeps its own embeddings.word_embeddings.weight" in shared.report()
    model = wake(upscale(base, shared.experts))
    own = shared.model_of("more", model)
    assert own.embeddings.word_embeddings.weight.shape == (43, 16)
    assert own.embeddings.position_embeddings.weight is model.embeddings.position_embeddings.weight
    assert own(input_ids=IDS + 3, attention_mask=MASK).last_hidden_state.isfinite().all()


def test_heads_of_another_kind_at_other_places():
    torch.manual_seed(0)
    llama = TEXT | {"num_key_value_heads": 2}
    base = randomised(transformers.LlamaForCausalLM(transformers.LlamaConfig(**llama)))
    expert = randomised(
        transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**llama, num_labels=3, pad_token_id=0))
    )
    shared = share(base, {"labels": expert})
    assert shared.kept == ("lm_head.weight",)
    assert shared.left == {"labels": ("score.weight",)}
    model = wake(upscale(base, shared.experts))
    own = shared.model_of("labels", model)
    hidden = model.model(input_ids=IDS, attention_mask=MASK).last_hidden_state
    found = own.model(input_ids=IDS, attention_mask=MASK).last_hidden_state
    torch.testing.assert_close(found, hidden)


def test_a_task_model_fixes_its_routing_while_it_generates():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**TEXT, num_key_value_heads=2, eos_token_id=None, pad_token_id=0)
    base, *tuned = (randomised(transformers.LlamaForCausalLM(config)) for _ in range(3))
    shared = share(base, dict(zip("ab", tuned, strict=True)))
    model = wake(upscale(base, shared.experts, router_depth=1)).double()
    own = shared.model_of("a", model)
    options = {"input_ids": IDS, "attention_mask": MASK.flip(1), "max_new_tokens": 8, "do_sample": False}
    expected = model.generate(**options)
    assert torch.equal(own.generate(**options), expected)
    assert not torch.equal(type(own).generate(own, **options), expected)  # routes each token anew


def test_models_that_differ_in_nothing_are_merged_whole():
    base, experts = encoder(), {"a": encoder(), "b": encoder()}
    shared = share(base, experts)
    assert shared.report() == "everything is merged"
    model = shared.model_of("a", wake(upscale(base, shared.experts)))
    assert len(wemoe_layers(model)) == 2


def test_nothing_given_is_changed(heads):
    base, experts = heads
    before = [copy.deepcopy(m.state_dict()) for m in (base, *experts.values())]
    shared = share(base, experts)
    model = upscale(base, shared.experts)
    own = shared.model_of("two", model)
    own.classifier.weight.data.zero_()
    for parameter in model.parameters():
        parameter.data.zero_()
    for state, given in zip(before, (base, *experts.values()), strict=True):
        assert all(torch.equal(value, given.state_dict()[key]) for key, value in state.items())
        assert not wemoe_layers(given)


# What is refused


def test_layers_that_differ_are_refused_all_at_once():
    base = encoder()
    experts = {"wide": classifier(2, intermediate_size=25), "deep": classifier(2, num_hidden_layers=3)}
    experts["odd"] = classifier(2)
    experts["odd"].bert.encoder.layer[1].output.extra = nn.Parameter(torch.ones(1))
    with pytest.raises(InputError) as caught:
        share(base, experts)
    message = str(caught.value)
    assert "expert 'wide': encoder.layer.0.intermediate.dense.weight: expected shape (24, 16)" in message
    assert "found shape (25, 16)" in message
    assert "expert 'deep': expected 2 MLPs as in the base, found 3" in message
    assert "expert 'odd': encoder.layer.1.output.extra: expected none" in message


def test_another_activation_is_refused():
    with pytest.raises(InputError, match=r"'a': MLP 'encoder\.layer\.0': expected activation 'gelu'.*found 'relu'"):
        share(encoder(), {"a": classifier(2, hidden_act="relu")})


def test_no_expert_and_no_such_expert(heads):
    base, experts = heads
    with pytest.raises(InputError, match="at least one expert"):
        share(base, {})
    shared = share(base, experts)
    with pytest.raises(InputError, match="expected one of two, five, found 'three'"):
        shared.model_of("three", upscale(base, shared.experts))


def test_nan_in_an_expert_is_found_when_it_is_merged(heads):
    base, experts = heads
    experts["two"].bert.pooler.dense.bias.data[0] = float("nan")
    with pytest.raises(InputError, match=r"'two'.*pooler\.dense\.bias: expected finite"):
        upscale(base, share(base, experts).experts)
