"""``python -m benchmarks.load --samples 100000``: many short samples through a tiny merged model.

Says whether memory stays constant while samples go by (resident memory of the process, from the moment 5 % of them
are done), and what the driver itself costs per sample: the same evaluation, records and all, with a model that does
nothing. The samples are texts in a JSONL file; reading and tokenising them, once, is timed apart.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wemoe_fast import upscale
from wemoe_fast.comparison import environment, write_comparison
from wemoe_fast.evaluate import evaluate
from wemoe_fast.report import write_json
from wemoe_fast.tasks import Head, Task, TextSamples

FEATURES, CLASSES = 16, ("a", "b", "c")
WORDS = [f"w{number}" for number in range(500)]
WARM = 0.05  # share of the samples after which memory counts


class Nothing(nn.Module):
    """A model that takes no time."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Parameter(torch.zeros(1, FEATURES))

    def forward(self, input_ids: Tensor, **_: Tensor) -> Tensor:
        return self.features.expand(len(input_ids), FEATURES)


class Resident:
    """Resident memory of this process by samples done, read at every batch."""

    def __init__(self) -> None:
        self.readings: list[tuple[int, int]] = []
        self._done = 0

    @contextmanager
    def watch(self, model: nn.Module) -> Iterator[None]:
        def read(_module: nn.Module, _args: object, inputs: dict[str, Tensor]) -> None:
            self._done += len(inputs["input_ids"])
            self.readings.append((self._done, resident_bytes()))

        handle = model.register_forward_pre_hook(read, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def growth(self, samples: int) -> int:
        """Bytes from what was resident when `WARM` of the samples were done to the most there was after."""
        at = next(size for done, size in self.readings if done >= WARM * samples)
        return max(size for done, size in self.readings if done >= WARM * samples) - at


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def write_texts(path: Path, samples: int) -> None:
    """Texts of 3 to 12 words, each with the label of a class."""
    choose = random.Random(0)
    with path.open("w") as file:
        for _ in range(samples):
            text = " ".join(choose.choices(WORDS, k=choose.randint(3, 12)))
            file.write(json.dumps({"text": text, "label": choose.choice(CLASSES)}) + "\n")


def tokenizer(directory: Path) -> Any:
    import tokenizers
    import transformers

    fast: Any = transformers.PreTrainedTokenizerFast
    (directory / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    tokenizers.BertWordPieceTokenizer(str(directory / "vocab.txt")).save(str(directory / "tokenizer.json"))
    return fast(tokenizer_file=str(directory / "tokenizer.json"), model_max_length=32, pad_token="[PAD]")


def tiny_model() -> nn.Module:
    """One layer of BERT, merged from two."""
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS) + 5,
        hidden_size=FEATURES,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    base = transformers.BertModel(config, add_pooling_layer=False).eval()
    experts = {name: copy.deepcopy(base) for name in ("one", "two")}
    for expert in experts.values():
        for parameter in expert.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    return upscale(base, experts, router_depth=1).eval()


def measure(samples: int, batch_size: int, directory: Path) -> dict[str, Any]:
    """All figures of one load: seconds, microseconds per sample, bytes."""
    write_texts(directory / "texts.jsonl", samples)
    words = tokenizer(directory)
    begun = time.perf_counter()
    data = TextSamples.read(directory / "texts.jsonl", words, CLASSES)
    read = time.perf_counter()
    _ = data.lengths  # tokenises
    tokenised = time.perf_counter()
    task = Task("load", Head(torch.randn(len(CLASSES), FEATURES), None, CLASSES), data, batch_size=batch_size)
    nothing = Task("load", Head(task.head.weight, None, CLASSES, pooling="none"), data, batch_size=batch_size)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two would spend the head's tiny products waiting for each other
    driver = evaluate(Nothing(), [nothing], records=directory / "nothing", progress=False)
    again = evaluate(Nothing(), [nothing], records=directory / "nothing", progress=False)
    unrecorded = evaluate(Nothing(), [nothing], progress=False)
    torch.set_num_threads(threads)
    model, resident = tiny_model(), Resident()
    with resident.watch(model):
        found = evaluate(model, [task], records=directory / "out" / "records", progress=False)
    begun_writing = time.perf_counter()
    write_comparison({"tiny": found}, {"tiny": ("one", "two")}, directory / "out")
    written = time.perf_counter()

    def each(seconds: float) -> float:
        return 1e6 * seconds / samples

    growth = resident.growth(samples)
    return {
        "samples": samples,
        "batch_size": batch_size,
        "batches": len(resident.readings),
        "environment": environment(),
        "samples_per_second": found.samples_per_second,
        "microseconds_per_sample": {
            "driver, the model replaced by nothing": each(driver.seconds),
            "of that without records": each(unrecorded.seconds),
            "resuming what is recorded": each(again.seconds),
            "reading JSONL, once": each(read - begun),
            "tokenising, once": each(tokenised - read),
            "model and driver": each(found.seconds),
            "writing results": each(written - begun_writing),
        },
        "resident_bytes": {
            f"when {WARM:.0%} were done": next(size for done, size in resident.readings if done >= WARM * samples),
            "growth from there to the peak": growth,
            "growth per sample": growth / (samples * (1 - WARM)),
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with tempfile.TemporaryDirectory() as directory:
        found = measure(options.samples, options.batch_size, Path(directory))
    lines = [f"{value:10.1f} us per sample  {what}" for what, value in found["microseconds_per_sample"].items()]
    lines.append(f"{found['samples_per_second']:10,.0f} samples per second")
    lines += [f"{value:14,.1f} bytes resident  {what}" for what, value in found["resident_bytes"].items()]
    sys.stdout.write("\n".join(lines) + "\n")
    if options.out:
        write_json(options.out, found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
