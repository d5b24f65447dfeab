"""blokern's attacks in the place of torchattacks' and foolbox's."""

import builtins
import importlib
import sys

import pytest
import torch
from attack_twins import distance, images, small_net

from blokern import attack


@pytest.fixture
def net():
    return small_net(dtype=torch.float32)


@pytest.fixture
def ours():
    """The adapters to torchattacks, and torchattacks."""
    peer = pytest.importorskip("torchattacks", reason="torchattacks is not installed")
    return importlib.import_module("blokern.attack.torchattacks"), peer


@pytest.fixture
def fb():
    """The adapters to foolbox, and foolbox."""
    peer = pytest.importorskip("foolbox", reason="foolbox is not installed")
    return importlib.import_module("blokern.attack.foolbox"), peer


@pytest.mark.parametrize("name", ["torchattacks", "foolbox"])
def test_a_peer_that_is_missing_is_named(monkeypatch, name):
    real = builtins.__import__

    def without(module, *args, **kwargs):
        if module.partition(".")[0] == name:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(module, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.delitem(sys.modules, f"blokern.attack.{name}", raising=False)
    with pytest.raises(ImportError, match=f"blokern.attack.{name} needs {name}: pip install {name}"):
        importlib.import_module(f"blokern.attack.{name}")


# --- torchattacks -------------------------------------------------------------------------------------------


def test_pgd_does_what_torchattacks_does(ours, net):
    here, peer = ours
    x, y = images(net)
    settings = {"eps": 8 / 255, "alpha": 2 / 255, "steps": 10, "random_start": False}
    mine, theirs = here.PGD(net, **settings), peer.PGD(net, **settings)
    assert isinstance(mine, peer.attack.Attack)
    torch.testing.assert_close(mine(x, y), theirs(x, y))
    for adversary in (mine, theirs):
        adversary.set_mode_targeted_least_likely(quiet=True)
    torch.testing.assert_close(mine(x, y), theirs(x, y))
    mine.eps = theirs.eps = 0.01  # a setting that is changed later counts
    torch.testing.assert_close(mine(x, y), theirs(x, y))
    l2 = here.PGD(net, 1.0, 0.2, 10, False, norm="L2")
    torch.testing.assert_close(
        l2(x, y), peer.PGDL2(net, 1.0, 0.2, 10, random_start=False)(x, y), rtol=0, atol=1e-5
    )


def test_normalised_images_go_in_and_out(ours, net):
    here, peer = ours
    x, y = images(net)
    x[:, :, :4] = x[:, :, :4].round()  # the box's ends, which rounding leaves
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]
    z = (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    results = []
    for room in (here, peer):
        adversary = room.PGD(net, random_start=False)
        adversary.set_normalization_used(mean, std)
        results.append(adversary(z, y))
    torch.testing.assert_close(*results)


def test_the_models_mode_is_torchattacks_affair(ours, net):
    here, _ = ours
    x, y = images(net)
    net.train()
    seen = []
    net[1].register_forward_pre_hook(lambda module, args: seen.append((module.training, net[6].training)))
    frozen = here.PGD(net, steps=2)
    frozen(x, y)
    assert seen == [(False, False)] * 2
    seen.clear()
    frozen.set_model_training_mode(model_training=True, dropout_training=True)
    frozen(x, y)
    assert seen == [(False, True)] * 2
    assert net.training
    assert all(p.requires_grad and p.grad is None for p in net.parameters())


def test_apgd_in_the_place_of_torchattacks(ours, net):
    here, peer = ours
    x, y = images(net, n=64)
    eps = 2 / 255
    mine, theirs = (room.APGD(net, "Linf", eps, steps=20) for room in (here, peer))
    holds = [(net(adversary(x, y)).argmax(1) == y).sum() for adversary in (mine, theirs)]
    assert abs(holds[0] - holds[1]) <= 2
    assert torch.equal(mine(x, y), mine(x, y))  # the seed is that of each call
    assert torch.equal(
        mine(x, y), attack.APGD(net, eps, 20, generator=torch.Generator().manual_seed(0))(x, y)
    )


def test_bad_settings_raise_when_they_are_given(ours, net):
    here, _ = ours
    with pytest.raises(ValueError, match="did you mean 'linf'"):
        here.PGD(net, norm="Lif")
    with pytest.raises(ValueError, match="steps"):
        here.APGD(net, steps=0)
    with pytest.raises(ValueError, match="eps"):
        here.PGD(net, eps=-1.0)


# --- foolbox ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("norm", "name", "eps"), [("linf", "LinfPGD", 4 / 255), ("l2", "L2PGD", 0.5)])
@pytest.mark.parametrize("targeted", [False, True])
def test_pgd_does_what_foolbox_does(fb, net, norm, name, eps, targeted):
    here, foolbox = fb
    x, y = images(net)
    model = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
    criterion = foolbox.TargetedMisclassification((y + 1) % 6) if targeted else y
    settings = {"rel_stepsize": 0.2, "steps": 8, "random_start": False}
    mine = here.PGD(norm=norm, **settings)(model, x, criterion, epsilons=[eps, 2 * eps])
    theirs = getattr(foolbox.attacks, name)(**settings)(model, x, criterion, epsilons=[eps, 2 * eps])
    for i in range(2):
        torch.testing.assert_close(mine[1][i], theirs[1][i], rtol=0, atol=1e-5)
    assert torch.equal(mine[2], theirs[2])


def test_foolboxs_bounds_and_preprocessing_hold(fb, net):
    here, foolbox = fb
    x, y = images(net)
    preprocessing = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25], "axis": -3}
    model = foolbox.PyTorchModel(net, bounds=(-1, 1), device="cpu", preprocessing=preprocessing)
    x = 2 * x - 1
    settings = {"abs_stepsize": 0.02, "steps": 5, "random_start": False}
    mine = here.PGD(**settings)(model, x, y, epsilons=0.1)
    theirs = foolbox.attacks.LinfPGD(**settings)(model, x, y, epsilons=0.1)
    torch.testing.assert_close(mine[0], theirs[0])
    assert mine[0].min() < -0.9


@pytest.mark.parametrize(("norm", "eps"), [("linf", 2 / 255), ("l2", 0.3), ("l1", 4.0)])
def test_apgd_as_a_foolbox_attack(fb, net, norm, eps):
    here, foolbox = fb
    x, y = images(net)
    model = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
    raw, _, success = here.APGD(norm=norm, steps=10)(model, x, y, epsilons=eps)
    assert distance(raw, x, norm).max() <= eps * (1 + 1e-5)
    assert torch.equal(success, net(raw).argmax(1) != y)
    assert success.any()
    again = here.APGD(norm=norm, steps=10).repeat(2)(model, x, y, epsilons=eps)[2]
    assert again.sum() >= success.sum() - 1


def test_a_criterion_that_is_neither_is_named(fb, net):
    here, foolbox = fb
    x, y = images(net)
    model = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")

    class Other(foolbox.Criterion):
        def __repr__(self):
            return "Other()"

        def __call__(self, perturbed, outputs):
            return outputs.argmax(-1) != 0

    with pytest.raises(ValueError, match=r"criterion must be Misclassification or .* got Other\(\)"):
        here.PGD()(model, x, Other(), epsilons=0.1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'speed'"):
        here.PGD()(model, x, y, epsilons=0.1, speed=1)
    with pytest.raises(ValueError, match="norm must be one of"):
        here.PGD(norm="linfty")
