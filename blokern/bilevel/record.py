"""An epoch in numbers, and in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

__all__ = ["Record", "Totals", "accuracies", "ranking", "summary"]

#: One epoch's line in metrics.jsonl.
Record: TypeAlias = dict[str, float]


@dataclass
class Totals:
    """Sums over an epoch's samples, and the seconds it took so far."""

    samples: int = 0
    seconds: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)

    def add(self, means: Mapping[str, float], samples: int) -> None:
        self.samples += samples
        for name, mean in means.items():
            self.sums[name] = self.sums.get(name, 0.0) + mean * samples

    def means(self) -> dict[str, float]:
        return {name: total / self.samples for name, total in self.sums.items()}


def ranking(record: Record) -> tuple[float, float]:
    """What the best epoch is the highest in."""
    return record.get("val_robust_accuracy", 0.0), record["val_accuracy"]


def accuracies(record: Record, digits: int = 2) -> str:
    """A record's standard and robust accuracy, in words."""
    names = {"SA": "val_accuracy", "RA": "val_robust_accuracy"}
    return ", ".join(f"{word} {record[name]:.{digits}%}" for word, name in names.items() if name in record)


def summary(record: Record, epochs: int) -> str:
    """A record in a line."""
    return (
        f"epoch {record['epoch']}/{epochs}: loss {record['loss']:.4f}, train {record['train_accuracy']:.2%}, "
        f"validation {accuracies(record)}; "
        f"{record['train_seconds']:.1f} s + {record['val_seconds']:.1f} s"
    )
