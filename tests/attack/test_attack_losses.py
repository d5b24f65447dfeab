import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from blokern.attack import cross_entropy, dlr, dlr_targeted, margin
from blokern.attack.losses import correct


def logits_and_labels(n=50, k=7, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, k, generator=g, dtype=torch.float64), torch.randint(k, (n,), generator=g)


def test_values_are_those_of_the_formulas():
    z, y = logits_and_labels()
    t = (y + 1) % 7
    for i in range(len(y)):
        pi = z[i].sort(descending=True).values
        rival = max(float(z[i, j]) for j in range(7) if j != y[i])
        assert cross_entropy(z, y)[i] == pytest.approx(float(-z[i].log_softmax(0)[y[i]]))
        assert dlr(z, y)[i] == pytest.approx(float(-(z[i, y[i]] - rival) / (pi[0] - pi[2])))
        targeted = -(z[i, y[i]] - z[i, t[i]]) / (pi[0] - (pi[2] + pi[3]) / 2)
        assert dlr_targeted(z, y, t)[i] == pytest.approx(float(targeted))


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), scale=st.floats(1e-3, 1e3), shift=st.floats(-100, 100))
def test_dlr_ignores_scale_and_shift_and_is_positive_where_fooled(seed, scale, shift):
    z, y = logits_and_labels(seed=seed)
    torch.testing.assert_close(dlr(scale * z + shift, y), dlr(z, y), rtol=1e-6, atol=1e-6)
    assert torch.equal(dlr(z, y) > 0, ~correct(z, y))


@pytest.mark.parametrize("loss", [dlr, lambda z, y: dlr_targeted(z, y, (y + 1) % 5)])
def test_ties_stay_finite(loss):
    z = torch.zeros(3, 5, requires_grad=True)  # all logits equal
    value = loss(z, torch.tensor([0, 2, 4]))
    value.sum().backward()
    assert value.tolist() == [0, 0, 0]
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("loss", [cross_entropy, dlr, lambda z, y: dlr_targeted(z, y, (y + 1) % 7)])
def test_a_nan_stays_with_its_sample(loss):
    z, y = logits_and_labels()
    clean = loss(z, y)
    z[3, 2] = torch.nan
    z.requires_grad_()
    value = loss(z, y)
    value.sum().backward()
    others = torch.arange(len(y)) != 3
    assert value[3].isnan()
    assert torch.equal(value[others], clean[others])
    assert z.grad[others].isfinite().all()
    assert not correct(z, y)[3]


def test_a_nan_is_never_correct_and_ties_go_to_the_first_class():
    z = torch.tensor([[torch.nan, 0.0, 0.0], [1.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    assert correct(z, torch.tensor([0, 0, 1])).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_widened(dtype):
    z, y = logits_and_labels()
    for loss in (cross_entropy, dlr):
        assert loss(z.to(dtype), y).dtype == torch.float32


def test_too_few_classes():
    y = torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"dlr needs at least 3 classes, got logits of shape \(2, 2\)"):
        dlr(torch.randn(2, 2), y)
    with pytest.raises(ValueError, match="dlr_targeted needs at least 4 classes"):
        dlr_targeted(torch.randn(2, 3), y, 1 - y)


LOSSES = {
    "ce": cross_entropy,
    "dlr": dlr,
    "margin": margin,
    "dlr_targeted": lambda z, y: dlr_targeted(z, y, (y + 1) % 7),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("scale", [1e-36, 1e-30, 1e-12, 1.0, 1e4, 1e30, 1e37])
@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_extreme_logits_are_float64s(loss, scale, shift):
    z, _ = logits_and_labels()
    y, found = z.argmax(1), []
    for dtype in (torch.float32, torch.float64):
        at = (scale * (z + shift)).to(torch.float32).to(dtype).requires_grad_()
        value = loss(at, y)
        (grad,) = torch.autograd.grad(value.sum(), at)
        assert value.isfinite().all()
        assert grad.isfinite().all()
        size = grad.abs().amax(1, keepdim=True).double()
        found.append((value.double(), grad.double() / torch.where(size > 1e-30, size, 1.0)))
    torch.testing.assert_close(*(value for value, _ in found), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*(grad for _, grad in found), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-36, 1e-20, 1e-9, 1.0, 1e20])
def test_dlr_ignores_any_scale(scale):
    z, y = logits_and_labels()
    for loss in (LOSSES["dlr"], LOSSES["dlr_targeted"]):
        torch.testing.assert_close(loss(scale * z, y), loss(z, y), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(loss((scale * z).float(), y), loss(z.float(), y), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_classes_that_are_masked_out(loss):
    z, _ = logits_and_labels()
    y = z.argmax(1)
    z[torch.arange(50), (y + 3) % 7] = -torch.inf
    z.requires_grad_()
    value = loss(z, y)
    value.sum().backward()
    assert value.isfinite().all()
    assert z.grad.isfinite().all()


def test_margin_is_the_distance_to_the_best_other_class():
    z, y = logits_and_labels()
    for i in range(len(y)):
        rival = max(float(z[i, j]) for j in range(7) if j != y[i])
        assert margin(z, y)[i] == pytest.approx(rival - float(z[i, y[i]]))
    assert torch.equal(margin(z, y) > 0, ~correct(z, y))
    with pytest.raises(ValueError, match="margin needs at least 2 classes"):
        margin(z[:, :1], 0 * y)


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("scale", [1e-36, 1e-30, 1e-20, 1e30, 1e37])
def test_steps_along_gradients_of_any_size(norm, scale):
    from attack_twins import images, small_net

    from blokern.attack import APGD, PGD

    net = small_net(dtype=torch.float32)
    x, y = images(net, n=4)

    def scaled(logits, y):
        return scale * margin(logits, y)

    for make in (
        lambda loss: PGD(net, 0.5, 0.2, 3, norm, random_start=False, loss=loss),
        lambda loss: APGD(net, 0.5, 3, norm, loss=loss, generator=torch.Generator().manual_seed(0)),
    ):
        torch.testing.assert_close(make(scaled)(x, y), make("margin")(x, y), rtol=0, atol=1e-4)
