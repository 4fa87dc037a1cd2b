"""The commands of ``pumice``, on typer and rich."""

from __future__ import annotations

import ast
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import Progress

import pumice
from pumice import _console
from pumice.compress import DEFAULT_EXCLUDE
from pumice.evaluate import model_size, perplexity, throughput
from pumice.integrations._packages import MissingExtraError
from pumice.integrations.formats import FORMATS
from pumice.integrations.models import SAMPLES, load_model
from pumice.integrations.texts import TEXTS, Split, load_text
from pumice.quantize import make_recipe, recipe_names

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Make language models smaller and faster.",
    pretty_exceptions_enable=False,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Model = Annotated[
    str,
    typer.Argument(
        help="A folder of transformers or pumice, a .gguf file, a hub name owner/name, or "
        f"{', '.join(SAMPLES)} (fetched once)."
    ),
]
DType = Annotated[str, typer.Option(help=f"Load weights as {', '.join(DTYPES)}; default as saved.")]
Context = Annotated[int, typer.Option(help="Tokens a window.")]
_FORMATS = ("pumice", *FORMATS)
_TEXT_HELP = f"A UTF-8 file, or one of {', '.join(TEXTS)}."


def _command(**settings: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command whose expected errors are one line and an exit code, not a traceback."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def guarded(*arguments: Any, **options: Any) -> None:
            try:
                function(*arguments, **options)
            except MissingExtraError as error:
                raise _fail(error, 2) from error
            except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
                raise _fail(error, 1) from error

        return app.command(**settings)(guarded)

    return register


def _fail(error: Exception, code: int) -> typer.Exit:
    line = " ".join(str(error).split()) or type(error).__name__
    _console.say(_console.messages(), f"pumice: {line}", style="red")
    return typer.Exit(code)


@_command()
def doctor() -> None:
    """Print versions, what was built, what this machine can run, and why not."""
    print(pumice.doctor())


@_command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="Further options are settings of the recipe, e.g. --threshold 6.0 of llm-int8.",
)
def compress(
    context: typer.Context,
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder to write; new or empty.")],
    recipe: Annotated[
        str,
        typer.Option(help="One of " + ", ".join(n.replace("_", "-") for n in recipe_names()) + "."),
    ] = "llm-int8",
    include: Annotated[
        list[str] | None, typer.Option(help="Only layers whose names match; repeatable.")
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="Not layers whose names match; replaces the default lm_head."),
    ] = None,
    calibrate: Annotated[
        str, typer.Option(metavar="TEXT", help=f"Measure each layer on a text. {_TEXT_HELP}")
    ] = "",
    calibration_windows: Annotated[int, typer.Option(help="Windows of it, of 512 tokens.")] = 4,
    dtype: DType = "",
    file_format: Annotated[
        str,
        typer.Option(
            "--format",
            help=f"Write the folder as one of {', '.join(_FORMATS)}; pumice reads them all.",
        ),
    ] = "pumice",
    overwrite: Annotated[bool, typer.Option(help="Replace an existing folder.")] = False,
    full: Annotated[bool, typer.Option(help="Report every layer, not a summary.")] = False,
) -> None:
    """Compress a model's linear layers and write the result as a folder."""
    method = make_recipe(recipe, **_settings(context.args))
    if file_format not in _FORMATS:
        raise typer.BadParameter(f"must be one of {', '.join(_FORMATS)}", param_hint="--format")
    if out.exists() and not overwrite and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not empty; choose another, or --overwrite")
    with _console.progress_bars() as bars:
        loaded, tokenizer = load_model(model, dtype=_dtype(dtype), progress=_say(bars))
        windows = None
        if calibrate:
            ids = _token_ids(tokenizer, calibrate, "calibration", bars)
            windows = _windows(ids, calibration_windows, _context(loaded))
        with _console.step(bars, "compressing") as advance:
            compressed = pumice.compress(
                loaded,
                method,
                windows,
                include=include or None,
                exclude=exclude or DEFAULT_EXCLUDE,
                inplace=True,
                progress=lambda done, total, name: advance(done, total),
            )
        _say(bars)(f"writing {out}")
        pumice.save(compressed, out, format=file_format, tokenizer=tokenizer, overwrite=overwrite)
    report = pumice.report(compressed)
    if full:
        print(report)
    else:
        _console.output().print(_console.report_table(report, f"{recipe}: {model}"))
    before, after = report.model_bytes_before, report.model_bytes_after
    print(f"{before / 1e6:.1f} MB → {after / 1e6:.1f} MB ({after / before:.1%}), written to {out}")


