"""What TensorBoard's own reader finds in the files is what the run's log says."""

import commands
import pytest

from sightline import tensorboard
from sightline.events import Warned
from sightline.logs import read_log
from sightline.tensorboard import TensorBoard

TINY = ("--d-model", 16, "--num-layers", 1, "--num-heads", 2, "--context", 16, "--steps", 6, "--batch", 2,
        "--evaluate-every", 2, "--tokenizer", "characters", "--log", "tensorboard")  # fmt: skip

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "cats.txt"
    file.write_text("the cat sat on the mat, and the dog ran after the cat.\n" * 60, encoding="utf-8")
    return file


@pytest.fixture
def read():
    """The scalars of a run by name, as (step, value)."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def read(out):
        found = reader.EventAccumulator(str(out / "tensorboard"))
        found.Reload()
        return found, {name: [(s.step, s.value) for s in found.Scalars(name)] for name in found.Tags()["scalars"]}

    return read


def logged(out, kind, name):
    return [(event["step"], event[name]) for event in read_log(out) if event["event"] == kind]


@pytest.mark.parametrize("stop", [None, 3])
def test_the_files_say_what_the_log_says(text, tmp_path, read, stop):
    out = tmp_path / "run"
    if stop is not None:
        with pytest.MonkeyPatch.context() as patch:
            commands.stop_at(stop, patch)
            assert commands.run("train", text, "--out", out, *TINY) == 130
    assert commands.run("train", text, "--out", out, *TINY, *(["--resume"] if stop else [])) == 0
    found, scalars = read(out)
    for name, kind, field in (
        ("loss/training", "stepped", "loss_nats"),
        ("loss/validation", "evaluated", "loss_nats"),
        ("learning_rate", "stepped", "learning_rate"),
        ("gradient_norm", "stepped", "gradient_norm"),
        ("validation/bits_per_byte", "evaluated", "bits_per_byte"),
    ):
        assert scalars[name] == [(step, pytest.approx(value, rel=1e-6)) for step, value in logged(out, kind, field)]
    assert len(scalars["memory_gigabytes"]) == len(scalars["tokens_per_second"]) == 6
    assert {"run/text_summary", "ended/text_summary"} <= set(found.Tags()["tensors"])


def test_steps_that_come_again_are_hidden(tmp_path, read):
    from test_curves import STARTED, stepped

    for started, steps in (
        (STARTED, range(1, 6)),
        (STARTED.__class__(**{**vars(STARTED), "step": 3, "resumed": True}), range(4, 7)),
    ):
        with TensorBoard(tmp_path) as board:
            board(started)
            for step in steps:
                board(stepped(step))
            board(Warned(step=step, message="the loss | rises", seconds=1.0))
    _, scalars = read(tmp_path)
    assert [step for step, _ in scalars["loss/training"]] == [1, 2, 3, 4, 5, 6]


def test_it_is_told_at_once_that_the_package_is_missing(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tensorboard, "find_spec", lambda name: None)
    says = ("needs the package tensorboard: pip install 'sightline[tensorboard]'",)
    commands.refused(capsys, "train", text, "--out", tmp_path / "run", *TINY, says=says)
    assert not (tmp_path / "run").exists()
