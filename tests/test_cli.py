import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from blokern import __version__, cli, data, models
from blokern.bilevel import METHODS, OMP, BiP, BiPSettings, Plain, PlainSettings, checkpoint
from blokern.bilevel.export import load_sparse
from blokern.bilevel.masking import prunable
from blokern.bilevel.trainer import Trainer, TrainSettings
from blokern.cli import bench, compare, dispatch, evaluate, info, options
from blokern.sparse import masks_of, to_dense

ROOT = Path(__file__).resolve().parent.parent

#: A run of a second: 4 batches an epoch.
QUICK = [
    *("--train-limit=100", "--batch-size=20", "--width=1", "--eps=0.1", "--val-steps=1", "--threads=1"),
    "--data=synthetic:1x8x8x3",
]


def blokern_process(*argv, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "blokern", *argv],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.fixture(autouse=True)
def no_pictures_and_the_same_threads(monkeypatch):
    monkeypatch.setattr(Trainer, "_draw", lambda trainer: None)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def trained(tmp_path):
    assert cli.main(["train", "fast-bat", "--out", str(tmp_path / "run"), "--epochs=1", *QUICK]) == 0
    return tmp_path / "run"


def error(capsys, *argv, code=2):
    """What a failing command says."""
    assert cli.main([*map(str, argv)]) == code
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    prefix = "blokern: error: "
    return next(line for line in captured.err.splitlines() if line.startswith(prefix)).removeprefix(prefix)


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


@pytest.mark.parametrize("command", ["train", "prune", "evaluate", "compare", "export", "info"])
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


# --- train --------------------------------------------------------------------------------------------------


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
    assert "complete, all 1 epochs are done" in capsys.readouterr().err


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


# --- evaluate -----------------------------------------------------------------------------------------------


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
    command = ["evaluate", str(tmp_path / "last.pt"), "--attack=fgsm", "--json", str(result_file)]
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


# --- compare ------------------------------------------------------------------------------------------------


def compare_command(out, *methods, seeds="0,1"):
    quick = ["--test-limit=20", "--steps=2", "--restarts=1", "--epochs=1", *QUICK]
    return ["compare", *methods, f"--seeds={seeds}", "--out", str(out), *quick]


