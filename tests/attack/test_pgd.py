import attack_twins as twin
import hypothesis.strategies as st
import pytest
import torch
from attack_twins import distance, images, seen_by, small_net
from hypothesis import given, settings

from blokern import ops
from blokern.attack import FGSM, NFGSM, PGD, cross_entropy, dlr
from blokern.attack.losses import correct

EPS = {"linf": 8 / 255, "l2": 0.5, "l1": 4.0}
NORMS = list(EPS)


def loss_of(net, y, loss=cross_entropy, sign=1.0):
    return lambda point: sign * loss(net(point), y).sum()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("loss", "targeted"), [("ce", False), ("dlr", False), ("ce", True)])
def test_iterates_are_those_of_the_plain_loop(norm, loss, targeted):
    net = small_net()
    x, y = images(net, n=5)
    y = (y + 1) % 6 if targeted else y
    eps = EPS[norm]
    attack = PGD(net, eps, eps / 3, 8, norm, random_start=False, loss=loss, targeted=targeted)
    out = []
    inputs = seen_by(net, lambda: out.append(attack(x, y)))
    for i in range(len(x)):
        climbed = loss_of(
            net, y[i : i + 1], dlr if loss == "dlr" else cross_entropy, -1.0 if targeted else 1.0
        )
        points = twin.pgd(climbed, x[i : i + 1], x[i : i + 1], eps, eps / 3, 8, norm)
        for mine, point in zip([*inputs, out[0]], points, strict=True):
            torch.testing.assert_close(mine[i : i + 1], point)


@pytest.mark.parametrize("norm", NORMS)
def test_fgsm_is_one_step(norm):
    net = small_net()
    x, y = images(net, n=5)
    for i in range(len(x)):
        one = slice(i, i + 1)
        _, expected = twin.pgd(loss_of(net, y[one]), x[one], x[one], EPS[norm], EPS[norm], 1, norm)
        torch.testing.assert_close(FGSM(net, EPS[norm], norm=norm)(x[one], y[one]), expected)
    from_noise = FGSM(net, EPS[norm], 1.25 * EPS[norm], norm, random_start=True)(x, y)
    assert distance(from_noise, x, norm).max() <= EPS[norm] * (1 + 1e-9)


@pytest.mark.parametrize("norm", NORMS)
def test_nfgsm_steps_from_clipped_noise_and_does_not_project(norm):
    net = small_net()
    x, y = images(net)
    eps = EPS[norm]
    attack = NFGSM(net, eps, 0.9 * eps, noise=2.0, norm=norm)
    out = []
    (start,) = seen_by(net, lambda: out.append(attack(x, y)))
    assert start.min() >= 0
    assert start.max() <= 1
    assert eps < distance(start, x, norm).max() <= 2 * eps
    for i in range(len(x)):
        _, g = twin.value_and_gradient(loss_of(net, y[i : i + 1]), start[i : i + 1])
        stepped = start[i : i + 1] + 0.9 * eps * twin.direction(g, norm)
        torch.testing.assert_close(out[0][i : i + 1], stepped.clamp(0, 1))


