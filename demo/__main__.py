"""What pumice does to a real model: ``python -m demo``, or one part of it by name.

Each part prints its table and what it stands for, and fails where that does not show; so does the
whole. Options follow the name of a part: ``python -m demo pruning --windows 20``.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from demo import compression, generation, pruning, speculative, streaming
from pumice import _console

PARTS = {
    "compression": compression.main,
    "pruning": pruning.main,
    "generation": generation.main,
    "streaming": streaming.main,
    "speculative": speculative.main,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("part", nargs="?", choices=tuple(PARTS), help="default: all in turn")
    options, rest = parser.parse_known_args(arguments)
    if options.part:
        return PARTS[options.part](rest)
    if rest:
        parser.error(f"{rest[0]}: options belong to one part; name it")
    failed = []
    for name, run in PARTS.items():
        _console.output().rule(name)
        if run([]):
            failed.append(name)
    if failed:
        _console.output().print(f"did not show what they stand for: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    # Nothing here is looked up on a hub; without this transformers asks one for optional files.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
