"""Zero-shot heads from the base model's own embeddings, and experts fine-tuned under them."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..atomic import umask
from ..checkpoint import quiet_transformers
from ..errors import CheckpointError, InputError
from ..tasks import Head, load_tokenizer
from .sources import file_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_TOKENS = 32
SCALE = 20.0
_RECIPE_VERSION = 1  # raise when the training below changes, so that cached experts are trained again
_DONE = "training.json"


@dataclass(frozen=True)
class Training:
    """Hyperparameters of one fine-tuning run; all of them are part of the cache key."""

    epochs: int = 2
    batch_size: int = 32
    learning_rate: float = 4e-4
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    max_tokens: int = MAX_TOKENS


@dataclass(frozen=True)
class Expert:
    path: Path
    cached: bool


def load_base(base_dir: str | Path) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Model (fp32, eval mode) and tokenizer of a local checkpoint directory. Nothing is fetched."""
    from transformers import AutoModel

    with quiet_transformers():
        tokenizer = load_tokenizer(base_dir)
        model = AutoModel.from_pretrained(
            base_dir, local_files_only=True, use_safetensors=True, torch_dtype=torch.float32
        )
    return model.eval(), tokenizer


def embed(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    max_tokens: int = MAX_TOKENS,
) -> Tensor:
    """Mean-pooled embeddings [n, d] of the texts."""
    inputs = tokenizer(list(texts), padding=True, truncation=True, max_length=max_tokens, return_tensors="pt")
    hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return (hidden * mask).sum(1) / mask.sum(1)


@torch.inference_mode()
def zero_shot_head(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], classes: Sequence[str]
) -> Head:
    """A head whose class weights are the embeddings of the prompts: logits are 20 x cosine."""
    weight = F.normalize(embed(model, tokenizer, prompts), dim=-1)
    return Head(weight=weight.clone(), bias=None, classes=tuple(classes), scale=SCALE, normalize=True, pooling="mean")


