"""Exported networks compute as the masked ones do, also without blokern; files that are no exports are told."""

import subprocess
import sys

import pytest
import safetensors.torch
import torch
from torch import nn

from blokern import models, ops
from blokern.bilevel import checkpoint
from blokern.bilevel.checkpoint import CheckpointError
from blokern.bilevel.export import load_sparse, save_compacted, save_dense, save_sparse
from blokern.bilevel.masking import prunable
from blokern.sparse import masks_of, sparsify, to_dense

NETWORK = {"name": "small_cnn", "num_classes": 3, "in_channels": 1, "width": 8}
CLASSES = (
    "head.3.weight",
    "head.2.weight",
)  # small_cnn's and the ResNets' last layers, which keep all filters


def payload(masking, network=NETWORK, recipe=None):
    """A checkpoint's content; its network's layers are pruned by `masking`, and its BatchNorms have seen images."""
    torch.manual_seed(0)
    model = models.build(**network)
    model(torch.rand(8, network["in_channels"], 8, 8))
    weights = {name: weight for name, weight in prunable(model).items() if name not in CLASSES}
    sparsify(model, {name: masking(weight) for name, weight in weights.items()} if masking else {})
    data = {"data": {"name": "digits"}} if recipe is None else recipe
    return {"recipe": {"model": network, **data}, "model": model.state_dict()}


def half_of_the_filters(weight):
    return ops.filter_mask(weight, 0.5)


def half_of_the_channels(weight):
    return ops.channel_mask(weight, 0.5) if weight.shape[1] > 3 else torch.ones_like(weight).bool()


def filters_and_weights(weight):
    """Masks remain in the compacted layers."""
    return ops.filter_mask(weight, 0.5) & ops.topk_mask(weight.abs(), 0.6)


def single_weights(weight):
    return ops.topk_mask(weight.abs(), 0.3)


def outputs(content, x):
    with torch.no_grad():
        return checkpoint.load_model(content, "a.pt").eval()(x)


# --- What is written ----------------------------------------------------------------------------------------


def test_dense_is_a_state_dict_that_computes_the_same(tmp_path):
    content = payload(single_weights)
    save_dense(content, "a.pt", tmp_path / "dense.pt")
    model = models.build(**NETWORK)
    model.load_state_dict(torch.load(tmp_path / "dense.pt", weights_only=True))
    kept = sum(mask.kept for mask in masks_of(checkpoint.load_model(content, "a.pt")).values())
    assert sum(int((model.get_parameter(n) != 0).sum()) for n in prunable(model) if n not in CLASSES) == kept
    x = torch.rand(4, 1, 8, 8)
    torch.testing.assert_close(model.eval()(x), outputs(content, x))


def test_sparse_comes_back_bit_for_bit(tmp_path):
    content = payload(single_weights)
    save_sparse(content, "a.pt", tmp_path / "sparse")
    model, back = (
        checkpoint.load_model(content, "a.pt"),
        checkpoint.load_model(load_sparse(tmp_path / "sparse"), "b"),
    )
    with safetensors.safe_open(tmp_path / "sparse", "pt") as stored:
        for name, mask in masks_of(model).items():
            assert stored.get_tensor(name).shape == (mask.kept,)
    assert masks_of(back) == masks_of(model)
    first, second = to_dense(back).state_dict(), to_dense(model).state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize(
    ("masking", "share"),  # a linear layer's masked inputs free a channel only if they are all of its pixels
    [(half_of_the_filters, 0.5), (half_of_the_channels, 0.95), (filters_and_weights, 0.5)],
)
def test_compacted_computes_the_same_for_any_batch_and_is_smaller(tmp_path, masking, share):
    content = payload(masking, NETWORK | {"width": 32})
    save_dense(content, "a.pt", tmp_path / "dense.pt")
    save_compacted(content, "a.pt", tmp_path / "small.pt2")
    assert (tmp_path / "small.pt2").stat().st_size < share * (tmp_path / "dense.pt").stat().st_size
    program = torch.export.load(tmp_path / "small.pt2")
    for count in (1, 2, 5):
        x = torch.rand(count, 1, 8, 8)
        torch.testing.assert_close(program.module()(x), outputs(content, x))


