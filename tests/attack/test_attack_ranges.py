"""No default is of [0, 1] alone: an attack on scaled images is the scaled attack, with the same draws."""

import pytest
import torch
from attack_twins import images, small_net
from torch import nn

from blokern import attack
from blokern.attack import APGD, FGSM, PGD, evaluate

RANGES = [(0.0, 255.0), (-1.0, 1.0), (-2.5, 0.5)]
ATTACKS = [
    kind
    for name in attack.__all__
    if isinstance(kind := getattr(attack, name), type) and issubclass(kind, attack.Attack)
    if kind is not attack.Attack
]


class Rescaled(nn.Module):
    """A network of [0, 1] for images in [low, high]."""

    def __init__(self, net, low, high):
        super().__init__()
        self.net, self.low, self.high = net, low, high

    def forward(self, x):
        return self.net((x - self.low) / (self.high - self.low))


def seeded():
    return torch.Generator().manual_seed(0)


def test_every_attack_is_here():
    assert {FGSM, PGD, APGD, attack.NFGSM} == set(ATTACKS)


@pytest.mark.parametrize("kind", ATTACKS)
@pytest.mark.parametrize(("low", "high"), RANGES)
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_attacks_follow_the_images_range(kind, low, high, norm):
    net = small_net()
    x, y = images(net, n=12)
    span = high - low
    settings = {} if norm == "linf" else {"norm": norm, "eps": 0.5}
    scaled = {} if norm == "linf" else {"norm": norm, "eps": 0.5 * span}
    here = kind(net, generator=seeded(), **settings)(x, y)
    box = {"clip_min": low, "clip_max": high}
    there = kind(Rescaled(net, low, high), generator=seeded(), **scaled, **box)(low + span * x, y)
    apart = ((there - low) / span - here).abs() > 1e-9
    # The L1 walk follows the largest entries: which of two equal ones is for rounding to say.
    assert apart.double().mean() <= (0.01 if norm == "l1" else 0.0)
    assert (here != x).any()


@pytest.mark.parametrize(("low", "high"), RANGES)
def test_evaluations_follow_the_images_range(low, high):
    net = small_net()
    x, y = images(net, n=40)
    here = evaluate(net, [(x, y)], generator=seeded())
    there = evaluate(
        Rescaled(net, low, high),
        [(low + (high - low) * x, y)],
        clip_min=low,
        clip_max=high,
        generator=seeded(),
    )
    assert 0 < here.robust_accuracy < 1
    assert there.robust_accuracy == here.robust_accuracy


def test_defaults_are_those_of_the_papers():
    net = small_net()
    assert (PGD(net).eps, PGD(net).step_size) == (8 / 255, 2 / 255)
    assert (FGSM(net).eps, FGSM(net).step_size) == (8 / 255, 8 / 255)
    assert APGD(net).step_size == 16 / 255
    assert PGD(net, 0.5, norm="l2").step_size == 0.125


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_a_linf_radius_is_none_of_another_norm(norm):
    net = small_net()
    x, y = images(net, n=4)
    for call in (
        lambda: PGD(net, norm=norm),
        lambda: APGD(net, norm=norm),
        lambda: evaluate(net, [(x, y)], norm=norm),
    ):
        with pytest.raises(ValueError, match=f"eps must be given for norm='{norm}'"):
            call()


def test_an_infinite_range_has_no_share():
    net = small_net()
    with pytest.raises(ValueError, match="eps must be given where the images' range is not finite"):
        PGD(net, clip_max=float("inf"))
    with pytest.raises(ValueError, match="norm='l1' starts from noise as wide as the images' range"):
        APGD(net, 1.0, norm="l1", clip_max=float("inf"))
    x, y = images(net, n=4)
    assert (PGD(net, 0.1, clip_max=float("inf"))(x, y) - x).abs().max() <= 0.1 + 1e-12


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), *RANGES])
def test_the_tolerance_is_of_the_range(low, high):
    net = small_net(dtype=torch.float32)
    x, y = images(net, n=8)
    span = high - low
    model, box = Rescaled(net, low, high), {"clip_min": low, "clip_max": high}
    x = low + span * x
    x[0, 0, 0, :3] = torch.tensor([low - 5e-5 * span, high + 5e-5 * span, high])
    x_adv = PGD(model, **box)(x, y)
    assert low <= x_adv.min()
    assert x_adv.max() <= high
    assert (x_adv - x).abs().max() <= 8 / 255 * span + 1e-4 * span
    evaluate(model, [(x, y)], **box)
    x[0, 0, 0, 0] = low - 3e-4 * span
    for call in (lambda: PGD(model, **box)(x, y), lambda: evaluate(model, [(x, y)], **box)):
        with pytest.raises(ValueError, match="x must lie in"):
            call()


def test_messages_have_the_digits_that_tell_why():
    net = small_net(dtype=torch.float32)
    x, y = images(net, n=4)
    x[0, 0, 0, 0] = 1.0001101
    with pytest.raises(
        ValueError, match=r"= \[0.0, 1.0\], to 0.0001, got values in \[[\d.e-]+, 1.000110\d+\]"
    ):
        FGSM(net)(x, y)
    with pytest.raises(ValueError, match=r"radius 0.031372549: distance 0.0315\d+"):
        evaluate(net, [(x.clamp(0.1, 0.9), y)], lambda x, y: x + 8.04 / 255, eps=8 / 255)


@pytest.mark.parametrize("value", [torch.zeros(3, 1, 1), torch.tensor(0.0), [0.0, 0.0], "0"])
def test_per_channel_boxes_are_refused(value):
    net = small_net()
    x, y = images(net, n=4)
    with pytest.raises(TypeError, match="clip_min must be a float, the same for all channels, got"):
        PGD(net, clip_min=value)
    with pytest.raises(
        TypeError, match=r"clip_max must be a float.*normalise their channels inside the model"
    ):
        evaluate(net, [(x, y)], clip_max=value)
