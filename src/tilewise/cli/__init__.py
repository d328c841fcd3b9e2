"""The command line: one short file a verb. `run` is what the `tilewise` command calls."""

from __future__ import annotations

import sys
from importlib.util import find_spec

OK, FAILED, BAD_USAGE, INTERRUPTED = 0, 1, 2, 130
"""Exit codes of every command: done, a check failed, the command line makes no sense, stopped by Ctrl-C."""

_NEEDED = ("click", "rich", "jinja2")


def run(arguments: list[str] | None = None) -> int:
    """Runs the command line with `arguments` (default: those of the process); returns the exit code."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        sys.stderr.write(
            f"tilewise: the command line needs {', '.join(missing)}; install the extra: pip install 'tilewise[cli]'\n"
        )
        return BAD_USAGE
    from tilewise.cli.main import dispatch

    return dispatch(sys.argv[1:] if arguments is None else arguments)
