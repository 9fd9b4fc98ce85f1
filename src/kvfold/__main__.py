"""`python -m kvfold` and the `kvfold` command."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line and leave with its exit status."""
    from kvfold.cli import run_command  # here, so that a spawned worker that imports this file stays light

    sys.exit(run_command(sys.argv[1:]))


if __name__ == "__main__":
    main()
