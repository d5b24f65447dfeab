"""The families' cases and oracle checks also serve their emulated CUDA kernels."""

import sys
from pathlib import Path

for family in ("attack", "sparse", "curvature"):
    sys.path.insert(0, str(Path(__file__).parent.parent / family))
