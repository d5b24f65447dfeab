"""Against other libraries' attacks, if installed: pip install --no-deps pyautoattack torchattacks."""

import pytest
import torch
from attack_twins import images, seen_by, small_net

from blokern.attack import APGD, FGSM, PGD, cross_entropy, dlr, evaluate
from blokern.attack.losses import correct


@pytest.fixture
def autopgd():
    """AutoAttack's own APGD, from the fork of its release on PyPI."""
    return pytest.importorskip("pyautoattack.autopgd_base", reason="pyautoattack is not installed")


@pytest.fixture
def float64_by_default():
    """The peer keeps its losses in the default type."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def torchattacks():
    return pytest.importorskip("torchattacks", reason="torchattacks is not installed")


@pytest.mark.parametrize(
    ("norm", "eps", "loss", "steps"),
    [
        ("linf", 4 / 255, "ce", 20),
        ("linf", 4 / 255, "ce", 100),
        ("linf", 4 / 255, "dlr", 20),
        ("linf", 4 / 255, "dlr", 100),
        ("l2", 0.4, "ce", 20),
        ("l2", 0.4, "ce", 100),
    ],
)
def test_autoattacks_apgd_visits_the_same_points(
    autopgd, float64_by_default, monkeypatch, norm, eps, loss, steps
):
    """In float64, from the same start, with one line of the released code mended (see below).

    Not compared: DLR in L2, whose gradient is rounding once the loss is saturated at 1, and L1, where the
    released code counts rounding residue as sparsity.
    """
    net = small_net(seed=1)
    x, y = images(net, wrong=0.2)
    noise = 2 * torch.rand(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype) - 1
    start = (x + eps * noise / (8 if norm == "l2" else 1)).clamp(0, 1)
    monkeypatch.setattr(APGD, "_start", lambda self, batch: start.clone())
    with torch.no_grad():
        start_loss = {"ce": cross_entropy, "dlr": dlr}[loss](net(start), y)

    class Peer(autopgd.APGDAttack):
        def check_oscillation(self, losses, j, k, _, k3=0.75):
            # Released: the first step's loss is held against a row of zeros. Paper: against the start's.
            losses = torch.cat([start_loss.unsqueeze(0), losses[: j + 1]])
            return ((losses[-k:] > losses[-k - 1 : -1]).sum(0) <= k * k3).float()

    peer = Peer(net, n_iter=steps, norm=norm.capitalize(), eps=eps, loss=loss, device="cpu")
    peer.init_hyperparam(x)
    out = []
    theirs = seen_by(net, lambda: out.append(peer.attack_single_run(x, y, x_init=start)))
    ours = seen_by(net, lambda: out.append(APGD(net, eps, steps, norm, loss=loss)(x, y)))
    assert len(ours) == len(theirs) == steps + 1
    for k, (mine, point) in enumerate(zip(ours, theirs, strict=True)):
        torch.testing.assert_close(mine, point, rtol=0, atol=1e-8, msg=f"point {k}")
    assert torch.equal(correct(net(out[1]), y), out[0][1].bool())


def test_autoattacks_targeted_apgd_fools_the_same_samples(autopgd, monkeypatch):
    net = small_net()
    x, y = images(net, n=32)
    eps, targets = 3 / 255, 4
    start = (x + eps * (2 * torch.rand_like(x) - 1)).clamp(0, 1)
    monkeypatch.setattr(APGD, "_start", lambda self, batch: start[batch.index].clone())
    peer = autopgd.APGDAttack_targeted(net, n_iter=50, norm="Linf", eps=eps, device="cpu")
    peer.init_hyperparam(x)
    holds = torch.ones_like(y, dtype=torch.bool)
    for rank in range(2, targets + 2):
        peer.y_target = net(x).sort(dim=1)[1][:, -rank]
        holds &= peer.attack_single_run(x, y, x_init=start)[1].bool()
    x_adv = APGD(net, eps, 50, loss="dlr", target_classes=targets, early_stop=True)(x, y)
    assert 0 < holds.sum() < 32
    assert torch.equal(correct(net(x_adv), y), holds)


def test_torchattacks_pgd_and_fgsm_agree(torchattacks):
    net = small_net(dtype=torch.float32)
    x, y = images(net)
    pgd = torchattacks.PGD(net, eps=8 / 255, alpha=2 / 255, steps=10, random_start=False)
    torch.testing.assert_close(PGD(net, random_start=False)(x, y), pgd(x, y))
    torch.testing.assert_close(FGSM(net)(x, y), torchattacks.FGSM(net, eps=8 / 255)(x, y))
    l2 = torchattacks.PGDL2(net, eps=1.0, alpha=0.2, steps=10, random_start=False)
    ours = PGD(net, 1.0, 0.2, 10, "l2", random_start=False)(x, y)
    torch.testing.assert_close(ours, l2(x, y), rtol=0, atol=1e-5)


def test_torchattacks_plugs_into_evaluate(torchattacks):
    net = small_net(dtype=torch.float32)
    x, y = images(net, n=64)
    eps = 2 / 255
    peer = torchattacks.APGD(net, eps=eps, steps=20)
    result = evaluate(net, [(x, y)], {"torchattacks": peer, "ours": APGD(net, eps, 20)}, eps=eps)
    assert 0 < result.robust_accuracy <= min(result.per_attack.values()) < result.clean_accuracy == 1.0
    assert abs(result.per_attack["torchattacks"] - result.per_attack["ours"]) <= 2 / 64


def test_pyautoattack_plugs_into_evaluate(autopgd):
    net = small_net(dtype=torch.float32)
    x, y = images(net, n=32)
    eps = 2 / 255
    peer = autopgd.APGDAttack(net, n_iter=10, norm="Linf", eps=eps, loss="ce", device="cpu")
    result = evaluate(net, [(x, y)], {"peer": peer.perturb, "ours": APGD(net, eps, 10)}, eps=eps)
    assert abs(result.per_attack["peer"] - result.per_attack["ours"]) <= 2 / 32
