"""Checkpoints written beside the training: in order, as they were at the call, and the newest good one found."""

import errno
import os
import threading

import pytest
import torch

from blokern.bilevel import checkpoint
from blokern.bilevel.saver import Saver, latest


def saved(folder, *numbers, keep_last=1):
    saver = Saver(folder, keep_last)
    for number in numbers:
        saver.save("last.pt", {"number": number})
    saver.flush()
    saver.close()


def numbers(folder):
    return {path.name: checkpoint.load(path)["number"] for path in folder.glob("*.pt")}


def test_keeps_the_last_ones(tmp_path):
    saved(tmp_path, 1, 2, 3, 4, keep_last=3)
    assert numbers(tmp_path) == {"last.pt": 4, "last-1.pt": 3, "last-2.pt": 2}
    saved(tmp_path, 5)
    assert numbers(tmp_path) == {"last.pt": 5, "last-1.pt": 3, "last-2.pt": 2}
    assert not list(tmp_path.glob(".*"))


def test_goes_on_where_a_rotation_was_cut_short(tmp_path):
    saved(tmp_path, 1, 2, keep_last=2)
    (tmp_path / "last-1.pt").unlink()
    (tmp_path / "last-1.pt").hardlink_to(tmp_path / "last.pt")
    (tmp_path / ".last-1.pt.tmp").hardlink_to(tmp_path / "last.pt")
    saved(tmp_path, 3, keep_last=2)
    assert numbers(tmp_path) == {"last.pt": 3, "last-1.pt": 2}


def test_what_is_saved_is_fixed_at_the_call(tmp_path, monkeypatch):
    go, real = threading.Event(), checkpoint.write_sealed

    def slow(path, body):
        assert go.wait(60)
        real(path, body)

    monkeypatch.setattr(checkpoint, "write_sealed", slow)
    saver, tensor = Saver(tmp_path), torch.zeros(3)
    saver.save("last.pt", {"tensor": tensor})
    saver.write("metrics.jsonl", b"{}")
    tensor.add_(1)  # the training goes on
    assert not [*tmp_path.iterdir()]
    go.set()
    saver.flush()
    saver.close()
    assert checkpoint.load(tmp_path / "last.pt")["tensor"].tolist() == [0.0] * 3
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"{}"


def test_an_error_is_raised_by_the_next_call_and_ends_the_writing(tmp_path, monkeypatch):
    saved(tmp_path, 1)
    real, failures = os.fsync, []

    def fsync(descriptor):
        if not failures:
            failures.append(descriptor)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    saver = Saver(tmp_path)
    saver.save("best.pt", {"number": 2})
    with pytest.raises(OSError, match=r"No space left on device.*best\.pt"):
        saved_next(saver)
    with pytest.raises(OSError, match="No space left on device"):  # and by every later one
        saver.flush()
    saver.close()
    assert numbers(tmp_path) == {"last.pt": 1}


def saved_next(saver):
    saver.save("last.pt", {"number": 3})  # may be quicker than the failure
    saver.flush()


def damage(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_the_newest_good_one_is_found(tmp_path):
    warnings = []
    assert latest(tmp_path, warnings.append) is None
    saved(tmp_path, 1, 2, 3, keep_last=3)
    payload, path = latest(tmp_path, warnings.append)
    assert (payload["number"], path.name, warnings) == (3, "last.pt", [])
    damage(tmp_path / "last.pt")
    (tmp_path / "last-1.pt").unlink()
    payload, path = latest(tmp_path, warnings.append)
    assert (payload["number"], path.name) == (1, "last-2.pt")
    assert len(warnings) == 1
    assert "last.pt is damaged" in warnings[0]
    assert "continuing from" in warnings[0]
    damage(tmp_path / "last-2.pt")
    with pytest.raises(checkpoint.CheckpointError, match=r"last\.pt is damaged"):
        latest(tmp_path, warnings.append)


@pytest.mark.parametrize("keep_last", [0, -1, 1.5, None])
def test_refuses_a_number_to_keep(tmp_path, keep_last):
    with pytest.raises(ValueError, match="keep_last must be a number >= 1, got"):
        Saver(tmp_path, keep_last)
