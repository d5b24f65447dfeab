import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from blokern.attack import cross_entropy, dlr, dlr_targeted
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
