"""Small random models of the real classes of every family, and inputs for them."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wemoe_fast import upscale, wemoe_layers
from wemoe_fast.families import MLPSite, find_mlps

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
WORDS = {"vocab_size": 40, "max_position_embeddings": 24}
TEXT = SIZES | WORDS
GATED = TEXT | {"num_key_value_heads": 1, "head_dim": 8}
PIXELS = SIZES | {"image_size": 8, "patch_size": 4}
T5 = {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 2, "num_heads": 2, "vocab_size": 40, "dropout_rate": 0.0}
SOUND = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "vocab_size": 40,
}
WHISPER = SOUND | {"num_mel_bins": 4, "max_source_positions": 6, "max_target_positions": 24, "pad_token_id": 1}
GPT2 = {"n_embd": 16, "n_inner": 24, "n_layer": 2, "n_head": 2, "vocab_size": 40, "n_positions": 24}
DISTILBERT = {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2, **WORDS}
CLIP = {"text_config": TEXT | {"eos_token_id": 39, "hidden_size": 12}, "vision_config": PIXELS, "projection_dim": 8}

HUGGING_FACE: dict[str, tuple[str, dict[str, Any]]] = {
    "BERT": ("BertModel", TEXT),
    "RoBERTa": ("RobertaForSequenceClassification", TEXT | {"max_position_embeddings": 26}),
    "DistilBERT": ("DistilBertModel", DISTILBERT),
    "LLaMA": ("LlamaForCausalLM", GATED),
    "Mistral": ("MistralModel", GATED | {"sliding_window": None}),
    "Qwen2": ("Qwen2Model", GATED),
    "Qwen3": ("Qwen3Model", GATED),
    "Gemma": ("GemmaModel", GATED | {"hidden_activation": "gelu_pytorch_tanh"}),
    "GPT-2": ("GPT2LMHeadModel", GPT2),
    "T5": ("T5Model", T5),
    "T5 1.1": ("T5ForConditionalGeneration", T5 | {"feed_forward_proj": "gated-gelu"}),
    "Whisper": ("WhisperModel", WHISPER),
    "BART": ("BartModel", SOUND | {"max_position_embeddings": 24, "pad_token_id": 1}),
    "CLIP": ("CLIPModel", CLIP),
    "SigLIP": ("SiglipVisionModel", PIXELS),
    "ViT": ("ViTModel", PIXELS),
    "DINOv2": ("Dinov2Model", PIXELS | {"mlp_ratio": 2}),
}
"""Name -> class of transformers and its configuration."""


def _timm() -> nn.Module:
    timm = pytest.importorskip("timm")
    return timm.models.VisionTransformer(
        img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, mlp_ratio=1.5, num_classes=5
    )


def _torchvision() -> nn.Module:
    torchvision = pytest.importorskip("torchvision")
    return torchvision.models.VisionTransformer(
        image_size=8, patch_size=4, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=24, num_classes=5
    )


def _open_clip(batch_first: bool) -> nn.Module:
    open_clip = pytest.importorskip("open_clip")
    model = open_clip.CLIP(
        embed_dim=8,
        vision_cfg={"image_size": 8, "patch_size": 4, "layers": 2, "width": 16, "head_width": 8, "mlp_ratio": 1.5},
        text_cfg={"context_length": 7, "vocab_size": 40, "width": 16, "heads": 2, "layers": 2},
        quick_gelu=True,
    )
    for transformer in (model.transformer, model.visual.transformer):
        transformer.batch_first = batch_first
        for block in transformer.resblocks:
            block.attn.batch_first = batch_first
    return model


class SequenceFirst(nn.Module):
    """Blocks of [N, B, d] with the attributes of OpenAI's CLIP and of old open_clip."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn, self.ln_2 = nn.MultiheadAttention(16, 2), nn.LayerNorm(16)
            self.mlp = nn.Sequential()
            for name, module in {"c_fc": nn.Linear(16, 24), "gelu": nn.GELU(), "c_proj": nn.Linear(24, 16)}.items():
                self.mlp.add_module(name, module)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attn(x, x, x, need_weights=False)[0]
            return x + self.mlp(self.ln_2(x))

    def __init__(self) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList([self.Block(), self.Block()])

    def forward(self, image: Tensor) -> Tensor:
        x = image.flatten(2).permute(2, 0, 1)
        x = torch.cat([x] * 6, 2)[..., :16]
        for block in self.resblocks:
            x = block(x)
        return x.transpose(0, 1)


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "open_clip": lambda: _open_clip(True),
    "open_clip, [N, B, d]": lambda: _open_clip(False),
    "like old open_clip": SequenceFirst,
}
NAMES = (*HUGGING_FACE, *OTHERS)
MASKED = (
    "BERT",
    "RoBERTa",
    "DistilBERT",
    "LLaMA",
    "Mistral",
    "Qwen2",
    "Qwen3",
    "Gemma",
    "GPT-2",
    "T5",
    "T5 1.1",
    "BART",
)


