"""The command line under torchrun; and that it goes on after a process was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import torch

from blokern.bilevel import checkpoint
from blokern.cli import main

TRAIN = [
    "train",
    "fast-bat",
    "--data=digits",
    "--train-limit=200",
    "--epochs=8",
    "--batch-size=32",
    "--eps=0.1",
]
TRAIN += ["--val-steps=1", "--width=2", "--resume"]


def torchrun(*words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *words]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # docs/distributed.md says why
    return subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def workers(parent: int) -> list[int]:
    """The processes that torchrun has started, in order of rank."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return sorted(int(child) for child in children if "blokern" in Path(f"/proc/{child}/cmdline").read_text())


ENDS = """
import os
import sys
import weakref
from pathlib import Path
import torch
import torch.distributed as dist
from blokern.distributed import joined

with joined() as processes:
    keeper = [processes]
    keeper.append(keeper)  # as a trainer and its rule hold it, until Python ends
    processes.sum_([torch.ones(3)])
    group = weakref.ref(dist.group.WORLD)
assert group() is None  # and so its threads are gone
try:
    processes.largest([1])
except ConnectionError as error:
    # A file each: what processes print at once may share a line.
    (Path(sys.argv[1]) / os.environ["RANK"]).write_text(str(error))
"""


def test_the_group_ends_with_its_block(tmp_path: Path) -> None:
    """Else one of its threads may meet the end of Python, and take the program down."""
    script = tmp_path / "ends.py"
    script.write_text(ENDS)
    run = torchrun(str(script), str(tmp_path))
    errors = run.communicate(timeout=120)[1]
    assert run.returncode == 0, errors
    for rank in ("0", "1"):
        assert (tmp_path / rank).read_text().startswith("the processes have parted")


def test_trains_and_restarts_from_the_last_checkpoint(tmp_path: Path) -> None:
    run = torchrun("--max-restarts=1", "-m", "blokern", *TRAIN, f"--out={tmp_path}")
    said = []
    assert run.stderr is not None
    for line in run.stderr:
        said.append(line)
        if line.startswith("epoch 1/8") and not any("continuing" in words for words in said):
            os.kill(workers(run.pid)[-1], signal.SIGKILL)
    assert run.wait() == 0, "".join(said)
    assert run.stdout is not None
    # The first process alone speaks.
    assert run.stdout.read().count("best: epoch") == 1
    words = "".join(said)
    assert words.count("epoch 8/8") == 1
    assert "continuing" in words
    assert checkpoint.load(tmp_path / "last.pt")["epoch"] == 8
    names = {"last.pt", "best.pt", "metrics.jsonl", "settings.yaml", "curves.png"}
    assert {p.name for p in tmp_path.iterdir()} >= names


def test_prunes_as_one_process_with_the_statistics_of_the_whole_batch(tmp_path: Path) -> None:
    words = [
        "prune",
        "omp",
        "--density=0.3",
        "--data=digits",
        "--train-limit=200",
        "--epochs=1",
        "--batch-size=32",
    ]
    words += ["--width=2", "--seeds=0", "--augment=false", "--sync-batch-norm=true"]
    assert main([*words, f"--out={tmp_path / 'one'}"]) == 0
    run = torchrun("-m", "blokern", *words, f"--out={tmp_path / 'two'}")
    said = run.communicate()[1]
    assert run.returncode == 0, said
    (one,), (two,) = (sorted((tmp_path / name).glob("omp/**/last.pt")) for name in ("one", "two"))
    want, got = checkpoint.load(one)["model"], checkpoint.load(two)["model"]
    assert want.keys() == got.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