def test_compare_tabulates_methods_and_seeds(tmp_path, capsys):
    command = compare_command(tmp_path, "fast-at", "fast-bat:lam=5,epochs=2", "no-implicit=fast-bat:lam=inf")
    assert cli.main(command) == 0
    table = capsys.readouterr().out
    assert table == (tmp_path / "results.md").read_text()
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert [row.split(" | ")[0] for row in rows] == ["| fast-at", "| fast-bat", "| no-implicit"]
    assert all(row.count("±") == 4 for row in rows)

    results = json.loads((tmp_path / "results.json").read_text())
    assert results["machine"]["torch"] == torch.__version__
    bat = results["methods"]["fast-bat"]
    assert bat["options"] == {"lam": "5", "epochs": "2"}
    assert [run["seed"] for run in bat["runs"]] == [0, 1]
    assert bat["runs"][0]["last"]["epoch"] == 2
    mean = sum(run["best"]["robust_accuracy"] for run in bat["runs"]) / 2
    assert f"{100 * mean:.2f} ± " in rows[1]
    run = checkpoint.load(tmp_path / "no-implicit" / "seed-1" / "last.pt")
    assert run["settings"]["seed"] == 1
    assert run["recipe"]["method"]["lam"] == float("inf")
    for name in ("comparison.png", "curves.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"


def test_compare_continues_and_repeats_nothing(tmp_path, monkeypatch):
    assert cli.main(compare_command(tmp_path, "fast-at", seeds="0")) == 0
    done = {file: file.read_bytes() for file in (tmp_path / "fast-at" / "seed-0").iterdir()}

    asked = []
    real = compare.attacked
    monkeypatch.setattr(compare, "attacked", lambda *a, **k: asked.append(a[1]) or real(*a, **k))
    assert cli.main(compare_command(tmp_path, "fast-at", "plain", seeds="0,1")) == 0
    assert {file: file.read_bytes() for file in done} == done
    # One epoch: the last is the best, so one attack a new run.
    assert [path.parent.relative_to(tmp_path).as_posix() for path in asked] == [
        "fast-at/seed-1",
        "plain/seed-0",
        "plain/seed-1",
    ]

    asked.clear()
    assert cli.main([*compare_command(tmp_path, "fast-at", seeds="0"), "--steps=3"]) == 0
    assert len(asked) == 1  # another attack is another question


def test_compare_refuses_runs_of_other_settings(tmp_path, capsys):
    assert cli.main(compare_command(tmp_path, "plain", seeds="0")) == 0
    again = compare_command(tmp_path, "plain", seeds="0")
    assert "settings.lr is 0.2 there and 0.3 here" in error(capsys, *again, "--lr=0.3")


# --- prune --------------------------------------------------------------------------------------------------


def prune_command(out, *methods, density="0.3", seeds="0"):
    quick = [word for word in QUICK if not word.startswith(("--eps", "--val-steps"))]
    return [
        "prune",
        *methods,
        f"--density={density}",
        f"--seeds={seeds}",
        "--out",
        str(out),
        "--epochs=1",
        *quick,
    ]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """All methods at two densities over two seeds."""
    out = tmp_path_factory.mktemp("study")
    methods = ["bip:gamma=2", "snip", "grasp", "synflow:rounds=3", "hydra:score_epochs=1", "random"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_draw", lambda trainer: None)
        command = prune_command(out, "omp", "imp:rate=0.5", *methods, density="0.6,0.3", seeds="0,1")
        assert cli.main(command) == 0
    return out


def kept_weights(path):
    model = checkpoint.load_model(checkpoint.load(path), path)
    return sum(mask.kept for mask in masks_of(model).values()), sum(
        w.numel() for w in prunable(model).values()
    )


def test_prune_tabulates_methods_and_densities(study):
    rows = [line for line in (study / "results.md").read_text().splitlines() if line.startswith("| ")][1:]
    methods = ["omp", "imp", "bip", "snip", "grasp", "synflow", "hydra", "random"]
    cells = [row.strip("| ").split(" | ") for row in rows]
    assert [row[:2] for row in cells] == [
        ["dense", "100"],
        *([method, kept] for method in methods for kept in ("60", "30")),
    ]
    assert all("±" in row[2] and "±" in row[3] for row in cells)
    for name in ("sparsity.png", "minutes.png", "layers.png"):
        assert (study / name).read_bytes()[:4] == b"\x89PNG"

    results = json.loads((study / "results.json").read_text())
    assert [network["seed"] for network in results["dense"]] == [0, 1]
    assert len(results["runs"]) == 8 * 2 * 2
    own = [
        run
        for run in results["runs"]
        if run["plan"]["label"] == "snip" and run["plan"]["settings"]["density"] == 0.3
    ]
    assert [run["plan"]["seed"] for run in own] == [0, 1]
    mean = sum(run["accuracy"] for run in own) / 2
    assert f"| snip | 30 | {100 * mean:.2f} ± " in (study / "results.md").read_text()


def test_every_network_keeps_what_was_asked_for_and_evaluates(study, tmp_path):
    results = json.loads((study / "results.json").read_text())
    paths = sorted(study.glob("*/density-*/seed-*/best.pt"))
    assert len(paths) == 32
    for path in paths:
        kept, total = kept_weights(path)
        assert kept == round(float(path.parts[-3].removeprefix("density-")) * total)
    # The table's accuracy is that of `evaluate`.
    for run in results["runs"][:3]:
        plan = run["plan"]
        path = (
            study
            / plan["label"]
            / f"density-{plan['settings']['density']:g}"
            / f"seed-{plan['seed']}"
            / "best.pt"
        )
        command = ["evaluate", str(path), "--attack=fgsm", "--threads=1", "--json", str(tmp_path / "a.json")]
        assert cli.main(command) == 0
        assert json.loads((tmp_path / "a.json").read_text())["clean_accuracy"] == run["accuracy"]
        assert {name: kept for name, (kept, _) in run["kept"].items()} == {
            name: mask.kept
            for name, mask in masks_of(checkpoint.load_model(checkpoint.load(path), path)).items()
        }


def test_imp_rewinds_in_rounds_that_its_densities_share(study):
    rounds = study / "imp" / "rounds" / "seed-0"
    assert sorted(folder.name for folder in rounds.iterdir()) == [
        "round-01"
    ]  # 0.5; 0.6 takes one round alone
    early = checkpoint.load(study / "dense" / "seed-0" / "epoch-1.pt")["model"]
    method = checkpoint.load(study / "imp" / "density-0.3" / "seed-0" / "last.pt")["recipe"]["method"]
    assert (method["rate"], method["rewind_epoch"], method["density"]) == (0.5, 1, 0.3)
    before, after = (
        checkpoint.load(folder / "masks.pt")["masks"]["head.1.weight"][0]
        for folder in (rounds / "round-01", study / "imp" / "density-0.3" / "seed-0")
    )
    assert torch.equal(before & after, after)
    assert set(early) <= set(checkpoint.load(rounds / "round-01" / "last.pt")["model"])


def test_prune_continues_and_repeats_nothing(study, monkeypatch, tmp_path):
    for name in ("omp", "dense"):
        shutil.copytree(study / name, tmp_path / name)
    done = {file: file.read_bytes() for file in tmp_path.rglob("*.pt")}
    steps = []
    real = Plain.step
    monkeypatch.setattr(Plain, "step", lambda rule, x, y: steps.append(1) or real(rule, x, y))
    assert cli.main(prune_command(tmp_path, "omp", density="0.6,0.3", seeds="0,1")) == 0
    assert steps == []
    assert cli.main(prune_command(tmp_path, "omp", "random", density="0.6,0.3", seeds="0,1")) == 0
    assert len(steps) == 4 * 4  # four networks of `random`, one epoch of four batches each
    assert all(file.read_bytes() == content for file, content in done.items())


def test_prune_is_the_same_run_after_a_stop(study, tmp_path, monkeypatch):
    """Stopped within the masks, then within a training: the same networks as without."""
    command = prune_command(tmp_path, "omp", "imp:rate=0.5", density="0.3")
    real_masks, real_step = OMP.masks, Plain.step
    calls = []

    def stop_at(number, real):
        def stopping(*args, **kwargs):
            calls.append(1)
            if len(calls) == number:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        return stopping

    for kind, name, real, number in ((OMP, "masks", real_masks, 2), (Plain, "step", real_step, 3)):
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(kind, name, stop_at(number, real))
            assert cli.main(command) == 130
    assert cli.main(command) == 0
    for label in ("omp", "imp"):
        runs = [root / label / "density-0.3" / "seed-0" / "last.pt" for root in (study, tmp_path)]
        first, second = (checkpoint.load(run)["model"] for run in runs)
        assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_prune_settings_yaml_repeats_the_study(tmp_path):
    assert cli.main([*prune_command(tmp_path / "a", "hydra:score_epochs=1"), "--scope=layer"]) == 0
    settings = tmp_path / "a" / "settings.yaml"
    assert cli.main(["prune", "--config", str(settings), "--out", str(tmp_path / "b")]) == 0
    assert (tmp_path / "b" / "settings.yaml").read_text() == settings.read_text()
    first, second = (
        checkpoint.load(tmp_path / run / "hydra" / "density-0.3" / "seed-0" / "last.pt") for run in "ab"
    )
    assert first["recipe"]["method"]["scope"] == "layer"
    del first["recipe"]["dense"], second["recipe"]["dense"]  # its fingerprint, clock times among the contents
    assert first["recipe"] == second["recipe"]
    assert all(torch.equal(tensor, second["model"][name]) for name, tensor in first["model"].items())


def test_prune_refuses_runs_of_other_settings(study, capsys, tmp_path):
    for name in ("omp", "dense"):
        shutil.copytree(study / name, tmp_path / name)
    command = prune_command(tmp_path, "omp")
    assert "settings.lr is 0.1 there and 0.3 here" in error(capsys, *command, "--lr=0.3")
    command = prune_command(tmp_path, "omp:lr=0.3")
    assert "settings.lr is 0.1 there and 0.3 here" in error(capsys, *command)
    message = error(capsys, *prune_command(tmp_path, "omp:scope=layer"))
    assert "masks.pt is of another run: method.scope is 'global' there and 'layer' here" in message


def test_prune_takes_a_dense_network(study, tmp_path, capsys):
    dense = study / "dense" / "seed-1" / "best.pt"
    assert cli.main([*prune_command(tmp_path / "a", "omp", "imp"), f"--dense={dense}"]) == 0
    assert not list((tmp_path / "a" / "dense").glob("seed-*"))
    recipe = checkpoint.load(tmp_path / "a" / "omp" / "density-0.3" / "seed-0" / "best.pt")["recipe"]
    assert recipe["dense"] == checkpoint.fingerprint(dense)

    out = tmp_path / "b"
    wrong = [*prune_command(out, "omp"), f"--dense={dense}"]
    message = error(capsys, *wrong, "--width=2")
    assert "best.pt is of another architecture: model.width is 1 there and 2 here" in message
    message = error(capsys, *wrong, "--data=digits")
    assert (
        "best.pt is of another data set: data.name is 'synthetic:1x8x8x3' there and 'digits' here" in message
    )
    assert "none.pt" in error(capsys, *prune_command(out, "omp"), "--dense=none.pt", code=1)
    message = error(capsys, *prune_command(out, "imp:rewind_epoch=3"), f"--dense={dense}")
    assert "rewind_epoch: epoch 3 of the dense training was not kept" in message
    assert not list(out.glob("*"))


def test_a_layer_that_loses_all_its_weights_is_told_once(tmp_path):
    with pytest.warns(UserWarning, match="keeps no weight: the layer's output is its bias") as told:
        assert cli.main(prune_command(tmp_path, "random", density="0.01")) == 0
    assert len({str(warning.message) for warning in told}) == len(told)


# --- export -------------------------------------------------------------------------------------------------


def test_export_writes_each_form_and_says_how_large_it_is(study, tmp_path, capsys):
    source = study / "snip" / "density-0.3" / "seed-0" / "best.pt"
    for form, load in (("dense", torch.load), ("sparse", load_sparse)):
        file = tmp_path / form
        assert cli.main(["export", str(source), f"--form={form}", "--out", str(file)]) == 0
        assert (
            capsys.readouterr().out
            == f"{file}: {file.stat().st_size:,} bytes; {source} has {source.stat().st_size:,}\n"
        )
        assert load(file)


def test_export_compacts_pruned_filters_and_tells_why_it_cannot(tmp_path, capsys):
    assert (
        cli.main([*prune_command(tmp_path / "a", "omp", density="0.5"), "--granularity=filter", "--width=2"])
        == 0
    )
    run = tmp_path / "a" / "omp" / "density-0.5" / "seed-0"
    command = ["export", str(run / "best.pt"), "--form=compacted", "--out", str(tmp_path / "small.pt2")]
    assert cli.main(command) == 0
    model = checkpoint.load_model(checkpoint.load(run / "best.pt"), run / "best.pt").eval()
    x = torch.rand(5, 1, 8, 8)
    torch.testing.assert_close(torch.export.load(tmp_path / "small.pt2").module()(x), model(x))
    before = (tmp_path / "small.pt2").read_bytes()
    message = error(capsys, *command, "--input-shape=3,8,8")
    assert message.startswith(f"{run / 'best.pt'} takes no images of input_shape (3, 8, 8): ")
    assert "expected three numbers >= 1, such as 3,32,32" in error(capsys, *command, "--input-shape=8,8")
    dense = tmp_path / "a" / "dense" / "seed-0" / "best.pt"
    message = error(capsys, "export", dense, "--form=compacted", "--out", tmp_path / "small.pt2")
    assert message == f"{dense} cannot be compacted: it has no masks"
    assert (tmp_path / "small.pt2").read_bytes() == before


def test_export_needs_a_checkpoint_with_a_recipe(tmp_path, capsys):
    (tmp_path / "a.pt").write_bytes(b"nothing")
    assert "not a checkpoint of blokern" in error(
        capsys, "export", tmp_path / "a.pt", "--out", tmp_path / "b"
    )
    checkpoint.save(tmp_path / "a.pt", {"model": {}})
    for form in ("dense", "compacted", "sparse"):
        message = error(capsys, "export", tmp_path / "a.pt", f"--form={form}", "--out", tmp_path / "b")
        assert "does not say how its network is built" in message


# --- bench and info -----------------------------------------------------------------------------------------


def test_bench_passes_everything_on(tmp_path, monkeypatch):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").touch()
    (tmp_path / "benchmarks" / "run.py").write_text("def main(argv):\n    return len(argv)\n")
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "blokern" / "cli" / "bench.py"))
    for name in [name for name in sys.modules if name.split(".")[0] == "benchmarks"]:
        monkeypatch.delitem(sys.modules, name)
    path = list(sys.path)
    try:
        assert cli.main(["bench", "attack", "--help", "-x"]) == 3
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "benchmarks"]:
            del sys.modules[name]
    assert sys.path == path


def test_bench_outside_the_repository_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "blokern" / "cli" / "bench.py"))
    assert "the benchmarks come with the repository" in error(capsys, "bench", code=1)


def test_info_names_versions_and_machine(capsys):
    assert cli.main(["info", "--threads=1"]) == 0
    lines = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["blokern"].strip() == __version__
    assert lines["torch"].strip() == torch.__version__
    assert lines["cpu threads"].strip() == "1"
    assert {"python", "cpu instruction set", "cuda"} <= set(lines)


@pytest.mark.parametrize(
    ("version", "names", "expected"),
    [
        ("12.8", ["H100", "H200"], "12.8; H100, H200"),
        ("12.8", [], "12.8; no device"),
        (None, [], "not built"),
    ],
)
def test_info_names_cuda_and_its_devices(monkeypatch, version, names, expected):
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(torch.cuda, "get_device_name", names.__getitem__)
    assert info.machine()["cuda"] == expected
