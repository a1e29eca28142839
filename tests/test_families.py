import time

import pytest
import torch
from family_models import PIXELS as VISION
from family_models import TEXT
from torch import nn
from torch.nn import functional as F

from wemoe_fast.activations import lookup
from wemoe_fast.errors import InputError, UnknownArchitectureError
from wemoe_fast.families import FAMILIES, find_mlps, locate_mlps

PIXELS = {"pixel_values": torch.randn(2, 3, 8, 8)}
TOKENS = {"input_ids": torch.arange(10).view(2, 5)}


def build(name, **changes):
    """A small random model of a class of transformers, and inputs for it."""
    transformers = pytest.importorskip("transformers")
    base = name.removesuffix("Model").split("Model")[0].split("For")[0]
    if name == "CLIPModel":
        text = TEXT | {"hidden_size": 12, "intermediate_size": 20} | changes
        config = transformers.CLIPConfig(
            text_config=text | {"eos_token_id": 9}, vision_config=VISION | changes, projection_dim=8
        )
        return transformers.CLIPModel(config).eval(), PIXELS | TOKENS
    vision = base in ("CLIPVision", "SiglipVision", "ViT", "Dinov2", "DeiT")
    config = getattr(transformers, f"{base}Config")(**((VISION if vision else TEXT) | changes))
    return getattr(transformers, name)(config).eval(), PIXELS if vision else TOKENS


def recompute(parts, x):
    act = lookup(parts.activation)
    hidden = act(parts.up(x)) if parts.gate is None else act(parts.gate(x)) * parts.up(x)
    return parts.down(hidden)


def check_against_the_model(model, inputs, sites):
    """While the model runs, every MLP's parts give what the model's own modules give."""
    modules = dict(model.named_modules())
    seen = {}

    def keep(path):
        def hook(module, args, output):
            seen[path] = (args[0], output)

        return hook

    watched = {path for site in sites for path in (site.path, *site.emptied)}
    handles = [modules[path].register_forward_hook(keep(path)) for path in watched]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    for site in sites:
        x, _ = seen[site.path]
        _, output = seen[site.emptied[0] if site.emptied else site.path]
        assert x.shape[-1] == site.parts.in_features
        torch.testing.assert_close(recompute(site.parts, x), output)


class Block(nn.Module):
    def __init__(self, mlp, d=8):
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(d), mlp

    def forward(self, x):
        return x + self.mlp(self.norm(x))


class FFN(nn.Module):
    def __init__(self, d=8, h=12, act=F.gelu):
        super().__init__()
        self.wide, self.narrow, self.act = nn.Linear(d, h), nn.Linear(h, d), act

    def forward(self, x):
        return self.narrow(self.act(self.wide(x)))


@pytest.mark.parametrize(
    ("name", "activation", "count"),
    [
        ("CLIPVisionModel", "quick_gelu", 2),
        ("CLIPVisionModelWithProjection", "quick_gelu", 2),
        ("CLIPModel", "quick_gelu", 4),
        ("SiglipVisionModel", "gelu_tanh", 3),
        ("ViTModel", "gelu", 2),
        ("ViTForImageClassification", "gelu", 2),
        ("DeiTModel", "gelu", 2),
        ("Dinov2Model", "gelu", 2),
        ("BertModel", "gelu", 2),
        ("BertForSequenceClassification", "gelu", 2),
        ("RobertaForSequenceClassification", "gelu", 2),
        ("LlamaModel", "silu", 2),
        ("LlamaForCausalLM", "silu", 2),
        ("MistralModel", "silu", 2),
    ],
)
def test_real_classes(name, activation, count):
    torch.manual_seed(0)
    changes = {"num_key_value_heads": 1} if "Mistral" in name else {}
    model, inputs = build(name, **changes)
    sites = find_mlps(model)
    assert [site.parts.activation for site in sites] == [activation] * count
    assert not any(word in site.path for site in sites for word in ("attention", "attn", "pooler", "classifier"))
    assert len({site.path for site in sites}) == count
    check_against_the_model(model, inputs, sites)


