"""Shared by all tests: hypothesis without deadlines, since CI machines are slow and shared."""

from pathlib import Path

import hypothesis
import pytest
import torch

from sightline import curves
from sightline.kernels import cpu

hypothesis.settings.register_profile("sightline", deadline=None, max_examples=40, derandomize=True)
hypothesis.settings.load_profile("sightline")

# The tensors of the tests are tiny: a second thread only waits for the first, badly so on a busy machine.
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def no_pictures():
    """Runs of the command line end without a second of drawing; `test_curves` draws."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curves, "draw_run", lambda run, file=None: file or Path(run, curves.PICTURE))
        yield


@pytest.fixture(scope="module")
def text(request, tmp_path_factory) -> Path:
    """A file with the `TEXT` of the tests' module."""
    file = tmp_path_factory.mktemp("text") / "cats.txt"
    file.write_text(request.module.TEXT, encoding="utf-8", newline="\n")
    return file


@pytest.fixture(params=cpu.available() or ["none"])
def instructions(request):
    """Each instruction set that this CPU runs, in use for a test."""
    before = cpu.instructions()
    cpu.use_instructions(request.param)
    yield request.param
    cpu.use_instructions(before)


@pytest.fixture(params=cpu.multipliers())
def multiplier(request):
    """Each library that multiplies matrices in float32 here, in use for a test."""
    before = cpu.multiplier()
    cpu.use_multiplier(request.param)
    yield request.param
    cpu.use_multiplier(before)
