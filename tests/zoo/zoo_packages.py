"""Makes the libraries of the zoo's networks importable. Import this before any of them.

They lie in a folder of their own (`make setup`), as other libraries import torchvision wherever they find it, and
PyPI's is built for CUDA: beside a CPU build of torch its library does not load, and its Python then asks for the
schemas of ops that no network here calls.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

FOLDER = Path(sys.prefix) / "zoo"
if FOLDER.is_dir():
    sys.path.append(str(FOLDER))

_library = torch.library.Library("torchvision", "FRAGMENT")
for _name in ("nms", "qnms"):
    if not hasattr(torch.ops.torchvision, _name):
        _library.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
