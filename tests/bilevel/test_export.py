"""Exported networks compute as the masked ones do, also without blokern; files that are no exports are told."""

import subprocess
import sys

import pytest
import safetensors.torch
import torch
from checkpoints import (
    NETWORK,
    filters_and_weights,
    half_of_the_channels,
    half_of_the_filters,
    pruned,
    single_weights,
)
from torch import nn

from blokern import models
from blokern.bilevel import checkpoint
from blokern.bilevel.checkpoint import CheckpointError
from blokern.bilevel.export import load_sparse, save_compacted, save_dense, save_sparse
from blokern.sparse import masks_of, to_dense


def outputs(content, x):
    with torch.no_grad():
        return checkpoint.load_model(content, "a.pt").eval()(x)


# --- What is written ----------------------------------------------------------------------------------------


def test_dense_is_a_state_dict_that_computes_the_same(tmp_path):
    content = pruned(single_weights)
    save_dense(content, "a.pt", tmp_path / "dense.pt")
    model = models.build(**NETWORK)
    model.load_state_dict(torch.load(tmp_path / "dense.pt", weights_only=True))
    for name, mask in masks_of(checkpoint.load_model(content, "a.pt")).items():
        assert torch.equal(model.get_parameter(name) != 0, mask.to_dense())
    x = torch.rand(4, 1, 8, 8)
    torch.testing.assert_close(model.eval()(x), outputs(content, x))


def test_sparse_comes_back_bit_for_bit(tmp_path):
    content = pruned(single_weights)
    save_sparse(content, "a.pt", tmp_path / "sparse")
    model = checkpoint.load_model(content, "a.pt")
    back = checkpoint.load_model(load_sparse(tmp_path / "sparse"), "sparse")
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
    content = pruned(masking, NETWORK | {"width": 32})
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
    content = pruned(half_of_the_filters, NETWORK | {"in_channels": 3}, data=None)
    save_compacted(content, "a.pt", tmp_path / "small.pt2", (3, 16, 12))
    assert models.__file__.encode() not in (tmp_path / "small.pt2").read_bytes()
    x = torch.rand(5, 3, 16, 12)
    torch.save(x, tmp_path / "x.pt")
    subprocess.run([sys.executable, "-c", ELSEWHERE], cwd=tmp_path, check=True)
    one, five = torch.load(tmp_path / "y.pt")
    torch.testing.assert_close(one, outputs(content, x[:1]))
    torch.testing.assert_close(five, outputs(content, x))


# --- What is refused ----------------------------------------------------------------------------------------


class ReadsValues(nn.Sequential):
    def forward(self, x):
        x = super().forward(x)
        return x if x.sum() > 0 else -x


def reads_values(num_classes, in_channels, mean=None, std=None):
    return ReadsValues(nn.Conv2d(in_channels, 4, 3), nn.Flatten(), nn.Linear(144, num_classes))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: pruned(single_weights), r"a\.pt cannot be compacted: its masks free no channel"),
        (lambda: pruned(None), r"a\.pt cannot be compacted: it has no masks"),
        (
            lambda: pruned(half_of_the_filters, {"name": "reads_values", "num_classes": 3, "in_channels": 1}),
            r"a\.pt: model: it cannot be compacted: its forward reads a number from a tensor that depends on the input",
        ),
        (lambda: pruned(half_of_the_filters, data=None), r"a\.pt does not say .* give input_shape, such as 3,32,32"),
        (lambda: pruned(half_of_the_filters, data="mine"), r"a\.pt .* give input_shape"),
        (
            lambda: pruned(half_of_the_filters, data="cifar10"),
            r"a\.pt takes no images of input_shape \(3, 32, 32\): .*channels",
        ),
    ],
    ids=["single weights", "dense", "layer", "no data", "other data", "channels"],
)  # fmt: skip
def test_what_cannot_be_compacted_is_named_and_leaves_no_file(tmp_path, monkeypatch, content, message):
    monkeypatch.setitem(models.BUILDERS, "reads_values", reads_values)
    with pytest.raises(CheckpointError, match=message):
        save_compacted(content(), "a.pt", tmp_path / "small.pt2")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none/small\.pt2"):
        save_compacted(pruned(half_of_the_filters), "a.pt", tmp_path / "none" / "small.pt2")


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
    save_sparse(pruned(single_weights), "a.pt", file)
    with safetensors.safe_open(file, "pt") as stored:
        tensors, metadata = {name: stored.get_tensor(name) for name in stored.keys()}, stored.metadata()  # noqa: SIM118
    tensors["head.1.weight"] = tensors["head.1.weight"][:-1]
    safetensors.torch.save_file(tensors, file, metadata)
    with pytest.raises(CheckpointError, match=r"a masked weight must have \d+ values to fit its mask"):
        load_sparse(file)

    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"pip install 'blokern\[export\]'"):
        load_sparse(file)
