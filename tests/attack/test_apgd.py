import attack_twins as twin
import pytest
import torch
from attack_twins import distance, images, seen_by, small_net

from blokern.attack import APGD, PGD, cross_entropy, dlr, dlr_targeted
from blokern.attack.apgd import _checkpoints
from blokern.attack.losses import correct

EPS = {"linf": 4 / 255, "l2": 0.3, "l1": 3.0}


def walk(net, attack, x, y):
    out = []
    return seen_by(net, lambda: out.append(attack(x, y))), out[0]


def test_checkpoints_are_the_papers():
    steps, share, before = [], 0.22, 0.0
    while round(100 * share) <= 100:
        steps.append(round(100 * share))
        share, before = share + max(share - before - 0.03, 0.06), share
    assert list(_checkpoints(100)) == steps == [22, 41, 57, 70, 80, 87, 93, 99]


@pytest.mark.parametrize(
    ("norm", "loss"), [("linf", "ce"), ("linf", "dlr"), ("l2", "ce"), ("l1", "ce"), ("l1", "dlr")]
)
def test_iterates_are_those_of_the_paper(norm, loss):
    net = small_net(seed=2)
    x, y = images(net, n=6)
    steps = 30 if norm == "l1" else 100
    points, _ = walk(net, APGD(net, EPS[norm], steps, norm, loss=loss), x, y)
    assert len(points) == steps + 1
    f = {"ce": cross_entropy, "dlr": dlr}[loss]
    for i in range(len(x)):
        one = slice(i, i + 1)

        def climbed(point, one=one):
            return f(net(point), y[one]).sum()

        if norm == "l1":
            expected = twin.apgd_l1(climbed, x[one], points[0][one], EPS[norm], steps)
        else:
            expected = twin.apgd(climbed, x[one], points[0][one], EPS[norm], steps, norm)
        for k, (mine, point) in enumerate(zip(points, expected, strict=True)):
            torch.testing.assert_close(mine[one], point, rtol=0, atol=1e-7, msg=f"sample {i}, point {k}")


@pytest.mark.parametrize("norm", list(EPS))
def test_result_is_the_worst_iterate_in_ball_and_box(norm):
    net = small_net()
    x, y = images(net, n=32, wrong=0.1)
    eps = EPS[norm] / 2
    points, x_adv = walk(net, APGD(net, eps, 15, norm), x, y)
    with torch.no_grad():
        fooled = torch.stack([~correct(net(p), y) for p in points])
        loss = torch.stack([cross_entropy(net(p), y) for p in points])
    assert 0 < fooled.any(0).sum() < 32
    worst = (100.0 * fooled + loss).argmax(0)
    assert torch.equal(x_adv, torch.stack(points)[worst, torch.arange(32)])
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    assert distance(x_adv, x, norm).max() <= eps * (1 + 1e-9)


@pytest.mark.parametrize("norm", list(EPS))
def test_early_stop_fools_the_same_samples(norm, monkeypatch):
    net = small_net()
    x, y = images(net, n=48, wrong=0.1)
    monkeypatch.setattr(APGD, "_start", lambda self, batch: batch.x.clone())
    full = APGD(net, EPS[norm], 20, norm)(x, y)
    out = []
    stopping = APGD(net, EPS[norm], 20, norm, early_stop=True)
    sizes = [len(p) for p in seen_by(net, lambda: out.append(stopping(x, y)), early_stop=True)]
    dropped = out[0]
    assert sizes[0] == 48
    assert sizes[-1] < 48
    assert torch.equal(correct(net(full), y), correct(net(dropped), y))


def test_it_beats_pgd_at_the_same_cost():
    net = small_net(seed=1)
    x, y = images(net, n=64)
    apgd = APGD(net, 4 / 255, 30, generator=torch.Generator().manual_seed(0))(x, y)
    pgd = PGD(net, 4 / 255, 2 / 255, 30, generator=torch.Generator().manual_seed(0))(x, y)
    assert cross_entropy(net(apgd), y).mean() >= cross_entropy(net(pgd), y).mean()


