"""What folders of runs hold, checked."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blokern.bilevel import checkpoint
from blokern.bilevel.record import Record, ranking

__all__ = ["Group", "Run", "find_groups"]

#: What is another for each seed: its training images' statistics too.
_OF_A_SEED = ("seed", "mean", "std")
#: What a line of metrics.jsonl has at least.
_NEEDED = ("epoch", "loss", "train_accuracy", "val_accuracy", "train_seconds")


@dataclass(frozen=True)
class Run:
    """A folder of the trainer.

    settings: by dotted name, without seeds and what follows from them. kept: by layer, the weights that a mask keeps,
    and all. test: of best.pt, as compare or prune have measured it: "SA", and "RA" under "attack"; empty if they have
    not.
    """

    folder: Path
    seed: int
    settings: Mapping[str, Any]
    history: Sequence[Record]
    kept: Mapping[str, tuple[int, int]]
    test: Mapping[str, Any]

    @property
    def best(self) -> Record:
        """The epoch of best.pt."""
        return max(self.history, key=ranking)


@dataclass(frozen=True)
class Group:
    """Runs that differ in the seed only."""

    label: str
    runs: Sequence[Run]

    @property
    def settings(self) -> Mapping[str, Any]:
        return self.runs[0].settings

    @property
    def attacked(self) -> bool:
        """Whether the validation attacks."""
        return "val_robust_accuracy" in self.runs[0].history[0]

    def means(self) -> list[Record]:
        """The epochs that all runs have had, averaged over the runs."""
        return [
            {key: sum(record[key] for record in epoch) / len(epoch) for key in epoch[0] if key in epoch[-1]}
            for epoch in zip(*(run.history for run in self.runs), strict=False)
        ]


def find_groups(folders: Sequence[Path], skip: Callable[[Exception], None] | None = None) -> list[Group]:
    """The runs in and below the folders, in the order of their paths, named by what their paths do not share.

    skip: is told of a broken run, which is then left out, as long as another is whole.

    Raises:
        ValueError: a folder holds no run, or a file is broken; the message names it.
        OSError: a file cannot be read.

    >>> [group.label for group in find_groups([Path("runs/demo")])]
    ['fast-at', 'fast-bat']
    """
    found: list[Run] = []
    broken: list[Exception] = []
    for path in dict.fromkeys(path for folder in folders for path in _runs_in(folder)):
        try:
            found.append(read_run(path))
        except (OSError, ValueError) as error:
            broken.append(error)
    if broken and (skip is None or not found):
        raise broken[0]
    if skip is not None:
        for one in broken:
            skip(one)
    # compare and prune write a folder a seed.
    places = {
        run.folder: run.folder.parent if re.fullmatch(r"seed-\d+", run.folder.name) else run.folder
        for run in found
    }
    groups: dict[Path, list[Run]] = {}
    for run in found:
        siblings = [other for other in found if places[other.folder] == places[run.folder]]
        alike = all(other.settings == run.settings for other in siblings)
        groups.setdefault(places[run.folder] if alike else run.folder, []).append(run)
    common = os.path.commonpath([path.parent for path in groups])
    return [Group(path.relative_to(common).as_posix(), runs) for path, runs in groups.items()]


def _runs_in(folder: Path) -> list[Path]:
    """The runs in or below a folder. IMP's rounds are on the way to others, and are shown only if asked for."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder")
    folder = folder.resolve()
    runs = sorted(file.parent for file in folder.rglob("metrics.jsonl"))
    runs = [run for run in runs if "rounds" not in run.relative_to(folder).parts]
    if not runs:
        unfinished = (folder / "last.pt").exists()
        why = "has finished no epoch yet" if unfinished else "is no run: neither it nor a folder below it has"
        raise ValueError(f"{folder} {why}{'' if unfinished else ' a metrics.jsonl'}")
    return runs


def read_run(folder: Path) -> Run:
    """A run's metrics, and what its best.pt says."""
    history = read_metrics(folder / "metrics.jsonl")
    path = folder / "best.pt"
    payload = checkpoint.load(path)
    if not {"settings", "method", "model"} <= payload.keys():
        raise checkpoint.CheckpointError(f"{path} is no checkpoint of a training run")
    training, recipe = payload["settings"], payload.get("recipe") or {}
    parts = {"method": recipe.get("method") or payload["method"], "training": training}
    parts |= {"network": recipe.get("model", {}), "data": recipe.get("data", {})}
    if not all(isinstance(values, Mapping) for values in parts.values()):
        raise checkpoint.CheckpointError(f"{path} is no checkpoint of a training run")
    settings = {
        f"{part}.{name}": value
        for part, values in parts.items()
        for name, value in values.items()
        if name not in _OF_A_SEED
    }
    try:
        int(settings["training.epochs"]), int(settings["training.val_steps"])
        return Run(
            folder,
            training["seed"],
            settings,
            history,
            _kept(payload["model"]),
            _test(folder, path, training),
        )
    except (KeyError, TypeError) as error:
        raise checkpoint.CheckpointError(f"{path} lacks or misstates {error}") from error


def read_metrics(path: Path) -> list[Record]:
    """The records of a metrics.jsonl. Raises ValueError, naming file and line, unless all are whole."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is broken: {error}") from error
    records = [_record(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]
    if not records:
        raise ValueError(f"{path} is empty")
    for number, record in enumerate(records, 1):
        if record["epoch"] != number:
            raise ValueError(
                f"{path}, line {number} must be of epoch {number}, got epoch {record['epoch']:g}"
            )
        if record.keys() != records[0].keys():
            odd = ", ".join(sorted(record.keys() ^ records[0].keys()))
            raise ValueError(f"{path}, line {number} and line 1 differ in what they have: {odd}")
    return records


def _record(line: str, place: str) -> Record:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{place} is broken: {error}") from error
    if not isinstance(record, dict) or (missing := [name for name in _NEEDED if name not in record]):
        what = f"it lacks {', '.join(missing)}" if isinstance(record, dict) else "it is no JSON object"
        raise ValueError(f"{place} is no epoch's record: {what}")
    for name, value in record.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{place}: {name} must be a finite number, got {value!r}")
    return record


def _kept(weights: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    from blokern.sparse import SparseMask

    kept = {}
    for name, words in weights.items():
        if name.endswith("mask_words"):
            weight = f"{name.removesuffix('mask_words')}weight"
            mask = SparseMask.of_words(words, weights[weight].shape)
            kept[weight] = (mask.kept, mask.rows * mask.cols)
    return kept


def _test(folder: Path, best: Path, training: Mapping[str, Any]) -> dict[str, Any]:
    """What compare or prune have measured of this very best.pt."""
    for file in _test_files(folder, training["seed"]):
        try:
            answer = json.loads(file.read_text(encoding="utf-8"))
            if answer["question"]["checkpoint"] != checkpoint.fingerprint(best):
                continue
            if "accuracy" in answer:
                return {"SA": float(answer["accuracy"])}
            accuracies = {"SA": float(answer["clean_accuracy"]), "RA": float(answer["robust_accuracy"])}
            return {**accuracies, "attack": str(answer["attack"])}
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, checkpoint.CheckpointError):
                raise
            raise ValueError(f"{file} is broken: {type(error).__name__}: {error}") from error
    return {}


def _test_files(folder: Path, seed: int) -> Iterator[Path]:
    files = [folder / "test-best.json", folder / "test.json"]
    if folder.parent.name == "dense":
        files.append(folder.parent / f"test-{seed}.json")
    return (file for file in files if file.exists())
