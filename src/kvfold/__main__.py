"""`python -m kvfold` and the `kvfold` command."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line and leave with its exit status."""
    # Threads that wait for one another spin for some 50 microseconds and then sleep. Spinning for long makes a training
    # step many times slower beside another job; sleeping at once makes a decode step up to 1.7 times slower alone.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    from kvfold.cli import run_command  # here, so that a spawned worker that imports this file stays light

    sys.exit(run_command(sys.argv[1:]))


if __name__ == "__main__":
    main()
