"""The command line, a file a command; ``dispatch.py`` chooses between them, ``options.py`` is what they share.

Each command parses its own options, from flags and from a YAML file (``--config``), and imports what it
needs: ``blokern --help`` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

__all__ = ["WAITING", "main"]

#: How idle threads wait, in the words of OpenMP, of GNU's and of Intel's runtime.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's), and return the exit code.

    0: done; 1: failed at work, as on a full disk; 2: an argument or a file is wrong; 128 + n: stopped by
    signal n. An error is a message on stderr, with its traceback only after ``--debug``.

    >>> main(["train", "fast-bat", "--out", "runs/a", "--eps", "0.1"])
    0
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if words[:1] != ["bench"]:  # which measures threads as a program of its users has them
            _share_the_machine()
        from blokern.cli.dispatch import run

        return run(words)
    except KeyboardInterrupt:  # while the imports run
        print("blokern: stopped", file=sys.stderr)
        return 130


def _share_the_machine() -> None:
    """Have idle threads sleep instead of spin, unless the user has chosen.

    Where another program has the processors, a spinning thread keeps its own partner from them, and training is ten
    times slower. It is read when torch is loaded, so here, and chosen by the program: never by the library.
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in WAITING):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
