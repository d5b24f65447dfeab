"""A trainer's processes: one run, whoever trains it; and what they share of data and evaluation."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from gang import Gang
from torch import Tensor, nn

from blokern.attack import PGD, evaluate
from blokern.bilevel import Interrupted, Plain, PlainSettings, Trainer, TrainSettings, checkpoint
from blokern.data import Batches, ImageDataset, Splits
from blokern.distributed import Processes

SETTINGS = TrainSettings(
    epochs=2, batch_size=8, lr=0.05, eps=0.1, val_steps=2, val_batch_size=8, sync_batch_norm=True
)
BATCHES = 5


def images(count: int, seed: int, side: int = 8) -> ImageDataset:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 1, side, side), dtype=torch.uint8, generator=generator)
    return ImageDataset("noise", pixels, torch.randint(0, 3, (count,), generator=generator), 3, flip=True)


SPLITS = Splits(train=images(8 * BATCHES + 3, 0), val=images(20, 1), test=images(4, 2))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))


class Sending(Plain):
    """Plain training, in which the last process gets a signal, or dies, during a step."""

    act: tuple[int, str] = (0, "")
    steps = 0

    def step(self, x: Tensor, y: Tensor) -> object:
        self.steps += 1
        number, what = self.act
        if self.steps == number and self.processes.rank == self.processes.size - 1:
            if what == "die":
                os._exit(1)
            signal.raise_signal(signal.SIGTERM)
        return super().step(x, y)


def trainer(
    processes: Processes, run_dir: Path, act: tuple[int, str] = (0, ""), resume: bool = True
) -> Trainer:
    model = network()
    rule = type("Plain", (Sending,), {"act": act})
    optimizer = SETTINGS.optimizer(model)
    rule = rule(model, optimizer, PlainSettings(), processes)
    return Trainer(rule, SPLITS, SETTINGS, run_dir, resume=resume)


def fit(processes: Processes, run_dir: Path, act: tuple[int, str] = (0, "")) -> dict[str, Tensor] | str:
    run = trainer(processes, run_dir, act)
    run._draw = lambda: None  # pictures take longer than training here
    try:
        run.fit()
    except Interrupted as stop:
        return str(stop)
    except ConnectionError as error:
        return type(error).__name__
    return {name: t.clone() for name, t in run.rule.model.state_dict().items()}


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("alone")
    fit(Processes(), run_dir)
    return run_dir


def test_two_train_the_run_of_one(tmp_path: Path, alone: Path, two: Gang) -> None:
    first, second = two(fit, tmp_path)
    assert all(torch.equal(first[name], second[name]) for name in first)
    ours, theirs = checkpoint.load(tmp_path / "last.pt"), checkpoint.load(alone / "last.pt")
    assert_close(ours["model"], theirs["model"])
    for a, b in zip(ours["history"], theirs["history"], strict=True):
        for name in ("loss", "train_accuracy", "val_accuracy", "val_robust_accuracy"):
            assert a[name] == pytest.approx(b[name], rel=1e-4), name
    assert torch.equal(ours["rng"]["cpu"], theirs["rng"]["cpu"])


def test_a_signal_to_one_stops_all_and_others_go_on(
    tmp_path: Path, alone: Path, two: Gang, four: Gang
) -> None:
    messages = two(fit, tmp_path, (BATCHES + 2, "signal"))
    assert messages[0] == messages[1]
    assert f"stopped by SIGTERM in epoch 2 of 2, batch 2 of {BATCHES}" in messages[0]
    four(fit, tmp_path)  # by other processes, and more of them
    assert_close(checkpoint.load(tmp_path / "last.pt")["model"], checkpoint.load(alone / "last.pt")["model"])


def test_the_death_of_one_ends_all(tmp_path: Path, alone: Path) -> None:
    gang = Gang(2)
    try:
        assert gang.outcomes(fit, tmp_path, (BATCHES + 2, "die")) == [
            ("ConnectionError", None),
            (None, "died"),
        ]
    finally:
        gang.close()
    assert checkpoint.load(tmp_path / "last.pt")["epoch"] == 1
    fit(Processes(), tmp_path)
    assert_close(checkpoint.load(tmp_path / "last.pt")["model"], checkpoint.load(alone / "last.pt")["model"])


def refused(processes: Processes, run_dir: Path) -> str:
    with pytest.raises(FileExistsError) as error:
        trainer(processes, run_dir, resume=False)
    return str(error.value)


def test_all_refuse_alike(alone: Path, two: Gang) -> None:
    first, second = two(refused, alone)
    assert first == second
    assert "holds a run already" in first


@pytest.mark.parametrize("side", [8, 16])
def test_shards_make_up_the_batches(side: int) -> None:
    data = images(30, 0, side)
    whole = Batches(data, 8, shuffle=True, augment=True, drop_last=True, seed=4)
    shards = [
        Batches(data, 8, shuffle=True, augment=True, drop_last=True, seed=4, shard=(rank, 4))
        for rank in range(4)
    ]
    assert {len(shard) for shard in shards} == {len(whole)}
    for (x, y), *parts in zip(whole.epoch(1), *(shard.epoch(1) for shard in shards), strict=True):
        assert torch.equal(torch.cat([part[0] for part in parts]), x)
        assert torch.equal(torch.cat([part[1] for part in parts]), y)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 6, "drop_last": True, "shard": (0, 4)}, "multiple of the 4 shards"),
        ({"batch_size": 8, "shard": (0, 4)}, "with drop_last"),
        ({"batch_size": 8, "drop_last": True, "shard": (2, 2)}, "0 <= rank < size"),
    ],
)
def test_shards_that_there_are_not(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Batches(images(30, 0), **options)


def evaluated(processes: Processes, count: int) -> tuple[float, ...]:
    model, generator = network(), torch.Generator()
    attack = PGD(model, eps=0.1, steps=3, restarts=2, early_stop=True, generator=generator)
    own = Batches(images(count, 3), 8).dealt(processes.rank, processes.size, generator, 7)
    found = evaluate(model, own, attack, processes=processes)
    return found.clean_accuracy, found.robust_accuracy, *found.per_attack.values(), found.samples


@pytest.mark.parametrize("count", [3, 45])  # one batch: three processes have none
def test_evaluation_has_the_totals_of_all(count: int, four: Gang) -> None:
    assert four(evaluated, count) == [evaluated(Processes(), count)] * 4
