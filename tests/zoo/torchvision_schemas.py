"""Lets torchvision be imported beside a CPU build of torch: PyPI's torchvision is built for CUDA, its library does
not load, and its Python then asks for the schemas of ops that no network here calls. Import this before torchvision
or timm."""

from __future__ import annotations

import torch

_library = torch.library.Library("torchvision", "FRAGMENT")
for _name in ("nms", "qnms"):
    if not hasattr(torch.ops.torchvision, _name):
        _library.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