@_command(name="eval")
def evaluate(
    model: Model,
    text: Annotated[str, typer.Option(help=_TEXT_HELP)] = "wikipedia",
    context: Context = 512,
    windows: Annotated[int, typer.Option(help="Evenly spaced windows; 0 for all.")] = 24,
    baseline: Annotated[
        str, typer.Option(metavar="MODEL", help="Another model, to compare on the same windows.")
    ] = "",
    speed: Annotated[bool, typer.Option(help="Measure tokens a second, too.")] = False,
    dtype: DType = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Perplexity of a model on a text, its size, and on request its speed."""
    results = []
    with _console.progress_bars() as bars:
        for name in [baseline, model] if baseline else [model]:
            loaded, tokenizer = load_model(name, dtype=_dtype(dtype), progress=_say(bars))
            ids = _token_ids(tokenizer, text, "evaluation", bars)
            with _console.step(bars, f"perplexity of {name}") as advance:
                quality = perplexity(
                    loaded, ids, context=context, windows=windows or None, on_window=advance
                )
            rates = None
            if speed:
                with _console.step(bars, f"speed of {name}") as advance:
                    rates = throughput(loaded, ids, prefill=context, on_repeat=advance)
            results.append((name, quality, rates, model_size(loaded)))
            del loaded
    if as_json:
        rows = [
            {
                "model": name,
                "text": text,
                "perplexity": quality.perplexity,
                "context": quality.context,
                "tokens": quality.tokens,
                "windows": len(quality.window_nll),
                "window_nll": quality.window_nll,
                "bytes": size,
                "prefill_tokens_per_second": rates.prefill if rates else None,
                "decode_tokens_per_second": rates.decode if rates else None,
            }
            for name, quality, rates, size in results
        ]
        print(json.dumps(rows if baseline else rows[0], indent=1))
        return
    for name, quality, rates, size in results:
        print(f"{name}: perplexity {quality.perplexity:.3f}, {size / 1e6:.1f} MB")
        if rates:
            print(f"  {rates.prefill:.0f} tokens/s prefill, {rates.decode:.1f} tokens/s decode")
    last = results[-1][1]
    if baseline:
        ratio, error = last.relative_to(results[0][1])
        print(f"perplexity {ratio - 1:+.2%} ± {error:.2%} (standard error of paired windows)")
    print(
        f"on {text}: {len(last.window_nll)} windows of {last.context} tokens, "
        f"{last.tokens} predicted"
    )


@_command()
def generate(
    model: Model,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Text to continue; repeatable: all at once.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="At most so many for each.")] = 128,
    temperature: Annotated[float, typer.Option(help="0: the most probable token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Of the k most probable tokens; 0: of all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Of the most probable ones of this mass.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Of those with this part of the best's p.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="The same samples again.")] = None,
    n: Annotated[int, typer.Option("--n", help="Samples of each prompt.")] = 1,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this text; repeatable.")
    ] = None,
    chat: Annotated[bool, typer.Option(help="Prompts are a user's turns of a chat.")] = False,
    dtype: DType = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Continue text: a single one as it comes, several together in one batch."""
    prompts: list[Any] = prompt or ([] if sys.stdin.isatty() else [sys.stdin.read()])
    if not prompts:
        raise typer.BadParameter("give one, or pipe it in", param_hint="--prompt")
    with _console.progress_bars() as bars:
        loaded, tokenizer = load_model(model, dtype=_dtype(dtype), progress=_say(bars))
    if chat:
        prompts = [_turn(tokenizer, text) for text in prompts]
    params: dict[str, Any] = {
        "max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k,
        "top_p": top_p, "min_p": min_p, "seed": seed, "n": n, "stop": stop or (),
    }  # fmt: skip
    if len(prompts) == n == 1 and not as_json:
        for output in pumice.generate(loaded, prompts, tokenizer=tokenizer, stream=True, **params):
            if output.error is not None:
                raise output.error
            print(output.text, end="", flush=True)
        print()
        return
    completions = pumice.generate(loaded, prompts, tokenizer=tokenizer, **params)
    if as_json:
        rows = [
            {
                "prompt": prompt[one.prompt_index] if prompt else None,
                "text": one.text,
                "tokens": one.tokens,
                "finish_reason": one.finish_reason,
                "seed": one.seed,
            }
            for one in completions
        ]
        print(json.dumps(rows, indent=1, ensure_ascii=False))
        return
    for one in completions:
        print(f"--- prompt {one.prompt_index + 1}, sample {one.index + 1}")
        print(one.text)


def _turn(tokenizer: Any, text: str) -> list[int]:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("--chat: the model's tokenizer has no chat template")
    turns = [{"role": "user", "content": text}]
    encoded = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)
    ids: list[int] = encoded["input_ids"]
    return ids


def _settings(arguments: list[str]) -> dict[str, Any]:
    """``["--threshold", "6.0", "--per-element"]`` as settings of a recipe."""
    settings: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        option = rest.pop(0)
        if not option.startswith("--") or option == "--":
            raise typer.BadParameter(f"unexpected argument {option!r}")
        name, equals, value = option[2:].partition("=")
        if not equals:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else "True"
        settings[name.replace("-", "_")] = _value(value)
    return settings


def _value(text: str) -> Any:
    if text in ("inf", "true", "false"):
        return {"inf": float("inf"), "true": True, "false": False}[text]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _dtype(name: str) -> torch.dtype | None:
    if name and name not in DTYPES:
        raise typer.BadParameter(f"must be one of {', '.join(DTYPES)}", param_hint="--dtype")
    return DTYPES.get(name)


def _say(bars: Progress) -> Callable[[str], None]:
    return lambda line: _console.say(bars.console, line)


def _token_ids(tokenizer: Any, text: str, split: Split, bars: Progress) -> torch.Tensor:
    ids = tokenizer(load_text(text, split=split, progress=_say(bars)), verbose=False).input_ids
    return torch.tensor(ids, dtype=torch.int64)


def _context(model: torch.nn.Module, usual: int = 512) -> int:
    """The length of calibration windows: the usual one, where the model was made for that many."""
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return min(usual, limit) if isinstance(limit, int) else usual


def _windows(ids: torch.Tensor, count: int, context: int) -> list[dict[str, torch.Tensor]]:
    """Calibration inputs: windows evenly spaced over the text, as ``perplexity`` takes them."""
    available = len(ids) // context
    if not 1 <= count <= available:
        raise ValueError(
            f"the calibration text has {available} windows of {context} tokens, not {count}"
        )
    starts = [(i * available // count) * context for i in range(count)]
    return [{"input_ids": ids[start : start + context][None]} for start in starts]
