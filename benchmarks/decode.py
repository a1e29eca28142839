"""``python -m benchmarks.decode``: tokens per second of ``generate`` with a KV cache, by number of sequences.

A LLaMA-like model with random weights, greedy: the statically merged model (task arithmetic), ours with the prompt's
routing and with every step's, ours without weights merged once per sequence, and the published loop over samples with
every step's routing, as FusionBench's modules run it. In float64 ours generate the loop's tokens, under both
policies, before anything is timed; then repeats in turn, medians.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wemoe_fast import task_arithmetic, upscale, wemoe_layers
from wemoe_fast.checkpoint import import_transformers
from wemoe_fast.comparison import environment
from wemoe_fast.errors import WEMoEError
from wemoe_fast.inspection import aligned
from wemoe_fast.report import write_json
from wemoe_fast.sequences import MERGED_BYTES

STATIC, LOOP = "static", "loop, step"
CONTENDERS = {
    "wemoe-fast, prompt": ("prompt", "auto"),
    "wemoe-fast, prompt, nothing kept": ("prompt", "factored"),
    "wemoe-fast, step": ("step", "auto"),
    LOOP: ("step", "reference"),
}
"""Policy and strategy."""
MODEL: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "pad_token_id": 0,
    "eos_token_id": None,
}
MERGE_LAMBDA = 0.3


def models(experts: int, **changes: Any) -> dict[str, Any]:
    """Every contender, with the same weights."""
    transformers = import_transformers()
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(MODEL | changes))).eval()
    tuned = {str(t): _perturbed(base) for t in range(experts)}
    merged = upscale(base, tuned, merge_lambda=MERGE_LAMBDA, router_depth=2, seed=0)
    for layer in wemoe_layers(merged).values():
        for parameter in layer.router.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    found: dict[str, Any] = {STATIC: task_arithmetic(base, tuned, MERGE_LAMBDA)}
    for name, (routing, strategy) in CONTENDERS.items():
        found[name] = copy.deepcopy(merged)
        choose(found[name], routing, strategy)
    return found


def choose(model: nn.Module, routing: str, strategy: str) -> None:
    """The policy and the strategy of every layer."""
    for layer in wemoe_layers(model).values():
        layer.decode_routing, layer.strategy = routing, strategy


def generate(model: Any, prompts: Tensor, new: int) -> Tensor:
    """Greedy tokens [B, N + new] of prompts [B, N]."""
    found: Tensor = model.generate(
        input_ids=prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new, do_sample=False
    )
    return found


def check(experts: int, new: int = 6) -> None:
    """WEMoEError unless ours generate the tokens of the float64 loop over samples, under both policies."""
    torch.manual_seed(1)
    prompts = torch.randint(1, 200, (3, 8))
    small = {"vocab_size": 200, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    for name, model in models(experts, **small, initializer_range=0.3).items():
        if name == STATIC:
            continue
        routing, strategy = CONTENDERS[name]
        found = generate(model.double(), prompts, new)
        choose(model, routing, "reference")
        if not torch.equal(found, generate(model, prompts, new)):
            raise WEMoEError(f"decode: {name} ({strategy}): expected the tokens of the loop over samples, found others")


def measure(batches: Sequence[int], experts: int, length: int, new: int, repeats: int) -> list[dict[str, Any]]:
    """One entry per number of sequences: medians and ranges of seconds, and tokens per second, by contender."""
    contenders = models(experts)
    found = []
    for batch in batches:
        torch.manual_seed(2)
        prompts = torch.randint(1, MODEL["vocab_size"], (batch, length))
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for repeat in range(repeats + 1):
            for name, model in contenders.items():
                begin = time.perf_counter()
                generate(model, prompts, new)
                if repeat:
                    seconds[name].append(time.perf_counter() - begin)
        found.append(
            {
                "sequences": batch,
                "seconds": {name: [round(s, 4) for s in sorted(times)] for name, times in seconds.items()},
                "tokens_per_second": {n: round(batch * new / statistics.median(t), 1) for n, t in seconds.items()},
            }
        )
    return found


def _perturbed(base: nn.Module) -> nn.Module:
    expert = copy.deepcopy(base)
    for parameter in expert.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    return expert


def table(found: Sequence[dict[str, Any]]) -> str:
    """Tokens per second, a row per contender."""
    rows = [["tokens per second", *(f"{entry['sequences']} sequences" for entry in found)]]
    for name in found[0]["tokens_per_second"]:
        rows.append([name, *(f"{entry['tokens_per_second'][name]:,.0f}" for entry in found)])
    return "\n".join(aligned(rows))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=16, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens to generate")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    check(options.experts)
    found = measure(options.sequences, options.experts, options.prompt, options.new, options.repeats)
    sys.stdout.write(table(found) + "\n")
    if options.out:
        settings = {name: getattr(options, name) for name in ("experts", "prompt", "new", "repeats")}
        transformers = import_transformers().__version__
        write_json(
            options.out,
            {
                "environment": environment() | {"transformers": transformers},
                "model": MODEL,
                "settings": settings | {"merged_bytes": MERGED_BYTES, "dtype": "float32"},
                "results": found,
            },
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
