"""Loads the native code: ``_C``, the one CPU library that fits this processor, and the CUDA kernels where they are
built. Fails loudly: no fallback."""

from __future__ import annotations

import importlib
import os
from types import ModuleType
from typing import NoReturn

import torch

__all__ = ["CPU_CAPABILITY", "HAS_CUDA_KERNELS", "C", "build_info"]

#: Overrides the choice of CPU library; a value of ``blokern info``'s list of built ones.
OVERRIDE = "BLOKERN_CPU_CAPABILITY"


def _load_core() -> ModuleType:
    try:
        core = importlib.import_module("blokern._C")
    except ImportError as error:
        raise ImportError(
            "blokern's native module is not built for this Python and torch: run `make build` in the checkout, "
            f"or `pip install --no-build-isolation .` ({error})"
        ) from error
    if core.torch_version != torch.__version__:
        raise ImportError(
            f"blokern was built for torch {core.torch_version}, and this is torch {torch.__version__}: build it again"
        )
    return core


def _load_cpu(core: ModuleType) -> str:
    built = core.cpu_capabilities.split()
    wanted = os.environ.get(OVERRIDE)
    if wanted is None:
        # The processor may know an instruction set newer than any built here; the plain build runs everywhere.
        name = torch.backends.cpu.get_cpu_capability()
        wanted = name if name in built else "DEFAULT"
    elif wanted not in built:
        raise ImportError(f"{OVERRIDE} must be one of {', '.join(built)}, got {wanted!r}")
    importlib.import_module(f"blokern._cpu_{wanted.lower()}")
    return wanted


def _load_cuda(core: ModuleType) -> bool:
    built: bool = core.cuda.startswith("yes")
    if built:
        try:
            importlib.import_module("blokern._cuda")
        except ImportError as error:
            raise ImportError(
                f"blokern was built with CUDA kernels ({core.cuda}), which cannot be loaded: {error}"
            ) from error
    return built


def _refuse_cuda(core: ModuleType) -> None:
    """Lets every op say on CUDA tensors why there are no kernels for them, with the error of torch's dispatcher for
    a device that an op is not built for."""

    def refuse(*_: object, **__: object) -> NoReturn:
        # Nothing that is unfinished: this build leaves the kernels out, and this is what the dispatcher itself raises.
        raise NotImplementedError(
            f"blokern has no CUDA kernels ({core.cuda.removeprefix('no: ')}): build it again with FORCE_CUDA=1, "
            "which says what is missing, or move the tensors to the CPU"
        )

    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("blokern::"):
            torch.library.impl(name, "CUDA")(refuse)


C: ModuleType = _load_core()
#: The instruction set whose kernels are loaded.
CPU_CAPABILITY: str = _load_cpu(C)
#: Whether the ops run on CUDA tensors.
HAS_CUDA_KERNELS: bool = _load_cuda(C)
if not HAS_CUDA_KERNELS and torch.version.cuda is not None:  # else there are no such tensors
    _refuse_cuda(C)


def build_info() -> dict[str, str]:
    """What was built and what is loaded, by name, for ``blokern info``."""
    return {
        "compiler": C.compiler,
        "built for torch": C.torch_version,
        "CPU kernels built": C.cpu_capabilities,
        "CPU kernels loaded": CPU_CAPABILITY,
        "CUDA kernels": C.cuda,
    }
