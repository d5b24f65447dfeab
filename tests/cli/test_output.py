"""Nothing is written over what a command reads, over a checkpoint, or over what is not its own."""

import json
import os
import shutil

import pytest
from checkpoints import half_of_the_filters, pruned, single_weights
from commands import QUICK, error

from blokern import cli
from blokern.bilevel import checkpoint

SHORT = ["--test-limit=20", "--steps=2", "--restarts=1", "--threads=1"]
SPECTRUM = ["--steps=3", "--samples=1", "--threads=1"]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("blokern.bilevel.Trainer._draw", lambda trainer: None)
        assert cli.main(["train", "fast-bat", "--out", str(out), "--epochs=1", *QUICK]) == 0
    return out


@pytest.fixture
def run(one, tmp_path):
    return shutil.copytree(one, tmp_path / "run")


def commands(run):
    """Each option of each command that names a file to write, without its value."""
    checkpoint.save(run.parent / "pruned.pt", pruned(half_of_the_filters))
    best, small = run / "best.pt", run.parent / "pruned.pt"
    return [
        ["evaluate", best, *SHORT, "--json"],
        ["spectrum", best, *SPECTRUM, "--json"],
        ["spectrum", best, *SPECTRUM, "--png"],
        ["report", run, "--images=0", "--out"],
        ["export", best, "--out"],
        ["export", best, "--form=sparse", "--out"],
        ["export", small, "--form=compacted", "--out"],
        ["bench", "model", small, "--batch=1", "--rounds=1", "--threads=1", "--json"],
    ]


def test_no_command_writes_over_a_file_of_a_run(run, capsys):
    (run / "notes.txt").write_text("mine")
    (run / "link.pt").symlink_to(run / "best.pt")
    os.link(run / "best.pt", run / "second-name.pt")
    before = {file: file.read_bytes() for file in run.iterdir()}
    names = ["best.pt", "last.pt", "link.pt", "second-name.pt", "metrics.jsonl", "settings.yaml", "notes.txt"]
    for command in commands(run):
        for name in names:
            message = error(capsys, *command, run / name)
            assert str(run / name) in message
            assert "name another" in message
        assert "is a folder" in error(capsys, *command, run)
        assert error(capsys, *command, "")
        assert str(run / "no" / "a") in error(capsys, *command, run / "no" / "a", code=1)
    assert {file: file.read_bytes() for file in before} == before
    assert set(run.iterdir()) == set(before)


def test_every_command_replaces_its_own_earlier_output(run, tmp_path):
    for number, command in enumerate(commands(run)):
        file = tmp_path / f"output-{number}"
        for _ in range(2):
            assert cli.main([*map(str, command), str(file)]) == 0
        assert not checkpoint.is_checkpoint(file)
    assert cli.main(["spectrum", str(run / "best.pt"), *SPECTRUM]) == 0
    assert cli.main(["spectrum", str(run / "best.pt"), *SPECTRUM]) == 0


def test_two_outputs_are_two_files(run, capsys):
    both = ["--json", run / "a", "--png", run / "a"]
    assert "is what" in error(capsys, "spectrum", run / "best.pt", *SPECTRUM, *both)


def test_a_device_is_no_file_to_write(run, capsys):
    assert "/dev/null is no regular file" in error(
        capsys, "evaluate", run / "best.pt", *SHORT, "--json=/dev/null"
    )
    assert os.path.exists("/dev/null")  # noqa: PTH110


# --- Folders ------------------------------------------------------------------------------------------------


def compare(out, *methods, seeds="0"):
    return ["compare", *methods, f"--seeds={seeds}", "--out", str(out), *SHORT, "--epochs=1", *QUICK]


def prune(out, *methods, density="0.3"):
    quick = [word for word in QUICK if not word.startswith(("--eps", "--val-steps"))]
    return ["prune", *methods, f"--density={density}", "--out", str(out), "--epochs=1", *quick]


def test_results_are_not_replaced_by_fewer_or_others(tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(compare(out, "plain")) == 0
    table = (out / "results.md").read_bytes()
    for command in (compare(out, "fast-at"), compare(out, "plain", seeds="1")):
        message = error(capsys, *command)
        assert "would leave out of its tables (plain, seed 0)" in message
    assert "holds other results" in error(capsys, *prune(out, "omp"))
    assert "holds the results of a study" in error(capsys, "train", "plain", "--out", out, *QUICK)
    assert (out / "results.md").read_bytes() == table
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == ["plain"]
    assert cli.main(compare(out, "plain", seeds="0,1")) == 0  # more is a continuation
    assert len(json.loads((out / "results.json").read_text())["methods"]["plain"]["runs"]) == 2

    pruned_out = tmp_path / "pruned"
    assert cli.main(prune(pruned_out, "random")) == 0
    message = error(capsys, *prune(pruned_out, "random", density="0.2"))
    assert "(random, density 0.3, seed 0)" in message
    assert "holds other results" in error(capsys, *compare(pruned_out, "plain"))


def test_a_study_is_not_written_into_a_run_or_over_somebodys_table(run, tmp_path, capsys):
    settings = (run / "settings.yaml").read_bytes()
    for command in (compare(run, "plain"), prune(run, "omp")):
        assert "holds a run" in error(capsys, *command)
    assert (run / "settings.yaml").read_bytes() == settings
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "results.md").write_text("mine")
    for command in (compare(tmp_path / "mine", "plain"), prune(tmp_path / "mine", "omp")):
        assert "holds a results.md" in error(capsys, *command)
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["results.md"]


def test_out_must_be_named(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command in (["train", "plain", *QUICK], compare("", "plain"), prune("", "omp")):
        assert "out" in error(capsys, *command, "--out=")
    assert not list(tmp_path.iterdir())


def test_a_masked_export_is_known_again(tmp_path):
    checkpoint.save(tmp_path / "a.pt", pruned(single_weights))
    for _ in range(2):
        assert (
            cli.main(["export", str(tmp_path / "a.pt"), "--form=sparse", "--out", str(tmp_path / "b")]) == 0
        )
