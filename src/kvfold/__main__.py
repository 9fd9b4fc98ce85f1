"""`python -m kvfold` and the `kvfold` command."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

from kvfold.machine import prepare_threads

INTERRUPTED = 130


def main() -> None:
    """Run the command line and leave with its exit status."""
    for kind in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(kind) is not signal.SIG_IGN:
            signal.signal(kind, _leave)  # while this imports, and when all is done: there is nothing to save
    prepare_threads()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # whatever the terminal can show
    from kvfold.cli.commands import run_command  # here, so that a spawned worker that imports this file stays light
    from kvfold.cli.console import silence

    status = run_command(sys.argv[1:])
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # its reader has left, or its disk is full, which was said
            silence(stream)
    sys.exit(status)


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(2, b"kvfold: interrupted\n")
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    main()
