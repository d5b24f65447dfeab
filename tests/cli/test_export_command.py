"""``blokern export``."""

import pytest
import torch
from checkpoints import NETWORK, half_of_the_filters, pruned, single_weights
from commands import error

from blokern import cli, models
from blokern.bilevel import checkpoint
from blokern.bilevel.export import load_sparse


@pytest.fixture
def network(tmp_path):
    """A checkpoint, whose masks are whole filters."""
    checkpoint.save(tmp_path / "best.pt", pruned(half_of_the_filters))
    return tmp_path / "best.pt"


@pytest.mark.parametrize(
    ("form", "load"),
    [
        ("dense", torch.load),
        ("sparse", load_sparse),
        ("compacted", lambda file: torch.export.load(file).module()(torch.zeros(3, 1, 8, 8))),
    ],
)
def test_export_writes_a_form_and_says_how_large_it_is(network, tmp_path, capsys, form, load):
    file = tmp_path / "small.pt2"
    assert cli.main(["export", str(network), f"--form={form}", "--out", str(file)]) == 0
    weights = models.build(**NETWORK).state_dict().values()
    sizes = [f"{size:,}" for size in (file.stat().st_size, sum(weight.nbytes for weight in weights))]
    said, kept = capsys.readouterr().out.splitlines()
    assert said == f"{file}: {sizes[0]} bytes; the dense network's weights take {sizes[1]}"
    assert kept == "50 % of the 20,488 masked weights kept, 50.85 % of all 20,843 parameters"
    assert len(load(file))


def test_export_takes_the_images_shape(network, tmp_path, capsys):
    command = ["export", str(network), "--form=compacted", "--out", str(tmp_path / "small.pt2")]
    assert cli.main([*command, "--input-shape=1,9,12"]) == 0
    assert torch.export.load(tmp_path / "small.pt2").module()(torch.zeros(1, 1, 9, 12)).shape == (1, 3)
    before = (tmp_path / "small.pt2").read_bytes()
    for shape, message in {
        "3,8,8": f"{network} takes no images of input_shape (3, 8, 8): ",
        "8,8": "expected three numbers >= 1, such as 3,32,32",
        "1,8,0": "expected three numbers >= 1, such as 3,32,32",
        "1,8,x": "'x'",
    }.items():
        assert message in error(capsys, *command, f"--input-shape={shape}")
    assert (tmp_path / "small.pt2").read_bytes() == before


def test_export_says_why_a_network_is_not_compacted(tmp_path, capsys):
    source, out = tmp_path / "a.pt", tmp_path / "small.pt2"
    for masking, why in ((single_weights, "its masks free no channel"), (None, "it has no masks")):
        checkpoint.save(source, pruned(masking))
        message = error(capsys, "export", source, "--form=compacted", "--out", out)
        assert message == f"{source} cannot be compacted: {why}"
    checkpoint.save(source, pruned(half_of_the_filters, data=None))
    message = error(capsys, "export", source, "--form=compacted", "--out", out)
    assert "give input_shape, such as 3,32,32" in message
    assert not out.exists()


def test_export_needs_a_checkpoint_with_a_recipe(tmp_path, capsys):
    (tmp_path / "a.pt").write_bytes(b"nothing")
    assert "not a checkpoint of blokern" in error(
        capsys, "export", tmp_path / "a.pt", "--out", tmp_path / "b"
    )
    checkpoint.save(tmp_path / "a.pt", {"model": {}})
    for form in ("dense", "compacted", "sparse"):
        message = error(capsys, "export", tmp_path / "a.pt", f"--form={form}", "--out", tmp_path / "b")
        assert "does not say how its network is built" in message
