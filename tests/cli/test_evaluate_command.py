"""``blokern evaluate``."""

import json

import pytest
import torch
from commands import error

from blokern import cli, data, models
from blokern.bilevel import BiP, BiPSettings, Plain, PlainSettings, Trainer, TrainSettings, checkpoint
from blokern.cli import evaluate
from blokern.sparse import to_dense


def test_evaluate_attacks_the_test_images(trained, tmp_path, capsys):
    result_file = tmp_path / "result.json"
    command = ["evaluate", str(trained / "best.pt"), "--test-limit=30", "--steps=3", "--restarts=2"]
    assert cli.main([*command, "--json", str(result_file)]) == 0
    printed = capsys.readouterr().out
    result = json.loads(result_file.read_text())
    assert result["attack"] == "PGD-3-2"
    assert (result["eps"], result["samples"], result["data"]) == (0.1, 30, "synthetic:1x8x8x3")
    assert 0 <= result["robust_accuracy"] <= result["clean_accuracy"] <= 1
    assert f"SA {result['clean_accuracy']:.2%}, RA {result['robust_accuracy']:.2%} (PGD-3-2, linf" in printed


def test_evaluate_rebuilds_the_network_as_it_was(trained, tmp_path):
    result_file = tmp_path / "result.json"
    command = ["evaluate", str(trained / "last.pt"), "--attack=fgsm", "--json", str(result_file)]
    assert cli.main(command) == 0
    payload = checkpoint.load(trained / "last.pt")
    model = models.build(**payload["recipe"]["model"])
    model.load_state_dict(payload["model"])
    model.eval()
    test = data.load("synthetic:1x8x8x3").test
    with torch.no_grad():
        right = model(test.images / 255).argmax(1) == test.labels
    assert json.loads(result_file.read_text())["clean_accuracy"] == pytest.approx(
        right.double().mean().item()
    )


def test_evaluate_rebuilds_a_pruned_network(tmp_path):
    network = {"name": "small_cnn", "num_classes": 3, "in_channels": 1, "width": 4}
    recipe = {"model": network, "data": {"name": "synthetic:1x8x8x3"}}
    splits = data.load("synthetic:1x8x8x3", train_limit=100)
    settings = TrainSettings(epochs=1, batch_size=20, val_steps=1)
    model = models.build(**network)
    rule = BiP(model, settings.optimizer(model), BiPSettings(density=0.3))
    Trainer(rule, splits, settings, tmp_path, recipe=recipe).fit()
    result_file = tmp_path / "result.json"
    command = [
        "evaluate",
        str(tmp_path / "last.pt"),
        "--attack=fgsm",
        "--eps=0.1",
        "--json",
        str(result_file),
    ]
    assert cli.main(command) == 0
    test = data.load("synthetic:1x8x8x3").test
    with torch.no_grad():
        right = to_dense(model).eval()(test.images / 255).argmax(1) == test.labels
    assert json.loads(result_file.read_text())["clean_accuracy"] == pytest.approx(
        right.double().mean().item()
    )


@pytest.mark.parametrize("attack", evaluate.ATTACKS)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_every_attack_runs(trained, attack, norm):
    options = ["--test-limit=20", "--steps=3", "--restarts=1", f"--attack={attack}", f"--norm={norm}"]
    options += ["--eps=0.5"] if norm == "l2" else []
    assert cli.main(["evaluate", str(trained / "best.pt"), *options]) == 0


def test_evaluate_names_what_is_wrong(trained, tmp_path, capsys):
    best = trained / "best.pt"
    assert "missing.pt" in error(capsys, "evaluate", tmp_path / "missing.pt", code=1)
    assert "did you mean 'l2'" in error(capsys, "evaluate", best, "--norm=l3")
    assert "has 3 channels and 10 classes" in error(capsys, "evaluate", best, "--data=synthetic")
    torch.save({"a": torch.zeros(1)}, tmp_path / "foreign.pt")
    assert "not a checkpoint of blokern" in error(capsys, "evaluate", tmp_path / "foreign.pt")


def test_a_checkpoint_of_the_library_without_a_recipe_is_explained(tmp_path, capsys):
    splits = data.load("synthetic:1x8x8x3", train_limit=100)
    settings = TrainSettings(epochs=1, batch_size=20, val_steps=1)
    model = models.small_cnn(num_classes=3, in_channels=1, width=1)
    Trainer(Plain(model, settings.optimizer(model), PlainSettings()), splits, settings, tmp_path).fit()
    assert "does not say how its network is built" in error(capsys, "evaluate", tmp_path / "best.pt")
