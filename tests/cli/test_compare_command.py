"""``blokern compare``."""

import json

import torch
from commands import QUICK, error

from blokern import cli
from blokern.bilevel import checkpoint
from blokern.cli import compare


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
    monkeypatch.setattr(compare, "attacked", lambda *a, **k: asked.append(a[0].path) or real(*a, **k))
    assert cli.main(compare_command(tmp_path, "fast-at", "plain", seeds="0,1")) == 0
    assert {file: file.read_bytes() for file in done} == done
    # One epoch: the last is the best, so one attack a new run.
    assert [path.parent.relative_to(tmp_path).as_posix() for path in asked] == [
        "fast-at/seed-1",
        "plain/seed-0",
        "plain/seed-1",
    ]

    asked.clear()
    assert cli.main([*compare_command(tmp_path, "fast-at", "plain", seeds="0,1"), "--steps=3"]) == 0
    assert len(asked) == 4  # another attack is another question


def test_compare_refuses_runs_of_other_settings(tmp_path, capsys):
    assert cli.main(compare_command(tmp_path, "plain", seeds="0")) == 0
    again = compare_command(tmp_path, "plain", seeds="0")
    assert "settings.lr is 0.2 there and 0.3 here" in error(capsys, *again, "--lr=0.3")
