"""``blokern bench``."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import half_of_the_filters, pruned, single_weights
from commands import error

import blokern
from blokern import cli, ops
from blokern.bilevel import checkpoint
from blokern.cli import bench


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
    assert "the benchmarks come with the repository" in error(capsys, "bench", "all", code=1)


def test_bench_tells_both_kinds_also_outside_the_repository(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "blokern" / "cli" / "bench.py"))
    assert cli.main(["bench", "--help"]) == 0
    words = capsys.readouterr().out
    assert "blokern bench model CHECKPOINT" in words
    assert "blokern bench SUITE" in words


# --- bench model --------------------------------------------------------------------------------------------


def bench_model(path, *options):
    return ["bench", "model", str(path), "--threads=1", "--rounds=1", *options]


FORMS = ["dense", "dense, channels_last", "sparse", "sparse, samples innermost"]
SMALLER = ["compacted", "compacted, channels_last"]


@pytest.mark.parametrize(
    ("masking", "forms"), [(single_weights, FORMS), (half_of_the_filters, FORMS + SMALLER)]
)
def test_bench_model_times_every_form_of_a_network(tmp_path, capsys, masking, forms):
    path, file = tmp_path / "a.pt", tmp_path / "a.json"
    checkpoint.save(path, pruned(masking))
    assert cli.main(bench_model(path, "--batch=1,3", "--json", str(file))) == 0
    printed, told = capsys.readouterr()
    assert printed.startswith(f"{path}: ")
    assert (f"not compacted: {path} cannot be compacted: its masks free no channel" in told) == (
        forms == FORMS
    )
    for part, batch in zip(printed.split("### batch ")[1:], (1, 3), strict=True):
        lines = part.splitlines()
        assert lines[0] == str(batch)
        assert [line.strip("| ").split(" | ")[0] for line in lines[4:] if line] == forms

    result = json.loads(file.read_text())
    assert (result["checkpoint"], result["input_shape"]) == (str(path), [1, 8, 8])
    assert result["machine"]["threads"] == 1
    assert [(row["case"], row["rival"]) for row in result["rows"]] == [
        (f"batch {batch}", form) for batch in (1, 3) for form in forms
    ]
    assert all(row["seconds"] > 0 for row in result["rows"])
    assert all(row["times_ours"] == 1 for row in result["rows"] if row["rival"] == "dense")


def test_bench_model_needs_no_repository(tmp_path):
    """In a process of its own, where only the package is."""
    checkpoint.save(tmp_path / "a.pt", pruned(single_weights))
    (tmp_path / "blokern").symlink_to(Path(blokern.__file__).parent)
    code = "import sys; sys.modules['benchmarks'] = None; from blokern.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, *bench_model(tmp_path / "a.pt", "--batch=2")]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "### batch 2" in run.stdout


def test_bench_model_times_no_wrong_results(tmp_path, capsys, monkeypatch):
    checkpoint.save(tmp_path / "a.pt", pruned(single_weights))
    real = ops.masked_linear
    monkeypatch.setattr(ops, "masked_linear", lambda *args, **options: 1.01 * real(*args, **options))
    message = error(capsys, *bench_model(tmp_path / "a.pt"), code=1)
    assert message.startswith("sparse: its outputs differ from the dense network's by ")
    monkeypatch.undo()
    broken = pruned(single_weights)
    broken["model"]["head.3.bias"].fill_(torch.nan)
    checkpoint.save(tmp_path / "a.pt", broken)
    assert "dense: its outputs differ from the dense network's by nan" in error(
        capsys, *bench_model(tmp_path / "a.pt"), code=1
    )


def test_bench_model_names_what_is_wrong(tmp_path, capsys):
    path = tmp_path / "a.pt"
    assert "missing.pt" in error(capsys, "bench", "model", tmp_path / "missing.pt", code=1)
    assert "required: checkpoint" in error(capsys, "bench", "model")
    checkpoint.save(path, pruned(None))
    assert f"{path} has no masks" in error(capsys, *bench_model(path))
    checkpoint.save(path, pruned(single_weights, data=None))
    assert "give input_shape, such as 3,32,32" in error(capsys, *bench_model(path))
    for options, message in {
        "--batch=0": "batch must be at least 1, got 0",
        "--batch=2,2": "batch must differ, got 2, 2",
        "--batch=x": "'x'",
        "--rounds=0": "rounds must be at least 1, got 0",
        "--threads=0": "threads must be at least 1, got 0",
        "--input-shape=2,8,8": "takes no images of input_shape (2, 8, 8)",
    }.items():
        assert message in error(capsys, *bench_model(path, options))
    assert cli.main(bench_model(path, "--batch=1", "--input-shape=1,9,9")) == 0
