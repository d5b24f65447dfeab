"""What commands read of a checkpoint, of the folder that it lies in, and of YAML files."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from checkpoints import NETWORK, pruned, single_weights
from commands import QUICK, error

from blokern import cli, data, models
from blokern.bilevel import Plain, PlainSettings, Trainer, TrainSettings, checkpoint
from blokern.cli.source import Source

SHORT = ["--test-limit=20", "--steps=2", "--restarts=1", "--threads=1"]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_draw", lambda trainer: None)
        assert cli.main(["train", "fast-bat", "--out", str(out), "--epochs=1", *QUICK]) == 0
    return out


def test_a_folder_stands_for_its_best(one, tmp_path, capsys):
    assert cli.main(["evaluate", str(one), *SHORT]) == 0
    assert capsys.readouterr().out.startswith(f"{one / 'best.pt'}, epoch 1, ")
    (tmp_path / "empty").mkdir()
    assert "is a folder without a best.pt" in error(capsys, "evaluate", tmp_path / "empty", code=1)


def test_the_data_are_looked_for_where_they_were(one, tmp_path, monkeypatch):
    """Of a run, and of a study whose settings lie above."""
    asked = []
    real = data.load
    monkeypatch.setattr(
        data, "load", lambda name, **how: asked.append(how.pop("data_dir")) or real(name, **how)
    )
    monkeypatch.chdir(tmp_path)
    command = ["train", "fast-bat", "--out", "a", "--epochs=1", *QUICK, "--data-dir=there"]
    assert cli.main(command) == 0
    study = Path("b/omp/density-0.3/seed-0")
    study.mkdir(parents=True)
    shutil.copy("a/best.pt", study)
    Path("b/settings.yaml").write_text(
        f"# blokern prune --config settings.yaml\ndata_dir: {tmp_path / 'there'}\n"
    )
    asked.clear()
    monkeypatch.chdir("/")
    for path in (tmp_path / "a" / "best.pt", tmp_path / study / "best.pt"):
        assert cli.main(["evaluate", str(path), *SHORT]) == 0
        assert cli.main(["spectrum", str(path), "--steps=3", "--samples=1", "--threads=1"]) == 0
    assert cli.main(["report", str(tmp_path / "a"), "--images=2", "--steps=1"]) == 0
    assert asked == [str(tmp_path / "there")] * 5
    Path(tmp_path, "b", "settings.yaml").write_text("data_dir: elsewhere\n")  # somebody else's file
    assert Source.open(tmp_path / study / "best.pt").data_dir is None


def test_commands_take_a_runs_settings(one, tmp_path, capsys):
    settings = one / "settings.yaml"
    for command in (["evaluate", one, *SHORT], ["spectrum", one, "--steps=3", "--samples=2", "--threads=1"]):
        assert cli.main([*map(str, command), "--config", str(settings)]) == 0
    (tmp_path / "own.yaml").write_text("stepz: 3\n")
    message = error(capsys, "evaluate", one, "--config", tmp_path / "own.yaml")
    assert message == f"config: {tmp_path / 'own.yaml'} has an unknown option 'stepz'; did you mean 'steps'?"


@pytest.mark.parametrize(
    "missing", ["settings", "epoch", "data", "num_classes", "threat", "history", "method"]
)
def test_what_a_checkpoint_lacks_is_no_traceback(one, tmp_path, capsys, missing):
    payload = checkpoint.load(one / "best.pt")
    for place in (payload, payload["recipe"], payload["recipe"]["model"]):
        place.pop(missing, None)
    shutil.copytree(one, tmp_path / "run")
    path = tmp_path / "run" / "best.pt"
    checkpoint.save(path, payload)
    prune = ["prune", "omp", "--density=0.3", "--epochs=1", "--out", tmp_path / "out", f"--dense={path}"]
    for command in (
        ["evaluate", path, *SHORT, "--eps=0.1"],
        ["spectrum", path, "--steps=3", "--samples=2", "--threads=1"],
        ["export", path, "--out", tmp_path / "a"],
        ["report", path.parent, "--images=1", "--steps=1"],
        ["bench", "model", path],
        prune + [word for word in QUICK if not word.startswith(("--eps", "--val-steps"))],
    ):
        code = cli.main([*map(str, command)])
        told = capsys.readouterr().err
        assert code in (0, 2), told
        assert "Traceback" not in told
        if code:
            assert str(path) in told


def test_a_recipe_of_the_network_alone_is_enough_with_data(tmp_path, capsys):
    splits = data.load("synthetic:1x8x8x3", train_limit=100)
    settings = TrainSettings(epochs=1, batch_size=20, val_steps=1)
    model = models.build(**NETWORK)
    rule = Plain(model, settings.optimizer(model), PlainSettings())
    Trainer(rule, splits, settings, tmp_path, recipe={"model": NETWORK}).fit()
    assert "does not say what data its network was trained on" in error(capsys, "evaluate", tmp_path, *SHORT)
    assert cli.main(["evaluate", str(tmp_path), *SHORT, "--data=synthetic:1x8x8x3", "--eps=0.1"]) == 0


def test_a_damaged_checkpoint_names_a_whole_one(one, tmp_path, capsys):
    run = shutil.copytree(one, tmp_path / "run")
    (run / "last.pt").write_bytes((run / "last.pt").read_bytes()[:-9])
    assert f"; {run / 'best.pt'} beside it is whole" in error(capsys, "evaluate", run / "last.pt", *SHORT)
    message = error(capsys, "train", "fast-bat", "--out", run, "--resume")
    assert f"; {run / 'best.pt'} is whole: copy it to last.pt to continue" in message
    shutil.copy(run / "best.pt", run / "last.pt")
    assert cli.main(["train", "fast-bat", "--out", str(run), "--resume"]) == 0


# --- Networks and images ------------------------------------------------------------------------------------


def test_a_network_that_takes_no_such_images_is_told_before_the_training(tmp_path, capsys, monkeypatch):
    class Square(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, x):
            assert x.shape[-1] == 224, "Input height (8) doesn't match model (224).\nmore"

    monkeypatch.setattr(models, "_timm", lambda name, **_: Square())
    command = ["train", "plain", "--out", tmp_path / "a", *QUICK[1:]]
    command = [word for word in command if not str(word).startswith("--width")]
    message = error(capsys, *command, "--model=timm:vit")
    assert (
        "model: timm:vit takes no images of input_shape (1, 8, 8): Input height (8) doesn't match" in message
    )
    assert "width: timm:vit has none to set" in error(capsys, *command, "--model=timm:vit", "--width=3")
    assert not (tmp_path / "a").exists()


def test_a_peer_for_another_torch_is_a_line(tmp_path, capsys, monkeypatch):
    import builtins

    real = builtins.__import__

    def broken(name, *args, **kwargs):
        if name in ("timm", "torchvision"):
            raise RuntimeError("operator torchvision::nms does not exist")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", broken)
    quick = [word for word in QUICK if not word.startswith(("--width", "--data"))]
    for options in (["--model=timm:vit"], ["--data=cifar10", f"--data-dir={tmp_path}"]):
        message = error(capsys, "train", "plain", "--out", tmp_path / "a", *quick, *options, code=1)
        assert "cannot be imported beside torch" in message
        assert "operator torchvision::nms does not exist" in message


# --- Files of options ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--epoch=1"], "unknown option --epoch=1; did you mean --epochs?"),
        (["--batch_size", "3"], "unknown option --batch_size; did you mean --batch-size?"),
        (["--learning-rate=1"], "unknown option --learning-rate=1; did you mean --lr?"),
        (["--dataset=digits"], "did you mean --data?"),
        (["--zzz"], "unknown option --zzz"),
        (["--lr"], "--lr: expected one argument"),
        (["--lr=fast"], "lr must be a number, or a fraction such as 8/255, got 'fast'"),
        (["--augment=maybe"], "augment must be true or false, got 'maybe'"),
        (["--precision=bf61"], "precision must be one of 'fp32', 'bf16', got 'bf61'; did you mean 'bf16'?"),
        (["--data=digts"], "data must be one of "),
        (["--model=smal_cnn"], "model must be one of "),
        (["--data-dir="], "data_dir must be a word that is not empty, got ''"),
        (["stray"], "unexpected words: stray"),
    ],
)
def test_the_words_are_our_own(tmp_path, capsys, words, message):
    told = error(capsys, "train", "plain", "--out", tmp_path / "a", *words)
    assert message in told
    assert not any(word in told for word in ("<class", "typing.", "Literal", "unicode"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoks: 3\n", " has an unknown option 'epoks'; did you mean 'epochs'?"),
        ("epochs: 1.5\n", ": epochs must be an integer, got 1.5"),
        ("epochs: true\n", ": epochs must be an integer, got True"),
        ("- epochs\n", " must hold options by name, got list"),
        ("epochs: [\n", ", line 2 is no YAML: "),
        ("3: 4\n", " has an unknown option 3"),
    ],
)
def test_a_file_of_options_is_named(tmp_path, capsys, text, message):
    file = tmp_path / "a.yaml"
    file.write_text(text)
    told = error(capsys, "train", "plain", "--out", tmp_path / "a", "--config", file)
    assert told.startswith(f"config: {file}{message}")
    file.write_bytes(b"\xff\xfe")
    told = error(capsys, "train", "plain", "--out", tmp_path / "a", "--config", file)
    assert told == f"config: {file} cannot be read: it is no text in UTF-8"


def test_a_flag_overrides_a_file_wherever_it_stands(tmp_path):
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({"epochs": 7, "eps": "8/255", "augment": False}))
    command = [
        "train",
        "plain",
        "--epochs=1",
        "--config",
        str(tmp_path / "a.yaml"),
        "--out",
        str(tmp_path / "a"),
    ]
    assert cli.main([*command, *QUICK]) == 0
    settings = checkpoint.load(tmp_path / "a" / "last.pt")["settings"]
    assert (settings["epochs"], settings["augment"]) == (1, False)


def test_help_lists_names_and_gives_an_example(capsys):
    for command in (["train", "fast-at"], ["compare"], ["prune"], ["evaluate"]):
        assert cli.main([*command, "--help"]) == 0
        told = capsys.readouterr().out
        assert f"example: blokern {' '.join(command)} " in told
        assert "data sets: digits, " in told
        assert "\nmachine:\n" in told
    assert cli.main(["compare", "--help"]) == 0
    assert "methods: plain, fast-at, fast-bat" in capsys.readouterr().out


# --- Checked in time ----------------------------------------------------------------------------------------


def test_compare_trains_nothing_for_an_attack_that_is_none(tmp_path, capsys):
    command = ["compare", "plain", "--out", tmp_path / "a", *QUICK]
    assert "steps must be at least 1, got 0" in error(capsys, *command, "--steps=0")
    assert not (tmp_path / "a").exists()


def test_prune_trains_nothing_for_images_that_are_none(tmp_path, capsys):
    quick = [word for word in QUICK if not word.startswith(("--eps", "--val-steps"))]
    command = ["prune", "omp", "--density=0.3", "--out", tmp_path / "a", *quick]
    assert "test_limit must be in [1, " in error(capsys, *command, "--test-limit=0")
    assert not (tmp_path / "a").exists()


def test_resume_with_nothing_there_and_nothing_said(tmp_path, capsys):
    message = error(capsys, "train", "plain", "--out", tmp_path / "typo", "--resume", "--threads=1")
    assert "holds no run to resume" in message
    assert not (tmp_path / "typo").exists()


# --- Figures ------------------------------------------------------------------------------------------------


def test_few_lanczos_steps_are_not_listed_twice(one, tmp_path, capsys):
    file = tmp_path / "a.json"
    command = ["spectrum", str(one), "--steps=5", "--samples=1", "--threads=1", "--json", str(file)]
    assert cli.main(command) == 0
    told = capsys.readouterr()
    result = json.loads(file.read_text(), parse_constant=pytest.fail)  # NaN is no JSON
    values = [pair["value"] for pair in result["largest"] + result["smallest"]]
    assert len(values) == len(set(values)) == 5
    assert "--steps 10 or more give 5 at each end" in told.err
    assert result["trace"]["standard_error"] is None
    assert "nan" not in told.out


def test_fgsm_has_no_steps_to_tell(one, tmp_path, capsys):
    command = ["evaluate", str(one), "--attack=fgsm", "--json", str(tmp_path / "a.json"), *SHORT]
    assert cli.main(command) == 0
    assert not {"steps", "restarts"} & json.loads((tmp_path / "a.json").read_text()).keys()
    told = capsys.readouterr().err
    assert "--steps is not used" in told
    assert "FGSM on 20 images" in told


def test_bench_model_warns_of_figures_that_scatter(tmp_path, capsys, monkeypatch):
    from dataclasses import replace

    from blokern import _race

    real = _race.run_case
    monkeypatch.setattr(_race, "run_case", lambda *a: [replace(row, spread=16.82) for row in real(*a)])
    checkpoint.save(tmp_path / "a.pt", pruned(single_weights))
    assert cli.main(["bench", "model", str(tmp_path / "a.pt"), "--batch=1", "--rounds=1", "--threads=1"]) == 0
    assert "differ by up to ±1682%" in capsys.readouterr().err
