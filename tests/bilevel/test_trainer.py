import errno
import fcntl
import json
import math
import os
import signal
import sys
import types
from dataclasses import replace

import pytest
import torch
from runs import (
    BATCHES,
    SETTINGS,
    SPLITS,
    assert_same,
    assert_same_run,
    images,
    make,
    metrics,
    sending,
    state,
)

from blokern import models
from blokern.bilevel import (
    FastAT,
    FastATSettings,
    FastBAT,
    Interrupted,
    Plain,
    PlainSettings,
    Trainer,
    checkpoint,
)
from blokern.bilevel.checkpoint import CheckpointError
from blokern.bilevel.step import StepResult

DRAW = Trainer._draw
pytestmark = pytest.mark.usefixtures("no_pictures")


# --- A run --------------------------------------------------------------------------------------------------


def test_a_run_leaves_its_files(uninterrupted):
    names = {"last.pt", "best.pt", "metrics.jsonl", "curves.png", "examples.png", ".lock"}
    assert {file.name for file in uninterrupted.iterdir()} == names


def test_a_record_an_epoch(uninterrupted):
    records = [json.loads(line) for line in (uninterrupted / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [1, 2, 3]
    for record in records:
        assert set(record) == {
            *("epoch", "loss", "train_accuracy", "lr", "free", "val_accuracy", "val_robust_accuracy"),
            *("train_seconds", "val_seconds"),
        }
        assert 0 <= record["val_robust_accuracy"] <= record["val_accuracy"] <= 1
        assert record["train_seconds"] > 0


def test_best_is_the_most_robust_epoch(uninterrupted):
    records = metrics(uninterrupted)
    best = max(records, key=lambda record: (record["val_robust_accuracy"], record["val_accuracy"]))
    assert checkpoint.load(uninterrupted / "best.pt")["epoch"] == best["epoch"]


def test_without_an_attack_best_is_the_most_accurate_epoch(tmp_path):
    make(tmp_path, settings=replace(SETTINGS, val_steps=0)).fit()
    records = metrics(tmp_path)
    assert all("val_robust_accuracy" not in record for record in records)
    best = max(records, key=lambda record: record["val_accuracy"])
    assert checkpoint.load(tmp_path / "best.pt")["epoch"] == best["epoch"]


def test_without_an_attack_there_are_curves_and_no_examples(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "_draw", DRAW)
    make(tmp_path, settings=replace(SETTINGS, val_steps=0, epochs=1)).fit()
    assert {file.name for file in tmp_path.glob("*.png")} == {"curves.png"}


def test_epochs_are_kept_on_request(tmp_path, uninterrupted):
    kept = (0, 2)
    with pytest.raises(Interrupted):
        make(tmp_path, sending(7), keep_epochs=kept).fit()
    make(tmp_path, resume=True, keep_epochs=kept).fit()
    assert sorted(file.name for file in tmp_path.glob("epoch-*")) == ["epoch-0.pt", "epoch-2.pt"]
    assert_same(state(tmp_path, "epoch-0.pt")["model"], make(tmp_path / "new").rule.model.state_dict())
    assert len(state(tmp_path, "epoch-2.pt")["history"]) == 2
    assert_same_run(tmp_path, uninterrupted)


def test_the_schedule_is_applied_before_each_step(tmp_path):
    seen = []

    class Watching(Plain):
        def step(self, x, y):
            seen.append((self.optimizer.param_groups[0]["lr"], self.optimizer.param_groups[0]["momentum"]))
            return super().step(x, y)

    make(tmp_path, Watching, PlainSettings()).fit()
    triangle = [1 - abs(2 * step / (3 * BATCHES) - 1) for step in range(3 * BATCHES)]
    assert seen == [pytest.approx((0.05 * height, 0.9 - 0.1 * height)) for height in triangle]


def test_the_same_seed_gives_the_same_run_whatever_was_drawn_before(tmp_path, uninterrupted):
    trainer = make(tmp_path / "run")
    torch.rand(17)
    trainer.fit()
    assert_same_run(tmp_path / "run", uninterrupted)


def test_validation_does_not_change_training(tmp_path, uninterrupted):
    other = replace(SETTINGS, val_steps=3, val_restarts=2, val_samples=7, val_batch_size=3, eps=0.2)
    make(tmp_path / "run", settings=other).fit()
    assert_same(state(tmp_path / "run")["model"], state(uninterrupted)["model"])
    assert_same(state(tmp_path / "run")["rng"], state(uninterrupted)["rng"])


def test_means_weigh_every_sample_alike(tmp_path):
    class Counting:
        def __init__(self, rule):
            self.model, self.optimizer, self.steps = rule.model, rule.optimizer, 0

        def step(self, x, y):
            self.steps += 1
            logits = torch.nn.functional.one_hot(y, 3).float()  # always right
            return StepResult(torch.tensor(float(self.steps)), logits, {"extra": torch.tensor(2.0)})

    trainer = make(tmp_path, lambda *a: Counting(Plain(*a)), PlainSettings(), replace(SETTINGS, epochs=1))
    (record,) = trainer.fit()
    assert (record["loss"], record["train_accuracy"], record["extra"]) == (3.0, 1.0, 2.0)


def test_channels_last_runs_and_resumes(tmp_path):
    settings = replace(SETTINGS, channels_last=True)
    make(tmp_path / "whole", settings=settings).fit()
    with pytest.raises(Interrupted):
        make(tmp_path / "parts", sending(7), settings=settings).fit()
    make(tmp_path / "parts", settings=settings, resume=True).fit()
    assert_same(state(tmp_path / "parts"), state(tmp_path / "whole"))


def test_a_rule_without_state_saves_none(uninterrupted):
    assert "rule" not in state(uninterrupted)


# --- What is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["last.pt", "best.pt", "metrics.jsonl"])
def test_a_folder_with_a_run_is_refused(tmp_path, name):
    (tmp_path / name).write_text("precious")
    with pytest.raises(FileExistsError, match=rf"holds a run already \({name}\): resume"):
        make(tmp_path)
    assert (tmp_path / name).read_text() == "precious"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"rule": FastAT, "method": FastATSettings(eps=0.1)},
            "method.rule is 'FastBAT' there and 'FastAT' here",
        ),
        ({"settings": replace(SETTINGS, epochs=4)}, "settings.epochs is 3 there and 4 here"),
        ({"recipe": {"model": {"width": 2}}}, "recipe.model is None there"),
        ({"width": 3}, "of another architecture: weights .* of another shape"),
    ],
)
def test_the_checkpoint_of_another_run_is_refused(tmp_path, uninterrupted, change, message):
    (tmp_path / "last.pt").write_bytes((uninterrupted / "last.pt").read_bytes())
    with pytest.raises(CheckpointError, match=message):
        make(tmp_path, resume=True, **change)


