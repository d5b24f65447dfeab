"""Runs of a second, and whether two of them are the same."""

import json
import signal

import torch

from blokern import models
from blokern.bilevel import FastBAT, FastBATSettings, Trainer, TrainSettings, checkpoint
from blokern.data import ImageDataset, Splits

SETTINGS = TrainSettings(
    epochs=3, batch_size=16, lr=0.05, eps=0.1, val_steps=2, val_batch_size=8, cycle_momentum=True, seed=3
)
BATCHES = 5  # an epoch


def images(count, seed):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=generator)
    return ImageDataset("noise", pixels, torch.randint(0, 3, (count,), generator=generator), 3)


SPLITS = Splits(train=images(16 * BATCHES + 3, 0), val=images(20, 1), test=images(4, 2))


def make(run_dir, rule=FastBAT, method=None, settings=SETTINGS, seed=0, width=2, splits=SPLITS, **options):
    torch.manual_seed(seed)
    model = models.build("small_cnn", num_classes=3, in_channels=1, width=width)
    method = FastBATSettings(eps=0.1, step_size=20.0) if method is None else method
    return Trainer(rule(model, settings.optimizer(model), method), splits, settings, run_dir, **options)


class Sending(FastBAT):
    """Fast-BAT that gets a signal during its steps number `at` (1, 2, …)."""

    at = ()
    signum = signal.SIGINT

    def step(self, x, y):
        self.steps = getattr(self, "steps", 0) + 1
        for number in self.at:
            if number == self.steps:
                signal.raise_signal(self.signum)
        return super().step(x, y)


def sending(*steps, signum=signal.SIGINT):
    # Under the same name, by which a checkpoint knows its method.
    return type("FastBAT", (Sending,), {"at": steps, "signum": signum})


def state(run_dir, name="last.pt"):
    """All of a checkpoint but the clock."""
    payload = checkpoint.load(run_dir / name)
    for record in payload["history"]:
        del record["train_seconds"], record["val_seconds"]
    del payload["totals"]["seconds"]
    return payload


def metrics(run_dir):
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if not k.endswith("seconds")} for record in records]


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_same(one, other)
    else:
        assert a == b


def assert_same_run(run_dir, uninterrupted):
    for name in ("last.pt", "best.pt"):
        assert_same(state(run_dir, name), state(uninterrupted, name))
    assert metrics(run_dir) == metrics(uninterrupted)
