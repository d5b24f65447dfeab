"""The checkpoint that a command reads, and what it and the files beside it say of the run that wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from blokern.cli.options import SETTINGS

if TYPE_CHECKING:
    from torch import nn

    from blokern.bilevel import ThreatModel
    from blokern.data import Splits

__all__ = ["Source"]

#: How far above a checkpoint a study's settings.yaml lies: OUT/imp/rounds/seed-0/round-01/best.pt.
_DEPTH = 5


@dataclass(frozen=True)
class Source:
    """A checkpoint on the disk. What it does not say is a CheckpointError that names it, not a KeyError."""

    path: Path
    payload: Mapping[str, Any]

    @classmethod
    def open(cls, word: str | Path) -> Source:
        """Read a checkpoint, of a run's folder best.pt. A damaged one's message names a whole one beside it."""
        from blokern.bilevel import checkpoint
        from blokern.bilevel.saver import whole_beside

        path = Path(word)
        if path.is_dir():
            if not (path / "best.pt").exists():
                raise FileNotFoundError(
                    f"{path} is a folder without a best.pt: name a checkpoint, or a run's folder"
                )
            path = path / "best.pt"
        try:
            return cls(path, checkpoint.load(path))
        except checkpoint.CheckpointError as error:
            whole = whole_beside(path)
            hint = "" if whole is None else f"; {whole} beside it is whole"
            raise checkpoint.CheckpointError(f"{error}{hint}") from error

    def __str__(self) -> str:
        epoch = self.payload.get("epoch")
        return f"{self.path}, epoch {epoch}" if isinstance(epoch, int) else str(self.path)

    @property
    def epoch(self) -> int | None:
        """The epochs that the network has had, if the checkpoint says so."""
        epoch = self.payload.get("epoch")
        return epoch if isinstance(epoch, int) else None

    @property
    def seed(self) -> int:
        """Of the run, which says which images are for validation."""
        settings = self.payload.get("settings")
        seed = settings.get("seed") if isinstance(settings, Mapping) else None
        if not isinstance(seed, int):
            raise self._silent("by which seed its images were split")
        return seed

    @property
    def recipe(self) -> dict[str, Any]:
        """How the network and the data are made: "model", "data"."""
        from blokern.bilevel import checkpoint

        return checkpoint.recipe_of(self.payload, self.path)

    @property
    def data(self) -> dict[str, Any]:
        """What the network was trained on: "name", and arguments of :func:`blokern.data.load`."""
        there = self.recipe.get("data")
        if not isinstance(there, Mapping) or not isinstance(there.get("name"), str):
            raise self._silent("what data its network was trained on")
        return dict(there)

    @property
    def data_dir(self) -> str | None:
        """Where the data were when it was trained, as the run's or the study's settings.yaml says."""
        for folder in [self.path.absolute().parent, *self.path.absolute().parent.parents][:_DEPTH]:
            given = _settings(folder / SETTINGS).get("data_dir")
            if isinstance(given, str):
                return given
        return None

    @property
    def threat(self) -> ThreatModel | None:
        """What its network was trained for; None where its training met no attack."""
        from blokern.bilevel import ThreatModel

        return ThreatModel.of_checkpoint(self.payload, self.path)

    def network(self) -> nn.Module:
        """The network, whose weights are finite."""
        from blokern.bilevel import checkpoint

        checkpoint.check_finite(self.payload.get("model"), self.path)
        return checkpoint.load_model(self.payload, self.path)

    def splits(self, data_dir: str | None) -> Splits:
        """The images of its run; from `data_dir`, or from where they were then."""
        from blokern import data
        from blokern.bilevel.checkpoint import CheckpointError

        there = self.data
        there["data_dir"] = data_dir or there.get("data_dir") or self.data_dir
        try:
            return data.load(**there, seed=self.seed)
        except TypeError as error:
            raise CheckpointError(
                f"{self.path} names its data by arguments that do not fit: {error}"
            ) from error

    def _silent(self, what: str) -> ValueError:
        from blokern.bilevel.checkpoint import CheckpointError

        return CheckpointError(f"{self.path} does not say {what}")


def _settings(path: Path) -> Mapping[str, Any]:
    """A settings.yaml that blokern wrote; empty for any other file, or for none."""
    try:
        text = path.read_text(encoding="utf-8")
        told = yaml.safe_load(text) if text.startswith("# blokern ") else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return told if isinstance(told, Mapping) else {}
