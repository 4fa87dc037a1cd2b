"""The demo's table of streams, on a model that has nothing to lose."""

import io

import torch
from rich.console import Console

from decoders import build
from demo import streaming


def test_rows_and_table():
    ids = torch.randint(1, 61, (400,), generator=torch.Generator().manual_seed(0))
    said = []
    rows = streaming.rows(build("llama"), ids, tokens=300, cache=24, anew=5, say=said.append)
    assert [(row.name, row.sinks, row.window) for row in rows] == [
        (streaming.DENSE, 0, 0),
        (streaming.WINDOW_ONLY, 0, 24),
        (streaming.STREAMING, 1, 23),
        (streaming.STREAMING, 4, 20),
        (streaming.ANEW, 0, 24),
    ]
    assert len(said) == 5
    assert [len(row.seconds) for row in rows] == [3, 3, 3, 3, 0]  # chunks of 299 tokens
    assert rows[-1].result.places.tolist() == [24, 80, 136, 192, 248]
    text = io.StringIO()
    Console(file=text, width=80).print(streaming.table(rows))
    lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    for sees in ("everything", "last 24", "first 4, last 20", "last 24, anew"):
        assert any(line.lstrip().startswith(sees) for line in lines), text.getvalue()
    assert "…" not in text.getvalue()
    short = streaming.verdict(rows, context=1000)
    long = streaming.verdict(rows, context=100)
    assert len(short) == 3
    assert len(long) == 4
    assert "from token 135 on" in long[-1][0]
    # Random weights need no first tokens, and the demo would say so.
    assert not short[0][1]
    assert short[1][1]
