"""The picture of a run: what stands in it is what the log says, of runs whole, resumed, killed and strange."""

import json
import math

import commands
import numpy as np
import pytest
from PIL import Image

from sightline import curves
from sightline.curves import LossPicture, draw_run, plot_run
from sightline.events import Ended, Evaluated, Started, Stepped, Warned, as_record
from sightline.runs import RunFolder

STARTED = Started(
    step=0, resumed=False, steps=200, minutes=None, evaluate_every=50, look_seconds=0.0, parameters=1234,
    train_tokens=9876, valid_tokens=987, batch=4, context=8, learning_rate=0.1, device="cpu", precision="float32",
    seconds=0.0,
)  # fmt: skip


def stepped(step, loss=None):
    return Stepped(
        step=step, done=step / 200, loss_nats=3 + 2 / step if loss is None else loss, gradient_norm=1.0,
        learning_rate=0.1 - step / 4000, tokens_per_second=4.0, peak_bytes=7, seconds=float(step),
    )  # fmt: skip


def evaluated(step, loss):
    return Evaluated(
        step=step, best=True, loss_nats=loss, perplexity=math.exp(loss), bits_per_byte=loss, tokens=9, seconds=step
    )


def history():
    yield STARTED
    yield evaluated(0, 6.0)
    for step in range(1, 201):
        yield stepped(step)
        if step % 50 == 0:
            yield evaluated(step, {50: 4.0, 100: 3.5, 150: 3.25, 200: 3.75}[step])
    yield Ended(step=200, stopped="steps", seconds=83.0, tokens_per_second=4.0, peak_bytes=7)


def written(out, events):
    out.mkdir(exist_ok=True)
    with (out / "log.jsonl").open("a", encoding="utf-8") as log:
        log.writelines(json.dumps(as_record(event)) + "\n" for event in events)
    return out


def lines(figure):
    return {line.get_label(): line.get_xydata() for line in figure.axes[0].lines}


