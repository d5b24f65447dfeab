"""One message for a name that is not known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["one_of", "unknown_name"]


def one_of(name: object, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: "one of 'a', 'b', got 'c'; did you mean 'a'?"."""
    names = list(known)
    near = difflib.get_close_matches(str(name).lower(), names, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"one of {', '.join(map(repr, names))}, got {name!r}{hint}"


def unknown_name(argument: str, name: object, known: Iterable[str]) -> ValueError:
    """The error to raise where `argument` got a `name` that is none of the known ones."""
    return ValueError(f"{argument} must be {one_of(name, known)}")
