"""What each method costs in perplexity, on a real model: ``python -m bench.quality``.

Rows are (method, bits, group, seed, calibration tokens), of pruning methods those of
:mod:`bench.pruning_rows`. They are kept in
``bench/results/quality/<model>.json`` one by one, with the loss of every window, so that a table
can be made in several goes and rows can be compared window by window. Calibration and evaluation
articles are disjoint. The compressed weights are multiplied as dense ones here: what is judged is
the method, not the kernel.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pumice
from bench import pruning_rows
from bench.results import RESULTS
from pumice.evaluate import Perplexity, perplexity
from pumice.integrations.models import load_model
from pumice.integrations.texts import load_text
from pumice.nn import CompressedLinear
from pumice.nn._replace import replace_modules
from pumice.quantize import AWQ, GPTQ, RTN, AWQScaling, Recipe

Recipes = Recipe | list[Recipe]
CONTEXT = 512

# Zero points everywhere, so that the methods differ in nothing but the method.
METHODS: dict[str, Callable[[int, int], Recipes]] = {
    "rtn": lambda b, g: RTN(b, g, symmetric=False),
    "gptq-plain": lambda b, g: GPTQ(b, g, symmetric=False, act_order=False, static_groups=False),
    "gptq-plain-damp1": lambda b, g: GPTQ(
        b, g, symmetric=False, act_order=False, static_groups=False, damp=1.0
    ),
    "gptq-order": lambda b, g: GPTQ(b, g, symmetric=False, static_groups=False),
    "gptq-static": lambda b, g: GPTQ(b, g, symmetric=False, act_order=False),
    "gptq": lambda b, g: GPTQ(b, g, symmetric=False),
    "gptq-damp1": lambda b, g: GPTQ(b, g, symmetric=False, damp=1.0),
    "awq": lambda b, g: AWQ(b, g, search_tokens=CONTEXT),
    "awq-gptq": lambda b, g: [
        AWQScaling(b, g, search_tokens=CONTEXT),
        GPTQ(b, g, symmetric=False),
    ],
    "rtn-symmetric": lambda b, g: RTN(b, g),
    "gptq-symmetric": lambda b, g: GPTQ(b, g),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=__doc__)
    pruning = ", ".join(pruning_rows.METHODS)
    parser.add_argument(
        "rows",
        nargs="*",
        help=f"METHOD:BITS:GROUP, of {', '.join(METHODS)}; METHOD:AMOUNT, of {pruning}",
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--samples", type=int, default=8, help=f"of {CONTEXT} calibration tokens")
    parser.add_argument("--windows", type=int, default=12, help=f"of {CONTEXT} evaluation tokens")
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    path = RESULTS / "quality" / f"{options.model.replace('/', '-')}.json"
    stored: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    model, tokenizer = load_model(options.model, dtype=getattr(torch, options.dtype))
    evaluation = _ids(tokenizer, "evaluation")
    calibration = _ids(tokenizer, "calibration")

    def evaluate(model: nn.Module) -> Perplexity:
        return perplexity(model, evaluation, context=CONTEXT, windows=options.windows)

    setting = f"{options.dtype}:{options.windows}x{CONTEXT}"
    dense_key = f"dense:{setting}"
    if dense_key not in stored:
        result = evaluate(model)
        _keep(path, stored, dense_key, {"ppl": result.perplexity, "nll": result.window_nll})
    for row in options.rows:
        without = row.startswith("rtn") or not pruning_rows.needs_data(row)
        for seed in [0] if without else options.seeds:
            tokens = 0 if without else options.samples * CONTEXT
            key = f"{row}:seed {seed}:{tokens} tokens:{setting}"
            if key in stored:
                continue
            data = None if tokens == 0 else _samples(calibration, options.samples, seed)
            wall, cpu = time.perf_counter(), time.process_time()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                compressed = model
                for recipe in _recipes(row):
                    compressed = pumice.compress(compressed, recipe, data)
            seconds = time.perf_counter() - wall, time.process_time() - cpu
            result = evaluate(_dense(compressed))
            _keep(
                path,
                stored,
                key,
                {
                    "ppl": result.perplexity,
                    "nll": result.window_nll,
                    "wall_seconds": round(seconds[0], 1),
                    "cpu_seconds": round(seconds[1], 1),
                },
            )
    print(table(stored))


def table(stored: dict[str, Any]) -> str:
    """Perplexities, and the paired difference in nats from the dense model."""
    lines = ["| row | perplexity | Δ nats ± s.e. | CPU s |", "|---|---|---|---|"]
    for key, row in stored.items():
        dense = stored[f"dense:{':'.join(key.split(':')[-2:])}"]
        differences = [a - b for a, b in zip(row["nll"], dense["nll"], strict=True)]
        error = statistics.stdev(differences) / len(differences) ** 0.5
        lines.append(
            f"| {key} | {row['ppl']:.2f} | {statistics.fmean(differences):.4f} ± {error:.4f} | "
            f"{row.get('cpu_seconds', '')} |"
        )
    return "\n".join(lines)


def _recipes(row: str) -> Sequence[Recipes]:
    """What is done to the model, one call of pumice.compress after the other."""
    if pruning_rows.is_pruning(row):
        return pruning_rows.recipes(row)
    method, bits, group = row.split(":")
    return [METHODS[method](int(bits), int(group))]


def _keep(path: Path, stored: dict[str, Any], key: str, row: dict[str, Any]) -> None:
    stored[key] = row
    print(f"{key}: {row['ppl']:.3f}", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(stored, indent=1) + "\n")
    os.replace(draft, path)


def _ids(tokenizer: Any, split: Any) -> Tensor:
    return torch.tensor(tokenizer(load_text("wikipedia", split=split), verbose=False).input_ids)


def _samples(ids: Tensor, count: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(ids) - CONTEXT, (count,), generator=generator)
    return [ids[start : start + CONTEXT][None] for start in starts.tolist()]


def _dense(model: nn.Module) -> nn.Module:
    """A copy with linear layers of the dequantized weights."""
    model = copy.deepcopy(model)
    layers: dict[str, nn.Module] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, CompressedLinear):
            n, k = layer.out_features, layer.in_features
            linear = nn.Linear(k, n, layer.bias is not None, device="meta")
            dtype = next(model.parameters()).dtype
            linear.weight = nn.Parameter(layer.dequantize(dtype), requires_grad=False)
            linear.register_parameter("bias", layer.bias)
            layers[name] = linear
    return replace_modules(model, layers)


if __name__ == "__main__":
    main()
