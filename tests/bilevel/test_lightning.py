"""Rules under Lightning's Trainer do what they do in a plain loop."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader

from blokern.attack import PGD, evaluate
from blokern.bilevel import BiP, BiPSettings, FastBAT, FastBATSettings

lightning = pytest.importorskip("lightning")

from lightning.pytorch.utilities import CombinedLoader  # noqa: E402

from blokern.bilevel.lightning import RuleModule  # noqa: E402

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


@pytest.fixture(autouse=True)
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning|torch.jit|pytree")
        yield


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3)),
    )


def loader(seed: int = 1) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.rand(40, 1, 6, 6, generator=generator), torch.randint(3, (40,), generator=generator)
    x = 0.5 * x + 0.2 * y[:, None, None, None]
    return DataLoader([*zip(x, y, strict=True)], batch_size=10)


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def fast_bat() -> FastBAT:
    model = network()
    return FastBAT(model, sgd(model), FastBATSettings(eps=0.1, step_size=2.0))


def bip() -> BiP:
    model = network()
    return BiP(model, sgd(model), BiPSettings(density=0.4))


def trainer(**options: Any) -> Any:
    quietly = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    quietly |= {"enable_progress_bar": False, "enable_model_summary": False}
    return lightning.Trainer(**quietly | {"max_epochs": 2} | options)


def assert_same(one: nn.Module, other: nn.Module) -> None:
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_a_loop_of_its_own_gives_the_same_bits() -> None:
    plain, wrapped = fast_bat(), fast_bat()
    schedules = [LinearLR(rule.optimizer, 1.0, 0.1, 8) for rule in (plain, wrapped)]
    torch.manual_seed(1)
    for _ in range(2):
        for x, y in loader():
            loss = plain.step(x, y).loss
            schedules[0].step()
    torch.manual_seed(1)
    optimizer = wrapped.optimizer
    fit = trainer()
    fit.fit(RuleModule(wrapped, schedules[1]), loader())
    assert fit.global_step == 8
    assert torch.equal(fit.logged_metrics["loss"], loss)
    assert "free" in fit.logged_metrics
    assert wrapped.optimizer is optimizer
    assert optimizer.param_groups[0]["lr"] == plain.optimizer.param_groups[0]["lr"] == pytest.approx(0.01)
    assert_same(plain.model, wrapped.model)


def test_validation_attacks() -> None:
    rule = fast_bat()
    attack = PGD(rule.model, eps=0.3, step_size=0.15, steps=3, random_start=False)
    fit = trainer(max_epochs=6)
    fit.fit(RuleModule(rule, attack=attack), loader(), loader(2))
    wanted = evaluate(rule.model, loader(2), attack)
    assert fit.logged_metrics["val_accuracy"].item() == pytest.approx(wanted.clean_accuracy)
    assert fit.logged_metrics["val_robust_accuracy"].item() == pytest.approx(wanted.robust_accuracy)
    assert wanted.robust_accuracy < wanted.clean_accuracy
    (found,) = trainer().validate(RuleModule(rule), loader(2), verbose=False)
    assert [*found] == ["val_accuracy"]


def test_two_levels_and_their_rate() -> None:
    plain, wrapped = bip(), bip()
    rates = []
    for epoch in range(2):
        for step, (lower, upper) in enumerate(zip(loader(), loader(2), strict=True)):
            done = (4 * epoch + step) / 8
            plain.score_lr = 0.1 * (1.0 if done < 0.5 else 0.1 if done < 0.75 else 0.01)
            rates.append(plain.score_lr)
            plain.step(lower, upper)
    trainer().fit(RuleModule(wrapped), CombinedLoader([loader(), loader(2)]))
    assert wrapped.score_lr == rates[-1]
    assert_same(plain.model, wrapped.model)


def test_checkpoints_hold_the_scores(tmp_path: Path) -> None:
    def pairs() -> CombinedLoader:
        return CombinedLoader([loader(), loader(2)])

    whole, first, second = bip(), bip(), bip()
    trainer(max_epochs=3).fit(RuleModule(whole), pairs())

    class Stop(lightning.Callback):
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            trainer.should_stop = trainer.current_epoch == 1

    stopped = trainer(max_epochs=3, callbacks=[Stop()])
    stopped.fit(RuleModule(first), pairs())
    stopped.save_checkpoint(tmp_path / "a.ckpt")
    trainer(max_epochs=3).fit(RuleModule(second), pairs(), ckpt_path=tmp_path / "a.ckpt")
    assert_same(whole.model, second.model)
    for name, score in whole.scores.items():
        assert torch.equal(score, second.scores[name])


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = RuleModule(fast_bat())
    monkeypatch.setattr(RuleModule, "trainer", SimpleNamespace(world_size=2))
    with pytest.raises(ValueError, match=r"trainer must have one process, got 2: .* blokern\.distributed"):
        module.on_fit_start()