def test_siglip_counts_its_pooling_head():
    model, _ = build("SiglipVisionModel")
    assert [site.path.split(".")[-2] for site in find_mlps(model)] == ["0", "1", "head"]


def test_both_towers_of_clip_are_found_in_module_order():
    model, _ = build("CLIPModel")
    sites = find_mlps(model)
    assert [site.path.split(".")[0] for site in sites] == ["text_model"] * 2 + ["vision_model"] * 2
    assert [site.parts.in_features for site in sites] == [12, 12, 16, 16]


def test_bert_is_split():
    model, _ = build("BertForSequenceClassification")
    site = find_mlps(model)[1]
    assert site.host == "bert.encoder.layer.1"
    assert site.path == "bert.encoder.layer.1.intermediate"
    assert site.emptied == ("bert.encoder.layer.1.output.dense",)
    assert site.parts.linears() == {
        "up": model.bert.encoder.layer[1].intermediate.dense,
        "down": model.bert.encoder.layer[1].output.dense,
    }


def test_replacing_site_and_emptied_leaves_the_model_as_it_was():
    class MLP(nn.Module):
        def __init__(self, parts):
            super().__init__()
            self.parts = parts

        def forward(self, x):
            return recompute(self.parts, x)

    for name in ("BertModel", "ViTModel", "LlamaModel"):
        model, inputs = build(name)
        with torch.no_grad():
            before = model(**inputs).last_hidden_state
            for site in find_mlps(model):
                model.set_submodule(site.path, MLP(site.parts))
                for path in site.emptied:
                    model.set_submodule(path, nn.Identity())
            torch.testing.assert_close(model(**inputs).last_hidden_state, before)


@pytest.mark.parametrize(
    ("hidden_act", "activation"),
    [
        ("gelu", "gelu"),
        ("gelu_new", "gelu_tanh"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("gelu_fast", "gelu_tanh"),
        ("quick_gelu", "quick_gelu"),
        ("relu", "relu"),
        ("silu", "silu"),
        ("mish", "mish"),
        ("tanh", "tanh"),
        ("linear", "none"),
    ],
)
@pytest.mark.parametrize("name", ["CLIPVisionModel", "ViTModel", "BertModel", "LlamaModel"])
def test_activations(name, hidden_act, activation):
    model, inputs = build(name, hidden_act=hidden_act)
    sites = find_mlps(model)
    assert [site.parts.activation for site in sites] == [activation] * 2
    check_against_the_model(model, inputs, sites)


@pytest.mark.parametrize("name", ["CLIPVisionModel", "ViTModel", "BertModel", "LlamaModel"])
@pytest.mark.parametrize("hidden_act", ["gelu", "gelu_new"])
def test_bfloat16(name, hidden_act):
    model, _ = build(name, hidden_act=hidden_act)
    expected = "gelu" if hidden_act == "gelu" else "gelu_tanh"
    assert [site.parts.activation for site in find_mlps(model.bfloat16())] == [expected] * 2


@pytest.mark.parametrize("name", ["ViTModel", "BertModel"])
def test_unknown_activation_of_a_known_family(name):
    model, _ = build(name, hidden_act="sigmoid")
    with pytest.raises(UnknownArchitectureError, match=r"layer.*0.* and 1 more \(.*another function of "):
        find_mlps(model)


def test_model_that_is_an_mlp():
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
    [site] = find_mlps(model)
    assert (site.host, site.path, site.emptied) == ("", "", ())
    assert site.family is FAMILIES[-1]


def test_split_family_at_the_root():
    model, _ = build("BertModel")
    [site] = find_mlps(model.encoder.layer[0])
    assert (site.host, site.path, site.emptied) == ("", "intermediate", ("output.dense",))


def test_custom_classes_and_the_head_is_left_alone():
    head = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 3))
    model = nn.Sequential(Block(FFN()), Block(FFN(act=F.relu)), head)
    sites = find_mlps(model)
    assert [(site.path, site.parts.activation) for site in sites] == [("0.mlp", "gelu"), ("1.mlp", "relu")]


