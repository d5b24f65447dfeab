import errno
import fcntl
import json
import math
import os
import signal
import sys
import threading
import types
from dataclasses import replace

import pytest
import torch

from blokern import models
from blokern.bilevel import (
    BiP,
    BiPSettings,
    FastAT,
    FastATSettings,
    FastBAT,
    FastBATSettings,
    Plain,
    PlainSettings,
    checkpoint,
)
from blokern.bilevel import trainer as trainer_module
from blokern.bilevel.checkpoint import CheckpointError
from blokern.bilevel.step import StepResult
from blokern.bilevel.trainer import Interrupted, Trainer, TrainSettings
from blokern.data import ImageDataset, Splits
from blokern.sparse import masks_of

SETTINGS = TrainSettings(
    epochs=3, batch_size=16, lr=0.05, eps=0.1, val_steps=2, val_batch_size=8, cycle_momentum=True, seed=3
)
BATCHES = 5  # an epoch
DRAW = Trainer._draw


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


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Nets this small only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, one_thread):
    run_dir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    make(run_dir).fit()
    return run_dir


@pytest.fixture(autouse=True)
def no_pictures(uninterrupted, monkeypatch):
    """Drawing takes longer than training here; the run of `uninterrupted` is drawn."""
    monkeypatch.setattr(Trainer, "_draw", lambda trainer: None)


def assert_same_run(run_dir, uninterrupted):
    for name in ("last.pt", "best.pt"):
        assert_same(state(run_dir, name), state(uninterrupted, name))
    assert metrics(run_dir) == metrics(uninterrupted)


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


# --- Stop and resume ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("step", "epoch", "batch"),
    [(1, 0, 1), (2, 0, 2), (BATCHES, 0, BATCHES), (BATCHES + 3, 1, 3), (3 * BATCHES, 2, BATCHES)],
)
def test_a_resumed_run_has_the_same_bits(tmp_path, uninterrupted, step, epoch, batch, signum):
    before = signal.getsignal(signum)
    with pytest.raises(
        Interrupted, match=rf"stopped by {signum.name} .*resume to continue.*last\.pt"
    ) as stop:
        make(tmp_path, sending(step, signum=signum)).fit()
    assert stop.value.signum == signum
    assert signal.getsignal(signum) == before
    saved = checkpoint.load(tmp_path / "last.pt")
    assert (saved["epoch"], saved["batch"]) == (epoch, batch)

    # A fresh model of another seed, and another state of the generator: nothing may come from there.
    make(tmp_path, seed=99, resume=True).fit()
    assert_same_run(tmp_path, uninterrupted)


def test_a_signal_during_validation_is_not_lost(tmp_path, uninterrupted, monkeypatch):
    real, calls = trainer_module.evaluate, []

    def evaluate(model, loader, attack):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return real(model, loader, attack)

    monkeypatch.setattr(trainer_module, "evaluate", evaluate)
    with pytest.raises(Interrupted):
        make(tmp_path).fit()
    saved = checkpoint.load(tmp_path / "last.pt")
    assert (saved["epoch"], saved["batch"]) == (1, BATCHES)
    make(tmp_path, resume=True).fit()
    assert_same_run(tmp_path, uninterrupted)


def test_a_signal_while_an_epoch_is_saved_stops_at_its_end(tmp_path, uninterrupted, monkeypatch):
    real = checkpoint.save

    def save(path, payload):
        if payload["epoch"] == 2 and path.name == "last.pt":
            monkeypatch.undo()
            signal.raise_signal(signal.SIGINT)
        real(path, payload)

    monkeypatch.setattr(checkpoint, "save", save)
    with pytest.raises(Interrupted, match="after epoch 2 of 3"):
        make(tmp_path).fit()
    make(tmp_path, resume=True).fit()
    assert_same_run(tmp_path, uninterrupted)


def test_stopped_again_and_again(tmp_path, uninterrupted):
    for _ in range(3):
        with pytest.raises(Interrupted):
            make(tmp_path, sending(4), resume=True).fit()
    make(tmp_path, resume=True).fit()
    assert_same_run(tmp_path, uninterrupted)


def test_an_interrupted_trainer_can_go_on_itself(tmp_path, uninterrupted):
    trainer = make(tmp_path, sending(4))
    with pytest.raises(Interrupted):
        trainer.fit()
    torch.rand(5)
    trainer.fit()
    assert_same_run(tmp_path, uninterrupted)


def test_a_second_signal_acts_at_once(tmp_path):
    with pytest.raises(KeyboardInterrupt) as stop:
        make(tmp_path, sending(4, 4)).fit()
    assert not isinstance(stop.value, Interrupted)
    assert not (tmp_path / "last.pt").exists()


def test_an_ignored_signal_stays_ignored(tmp_path, uninterrupted):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        make(tmp_path, sending(4)).fit()
    finally:
        signal.signal(signal.SIGINT, before)
    assert_same_run(tmp_path, uninterrupted)


def test_trains_in_another_thread(tmp_path, uninterrupted):
    thread = threading.Thread(target=make(tmp_path).fit)
    thread.start()
    thread.join()
    assert_same_run(tmp_path, uninterrupted)


def test_a_run_killed_after_a_timed_checkpoint_continues_from_it(tmp_path, uninterrupted):
    class Killed(Exception):
        pass

    class Dying(FastBAT):
        steps = 0

        def step(self, x, y):
            self.steps += 1
            if self.steps == BATCHES + 4:
                raise Killed
            return super().step(x, y)

    Dying.__name__ = "FastBAT"
    with pytest.raises(Killed):
        make(tmp_path, Dying, checkpoint_minutes=1e-9).fit()
    saved = checkpoint.load(tmp_path / "last.pt")
    assert (saved["epoch"], saved["batch"]) == (1, 3)
    make(tmp_path, resume=True).fit()
    assert_same_run(tmp_path, uninterrupted)


