import pytest
from runs import make

from blokern.bilevel import Trainer


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory):
    """The folder of a run of Fast-BAT."""
    run_dir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    make(run_dir).fit()
    return run_dir


@pytest.fixture
def no_pictures(uninterrupted, monkeypatch):
    """Drawing takes longer than training here; the run of `uninterrupted` is drawn."""
    monkeypatch.setattr(Trainer, "_draw", lambda trainer: None)
