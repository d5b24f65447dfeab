"""Masked layers and sparsified networks against dense networks whose weights are zero where the mask is."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from blokern import models
from blokern.sparse import MaskedConv2d, MaskedLinear, SparseMask, compact, masks_of, pack, sparsify, to_dense


def random_masks(model: nn.Module, density: float = 0.3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.rand(p.shape, generator=generator) < density
        for name, p in model.named_parameters()
        if p.dim() > 1
    }


def network() -> nn.Module:
    torch.manual_seed(0)
    return models.build("preact_resnet18", num_classes=5, in_channels=3, width=4).double()


def pruned(model: nn.Module, masks: dict[str, Tensor]) -> nn.Module:
    """A dense copy with the masked weights zero."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in masks:
                parameter.mul_(masks[name])
    return model


def test_a_network_and_its_gradients() -> None:
    model = network()
    masks = random_masks(model)
    dense, sparse = pruned(model, masks), sparsify(model, masks)
    x = torch.rand(3, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(sparse(x), dense(x))
    y = torch.tensor([0, 1, 2])
    for net in (sparse, dense):
        nn.functional.cross_entropy(net(x), y).backward()
    for (name, got), want in zip(sparse.named_parameters(), dense.parameters(), strict=True):
        assert got.grad is not None
        assert want.grad is not None
        torch.testing.assert_close(got.grad, want.grad * masks[name] if name in masks else want.grad)


def test_dense_gradients_are_a_layers_choice() -> None:
    model = network()
    masks = random_masks(model)
    dense, sparse = pruned(model, masks), sparsify(model, masks)
    layers = [m for m in sparse.modules() if isinstance(m, MaskedConv2d | MaskedLinear)]
    assert not any(layer.dense_grad for layer in layers)
    for layer in layers:
        layer.dense_grad = True
    x, y = torch.rand(3, 3, 16, 16, dtype=torch.float64), torch.tensor([0, 1, 2])
    for net in (sparse, dense):
        nn.functional.cross_entropy(net(x), y).backward()
    for got, want in zip(sparse.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad)
    assert "dense_grad" not in vars(to_dense(sparse)[-1])


def test_parameters_hooks_and_names_stay() -> None:
    model = network()
    before, calls = dict(model.named_parameters()), []
    layer = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    layer.register_forward_hook(lambda *_: calls.append(1))
    sparsify(model, random_masks(model))
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)
    model(torch.rand(2, 3, 8, 8, dtype=torch.float64))
    assert calls == [1]
    assert isinstance(layer, MaskedConv2d)


def test_masks_go_out_as_they_came_in() -> None:
    model = network()
    masks = random_masks(model)
    found = masks_of(sparsify(model, masks))
    assert found.keys() == masks.keys()
    assert all(found[name].to_dense().equal(mask) for name, mask in masks.items())
    alone = sparsify(nn.Linear(3, 2), {"weight": torch.ones(2, 3, dtype=torch.bool)})
    assert list(masks_of(alone)) == ["weight"]
    assert masks_of(nn.Linear(3, 2)) == {}


def test_to_dense_undoes_it() -> None:
    model = network()
    masks, keys = random_masks(model), model.state_dict().keys()
    dense = pruned(model, masks)
    back = to_dense(sparsify(model, masks))
    assert back.state_dict().keys() == keys
    assert {type(m) for m in back.modules()} == {type(m) for m in dense.modules()}
    assert all(map(torch.equal, back.state_dict().values(), dense.state_dict().values()))


