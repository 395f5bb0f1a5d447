"""The tree is what DESIGN.md says: imports point one way, the public names are those listed, versions agree."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sightline

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "sightline"

# A module may import from the rows below its own, never from its own row or above.
ROWS = [
    {"__main__"},
    {"cli"},
    {"checking.command", "opening"},
    {
        "demo",
        "diagnosis",
        "bench",
        "huggingface.folders",
        "progress",
        "options",
        "parsing",
        "plan",
        "tensorboard",
        "terminal",
        "translation",
    },
    {"checking.checks", "looking"},
    {"checking.attention_laws", "checking.encoding_laws", "checking.module_laws"},
    {"checking.discovery"},
    {"checking.conventions", "checking.findings", "checking.maps"},
    {"checking.attention_mistakes", "checking.module_mistakes", "checking.encoding_mistakes", "checking.subject"},
    {"checking.mistakes", "checking.worker"},
    {"checking.definitions"},
    {"training", "pace"},
    {"loop"},
    {"resuming"},
    {"trainer", "runs", "curves"},
    {"optimizers", "recipes", "logs"},
    {"viewer.server", "events"},
    {"beams", "viewer.editions"},
    {"evaluation", "generation", "viewer.page", "viewer.plots"},
    {"distributed"},
    {"viewer.manifest"},
    {"pyramid"},
    {"inspection", "schedule", "costs", "conversion", "causality", "huggingface.watching"},
    {"huggingface.stacks"},
    {"recording"},
    {"sequences"},
    {"store", "bridges"},
    {"captures"},
    {"huggingface.opening"},
    {"huggingface.formats"},
    {"checkpoints"},
    {"encoder_decoder"},
    {"encoder"},
    {"huggingface.settings"},
    {"huggingface.families"},
    {"models"},
    {"blocks", "mixture"},
    {"layers"},
    {"feed_forward"},
    {"sublayers"},
    {"rows"},
    {"passes"},
    {"cache", "positions", "losses", "counts", "huggingface.interface"},
    {"attention", "huggingface.recipes", "kernels.products"},
    {"observation"},
    {"masks", "kernels.cpu", "kernels.reference", "kernels.sdpa", "kernels.tiled", "batches"},
    {"encoding", "files", "pairs"},
    {"shapes", "corpora", "tokenizers", "passages", "kernels.build", "locks", "advice", "memory", "interrupts"},
    {"downloads", "numerals", "figures"},
]


def modules() -> dict[str, Path]:
    files = (file for file in PACKAGE.rglob("*.py") if file.name != "__init__.py")
    return {".".join(file.relative_to(PACKAGE).with_suffix("").parts): file for file in files}


def imported(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("sightline"):
            module = node.module.removeprefix("sightline").removeprefix(".")
            names = {f"{module}.{alias.name}".removeprefix(".") for alias in node.names}
            found |= {name for name in names if name in modules()} or {module}
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("sightline.") for alias in node.names if alias.name.startswith("sightl")}
    return found - {""}


def test_every_module_has_its_row():
    assert sorted(name for row in ROWS for name in row) == sorted(modules())


# A notebook asks a capture itself how it looks, and a capture asks the page. Who opens or writes a folder of another
# library's format needs what checkpoints are read and written with.
UPWARD = {"captures": {"viewer.page"}, "checkpoints": {"huggingface.formats"}}


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_point_down(name):
    row = next(i for i, row in enumerate(ROWS) if name in row)
    below = {module for row in ROWS[row + 1 :] for module in row}
    assert imported(modules()[name]) - below == UPWARD.get(name, set())


def test_what_points_up_is_imported_when_it_is_asked_for():
    for name, above in UPWARD.items():
        body = ast.parse(modules()[name].read_text(encoding="utf-8")).body
        at_once = [node for node in body if isinstance(node, ast.ImportFrom)]
        assert not {f"sightline.{module}" for module in above} & {node.module for node in at_once}


@pytest.mark.parametrize("name", sorted(modules()))
def test_a_module_is_one_idea(name):
    assert len(modules()[name].read_text(encoding="utf-8").splitlines()) <= 410


def test_design_names_every_module():
    design = (ROOT / "DESIGN.md").read_text(encoding="utf-8")
    for name in modules():
        if name != "__main__":
            assert f"`{name.split('.')[-1]}`" in design, f"DESIGN.md does not name {name}"


def test_the_readme_maps_the_tree():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in modules():
        assert re.search(rf"\b{name.split('.')[-1]}\.py\b", text), f"README.md does not name {name}.py"


def test_public_names_are_listed_sorted_and_there():
    assert sightline.__all__ == sorted(sightline.__all__)
    for name in sightline.__all__:
        assert getattr(sightline, name).__doc__, f"{name} has no docstring"
    with pytest.raises(AttributeError, match="no attribute 'attend'"):
        sightline.attend  # noqa: B018 (asking is the test)


def test_versions_agree():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    (newest, *_) = re.findall(r"^## (\d+\.\d+\.\d+)", changelog, re.MULTILINE)
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert newest == sightline.__version__ == re.findall(r'^version = "(.*)"', project, re.MULTILINE)[0]


def test_importing_stays_light():
    heavy = ("matplotlib", "transformers", "starlette", "uvicorn", "tokenizers", "tyro", "rich")
    code = f"import sys, sightline; print([name for name in {heavy!r} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"
