"""A command line, run from its words to its exit status.

Exit status: 0 success, 2 an error that the user can correct (one line on standard error), 3 a missed gate or a
different engine, 130 interrupted. Any other exception is a bug in kvfold: exit status 1, with its traceback.
"""

from __future__ import annotations

import signal
import traceback
from collections.abc import Sequence
from types import FrameType

import kvfold
from kvfold.cli.commands import COMMANDS
from kvfold.cli.console import ERR, OUT
from kvfold.cli.flags import HELP, SHOW_HELP, Flag, Panel, help_text
from kvfold.cli.launch import LOST, Ended, launched
from kvfold.errors import Interrupted, KvfoldError, SettingError, did_you_mean
from kvfold.faults import fault_of
from kvfold.ranks import current, lost, reports

BUG = 1  # the exit status of an exception that is not the user's error


def run_command(arguments: Sequence[str]) -> int:
    """Run one command and return its exit status. An error of the user is one line on standard error."""
    stopped = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = True
        raise KeyboardInterrupt

    before = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}
    for kind, handler in before.items():
        if handler is not signal.SIG_IGN:  # a shell ignores SIGINT for background jobs
            signal.signal(kind, stop)
    try:
        _run(arguments)
    except KvfoldError as error:
        return _line(str(error), error.exit_code)
    except Ended as ended:
        return ended.status
    except KeyboardInterrupt:
        return _interrupted()
    except (Exception, SystemExit) as error:
        if lost(error):
            return _lost()
        if stopped:  # importing a C extension turns Ctrl-C into ImportError
            return _interrupted()
        fault = fault_of(error, paths=True)
        return _bug(error) if fault is None else _line(str(fault), fault.exit_code)
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
    return 0


def _run(arguments: Sequence[str]) -> None:
    first, *others = arguments or ["--help"]
    if first in HELP:
        OUT.write(_help())
    elif first == "--version":
        OUT.write(f"kvfold {kvfold.__version__}")
    elif first not in COMMANDS:
        near = did_you_mean(first, [*COMMANDS, *HELP, "--version"])
        raise SettingError(
            f"no command is named {first!r}", allowed=", ".join(COMMANDS), next=near or "see kvfold --help"
        )
    elif any(word in HELP for word in others):
        OUT.write(COMMANDS[first].help(first))
    else:
        COMMANDS[first].run(first, others)


def _help() -> str:
    listed = [Flag(name, name, each.function.__doc__ or "") for name, each in COMMANDS.items()]
    return help_text(
        "COMMAND [arguments] [flags]",
        "Fold the KV cache of a trained transformer.",
        [
            Panel("Commands", listed),
            Panel("Flags", [Flag("version", "--version", "Print the version and exit."), SHOW_HELP]),
        ],
        "Start with `kvfold demo`; `kvfold COMMAND --help` lists the flags of a command.",
    )


def _line(message: str, status: int) -> int:
    """Print the line of an error, unless another rank reports it."""
    if reports():
        rank = "" if current().main else f"rank {current().rank}: "
        ERR.show(f"kvfold: {rank}{' '.join(message.split())}")
    return status


def _lost() -> int:
    """End a rank that lost another one, which its launcher names; that of torchrun does not say it in a line."""
    return LOST if launched() else _line("another rank has ended, and this one with it", LOST)


def _interrupted() -> int:
    return _line("interrupted; the same command continues from what is finished", Interrupted.exit_code)


def _bug(error: BaseException) -> int:
    """Print a traceback and ask for a report."""
    if not reports():
        return BUG
    for line in "".join(traceback.format_exception(error)).splitlines():
        ERR.show(line)
    message = f"this is a bug in kvfold {kvfold.__version__}: please report the lines above, with the command and "
    return _line(f"{message}the versions of torch and transformers", BUG)
