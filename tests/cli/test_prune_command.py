"""``blokern prune``."""

import itertools
import json
import shutil
from dataclasses import dataclass, field

import pytest
import torch
from commands import QUICK, error

from blokern import bilevel, cli
from blokern.bilevel import OMP, OMPSettings, Plain, Trainer, checkpoint
from blokern.bilevel.masking import prunable
from blokern.cli import options
from blokern.cli.compare import Entry
from blokern.cli.prune import _method_options, _run_options
from blokern.sparse import masks_of


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
    assert [row[0] for row in cells] == ["dense", *(m for method in methods for m in (method, method))]
    assert cells[0][1:3] == ["100", "100"]
    for row, asked in zip(cells[1:], itertools.cycle((60, 30))):
        assert float(row[1]) == pytest.approx(asked, abs=0.3)  # to the nearest weight
        assert float(row[2]) > float(row[1])  # biases and BatchNorms stay
    assert all("±" in row[3] and "±" in row[4] for row in cells)
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
    assert any(row[0] == "snip" and row[3].startswith(f"{100 * mean:.2f} ± ") for row in cells)


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
        command = ["evaluate", str(path), "--attack=fgsm", "--eps=0.1", "--threads=1"]
        command += ["--json", str(tmp_path / "a.json")]
        assert cli.main(command) == 0
        assert json.loads((tmp_path / "a.json").read_text())["clean_accuracy"] == run["accuracy"]
        model = checkpoint.load_model(checkpoint.load(path), path)
        masks = masks_of(model)
        assert {name: kept for name, (kept, _) in run["kept"].items()} == {
            n: m.kept for n, m in masks.items()
        }
        pruned = sum(mask.to_dense().logical_not().sum().item() for mask in masks.values())
        parameters = sum(parameter.numel() for parameter in model.parameters())
        assert run["parameters"] == [parameters - pruned, parameters]


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


def test_exclude_keeps_layers_out_of_the_study(tmp_path, capsys):
    command = prune_command(tmp_path / "a", "omp", "hydra:score_epochs=1")
    assert cli.main([*command, "--exclude=head,features.0"]) == 0
    payload = checkpoint.load(tmp_path / "a" / "omp" / "density-0.3" / "seed-0" / "best.pt")
    names = [*masks_of(checkpoint.load_model(payload, "best.pt"))]
    assert names == ["features.3.weight", "features.6.weight", "features.9.weight"]
    assert payload["recipe"]["method"]["exclude"] == ("head", "features.0")
    row = next(line for line in (tmp_path / "a" / "results.md").read_text().splitlines() if "| omp " in line)
    assert float(row.split("|")[2]) == pytest.approx(30, abs=1)
    assert float(row.split("|")[3]) > 35
    message = error(capsys, *prune_command(tmp_path / "b", "omp"), "--exclude=haed")
    assert "exclude: the model has no module or parameter 'haed'; did you mean 'head'?" in message


def test_a_setting_that_a_method_adds_is_an_option_in_its_docstrings_words(monkeypatch, capsys):
    """And one that nobody has described is an option, too."""

    @dataclass(frozen=True, kw_only=True)
    class ShyOMPSettings(OMPSettings):
        """`PruningSettings` of `ShyOMP`.

        Args:
            shyness: how far it keeps
                from the largest weights.
        """

        shyness: float = 0.25
        never_described: list[int] = field(default_factory=list)

    class ShyOMP(OMP):
        settings_type = ShyOMPSettings

    monkeypatch.setitem(bilevel.PRUNERS, "shy", (ShyOMP, ShyOMPSettings))
    found = {o.name: o for o in options.settings_options(ShyOMPSettings)}
    assert found["shyness"].help == "how far it keeps from the largest weights"
    assert found["never_described"].help == "never described"
    assert found["density"].help == "part of the weights that is kept, in (0, 1]"
    assert cli.main(["prune", "--help"]) == 0
    assert "shy (shyness, never_described)" in " ".join(capsys.readouterr().out.split())
    entry = Entry.parse("shy:shyness=1/2", _method_options, bilevel.PRUNERS)
    parsed = options.parse(
        options.make_parser("prune", "", [*_run_options(), *_method_options("shy")]),
        [f"{options.flag(key)}={value}" for key, value in entry.options],
    )
    assert options.pick(parsed, ShyOMPSettings)["shyness"] == 0.5
