"""What every op does under torch.func and forward mode: the right value, or a ValueError that says why not.

>>> SUPPORT["masked_linear"]
Support(jvp=True, vmap=True, grad=True)
>>> SUPPORT["topk_mask"].jvp
False
"""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import torch

import blokern.ops.attack
import blokern.ops.traced  # noqa: F401  (their rules come first)

__all__ = ["SUPPORT", "Support"]


class Support(NamedTuple):
    """jvp: forward mode, of torch.func and of torch.autograd.forward_ad. vmap. grad: reverse mode, of any order.

    False: refused with a ValueError.
    """

    jvp: bool
    vmap: bool
    grad: bool


_LAYER = Support(jvp=True, vmap=True, grad=True)
#: Steps, whose vmapped dimension joins the samples.
_BATCHED = Support(jvp=False, vmap=True, grad=False)
_NONE = Support(jvp=False, vmap=False, grad=False)
#: Masks are constants, as the results of comparisons are: nothing comes back through them.
_CONSTANT = Support(jvp=False, vmap=False, grad=True)

#: By the op's name, as in ``blokern.ops.__all__``.
SUPPORT: dict[str, Support] = {
    **dict.fromkeys(("masked_conv2d", "masked_linear", "sddmm", "spmm"), _LAYER),
    "packed_linear": Support(jvp=True, vmap=True, grad=False),
    "pack_weight": _NONE,
    **dict.fromkeys(("fast_bat_step", "pgd_step", "project"), _BATCHED),
    **dict.fromkeys(("apgd_step_", "pgd_step_", "project_", "random_start"), _NONE),
    **dict.fromkeys(("channel_mask", "filter_mask", "nm_mask", "topk_mask"), _CONSTANT),
    **dict.fromkeys(("bip_released_step_", "bip_score_step_", "masked_sgd_step_"), _NONE),
    **dict.fromkeys(("cg_update_", "multi_tensor_axpby_", "multi_tensor_dot"), _NONE),
    "activation_adjoint_tangent": _NONE,
    **dict.fromkeys(("batch_norm_adjoint", "batch_norm_adjoint_tangent", "batch_norm_tangent"), _NONE),
    **dict.fromkeys(("layer_norm_adjoint_tangent", "layer_norm_tangent", "softmax_cross_entropy_hvp"), _NONE),
}


def _refuse_vmap(name: str) -> None:
    """For an op without a rule: torch would call it once a sample, or fail with the words of a dispatcher."""

    def refuse(*_: Any) -> NoReturn:
        raise ValueError(
            f"{name} has no vmap rule: call it outside torch.vmap, on what is to be mapped as a batch"
        )

    torch.library.register_vmap(name, refuse)


for _name in torch._C._dispatch_get_all_op_names():
    if _name.startswith("blokern::") and not torch._C._dispatch_has_kernel_for_dispatch_key(
        _name, "FuncTorchBatched"
    ):
        _refuse_vmap(_name)
