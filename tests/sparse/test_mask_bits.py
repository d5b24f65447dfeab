"""Mask bits that other code copies, swaps, averages, moves and loads: the mask follows, or is refused by name."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from blokern.ops import SparseMask
from blokern.sparse import MaskedConv2d, MaskedLinear, masks_of, sparsify, to_dense

DAMAGED = "its bits have been averaged, or overwritten in part, or were never loaded"
#: With weights enough for a mask of more words than are looked at in every call.
SIZES = {"small": (12, 6), "large": (512, 600)}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def masked_layer(size: str = "small", seed: int = 1) -> nn.Module:
    inputs, outputs = SIZES[size]
    mask = torch.rand(outputs, inputs, generator=torch.Generator().manual_seed(seed)) < 0.3
    return nn.Sequential(MaskedLinear(inputs, outputs, mask=mask))


def network(seed: int = 1) -> nn.Module:
    net = nn.Sequential(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(45, 70))
    return sparsify(net, masks_for(net, seed))


def masks_for(net: nn.Module, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        n: torch.rand(p.shape, generator=generator) < 0.4 for n, p in net.named_parameters() if p.dim() > 1
    }


def want(model: nn.Module, masks: dict[str, Tensor], x: Tensor) -> Tensor:
    dense = to_dense(copy.deepcopy(model))
    return torch.func.functional_call(dense, {n: dense.get_parameter(n) * m for n, m in masks.items()}, (x,))


# ---- Writes that torch does not count


def by_buffers(to: nn.Module, of: nn.Module) -> None:
    for a, b in zip(to.buffers(), of.buffers(), strict=True):
        a.data.copy_(b.data)


def by_parameters_and_buffers(to: nn.Module, of: nn.Module) -> None:
    by_buffers(to, of)
    for a, b in zip(to.parameters(), of.parameters(), strict=True):
        a.data.copy_(b.data)


def by_state_dict(to: nn.Module, of: nn.Module) -> None:
    for a, b in zip(to.state_dict().values(), of.state_dict().values(), strict=True):
        a.data.copy_(b)


def by_memory(to: nn.Module, of: nn.Module) -> None:
    for a, b in zip(to.buffers(), of.buffers(), strict=True):
        a.data = b.data.clone()


def by_words_alone(to: nn.Module, of: nn.Module) -> None:
    to[0].mask_words.data.copy_(of[0].mask_words)


def by_counted_words(to: nn.Module, of: nn.Module) -> None:
    to[0].mask_words.copy_(of[0].mask.words)


COPIES = [by_buffers, by_parameters_and_buffers, by_state_dict, by_memory, by_words_alone, by_counted_words]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("write", COPIES)
def test_the_mask_follows_its_bits(write: Callable[[nn.Module, nn.Module], None], size: str) -> None:
    here, there = masked_layer(size, 1), masked_layer(size, 2)
    x = torch.randn(3, SIZES[size][0], requires_grad=True)
    there[0].weight.data.copy_(here[0].weight.data)
    masks = {"0.weight": there[0].mask.to_dense()}
    for _ in range(3):  # back and forth, each after calls that keep what they walk
        here(x).sum().backward()
        write(here, there)
        torch.testing.assert_close(here(x), want(here, masks, x))
        assert torch.equal(here[0].mask.to_dense(), masks["0.weight"])
        assert here[0].mask.kept == int(masks["0.weight"].sum())
        assert (here[0].weight[~masks["0.weight"]] == 0).all()
        (gradient,) = torch.autograd.grad(here(x).square().sum(), here[0].stored_weight)
        assert (gradient[~masks["0.weight"]] == 0).all()
        former = here[0].mask.to_dense()
        here[0].mask.update_(~former)
        assert torch.equal(here[0].mask.to_dense(), ~former)
        here[0].mask.update_(former)


def test_bits_written_by_hand_are_taken_where_they_are_seen() -> None:
    layer = masked_layer()[0]
    x = torch.randn(2, 12)
    layer(x)
    layer.mask_words.data[2] = 0b101
    expected = layer.mask.to_dense()
    assert expected[2].nonzero().flatten().tolist() == [0, 2]
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight * expected, layer.bias))
    layer.mask_words.data[1] = -1  # beyond the last column
    with pytest.raises(ValueError, match="words must have no bit beyond the 12 columns"):
        layer(x)


def test_conv_plans_follow_too() -> None:
    here, there = network(1), network(2)
    x = torch.rand(2, 2, 5, 5)
    for net in (here, there):
        net.eval()(x)
    by_parameters_and_buffers(here, there)
    torch.testing.assert_close(here(x), there(x))


# ---- Averages


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", [1, 2], ids=["equal masks", "other masks"])
@pytest.mark.parametrize(
    "average",
    [None, get_ema_multi_avg_fn(0.999), get_ema_multi_avg_fn(0.5)],
    ids=["swa", "ema .999", "ema .5"],
)
def test_averaged_bits_are_refused(average: Any, seed: int, size: str) -> None:
    model, other = masked_layer(size, 1), masked_layer(size, seed)
    averaged = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
    averaged.update_parameters(model)
    x = torch.randn(2, SIZES[size][0])
    averaged(x)  # the first is a copy
    with torch.no_grad():
        other[0].bias.add_(1.0)
    try:
        averaged.update_parameters(other)
    except RuntimeError:  # torch itself: integers have no averages
        return
    for use in (averaged, lambda x: averaged.module[0].weight, lambda x: averaged.module[0].mask.kept):
        with pytest.raises(ValueError, match=DAMAGED):
            use(x)
    averaged.module[0].mask.update_(other[0].mask)
    torch.testing.assert_close(averaged(x), want(averaged.module, {"0.weight": other[0].mask.to_dense()}, x))


def test_averages_of_state_dicts_are_refused() -> None:
    """As timm's ModelEma, and averages of checkpoints."""
    model, ema = network(1), network(1)
    for a, b in zip(ema.state_dict().values(), model.state_dict().values(), strict=True):
        a.copy_(0.9 * a + 0.1 * b)
    with pytest.raises(ValueError, match=DAMAGED):
        ema(torch.rand(2, 2, 5, 5))
    states = [network(1).state_dict() for _ in range(3)]
    mean = {name: (sum(s[name] for s in states) / 3).to(t.dtype) for name, t in states[0].items()}
    with pytest.raises(RuntimeError, match=rf"(?s)0\.mask_words: .*{DAMAGED}.*4\.mask_words"):
        network(2).load_state_dict(mean)
    half = {name: t // 2 if "mask_words" in name else t for name, t in states[0].items()}
    with pytest.raises(RuntimeError, match=DAMAGED):
        network(2).load_state_dict(half)


def test_averages_of_parameters_are_right() -> None:
    model = network(1)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    x = torch.rand(2, 2, 5, 5)
    dense = [copy.deepcopy(to_dense(copy.deepcopy(model)))]
    averaged.update_parameters(model)
    sparsify(model, masks_for(network(1), 3))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    dense.append(to_dense(copy.deepcopy(model)))
    averaged.update_parameters(model)
    masks = {name: mask.to_dense() for name, mask in masks_of(model).items()}
    mean = {n: 0.9 * p + 0.1 * dense[1].get_parameter(n) for n, p in dense[0].named_parameters()}
    mean = {n: p * masks.get(n, 1) for n, p in mean.items()}
    averaged.eval(), dense[1].eval()
    torch.testing.assert_close(averaged(x), torch.func.functional_call(dense[1], mean, (x,)))


# ---- Owners


def test_models_do_not_share_masks() -> None:
    masks = {n: SparseMask(m) for n, m in masks_for(network(), 5).items()}
    a, b, c = (sparsify(network(seed), masks) for seed in (1, 2, 3))
    d = copy.deepcopy(a)
    x = torch.rand(2, 2, 5, 5)
    before = [net.eval()(x) for net in (a, c, d)]
    b.load_state_dict(network(4).state_dict())
    masks["0.weight"].update_(torch.zeros(5, 2, 3, 3, dtype=torch.bool))
    masks_of(d)["4.weight"].update_(masks_of(d)["4.weight"])
    for net, y in zip((a, c, d), before, strict=True):
        assert torch.equal(net(x), y)
    words = [[buffer.data_ptr() for buffer in net.buffers()] for net in (a, b, c, d)]
    assert len({place for places in words for place in places}) == sum(map(len, words))


def test_shared_memory_and_processes() -> None:
    model, x = network(), torch.rand(2, 2, 5, 5)
    y = model.eval()(x)
    model.share_memory()
    assert torch.equal(model(x), y)
    assert all(t.is_shared() for t in model.state_dict().values())
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(x), y)
    assert masks_of(twin) == masks_of(model)