def test_outermost_match_counts():
    inner = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
    model = Block(nn.Sequential(inner, nn.Dropout(0.1)))
    assert [site.path for site in find_mlps(model)] == ["mlp"]


def test_attributes_of_a_family_are_not_believed():
    class Misleading(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc2, self.fc1 = nn.Linear(8, 12), nn.Linear(12, 8)

        def forward(self, x):
            return self.fc1(torch.relu(self.fc2(x)))

    [site] = find_mlps(Block(Misleading()))
    assert site.family is FAMILIES[-1]
    assert site.parts.in_features == 8


def test_nothing_found_lists_what_looks_like_an_mlp():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 3)
    with pytest.raises(UnknownArchitectureError) as caught:
        find_mlps(model)
    message = str(caught.value)
    assert "layers.0 and 2 more (TransformerEncoderLayer, " in message
    assert "linear1: 8 -> 12, linear2: 12 -> 8" in message
    assert "self_attn.in_proj_weight" in message
    assert "CONTRIBUTING.md" in message
    assert all(family.name in message for family in FAMILIES)


def test_nothing_found_and_nothing_alike():
    with pytest.raises(UnknownArchitectureError, match=r"No module has two nn\.Linear d -> h, h -> d"):
        find_mlps(nn.Sequential(nn.Linear(4, 8), nn.ReLU()))


def test_a_head_alone_is_not_an_mlp():
    with pytest.raises(UnknownArchitectureError, match="No module has two"):
        find_mlps(nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 3)))


def test_split_family_with_a_wrapped_linear_says_so():
    model, _ = build("BertModel")
    for layer in model.encoder.layer:
        layer.output.dense = nn.Sequential(layer.output.dense)
    with pytest.raises(UnknownArchitectureError, match=r"output\.dense: expected nn\.Linear; found Sequential"):
        find_mlps(model)


@pytest.mark.parametrize("path", ["encoder.layer.1.intermediate.dense", "encoder.layer.1.output.dense"])
def test_one_layer_unlike_the_others_is_not_skipped_silently(path):
    model, _ = build("BertModel")
    model.set_submodule(path, nn.Sequential(model.get_submodule(path)), strict=True)
    with pytest.raises(InputError, match=r"encoder\.layer\.1: expected an MLP like others of its class"):
        find_mlps(model)


def test_one_custom_layer_unlike_the_others_is_not_skipped_silently():
    with pytest.raises(InputError, match=r"1\.mlp: expected an MLP like others of its class; .*another function"):
        find_mlps(nn.Sequential(Block(FFN()), Block(FFN(act=torch.sigmoid))))


def test_all_values_that_are_not_finite_are_reported_with_their_paths():
    model, _ = build("BertModel")
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight[0, :2] = torch.nan
        model.encoder.layer[1].intermediate.dense.bias[3] = torch.inf
    with pytest.raises(InputError) as caught:
        find_mlps(model)
    message = str(caught.value)
    assert "encoder.layer.0.output.dense.weight: expected finite values; 2 of 384" in message
    assert "encoder.layer.1.intermediate.dense.bias: expected finite values; 1 of 24" in message


def test_meta_device():
    with torch.device("meta"):
        model = nn.Sequential(Block(FFN()))
    with pytest.raises(InputError, match=r"0\.mlp\.wide\.weight: expected values; found none \(meta device\)"):
        find_mlps(model)


def test_an_mlp_registered_twice_is_refused():
    ffn = FFN()
    with pytest.raises(InputError, match=r"0\.mlp: expected one place in the model; it is also 1\.mlp"):
        find_mlps(nn.Sequential(Block(ffn), Block(ffn)))


