"""Writes the API reference out of the docstrings: `make docs`. A warning of pdoc's is an error."""

from __future__ import annotations

import dataclasses
import importlib
import sys
import typing
import warnings
from collections.abc import Iterator
from pathlib import Path

import pdoc
from torch import nn

import blokern

MODULES = (
    *("blokern", "blokern.ops", "blokern.distributed", "blokern.data", "blokern.models", "blokern.plots"),
    *("blokern.attack", "blokern.attack.torchattacks", "blokern.attack.foolbox", "blokern.sparse"),
    *("blokern.curvature", "blokern.bilevel", "blokern.bilevel.lightning"),
)


def classes() -> Iterator[type]:
    for module in map(importlib.import_module, MODULES):
        for name in module.__all__:
            if isinstance(kind := getattr(module, name), type):
                yield kind


def adapt(kind: type) -> None:
    """What pdoc would make less of. Inherited fields have types by names that it looks for in the heir's module; and
    torch's words for an undocumented forward say nothing here."""
    if dataclasses.is_dataclass(kind):
        kind.__init__.__annotations__ |= typing.get_type_hints(kind)
    if issubclass(kind, nn.Module):
        for method in (vars(kind).get("__init__"), vars(kind).get("forward")):
            if method is not None and method.__doc__ is None:
                method.__doc__ = ""


def main(target: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for kind in classes():
            adapt(kind)
        pdoc.render.configure(footer_text=f"blokern {blokern.__version__}")
        pdoc.pdoc(*MODULES, output_directory=target)
    print(target / "index.html")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