def test_a_damaged_checkpoint_is_refused_and_kept(tmp_path, uninterrupted):
    bad = (uninterrupted / "last.pt").read_bytes()[:-100]
    (tmp_path / "last.pt").write_bytes(bad)
    with pytest.raises(CheckpointError, match=r"last\.pt"):
        make(tmp_path, resume=True)
    assert (tmp_path / "last.pt").read_bytes() == bad


def test_a_folder_that_cannot_be_written_is_refused_before_training(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        make(tmp_path / "file")
    with pytest.raises(OSError, match="file"):
        make(tmp_path / "file" / "run")

    def read_only(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "fsync", read_only)
    with pytest.raises(OSError, match="Read-only file system"):
        make(tmp_path / "run")


def test_two_do_not_train_in_one_folder(tmp_path, uninterrupted):
    refusals = []

    class Crowded(FastBAT):
        def step(self, x, y):
            for attempt in (lambda: make(tmp_path, resume=True), waiting.fit):
                with (
                    torch.random.fork_rng(devices=[]),  # make() sets the seed
                    pytest.raises(BlockingIOError, match="another process trains in") as refusal,
                ):
                    attempt()
                refusals.append(str(refusal.value))
            return super().step(x, y)

    Crowded.__name__ = "FastBAT"
    waiting = make(tmp_path)
    make(tmp_path, Crowded).fit()
    assert len(refusals) == 2 * 3 * BATCHES
    assert all(str(tmp_path) in message for message in refusals)
    assert_same_run(tmp_path, uninterrupted)
    assert make(tmp_path, resume=True).complete


def test_trains_where_nothing_can_be_locked(tmp_path, uninterrupted, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    make(tmp_path / "no-locks").fit()
    assert_same_run(tmp_path / "no-locks", uninterrupted)
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
    make(tmp_path / "no-fcntl").fit()
    assert_same_run(tmp_path / "no-fcntl", uninterrupted)


def test_a_full_disk_keeps_the_last_epoch(tmp_path, uninterrupted, monkeypatch):
    real = os.fsync

    def fsync(descriptor):
        if len(trainer.history) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    trainer = make(tmp_path)
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match=r"No space left on device.*\.pt"):
        trainer.fit()
    monkeypatch.undo()
    assert checkpoint.load(tmp_path / "last.pt")["epoch"] == 1
    make(tmp_path, resume=True).fit()
    assert_same_run(tmp_path, uninterrupted)


def breaking(at, what):
    class Breaking(FastBAT):
        steps = 0

        def step(self, x, y):
            self.steps += 1
            result = super().step(x, y)
            if self.steps != at:
                return result
            if what == "weight":
                next(self.model.parameters()).data[0] = math.nan
                return result
            return StepResult(torch.tensor(what), result.logits)

    return Breaking


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, loss):
    message = rf"the loss is {loss} in epoch 2, batch 3 \(step 8\); the last good checkpoint is .*last\.pt"
    with pytest.raises(FloatingPointError, match=message):
        make(tmp_path, breaking(BATCHES + 3, loss)).fit()
    assert checkpoint.load(tmp_path / "last.pt")["epoch"] == 1


