"""Gradients that are zero are counted, and there are losses that have one."""

import warnings

import pytest
import torch
from attack_twins import images, small_net
from torch import nn

from blokern.attack import APGD, FGSM, NFGSM, PGD, cross_entropy, evaluate, margin
from blokern.attack.losses import correct


class Scaled(nn.Module):
    def __init__(self, net, factor):
        super().__init__()
        self.net, self.factor = net, factor

    def forward(self, x):
        return self.factor * self.net(x)


class Rounded(Scaled):
    """Sees 16 levels; its gradient is zero everywhere."""

    def forward(self, x):
        return self.net((15 * x).round() / 15)


ATTACKS = {
    "fgsm": lambda net, **o: FGSM(net, **o),
    "nfgsm": lambda net, **o: NFGSM(net, **o),
    "pgd": lambda net, **o: PGD(net, steps=4, **o),
    "pgd-restarts": lambda net, **o: PGD(net, steps=4, restarts=2, **o),
    "pgd-early-stop": lambda net, **o: PGD(net, steps=4, restarts=2, early_stop=True, **o),
    "apgd": lambda net, **o: APGD(net, steps=6, **o),
    "apgd-early-stop": lambda net, **o: APGD(net, steps=6, early_stop=True, **o),
    "pgd-targets": lambda net, **o: PGD(net, steps=4, target_classes=2, early_stop=True, **o),
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_attacks_count_who_cannot_be_moved(attack, norm):
    net = Rounded(small_net(), 1)
    x, y = images(net, n=8, wrong=0.25)  # two are fooled as they are: they need no gradient
    with pytest.warns(UserWarning, match=r"input gradient of 6 of 8 samples is exactly zero") as told:
        attack(net, eps=1e-7, norm=norm)(x, y)
    assert len(told) == 1
    assert told[0].filename == __file__


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_those_with_gradients_are_not_counted(attack):
    net = small_net()
    x, y = images(net, n=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attack(net)(x, y)


def test_a_nan_gradient_moves_nobody_either():
    class Kinked(Scaled):
        def forward(self, x):
            return self.net(x) + (0 * x).sqrt().sum((1, 2, 3)).unsqueeze(1)

    net = small_net()
    x, y = images(net, n=8)
    with pytest.warns(UserWarning, match="8 of 8 samples is exactly zero, or NaN"):
        PGD(Kinked(net, 1), 1e-6)(x, y)


def test_an_evaluation_counts_over_all_its_batches():
    net = Rounded(small_net(dtype=torch.float32), 1)
    x, y = images(net, n=48, wrong=0.25)
    with pytest.warns(UserWarning, match=r"^rounded: the input gradient of 36 of 48") as told:
        evaluate(net, [(x[:20], y[:20]), (x[20:], y[20:])], {"rounded": PGD(net, 1e-7, steps=3)})
    assert len(told) == 1


@pytest.mark.parametrize("loss", ["dlr", "margin", "cw", margin])
def test_scaled_logits_hide_from_ce_alone(loss):
    net = small_net(dtype=torch.float32)
    x, y = images(net, n=32)
    plain = evaluate(net, [(x, y)], eps=4 / 255, loss=loss)
    scaled = Scaled(net, 1e4)
    with pytest.warns(UserWarning, match="try loss='dlr' or 'margin'"):
        hidden = evaluate(scaled, [(x, y)], eps=4 / 255)
    found = evaluate(scaled, [(x, y)], eps=4 / 255, loss=loss)
    assert found.robust_accuracy == pytest.approx(plain.robust_accuracy, abs=0.04)
    assert hidden.robust_accuracy > found.robust_accuracy + 0.2
    name = loss.upper() if isinstance(loss, str) else "margin"
    assert list(found.per_attack) == [f"PGD-{name}-50-10"]


@pytest.mark.parametrize("kind", [PGD, APGD])
@pytest.mark.parametrize("early_stop", [False, True])
def test_targets_of_pgd_and_apgd(kind, early_stop):
    net = small_net()
    x, y = images(net, n=48)
    eps, generator = 3 / 255, torch.Generator().manual_seed(0)
    found = []
    for how in ({}, {"loss": "dlr", "target_classes": 5}, {"loss": "margin", "target_classes": 5}):
        attack = kind(net, eps, steps=10, early_stop=early_stop, generator=generator, **how)
        x_adv = attack(x, y)
        assert (x_adv - x).abs().max() <= eps + 1e-12
        found.append(int((~correct(net(x_adv), y)).sum()))
    assert 0 < found[0] < 48
    assert min(found[1:]) >= found[0] - 1
    assert attack.name == f"{kind.__name__}-T5-MARGIN-10"
    assert cross_entropy(net(x_adv), y).mean() > cross_entropy(net(x), y).mean()


def test_an_evaluation_takes_targets():
    net = small_net()
    x, y = images(net, n=24)
    found = evaluate(net, [(x, y)], eps=3 / 255, loss="dlr", target_classes=3)
    assert list(found.per_attack) == ["PGD-T3-DLR-50-10"]
    with pytest.raises(ValueError, match="loss, target_classes: of the default attack, but attack is given"):
        evaluate(net, [(x, y)], PGD(net), loss="dlr", target_classes=3)
    with pytest.raises(ValueError, match="target_classes=None, got 2"):
        PGD(net, cuda_graph=True, target_classes=2)
    with pytest.raises(ValueError, match="less than the model's 6 classes, got 6"):
        PGD(net, target_classes=6)(x, y)
    with pytest.raises(ValueError, match="targeted=False"):
        PGD(net, target_classes=3, targeted=True)