# ---- state_dicts


def test_a_dense_state_dict_loads_strictly() -> None:
    dense = to_dense(network(1))
    with torch.no_grad():
        dense[0].weight.fill_(2.0)
    for assign in (False, True):
        masked = network(2)
        masks = {name: mask.to_dense() for name, mask in masks_of(masked).items()}
        state = copy.deepcopy(dense.state_dict())
        masked.load_state_dict(state, assign=assign)
        assert {name: mask.to_dense().equal(masks[name]) for name, mask in masks_of(masked).items()} == {
            "0.weight": True,
            "4.weight": True,
        }
        assert torch.equal(masked[0].weight, 2.0 * masks["0.weight"])
        assert torch.equal(state["0.weight"], dense[0].weight)  # who gave them keeps them
        x = torch.rand(2, 2, 5, 5)
        torch.testing.assert_close(masked.eval()(x), want(dense.eval(), masks, x))


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_of_another_mask(assign: bool) -> None:
    first, second = network(1), network(2)
    x = torch.rand(2, 2, 5, 5)
    second(x).sum().backward()
    second.load_state_dict(copy.deepcopy(first.state_dict()), assign=assign)
    torch.testing.assert_close(second.eval()(x), first.eval()(x))
    assert all(torch.equal(a, b) for a, b in zip(second.parameters(), first.parameters(), strict=True))
    assert masks_of(second) == masks_of(first)


