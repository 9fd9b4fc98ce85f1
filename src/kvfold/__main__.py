"""`python -m kvfold` and the `kvfold` command."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

from kvfold.machine import prepare_torch
from kvfold.ranks import current, reports

INTERRUPTED = 130


def main() -> None:
    """Run the command line and exit with its status."""
    for kind in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(kind) is not signal.SIG_IGN:
            signal.signal(kind, _leave)  # during imports and after the command, when there is nothing to save
    prepare_torch()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # for terminals without UTF-8
    from kvfold.cli.console import silence
    from kvfold.cli.main import run_command  # here: a spawned worker imports this file

    status = run_command(sys.argv[1:])
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # the reader has gone, or the disk is full, which was reported
            silence(stream)
    if current().world > 1:  # after an error: a process group that others have left cannot be closed
        os._exit(status)
    sys.exit(status)


def _leave(number: int, frame: FrameType | None) -> None:
    if reports():
        os.write(2, b"kvfold: interrupted\n")
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    main()
