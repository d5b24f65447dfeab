"""Commands of a second, and what they say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from blokern import cli

ROOT = Path(__file__).resolve().parents[2]

#: A run of a second: 4 batches an epoch.
QUICK = [
    *("--train-limit=100", "--batch-size=20", "--width=1", "--eps=0.1", "--val-steps=1", "--threads=1"),
    "--data=synthetic:1x8x8x3",
]


def blokern_process(*argv: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "blokern", *argv],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def error(capsys: Any, *argv: object, code: int = 2) -> str:
    """What a failing command says."""
    assert cli.main([*map(str, argv)]) == code
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    prefix = "blokern: error: "
    return next(line for line in captured.err.splitlines() if line.startswith(prefix)).removeprefix(prefix)
