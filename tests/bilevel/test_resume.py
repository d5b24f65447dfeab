"""A run that was stopped, by whatever and wherever, ends with the bits of one that was not."""

import signal
import threading

import pytest
import torch
from runs import BATCHES, assert_same_run, make, metrics, sending

from blokern.bilevel import FastBAT, Interrupted, checkpoint
from blokern.bilevel import trainer as trainer_module
from blokern.bilevel.saver import Saver

pytestmark = pytest.mark.usefixtures("no_pictures")


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

    def evaluate(model, loader, attack, **options):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return real(model, loader, attack, **options)

    monkeypatch.setattr(trainer_module, "evaluate", evaluate)
    with pytest.raises(Interrupted):
        make(tmp_path).fit()
    saved = checkpoint.load(tmp_path / "last.pt")
    assert (saved["epoch"], saved["batch"]) == (1, BATCHES)
    make(tmp_path, resume=True).fit()
    assert_same_run(tmp_path, uninterrupted)


def test_a_signal_while_an_epoch_is_saved_stops_at_its_end(tmp_path, uninterrupted, monkeypatch):
    real = Saver.save

    def save(saver, name, payload):
        if payload["epoch"] == 2 and name == "last.pt":
            monkeypatch.undo()
            signal.raise_signal(signal.SIGINT)
        real(saver, name, payload)

    monkeypatch.setattr(Saver, "save", save)
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


def test_a_checkpoint_that_no_run_continues_from_names_its_field(tmp_path):
    with pytest.raises(Interrupted):
        make(tmp_path, sending(BATCHES + 3)).fit()
    sound = checkpoint.load(tmp_path / "last.pt")
    fields = ("rng", "epoch", "batch", "totals", "best", "history", "optimizer", "model")
    wrong = {
        "epoch": (9, -1, True),
        "batch": (BATCHES + 1, -1),
        "history": ([], [3]),
        "totals": ({},),
        "rng": ({},),
    }
    for field in fields:
        for value in ("missing", "a string", None, *wrong.get(field, ())):
            payload = {name: part for name, part in sound.items() if name != field}
            checkpoint.save(tmp_path / "last.pt", payload if value == "missing" else payload | {field: value})
            with pytest.raises(checkpoint.CheckpointError, match=rf"last\.pt .*{field}"):
                make(tmp_path, resume=True).fit()


def test_weights_that_diverged_are_not_continued_from(tmp_path):
    with pytest.raises(Interrupted):
        make(tmp_path, sending(BATCHES + 3)).fit()
    payload = checkpoint.load(tmp_path / "last.pt")
    next(weight for weight in payload["model"].values() if weight.is_floating_point()).fill_(float("nan"))
    checkpoint.save(tmp_path / "last.pt", payload)
    with pytest.raises(FloatingPointError, match=r"last\.pt holds a network that diverged"):
        make(tmp_path, resume=True).fit()
