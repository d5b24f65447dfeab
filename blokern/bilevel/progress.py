"""What a checkpoint says of a run's progress, looked at before the run continues from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor

from blokern.bilevel.checkpoint import CheckpointError
from blokern.bilevel.record import Totals

__all__ = ["check_progress"]


def check_progress(payload: Mapping[str, Any], epochs: int, batches: int, source: Path) -> None:
    """Raise CheckpointError, naming the file and the field, unless a run of so many epochs of so many batches can
    continue from these: the generators' state, epoch, batch, totals, the best ranking, and a record an epoch.

    >>> check_progress(checkpoint.load("runs/a/last.pt"), 5, 40, Path("runs/a/last.pt"))
    """
    epoch, batch, history = (payload.get(name) for name in ("epoch", "batch", "history"))
    rng, totals, best = (payload.get(name) for name in ("rng", "totals", "best"))
    sound = {
        "rng": isinstance(rng, Mapping) and isinstance(rng.get("cpu"), Tensor) and "cuda" in rng,
        "epoch": _is_count(epoch, epochs),
        "batch": _is_count(batch, batches),
        "totals": isinstance(totals, Mapping) and totals.keys() == {field.name for field in fields(Totals)},
        "best": isinstance(best, tuple | list) and all(isinstance(part, float | int) for part in best),
        "history": isinstance(history, list)
        and all(isinstance(record, Mapping) for record in history)
        and len(history) == epoch,
    }
    wrong = [name if name in payload else f"{name} (missing)" for name, fits in sound.items() if not fits]
    if wrong:
        raise CheckpointError(f"{source} holds no state that a run continues from: {', '.join(wrong)}")


def _is_count(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most
