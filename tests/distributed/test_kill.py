"""A run that is killed, whenever and how often, ends with the bits of one that is not.

As a script, `python tests/distributed/test_kill.py 30` kills 30 times, and says when.
"""

from __future__ import annotations

import multiprocessing
import random
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from blokern import models
from blokern.bilevel import FastBAT, FastBATSettings, Trainer, TrainSettings, checkpoint
from blokern.data import ImageDataset, Splits

#: A checkpoint after every batch, so that most moments are within the writing of one.
SETTINGS = TrainSettings(epochs=3, batch_size=16, lr=0.05, eps=0.1, val_steps=1, val_batch_size=16)
SECONDS = "seconds"


def images(count: int, seed: int) -> ImageDataset:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=generator)
    return ImageDataset("noise", pixels, torch.randint(0, 3, (count,), generator=generator), 3)


def train(run_dir: Path, begins: Connection) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = models.build("small_cnn", num_classes=3, in_channels=1, width=8)
    rule = FastBAT(model, SETTINGS.optimizer(model), FastBATSettings(eps=0.1, step_size=20.0))
    splits = Splits(images(16 * 8, 0), images(32, 1), images(4, 2))
    trainer = Trainer(
        rule, splits, SETTINGS, run_dir, resume=True, checkpoint_minutes=1e-9, keep_epochs={0}, keep_last=3
    )
    trainer._draw = lambda: None  # pictures take longer than training here
    begins.send(None)
    trainer.fit()


def without_clocks(payload: object) -> object:
    if isinstance(payload, dict):
        return {k: without_clocks(v) for k, v in payload.items() if not str(k).endswith(SECONDS)}
    if isinstance(payload, list | tuple):
        return [without_clocks(v) for v in payload]
    return payload.tolist() if isinstance(payload, torch.Tensor) else payload


def final(run_dir: Path) -> list[object]:
    return [without_clocks(checkpoint.load(run_dir / name)) for name in ("last.pt", "best.pt", "epoch-0.pt")]


def kill_and_resume(folder: Path, kills: int, seed: int) -> list[str]:
    """Where the run stood at each kill; raises AssertionError if any checkpoint is lost or the last bits differ."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["blokern.bilevel"])

    def started(run_dir: Path) -> multiprocessing.process.BaseProcess:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=train, args=(run_dir, theirs))
        process.start()
        ours.recv()  # it begins to train: the moments before are not worth a kill
        return process

    undisturbed, begin = started(folder / "undisturbed"), time.monotonic()
    undisturbed.join()
    length = time.monotonic() - begin
    assert undisturbed.exitcode == 0
    want = final(folder / "undisturbed")

    moments, draw, runs = [], random.Random(seed), 0
    while len(moments) < kills:
        runs += 1
        run_dir, before = folder / f"run-{runs}", (0, 0)
        process = started(run_dir)
        while len(moments) < kills:
            process.join(draw.uniform(0.0, 0.5 * length))
            if process.exitcode is not None:
                break
            process.kill()
            process.join()
            files = [path for path in sorted(run_dir.glob("last*.pt")) if checkpoint.load(path)]  # all whole
            place = max(((p["epoch"], p["batch"]) for p in map(checkpoint.load, files)), default=(0, 0))
            assert place >= before, f"a checkpoint was lost: {before}, now {place}"
            before = place
            moments.append(
                f"run {runs}: killed after epoch {place[0]}, batch {place[1]}, {len(files)} checkpoints"
            )
            process = started(run_dir)
        process.join()
        assert process.exitcode == 0
        assert final(run_dir) == want
    return moments


def test_kills_change_nothing(tmp_path: Path) -> None:
    assert len(kill_and_resume(tmp_path, kills=3, seed=0)) == 3


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        found = kill_and_resume(Path(folder), int(sys.argv[1]), seed=1)
    print("\n".join(found))
    print(f"{len(found)} kills, and the bits of the undisturbed run each time")
