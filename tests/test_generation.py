import copy
import json
import pickle
import re
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from wemoe_fast import CheckpointError, InputError, PromptRouting, load, reference, save, upscale, wemoe_layers

transformers = pytest.importorskip("transformers")

NEW = 6
ENDLESS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
LLAMA = ENDLESS | {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "initializer_range": 0.5,
}
T5 = ENDLESS | {
    "vocab_size": 40,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 0,
    "initializer_factor": 5.0,
    "dropout_rate": 0.0,
    "tie_word_embeddings": False,
}


def merged(base, seed=0, **options):
    """A float64 model whose routers tell tokens apart by much."""
    torch.manual_seed(seed)
    experts = {name: copy.deepcopy(base) for name in "ab"}
    for expert in experts.values():
        for parameter in expert.parameters():
            parameter.data += 0.5 * parameter.std() * torch.randn_like(parameter)
    model = upscale(base, experts, router_depth=1, **options).double()
    for layer in wemoe_layers(model).values():
        for parameter in layer.router.parameters():
            parameter.data += 0.4 * torch.randn_like(parameter)
    return model


def llama(seed=0, **options):
    torch.manual_seed(seed)
    return merged(transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)), seed, **options)


def t5(seed=0, **options):
    torch.manual_seed(seed)
    return merged(transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)), seed, **options)


def prompts():
    """Three prompts of 5, 7 and 3 tokens, padded on the left."""
    ids = torch.randint(2, 40, (3, 7), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    for row, padding in enumerate((2, 0, 4)):
        ids[row, :padding], mask[row, :padding] = 0, 0
    return ids, mask


def new_tokens(model, ids, mask=None, **options):
    """The tokens that greedy decoding adds."""
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False} | options
    found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids) if mask is None else mask, **options)
    return found if model.config.is_encoder_decoder else found[:, ids.shape[1] :]


class LoopMLP(nn.Module):
    """The published formula, a token at a time: the first ``prompt`` tokens have one weight, each other its own."""

    def __init__(self, layer, prompt):
        super().__init__()
        self.layer, self.prompt = layer, prompt

    def forward(self, x):
        layer, parameters = self.layer, self.layer.router.parameters_for_routing().to_dict()
        prompt = x.shape[1] if self.prompt is None else self.prompt
        fixed = reference.route(x[:, :prompt], parameters)
        outputs = []
        for n in range(x.shape[1]):
            token = x[:, n : n + 1]
            own = n >= prompt and layer.decode_routing == "step"
            weights = reference.route(token, parameters) if own else fixed

            def linear(name, h, activation=None, weights=weights):
                part = getattr(layer, name)
                return reference.merged_linear(h, part.stack, weights, part.bias, activation)

            if layer.gate is None:
                hidden = linear("up", token, layer.activation)
            else:
                hidden = linear("gate", token, layer.activation) * linear("up", token)
            outputs.append(linear("down", hidden))
        return torch.cat(outputs, dim=1)


def loop(model, ids, count=NEW):
    """Greedy tokens of one sequence [1, N], recomputing everything for every token."""
    oracle, encoder_decoder = copy.deepcopy(model), model.config.is_encoder_decoder
    tokens = torch.zeros(1, 1, dtype=torch.long) if encoder_decoder else ids
    for path, layer in wemoe_layers(oracle).items():
        oracle.set_submodule(path, LoopMLP(layer, None if path.startswith("encoder") else tokens.shape[1]))
    for _ in range(count):
        inputs = {"input_ids": ids, "decoder_input_ids": tokens} if encoder_decoder else {"input_ids": tokens}
        with torch.no_grad():
            logits = oracle(**inputs, use_cache=False).logits[:, -1]
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], dim=1)
    return tokens if encoder_decoder else tokens[:, ids.shape[1] :]


def expected(model, ids, mask):
    return torch.cat([loop(model, row[real.bool()][None]) for row, real in zip(ids, mask, strict=True)])


@pytest.fixture(scope="module")
def greedy():
    """What the oracle generates from the prompts with the model of ``llama()``."""
    return expected(llama(), *prompts())


# Tokens