def test_state_dict_has_the_mask_and_brings_it_back() -> None:
    first, second = network(), network()
    plain = first.state_dict().keys()
    masks = random_masks(first)
    sparsify(first, masks)
    others = {name: ~mask for name, mask in masks.items()}
    sparsify(second, others)
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    second(x)  # makes the other masks' forms, which must not outlive them
    added = first.state_dict().keys() - plain
    assert added == {
        name.replace(".weight", f".mask_{part}") for name in masks for part in ("words", "check")
    }
    second.load_state_dict(first.state_dict())
    torch.testing.assert_close(second.eval()(x), first.eval()(x))
    assert masks_of(second) == masks_of(first)
    third = sparsify(network(), others)
    third.load_state_dict(first.state_dict(), assign=True)
    torch.testing.assert_close(third.eval()(x), first.eval()(x))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_have_masks_of_their_own(copied: object) -> None:
    layer = MaskedLinear(5, 4, mask=torch.rand(4, 5) < 0.5)
    x = torch.randn(2, 5)
    before = layer(x).detach()
    twin = copied(layer)  # type: ignore[operator]
    assert torch.equal(twin(x), before)
    twin.mask.update_(torch.zeros(4, 5, dtype=torch.bool))
    assert torch.equal(twin(x), layer.bias.expand(2, 4))
    assert torch.equal(layer(x), before)


def test_layers_alone() -> None:
    mask = torch.rand(4, 3, 3, 3) < 0.5
    conv = MaskedConv2d(3, 4, 3, stride=2, padding="valid", mask=SparseMask(mask))
    x = torch.randn(2, 3, 9, 9)
    want = nn.functional.conv2d(x, conv.weight * mask, conv.bias, 2)
    torch.testing.assert_close(conv(x), want)
    full = MaskedLinear(3, 2, bias=False)
    torch.testing.assert_close(full(x[..., :3]), nn.functional.linear(x[..., :3], full.weight))
    assert full.mask.density == 1
    assert conv.double()(x.double()).dtype == torch.float64


def test_a_new_mask_takes_the_place_of_the_old() -> None:
    model = sparsify(nn.Sequential(nn.Linear(3, 2)), {"0.weight": torch.ones(2, 3, dtype=torch.bool)})
    sparsify(model, {"0.weight": torch.eye(2, 3).bool()})
    assert masks_of(model)["0.weight"].kept == 2


def test_a_mask_that_keeps_nothing_is_told() -> None:
    with pytest.warns(UserWarning, match=r"'0\.weight' keeps no weight: the layer's output is its bias"):
        model = sparsify(nn.Sequential(nn.Linear(3, 2)), {"0.weight": torch.zeros(2, 3, dtype=torch.bool)})
    assert torch.equal(model(torch.ones(1, 3)), model[0].bias[None])


def test_wrong_masks_leave_the_model_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"))
    fits = {"0.weight": torch.ones(2, 3, dtype=torch.bool)}
    for message, masks in {
        r"'1\.weight' must be the weight of an nn\.Linear or nn\.Conv2d, got ReLU": {
            "1.weight": fits["0.weight"]
        },
        r"'9\.weight' must be .* got no such module": {"9.weight": fits["0.weight"]},
        r"'0\.bias' must be the weight of": {"0.bias": torch.ones(2, dtype=torch.bool)},
        r"mask must have the shape of 0\.weight, \(2, 3\), got \(3, 2\)": {"0.weight": fits["0.weight"].t()},
        r"'2\.weight' must be a layer that pads with zeros, got 'circular'": {
            "2.weight": torch.ones(2, 2, 3, 3, dtype=torch.bool)
        },
    }.items():
        with pytest.raises(ValueError, match=message):
            sparsify(model, fits | masks)
        assert type(model[0]) is nn.Linear
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match=r"'0\.weight' is shared between '0' and '1'; untie it first"):
        sparsify(tied, {"0.weight": torch.ones(3, 3, dtype=torch.bool)})
    with pytest.raises(ValueError, match="padding_mode must be a layer that pads with zeros, got 'reflect'"):
        MaskedConv2d(2, 2, 3, padding=1, padding_mode="reflect")


