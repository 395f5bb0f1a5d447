"""A plan says what the run then is, and leaves nothing behind."""

import os
import re
import subprocess
import sys

import commands
import numpy as np
import pytest

from sightline import plan as planning
from sightline.events import Started
from sightline.logs import read_log
from sightline.plan import Seconds, plan
from sightline.schedule import TrainConfig
from sightline.training import train

SMALL = {"d_model": 32, "num_layers": 2, "num_heads": 2, "context": 16}
SHAPE = ("--d-model", 32, "--num-layers", 2, "--num-heads", 2, "--context", 16)
TINY = (*SHAPE, "--steps", 12, "--batch", 4, "--evaluate-every", 5, "--tokenizer", "characters")

pytestmark = pytest.mark.usefixtures("no_pictures", "quick")


@pytest.fixture(scope="module")
def quick():
    """Plans that time three steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "_TIMED_SECONDS", 0.0)
        yield


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text" / "cats.txt"
    file.parent.mkdir()
    file.write_text("".join(f"line {i}: the cat sat on the mat.\n" for i in range(400)), encoding="utf-8")
    return file


def everything(folder):
    return {path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in folder.rglob("*")}


@pytest.mark.parametrize("settings", [{}, {"tokenizer": "characters"}, {"tokenizer": "words", "preset": "classic"}])
def test_the_run_is_what_was_planned(text, tmp_path, settings):
    config = TrainConfig(steps=6, batch=4, evaluate_every=5)
    planned = plan(text, tmp_path / "run", model=SMALL, config=config, **settings)
    heard = []
    train(text, tmp_path / "run", model=SMALL, config=config, listener=heard.append, **settings)
    (started,) = (event for event in heard if isinstance(event, Started))
    assert planned.exact and planned.advice is None
    for name in ("parameters", "train_tokens", "valid_tokens", "steps"):
        assert getattr(planned, name) == getattr(started, name)
    assert (planned.config.batch, planned.model.context) == (started.batch, started.context)
    size = 4 * planned.parameters
    assert planned.memory.gradients == size and planned.memory.weights >= size
    assert planned.memory.optimizer >= size


def test_nothing_is_written(text, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    before = everything(tmp_path)
    for out in (tmp_path / "a" / "run", empty):
        assert commands.run("train", text, "--out", out, *TINY, "--plan") == 0
    assert everything(tmp_path) == before
    stdout, stderr = capsys.readouterr()
    assert stderr == ""
    for line in (
        "text       cats: 12,1",
        "tokenizer  characters, a vocabulary of 2",
        "run        12 steps of 4 x 16 tokens",
    ):
        assert line in stdout
    assert re.search(r"^memory     \d.* weights .*, gradients .*, optimizer .*, activations .*, rest ", stdout, re.M)
    assert re.search(r"^time       about 0:0\d: .* s a step \(.* tokens/s\), .* every 5 steps$", stdout, re.M)


def test_a_resumed_run_is_planned_from_where_it_is(text, tmp_path, capsys):
    out = tmp_path / "run"
    assert commands.run("train", text, "--out", out, *TINY) == 0
    before = everything(tmp_path)
    capsys.readouterr()
    assert commands.run("train", text, "--out", out, *TINY, "--steps", 50, "--resume", "--plan") == 0
    assert "50 steps (12 done) of 4 x 16 tokens" in capsys.readouterr().out
    assert everything(tmp_path) == before


def test_what_training_refuses_a_plan_refuses(text, tmp_path, capsys):
    out = tmp_path / "run"
    assert commands.run("train", text, "--out", out, *TINY) == 0
    before = everything(tmp_path)
    for arguments, says in (
        ((text, "--out", out, *TINY), ("holds a run at step 12: add --resume",)),
        ((text, "--out", tmp_path / "new", *TINY, "--resume"), ("holds none",)),
        ((text, "--out", text, *TINY), ("is a file: choose another --out",)),
        ((tmp_path / "none.txt", "--out", tmp_path / "new", *TINY), ("no file or folder",)),
        ((text, "--out", tmp_path / "new", *TINY, "--steps", 0), ("steps of at least 1, got 0",)),
        ((text, "--out", tmp_path / "new", *TINY, "--context", 100_000), ("training text of at least 100001 tokens",)),
        ((text, "--out", tmp_path / "new", *TINY, "--minutes", 0.00001), ("time to train in --minutes 1e-05",)),
    ):
        commands.refused(capsys, "train", *arguments, "--plan", says=says)
    assert everything(tmp_path) == before


def test_a_long_text_is_read_in_part(text, tmp_path, monkeypatch):
    whole = plan(text, tmp_path / "run", model=SMALL, config=TrainConfig(steps=3), tokenizer="characters")
    monkeypatch.setattr(planning, "_READ_BYTES", 100_000)
    text.write_text("the cat sat on the mat, and the dog ran. " * 20_000, encoding="utf-8")
    part = plan(text, tmp_path / "run", model=SMALL, config=TrainConfig(steps=3), tokenizer="characters")
    assert whole.exact and not part.exact
    assert part.train_tokens == pytest.approx(0.9 * 41 * 20_000, rel=0.1)
    assert "about" in str(part) and "about" not in str(whole).splitlines()[0]


def test_a_model_larger_than_the_machine_is_not_tried(text, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "machine_bytes", lambda device: 10_000_000)
    monkeypatch.setattr(planning, "Trainer", None)
    planned = plan(text, tmp_path / "run", model=SMALL, config=TrainConfig(steps=3), tokenizer="characters")
    assert planned.seconds is None
    assert "unknown: it does not fit into the memory" in str(planned) and "of 10 MB" in str(planned)


def test_a_text_that_is_too_small_is_told(text, tmp_path):
    planned = plan(text, tmp_path / "run", model={**SMALL, "d_model": 256}, config=TrainConfig(steps=1000))
    assert planned.advice is not None and "parameters are many for" in str(planned)


@pytest.mark.parametrize(
    ("config", "done", "used", "steps", "seconds"),
    [
        # 2 s to start, steps of a second, evaluations of 4 at 0, 25, 50, 75, 100: all but the first with checkpoints
        ({"steps": 100, "evaluate_every": 25}, 0, 0.0, 100, 2 + 4 + 100 + 4 * 5),
        ({"steps": 101, "evaluate_every": 25}, 0, 0.0, 101, 2 + 4 + 101 + 5 * 5),
        ({"steps": 100, "evaluate_every": 25}, 30, 60.0, 100, 2 + 70 + 3 * 5),
        ({"steps": 100, "evaluate_every": 25, "evaluate_batches": 1}, 0, 0.0, 100, 2 + 1 + 100 + 4 * 2),
        ({"minutes": 2.0, "evaluate_every": 25}, 0, 0.0, None, 120),
        ({"minutes": 2.0, "evaluate_every": 25, "steps": 10}, 0, 0.0, 10, 2 + 4 + 10 + 5),
        ({"minutes": 2.0, "evaluate_every": 25}, 40, 60.0, None, 60),
    ],
)
def test_the_course_of_a_run(config, done, used, steps, seconds):
    each = Seconds(start=2.0, step=1.0, evaluation=1.0, checkpoint=1.0, total=0.0)
    config = TrainConfig(batch=2, **config)
    limit, timed = planning._course(config, each, 40, context=5, done=done, used=used)
    assert steps is None or limit == steps
    assert timed.total == (seconds if steps is not None else pytest.approx(seconds, abs=8))
    assert timed.total <= seconds


def test_activations_are_what_the_forward_pass_keeps(tmp_path, text):
    """Counted with every window really there."""
    config = TrainConfig(steps=3, batch=7)
    planned = plan(text, tmp_path / "run", model=SMALL, config=config, tokenizer="characters")
    counted = []
    kept = planning._kept
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "_kept", lambda trainer, windows: counted.append(kept(trainer, 7)) or counted[-1])
        plan(text, tmp_path / "run", model=SMALL, config=config, tokenizer="characters")
    assert planned.memory.activations == pytest.approx(counted[0], rel=0.02)


PROGRAM = """
import sys
from sightline import plan as planning
from sightline.cli import main
if "--plan" in sys.argv:
    planning._TIMED_SECONDS = 0.0
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_the_memory_is_that_of_a_real_run(text, tmp_path):
    """Within a quarter, for a model whose own part is larger than the program's."""
    large = ("--d-model", 256, "--num-layers", 6, "--num-heads", 4, "--context", 128, "--batch", 32, "--steps", 3)
    large = (*large, "--precision", "float32")  # which holds more
    arguments = ["train", text, "--out", tmp_path / "run", *large, "--evaluate-batches", 1]
    run = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    said = subprocess.run([*run, "--plan"], capture_output=True, text=True, check=True, env=environment).stdout
    number, unit = re.search(r"^memory     ([\d.]+) (GB|MB)", said, re.M).groups()
    planned = float(number) * {"GB": 1e9, "MB": 1e6}[unit]
    subprocess.run(run, capture_output=True, check=True, env=environment)
    peak = read_log(tmp_path / "run")[-1]["peak_bytes"]
    assert peak > 1e9
    assert planned == pytest.approx(peak, rel=0.25)
    np.testing.assert_array_less(0, peak)