def texts(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def test_the_picture_says_what_the_log_says(tmp_path):
    figure = plot_run(written(tmp_path / "book", history()))
    above, below = figure.axes
    drawn = lines(figure)
    np.testing.assert_array_equal(drawn["validation"], [(0, 6), (50, 4), (100, 3.5), (150, 3.25), (200, 3.75)])
    raw = above.lines[0].get_xydata()
    np.testing.assert_array_equal(raw, [(step, 3 + 2 / step) for step in range(1, 201)])
    assert texts(figure) == ["best 3.2500 at step 150"]
    np.testing.assert_allclose(below.lines[0].get_xydata()[:, 1], [0.1 - step / 4000 for step in range(1, 201)])
    assert (above.get_ylabel(), below.get_xlabel(), below.get_ylabel()) == (
        "loss (nats a token)", "step", "learning rate",
    )  # fmt: skip
    (tokens,) = above.child_axes
    figure.draw_without_rendering()
    assert tokens.get_xlabel() == "tokens read"
    np.testing.assert_allclose(tokens.get_xlim(), np.array(above.get_xlim()) * 32)
    assert figure.get_suptitle() == (
        "book   1,234 parameters, 9,876 tokens of text   ended by its steps after 1:23"
    )  # fmt: skip
    low, high = above.get_ylim()
    assert low < 3.0 and 4.0 < high < 6.0  # the fall at the start does not press the rest flat


def test_the_best_before_the_first_step_does_not_count(tmp_path):
    figure = plot_run(written(tmp_path, [STARTED, evaluated(0, 1.0), stepped(1), evaluated(1, 2.0)]))
    assert texts(figure) == ["best 2.0000 at step 1"]


def test_warnings_and_resumed_sessions_are_marked(tmp_path):
    again = Started(**{**STARTED.__dict__, "step": 7, "resumed": True})
    events = [STARTED, *map(stepped, range(1, 8)), again, stepped(8), Warned(step=8, message="x", seconds=8.0)]
    figure = plot_run(written(tmp_path, events))
    assert lines(figure)["warning"][:, 0].tolist() == [8]
    dotted = [line.get_xdata() for line in figure.axes[0].lines if line.get_linestyle() == ":"]
    assert dotted == [[7, 7]]


def test_a_long_run_has_few_points_and_the_same_means(tmp_path):
    size = 12_345
    events = [STARTED, *(stepped(step, loss=float(step % 7)) for step in range(1, size + 1))]
    raw = plot_run(written(tmp_path, events)).axes[0].lines[0].get_xydata()
    assert 500 < len(raw) <= 1000
    weights = np.full(len(raw), 13)
    weights[-1] = size - 13 * (len(raw) - 1)
    mean = sum(step % 7 for step in range(1, size + 1)) / size
    assert np.average(raw[:, 1], weights=weights) == pytest.approx(mean)


@pytest.mark.parametrize("size", [1, 2, 5, 300])
def test_smoothing_keeps_a_line_straight(size):
    line = np.arange(size) * 0.5
    np.testing.assert_allclose(curves._smooth(line), line)
    noisy = np.random.default_rng(0).normal(size=300)
    assert curves._smooth(noisy).std() < 0.6 * noisy.std()


@pytest.mark.parametrize(
    "events",
    [
        [STARTED, evaluated(0, 6.0)],
        [STARTED, stepped(1)],
        [STARTED, stepped(1), stepped(2, loss=float("nan")), stepped(3, loss=float("inf"))],
        [stepped(1), stepped(2)],
        [STARTED, stepped(1, loss=2.0), stepped(2, loss=2.0), evaluated(2, 2.0)],
    ],
)
def test_a_run_of_which_little_is_known_has_a_picture(tmp_path, events):
    file = draw_run(written(tmp_path, events))
    with Image.open(file) as image:
        assert image.format == "PNG" and image.size == (1350, 840)


def test_a_log_of_another_version_has_a_picture(tmp_path):
    records = [{"event": "started", "step": 0}, {"event": "stepped", "step": 1, "loss_nats": "?"}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    written(tmp_path, [stepped(2), stepped(3)])
    assert len(plot_run(tmp_path).axes[0].lines[0].get_xydata()) == 2


def test_a_log_without_a_loss_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"a log with a loss, but .*log.jsonl has none yet"):
        plot_run(written(tmp_path, [STARTED]))


def test_names_are_no_formulas(tmp_path):
    out = written(tmp_path / "$x_1$ \\frac", history())
    assert "$x_1$ \\frac" in plot_run(out).get_suptitle()
    draw_run(out)


# --- Drawn while a run goes on, and at its end --------------------------------------------------------


def test_a_run_is_drawn_however_it_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(curves, "draw_run", lambda run, file: run / "loss.png")
    for error in (None, KeyboardInterrupt(), ValueError("the loss became nan")):
        try:
            with LossPicture(tmp_path) as picture:
                picture(stepped(1))
                if error is not None:
                    raise error
        except (KeyboardInterrupt, ValueError) as caught:
            assert caught is error
        assert picture.drawn == tmp_path / "loss.png"


def test_a_folder_of_which_nothing_was_heard_is_left_alone(tmp_path):
    out = written(tmp_path / "run", history())
    with pytest.raises(ValueError, match="another run"), LossPicture(out):
        raise ValueError("another run writes here")
    assert not (out / "loss.png").exists()


def test_what_ended_a_run_is_told_and_not_that_it_cannot_be_drawn(tmp_path):
    for error, told in ((ValueError("the disk is full"), "the disk is full"), (None, "has no log.jsonl")):
        with pytest.raises(ValueError, match=told), LossPicture(tmp_path / "gone") as picture:
            picture(stepped(1))
            if error is not None:
                raise error


def test_the_picture_is_drawn_again_while_the_run_goes_on(tmp_path, monkeypatch):
    now, drawn = [0.0], []
    monkeypatch.setattr(curves.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(curves, "draw_run", lambda run, file: drawn.append(now[0]))
    with LossPicture(tmp_path, every=10.0) as picture:
        for second in range(0, 36, 2):
            now[0] = float(second)
            picture(STARTED if second == 0 else stepped(second))
    assert drawn == [10.0, 20.0, 30.0, 34.0]


# --- The commands -------------------------------------------------------------------------------------

TINY = ("--d-model", 16, "--num-layers", 1, "--num-heads", 2, "--context", 16, "--steps", 4, "--batch", 2,
        "--evaluate-every", 2, "--tokenizer", "characters")  # fmt: skip


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "cats.txt"
    file.write_text("the cat sat on the mat, and the dog ran after the cat.\n" * 60, encoding="utf-8")
    return file


def test_training_ends_with_a_picture_and_can_be_watched(text, tmp_path, capsys):
    out = tmp_path / "run"
    assert commands.run("train", text, "--out", out, *TINY) == 0
    assert f"loss curve: {out / 'loss.png'}\n" in capsys.readouterr().out
    first = (out / "loss.png").read_bytes()
    (out / "loss.png").unlink()
    assert commands.run("watch", out) == 0
    stdout, stderr = capsys.readouterr()
    assert stdout == f"loss curve: {out / 'loss.png'}\n"
    said = [line.split(":")[0] for line in stderr.splitlines()]
    assert [line for line in said if line.startswith("step ")][:3] == ["step 0", "step 2", "step 4"]
    assert "ended at step 4 by its steps" in stderr and "note:" not in stderr
    assert (out / "loss.png").read_bytes() == first
    assert commands.run("watch", out, "--out", tmp_path / "other.png") == 0
    assert (tmp_path / "other.png").read_bytes() == first


def test_a_stopped_run_is_drawn_and_told(text, tmp_path, capsys):
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        commands.stop_at(3, patch)
        assert commands.run("train", text, "--out", out, *TINY) == 130
    assert (out / "loss.png").is_file()
    assert commands.run("watch", out) == 0
    assert f"note: no process trains {out}: it was stopped after step 3\n" in capsys.readouterr().err
    assert commands.run("train", text, "--out", out, *TINY, "--resume") == 0


def test_what_cannot_be_watched(tmp_path, capsys):
    commands.refused(capsys, "watch", tmp_path, says=("the folder of a run", "has no log.jsonl"))
    commands.refused(capsys, "watch", tmp_path / "none", says=("the folder of a run", "has no log.jsonl"))
    (tmp_path / "log.jsonl").write_text("", encoding="utf-8")
    commands.refused(capsys, "watch", tmp_path, says=("a run with a loss to draw", "before its first evaluation"))
    (tmp_path / "log.jsonl").write_text("x\n", encoding="utf-8")
    commands.refused(capsys, "watch", tmp_path, says=("line 1 of", "an event with a step"))


def test_a_picture_that_cannot_be_written(tmp_path, capsys):
    out = written(tmp_path / "run", history())
    file = tmp_path / "nowhere" / "loss.png"
    commands.refused(
        capsys, "watch", out, "--out", file, says=(f"expected to write {file}",), after_progress=True
    )  # fmt: skip


def test_the_folder_of_a_picture_is_still_free_for_a_run(tmp_path):
    with RunFolder(tmp_path) as folder:
        folder.log(STARTED)
        folder.log(stepped(1))
        (tmp_path / "loss.png").write_bytes(b"")
    with RunFolder(tmp_path):  # nothing was saved: starting over loses nothing
        pass
