"""A text without end in a cache of fixed size: ``python -m demo.streaming``.

SmolLM2-135M reads a text as a stream, seeing only as many tokens as its cache holds: the last ones
(window attention), or the first few and the last ones (StreamingLLM, Xiao et al., 2023). Beside it,
what it costs to keep everything, and what to compute the window anew for every token.

By default a short text and a small cache, which show what the sinks are for. The trained context
(8192 tokens) is left behind with ``--tokens 12288 --cache 1024``, where the model that sees
everything breaks down too: minutes.
Exits with 1 if the table does not show what the paper claims.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from rich import box
from rich.table import Table
from torch import Tensor, nn

from pumice import _console
from pumice.decode.stream_perplexity import (
    StreamPerplexity,
    recomputed_perplexity,
    stream_perplexity,
)
from pumice.integrations.models import load_model
from pumice.integrations.texts import load_text

WINDOW_ONLY, STREAMING, DENSE, ANEW = "window only", "sinks + window", "everything", "computed anew"
CHUNK = 128


@dataclass
class Row:
    """One way to read the text. ``sinks`` and ``window``: tokens that stay, 0 for all."""

    name: str
    sinks: int
    window: int
    result: StreamPerplexity
    seconds: list[float] = field(default_factory=list)  # of each chunk

    def milliseconds(self, first: float, last: float) -> float:
        """The time of a token, in a part of the text given by two fractions."""
        count = len(self.seconds)
        part = self.seconds[int(first * count) : max(int(last * count), 1)]
        return 1000 * sum(part) / (len(part) * CHUNK)


def rows(
    model: nn.Module,
    token_ids: Tensor,
    *,
    tokens: int = 1536,
    cache: int = 256,
    anew: int = 8,
    say: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Every way to read the first ``tokens``; well under a minute on two idle cores."""
    ids = token_ids[:tokens]
    made = []
    for name, sinks, window in (
        (DENSE, 0, 0),
        (WINDOW_ONLY, 0, cache),
        (STREAMING, 1, cache - 1),
        (STREAMING, 4, cache - 4),
    ):
        clock = Clock()
        say(f"{name}: {sinks or ''}{' + ' if sinks else ''}{window or 'all'} of {tokens} tokens")
        result = stream_perplexity(
            model, ids, sinks=sinks, window=window or None, chunk=CHUNK, on_chunk=clock
        )
        made.append(Row(name, sinks, window, result, clock.seconds))
    if anew:
        say(f"{ANEW}: {anew} tokens from {cache} each")
        every = -(-(len(ids) - cache) // anew)
        result = recomputed_perplexity(model, ids, window=cache, every=every)
        made.append(Row(ANEW, 0, cache, result))
    return made


class Clock:
    """Called after each chunk; notes what it took."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last = time.perf_counter()

    def __call__(self, done: int, total: int) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now


def table(made: Sequence[Row]) -> Table:
    """In 80 columns. Perplexity of all, of the last quarter, and of the few computed anew."""
    few = next((row.result.places for row in made if row.name == ANEW), torch.empty(0))
    end = int(made[0].result.places[-1]) + 1
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    grid.add_column("a token sees", no_wrap=True)
    for heading in ("cache", "all", "last ¼", f"same {len(few)}", "ms", "ms at end"):
        grid.add_column(heading, justify="right", no_wrap=True)
    for row in made:
        cells = [sees(row), f"{row.result.cache_bytes / 2**20:.0f} MiB"]
        if row.name == ANEW:
            each = 1000 * row.result.seconds / row.result.tokens
            cells += ["", "", f"{row.result.perplexity:.1f}", f"{each:.0f}", f"{each:.0f}"]
        else:
            cells += [
                f"{row.result.perplexity:.2f}",
                f"{row.result.between(end * 3 // 4, end):.2f}",
                f"{row.result.at(few):.1f}" if len(few) else "",
                f"{row.milliseconds(0, 0.25):.1f}",
                f"{row.milliseconds(0.75, 1):.1f}",
            ]
        grid.add_row(*cells)
    return grid


def sees(row: Row) -> str:
    if not row.window:
        return "everything"
    last = f"last {row.window}" + (", anew" if row.name == ANEW else "")
    return f"first {row.sinks}, {last}" if row.sinks else last


def verdict(made: Sequence[Row], context: int) -> list[tuple[str, bool]]:
    """What the paper claims, in this table."""
    by_name = {row.name: row.result for row in made}  # of the sinks the last, most of them
    window, sinks = by_name[WINDOW_ONLY], by_name[STREAMING]
    dense = by_name[DENSE]
    length = dense.tokens + 1
    claims = [
        (
            f"without the first tokens perplexity is {window.perplexity:.1f}, with them "
            f"{sinks.perplexity:.1f}",
            window.perplexity > 1.5 * sinks.perplexity,
        ),
        (
            f"the cache of the stream stays at {sinks.cache_bytes / 2**20:.0f} MiB "
            f"(everything: {dense.cache_bytes / 2**20:.0f} MiB)",
            sinks.cache_bytes < dense.cache_bytes,
        ),
    ]
    known = dense.between(0, context), sinks.between(0, context)
    claims.append(
        (
            f"within the trained context, everything gives {known[0]:.2f}, sinks and window "
            f"{known[1]:.2f}",
            known[1] < 1.15 * known[0],
        )
    )
    if length > 1.4 * context:
        start = int(1.35 * context)
        beyond = dense.between(start, length), sinks.between(start, length)
        claims.append(
            (
                f"beyond it, from token {start} on, everything gives {beyond[0]:.1f}, sinks and "
                f"window {beyond[1]:.1f}",
                beyond[0] > 1.5 * beyond[1],
            )
        )
    return claims


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    console = _console.output()
    with _console.progress_bars() as bars:
        say = lambda line: _console.say(bars.console, line)  # noqa: E731
        model, tokenizer = load_model("smollm2-135m", progress=say)
        ids = torch.tensor(tokenizer(load_text("wikipedia", progress=say), verbose=False).input_ids)
        with _console.step(bars, "streaming"):
            made = rows(
                model, ids, tokens=options.tokens, cache=options.cache, anew=options.anew, say=say
            )
    context: int = model.config.max_position_embeddings  # type: ignore[union-attr,assignment]
    console.print(
        f"SmolLM2-135M (trained on {context} tokens) reads {options.tokens} tokens of Wikipedia\n"
        "perplexity of all tokens, of the last quarter, of those that were computed anew;\n"
        f"milliseconds a token in the first and last quarter, {CHUNK} at a time, "
        f"{torch.get_num_threads()} threads"
    )
    console.print(table(made))
    holds = verdict(made, context)
    for statement, true in holds:
        console.print(f"{'yes' if true else 'NO '}  {statement}", style="" if true else "red")
    return 0 if all(true for _, true in holds) else 1


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m demo.streaming", description=__doc__)
    parser.add_argument("--tokens", type=int, default=1536, help="default: %(default)s")
    parser.add_argument("--cache", type=int, default=256, help="tokens kept; default: %(default)s")
    parser.add_argument("--anew", type=int, default=8, help="computed anew; default: %(default)s")
    parser.add_argument("--threads", type=int, default=0, help="default: torch's choice")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
