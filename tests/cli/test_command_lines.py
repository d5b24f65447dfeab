"""The command line's words: help, and what is wrong with them."""

import re
import subprocess
import sys

import pytest
from commands import ROOT, error

from blokern import cli
from blokern.bilevel import METHODS
from blokern.cli import dispatch, options

# --- Help ---------------------------------------------------------------------------------------------------


def test_help_needs_no_slow_import():
    code = (
        "import sys; from blokern.cli import main; main(['--help']); "
        "print([name for name in ('torch', 'matplotlib', 'sklearn', 'numpy') if name in sys.modules])"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert output.stdout.splitlines()[-1] == "[]"
    for command in dispatch.COMMANDS:
        assert f"\n  {command} " in output.stdout


def test_no_command_is_an_error_that_shows_the_commands(capsys):
    assert cli.main([]) == 2
    assert "usage: blokern COMMAND" in capsys.readouterr().out


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("blokern 0.")


@pytest.mark.parametrize(
    "command", ["train", "prune", "evaluate", "compare", "report", "export", "spectrum", "info"]
)
def test_each_command_explains_itself(capsys, command):
    assert cli.main([command, "--help"]) == 0
    assert f"usage: blokern {command}" in capsys.readouterr().out


@pytest.mark.parametrize("method", METHODS)
def test_each_method_explains_its_options(capsys, method):
    assert cli.main(["train", method, "--help"]) == 0
    words = " ".join(capsys.readouterr().out.split())
    for option in options.run_options(method):
        assert option.help
        assert f"{options.flag(option.name)} " in words
        assert " ".join(option.help.split()) in words


def test_train_lists_the_methods(capsys):
    for argv, code in ((["train"], 2), (["train", "--help"], 0)):
        assert cli.main(argv) == code
        listed = capsys.readouterr().out
        assert all(f"\n  {method} " in listed for method in METHODS)


# --- Wrong command lines ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "command must be one of 'train', .*got 'trian'; did you mean 'train'"),
        (["train", "fast-bta"], "method must be one of .*got 'fast-bta'; did you mean 'fast-bat'"),
        (["train", "fast-at"], "required: out"),
        (["train", "fast-at", "--out=OUT", "--model=smal_cnn"], "'smal_cnn'.*did you mean 'small_cnn'"),
        (["train", "fast-at", "--out=OUT", "--data=digts"], "'digts'.*did you mean 'digits'"),
        (
            ["train", "fast-at", "--out=OUT", "--schedule=cos"],
            "schedule must be one of 'cyclic', .*got 'cos'",
        ),
        (["train", "fast-at", "--out=OUT", "--precision=fp31"], "precision.*fp32.*fp31"),
        (["train", "fast-at", "--out=OUT", "--lam=3"], "--lam=3"),
        (["train", "fast-bat", "--out=OUT", "--lam=x"], "lam.*'x'"),
        (["train", "fast-bat", "--out=OUT", "--lam=1/0"], "lam.*division by zero"),
        (["train", "fast-bat", "--out=OUT", "--lam=-1"], "lam.*-1"),
        (["train", "fast-at", "--out=OUT", "--epochs=1.5"], "epochs.*int.*1.5"),
        (["train", "fast-at", "--out=OUT", "--epochs=0"], "epochs must be at least 1, got 0"),
        (["train", "fast-at", "--out=OUT", "--epoch=1"], "--epoch=1"),
        (
            ["train", "fast-at", "--out=OUT", "--device=gpu"],
            "device must be auto, cpu, cuda or cuda:N, got 'gpu'",
        ),
        (["train", "fast-at", "--out=OUT", "--device=cuda:99"], "device: cuda:99 is not there"),
        (["train", "fast-at", "--out=OUT", "--threads=0"], "threads must be at least 1, got 0"),
        (
            ["train", "fast-at", "--out=OUT", "--model=wide_resnet28_10", "--width=3"],
            "width: wide_resnet28_10",
        ),
        (["train", "fast-at", "--out=OUT", "--config=none.yaml"], "config.*none.yaml"),
        (["train", "fast-at", "--out=OUT", "--train-limit=0"], "train_limit must be in"),
        (["evaluate"], "required: checkpoint"),
        (["evaluate", "x.pt", "--attack=pdg"], "attack must be one of .*got 'pdg'; did you mean 'pgd'"),
        (["compare", "--out=OUT"], "required: .*methods"),
        (["compare", "fast-bta", "--out=OUT"], "method must be one of .*got 'fast-bta'"),
        (["compare", "fast-at", "fast-at", "--out=OUT"], "labels must differ.*LABEL=METHOD"),
        (["compare", "fast-at", "--seeds=0,0", "--out=OUT"], "seeds must differ"),
        (["compare", "fast-at", "--seeds=0,x", "--out=OUT"], "seeds.*'x'"),
        (
            ["compare", "fast-bat:lamb=1", "--out=OUT"],
            "option of fast-bat must be one of .*got 'lamb'; did you mean 'lam'",
        ),
        (["compare", "fast-bat:lam", "--out=OUT"], "expected KEY=VALUE after the colon of 'fast-bat:lam'"),
        (["compare", "fast-bat:seed=1", "--out=OUT"], "option of fast-bat must be one of .*got 'seed'"),
        (["compare", "a/b=fast-bat", "--out=OUT"], "a label is made of .*'a/b'"),
        (["compare", "..=fast-bat", "--out=OUT"], "a label is made of"),
        (["compare", "fast-at", "fast-bat:lam=x", "--out=OUT"], "lam.*'x'"),
        (["prune", "--density=0.1", "--out=OUT"], "required: .*methods"),
        (["prune", "omp", "--out=OUT"], "required: .*density"),
        (
            ["prune", "opm", "--density=0.1", "--out=OUT"],
            "method must be one of .*got 'opm'; did you mean 'omp'",
        ),
        (["prune", "omp", "--density=0", "--out=OUT"], r"density must be in \(0, 1\], got 0.0"),
        (["prune", "omp", "--density=0.1,1.5", "--out=OUT"], r"density must be in \(0, 1\], got 1.5"),
        (["prune", "omp", "--density=0.1,x", "--out=OUT"], "density.*'x'"),
        (["prune", "omp", "--density=0.1,1/10", "--out=OUT"], "density must differ"),
        (["prune", "omp", "--density=0.1", "--seeds=1,1", "--out=OUT"], "seeds must differ"),
        (["prune", "omp", "omp", "--density=0.1", "--out=OUT"], "labels must differ.*LABEL=METHOD"),
        (
            ["prune", "omp:rate=0.1", "--density=0.1", "--out=OUT"],
            "option of omp must be one of .*got 'rate'",
        ),
        (["prune", "imp:rate=2", "--density=0.1", "--out=OUT"], r"rate must be in \(0, 1\), got 2.0"),
        (
            ["prune", "omp", "--density=0.1", "--granularity=2:4", "--out=OUT"],
            "density must be 0.5 for granularity",
        ),
        (["prune", "omp", "--density=0.1", "--scope=lyer", "--out=OUT"], "scope.*'?lyer"),
        (
            ["prune", "omp", "--density=0.1", "--score-batches=0", "--out=OUT"],
            "score_batches must be at least 1",
        ),
        (["prune", "omp", "--density=0.1", "--eps=0.1", "--out=OUT"], "--eps=0.1"),
        (
            ["prune", "omp", "--density=0.1", "--dense-epochs=0", "--out=OUT"],
            "epochs must be at least 1, got 0",
        ),
        (["export", "a.pt"], "required: out"),
        (["export", "a.pt", "--form=spars", "--out=OUT"], "form must be one of .*did you mean 'sparse'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_command_line_is_one_message_and_leaves_nothing(tmp_path, capsys, argv, message):
    out = tmp_path / "out"
    argv = [word.replace("OUT", str(out)) for word in argv]
    assert re.search(message, error(capsys, *argv))
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [("epoch: 3\n", "epoch"), ("epochs: many\n", "many"), ("{{epochs: 3\n", "config"), ("lam: 3\n", "lam")],
)
def test_a_wrong_yaml_file_is_one_message(tmp_path, capsys, text, message):
    (tmp_path / "run.yaml").write_text(text)
    command = ["train", "fast-at", "--out", tmp_path / "out", "--config", tmp_path / "run.yaml"]
    assert message in error(capsys, *command)
    assert not (tmp_path / "out").exists()


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(ValueError, match="smal_cnn"):
        cli.main(["train", "fast-at", "--out", str(tmp_path), "--model=smal_cnn", "--debug"])
