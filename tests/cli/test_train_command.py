"""``blokern train``."""

import json
import os
import signal

import pytest
import torch
import yaml
from commands import QUICK, blokern_process, error

from blokern import cli
from blokern.bilevel import METHODS, checkpoint


def test_train_says_how_it_went_and_what_is_next(tmp_path, capsys):
    assert cli.main(["train", "plain", "--out", str(tmp_path), "--epochs=2", *QUICK]) == 0
    captured = capsys.readouterr()
    assert f"next: blokern evaluate {tmp_path / 'best.pt'}" in captured.out
    assert "epoch 2/2:" in captured.err


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(tmp_path, method):
    assert cli.main(["train", method, "--out", str(tmp_path), "--epochs=1", *QUICK]) == 0


def test_flags_reach_the_run(tmp_path):
    flags = ["--eps=8/255", "--lam=inf", "--step-size", "20", "--augment", "false", "--seed=5"]
    assert cli.main(["train", "fast-bat", "--out", str(tmp_path), "--epochs=1", *QUICK, *flags]) == 0
    payload = checkpoint.load(tmp_path / "last.pt")
    assert payload["settings"]["eps"] == payload["recipe"]["method"]["eps"] == 8 / 255
    assert payload["recipe"]["method"]["lam"] == float("inf")
    assert payload["recipe"]["method"]["step_size"] == 20.0
    assert payload["settings"]["augment"] is False
    assert payload["settings"]["seed"] == 5
    assert payload["recipe"]["model"]["width"] == 1
    assert payload["recipe"]["data"] == {
        "name": "synthetic:1x8x8x3",
        "val_fraction": 0.1,
        "train_limit": 100,
    }


def test_settings_yaml_repeats_the_run(tmp_path):
    flags = ["--epochs=1", "--lam=inf", "--seed=4", *QUICK]
    assert cli.main(["train", "fast-bat", "--out", str(tmp_path / "a"), *flags]) == 0
    settings = tmp_path / "a" / "settings.yaml"
    again = ["train", "fast-bat", "--config", str(settings), "--out", str(tmp_path / "b"), "--threads=1"]
    assert cli.main(again) == 0
    assert (tmp_path / "b" / "settings.yaml").read_text() == settings.read_text()
    assert yaml.safe_load(settings.read_text())["lam"] == float("inf")
    for name in ("model", "optimizer", "rng"):
        first, second = (checkpoint.load(tmp_path / run / "last.pt")[name] for run in "ab")
        assert str(first) == str(second)


def test_a_flag_overrides_the_yaml_file_before_it(tmp_path):
    (tmp_path / "run.yaml").write_text("epochs: 7\neps: 8/255\nseed: 2\n")
    command = [
        "train",
        "plain",
        "--out",
        str(tmp_path / "run"),
        "--config",
        str(tmp_path / "run.yaml"),
        *QUICK,
    ]
    assert cli.main([*command, "--epochs=1"]) == 0
    settings = checkpoint.load(tmp_path / "run" / "last.pt")["settings"]
    assert (settings["epochs"], settings["seed"], settings["eps"]) == (1, 2, 0.1)


def test_a_second_run_in_the_folder_is_refused(trained, capsys):
    before = {file.name: file.read_bytes() for file in trained.iterdir()}
    message = error(capsys, "train", "fast-bat", "--out", trained, "--epochs=2", *QUICK, code=1)
    assert "holds a run already" in message
    assert {file.name: file.read_bytes() for file in trained.iterdir()} == before


def test_resume_needs_no_other_options(trained, capsys):
    assert cli.main(["train", "fast-bat", "--out", str(trained), "--resume"]) == 0
    assert "complete, its epoch is done" in capsys.readouterr().err


def test_resume_with_other_settings_says_which(trained, capsys):
    resume = ["--out", trained, "--resume"]
    assert "settings.epochs is 1 there and 2 here" in error(
        capsys, "train", "fast-bat", *resume, "--epochs=2"
    )
    assert "method.rule is 'FastBAT' there and 'FastAT' here" in error(capsys, "train", "fast-at", *resume)
    assert (trained / "settings.yaml").read_text().startswith("# blokern train fast-bat ")


def test_a_damaged_checkpoint_is_named(trained, capsys):
    (trained / "last.pt").write_bytes((trained / "last.pt").read_bytes()[:-9])
    assert "last.pt" in error(capsys, "train", "fast-bat", "--out", trained, "--resume")
    assert "last.pt" in error(capsys, "evaluate", trained / "last.pt")


def test_an_out_that_is_a_file_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "file" in error(capsys, "train", "plain", "--out", tmp_path / "file", *QUICK, code=1)


def test_a_run_that_diverges_says_where(tmp_path, capsys):
    command = ["train", "plain", "--out", tmp_path, *QUICK, "--lr=1e30", "--epochs=3"]
    assert "in epoch 1, batch" in error(capsys, *command, code=1)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_a_process_and_resume_continues_bit_for_bit(tmp_path, signum):
    command = ["train", "fast-bat", "--epochs=20", *QUICK]
    whole = blokern_process(*command, "--out", str(tmp_path / "whole"))
    part = blokern_process(*command, "--out", str(tmp_path / "part"))
    for line in part.stderr:
        if line.startswith("epoch 2/20"):
            part.send_signal(signum)
            break
    rest = part.stderr.read()
    assert part.wait() == 128 + signum
    assert f"blokern: stopped by {signum.name}" in rest
    assert "resume to continue" in rest
    assert "Traceback" not in rest
    stopped = checkpoint.load(tmp_path / "part" / "last.pt")
    assert 2 <= stopped["epoch"] < 20
    assert len((tmp_path / "part" / "metrics.jsonl").read_text().splitlines()) == stopped["epoch"]

    resumed = blokern_process("train", "fast-bat", "--out", str(tmp_path / "part"), "--resume", "--threads=1")
    _, messages = resumed.communicate()
    assert resumed.returncode == 0, messages
    _, messages = whole.communicate()
    assert whole.returncode == 0, messages
    for name in ("last.pt", "best.pt"):
        first, second = (checkpoint.load(tmp_path / run / name) for run in ("whole", "part"))
        assert first["epoch"] == second["epoch"]
        for key, tensor in first["model"].items():
            assert torch.equal(tensor, second["model"][key])
    first, second = (
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("whole", "part")
    )
    assert len(first) == len(second) == 20
    for one, other in zip(first, second, strict=True):
        assert all(one[key] == other[key] for key in one if not key.endswith("seconds"))


def test_a_folder_in_training_is_refused_until_its_process_dies(tmp_path, capsys):
    command = ["train", "fast-bat", "--out", str(tmp_path), "--epochs=20", *QUICK]
    first = blokern_process(*command)
    for line in first.stderr:
        if line.startswith("epoch 2/20"):
            first.send_signal(signal.SIGSTOP)
            os.waitpid(first.pid, os.WUNTRACED)
            break
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    message = error(capsys, *command, "--resume", code=1)
    assert message == f"another process trains in {tmp_path}: wait for it, or stop it"
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    first.kill()
    first.communicate()
    assert cli.main([*command, "--resume"]) == 0
    assert checkpoint.load(tmp_path / "last.pt")["epoch"] == 20
