"""The program as a process: its streams, its signals, its threads, its memory."""

import io
import os
import signal
import subprocess
import sys
import warnings

import pytest
import torch
from commands import QUICK, ROOT, blokern_process, error

from blokern import cli
from blokern.bilevel import Trainer, checkpoint
from blokern.cli import dispatch, options, streams

DRAW = Trainer._draw
TRAIN = ["train", "plain", "--epochs=1", *QUICK]


def shell(command, **environment):
    words = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        command, shell=True, cwd=ROOT, env=words, capture_output=True, text=True, check=False
    )


# --- Streams ------------------------------------------------------------------------------------------------


def test_readers_that_leave_end_no_training(tmp_path):
    train = f"{sys.executable} -m blokern {' '.join(TRAIN)}"
    run = shell(f"{{ {train} --out {tmp_path / 'a'}; echo code $? >&3; }} 3>&2 2>&1 | true")
    assert run.stderr.strip() == "code 0"
    run = shell(f"{train} --out {tmp_path / 'b'} >&- 2>&-")
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    for name in "ab":
        assert checkpoint.load(tmp_path / name / "last.pt")["epoch"] == 1


class Pipe(io.StringIO):
    """One whose reader left."""

    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")


@pytest.mark.parametrize("stream", [None, Pipe()])
def test_no_stream_ends_a_training_in_python(tmp_path, monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", stream)
    assert cli.main([*TRAIN, "--out", str(tmp_path)]) == 0


def test_a_full_disk_is_no_reader_that_left():
    full = Pipe()
    full.write = lambda text: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    with pytest.raises(OSError, match="No space left"):
        streams._Stream(full).write("a")


def test_a_terminal_without_the_fields_letters_gets_others():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    streams._Stream(stream).write("−1 ± 2 → λ 京")
    stream.flush()
    assert raw.getvalue() == b"-1 +- 2 -> lambda ?"


def test_a_warning_is_a_line():
    before = warnings.formatwarning
    with streams.plain_warnings():
        told = warnings.formatwarning("so it is", UserWarning, "source.py", 7, "the_line()")
    assert told == "blokern: warning: so it is\n"
    assert warnings.formatwarning is before


# --- Signals ------------------------------------------------------------------------------------------------


def test_a_hangup_saves(tmp_path):
    run = blokern_process("train", "plain", "--epochs=50", *QUICK, "--out", str(tmp_path))
    for line in run.stderr:
        if line.startswith("epoch 2/50"):
            run.send_signal(signal.SIGHUP)
            break
    rest = run.stderr.read()
    assert run.wait() == 128 + signal.SIGHUP
    assert "stopped by SIGHUP" in rest
    assert checkpoint.load(tmp_path / "last.pt")["epoch"] >= 2


def test_ctrl_c_while_the_program_loads(monkeypatch, capsys):
    def interrupted(words):
        raise KeyboardInterrupt

    monkeypatch.setattr(dispatch, "run", interrupted)
    assert cli.main(["info"]) == 130
    assert capsys.readouterr().err == "blokern: stopped\n"


# --- Threads ------------------------------------------------------------------------------------------------


def waiting(**environment):
    words = {name: value for name, value in os.environ.items() if name not in cli.WAITING}
    command = [sys.executable, "-m", "blokern", "info"]
    run = subprocess.run(
        command, cwd=ROOT, env={**words, **environment}, capture_output=True, text=True, check=True
    )
    return next(line.partition(":")[2].strip() for line in run.stdout.splitlines() if "threads wait" in line)


def test_idle_threads_sleep_unless_the_user_has_chosen():
    assert waiting() == "OMP_WAIT_POLICY=PASSIVE"
    assert waiting(GOMP_SPINCOUNT="1000") == "GOMP_SPINCOUNT=1000"


@pytest.mark.parametrize("count", [2000, 20000, 1000000, 10**30])
def test_no_machine_has_so_many_threads(tmp_path, capsys, count):
    message = error(capsys, *TRAIN, "--out", tmp_path / "a", f"--threads={count}")
    assert message.startswith("threads must be at most ")
    assert not (tmp_path / "a").exists()


def test_the_last_checkpoints_have_a_limit(tmp_path, capsys):
    message = error(capsys, *TRAIN, "--out", tmp_path / "a", "--keep-last=1000000")
    assert message == "keep_last must be at most 1000, got 1000000"


# --- Memory, pictures ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "raised",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you "
                     "tried to allocate 5497558138880 bytes. Error code 12 (Cannot allocate memory)"),
    ],
)  # fmt: skip
def test_too_little_memory_is_a_line(tmp_path, capsys, monkeypatch, raised):
    def broken(argv):
        raise raised

    monkeypatch.setitem(dispatch.COMMANDS, "info", broken)
    message = error(capsys, "info", code=1)
    assert message.startswith("out of memory")
    assert "--batch-size" in message
    assert ("5,120.0 GiB" in message) == isinstance(raised, RuntimeError) - isinstance(
        raised, torch.OutOfMemoryError
    )


def test_no_picture_fails_a_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Trainer, "_draw", DRAW)
    seven = ["--data=synthetic:7x8x8x3" if word.startswith("--data=") else word for word in TRAIN]
    assert cli.main([*seven, "--out", str(tmp_path / "a")]) == 0
    assert "a picture is not drawn: clean must be [N, C, H, W] with C of 1 or 3" in capsys.readouterr().err
    assert (tmp_path / "a" / "curves.png").exists()

    def broken(*_):
        raise RuntimeError("no font")

    monkeypatch.setattr("blokern.plots._write", broken)
    assert cli.main([*TRAIN, "--out", str(tmp_path / "b")]) == 0
    assert "a picture is not drawn: no font" in capsys.readouterr().err


def test_a_study_says_how_far_it_is(capsys):
    turns = options.Turns(3)
    for name in ("a", "b", "c"):
        turns.next(name)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "run 1 of 3: a"
    assert [line.split(";")[0] for line in lines[1:]] == ["run 2 of 3: b", "run 3 of 3: c"]
    assert all("left" in line for line in lines[1:])
