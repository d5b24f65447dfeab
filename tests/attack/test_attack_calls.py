"""What holds for every attack: dtypes, memory formats, gradient modes, NaN, and wrong calls."""

import pytest
import torch
from attack_twins import distance, images, small_net
from torch import nn

from blokern.attack import APGD, FGSM, NFGSM, PGD

ATTACKS = {
    "fgsm": lambda net, **o: FGSM(net, **o),
    "nfgsm": lambda net, **o: NFGSM(net, **o),
    "pgd": lambda net, **o: PGD(net, steps=3, **o),
    "pgd-restarts": lambda net, **o: PGD(net, steps=3, restarts=2, **o),
    "pgd-early-stop": lambda net, **o: PGD(net, steps=3, restarts=2, early_stop=True, **o),
    "apgd": lambda net, **o: APGD(net, steps=6, **o),
    "apgd-early-stop": lambda net, **o: APGD(net, steps=6, early_stop=True, **o),
}
each_attack = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)


@each_attack
def test_x_is_untouched_and_x_adv_is_plain(attack):
    net = small_net()
    x, y = images(net, wrong=0.2)
    x.requires_grad_()
    before = x.detach().clone()
    x_adv = attack(net)(x, y)
    assert torch.equal(x, before)
    assert x.grad is None
    assert not x_adv.requires_grad
    assert x_adv.data_ptr() != x.data_ptr()


@each_attack
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "expanded"])
def test_layouts_give_the_same_points(attack, norm, layout):
    net = small_net()
    x, y = images(net)
    if layout == "expanded":
        x, y = x[:1].expand(4, -1, -1, -1), y[:1].expand(4)
    spaced = x.new_zeros(*x.shape, 2)
    spaced[..., 0] = x
    laid = {
        "contiguous": x,
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "sliced": spaced[..., 0],
        "expanded": x,
    }[layout]
    runs = [
        attack(net, norm=norm, eps=0.3, generator=torch.Generator().manual_seed(0))(z, y)
        for z in (laid, x.contiguous())
    ]
    assert runs[0].shape == x.shape
    if layout == "channels_last":
        assert runs[0].is_contiguous(memory_format=torch.channels_last)
    else:
        assert runs[0].is_contiguous()
    if layout in ("contiguous", "sliced"):  # a start's bits may follow the memory order
        torch.testing.assert_close(runs[0], runs[1])
    assert distance(runs[0], x, norm).max() <= 0.9 + 1e-9


@each_attack
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(attack, dtype):
    net = small_net(dtype=torch.float32)
    x, y = images(net)
    model = nn.Sequential(Cast(), net)
    x_adv = attack(model)(x.to(dtype), y)
    assert x_adv.dtype == dtype
    assert distance(x_adv, x.to(dtype), "linf").max() <= 3.01 * 8 / 255 + 1e-2 * (dtype.itemsize == 2)


class Cast(nn.Module):
    def forward(self, x):
        return x.float()


@each_attack
def test_autocast_keeps_images_in_float32(attack):
    net = small_net(dtype=torch.float32)
    x, y = images(net)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert net(x).dtype == torch.bfloat16
        x_adv = attack(net)(x, y)
    assert x_adv.dtype == torch.float32
    assert ((x_adv - x).abs() > 0).any()


@each_attack
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_gradient_modes_of_the_caller(attack, mode):
    net = small_net()
    x, y = images(net)
    expected = attack(net, generator=torch.Generator().manual_seed(0))(x, y)
    with mode():
        if mode is torch.inference_mode:
            x, y = x + 0, y + 0  # inference tensors
        x_adv = attack(net, generator=torch.Generator().manual_seed(0))(x, y)
        was_enabled = torch.is_grad_enabled()
    assert was_enabled == (mode is torch.enable_grad)
    assert not x_adv.is_inference()
    torch.testing.assert_close(x_adv, expected)


@each_attack
def test_empty_batch(attack):
    net = small_net()
    x, y = images(net)
    assert attack(net)(x[:0], y[:0]).shape == (0, 3, 8, 8)


