"""The wheel in an environment of its own, where there is no compiler and nothing of the tree."""

import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from sightline.kernels import cpu

ROOT = Path(__file__).parent.parent
WHAT_A_WHEEL_IS_MADE_OF = ("sightline", "pyproject.toml", "hatch_build.py", "README.md", "LICENSE")
ATTEND = """
import shutil, torch
from sightline import Causal, attention, observe
from sightline.kernels import cpu

assert not any(map(shutil.which, ("g++", "clang++", "c++", "cc")))
case = torch.randn(3, 1, 2, 300, 40)
exact = attention(*case.double(), Causal(), implementation="reference")
for name in cpu.available():
    cpu.use_instructions(name)
    torch.testing.assert_close(attention(*case, Causal(), implementation="cpu").double(), exact, rtol=0, atol=1e-5)
    leaves = [t.clone().requires_grad_() for t in case]
    attention(*leaves, Causal(), implementation="cpu").sum().backward()
    observe(*case, Causal(), implementation="cpu")
print(cpu.__file__, *cpu.available())
"""

pytestmark = pytest.mark.slow


def wheel_of(tree: Path, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, tree]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def environment(folder: Path, wheel: Path) -> Path:
    """A new environment with the wheel; torch and the other dependencies are those installed here. Its Python."""
    venv.create(folder, with_pip=True, symlinks=True)
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", wheel], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])
    return python


def run(python: Path, code: str) -> str:
    """Without any environment variable: PATH has no compiler."""
    command = [python, "-W", "error", "-c", code]
    path = {"PATH": str(python.parent)}
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=path, cwd=python.parent).stdout


@pytest.mark.skipif(bool(cpu.MISSING), reason=cpu.MISSING or "built")
def test_a_wheel_with_the_kernel_runs_every_instruction_set_without_a_compiler(tmp_path):
    wheel = wheel_of(ROOT, tmp_path / "dist")
    assert re.search(r"-py3-none-(manylinux_2_\d+|linux)_(x86_64|aarch64)\.whl$", wheel.name)
    python = environment(tmp_path / "environment", wheel)
    where, *found = run(python, ATTEND).split()
    assert where.startswith(str(tmp_path))
    assert found == cpu.available() and "baseline" in found
    assert "built" in run(python, "import sightline; print(sightline.doctor().machine['native CPU kernel'])")


def test_a_wheel_of_a_tree_without_the_kernel_is_pure_and_says_how_to_get_it(tmp_path):
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in WHAT_A_WHEEL_IS_MADE_OF:
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, tree / name)
    (tree / "sightline" / "kernels" / cpu.LIBRARY.name).unlink(missing_ok=True)
    wheel = wheel_of(tree, tmp_path / "dist")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    python = environment(tmp_path / "environment", wheel)
    assert "sightline.kernels.build" in run(python, "import sightline; print(sightline.doctor())")