@pytest.mark.parametrize(
    "options",
    [{}, {"batch_invariant": True}, {"use_cache": False}, {"static": True}, {"strategy": "factored"}],
    ids=str,
)
def test_greedy_tokens_are_the_loop_s(options, greedy):
    model = llama(batch_invariant="batch_invariant" in options)
    for layer in wemoe_layers(model).values():
        layer.strategy = options.get("strategy", "auto")
    settings = {"use_cache": options.get("use_cache", True)}
    if "static" in options:
        settings["cache_implementation"] = "static"
    assert torch.equal(new_tokens(model, *prompts(), **settings), greedy)


def test_greedy_tokens_of_every_step_s_own_routing_are_the_loop_s(greedy):
    model = llama(decode_routing="step")
    ids, mask = prompts()
    found = new_tokens(model, ids, mask)
    assert torch.equal(found, expected(model, ids, mask))
    assert not torch.equal(found, greedy)
    assert not torch.equal(new_tokens(model, ids, mask, use_cache=False), greedy)


@pytest.mark.parametrize("routing", ["prompt", "step"])
def test_an_encoder_decoder_s_tokens_are_the_loop_s(routing):
    model, (ids, mask) = t5(decode_routing=routing), prompts()
    ids, mask = ids.flip(1), mask.flip(1)
    found = new_tokens(model, ids, mask)
    assert torch.equal(found, expected(model, ids, mask))
    if routing == "prompt":
        assert torch.equal(new_tokens(model, ids, mask, use_cache=False), found)
        assert not torch.equal(new_tokens(t5(decode_routing="step"), ids, mask), found)


@pytest.mark.parametrize("make", [llama, t5])
def test_beams_of_several_prompts_are_those_of_each_alone(make):
    model, (ids, mask) = make(), prompts()
    options = {"num_beams": 3, "num_return_sequences": 2}
    found = new_tokens(model, ids, mask, **options)
    assert torch.equal(new_tokens(model, ids, mask, **options, use_cache=False), found)
    alone = [new_tokens(model, row[real.bool()][None], **options) for row, real in zip(ids, mask, strict=True)]
    assert torch.equal(found, torch.cat(alone))


def test_samples_of_a_prompt_are_routed_by_it():
    model, (ids, mask) = llama(), prompts()
    found = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        options = {"do_sample": True, "num_return_sequences": 4, "use_cache": use_cache, "top_k": 0}
        found.append(new_tokens(model, ids, mask, **options))
    assert torch.equal(*found)
    assert len(found[0].unique(dim=0)) > 3


def test_one_weight_for_the_batch_stays_that_of_the_prompts():
    model, (ids, mask) = llama(batch_reduce=True), prompts()
    found = new_tokens(model, ids, mask)
    assert torch.equal(new_tokens(model, ids, mask, use_cache=False), found)


@pytest.mark.parametrize("drafts", ["lookup", "model", "t5"])
def test_drafted_tokens_are_no_part_of_the_prompt(drafts):
    make = t5 if drafts == "t5" else llama
    model, ids = make(), torch.tensor([[5, 6, 7, 5, 6, 7, 5, 6]])
    options = (
        {"prompt_lookup_num_tokens": 3, "eos_token_id": 2} if drafts == "lookup" else {"assistant_model": make(seed=1)}
    )
    first = next(layer for path, layer in wemoe_layers(model).items() if not path.startswith("encoder"))
    lengths = []
    first.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    assert torch.equal(new_tokens(model, ids, **options), loop(model, ids))
    assert lengths[0] > (1 if drafts == "t5" else ids.shape[1])


# Loops of one's own


