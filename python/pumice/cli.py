"""The command ``pumice``: doctor, compress, eval, generate.

Results go to standard output, progress and errors to standard error. Exit codes: 0 done, 1 the
library refused (one line says why), 2 a wrong command line or a package that is missing.

The commands themselves need the extra ``[cli]``. Without it ``pumice doctor`` still works, since
what it is for is to say what is missing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

_EXTRA = ("typer", "rich")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; ends in SystemExit."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        from pumice._commands import app
    except ImportError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _EXTRA:
            raise
        sys.exit(_without_extra(arguments, missing))
    app(args=list(arguments), prog_name="pumice")


def _without_extra(arguments: Sequence[str], missing: str) -> int:
    if list(arguments) == ["doctor"]:
        from pumice.doctor import doctor

        print(doctor())
        return 0
    print(
        f"pumice: this command needs {missing}, which is not installed: pip install 'pumice[cli]' "
        "(pumice doctor works without)",
        file=sys.stderr,
    )
    return 2
