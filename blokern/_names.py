"""One message for a name that is not known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["unknown_name"]


def unknown_name(argument: str, name: object, known: Iterable[str]) -> ValueError:
    """The error to raise where `argument` got `name`: it suggests the nearest of the known names."""
    names = list(known)
    near = difflib.get_close_matches(str(name).lower(), names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return ValueError(f"{argument} must be one of {', '.join(names)}, got {name!r}{hint}")
