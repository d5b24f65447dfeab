"""early_stop's runs: they end where they circle, follow one another, and find what full runs find."""

import pytest
import torch
from attack_twins import images, seen_by, small_net
from torch import nn

from blokern.attack import PGD
from blokern.attack.losses import correct
from blokern.attack.pgd import _fingerprints


class Full(PGD):
    """Whose runs do not end before their last step."""

    def _circles(self, runs, look):
        return torch.zeros_like(look.fooled)


def flat_net(dtype=torch.float64):
    """A linear network, whose gradient has the same signs everywhere."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 2)).to(dtype)
    net[1].weight.data.mul_(0.1)
    return net.eval()


@pytest.mark.parametrize(("make", "eps"), [(small_net, 5 / 255), (flat_net, 20 / 255)])
def test_circling_runs_end_and_find_what_full_runs_find(make, eps):
    net = make()
    x, y = images(net, n=40)
    looks, held = [], []
    for kind in (PGD, Full):
        attack = kind(net, eps, eps / 5, 60, early_stop=True, generator=torch.Generator().manual_seed(0))
        out = []
        looks.append(sum(map(len, seen_by(net, lambda attack=attack, out=out: out.append(attack(x, y))))))
        held.append(correct(net(out[0]), y))
    assert 0 < held[0].sum() < len(x)
    assert torch.equal(*held)
    assert looks[0] < 0.8 * looks[1]


def test_a_linear_network_s_runs_end_in_the_corner():
    net = flat_net()
    x, y = images(net, n=8)
    eps = 1e-4  # nobody is fooled
    inputs = seen_by(net, lambda: PGD(net, eps, eps / 2, 50, restarts=3, early_stop=True)(x, y))
    per_sample = sum(map(len, inputs)) / len(x)
    assert 3 * 3 <= per_sample <= 3 * 8  # start, two to four steps, the corner again


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_every_sample_gets_all_its_runs(norm):
    net = small_net()
    x, y = images(net, n=6)
    starts = []

    class Counting(Full):
        def _start(self, batch):
            starts.extend(batch.index.tolist())
            return super()._start(batch)

    eps = 1e-4
    inputs = seen_by(
        net, lambda: Counting(net, eps, eps / 4, 4, norm, restarts=3, early_stop=True)(x, y), early_stop=True
    )
    assert sorted(starts) == sorted([*range(6)] * 3)
    assert len(inputs) == 3 * 5  # a look at each start, and after each of four steps


def test_a_fooled_sample_starts_no_other_run():
    net = small_net()
    x, y = images(net, n=6)
    inputs = seen_by(
        net, lambda: PGD(net, 1e-4, 1e-4, 5, restarts=3, early_stop=True)(x, (y + 1) % 6), early_stop=True
    )
    assert [len(i) for i in inputs] == [6]


def test_a_model_that_draws_does_not_circle():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = flat_net()

        def forward(self, x):
            logits = self.net(x)
            return logits + 0.1 * torch.randn_like(logits)

    net = Noisy()
    with torch.no_grad():
        net.net[1].weight.mul_(0.01)
        net.net[1].bias.copy_(torch.tensor([3.0, 0.0]))  # out of the noise's reach
    x, y = torch.rand(4, 3, 8, 8, dtype=torch.float64), torch.zeros(4, dtype=torch.int64)
    with pytest.warns(UserWarning, match="answers the same images differently"):
        inputs = seen_by(net, lambda: PGD(net, 1e-4, 1e-4, 30, early_stop=True)(x, y))
    assert [len(i) for i in inputs] == [4] * (
        3 + 30 + 10
    )  # three questions, all steps, and the verdict's answers


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_fingerprints_tell_points_apart(dtype):
    x = torch.rand(64, 3, 5, 5).to(dtype)
    near = x.clone()
    near[:, 1, 2, 3] = near[:, 1, 2, 3].float().nextafter(torch.tensor(2.0)).to(dtype) + 0.01
    here = _fingerprints(x)
    assert here.shape == (64,)
    assert here.dtype == torch.int64
    assert torch.equal(here, _fingerprints(x.contiguous(memory_format=torch.channels_last)))
    assert torch.equal(here[5:9], _fingerprints(x[5:9]))
    assert not (here == _fingerprints(near)).any()
    assert len(set(here.tolist())) == len(torch.unique(x.flatten(1), dim=0))
