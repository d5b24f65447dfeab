"""The metrics of a run in TensorBoard, where it is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["tensorboard"]


def tensorboard(run_dir: Path, epoch: int, writes: bool = True) -> Any:
    """TensorBoard's writer, forgetting what it was told after ``epoch``; one that does nothing, if it is not to write
    or TensorBoard is not installed."""
    if not writes:
        return _NoBoard()
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return _NoBoard()
    return SummaryWriter(str(run_dir), purge_step=epoch + 1)


class _NoBoard:
    def add_scalar(self, name: str, value: float, step: int) -> None:
        pass

    def close(self) -> None:
        pass
