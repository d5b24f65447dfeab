"""The attack family's cases and oracle checks also serve its emulated CUDA kernels."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "attack"))