def test_a_state_dict_without_checks_as_older_files_have_it() -> None:
    first, second = network(1), network(2)
    old = {name: t for name, t in first.state_dict().items() if "mask_check" not in name}
    old["0.weight"] = old["0.weight"] + 1.0  # with pruned values
    second.load_state_dict(old)
    assert masks_of(second) == masks_of(first)
    assert torch.equal(second[0].weight, old["0.weight"] * first[0].mask.to_dense())
    x = torch.rand(2, 2, 5, 5)
    second.eval()(x)
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.mask_words"):
        second.load_state_dict(old | {"0.mask_words": old["0.mask_words"][:3]})


# ---- Places


def test_there_and_back_by_the_meta_device() -> None:
    model, x = network(1), torch.rand(2, 2, 5, 5)
    state = copy.deepcopy(model.state_dict())
    y = model.eval()(x)
    model.to("meta")
    assert model(x.to("meta")).shape == y.shape
    assert model(x.to("meta")).is_meta
    model.to_empty(device="cpu")
    for t in model.state_dict().values():  # as memory that was used before
        t.fill_(7)
    with pytest.raises(ValueError, match=DAMAGED):
        model(x)
    model.load_state_dict(state)
    assert torch.equal(model(x), y)


def test_networks_that_are_built_without_memory() -> None:
    model, x = network(1).eval(), torch.rand(2, 2, 5, 5)
    with torch.device("meta"):
        net = nn.Sequential(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(45, 70))
        alone = MaskedConv2d(2, 5, 3)
    sparsify(net, masks_for(network(), 3)).eval()
    assert alone(x.to("meta")).shape == (2, 5, 3, 3)
    with torch.no_grad():
        assert net(x.to("meta")).shape == (2, 70)
    for assign in (True, False):
        twin = copy.deepcopy(net)
        twin = twin if assign else twin.to_empty(device="cpu")
        twin.load_state_dict(copy.deepcopy(model.state_dict()), assign=assign)
        assert torch.equal(twin(x), model(x))


@torch.inference_mode()
def test_under_inference_mode() -> None:
    model, x = network(1).eval(), torch.rand(2, 2, 5, 5)
    y = model(x)
    assert torch.equal(model.double()(x.double()).float(), y) or torch.allclose(model(x.double()).float(), y)
    assert (model[0].weight[~model[0].mask.to_dense()] == 0).all()
    masks_of(model)["0.weight"].update_(torch.ones(5, 2, 3, 3, dtype=torch.bool))
    assert model[0].mask.density == 1