@pytest.mark.parametrize("minutes", [1e-9, 10])
@pytest.mark.parametrize("step", [BATCHES + 1, 2 * BATCHES])
def test_weights_that_are_not_finite_are_never_saved(tmp_path, step, minutes):
    with pytest.raises(FloatingPointError, match="in epoch 2, batch"):
        make(tmp_path, breaking(step, "weight"), checkpoint_minutes=minutes).fit()
    saved = checkpoint.load(tmp_path / "last.pt")
    assert saved["epoch"] == 1
    assert all(tensor.isfinite().all() for tensor in saved["model"].values())


def test_there_may_be_no_checkpoint_yet(tmp_path):
    with pytest.raises(FloatingPointError, match=r"batch 2 .*there is no checkpoint yet"):
        make(tmp_path, breaking(2, math.nan)).fit()
    assert [file.name for file in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize("what", [math.nan, "weight"])
def test_an_interrupt_does_not_save_a_broken_model(tmp_path, what):
    class Both(breaking(3, what)):
        def step(self, x, y):
            result = super().step(x, y)
            if self.steps == 3:
                signal.raise_signal(signal.SIGTERM)
            return result

    with pytest.raises(FloatingPointError):
        make(tmp_path, Both).fit()
    assert not (tmp_path / "last.pt").exists()


def test_wrong_arguments_are_named(tmp_path):
    with pytest.raises(ValueError, match="batch_size must be at most the 10 images"):
        make(tmp_path, splits=replace(SPLITS, train=images(10, 0)))
    with pytest.raises(ValueError, match=r"splits\.val must hold images"):
        make(tmp_path, splits=replace(SPLITS, val=images(0, 0)))
    with pytest.raises(ValueError, match="checkpoint_minutes must be positive, got 0"):
        make(tmp_path, checkpoint_minutes=0)

    model = models.build("small_cnn", num_classes=3, in_channels=1, width=2)
    rule = Plain(model, torch.optim.Adam(model.parameters()), PlainSettings())
    with pytest.raises(ValueError, match="cycle_momentum needs an optimizer with momentum"):
        Trainer(rule, SPLITS, SETTINGS, tmp_path)
    assert not list(tmp_path.iterdir())


# --- Display ------------------------------------------------------------------------------------------------


def test_away_from_a_terminal_there_is_a_line_an_epoch(tmp_path, capsys):
    make(tmp_path).fit()
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if not line.startswith("TensorBoard")]
    assert [line[:10] for line in lines] == ["epoch 1/3:", "epoch 2/3:", "epoch 3/3:"]
    assert captured.out == ""


def test_tensorboard_gets_the_records_where_it_is_installed(tmp_path, monkeypatch):
    told = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            told.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            told.append((name, step))

        def close(self):
            told.append("closed")

    fake = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    make(tmp_path, settings=replace(SETTINGS, epochs=1)).fit()
    assert told[0] == (str(tmp_path), 1)
    assert ("val_robust_accuracy", 1) in told
    assert told[-1] == "closed"
