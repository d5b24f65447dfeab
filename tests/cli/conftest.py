import pytest
import torch
from commands import QUICK

from blokern import cli
from blokern.bilevel import Trainer


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