def test_generations_may_take_turns():
    model, ids = llama(), prompts()[0][1:2]
    texts = [ids, ids.flip(1)]
    routings = [PromptRouting(model) for _ in texts]
    tokens, caches = list(texts), [None, None]
    with torch.no_grad():
        for _ in range(NEW):
            for i, routing in enumerate(routings):
                given = tokens[i] if caches[i] is None else tokens[i][:, -1:]
                with routing:
                    output = model(input_ids=given, past_key_values=caches[i], use_cache=True)
                caches[i] = output.past_key_values
                tokens[i] = torch.cat([tokens[i], output.logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    for text, found in zip(texts, tokens, strict=True):
        assert torch.equal(found[:, text.shape[1] :], loop(model, text))
    assert [weights.shape for weights in routings[0].weights.values()] == [(1, 2)] * 2


def test_few_sequences_are_merged_once_within_the_bound():
    model, ids = llama(), prompts()[0]
    size = 2 * 3 * 16 * 24 * 8  # two sequences of one layer
    for allowed, kept in ((2 * size, 2), (size, 1), (size - 1, 0)):
        with torch.no_grad(), PromptRouting(model, merged_bytes=allowed):
            model(input_ids=ids[:2])
            assert [layer.prompt.mlp is not None for layer in wemoe_layers(model).values()].count(True) == kept
    with torch.no_grad(), PromptRouting(model) as routing:
        model(input_ids=ids[:1].expand(50, -1))
        assert [weights.shape for weights in routing.weights.values()] == [(1, 2)] * 2
        assert all(layer.prompt.mlp is not None for layer in wemoe_layers(model).values())
    with PromptRouting(model) as routing:
        logits = model(input_ids=ids[:2]).logits
        assert all(layer.prompt.mlp is None for layer in wemoe_layers(model).values())
    logits.sum().backward()
    assert all(layer.router.output.weight.grad.abs().max() > 0 for layer in wemoe_layers(model).values())


def test_nothing_but_generations_is_concerned():
    model, (ids, mask) = llama(), prompts()
    first, second = (model(input_ids=ids[i : i + 1]).logits for i in (0, 1))
    new_tokens(model, ids, mask)
    with pytest.raises(ZeroDivisionError):
        model.generate(input_ids=ids, attention_mask=mask, logits_processor=[lambda ids, scores: 1 / 0])
    assert all(layer.prompt is None for layer in wemoe_layers(model).values())
    cache = model(input_ids=ids[1:2], use_cache=True).past_key_values
    step, token = llama(decode_routing="step"), torch.tensor([[3]])
    other = step(input_ids=ids[1:2], use_cache=True).past_key_values
    expected = step(input_ids=token, past_key_values=other).logits
    assert torch.equal(model(input_ids=token, past_key_values=cache).logits, expected)
    assert torch.equal(model(input_ids=ids[:1]).logits, first)
    assert torch.equal(model(input_ids=ids[1:2]).logits, second)


def test_a_generation_inside_of_another_does_not_change_it():
    model, ids = llama(), prompts()[0][1:2]
    other = ids.flip(1)

    def generate(tokens, scores):
        assert torch.equal(new_tokens(model, other), inner)
        return scores

    inner = loop(model, other)
    assert torch.equal(new_tokens(model, ids, logits_processor=[generate]), loop(model, ids))


def test_two_threads_at_once_are_refused():
    model, problems = llama(), []

    def enter():
        try:
            with PromptRouting(model):
                pass
        except InputError as error:
            problems.append(str(error))

    with PromptRouting(model):
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
    assert "another thread generates" in problems[0]
    with PromptRouting(model):
        pass


def test_other_sequences_than_the_prompts_are_refused():
    model, routing = llama(), None
    routing = PromptRouting(model)
    with routing:
        model(input_ids=torch.ones(2, 4, dtype=torch.long))
        with pytest.raises(InputError, match="the 2 sequences whose prompts fixed the routing weights, found 3"):
            model(input_ids=torch.ones(3, 4, dtype=torch.long))


# Caches that outlive generate


def left(model, ids, mask, count=2, **options):
    """A cache after ``count`` tokens, and the tokens so far with their mask."""
    options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False} | options
    found = model.generate(input_ids=ids, attention_mask=mask, return_dict_in_generate=True, **options)
    longer = torch.cat([mask, torch.ones_like(found.sequences[:, ids.shape[1] :])], dim=1)
    return found.past_key_values, found.sequences, longer


@pytest.mark.parametrize("change", ["none", "copied", "cropped", "given"])
def test_a_generation_goes_on_from_its_cache(change, greedy):
    model, (ids, mask) = llama(), prompts()
    given = {"past_key_values": transformers.DynamicCache()} if change == "given" else {}
    cache, tokens, longer = left(model, ids, mask, **given)
    if change == "copied":
        cache = copy.deepcopy(cache)
    if change == "cropped":
        cache.crop(-1) if transformers.__version__[0] >= "5" else cache.crop(cache.get_seq_length() - 1)
    found = new_tokens(model, tokens, longer, past_key_values=cache, max_new_tokens=NEW - 2, min_new_tokens=NEW - 2)
    assert torch.equal(found, greedy[:, 2:])


@pytest.mark.parametrize("change", ["reordered", "another", "none"])
def test_a_cache_of_unknown_prompts_is_refused(change):
    model, (ids, mask) = llama(), prompts()
    cache, tokens, longer = left(model, ids, mask)
    if change == "reordered":
        cache.reorder_cache(torch.tensor([1, 0, 2]))
    if change == "another":
        cache = model(input_ids=tokens[:, :-1], attention_mask=longer[:, :-1], use_cache=True).past_key_values
    if change == "none":
        new_tokens(model, tokens, longer, past_key_values=cache)
        return
    with pytest.raises(InputError, match="past_key_values: expected a cache that generate of this model returned"):
        new_tokens(model, tokens, longer, past_key_values=cache)
    for layer in wemoe_layers(model).values():
        layer.decode_routing = "step"
    new_tokens(model, tokens, longer, past_key_values=cache)


def test_everything_that_prompts_cannot_fix_is_named_at_once():
    with pytest.raises(InputError) as error:
        new_tokens(llama(), prompts()[0], prefill_chunk_size=2, guidance_scale=1.5)
    assert all(part in str(error.value) for part in ("2 problems", "prefill_chunk_size", "guidance_scale", "'step'"))
    assert new_tokens(llama(decode_routing="step"), *prompts(), guidance_scale=1.5).shape == (3, NEW)


def test_a_prompt_that_arrives_in_parts_is_refused():
    model = llama()
    with PromptRouting(model, tokens=5), pytest.raises(InputError, match="5 tokens, in one forward, found 3"):
        model(input_ids=torch.ones(1, 3, dtype=torch.long))


# The setting


@pytest.mark.parametrize("routing", ["prompt", "step"])
def test_the_policy_is_saved_and_old_files_mean_the_default(routing, tmp_path):
    model, (ids, mask) = llama(decode_routing=routing), prompts()
    path = save(model, tmp_path / "model") / "wemoe.json"
    loaded = load(tmp_path / "model")
    assert {layer.decode_routing for layer in wemoe_layers(loaded).values()} == {routing}
    assert torch.equal(new_tokens(loaded, ids, mask), new_tokens(model, ids, mask))
    description = json.loads(path.read_text())
    for layer in description["layers"].values():
        assert layer.pop("decode_routing") == routing
    path.write_text(json.dumps(description))
    assert {layer.decode_routing for layer in wemoe_layers(load(tmp_path / "model")).values()} == {"prompt"}
    for layer in description["layers"].values():
        layer["decode_routing"] = "never"
    path.write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match="decode_routing: expected one of prompt, step, found 'never'"):
        load(tmp_path / "model")


