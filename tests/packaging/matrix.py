"""Builds, installs and tries the package with other versions of Python and torch.

    python tests/packaging/matrix.py python3.11=2.13.0 python3.13=2.14.1 [--tests]

For each: a source distribution, a wheel made of it, the wheel in a fresh environment, and smoke.py in an empty folder;
with --tests the whole test suite, too. What came of it is put into results.json, one entry for each pair of versions.
Needs the network, as pip does.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).with_name("results.json")
#: What pip needs beside torch to build without an environment of its own, in which torch would be another one.
BUILD = ("setuptools>=77", "wheel", "ninja", "numpy")


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(
            f"{' '.join(map(str, command))} failed\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
        )
    return done.stdout


def unpacked_sdist(python: Path, folder: Path) -> Path:
    """The tree as its source distribution has it."""
    clean = folder / "clone"
    run("git", "clone", "-q", ROOT, clean, cwd=folder)
    run(python, "setup.py", "-q", "sdist", "--dist-dir", folder, cwd=clean)
    (archive,) = folder.glob("blokern-*.tar.gz")
    shutil.unpack_archive(archive, folder / "sdist", filter="data")
    (tree,) = (folder / "sdist").iterdir()
    return tree


def environment(interpreter: str, folder: Path, *packages: str) -> Path:
    """The interpreter of a fresh environment with these packages."""
    run(interpreter, "-m", "venv", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", *packages, cwd=folder.parent)
    return python


def tried(interpreter: str, torch: str, folder: Path, with_tests: bool) -> dict[str, object]:
    builder = environment(interpreter, folder / "builder", f"torch=={torch}", *BUILD)
    tree = unpacked_sdist(builder, folder)
    run(
        builder,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-build-isolation",
        "--no-deps",
        "-w",
        folder,
        tree,
        cwd=folder,
    )
    (wheel,) = folder.glob("blokern-*.whl")
    user = environment(interpreter, folder / "user", f"torch=={torch}", str(wheel))
    (folder / "empty").mkdir()
    facts: dict[str, object] = json.loads(run(user, tree / "tests/packaging/smoke.py", cwd=folder / "empty"))
    if with_tests:
        install = (builder, "-m", "pip", "install", "-q")
        run(*install, "--no-build-isolation", "-e", f"{tree}[dev]", cwd=tree)
        alone = (*install, "--no-deps", "-c", "constraints.txt")
        run(*alone, "-r", "tests/peers.txt", cwd=tree)
        run(*alone, "-t", builder.parents[1] / "zoo", "-r", "tests/zoo/requirements.txt", cwd=tree)
        command = [str(builder), "-m", "pytest", "-p", "no:cacheprovider", "-v"]
        done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
        told = done.stdout.strip()
        if done.returncode not in (0, 1):  # neither passed nor failed
            raise RuntimeError(f"the tests ended with {done.returncode}\n{told[-4000:]}{done.stderr[-4000:]}")
        facts["tests"] = re.sub(r"=+|in [\d.]+s.*", "", told.splitlines()[-1]).strip()
        if failures := re.findall(r"^(?:FAILED|ERROR) (\S+)", told, re.MULTILINE):
            facts["failures"] = failures
            print(told[-20_000:], file=sys.stderr)
    return facts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pairs", nargs="+", metavar="PYTHON=TORCH")
    parser.add_argument("--tests", action="store_true", help="run the test suite, too")
    asked = parser.parse_args()
    failed = 0
    for pair in asked.pairs:
        interpreter, _, torch = pair.partition("=")
        with tempfile.TemporaryDirectory() as folder:
            try:
                facts = tried(interpreter, torch, Path(folder), asked.tests)
            except RuntimeError as error:
                facts = {"failed": str(error).splitlines()[0].replace(folder, "")}
                print(error, file=sys.stderr)
        failed += not facts.keys().isdisjoint({"failed", "failures"})
        print(pair, json.dumps(facts, indent=1), flush=True)
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        results[pair] = facts
        RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    return failed


if __name__ == "__main__":
    sys.exit(main())
