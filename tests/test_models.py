"""The classifiers: shapes, sizes, initial weights, and what the rest of blokern needs them to survive."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blokern import models


def narrow(name: str, **kwargs: Any) -> nn.Module:
    """The named model with few channels, its weights drawn from a fixed seed."""
    torch.manual_seed(0)
    kwargs |= {"widen": 1} if name == "wide_resnet28_10" else {"width": 4}
    return models.build(name, **kwargs)


def images(size: int = 16, channels: int = 3) -> Tensor:
    return torch.rand(4, channels, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", models.NAMES)
@pytest.mark.parametrize(("size", "channels"), [(8, 1), (28, 1), (33, 3)])
def test_logits_have_one_column_a_class(name: str, size: int, channels: int) -> None:
    model = narrow(name, num_classes=7, in_channels=channels).eval()
    with torch.no_grad():
        logits = model(images(size, channels))
    assert logits.shape == (4, 7)
    assert logits.isfinite().all()


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("small_cnn", 83_706),
        ("resnet18", 11_173_962),
        ("resnet20", 272_474),
        ("resnet56", 855_770),
        ("preact_resnet18", 11_172_170),
        ("preact_resnet34", 21_280_330),
        ("preact_resnet50", 23_513_162),
        ("wide_resnet28_10", 36_479_194),
        ("vgg16_bn", 14_724_042),
    ],
)
def test_parameter_count(name: str, count: int) -> None:
    with torch.device("meta"):
        model = models.build(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize("name", models.NAMES)
def test_fx_trace_computes_the_same(name: str) -> None:
    model = narrow(name).eval()
    x = images()
    with torch.no_grad():
        assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))


@pytest.mark.parametrize("name", models.NAMES)
def test_double_backward_reaches_every_parameter(name: str) -> None:
    model = narrow(name).train()
    x = images().requires_grad_()
    loss = F.cross_entropy(model(x), torch.arange(4))
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    gradient.square().sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name


@pytest.mark.parametrize("name", models.NAMES)
def test_channels_last_gives_the_same_logits(name: str) -> None:
    model = narrow(name).double().eval()
    x = images().double()
    with torch.no_grad():
        expected = model(x)
        model = model.to(memory_format=torch.channels_last)
        torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), expected)


@pytest.mark.parametrize("name", ["small_cnn", "resnet20", "preact_resnet50"])
def test_compiles_to_one_graph(name: str) -> None:
    model = narrow(name).eval()
    x = images()
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("name", models.NAMES)
def test_no_relu_works_in_place(name: str) -> None:
    relus = [module for module in narrow(name).modules() if isinstance(module, nn.ReLU)]
    assert relus
    assert not any(relu.inplace for relu in relus)


@pytest.mark.parametrize("name", models.NAMES)
def test_he_initial_weights(name: str) -> None:
    torch.manual_seed(0)
    kwargs = {"widen": 2} if name == "wide_resnet28_10" else {"width": 16}
    for module in models.build(name, **kwargs).modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and module.weight.numel() > 4000:
            expected = (2 / module.weight[0].numel()) ** 0.5
            assert module.weight.std().item() == pytest.approx(expected, rel=0.1)


def test_vgg_at_32x32_is_the_usual_one() -> None:
    """Rounding the pooled size up is for odd sizes only."""
    model = narrow("vgg16_bn").eval()
    x = images(32)
    with torch.no_grad():
        expected = model(x)
        for module in model.modules():
            if isinstance(module, nn.MaxPool2d):
                module.ceil_mode = False
        assert torch.equal(model(x), expected)


def test_normalisation_comes_first() -> None:
    model = narrow("small_cnn", in_channels=2, mean=(0.5, 0.25), std=(0.5, 2.0))
    normalize = next(model.children())
    assert isinstance(normalize, models.Normalize)
    assert normalize(torch.ones(1, 2, 1, 1)).flatten().tolist() == [1.0, 0.375]
    assert "normalize.mean" in model.state_dict()  # saved with the weights
    assert "normalize.mean" not in dict(model.named_parameters())


def test_normalize_without_statistics_changes_nothing() -> None:
    x = images()
    assert torch.equal(models.Normalize(3)(x), x)


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ((0.5,), None, "mean must have one value for each of 3 channels"),
        (None, (1.0, 1.0), "std must have one value for each of 3 channels"),
        (None, (1.0, 0.0, 1.0), "std must be positive"),
        (None, (1.0, float("nan"), 1.0), "std must be positive"),
    ],
)
def test_normalize_rejects(mean: models.Stats, std: models.Stats, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.Normalize(3, mean, std)


@pytest.mark.parametrize("name", models.NAMES)
@pytest.mark.parametrize("argument", ["num_classes", "in_channels", "width"])
def test_builders_reject_counts_below_one(name: str, argument: str) -> None:
    if name == "wide_resnet28_10" and argument == "width":
        argument = "widen"
    with pytest.raises(ValueError, match=f"{argument} must be at least 1, got 0"):
        models.build(name, **{argument: 0})
    with pytest.raises(TypeError, match=rf"{argument} must be an int, got 2\.0"):
        models.build(name, **{argument: 2.0})


def test_build_suggests_the_nearest_name() -> None:
    message = r"must be one of 'small_cnn', .*got 'preact_resnet81'; did you mean 'preact_resnet18'\?"
    with pytest.raises(ValueError, match=message):
        models.build("preact_resnet81")
    with pytest.raises(ValueError, match=r"must be one of .*'timm:NAME', got '\?\?\?'$"):
        models.build("???")


def test_timm_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"timm:vit.*pip install 'blokern\[vision\]'"):
        models.build("timm:vit")


def test_timm_network_gets_our_normalisation(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = ModuleType("timm")
    timm.__version__ = "1.0"  # type: ignore[attr-defined]
    timm.is_model = lambda name: name == "flat"  # type: ignore[attr-defined]

    def create_model(name: str, *, num_classes: int, in_chans: int, img_size: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(in_chans * img_size**2, num_classes))

    timm.create_model = create_model  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "timm", timm)

    model = models.build("timm:flat", num_classes=5, in_channels=1, mean=(0.5,), img_size=16)
    x = images(channels=1)
    assert torch.equal(model(x), model.get_submodule("network")(x - 0.5))
    with pytest.raises(ValueError, match=r"timm 1\.0 has no model 'flta'"):
        models.build("timm:flta")
