"""Networks and attacks of others that write into what they are given: nobody else's numbers change."""

import pytest
import torch
from attack_twins import images, small_net
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from blokern.attack import APGD, PGD, evaluate
from blokern.bilevel import PGDAT, FastAT, FastATSettings, PGDATSettings


class Halved(nn.Module):
    """net(x / 2), x halved as `halve` does it."""

    def __init__(self, net, halve):
        super().__init__()
        self.net, self.halve = net, halve

    def forward(self, x):
        return self.net(self.halve(x))


def without_gradient(x):
    with torch.no_grad():
        return x.mul_(0.5)


def aside(x):
    x.data.mul_(0.5)
    return x


# The gradient that a write without one leaves is that at x / 2: its sign is the same.
WRITES = {"in place": lambda x: x.mul_(0.5), "without gradient": without_gradient, "data": aside}


def of_data(kind):
    net = small_net(dtype=torch.float32)
    twin = Halved(net, lambda x: x * 0.5).eval()
    x, y = images(twin)
    return Halved(net, WRITES[kind]).eval(), twin, x, y


@pytest.mark.parametrize("kind", WRITES)
@pytest.mark.parametrize("early_stop", [False, True])
@pytest.mark.parametrize("surrogate", [None, "fp32"])
@pytest.mark.filterwarnings("ignore:surrogate")
def test_an_attack_on_a_network_that_writes_into_its_input(kind, early_stop, surrogate):
    model, twin, x, y = of_data(kind)
    before = x.clone()

    def attacked(network):
        own = torch.Generator().manual_seed(0)
        return PGD(network, 0.05, steps=5, early_stop=early_stop, surrogate=surrogate, generator=own)(x, y)

    assert torch.equal(attacked(model), attacked(twin))
    assert torch.equal(x, before)


@pytest.mark.parametrize("kind", WRITES)
def test_evaluation_of_a_network_that_writes_into_its_input(kind):
    model, twin, x, y = of_data(kind)
    before = x.clone()
    ours, right = (
        evaluate(n, [(x, y)], {"pgd": PGD(n, 0.05, random_start=False), "clean": lambda x, y: x})
        for n in (model, twin)
    )
    assert (ours.clean_accuracy, ours.per_attack) == (right.clean_accuracy, right.per_attack)
    assert right.robust_accuracy < right.clean_accuracy == 1
    assert torch.equal(x, before)


@pytest.mark.parametrize(("rule", "settings"), [(FastAT, FastATSettings), (PGDAT, PGDATSettings)])
@pytest.mark.parametrize("kind", WRITES)
def test_a_step_of_a_rule_on_a_network_that_writes_into_its_input(rule, settings, kind):
    weights = []
    for which in (0, 1):
        torch.manual_seed(0)
        model, x, y = (made := of_data(kind))[which], *made[2:]
        before = x.clone()
        torch.manual_seed(1)
        rule(model, torch.optim.SGD(model.parameters(), 0.1), settings(eps=0.05)).step(x, y)
        assert torch.equal(x, before)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*weights)


def test_an_attack_that_writes_into_its_images_is_caught_outside_the_ball():
    net = small_net()
    x, y = images(net, 8)
    with pytest.raises(ValueError, match="left the linf ball"):
        evaluate(net, [(x, y)], {"darker": lambda x, y: x.mul_(0.5)}, eps=8 / 255)


def test_an_attack_that_writes_into_its_images_leaves_them_to_the_next():
    net = small_net()
    x, y = images(net, 8)
    result = evaluate(net, [(x, y)], {"black": lambda x, y: x.zero_(), "none": lambda x, y: x})
    assert result.per_attack["none"] == 1


class Endless(IterableDataset):
    def __init__(self, *pair):
        self.pairs = list(zip(*pair, strict=True))

    def __iter__(self):
        return iter(self.pairs)


def test_a_data_loader_over_a_data_set_without_length():
    net, told = small_net(), []
    x, y = images(net, 8)
    loader = DataLoader(Endless(x, y), batch_size=4)
    result = evaluate(net, loader, APGD(net, 0.01, steps=2), progress=lambda *p: told.append(p))
    assert (result.samples, told) == (8, [(1, None), (2, None)])


@pytest.mark.parametrize("loader", [None, 3])
def test_what_is_no_loader_is_named(loader):
    with pytest.raises(TypeError, match="loader must give batches"):
        evaluate(small_net(), loader)