ELSEWHERE = """
import sys, torch
sys.modules["blokern"] = None  # importing it fails
x = torch.load("x.pt")
torch.save([torch.export.load("small.pt2").module()(x[:n]) for n in (1, 5)], "y.pt")
"""


def test_compacted_needs_no_blokern_and_takes_a_given_shape(tmp_path):
    content = payload(half_of_the_filters, NETWORK | {"in_channels": 3}, recipe={})
    save_compacted(content, "a.pt", tmp_path / "small.pt2", (3, 16, 12))
    assert models.__file__.encode() not in (tmp_path / "small.pt2").read_bytes()
    x = torch.rand(5, 3, 16, 12)
    torch.save(x, tmp_path / "x.pt")
    subprocess.run([sys.executable, "-c", ELSEWHERE], cwd=tmp_path, check=True)
    one, five = torch.load(tmp_path / "y.pt")
    torch.testing.assert_close(one, outputs(content, x[:1]))
    torch.testing.assert_close(five, outputs(content, x))


# --- What is refused ----------------------------------------------------------------------------------------


def grouped(num_classes, in_channels, mean=None, std=None):
    return nn.Sequential(
        nn.Conv2d(in_channels, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(144, num_classes)
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: payload(single_weights), r"a\.pt cannot be compacted: its masks free no channel"),
        (lambda: payload(None), r"a\.pt cannot be compacted: it has no masks"),
        (
            lambda: payload(half_of_the_filters, {"name": "grouped", "num_classes": 3, "in_channels": 1}),
            r"a\.pt: model: '1' cannot be compacted: what it does to channels is not known",
        ),
        (lambda: payload(half_of_the_filters, recipe={}), r"a\.pt does not say .* give input_shape, such as 3,32,32"),
        (lambda: payload(half_of_the_filters, recipe={"data": {"name": "mine"}}), r"a\.pt .* give input_shape"),
        (
            lambda: payload(half_of_the_filters, recipe={"data": {"name": "cifar10"}}),
            r"a\.pt takes no images of input_shape \(3, 32, 32\): .*channels",
        ),
    ],
    ids=["single weights", "dense", "layer", "no data", "other data", "channels"],
)  # fmt: skip
def test_what_cannot_be_compacted_is_named_and_leaves_no_file(tmp_path, monkeypatch, content, message):
    monkeypatch.setitem(models.BUILDERS, "grouped", grouped)
    with pytest.raises(CheckpointError, match=message):
        save_compacted(content(), "a.pt", tmp_path / "small.pt2")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none/small\.pt2"):
        save_compacted(payload(half_of_the_filters), "a.pt", tmp_path / "none" / "small.pt2")


def test_a_sparse_file_that_is_not_one_is_named(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="missing"):
        load_sparse(tmp_path / "missing")
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(CheckpointError, match="text is no safetensors file, or is damaged"):
        load_sparse(tmp_path / "text")
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "foreign")
    with pytest.raises(CheckpointError, match="foreign is no export of blokern: its kind is None"):
        load_sparse(tmp_path / "foreign")

    file = tmp_path / "pruned"
    save_sparse(payload(single_weights), "a.pt", file)
    with safetensors.safe_open(file, "pt") as stored:
        tensors, metadata = {name: stored.get_tensor(name) for name in stored.keys()}, stored.metadata()  # noqa: SIM118
    tensors["head.1.weight"] = tensors["head.1.weight"][:-1]
    safetensors.torch.save_file(tensors, file, metadata)
    with pytest.raises(CheckpointError, match=r"head.1.weight must have \d+ values to fit its mask"):
        load_sparse(file)

    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"pip install 'blokern\[export\]'"):
        load_sparse(file)
