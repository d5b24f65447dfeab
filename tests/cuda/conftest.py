"""The families' cases and oracle checks also serve their ops on a device."""

import sys
from pathlib import Path

import pytest
import torch

for family in ("attack", "sparse", "curvature"):
    sys.path.insert(0, str(Path(__file__).parent.parent / family))

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, no_gpu])])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU too: what these tests are made of must run where there is no GPU."""
    return torch.device(request.param)


@pytest.fixture
def cuda() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda")