def test_an_unknown_policy_is_an_error():
    with pytest.raises(InputError, match="decode_routing: expected one of prompt, step, found 'always'"):
        llama(decode_routing="always")
    assert "decode_routing='step'" in repr(llama(decode_routing="step"))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_generates_by_itself(copied, greedy):
    model = llama()
    with PromptRouting(model):
        model(input_ids=torch.ones(1, 4, dtype=torch.long))
        twin = copied(model)
    assert all(layer.prompt is None for layer in wemoe_layers(twin).values())
    for parameter in model.parameters():
        parameter.data.zero_()
    del model
    assert torch.equal(new_tokens(twin, *prompts()), greedy)


def test_the_example_of_the_readme_runs(tmp_path, monkeypatch):
    section = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8").split("## Generation")[1]
    example = re.findall(r"```python\n(.*?)```", section, re.DOTALL)[0]
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: i for i, word in enumerate(["<pad>", "<unk>", "The", "Once", "weather", "upon", "today"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
    monkeypatch.chdir(tmp_path)
    fast.save_pretrained("models/base")
    for name in ("base", "stories", "reports"):
        torch.manual_seed(len(name))
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).save_pretrained(f"models/{name}")
    names = {}
    exec(example, names)
    assert len(names["texts"]) == 2
    assert {layer.decode_routing for layer in wemoe_layers(names["model"]).values()} == {"prompt"}