ALL = torch.ones(2, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("error", "message", "masks"),
    [
        (TypeError, "masks must be a mapping of masks by parameter name, got list", [("1.weight", ALL)]),
        (TypeError, "masks must be a mapping of masks by parameter name, got NoneType", None),
        (TypeError, "masks must be a mapping of masks by parameter name, got dict", {1: ALL}),
        (
            TypeError,
            "masks: '1.weight': mask must be torch.bool, got torch.float32",
            {"1.weight": ALL.float()},
        ),
        (TypeError, "masks: '1.weight': mask must be a bool Tensor or a SparseMask", {"1.weight": [[True]]}),
        (TypeError, "masks: '1.weight': mask must be a dense tensor, got", {"1.weight": ALL.to_sparse()}),
        (ValueError, "masks: '1.weight': mask must have at least two dimensions", {"1.weight": ALL[0]}),
        (ValueError, "masks: '1.weight' is on the meta device", {"1.weight": ALL.to("meta")}),
    ],
)
def test_what_is_no_mask_is_named(error: type[Exception], message: str, masks: object) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    if isinstance(masks, dict):
        masks = {"0.weight": torch.eye(3) > 0} | masks
        with pytest.raises(error, match=message):
            compact(model, masks)
    with pytest.raises(error, match=message):
        sparsify(model, masks)
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear]


def test_what_is_no_model_is_named() -> None:
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got dict"):
        sparsify({}, {})


# ---- Mixed precision


def mixed_case() -> tuple[nn.Module, nn.Module, Tensor]:
    """A network with masked layers between dense ones, its twin without masks but with the same zeros, and images."""
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(12, 6, 1), nn.Flatten(), nn.Linear(6 * 36, 20), nn.ReLU(), nn.Linear(20, 4)),
    )
    names = ("3.weight", "5.weight", "7.weight", "9.weight")
    masked = sparsify(net, {name: torch.rand_like(net.get_parameter(name)) < 0.4 for name in names})
    return masked, to_dense(copy.deepcopy(masked)), torch.rand(5, 3, 8, 8)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_under_autocast_as_their_dense_twins(memory_format: torch.memory_format) -> None:
    masked, dense, x = mixed_case()
    found = []
    for net in (masked, dense):
        images = x.to(memory_format=memory_format).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            logits = net(images)
        assert logits.dtype == torch.bfloat16
        names, parameters = zip(*net.named_parameters(), strict=True)
        grads = torch.autograd.grad(logits.float().square().sum(), [images, *parameters])
        assert {g.dtype for g in grads} == {torch.float32}
        found.append((logits.float(), dict(zip(("images", *names), grads, strict=True))))
    (logits, grads), (want, wanted) = found
    torch.testing.assert_close(logits, want, rtol=0.02, atol=0.02)
    kept = {name: mask.to_dense() for name, mask in masks_of(masked).items()}
    for name, grad in grads.items():
        expected = wanted[name] * kept[name] if name in kept else wanted[name]
        torch.testing.assert_close(grad, expected, rtol=0.05, atol=0.02 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_the_dtypes_of_dense_layers(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for layer, x in (
        (MaskedLinear(8, 4, mask=torch.rand(4, 8) < 0.5), torch.randn(2, 8)),
        (MaskedConv2d(3, 4, 3, mask=torch.rand(4, 3, 3, 3) < 0.5), torch.randn(2, 3, 6, 6)),
    ):
        dense = to_dense(copy.deepcopy(layer))
        with torch.autocast("cpu", dtype):
            for given in (x, x.to(dtype)):
                got, want = layer(given), dense(given)
                assert got.dtype == want.dtype == dtype
                torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)
            got.float().sum().backward()
        assert layer.weight.grad.dtype == torch.float32
        with torch.autocast("cpu", dtype):
            assert layer.double()(x.double()).dtype == torch.float64  # torch's would be cast down


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_packed_layer_under_autocast(dtype: torch.dtype) -> None:
    layer, x = MaskedLinear(8, 4, mask=torch.rand(4, 8) < 0.5), torch.randn(2, 8)
    want = layer(x)
    pack(layer, max_density=1.0)
    with torch.autocast("cpu", dtype):
        got = layer(x)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), want, rtol=0.02, atol=0.02)
