"""`make gpu` as far as it goes without a GPU: its benchmarks on the CPU, its steps on other commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import cuda, gpu
from benchmarks.gpu import Outcome, Step

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def quick_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


def test_benchmarks_write_json_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "cuda.json"
    cuda.main(["--device", "cpu", "--small", "--rounds", "1", "--out", str(out)])
    told = json.loads(out.read_text())
    kernels = {row["case"].split()[0].rstrip(",") for row in told["rows"]}
    assert {"pgd_step", "apgd_step", "fast_bat_step", "random_start", "softmax_cross_entropy_hvp"} < kernels
    assert {
        "activation_adjoint_tangent",
        "batch_norm_adjoint_tangent",
        "layer_norm_adjoint_tangent",
        *("cg_update_", "topk_mask", "masked_linear"),
    } < kernels
    table = capsys.readouterr().out.split("| kernel |")[1]
    assert len(table.splitlines()) - 2 == len({row["case"] for row in told["rows"] if "copy" in row["rival"]})


def test_no_case_begins_after_its_time(capsys: pytest.CaptureFixture[str]) -> None:
    assert cuda.race(CPU, 1, -1.0, small=True) == []
    assert "no time left for: pgd_step linf" in capsys.readouterr().out


@pytest.mark.parametrize(
    "case", ["softmax", "activation", "batch_norm", "layer_norm", "pgd_step l2", "topk", "masked_linear"]
)
def test_rivals_compute_the_same(case: str) -> None:
    for found in cuda.cases(CPU, small=True):
        if found.name.startswith(case) and cuda.EAGER in found.rivals:
            theirs = found.rivals[cuda.EAGER]()  # first: ours steps in place
            leaves = torch.utils._pytree.tree_leaves
            for one, other in zip(leaves(found.rivals[cuda.OURS]()), leaves(theirs), strict=True):
                torch.testing.assert_close(one.double(), other.double(), rtol=1e-2, atol=2e-2)


def python(name: str, code: str, seconds: float = 30.0) -> Step:
    return Step(name, (sys.executable, "-c", code), seconds, (("GREETING", "hello"),))


def test_each_step_has_its_outcome(tmp_path: Path) -> None:
    steps = [
        python("build", "import os; assert os.environ['GREETING'] == 'hello'"),
        python("tests", "raise SystemExit(3)"),
        python("endless", "import time; time.sleep(60)", 0.2),
        Step("memcheck", ("no-such-program",), 1.0),
        python("last", "import benchmarks"),
    ]
    outcomes = gpu.run_all(steps)
    assert [o.outcome for o in outcomes] == [
        "passed",
        "failed (exit code 3)",
        "out of time",
        "not run: no no-such-program here",
        "passed",
    ]
    (tmp_path / "cuda.json").write_text('{"rows": []}')
    told = json.loads(gpu.write(tmp_path, outcomes, "a card").read_text())
    assert told["card"] == "a card"
    assert told["steps"][1]["outcome"] == "failed (exit code 3)"
    assert told["benchmarks"] == {"rows": []}
    assert "endless" in gpu.summary(outcomes)


def test_the_whole_has_a_limit() -> None:
    outcomes = gpu.run_all([python("build", "pass"), python("tests", "pass")], total=-1.0)
    assert [o.outcome for o in outcomes] == ["not run: no time left", "not run: no build"]


def test_nothing_runs_without_a_build() -> None:
    outcomes = gpu.run_all([python("build", "raise SystemExit(1)"), python("tests", "pass")])
    assert outcomes[1] == Outcome("tests", "not run: no build", 0.0)


def test_dry_run_names_every_step(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--dry-run"]) == 0
    told = capsys.readouterr().out
    names = [line.split(",")[0] for line in told.splitlines()]
    assert names == ["build", "tests", "benchmarks", "memcheck", "racecheck"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_that_there_is_no_gpu(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert gpu.main(["--out", str(tmp_path / "out")]) == 1
    assert "no CUDA device to be seen by" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_needs_no_package_that_only_developers_have() -> None:
    """A machine with a GPU has torch, numpy and pytest, and perhaps no network."""
    code = """
import sys
for name in ("curvlinops", "expecttest", "hypothesis", "jsonargparse", "matplotlib", "pyautoattack", "torchattacks"):
    sys.modules[name] = None
import pytest
import benchmarks.cuda, benchmarks.gpu
raise SystemExit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", "tests/cuda"]))
"""
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=gpu.ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "test_ops_on_device.py" in run.stdout