def fine_tune(
    base_dir: str | Path,
    texts: Sequence[str],
    labels: Sequence[int],
    head: Head,
    out_dir: str | Path,
    *,
    seed: int,
    training: Training | None = None,
    progress: bool = False,
    name: str = "expert",
) -> Path:
    """Fine-tune all but the embeddings under the fixed head; write a Hugging Face checkpoint to `out_dir`.

    `out_dir` appears only when complete. Repeatable for a given seed, machine and number of threads.
    """
    training = training or Training()
    out = Path(out_dir)
    _check(texts, labels, head, out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, losses = _train(base_dir, texts, labels, head, training, seed, name if progress else None)
    record = {"seed": seed, "training": asdict(training), "samples": len(texts), "losses": losses}
    publish(model, out, record, lambda scratch: _copy_tokenizer(Path(base_dir), scratch))
    return out


def publish(
    model: nn.Module, out: Path, record: Mapping[str, Any], add: Callable[[Path], object] = lambda scratch: None
) -> None:
    """Write a Hugging Face model, the record of its training and what `add` writes; `out` appears when complete."""
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        with quiet_transformers():
            model.save_pretrained(scratch, safe_serialization=True)  # type: ignore[operator]
        add(scratch)
        (scratch / _DONE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        scratch.chmod(0o777 & ~umask())
        os.rename(scratch, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def cached(out: Path, train: Callable[[], object]) -> Expert:
    """The model that `train` publishes as `out`, trained where it is not there yet."""
    if (out / _DONE).is_file():
        return Expert(out, cached=True)
    if out.exists():
        shutil.rmtree(out)
    try:
        train()
    except OSError:
        if not (out / _DONE).is_file():  # else another process finished the same one first
            raise
    return Expert(out, cached=False)


def expert(
    base_dir: str | Path,
    texts: Sequence[str],
    labels: Sequence[int],
    head: Head,
    prompts: Sequence[str],
    experts_dir: str | Path,
    *,
    name: str,
    seed: int,
    training: Training | None = None,
    progress: bool = False,
) -> Expert:
    """The fine-tuned expert from the cache `experts_dir`, trained first if it is not there.

    `head` is the base model's zero-shot head for `prompts`, which stand for it in the cache key: its numbers
    differ by rounding between machines.
    """
    training = training or Training()
    key = expert_key(base_dir, texts, labels, prompts, seed=seed, training=training)
    out = Path(experts_dir) / f"{name}-{key}"
    return cached(
        out,
        lambda: fine_tune(
            base_dir, texts, labels, head, out, seed=seed, training=training, progress=progress, name=name
        ),
    )


def expert_key(
    base_dir: str | Path,
    texts: Sequence[str],
    labels: Sequence[int],
    prompts: Sequence[str],
    *,
    seed: int,
    training: Training,
) -> str:
    """Hash of everything the training depends on: base, data, prompts, seed, hyperparameters."""
    facts: dict[str, Any] = {
        "version": _RECIPE_VERSION,
        "seed": seed,
        "training": asdict(training),
        "base": file_sha256(Path(base_dir) / "model.safetensors"),
        "config": file_sha256(Path(base_dir) / "config.json"),
        "data": list(zip(texts, labels, strict=True)),
        "prompts": list(prompts),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _train(
    base_dir: str | Path,
    texts: Sequence[str],
    labels: Sequence[int],
    head: Head,
    training: Training,
    seed: int,
    report_as: str | None,
) -> tuple[nn.Module, list[float]]:
    """The trained model and the mean loss of every epoch, told on stderr if `report_as` is a name."""
    model, tokenizer = load_base(base_dir)
    model.get_input_embeddings().weight.requires_grad_(False)  # type: ignore[operator]
    embeddings = getattr(model, "embeddings", None)
    if isinstance(embeddings, nn.Module):
        embeddings.requires_grad_(False)
    targets = torch.tensor(list(labels))

    def loss_of(rows: Tensor) -> Tensor:
        batch = [texts[i] for i in rows.tolist()]
        features = embed(model, tokenizer, batch, max_tokens=training.max_tokens)
        return F.cross_entropy(head.logits(features), targets[rows])

    model.train()
    losses = train(
        [p for p in model.parameters() if p.requires_grad], loss_of, len(texts),
        epochs=training.epochs, batch_size=training.batch_size, learning_rate=training.learning_rate,
        rate=lambda step, steps: max(0.0, 1 - step / steps), weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm, order=torch.Generator().manual_seed(seed), report_as=report_as,
    )  # fmt: skip
    return model.eval(), losses


def train(
    parameters: Sequence[nn.Parameter],
    loss_of: Callable[[Tensor], Tensor],
    n: int,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    rate: Callable[[int, int], float],
    weight_decay: float,
    max_grad_norm: float,
    order: torch.Generator | None = None,
    report_as: str | None = None,
) -> list[float]:
    """AdamW on batches of n samples in a new order every epoch; matrices alone decay.

    Args:
        loss_of: sample indices -> mean loss.
        rate: (step, steps in all) -> factor of the learning rate.
        order: gives the order, the global generator where there is none.
        report_as: the name under which every epoch's loss is told on stderr.

    Returns:
        the mean loss of every epoch.
    """
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate)
    steps = epochs * math.ceil(n / batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps))
    losses = []
    for epoch in range(epochs):
        total = 0.0
        for rows in torch.randperm(n, generator=order).split(batch_size):
            loss = loss_of(rows)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, max_grad_norm)
            optimizer.step()
            schedule.step()
            total += loss.item() * len(rows)
        losses.append(total / n)
        if report_as:
            sys.stderr.write(f"  {report_as}: epoch {epoch + 1}/{epochs}, loss {losses[-1]:.3f}\n")
    return losses


def _check(texts: Sequence[str], labels: Sequence[int], head: Head, out: Path) -> None:
    problems = []
    if not texts:
        problems.append("no texts to train on")
    if len(texts) != len(labels):
        problems.append(f"{len(texts)} texts but {len(labels)} labels")
    classes = len(head.classes)
    if wrong := sorted({label for label in labels if not 0 <= label < classes}):
        problems.append(f"labels {wrong} are outside the head's {classes} classes")
    if problems:
        raise InputError.of("fine_tune", problems)
    if out.exists():
        raise CheckpointError(f"{out}: already exists; name a directory that does not")


def _copy_tokenizer(base_dir: Path, out_dir: Path) -> None:
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
    for name in names:
        if (base_dir / name).is_file():
            shutil.copyfile(base_dir / name, out_dir / name)
