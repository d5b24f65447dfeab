import pytest
import torch
from attack_twins import images, small_net

from blokern.attack import PGD, eval_mode, frozen_parameters


def state(net):
    return [p.requires_grad for p in net.parameters()], [m.training for m in net.modules()]


@pytest.fixture
def mixed():
    """Partly frozen, and in train mode but for one BatchNorm."""
    net = small_net().train()
    net[0].weight.requires_grad_(False)
    net[1].eval()
    return net


def test_both_restore_exactly(mixed):
    before = state(mixed)
    with frozen_parameters(mixed):
        assert not any(state(mixed)[0])
        assert state(mixed)[1] == before[1]
    with eval_mode(mixed):
        assert not any(state(mixed)[1])
        assert state(mixed)[0] == before[0]
    assert state(mixed) == before


def test_also_on_exceptions_and_nested(mixed):
    before = state(mixed)
    with pytest.raises(KeyError), frozen_parameters(mixed), eval_mode(mixed), frozen_parameters(mixed):
        raise KeyError
    assert state(mixed) == before


@pytest.mark.parametrize("eval_mode", [True, False])
def test_an_attack_sees_the_mode_it_asked_for_and_restores(mixed, eval_mode):
    before, during = state(mixed), []
    mixed.register_forward_pre_hook(lambda *_: during.append(state(mixed)))
    x, y = images(small_net())
    PGD(mixed, steps=2, eval_mode=eval_mode)(x, y)
    flags = [False] * len(before[1]) if eval_mode else before[1]
    assert during == [([False] * len(before[0]), flags)] * 2
    assert state(mixed) == before


def test_an_attack_that_fails_restores_too(mixed):
    before = state(mixed)

    def explode(logits, y):
        raise RuntimeError("no")

    x, y = images(small_net())
    with pytest.raises(RuntimeError, match="no"):
        PGD(mixed, loss=explode)(x, y)
    assert state(mixed) == before


def test_eval_mode_leaves_running_statistics_alone(mixed):
    mixed.train()
    mean = mixed[1].running_mean.clone()
    x, y = images(small_net())
    PGD(mixed, steps=2)(x, y)
    assert torch.equal(mixed[1].running_mean, mean)
    PGD(mixed, steps=2, eval_mode=False)(x, y)
    assert not torch.equal(mixed[1].running_mean, mean)


def test_parameters_get_no_gradient():
    net = small_net()
    x, y = images(net)
    PGD(net, steps=2)(x, y)
    assert all(p.grad is None for p in net.parameters())
