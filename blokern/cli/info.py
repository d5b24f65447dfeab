"""``blokern info``: where blokern runs."""

from __future__ import annotations

import os
import platform
from importlib.util import find_spec

from blokern._version import __version__
from blokern.cli import WAITING
from blokern.cli.options import MACHINE_OPTIONS, make_parser, parse, select_device

__all__ = ["info", "machine"]


def info(argv: list[str]) -> int:
    """Print versions, the build and the machine, for bug reports."""
    select_device(parse(make_parser("info", "Versions, the build and the machine.", MACHINE_OPTIONS), argv))
    for name, value in machine().items():
        print(f"{name + ':':24} {value}")
    return 0


def waiting() -> str:
    """How idle threads wait, as the environment has it: :func:`blokern.cli.main` chooses, where the user has not."""
    given = [f"{name}={os.environ[name]}" for name in WAITING if name in os.environ]
    return ", ".join(given) or "as the OpenMP runtime does by itself"


def machine() -> dict[str, str]:
    """What a reader of a measurement or of a bug report has to know, in words."""
    import torch

    try:
        from blokern import _backend

        build = {f"build {name}": value for name, value in _backend.build_info().items()}
    except ImportError as error:
        build = {"build": f"not loaded: {error}"}
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    cuda = f"{torch.version.cuda}; {', '.join(devices) or 'no device'}" if torch.version.cuda else "not built"
    return {
        "blokern": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        **build,
        "cpu instruction set": torch.backends.cpu.get_cpu_capability(),
        "cpu threads": str(torch.get_num_threads()),
        "cpu threads wait": waiting(),
        "cuda": cuda,
        "tensorboard": "installed"
        if find_spec("tensorboard")
        else "not installed: metrics go to metrics.jsonl only",
    }
