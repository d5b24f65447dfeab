"""Models that answer differently each time, or by the company that a sample is in: how they are found and judged."""

import random
import warnings

import numpy as np
import pytest
import torch
from attack_twins import images, small_net
from torch import nn

from blokern.attack import APGD, PGD, evaluate
from blokern.attack.losses import correct
from blokern.attack.manner import observe


class Around(nn.Module):
    """f(net, x), with a net."""

    def __init__(self, net, f):
        super().__init__()
        self.net, self.f, self.calls = net, f, 0

    def forward(self, x):
        self.calls += 1
        return self.f(self, x)


class AlwaysDropping(nn.Dropout):
    def train(self, mode=True):
        return super().train(True)


class AlwaysBatchStatistics(nn.BatchNorm2d):
    def train(self, mode=True):
        return super().train(True)


OWN = torch.Generator()
RANDOM = {
    "input noise": lambda m, x: m.net(x + 0.05 * torch.randn_like(x)),
    "logit noise": lambda m, x: m.net(x) + 0.1 * torch.randn(len(x), 6, dtype=x.dtype),
    "own generator": lambda m, x: m.net(x + 0.05 * torch.randn(x.shape, generator=OWN, dtype=x.dtype)),
    "one coin a call": lambda m, x: m.net(x.flip(3) if torch.rand(()) < 0.5 else x),
    "a Python coin": lambda m, x: m.net(x.flip(3) if random.random() < 0.5 else x),
    "a NumPy coin": lambda m, x: m.net(x.flip(3) if np.random.random() < 0.5 else x),  # noqa: NPY002  # as others do
    "a counter": lambda m, x: m.net(x + 0.01 * m.calls),
}
STEADY = {
    "plain": lambda m, x: m.net(x),
    "scaled": lambda m, x: 1e-20 * m.net(x),
    "draws for nothing": lambda m, x: m.net(x) + 0 * torch.rand(()),
    "NaN": lambda m, x: m.net(x) * torch.where(x[:, :1, 0, 0] < 0.5, torch.nan, 1.0),
    "masked": lambda m, x: m.net(x).index_fill(1, torch.tensor([2]), -torch.inf),
}


@pytest.mark.parametrize("f", RANDOM.values(), ids=RANDOM)
def test_random_models_are_seen(f):
    net = small_net()
    x, _ = images(net)
    with torch.no_grad():
        assert all(observe(Around(net, f), x).random for _ in range(5))


@pytest.mark.parametrize("f", STEADY.values(), ids=STEADY)
def test_steady_models_are_not(f):
    net = small_net()
    for n in (1, 2, 24):
        with torch.no_grad():
            assert observe(Around(net, f), images(net)[0][:n]).steady


def test_dropout_that_stays_on_and_batch_statistics_that_do():
    net = small_net()
    x, _ = images(net)
    for place, layer in ((1, AlwaysBatchStatistics(8).double()), (6, AlwaysDropping(0.1))):
        changed = small_net()
        changed[place] = layer
        changed.eval()
        before = {name: t.clone() for name, t in changed.state_dict().items()}
        with torch.no_grad():
            manner = observe(changed, x)
        assert (manner.random, manner.mixes) == (place == 6, place == 1)
        for name, value in changed.state_dict().items():
            assert torch.equal(value, before[name]), "a question has moved the model's buffers"


def noisy(net, size=0.05):
    return Around(net, lambda m, x: m.net(x + size * torch.randn_like(x)))


def test_early_stop_finds_no_more_than_the_full_attack():
    """One lucky draw must not end a sample that is then judged by another draw."""
    net = small_net()
    x, y = images(net, n=64)
    model, eps = noisy(net), 3 / 255
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="evaluate: the model answers the same images differently each time"):
        found = evaluate(model, [(x, y)], eps=eps)
    with torch.no_grad():
        x_adv = PGD(model, eps, eps / 4, 50)(x, y)
        single = torch.stack([correct(model(x_adv), y).double().mean() for _ in range(50)]).mean()
    assert found.robust_accuracy <= float(single) + 0.03
    assert 0 < found.robust_accuracy < found.clean_accuracy < 1
    assert found.robust_accuracy * 640 == pytest.approx(round(found.robust_accuracy * 640)), (
        "means over 10 draws"
    )


@pytest.mark.parametrize("kind", [PGD, APGD])
def test_attacks_run_to_their_end_and_say_so(kind):
    net = small_net()
    x, y = images(net, n=8)
    model = noisy(net)
    attack = kind(model, 3 / 255, steps=5, restarts=2, early_stop=True)
    with pytest.warns(UserWarning, match=r"nobody leaves early, and verdicts are means over 10 answers"):
        attack(x, (y + 1) % 6)  # all fooled at once
    everybody = [len(x)] * (2 * 5 + 2 * 10 * (1 if kind is PGD else 2))
    sizes = []
    model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attack(x, (y + 1) % 6)
    assert [size for size in sizes if size > 4] == everybody


def test_eot_follows_the_mean_gradient():
    net = small_net()
    x, y = images(net, n=4)
    eps, count, noises = 0.1, 7, []

    def answer(m, x):
        noises.append(torch.randn(x.shape, dtype=x.dtype))
        return m.net(x + 0.3 * noises[-1])

    x_adv = PGD(Around(net, answer), eps, 0.05, 1, "l2", random_start=False, eot=count)(x, y)
    at = x.clone().requires_grad_()
    loss = sum(nn.functional.cross_entropy(net(at + 0.3 * noise), y, reduction="sum") for noise in noises)
    (g,) = torch.autograd.grad(loss / count, at)
    step = g / g.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    assert len(noises) == count
    torch.testing.assert_close(x_adv, (x + 0.05 * step).clamp(0, 1))


def test_eot_of_a_steady_model_changes_nothing():
    net = small_net()
    x, y = images(net)
    runs = [
        kind(net, steps=6, eot=eot, early_stop=stop, generator=torch.Generator().manual_seed(0))(x, y)
        for kind in (PGD, APGD)
        for stop in (False, True)
        for eot in (1, 3)
    ]
    for once, thrice in zip(runs[::2], runs[1::2], strict=True):
        torch.testing.assert_close(once, thrice)


def test_batch_statistics_keep_batches_whole():
    net = small_net()
    net[1] = AlwaysBatchStatistics(8).double()
    net.eval()
    x, _ = images(net)
    y = net(x).argmax(1)
    with pytest.warns(UserWarning, match="depends on the others in its batch"):
        PGD(net, steps=3, early_stop=True)(x, y)


def test_a_steady_model_is_not_warned_of_and_costs_four_answers():
    net = small_net()
    x, y = images(net, n=32)
    sizes = []
    net.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(net, [(x, y)] * 3, PGD(net, steps=5, early_stop=True))
        asked = [size for size in sizes if size <= 4]
        assert asked[:4] == [4, 4, 4, 4]
        assert sizes[4] == 32
        evaluate(net, [(x, y)], {})  # nobody asks where nobody attacks
