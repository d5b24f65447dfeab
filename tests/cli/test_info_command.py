"""``blokern info``."""

import pytest
import torch

from blokern import __version__, cli
from blokern.cli import info


def test_info_names_versions_and_machine(capsys):
    assert cli.main(["info", "--threads=1"]) == 0
    lines = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["blokern"].strip() == __version__
    assert lines["torch"].strip() == torch.__version__
    assert lines["cpu threads"].strip() == "1"
    assert {"python", "cpu instruction set", "cuda"} <= set(lines)


@pytest.mark.parametrize(
    ("version", "names", "expected"),
    [
        ("12.8", ["H100", "H200"], "12.8; H100, H200"),
        ("12.8", [], "12.8; no device"),
        (None, [], "not built"),
    ],
)
def test_info_names_cuda_and_its_devices(monkeypatch, version, names, expected):
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(torch.cuda, "get_device_name", names.__getitem__)
    assert info.machine()["cuda"] == expected
