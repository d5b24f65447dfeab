"""``blokern spectrum``."""

import json

import pytest
import torch
import torch.nn.functional as F
from commands import error

from blokern import cli, data, models
from blokern.bilevel import BiP, BiPSettings, Plain, PlainSettings, Trainer, TrainSettings, checkpoint
from blokern.curvature import GGNOperator, HessianOperator
from blokern.curvature.vectors import flatten, unflatten

#: As a run's recipe names its data, with fewer images than the data set has.
DATA = {"name": "synthetic:1x8x8x3", "data_dir": None, "val_fraction": 0.25, "train_limit": 60}
QUICK = ["--steps=6", "--samples=2", "--at-once=2", "--batch-size=20", "--threads=1"]


def train(out, recipe):
    where = {key: value for key, value in DATA.items() if key != "name"}
    splits = data.load(DATA["name"], **where, seed=7)
    settings = TrainSettings(epochs=1, batch_size=20, val_steps=0, seed=7)
    model = models.build("small_cnn", num_classes=3, in_channels=1, width=1)
    rule = Plain(model, settings.optimizer(model), PlainSettings())
    Trainer(rule, splits, settings, out, recipe=recipe).fit()
    return model.eval(), splits.train


@pytest.fixture
def run(tmp_path):
    network = {"name": "small_cnn", "num_classes": 3, "in_channels": 1, "width": 1}
    model, images = train(tmp_path / "run", {"model": network, "data": DATA})
    return tmp_path / "run" / "last.pt", model, images


def matrix(kind, model, images):
    """All of it, in float64."""
    batch = images.images.double() / 255, images.labels
    operator = kind(model.double(), F.cross_entropy, [batch])
    unit = unflatten(torch.eye(operator.shape[0], dtype=torch.float64), operator.parameters)
    return flatten(operator @ unit, operator.parameters)


@pytest.mark.parametrize(("curvature", "kind"), [("hessian", HessianOperator), ("ggn", GGNOperator)])
def test_spectrum_is_that_of_the_matrix_over_the_runs_images(run, tmp_path, capsys, curvature, kind):
    path, model, images = run
    command = ["spectrum", str(path), f"--curvature={curvature}", *QUICK, "--steps=20", "--samples=20"]
    assert (
        cli.main([*command, "--at-once=20", "--batch-size=30", "--json", str(tmp_path / "result.json")]) == 0
    )
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "result.json").read_text())
    exact = matrix(kind, model, images)
    values = torch.linalg.eigvalsh(exact)
    assert (result["images"], result["parameters"]) == (45, len(values)) == (len(images), len(exact))
    scale = values.abs().max().item()
    for found, true in zip(result["largest"], values.flip(0)[:3].tolist(), strict=False):
        assert found["value"] == pytest.approx(true, abs=found["error"] + 1e-4 * scale)
    smallest = result["smallest"][0]
    assert smallest["value"] == pytest.approx(values[0].item(), abs=smallest["error"] + 1e-3 * scale)
    trace = result["trace"]
    assert trace["value"] == pytest.approx(exact.trace().item(), abs=5 * trace["standard_error"])
    density = result["density"]
    mean = sum(v * w for v, w in zip(density["values"], density["weights"], strict=True))
    assert len(values) * mean == pytest.approx(exact.trace().item(), rel=0.5)
    assert f"largest eigenvalues:  {result['largest'][0]['value']:.4g} ± " in printed
    assert "over 45 training images of synthetic:1x8x8x3" in printed
    assert (path.parent / "spectrum.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_spectrum_of_some_images_is_repeatable(run, tmp_path, capsys):
    path, _, _ = run
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file in files:
        command = ["spectrum", str(path), *QUICK, "--images=25", f"--png={tmp_path / 'a.png'}", "--top=100"]
        assert cli.main([*command, "--json", str(file)]) == 0
    assert files[0].read_bytes() == files[1].read_bytes()
    result = json.loads(files[0].read_text())
    assert result["images"] == 25
    assert (len(result["largest"]), len(result["smallest"])) == (3, 3)  # six steps, six values
    assert (tmp_path / "a.png").exists()
    assert not (path.parent / "spectrum.png").exists()


def test_spectrum_names_what_is_wrong(run, tmp_path, capsys):
    path, _, _ = run
    assert "missing.pt" in error(capsys, "spectrum", tmp_path / "missing.pt", code=1)
    assert "images must be in [1, 45]" in error(capsys, "spectrum", path, "--images=46")
    assert "did you mean 'ggn'" in error(capsys, "spectrum", path, "--curvature=gng")
    assert "at_once must be at least 1, got 0" in error(capsys, "spectrum", path, "--at-once=0")
    torch.save({"a": torch.zeros(1)}, tmp_path / "foreign.pt")
    assert "not a checkpoint of blokern" in error(capsys, "spectrum", tmp_path / "foreign.pt")
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "damaged.pt").write_bytes(damaged)
    assert "its checksum does not match" in error(capsys, "spectrum", tmp_path / "damaged.pt")
    payload = checkpoint.load(path)
    next(iter(payload["model"].values())).fill_(torch.nan)
    checkpoint.save(tmp_path / "nan.pt", payload)
    assert "is the first that is not finite" in error(capsys, "spectrum", tmp_path / "nan.pt", *QUICK, code=1)
    no_folder = error(capsys, "spectrum", path, *QUICK, "--png", tmp_path / "no" / "a.png", code=1)
    assert str(tmp_path / "no" / "a.png") in no_folder


def test_a_run_that_does_not_name_its_data_is_explained(tmp_path, capsys):
    network = {"name": "small_cnn", "num_classes": 3, "in_channels": 1, "width": 1}
    train(tmp_path / "a", {"model": network})
    message = error(capsys, "spectrum", tmp_path / "a" / "last.pt")
    assert "does not say what data its network was trained on" in message
    train(tmp_path / "b", {})
    assert "does not say how its network is built" in error(capsys, "spectrum", tmp_path / "b" / "last.pt")


def test_spectrum_of_a_pruned_network(tmp_path):
    network = {"name": "small_cnn", "num_classes": 3, "in_channels": 1, "width": 1}
    splits = data.load(DATA["name"], train_limit=60)
    settings = TrainSettings(epochs=1, batch_size=20, val_steps=0)
    model = models.build(**network)
    rule = BiP(model, settings.optimizer(model), BiPSettings(density=0.3))
    recipe = {"model": network, "data": {"name": DATA["name"], "train_limit": 60}}
    Trainer(rule, splits, settings, tmp_path, recipe=recipe).fit()
    path = tmp_path / "last.pt"
    command = ["spectrum", str(path), *QUICK, "--steps=12", "--json", str(tmp_path / "result.json")]
    assert cli.main(command) == 0
    sparse = checkpoint.load_model(checkpoint.load(path), path).eval()
    exact = matrix(HessianOperator, sparse, splits.train)
    assert int((exact == 0).all(1).sum()) > 100  # pruned weights have no curvature
    values = torch.linalg.eigvalsh(exact)
    found = json.loads((tmp_path / "result.json").read_text())["largest"][0]
    scale = values.abs().max().item()
    assert found["value"] == pytest.approx(values[-1].item(), abs=found["error"] + 1e-3 * scale)