@settings(deadline=None, max_examples=40)
@given(
    norm=st.sampled_from(NORMS),
    eps=st.floats(0.0, 3.0),
    step=st.floats(0.0, 5.0),
    box=st.sampled_from([(0.0, 1.0), (-1.0, 1.0), (-2.5, 3.0)]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    options=st.fixed_dictionaries({"early_stop": st.booleans(), "targeted": st.booleans()}),
    restarts=st.integers(1, 2),
    seed=st.integers(0, 99),
)
def test_results_lie_in_ball_and_box(norm, eps, step, box, dtype, options, restarts, seed):
    eps = min(eps, box[1] - box[0]) if norm == "linf" else eps
    net = small_net(dtype=dtype)
    x, y = images(net, n=4, wrong=0.5, seed=seed)
    x = box[0] + (box[1] - box[0]) * x
    x_adv = PGD(net, eps, step, 3, norm, restarts, clip_min=box[0], clip_max=box[1], **options)(
        x.clamp(*box), y
    )
    assert x_adv.min() >= box[0]
    assert x_adv.max() <= box[1]
    assert distance(x_adv, x, norm).max() <= eps + 1e-5 * max(eps, 1.0)


def test_per_sample_radii_and_steps():
    net = small_net()
    x, y = images(net, n=6)
    eps = torch.linspace(0.01, 0.06, 6, dtype=torch.float64)
    together = PGD(net, eps, eps / 2, 4, random_start=False)(x, y)
    for i in range(6):
        alone = PGD(net, float(eps[i]), float(eps[i] / 2), 4, random_start=False)(x[i : i + 1], y[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone)
    fallen = PGD(net, eps, eps / 2, 4, restarts=3, early_stop=True)(x, y)  # radii leave with their samples
    assert (distance(fallen, x, "linf") <= eps + 1e-12).all()


def test_targets_are_reached():
    net = small_net()
    x, y = images(net)
    target = (y + 2) % 6
    x_adv = PGD(net, 0.3, 0.03, 40, targeted=True)(x, target)
    assert correct(net(x_adv), target).float().mean() > 0.9


def test_restarts_keep_the_worst_end_point_of_each_sample():
    net = small_net()
    x, y = images(net, n=40)
    eps = 6 / 255
    ends = []
    g = torch.Generator().manual_seed(3)
    for _ in range(4):
        ends.append(PGD(net, eps, eps / 4, 5, generator=g)(x, y))
    kept = PGD(net, eps, eps / 4, 5, restarts=4, generator=torch.Generator().manual_seed(3))(x, y)
    with torch.no_grad():
        fooled = torch.stack([~correct(net(e), y) for e in ends])
        loss = torch.stack([cross_entropy(net(e), y) for e in ends])
    assert 0 < fooled.any(0).sum() < 40
    rank = (100.0 * fooled + loss).argmax(0)  # fooled before not fooled, then the loss
    torch.testing.assert_close(kept, torch.stack(ends)[rank, torch.arange(40)])


@pytest.mark.parametrize("norm", NORMS)
def test_early_stop_finds_what_the_full_walk_finds(norm):
    """Deterministic start: the same walk, once dropping the fooled and once going on and remembering them."""
    net = small_net()
    x, y = images(net, n=64, wrong=0.1)
    eps = 0.4 * EPS[norm]
    steps = 12
    going_on = PGD(net, eps, eps / 4, steps, norm, random_start=False)
    last = []
    points = [*seen_by(net, lambda: last.append(going_on(x, y))), last[0]]
    with torch.no_grad():
        fooled_at = torch.stack([~correct(net(p), y) for p in points])
    stopped = PGD(net, eps, eps / 4, steps, norm, random_start=False, early_stop=True)(x, y)
    ever = fooled_at.any(0)
    assert 0 < ever.sum() < 64
    assert torch.equal(~correct(net(stopped), y), ever)
    first = fooled_at.int().argmax(0)
    for i in ever.nonzero().squeeze(1):  # each stays exactly where it fell
        torch.testing.assert_close(stopped[i], points[first[i]][i])


def test_early_stop_drops_the_fallen_from_steps_and_restarts():
    net = small_net()
    x, y = images(net, n=64, wrong=0.25)
    eps = 0.05
    attack = PGD(net, eps, eps / 4, 6, restarts=5, early_stop=True)
    sizes = [len(p) for p in seen_by(net, lambda: attack(x, y), early_stop=True)]
    assert sizes[0] == 64
    assert sizes[1] <= 48
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 20
    everyone = PGD(net, 1.0, 0.1, 50, restarts=20, early_stop=True)
    assert len(seen_by(net, lambda: everyone(x, y))) < 100  # stops when nobody is left


def test_early_stop_keeps_the_best_try_of_those_who_stand():
    net = small_net()
    x, y = images(net, n=16)
    x_adv = PGD(net, 0.002, 0.0005, 5, restarts=3, early_stop=True)(x, y)
    assert correct(net(x_adv), y).any()
    assert (cross_entropy(net(x_adv), y) > cross_entropy(net(x), y)).all()


def test_no_fresh_iterates_and_one_forward_a_step(monkeypatch):
    """One buffer is stepped in place, of which the model sees a copy, and a single run costs one forward a step."""
    net = small_net()
    x, y = images(net)
    seen, stepped, step_ = [], [], ops.pgd_step_

    def spy(x_adv, *args, **how):
        stepped.append(x_adv.data_ptr())
        return step_(x_adv, *args, **how)

    monkeypatch.setattr(ops, "pgd_step_", spy)
    net.register_forward_pre_hook(lambda _, args: seen.append(args[0].data_ptr()))
    PGD(net, steps=6)(x, y)
    assert (len(seen), len(stepped), len(set(stepped))) == (6, 6, 1)
    assert stepped[0] not in seen


def test_random_starts_follow_the_generator():
    net = small_net()
    x, y = images(net)
    runs = [PGD(net, steps=2, generator=torch.Generator().manual_seed(s))(x, y) for s in (5, 5, 6)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_what_a_graphed_attack_is_not():
    net = small_net()
    x, y = images(net, n=2)
    for how in ({"restarts": 2}, {"early_stop": True}):
        with pytest.raises(ValueError, match=r"it takes restarts=1 and early_stop=False, got restarts="):
            PGD(net, 0.1, 0.05, cuda_graph=True, **how)
    for name in ("eps", "step_size"):
        with pytest.raises(TypeError, match=f"{name} must be a float for cuda_graph=True, got a tensor"):
            PGD(net, **{"eps": 0.1, "step_size": 0.05, name: torch.ones(2)}, cuda_graph=True)
    with pytest.raises(ValueError, match="x must be on a CUDA device for cuda_graph=True, got cpu"):
        PGD(net, 0.1, 0.05, cuda_graph=True)(x, y)
