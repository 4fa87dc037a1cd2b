"""``python -m bench``: one subcommand an op, peers beside pumice in one run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markdown import Markdown

from bench import (
    attention,
    block_manager,
    cache,
    generate,
    int4,
    int8,
    outlier_weights,
    paged,
    readme,
    results,
    sampling,
    sparse24,
    speculative,
)
from bench.cases import Bench, CaseT, Linear
from bench.machine import describe

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
console = Console()

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_M = {"cpu": "1,16,128", "cuda": "1,4,8,16,32,64,128,512,2048,8192"}
DEFAULT_SHAPES = {"cpu": "4096x4096", "cuda": "4096x4096,8192x8192,28672x8192"}
DEFAULT_DTYPES = {"cpu": "float32,bfloat16", "cuda": "bfloat16"}


Device = Annotated[str, typer.Option(help="cpu or cuda")]
Tokens = Annotated[str, typer.Option("--m", help="token counts, comma-separated")]
Shapes = Annotated[str, typer.Option(help="NxK of the weights, comma-separated")]
Dtypes = Annotated[str, typer.Option(help="activation types, comma-separated")]
Threads = Annotated[int, typer.Option(help="CPU threads; 0 leaves torch's choice")]
Seconds = Annotated[float, typer.Option(help="time for each contender and case")]
Record = Annotated[bool, typer.Option(help="keep the numbers in bench/results")]
Picture = Annotated[Path | None, typer.Option(help="draw the numbers into this file")]


def command(bench: Bench[Linear, Any]) -> Callable[..., None]:
    """The subcommand of a linear layer's benchmark."""

    def run_with_options(
        device: Device = "cpu",
        tokens: Tokens = "",
        shapes: Shapes = "",
        dtypes: Dtypes = "",
        threads: Threads = 0,
        seconds: Seconds = 1.0,
        record: Record = False,
        png: Picture = None,
    ) -> None:
        cases = [
            Linear(int(count), *map(int, shape.split("x")))
            for shape in (shapes or DEFAULT_SHAPES[device]).split(",")
            for count in (tokens or DEFAULT_M[device]).split(",")
        ]
        run(bench, cases, device, dtypes, threads, seconds, record, png)

    return run_with_options


def command_of_cases(
    bench: Bench[CaseT, Any], cases: Mapping[str, Callable[[], list[CaseT]]]
) -> Callable[..., None]:
    """The subcommand of a benchmark that has its own list of cases for each device."""

    def run_with_options(
        device: Device = "cpu",
        only: Annotated[str, typer.Option(help="cases whose names hold this")] = "",
        dtypes: Dtypes = "",
        threads: Threads = 0,
        seconds: Seconds = 1.0,
        record: Record = False,
        png: Picture = None,
    ) -> None:
        chosen = [case for case in cases[device]() if only in str(case)]
        if not chosen:
            raise typer.BadParameter(f"no case holds {only!r}", param_hint="--only")
        run(bench, chosen, device, dtypes, threads, seconds, record, png)

    return run_with_options


app.command("int8", help="W8A8 and LLM.int8() linears beside torch, fbgemm, aten, bitsandbytes.")(
    command(int8.BENCH)
)
app.command("int4", help="int4 linears, groups of 128, beside torch, aten, onnxruntime, ggml.")(
    command(int4.BENCH)
)
app.command("sparse24", help="2:4 linears, floating, int8 and int4, beside their dense ones.")(
    command(sparse24.BENCH)
)


app.command(
    "attention", help="Attention beside torch's (flash, cuDNN, efficient, math, flex), flash-attn."
)(command_of_cases(attention.BENCH, attention.CASES))
app.command(
    "paged",
    help="Decoding over a paged cache beside contiguous keys, gathering them for torch.",
)(command_of_cases(paged.BENCH, paged.CASES))
app.command(
    "cache", help="Writing and copying a paged cache, merging, packing masks, beside plain torch."
)(command_of_cases(cache.BENCH, cache.CASES))
app.command(
    "sampling",
    help="Tokens from logits, verified drafts, beside sort, softmax, multinomial.",
)(command_of_cases(sampling.BENCH, sampling.CASES))


def run(
    bench: Bench[CaseT, Any],
    cases: list[CaseT],
    device: str,
    dtypes: str,
    threads: int,
    seconds: float,
    record: bool,
    png: Path | None,
) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("torch sees no GPU here", param_hint="--device")
    if threads:
        torch.set_num_threads(threads)
    machine = describe(torch.device(device))
    console.print(f"{machine.name}: memory bandwidth {machine.bandwidth / 1e9:.1f} GB/s")
    rows: list[results.Row] = []
    for name in (dtypes or DEFAULT_DTYPES[device]).split(","):
        rows += bench.run(cases, machine, torch.device(device), DTYPES[name], seconds, console.log)
    console.print(Markdown(results.markdown(rows)))
    if record:
        console.print(f"recorded in {results.record(machine, bench.op, rows)}")
    if png:
        results.plot(rows, f"{bench.op}, {machine.name}", png)


@app.command(name="outlier-weights")
def outlier_weights_command() -> None:
    """LLM.int8()'s outlier columns by dequantized or kept 16-bit weights: error and memory."""
    console.print(Markdown(outlier_weights.table()))


@app.command(name="block-manager")
def block_manager_command() -> None:
    """The paged cache's books: operations a second, and memory against reserving in one piece."""
    console.print(Markdown(block_manager.tables()))


@app.command(name="speculative")
def speculative_command(
    dtype: Annotated[str, typer.Option(help="of the target")] = "float32",
    tokens: Annotated[int, typer.Option(help="generated in each run")] = 96,
    rounds: Annotated[int, typer.Option(help="runs of each draft")] = 3,
    only: Annotated[str, typer.Option(help="drafts whose names hold this")] = "",
    threads: Threads = 0,
    processor_time: Annotated[
        bool, typer.Option(help="time the processor, of all threads, where others use it too")
    ] = False,
) -> None:
    """Drafts of SmolLM2-135M: acceptance, tokens a pass of the target, speed-up."""
    if threads:
        torch.set_num_threads(threads)
    rows = speculative.run(dtype, tokens, rounds, only, processor_time, console.log)
    console.print(Markdown(speculative.markdown(rows)))


@app.command(name="generate")
def generate_command(
    model: Annotated[
        str, typer.Option(help="a real model beside the tiny one; '' for none")
    ] = "smollm2-135m",
    dtype: Annotated[str, typer.Option(help="of the real model")] = "float32",
    requests: Annotated[int, typer.Option(help="of each model")] = 32,
    batch: Annotated[int, typer.Option(help="requests at a time")] = 16,
    threads: Threads = 0,
) -> None:
    """Tokens a second for many requests, beside transformers' generate and its own batching."""
    if threads:
        torch.set_num_threads(threads)
    tables = generate.tables(model, DTYPES[dtype], requests, batch, tell=console.log)
    console.print(Markdown(tables))


@app.command(name="readme")
def readme_command(
    check: Annotated[bool, typer.Option(help="only say whether it is up to date")] = False,
) -> None:
    """Rewrite the README's tables from the recorded results."""
    path = Path(__file__).parents[1] / "README.md"
    if not readme.rewrite(path, check=check) and check:
        console.print("README.md is not what bench/results gives: run python -m bench readme")
        sys.exit(1)


if __name__ == "__main__":
    app()
