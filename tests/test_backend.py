"""The native build: each instruction set this machine has, the override, and what a broken installation says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import types

import pytest
import torch
from instruction_sets import supported

from blokern import _backend

# Every op on every dtype and norm, hashed: run once an instruction set, compared bit for bit.
DIGEST = """
import hashlib, sys
sys.path.insert(0, {tests!r})
import torch
from ops_cases import DTYPES, NORMS, calls, images
from blokern import _backend, ops
digest = hashlib.sha256()
for shape in ((5, 3, 9, 11), (2, 3, 64, 64)):
    for dtype in DTYPES:
        tensors = images(shape, dtype)
        for norm in NORMS:
            outputs = [t for call in calls(ops, norm).values() for t in call(*tensors)]
            outputs.append(ops.random_start(tensors[1], 0.2, norm=norm, generator=torch.Generator().manual_seed(3)))
            for t in outputs:
                digest.update(t.view(torch.uint8).numpy().tobytes())
print(_backend.CPU_CAPABILITY, digest.hexdigest())
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_same_bits_on_every_instruction_set() -> None:
    tests = os.path.join(os.path.dirname(__file__), "attack")  # noqa: PTH118, PTH120
    lines = {}
    for name in supported():
        result = run(DIGEST.format(tests=tests), **{_backend.OVERRIDE: name})
        assert result.returncode == 0, result.stderr
        loaded, digest = result.stdout.split()
        assert loaded == name
        lines[name] = digest
    assert len(set(lines.values())) == 1, lines


def test_the_best_build_is_loaded() -> None:
    result = run("from blokern import _backend; print(_backend.CPU_CAPABILITY)", **{_backend.OVERRIDE: ""})
    assert result.returncode != 0, "an empty override is a mistake too"
    environment = {k: v for k, v in os.environ.items() if k != _backend.OVERRIDE}
    code = "from blokern import _backend; print(_backend.CPU_CAPABILITY)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert loaded.stdout.strip() == supported()[-1]


def test_an_unknown_instruction_set_is_refused() -> None:
    result = run("import blokern.ops", **{_backend.OVERRIDE: "AVX1024"})
    assert result.returncode != 0
    assert "BLOKERN_CPU_CAPABILITY must be one of" in result.stderr
    assert "'AVX1024'" in result.stderr


def test_another_torch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "0.0.0")
    with pytest.raises(ImportError, match=r"built for torch .* and this is torch 0\.0\.0"):
        _backend._load_core()


def test_build_info_is_complete() -> None:
    info = _backend.build_info()
    assert info["CPU kernels loaded"] in info["CPU kernels built"].split()
    assert info["CUDA kernels"].startswith(("yes", "no: "))
    assert all(info.values())


def test_cuda_kernels_that_do_not_load_are_told() -> None:
    core = types.SimpleNamespace(cuda="yes: CUDA 13.0, nvcc 13.0")
    with pytest.raises(
        ImportError, match=r"built with CUDA kernels \(yes: CUDA 13\.0, nvcc 13\.0\), which cannot"
    ):
        _backend._load_cuda(core)


REFUSED = """
import types, torch
from blokern import _backend, ops
if torch.version.cuda is None:  # else the package has done so
    _backend._refuse_cuda(types.SimpleNamespace(cuda="no: torch is built for CUDA 13.0, and there is no nvcc"))
key, x = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), torch.zeros(1, 2)
for op, arguments in (
    (torch.ops.blokern.mask_words.default, (x > 0,)),
    (torch.ops.blokern.pgd_step.default, (x, x, x, 0.1, 0.1, None, None, 0, 0.0, 1.0, None)),
):
    try:
        op.redispatch(key, *arguments)
    except NotImplementedError as error:  # as torch's dispatcher raises for a device without kernels
        print(error)
print(ops.pgd_step(x, x, x, 0.1, 0.1).tolist())
"""


@pytest.mark.skipif(_backend.HAS_CUDA_KERNELS, reason="there are CUDA kernels")
def test_ops_say_why_there_are_no_cuda_kernels() -> None:
    told = run(REFUSED)
    assert told.returncode == 0, told.stderr
    *errors, result = told.stdout.splitlines()
    expected = re.compile(
        r"blokern has no CUDA kernels \(torch is built for CUDA [\d.]+, and .*\): build it again"
    )
    assert [expected.match(error) is not None for error in errors] == [True, True]
    assert result == "[[0.0, 0.0]]"