class SometimesNaN(nn.Module):
    """Logits and gradient of the samples that start dark are NaN."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        logits = self.net(x)
        return logits * torch.where(x[:, 0, 0, 0] < 0.25, torch.nan, 1.0).unsqueeze(1)


@each_attack
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_nan_stays_with_its_sample_and_out_of_the_images(attack, norm):
    net = small_net()
    x, y = images(net)
    dark = torch.arange(24) % 6 == 0
    x[:, 0, 0, 0] = torch.where(dark, 0.0, 0.75)
    options = {"norm": norm, "eps": 0.03}
    x_adv = attack(SometimesNaN(net), **options, generator=torch.Generator().manual_seed(0))(x, y)
    assert x_adv.isfinite().all()
    assert distance(x_adv, x, norm).max() <= 0.09 + 1e-9
    assert (distance(x_adv, x, norm) > 0)[~dark].all()


def one_call(change):
    net = small_net()
    x, y = images(net, n=4)
    return lambda: PGD(net)(*change(x, y))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x, y: (2 * x, y), ValueError, r"x must lie in \[clip_min, clip_max\] = \[0.0, 1.0\]"),
        (lambda x, y: (x - 0.5, y), ValueError, "normalise inside the model"),
        (lambda x, y: (x.index_fill(0, y[:1] * 0, torch.nan), y), ValueError, "x must lie in"),
        (lambda x, y: ((255 * x).byte(), y), TypeError, "x must be floating-point.*uint8"),
        (lambda x, y: (x.numpy(), y), TypeError, "x must be a tensor, got ndarray"),
        (lambda x, y: (x[0, 0, 0], y), ValueError, r"x must be a batch, \[N, ...\], got shape \(8,\)"),
        (lambda x, y: (x[:, :, :0], y), ValueError, "samples without elements"),
        (lambda x, y: (x, y.int()), TypeError, "y must be class labels, torch.int64, got torch.int32"),
        (lambda x, y: (x, y[:3]), ValueError, r"y must have shape \(4,\) to fit x, got \(3,\)"),
        (lambda x, y: (x, torch.eye(4)), TypeError, "torch.float32"),
        (lambda x, y: (x, y - 9), ValueError, "class labels from 0, got -"),
        (lambda x, y: (x, y + 6), ValueError, "but the model has 6 classes"),
    ],
)
def test_wrong_batches(change, error, message):
    with pytest.raises(error, match=message):
        one_call(change)()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"norm": "Linf"},
            ValueError,
            "norm must be one of 'linf', 'l2', 'l1', got 'Linf'; did you mean 'linf'",
        ),
        ({"norm": 2}, ValueError, "norm must be one of 'linf', 'l2', 'l1', got 2"),
        (
            {"loss": "dl"},
            ValueError,
            "loss must be one of 'ce', 'dlr', 'margin', 'cw', got 'dl'; did you mean 'dlr'",
        ),
        ({"eps": -0.1}, ValueError, "eps must be finite and at least 0, got -0.1"),
        ({"eps": torch.tensor([0.1, -1.0])}, ValueError, "eps must be finite and at least 0"),
        (
            {"eps": torch.ones(2, 2)},
            ValueError,
            r"eps must be a float or .* got torch.float32 of shape \(2, 2\)",
        ),
        ({"eps": "8/255"}, TypeError, r"eps must be a float or a tensor of shape \[N\], got str"),
        ({"step_size": float("nan")}, ValueError, "step_size must be finite"),
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"steps": 2.0}, TypeError, "steps must be an int, got 2.0"),
        ({"restarts": 0}, ValueError, "restarts must be at least 1"),
        ({"restarts": 2, "random_start": False}, ValueError, "would repeat the same run"),
        ({"clip_min": 1.0}, ValueError, "clip_min must be less than clip_max"),
        ({"epsilon": 0.1}, TypeError, "epsilon"),
    ],
)
def test_wrong_settings(settings, error, message):
    with pytest.raises(error, match=message):
        PGD(small_net(), **settings)


def test_more_wrong_settings():
    net = small_net()
    x, y = images(net, n=4)
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got function"):
        PGD(lambda x: x)
    with pytest.raises(ValueError, match="noise must be finite and at least 0, got -1"):
        NFGSM(net, noise=-1.0)
    with pytest.raises(ValueError, match="eps has 3 values for a batch of 4 samples"):
        PGD(net, torch.full((3,), 0.1))(x, y)
    with pytest.raises(ValueError, match=r"loss must return shape \(4,\), got \(\)"):
        PGD(net, loss=lambda logits, y: logits.sum())(x, y)


def test_models_that_cannot_be_attacked():
    net = small_net()
    x, y = images(net, n=4)
    with pytest.raises(
        ValueError, match=r"logits of shape \[4, K\], got torch.float64 of shape \(4, 8, 4, 4\)"
    ):
        PGD(net[:5])(x, y)

    class Detached(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x.detach())

    class Elsewhere(Detached):
        """Hides its parameters from the freezing, so that there is a graph, without x in it."""

        def parameters(self, recurse=True):
            return iter(())

    for model in (Detached(net), Elsewhere(net)):
        with pytest.raises(ValueError, match="its logits pass no gradient to x"):
            PGD(model)(x, y)


def test_names():
    net = small_net()
    assert PGD(net, steps=50, restarts=10).name == "PGD-50-10"
    assert PGD(net, 0.5, norm="l2").name == "PGD-10"
    assert repr(PGD(net, 0.5, steps=20, norm="l2")) == "PGD-20(norm='l2', eps=0.5)"
    assert repr(FGSM(net, torch.ones(3))) == "FGSM(norm='linf', eps=[3 values])"
    assert NFGSM(net).name == "N-FGSM"
    assert APGD(net, restarts=5).name == "APGD-CE-100-5"
    assert APGD(net, loss="dlr", target_classes=9).name == "APGD-T9-DLR-100"
