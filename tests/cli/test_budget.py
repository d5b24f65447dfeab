"""Nobody is attacked with a budget that nobody chose."""

import json

import pytest
import torch
from commands import QUICK, error

from blokern import cli
from blokern.bilevel import ThreatModel, checkpoint
from blokern.cli.source import Source

SHORT = ["--test-limit=20", "--steps=2", "--restarts=1", "--threads=1"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A robust network, one pruned from it, and one that was trained without an attack."""
    out = tmp_path_factory.mktemp("runs")
    no_attack = [word for word in QUICK if not word.startswith(("--eps", "--val-steps"))]
    dense = f"--dense={out / 'robust' / 'best.pt'}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("blokern.bilevel.Trainer._draw", lambda trainer: None)
        for command in (
            ["train", "fast-at", "--out", str(out / "robust"), "--epochs=1", *QUICK],
            ["prune", "omp", "--density=0.3", dense, "--out", str(out / "pruned"), "--epochs=1", *no_attack],
            ["train", "plain", "--out", str(out / "plain"), "--epochs=1", *QUICK],
        ):
            assert cli.main(command) == 0
    return out


def evaluated(path, tmp_path, *options):
    (tmp_path / "a.json").unlink(missing_ok=True)
    assert cli.main(["evaluate", str(path), *SHORT, "--json", str(tmp_path / "a.json"), *options]) == 0
    return json.loads((tmp_path / "a.json").read_text())


def test_a_pruned_network_is_attacked_as_its_dense_one_was_trained(runs, tmp_path, capsys):
    best = runs / "pruned" / "omp" / "density-0.3" / "seed-0" / "best.pt"
    assert Source.open(best).threat == ThreatModel(eps=0.1)
    assert evaluated(best, tmp_path)["eps"] == 0.1
    assert "linf, eps 0.1, as trained)" in capsys.readouterr().out
    assert evaluated(best, tmp_path, "--eps=8/255")["eps"] == 8 / 255
    assert "as trained" not in capsys.readouterr().out


def test_where_none_was_trained_or_in_another_norm_eps_is_demanded(runs, tmp_path, capsys):
    plain, robust = runs / "plain" / "best.pt", runs / "robust" / "best.pt"
    message = error(capsys, "evaluate", plain, *SHORT)
    assert message.startswith(f"eps is needed for {plain}: its training met no attack")
    assert "give --eps, such as --eps 8/255" in message
    message = error(capsys, "evaluate", robust, *SHORT, "--norm=l2")
    assert "it was trained for linf, eps 0.1, which says nothing of l2; give --eps" in message
    assert evaluated(plain, tmp_path, "--eps=0.2")["eps"] == 0.2
    told = evaluated(robust, tmp_path, "--norm=l2", "--eps=3")
    assert (told["norm"], told["eps"]) == ("l2", 3.0)


def test_what_comes_next_is_said_with_the_budget_that_it_needs(tmp_path, capsys):
    out = tmp_path / "a run"
    assert cli.main(["train", "plain", "--out", str(out), "--epochs=1", *QUICK, "--eps=8/255"]) == 0
    assert f"next: blokern evaluate '{out}/best.pt' --eps 8/255" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["train", "evaluate", "compare"])
def test_a_budget_in_255ths_is_asked_about(runs, tmp_path, capsys, command):
    argv = {
        "train": ["train", "fast-at", "--out", tmp_path / "out", *QUICK],
        "evaluate": ["evaluate", runs / "robust" / "best.pt", *SHORT],
        "compare": ["compare", "fast-at", "--out", tmp_path / "out", *QUICK],
    }[command]
    assert "do you mean 8/255?" in error(capsys, *argv, "--eps=8")
    assert not (tmp_path / "out").exists()


def test_a_network_that_diverged_is_not_scored(runs, tmp_path, capsys):
    payload = checkpoint.load(runs / "robust" / "best.pt")
    name = list(payload["model"])[2]
    payload["model"][name].fill_(torch.nan)
    checkpoint.save(tmp_path / "nan.pt", payload)
    message = error(capsys, "evaluate", tmp_path / "nan.pt", *SHORT, code=1)
    assert message == f"{tmp_path / 'nan.pt'} holds a network that diverged: {name} is not finite"
    command = ["prune", "omp", "--density=0.3", "--out", tmp_path / "out", "--epochs=1"]
    command += [word for word in QUICK if not word.startswith(("--eps", "--val-steps"))]
    assert "diverged" in error(capsys, *command, f"--dense={tmp_path / 'nan.pt'}", code=1)


def test_neither_is_one_whose_finite_weights_overflow(runs, tmp_path, capsys):
    payload = checkpoint.load(runs / "robust" / "best.pt")
    for weight in payload["model"].values():
        if weight.is_floating_point():
            weight.fill_(3e38)
    checkpoint.save(tmp_path / "huge.pt", payload)
    assert "model returns NaN or inf for 20 of 20 unattacked images" in error(
        capsys, "evaluate", tmp_path / "huge.pt", *SHORT, code=1
    )
