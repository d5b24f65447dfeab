"""The runs of a pruning study: a dense network, masks for it, and the fine-tuning of what they leave."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blokern.cli.options import Options, select_device
from blokern.cli.output import write_json
from blokern.cli.source import Source
from blokern.cli.train import load_data, make_trainer

if TYPE_CHECKING:
    from torch import Tensor, nn

    from blokern.bilevel import PruningSettings, Trainer, TrainSettings
    from blokern.data import Batches
    from blokern.distributed import Processes
    from blokern.sparse import SparseMask

__all__ = ["Dense", "Plan", "Run", "Study", "given_dense", "trained_dense"]


@dataclass(frozen=True)
class Plan:
    """A network to be pruned."""

    label: str
    method: str
    seed: int
    settings: PruningSettings
    training: TrainSettings
    score_batches: int


@dataclass(frozen=True)
class Run:
    """A network pruned and fine-tuned.

    accuracy: of best.pt on the test images. kept: by layer that has a mask, the weights that are left, and all.
    parameters: the same of the whole network. Seconds are without validation.
    """

    plan: Plan
    accuracy: float
    epoch: int
    kept: dict[str, tuple[int, int]]
    parameters: tuple[int, int]
    pruning_seconds: float
    training_seconds: float

    @property
    def masked_share(self) -> float:
        """What is left of the weights that have a mask."""
        left, every = zip(*self.kept.values(), strict=True)
        return float(sum(left) / sum(every))

    @property
    def share(self) -> float:
        """What is left of the whole network."""
        return self.parameters[0] / self.parameters[1]

    @property
    def seconds(self) -> float:
        return self.pruning_seconds + self.training_seconds


# --- The dense network --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dense:
    """The network that pruning starts from.

    seed: of the data's split into training and validation images. seconds: of its training, None if it was given.
    """

    path: Path
    seed: int
    seconds: float | None

    def model(self) -> nn.Module:
        """The trained network."""
        from blokern.bilevel import checkpoint
        from blokern.sparse import to_dense

        return to_dense(checkpoint.load_model(checkpoint.load(self.path), self.path))

    def early(self, epoch: int) -> Mapping[str, Tensor]:
        """The weights after an early epoch of its training. Raises ValueError if they were not kept."""
        from blokern.bilevel import checkpoint

        path = self.path.with_name(f"epoch-{epoch}.pt")
        if not path.exists():
            raise ValueError(
                f"rewind_epoch: epoch {epoch} of the dense training was not kept in {path}; "
                "let blokern prune train the dense network, in a new --out"
            )
        weights: Mapping[str, Tensor] = checkpoint.load(path)["model"]
        return weights


def given_dense(path: Path, options: Options) -> Dense:
    """The dense network of a checkpoint, refused unless network and data are those of the options."""
    from blokern.bilevel import checkpoint

    source = Source.open(path)
    checkpoint.check_finite(source.payload.get("model"), source.path)
    there = {"data": source.data, "model": source.recipe["model"]}
    _, here = load_data(options, source.seed)
    # The data first: the network's normalisation is theirs.
    for key, what in (("data", "data set"), ("model", "architecture")):
        checkpoint.check_same(what, {key: there[key]}, {key: here[key]}, source.path)
    return Dense(source.path, source.seed, None)


def trained_dense(options: Options, keep_epochs: set[int], processes: Processes) -> Dense:
    """The dense network of ``blokern train plain`` with these options, trained unless it is there already."""
    trainer = make_trainer("plain", options, keep_epochs, processes)
    seconds = sum(record["train_seconds"] for record in trainer.fit())
    return Dense(trainer.run_dir / "best.pt", options["seed"], seconds)


# --- Pruned networks ----------------------------------------------------------------------------------------


class Study:
    """Prunes one dense network; what is in the folder already is not done again.

    options: of the command line, "out" among them. Several processes work on each run together, in a folder that all
    of them see; the first one writes.
    """

    def __init__(self, options: Options, dense: Dense, processes: Processes) -> None:
        from blokern.bilevel import checkpoint

        self.out = Path(options["out"])
        self.options = options
        self.dense = dense
        self.processes = processes
        self.device = select_device(options)
        self.splits, self._recipe = load_data(options, dense.seed)
        self._recipe["dense"] = checkpoint.fingerprint(dense.path)

    def run(self, plan: Plan) -> Run:
        """Prune, fine-tune and test a network."""
        from blokern.bilevel import IMP, checkpoint
        from blokern.bilevel.masking import kept_of
        from blokern.sparse import masks_of

        seed, density = f"seed-{plan.seed}", plan.settings.density
        folder = self.out / plan.label / f"density-{density:g}" / seed
        rounds = [(density, folder)]
        if plan.method == "imp":
            *before, _ = IMP(plan.settings).densities()  # type: ignore[arg-type]
            # In a place of their own: they are on the way to other densities too.
            shared = self.out / plan.label / "rounds" / seed
            rounds = [*((d, shared / f"round-{i:02}") for i, d in enumerate(before, 1)), *rounds]

        model = self.dense.model().to(self.device)
        pruning_seconds = training_seconds = 0.0
        for i, (density, here) in enumerate(rounds, 1):
            if plan.method == "imp":
                _say(f"round {i} of {len(rounds)}, density {density:.3g}", self.processes)
            # BiP's masks and weights come of one training.
            masks, seconds = ({}, 0.0) if plan.method == "bip" else self._masks(plan, density, model, here)
            trainer = self._training(plan, density, masks, here)
            training_seconds += sum(record["train_seconds"] for record in trainer.fit())
            pruning_seconds += seconds
            model = trainer.rule.model

        payload = checkpoint.load(folder / "best.pt")
        best = checkpoint.load_model(payload, folder / "best.pt")
        kept = {name: (mask.kept, mask.rows * mask.cols) for name, mask in masks_of(best).items()}
        accuracy = self.accuracy(folder / "best.pt", folder / "test.json")
        parameters = kept_of(best).parameters
        return Run(plan, accuracy, payload["epoch"], kept, parameters, pruning_seconds, training_seconds)

    def accuracy(self, path: Path, memory: Path) -> float:
        """A checkpoint's accuracy on the test images, remembered in a file."""
        import torch

        from blokern.attack import evaluate
        from blokern.bilevel import checkpoint
        from blokern.data import Batches

        question = {"checkpoint": checkpoint.fingerprint(path), "images": len(self.splits.test)}

        def remembered() -> float | None:
            if (
                memory.exists()
                and (answer := json.loads(memory.read_text(encoding="utf-8")))["question"] == question
            ):
                return float(answer["accuracy"])
            return None

        def remember(accuracy: float) -> None:
            memory.parent.mkdir(parents=True, exist_ok=True)
            write_json(memory, {"question": question, "accuracy": accuracy})

        if (accuracy := self.processes.lead(remembered)) is None:
            model = checkpoint.load_model(checkpoint.load(path), path).to(self.device)
            rank, size = self.processes.rank, self.processes.size
            batches = Batches(self.splits.test, 256).dealt(rank, size, torch.Generator(), 0)
            accuracy = evaluate(model, batches, {}, processes=self.processes).clean_accuracy
            self.processes.lead(partial(remember, accuracy))
        return accuracy

    def _masks(
        self, plan: Plan, density: float, model: nn.Module, folder: Path
    ) -> tuple[dict[str, SparseMask], float]:
        """The masks, and the seconds that they took; kept in a file."""
        import torch

        from blokern.bilevel import checkpoint
        from blokern.sparse import SparseMask

        path = folder / "masks.pt"
        question = {**self._method(plan, density), **self._recipe, "score_batches": plan.score_batches}
        stored = self.processes.lead(lambda: checkpoint.load(path) if path.exists() else None)
        if stored is not None:
            checkpoint.check_same("run", stored["question"], question, path)
        else:
            torch.manual_seed(plan.seed)
            start = time.perf_counter()
            masks = self._pruned(plan, density, model)
            seconds = time.perf_counter() - start
            words = {name: (mask.words, list(mask.shape)) for name, mask in masks.items()}
            stored = {"question": question, "seconds": seconds, "masks": words}
            self.processes.lead(partial(_save, path, stored))
        masks = {
            name: SparseMask.of_words(words.to(self.device), torch.Size(shape))
            for name, (words, shape) in stored["masks"].items()
        }
        return masks, stored["seconds"]

    def _pruned(self, plan: Plan, density: float, model: nn.Module) -> dict[str, SparseMask]:
        from blokern.bilevel import IMP, PRUNERS, Hydra, IMPSettings

        batches = self._batches(plan.training)
        if isinstance(plan.settings, IMPSettings):
            return IMP(plan.settings).masks(model, density, [*islice(batches, 1)])
        pruner = PRUNERS[plan.method][0](plan.settings, self.processes)
        seen = _Passes(batches) if isinstance(pruner, Hydra) else [*islice(batches, plan.score_batches)]
        masks: dict[str, SparseMask] = pruner.masks(model, seen)
        return masks

    def _batches(self, training: TrainSettings) -> Batches:
        from blokern.data import Batches

        return Batches(
            self.splits.train.to(self.device),
            training.batch_size,
            shuffle=True,
            augment=training.augment,
            drop_last=True,
            seed=training.seed,
            shard=(self.processes.rank, self.processes.size),
        )

    def _training(self, plan: Plan, density: float, masks: Mapping[str, SparseMask], folder: Path) -> Trainer:
        """The training of the dense network's weights, or for IMP of its early ones, under the masks; by BiP with
        masks of its own."""
        from blokern.bilevel import (
            BiP,
            BiPSettings,
            IMPSettings,
            Plain,
            PlainSettings,
            StepRule,
            Trainer,
            TwoBatchRule,
        )
        from blokern.distributed import sync_batch_norm
        from blokern.sparse import samples_innermost, sparsify

        model = self.dense.model()
        if isinstance(plan.settings, IMPSettings):
            model.load_state_dict(self.dense.early(plan.settings.rewind_epoch))
        sparsify(model.to(self.device), masks)
        optimizer = plan.training.optimizer(model)
        rule: StepRule | TwoBatchRule
        if isinstance(plan.settings, BiPSettings):
            example, _ = next(iter(self._batches(plan.training)))
            rule = BiP(model, optimizer, plan.settings, processes=self.processes, example=example)
        else:
            rule = Plain(model, optimizer, PlainSettings(), self.processes)
        if plan.training.sync_batch_norm:
            # First, while the layers are torch's; SyncBatchNorm keeps whatever layout it meets.
            sync_batch_norm(model, self.processes)
        samples_innermost(model)
        return Trainer(
            rule,
            self.splits,
            plan.training,
            folder,
            resume=True,
            recipe={**self._method(plan, density), **self._recipe},
            checkpoint_minutes=self.options["checkpoint_minutes"],
            threat=Source.open(self.dense.path).threat,
        )

    def _method(self, plan: Plan, density: float) -> dict[str, Any]:
        settings = asdict(replace(plan.settings, density=density))
        if not settings["exclude"]:  # as in runs that are older than it
            del settings["exclude"]
        return {"method": {"name": plan.method, **settings}}


class _Passes:
    """Batches in another order, and otherwise augmented, each time they are iterated over."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches
        self.passes = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.passes += 1
        return self.batches.epoch(self.passes - 1)


def _save(path: Path, payload: Mapping[str, Any]) -> None:
    from blokern.bilevel import checkpoint

    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.save(path, payload)


def _say(message: str, processes: Processes) -> None:
    if processes.leads:
        print(message, file=sys.stderr, flush=True)