def test_restarts_never_get_weaker():
    net = small_net()
    x, y = images(net, n=32)
    one, three = (
        APGD(net, 4 / 255, 8, restarts=r, generator=torch.Generator().manual_seed(0))(x, y) for r in (1, 3)
    )
    fooled = [~correct(net(a), y) for a in (one, three)]
    assert (fooled[1] >= fooled[0]).all()
    same = fooled[0] == fooled[1]
    assert (cross_entropy(net(three), y) >= cross_entropy(net(one), y))[same].all()


def test_targets_are_reached():
    net = small_net()
    x, y = images(net)
    target = (y + 2) % 6
    x_adv = APGD(net, 0.3, 40, targeted=True)(x, target)
    assert correct(net(x_adv), target).float().mean() > 0.9


@pytest.mark.parametrize("loss", ["dlr", "ce"])
def test_target_classes_runs_towards_the_most_likely_wrong_classes(loss):
    net = small_net()
    x, y = images(net, n=10, wrong=0.3)
    attack = APGD(net, 4 / 255, 4, loss=loss, target_classes=3, restarts=2)
    points, x_adv = walk(net, attack, x, y)
    assert len(points) == 1 + 3 * 2 * 5  # the clean look, then a start and four steps each
    with torch.no_grad():
        order = net(x).argsort(dim=1, descending=True)
        wrong = torch.stack([row[row != label] for row, label in zip(order, y, strict=True)])
        for run in range(6):
            target, visited = wrong[:, run // 2], points[1 + 5 * run : 6 + 5 * run]

            def towards(p, target=target):
                return dlr_targeted(net(p), y, target) if loss == "dlr" else -cross_entropy(net(p), target)

            assert torch.stack([towards(p) for p in visited]).amax(0).gt(towards(visited[0])).all()
    assert distance(x_adv, x, "linf").max() <= 4 / 255 + 1e-12


def test_target_classes_finds_what_no_single_run_finds():
    net = small_net()
    x, y = images(net, n=64)
    rate = [
        float(
            (
                ~correct(net(APGD(net, 3 / 255, 10, loss="dlr", target_classes=k, early_stop=True)(x, y)), y)
            ).sum()
        )
        for k in (1, 5)
    ]
    assert rate[1] >= rate[0]


def test_multi_radius_narrows_to_the_ball():
    net = small_net()
    x, y = images(net, n=24)
    eps = 3.0
    points, x_adv = walk(net, APGD(net, eps, 20, "l1", multi_radius=True), x, y)
    assert len(points) == 7 + 7 + 9  # 6, 6 and 8 steps, and a look at each end
    radius = torch.stack([distance(p, x, "l1").max() for p in points])
    assert (radius[:7] <= 3 * eps + 1e-9).all()
    assert radius[:7].max() > 2 * eps
    assert (radius[7:14] <= 2 * eps + 1e-9).all()
    assert (radius[14:] <= eps + 1e-9).all()
    assert distance(x_adv, x, "l1").max() <= eps + 1e-9


def test_per_sample_radii():
    net = small_net()
    x, y = images(net, n=12)
    eps = torch.linspace(0.005, 0.06, 12)
    x_adv = APGD(net, eps, 10, early_stop=True, restarts=2)(x, y)
    assert (distance(x_adv, x, "linf") <= eps + 1e-7).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rho": 1.5}, "rho"),
        ({"target_classes": 0}, "target_classes must be at least 1"),
        ({"target_classes": 3, "targeted": True}, "targeted=False"),
        ({"multi_radius": True}, "norm='l1'"),
        ({"multi_radius": True, "norm": "l1", "eps": 1.0, "steps": 4}, "steps >= 5"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        APGD(small_net(), **settings)


def test_too_few_classes():
    net = small_net(classes=3)
    x, y = images(net)
    with pytest.raises(ValueError, match="dlr_targeted needs at least 4"):
        APGD(net, loss="dlr", target_classes=2)(x, y)
    with pytest.raises(ValueError, match="less than the model's 3 classes, got 9"):
        APGD(net, loss="dlr", target_classes=9)(x, y)
