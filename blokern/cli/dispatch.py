"""From the words of a command line to a command, and from its errors to messages and exit codes."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Callable, Sequence

from jsonargparse import ArgumentError

from blokern._version import __version__
from blokern.cli.bench import bench
from blokern.cli.compare import compare
from blokern.cli.evaluate import evaluate
from blokern.cli.export import export
from blokern.cli.info import info
from blokern.cli.options import check_known, first_line
from blokern.cli.prune import prune
from blokern.cli.report import report
from blokern.cli.spectrum import spectrum
from blokern.cli.train import train

__all__ = ["COMMANDS", "main"]

COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train,
    "prune": prune,
    "evaluate": evaluate,
    "compare": compare,
    "report": report,
    "export": export,
    "spectrum": spectrum,
    "bench": bench,
    "info": info,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's), and return the exit code.

    0: done; 1: failed at work, as on a full disk; 2: an argument or a file is wrong; 128 + n: stopped by
    signal n. An error is a message on stderr, with its traceback only after ``--debug``.

    >>> main(["train", "fast-bat", "--out", "runs/a", "--eps", "0.1"])
    0
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(argv)
    except SystemExit as done:  # --help and --print_config end so
        return int(done.code or 0)
    except KeyboardInterrupt as stop:
        print(f"blokern: {stop}" if str(stop) else "blokern: stopped", file=sys.stderr)
        return 128 + int(getattr(stop, "signum", signal.SIGINT))
    except (ArgumentError, ValueError, OSError, FloatingPointError, ImportError) as error:
        if "--debug" in argv:
            raise
        print(f"blokern: error: {_message(error)}", file=sys.stderr)
        return 2 if isinstance(error, ArgumentError | ValueError) else 1


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(
            "usage: blokern COMMAND ...\n\nRobust and sparse networks: train, prune and attack them, compare methods.\n"
        )
        for name, command in COMMANDS.items():
            print(f"  {name:10} {first_line(command)}")
        print("\nblokern COMMAND --help says more; blokern --version prints the version.")
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"blokern {__version__}")
        return 0
    check_known("command", argv[0], COMMANDS)
    return COMMANDS[argv[0]](argv[1:])


def _message(error: BaseException) -> str:
    """In the user's terms: jsonargparse names Python classes."""
    return re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", str(error)).replace("\n ", " ")