def test_linears_in_two_mlps_are_refused():
    one, two = FFN(), FFN()
    two.wide, two.narrow = one.wide, one.narrow
    with pytest.raises(InputError) as caught:
        find_mlps(nn.Sequential(Block(one), Block(two)))
    assert "0.mlp.wide: expected one place in the model; it is also 1.mlp.wide" in str(caught.value)
    assert "0.mlp.narrow: expected one place in the model; it is also 1.mlp.narrow" in str(caught.value)


def test_a_parent_registered_twice_is_fine():
    block = Block(FFN())
    assert [site.path for site in find_mlps(nn.Sequential(block, block))] == ["0.mlp"]


def test_model_is_left_as_it_was():
    model, _ = build("BertModel")
    model.train()
    model.encoder.layer[0].eval()
    flags = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    find_mlps(model)
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), state)


def test_families_are_complete():
    assert all(family.examples for family in FAMILIES)
    assert not FAMILIES[-1].up
    assert all(family.up and family.down for family in FAMILIES[:-1])


def test_a_base_sized_vit_takes_well_under_two_seconds():
    transformers = pytest.importorskip("transformers")
    model = transformers.ViTModel(transformers.ViTConfig())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        start = time.process_time()
        assert len(find_mlps(model)) == 12
        assert time.process_time() - start < 2
    finally:
        torch.set_num_threads(threads)


class Layer(nn.Module):
    """An MLP whose host calls the activation itself, as Whisper's layers do; ``between`` comes after it."""

    def __init__(self, between=None):
        super().__init__()
        self.attention, self.between = nn.Linear(8, 8), between or (lambda x: x)
        self.fc1, self.fc2, self.activation_fn = nn.Linear(8, 12), nn.Linear(12, 8), nn.GELU()

    def forward(self, x, needed_but_none, other=None):
        h = F.dropout(self.activation_fn(self.fc1(x)), 0.1, self.training)
        return x + self.fc2(self.between(h))


def test_a_host_that_calls_the_activation_itself():
    sites = find_mlps(nn.ModuleList([Layer(), Layer()]))
    assert [site.path for site in sites] == ["0.fc1", "1.fc1"]
    assert sites[0].emptied == ("0.activation_fn", "0.fc2")
    assert [site.parts.activation for site in sites] == ["gelu"] * 2


@pytest.mark.parametrize("between", [nn.LayerNorm(12), lambda h: 2 * h, lambda h: h.relu()])
def test_such_a_host_with_something_in_between_is_refused(between):
    with pytest.raises(UnknownArchitectureError, match="Linear -> GELU -> Linear one after the other"):
        find_mlps(nn.ModuleList([Layer(between)]))


def test_such_a_host_that_cannot_be_run_is_refused():
    class Picky(Layer):
        def forward(self, x, needed):
            return super().forward(x, None) + needed.sum()

    with pytest.raises(UnknownArchitectureError, match=r"expected a function of hidden states.*AttributeError"):
        find_mlps(nn.ModuleList([Picky()]))


def test_such_hosts_are_found_on_the_meta_device_and_hooks_are_gone():
    with torch.device("meta"):
        model = nn.ModuleList([Layer()])
    assert [site.path for site in locate_mlps(model)] == ["0.fc1"]
    assert not any(module._forward_hooks for module in model.modules())


def test_the_nearest_attention_tells_whether_samples_come_first():
    class WithAttention(nn.Module):
        def __init__(self, batch_first):
            super().__init__()
            self.attn, self.mlp = nn.MultiheadAttention(8, 2, batch_first=batch_first), FFN()

    model = nn.ModuleList([WithAttention(True), WithAttention(False), Block(FFN())])
    assert [site.batch_first for site in find_mlps(model)] == [True, False, True]
