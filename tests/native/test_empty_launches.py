"""Calls of the kernels' host functions with nothing to do: a launch of no blocks is an error in CUDA, and under
emulation. The ops mostly return before they come here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from emulated import EmulatedOps
from emulated_curvature import EmulatedCurvatureOps
from server import Server
from sparse_emulated import EmulatedSparse
from test_ops import ALL, NORMS

NAMES = (
    "samples size first seed_high seed_low clip_min clip_max step_size eps momentum rows classes ignore_index"
    " label_smoothing factor channels pixels channels_inner train kinds blocks columns places tensors cols block"
    " entries weight_stride x_stride row_stride col_stride sample_stride layers selections n m inner groups lr"
    " weight_decay implicit"
)
#: Sizes other than 0, such that there still is nothing; m and block divide.
ATTACK = [{"samples": 2}, {"size": 5}]
CURVATURE: dict[str, list[dict[str, int]]] = {
    "softmax_cross_entropy_hvp": [{"classes": 5}],
    "silu_adjoint_tangent": [{}],
    **{
        op: [
            {"samples": 2, "channels": 3, "channels_inner": inner},
            {"samples": 2, "pixels": 3, "channels_inner": inner},
            {"channels": 2, "pixels": 3, "channels_inner": inner},
        ]
        for op, inner in (("batch_norm_tangent", 0), ("batch_norm_adjoint", 1))
    },
    "layer_norm_tangent": [{"size": 5, "kinds": 1}],
    "layer_norm_adjoint_tangent": [{"size": 5, "kinds": 1}],
    "multi_tensor_dot": [{}, {"columns": 2}],
    "multi_tensor_axpby_": [{}],
    "cg_update_": [{}, {"columns": 2}],
    "total_of_blocks": [{}],
}
MATRIX = [{"rows": 3, "block": 64}, {"cols": 70, "block": 128}]
PRODUCT = [{"rows": 3, "cols": 70, "block": 128}, {"cols": 70, "samples": 5, "block": 128}]
SPARSE: dict[str, list[dict[str, int]]] = {
    **dict.fromkeys(("pack_mask", "unpack_mask", "transpose_mask", "count_stream", "fill_stream"), MATRIX),
    **dict.fromkeys(("apply_mask", "clear_masked", "pack_entries", "unpack_entries"), MATRIX),
    **dict.fromkeys(("skinny_spmm", "stream_spmm", "packed_spmm"), PRODUCT),
    "stream_sddmm": PRODUCT[1:],
    "nm_mask": [{"n": 2, "m": 4, "inner": 1}, {"n": 2, "m": 5, "inner": 1}],
    "count_words": [{}],
    "topk_mask": [{}],
    "masked_sgd_step_": [{}],
    "bip_score_step_": [{}],
    "bip_released_step_": [{}],
}
OF_ATTACK = sorted({f"{op.removesuffix('_')}_{norm}" for op, norm in ALL if op != "fast_bat_step"})
CASES = [
    *((EmulatedOps, op, ATTACK) for op in [*OF_ATTACK, "fast_bat_step"]),
    *((EmulatedOps, f"random_start_{norm}", ATTACK) for norm in NORMS),
    *((EmulatedCurvatureOps, op, cases) for op, cases in CURVATURE.items()),
    *((EmulatedSparse, op, cases) for op, cases in SPARSE.items()),
]


@pytest.mark.parametrize(("family", "op", "cases"), CASES, ids=[op for _, op, _ in CASES])
def test_nothing_is_launched_for_nothing(family: Any, op: str, cases: list[dict[str, int]]) -> None:
    server = Server(family.program(), "forward")
    dtypes = [torch.float32] * (2 if family is EmulatedOps else 1)
    for case in cases:
        numbers = dict.fromkeys(NAMES.split(), 0) | case
        got = server.call(op, dtypes, numbers, {"ok": torch.ones(1)})
        assert got["ok"] == 1
    server.close()
