"""Every module of blokern can be imported where warnings are errors."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

#: In one process. Modules for a peer that is not installed say so; those whose peer itself warns are left out.
CODE = """
import importlib, pkgutil, warnings
import torch
warnings.simplefilter("error")
import blokern
PEERS = ("blokern.attack.torchattacks", "blokern.attack.foolbox", "blokern.bilevel.lightning")
names = [module.name for module in pkgutil.walk_packages(blokern.__path__, "blokern.")]
for name in names:
    if name in (*PEERS, "blokern.__main__") or name.startswith(("blokern._C", "blokern._cpu", "blokern._cuda")):
        continue
    importlib.import_module(name)
print(len(names))
"""


def test_no_module_warns_when_it_is_imported():
    run = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) > 80


def test_the_library_leaves_the_threads_waiting_to_its_user():
    code = "import os, blokern.attack, blokern.bilevel; print(os.environ.get('OMP_WAIT_POLICY'))"
    environment = {"PATH": "/usr/bin:/bin"}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "None"