@functools.cache
def base(name: str, layers: int = 2) -> nn.Module:
    """In evaluation mode; never changed by a test. ``layers``: of Hugging Face's alone."""
    torch.manual_seed(0)
    if name in OTHERS:
        model = OTHERS[name]()
    else:
        transformers = pytest.importorskip("transformers")
        class_name, settings = HUGGING_FACE[name]
        cls = getattr(transformers, class_name)
        model = cls(cls.config_class(**_with_layers(settings, layers)))
    for parameter in model.parameters():
        if parameter.dim() > 1:  # transformers' own are so small that little but the residual is left
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def _with_layers(settings: dict[str, Any], layers: int) -> dict[str, Any]:
    return {
        name: _with_layers(value, layers) if isinstance(value, dict) else layers if "layer" in name else value
        for name, value in settings.items()
    }


@functools.cache
def sites(name: str) -> list[MLPSite]:
    """The MLPs of the base."""
    return find_mlps(base(name))


@functools.cache
def experts(name: str, layers: int = 2) -> dict[str, nn.Module]:
    """Two, never changed by a test."""
    return {f"task{t}": tuned(base(name, layers), t) for t in range(2)}


def tuned(model: nn.Module, seed: int, scale: float = 0.1) -> nn.Module:
    """A model fine-tuned from another, as far as weights go."""
    generator = torch.Generator().manual_seed(1 + seed)
    expert = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in expert.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator).to(parameter)
    return expert


@functools.cache
def merged(name: str, depth: int = 1, layers: int = 2) -> nn.Module:
    """Routers that tell samples apart; never changed by a test."""
    model = upscale(base(name, layers), experts(name, layers), router_depth=depth, seed=0)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for layer in wemoe_layers(model).values():
            for parameter in layer.router.parameters():
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def inputs(name: str, padding: str = "right") -> dict[str, Tensor]:
    """Three samples; where a model takes masks, the first has three tokens of padding, on that side."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(10, 39, (3, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    mask = mask if padding == "right" else mask.flip(1)
    pixels = torch.randn(3, 3, 8, 8, generator=generator)
    sound = torch.randn(3, 4, 12, generator=generator)
    if name in MASKED:
        text = {"input_ids": ids, "attention_mask": mask}
        if name in ("T5", "T5 1.1", "BART"):
            return text | {"decoder_input_ids": ids.flip(0), "decoder_attention_mask": mask}
        return text
    return {
        "Whisper": {"input_features": sound, "decoder_input_ids": ids},
        "CLIP": {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels},
        "timm": {"x": pixels},
        "torchvision": {"x": pixels},
        "open_clip": {"image": pixels, "text": ids},
        "open_clip, [N, B, d]": {"image": pixels, "text": ids},
        "like old open_clip": {"image": pixels},
    }.get(name, {"pixel_values": pixels})


def run(model: nn.Module, given: dict[str, Tensor]) -> list[Tensor]:
    """All floating tensors of the output but caches."""
    caches = "use_cache" in inspect.signature(model.forward).parameters
    output = model(**given, **({"use_cache": False} if caches else {}))
    return [t for t in _tensors(output) if t.is_floating_point()]


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if hasattr(output, "values") else output if isinstance(output, (tuple, list)) else ()
    return [tensor for value in values for tensor in _tensors(value)]


def routing(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    """The routing weights of all layers: [layers, B, T]."""
    seen: list[Tensor] = []
    handles = [
        layer.router.register_forward_hook(lambda module, args, output: seen.append(output))
        for layer in wemoe_layers(model).values()
    ]
    with torch.no_grad():
        run(model, given)
    for handle in handles:
        handle.remove()
    assert len(seen) == len(handles)
    return torch.stack(seen)
