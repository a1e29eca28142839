"""A small ViT, pretrained without labels on images that no task has, and experts of its MLPs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wemoe_fast.checkpoint import load_pretrained
from wemoe_fast.demo.experts import Expert, cached, publish, train
from wemoe_fast.demo.sources import file_sha256
from wemoe_fast.families import find_mlps
from wemoe_fast.tasks import Head

from .vision_data import SIDE, Images, Pools

ORIENTATIONS = 8
_VERSION = 1  # raise when the training below changes, so that cached models are trained again


@dataclass(frozen=True)
class VisionTraining:
    """Hyperparameters of the base model and the experts; all of them are part of the cache keys."""

    config: dict[str, int] = field(
        default_factory=lambda: {
            "hidden_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 384,
            "patch_size": 7,
        }
    )
    pretraining_images: int = 12_000  # of Fashion-MNIST; MNIST's make up a third beside them
    pretraining_epochs: int = 4
    pretraining_rate: float = 1e-3
    pretraining_batch: int = 128
    epochs: int = 4
    batch_size: int = 32
    learning_rate: float = 4e-4
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0


def pixel_values(images: Images) -> Tensor:
    """[n, 1, 28, 28] in float32, from -1 (background) to 1."""
    return torch.from_numpy(images.pixels).to(torch.float32).div(127.5).sub(1).unsqueeze(1)


def base_model(pools: Pools, folder: Path, training: VisionTraining, *, progress: bool = True) -> Expert:
    """The pretrained ViT from the cache `folder`, trained first if it is not there. No seed changes it."""
    key = _key(training, {source: pool["pretrain"] for source, pool in pools.items() if "pretrain" in pool})
    out = folder / f"vision-base-{key}"
    return cached(out, lambda: _publish(out, lambda: pretrain(pools, training, progress=progress), training))


def expert(
    base: Path, images: Images, head: Head, folder: Path, training: VisionTraining, *, name: str, seed: int,
    progress: bool = True,
) -> Expert:  # fmt: skip
    """The fine-tuned expert from the cache `folder`, trained first if it is not there.

    `head` is not part of the key: it is made of the base model and the images, and differs by rounding.
    """
    key = _key(training, {"images": images}, file_sha256(base / "model.safetensors"), seed)
    out = folder / f"vision-{name}-{key}"
    return cached(
        out,
        lambda: _publish(out, lambda: fine_tune(base, images, head, training, name, seed, progress=progress), training),
    )


def pretrain(pools: Pools, training: VisionTraining, *, progress: bool = True) -> tuple[nn.Module, list[float]]:
    """Learn to tell which of its eight orientations (rotated by quarters, mirrored or not) an image is in.

    Labels are not read. Returns the model and the mean loss of every epoch.
    """
    from transformers import ViTConfig, ViTModel

    settings: dict[str, Any] = {**training.config, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ViTModel(ViTConfig(image_size=SIDE, num_channels=1, **settings))
        output = nn.Linear(training.config["hidden_size"], ORIENTATIONS)
        fashion = pixel_values(pools["fashion"]["pretrain"][: training.pretraining_images])
        mnist = pixel_values(pools["mnist"]["pretrain"])
        pixels = torch.cat([fashion, *[mnist] * max(1, len(fashion) // (2 * len(mnist)))])

        def loss(rows: Tensor) -> Tensor:
            parts = rows.chunk(ORIENTATIONS)
            turned = torch.cat([orientation(pixels[part], k) for k, part in enumerate(parts)])
            expected = torch.cat([torch.full_like(part, k) for k, part in enumerate(parts)])
            return F.cross_entropy(output(_features(model, turned)), expected)

        losses = _train(
            [*model.parameters(), *output.parameters()], loss, len(pixels), training,
            epochs=training.pretraining_epochs, batch_size=training.pretraining_batch, warm_up=0.25,
            learning_rate=training.pretraining_rate, report_as="base" if progress else None,
        )  # fmt: skip
    return model.eval(), losses


def fine_tune(
    base: Path, images: Images, head: Head, training: VisionTraining, name: str, seed: int, *, progress: bool = True
) -> tuple[nn.Module, list[float]]:
    """Fine-tune the MLPs of the base model under a fixed head, and nothing else.

    Returns the model and the mean loss of every epoch.
    """
    model = load_pretrained(base).train()
    mlps = {id(p) for site in find_mlps(model) for linear in site.parts.linears().values() for p in linear.parameters()}
    pixels, labels = pixel_values(images), torch.from_numpy(images.labels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        losses = _train(
            [p for p in model.parameters() if id(p) in mlps],
            lambda rows: F.cross_entropy(head.logits(_features(model, pixels[rows])), labels[rows]),
            len(images), training, epochs=training.epochs, batch_size=training.batch_size, warm_up=0.0,
            learning_rate=training.learning_rate, report_as=name if progress else None,
        )  # fmt: skip
    return model.eval(), losses


def linear_probe(base: Path, images: Images, classes: tuple[str, ...]) -> Head:
    """A head fitted to the base model's features of the images: multinomial logistic regression."""
    model, pixels = load_pretrained(base), pixel_values(images)
    with torch.inference_mode():
        features = torch.cat([_features(model, block) for block in pixels.split(256)])
    mean, scale = features.mean(0), features.std(0)
    inputs, labels = ((features - mean) / scale).clone(), torch.from_numpy(images.labels)
    weight = torch.zeros(len(classes), features.shape[1], requires_grad=True)
    bias = torch.zeros(len(classes), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(inputs, weight, bias), labels) + 1e-3 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    weight = (weight.detach() / scale).clone()
    return Head(weight, bias.detach() - weight @ mean, classes, pooling="mean")


def orientation(pixels: Tensor, number: int) -> Tensor:
    """[n, 1, 28, 28] in one of eight orientations: four rotations, then those of the mirror image."""
    return (pixels.flip(3) if number >= 4 else pixels).rot90(number % 4, (2, 3))


def _features(model: nn.Module, pixels: Tensor) -> Tensor:
    features: Tensor = model(pixel_values=pixels).last_hidden_state.mean(1)
    return features


def _train(
    parameters: Iterable[nn.Parameter], loss_of: Callable[[Tensor], Tensor], n: int, training: VisionTraining, *,
    epochs: int, batch_size: int, learning_rate: float, warm_up: float, report_as: str | None,
) -> list[float]:  # fmt: skip
    """The rate rises for a share `warm_up` of the steps and falls to 0. Returns each epoch's mean loss."""

    def rate(step: int, steps: int) -> float:
        rising = max(1, round(warm_up * steps))
        return min((step + 1) / rising, (steps - step) / max(1, steps - rising))

    return train(
        list(parameters), loss_of, n, epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, rate=rate,
        weight_decay=training.weight_decay, max_grad_norm=training.max_grad_norm, report_as=report_as,
    )  # fmt: skip


def _publish(out: Path, make: Callable[[], tuple[nn.Module, list[float]]], training: VisionTraining) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    model, losses = make()
    publish(model, out, {"training": asdict(training), "losses": losses})


def _key(training: VisionTraining, images: dict[str, Images], *more: Any) -> str:
    digest = hashlib.sha256(json.dumps([_VERSION, asdict(training), *more], sort_keys=True).encode())
    for array in _arrays(images):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def _arrays(images: dict[str, Images]) -> Iterator[np.ndarray]:
    for found in images.values():
        yield from (found.pixels, found.labels)
