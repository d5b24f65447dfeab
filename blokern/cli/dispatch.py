"""From the words of a command line to a command, and from its errors to messages and exit codes."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Callable

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
from blokern.cli.streams import heard, plain_warnings
from blokern.cli.train import train

__all__ = ["COMMANDS", "run"]

#: What torch and the system say where there is none left.
_MEMORY = re.compile(
    r"out of memory|can't allocate memory|not enough memory|bad_alloc|Cannot allocate memory", re.I
)

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


def run(argv: list[str]) -> int:
    """Run a command line, and return the exit code: see :func:`blokern.cli.main`."""
    with heard(), plain_warnings():
        try:
            return _dispatch(argv)
        except SystemExit as done:  # --help ends so
            return int(done.code or 0)
        except KeyboardInterrupt as stop:
            print(f"blokern: {stop}" if str(stop) else "blokern: stopped", file=sys.stderr)
            return 128 + int(getattr(stop, "signum", signal.SIGINT))
        except Exception as error:
            message = None if "--debug" in argv else _message(error)
            if message is None:
                raise
            print(f"blokern: error: {message}", file=sys.stderr)
            return 2 if isinstance(error, ValueError | OverflowError) else 1


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


def _message(error: Exception) -> str | None:
    """In a line; None for an error that no user has made."""
    told = " ".join(str(error).split())
    if isinstance(error, ValueError | OSError | FloatingPointError | ImportError):
        return told or type(error).__name__
    if isinstance(error, OverflowError):
        return f"a number is out of range: {told}"
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _MEMORY.search(told)):
        what = re.search(r"allocate (\d+) bytes", told)
        size = f": {int(what[1]) / 2**30:,.1f} GiB more were asked for" if what else ""
        return (
            f"out of memory{size}; a smaller --batch-size, --val-batch-size, --width or --threads needs less"
        )
    return None