def test_metrics_go_back_to_the_checkpoint(tmp_path, uninterrupted):
    with pytest.raises(Interrupted):
        make(tmp_path, sending(BATCHES + 1)).fit()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 2}\n{"epo')  # as if killed later, without a checkpoint
    make(tmp_path, resume=True).fit()
    assert metrics(tmp_path) == metrics(uninterrupted)


def test_a_complete_run_says_so_and_does_nothing(tmp_path, uninterrupted, monkeypatch, capsys):
    make(tmp_path).fit()
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    monkeypatch.setattr(trainer_module, "evaluate", None)
    monkeypatch.setattr(FastBAT, "step", None)
    history = make(tmp_path, resume=True).fit()
    assert "complete, all 3 epochs are done" in capsys.readouterr().err
    assert [record["epoch"] for record in history] == [1, 2, 3]
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_resume_starts_a_run_where_there_is_none(tmp_path, uninterrupted):
    make(tmp_path, resume=True).fit()
    assert_same_run(tmp_path, uninterrupted)


# --- Rules of two levels ------------------------------------------------------------------------------------


def make_bip(run_dir, mode="paper", rule=BiP, **options):
    method = BiPSettings(density=0.3, mode=mode, score_lr=2.0)
    return make(run_dir, rule, method, options.pop("settings", SETTINGS), width=4, **options)


def test_the_second_batch_is_of_the_same_images_in_another_order(tmp_path):
    seen = []

    class Watching(BiP):
        def step(self, lower, upper):
            seen.append((lower, upper))
            return super().step(lower, upper)

    settings = replace(SETTINGS, epochs=2, augment=False)
    make_bip(tmp_path, rule=Watching, settings=settings).fit()
    assert len(seen) == 2 * BATCHES
    train = {image.numpy().tobytes() for image in (SPLITS.train.images.float() / 255)}
    images = [torch.cat([pair[level][0] for pair in seen]) for level in (0, 1)]
    for level in images:
        assert {image.numpy().tobytes() for image in level} <= train
    for lower, upper in seen:
        assert not torch.equal(lower[0], upper[0])
    assert not torch.equal(images[1][: 16 * BATCHES], images[1][16 * BATCHES :])  # a new order each epoch


def test_the_scores_rate_falls_at_a_half_and_at_three_quarters(tmp_path):
    rates = []

    class Watching(BiP):
        def step(self, lower, upper):
            rates.append(self.score_lr)
            return super().step(lower, upper)

    make_bip(tmp_path, rule=Watching, settings=replace(SETTINGS, epochs=4)).fit()
    half, quarter = 2 * BATCHES, BATCHES
    assert rates == pytest.approx([2.0] * half + [0.2] * quarter + [0.02] * quarter)


@pytest.mark.parametrize("mode", ["paper", "released"])
@pytest.mark.parametrize("step", [2, BATCHES, 2 * BATCHES + 1])
def test_a_resumed_bip_has_the_same_bits(tmp_path, mode, step):
    class Stopping(BiP):
        steps = 0

        def step(self, lower, upper):
            self.steps += 1
            if self.steps == step:
                signal.raise_signal(signal.SIGINT)
            return super().step(lower, upper)

    Stopping.__name__ = "BiP"
    make_bip(tmp_path / "whole", mode).fit()
    with pytest.raises(Interrupted):
        make_bip(tmp_path / "parts", mode, Stopping).fit()
    make_bip(tmp_path / "parts", mode, resume=True, seed=99).fit()
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    saved = state(tmp_path / "whole")
    assert any(name.endswith("mask_words") for name in saved["model"])
    assert saved["rule"]["momentum"].keys() == masks_of(make_bip(tmp_path / "new").rule.model).keys()
    assert any(record["changed"] > 0 for record in saved["history"])


def test_bip_in_channels_last_runs_and_resumes(tmp_path):
    settings = replace(SETTINGS, channels_last=True, epochs=1)
    for mode in ("paper", "released"):
        make_bip(tmp_path / mode, mode, settings=settings).fit()
        trainer = make_bip(tmp_path / mode, mode, settings=settings, resume=True)
        assert trainer.complete
        saved, rule = state(tmp_path / mode), trainer.rule
        assert all(torch.equal(t, saved["model"][name]) for name, t in rule.model.state_dict().items())
        assert all(torch.equal(s, saved["rule"]["scores"].get(name, s)) for name, s in rule.scores.items())


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


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"epochs": 0}, ValueError, "epochs must be at least 1, got 0"),
        ({"epochs": 1.5}, TypeError, "epochs must be an int, got 1.5"),
        ({"val_steps": -1}, ValueError, "val_steps must be at least 0, got -1"),
        ({"batch_size": True}, TypeError, "batch_size must be an int, got True"),
        ({"lr": 0.0}, ValueError, "lr must be positive and finite, got 0.0"),
        ({"lr": math.nan}, ValueError, "lr must be positive and finite, got nan"),
        ({"schedule": "cos"}, ValueError, "schedule must be one of 'cyclic'"),
        ({"momentum": 1.0}, ValueError, "momentum must be in"),
        ({"momentum": 0.05, "cycle_momentum": True}, ValueError, r"momentum must be in \[0.1, 1\), got 0.05"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay must be at least 0"),
        ({"eps": 0.0}, ValueError, r"eps must be in \(0, 1\], got 0.0"),
        ({"seed": -1}, ValueError, "seed must be in"),
    ],
)
def test_wrong_settings_are_named(change, error, message):
    with pytest.raises(error, match=message):
        TrainSettings(**change)


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
