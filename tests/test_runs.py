import errno
import json
import os
from pathlib import Path

import pytest
import torch

from sightline import runs
from sightline.checkpoints import load
from sightline.events import Saved
from sightline.models import Decoder, DecoderConfig
from sightline.runs import RunFolder


def decoder(number=0.0):
    model = Decoder(DecoderConfig(vocabulary=5, context=4, d_model=8, num_layers=1, num_heads=1))
    with torch.no_grad():
        model.embedding.weight.fill_(number)
    return model


def save(folder, step, best_step):
    return folder.save(decoder(step), {"a": torch.full((2,), step)}, {"step": step}, step=step, best_step=best_step)


def saved(out, *steps, best=None):
    """A run that saved these steps and ended."""
    with RunFolder(out) as folder:
        for step in steps:
            save(folder, step, step if best is None else best)


def flip(file, at=-1):
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def pointer(out):
    return json.loads((out / "checkpoint.json").read_text(encoding="utf-8"))


def test_the_best_the_latest_and_the_one_before_it_are_kept(tmp_path):
    out = tmp_path / "a" / "run"
    with RunFolder(out) as folder:
        for step, best, kept in ((1, 1, "1"), (2, 1, "12"), (3, 1, "123"), (4, 1, "134"), (5, 5, "45"), (6, 6, "56")):
            save(folder, step, best)
            assert names(out) == [".lock", "checkpoint.json", "log.jsonl", *(f"step-{number}" for number in kept)]
            assert pointer(out) == {"best": f"step-{best}", "latest": f"step-{step}"}
    assert names(out) == ["checkpoint.json", "step-5", "step-6"]  # nothing was logged
    assert load(out).embedding.weight[0, 0] == 6


def test_before_any_evaluation_the_latest_is_the_best(tmp_path):
    with RunFolder(tmp_path) as folder:
        save(folder, 7, None)
    assert pointer(tmp_path) == {"best": "step-7", "latest": "step-7"}


def test_a_step_is_not_written_twice_but_can_become_the_best(tmp_path):
    with RunFolder(tmp_path) as folder:
        save(folder, 1, 1)
        save(folder, 2, 1)
        before = (tmp_path / "step-2" / "training.json").stat().st_mtime_ns
        save(folder, 2, 2)
        assert pointer(tmp_path) == {"best": "step-2", "latest": "step-2"}
        assert (tmp_path / "step-2" / "training.json").stat().st_mtime_ns == before
    assert names(tmp_path) == ["checkpoint.json", "step-1", "step-2"]


def test_what_was_saved_is_read(tmp_path):
    saved(tmp_path, 3)
    with RunFolder(tmp_path, resume=True) as folder:
        path, tensors, state = folder.read()
    assert (path, state) == (tmp_path / "step-3", {"step": 3})
    assert tensors["a"].tolist() == [3, 3]
    assert folder.notes == []


# --- Folders that are refused --------------------------------------------------------------------------


def test_a_folder_with_a_run_is_refused(tmp_path):
    saved(tmp_path, 3)
    with pytest.raises(ValueError, match=r"holds a run at step 3: add --resume to go on, or choose another --out"):
        RunFolder(tmp_path)


@pytest.mark.parametrize("there", [True, False])
def test_nothing_to_resume(tmp_path, there):
    out = tmp_path if there else tmp_path / "nowhere"
    with pytest.raises(ValueError, match=r"expected a run to go on with, but .* holds none"):
        RunFolder(out, resume=True)
    assert names(tmp_path) == []


def test_somebody_elses_folder_is_refused_and_untouched(tmp_path):
    (tmp_path / "thesis.txt").write_text("years", encoding="utf-8")
    (tmp_path / "tokens").mkdir()
    with pytest.raises(ValueError, match=r"new or empty folder, but .* holds 'thesis.txt' and no run"):
        RunFolder(tmp_path)
    assert names(tmp_path) == ["thesis.txt", "tokens"]


def test_a_file_is_no_folder(tmp_path):
    file = tmp_path / "file"
    file.write_text("text", encoding="utf-8")
    with pytest.raises(ValueError, match=r"expected a folder, but .*file is a file"):
        RunFolder(file)
    with pytest.raises(ValueError, match=r"expected a folder that can be written, but .*choose another --out"):
        RunFolder(file / "run")


@pytest.mark.skipif(os.name == "nt" or not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_without_write_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="expected a folder that can be written"):
        RunFolder(tmp_path / "run")


def test_an_unwritable_folder_is_refused(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ValueError, match=r"that can be written, but .*Permission denied; choose another --out"):
        RunFolder(tmp_path / "run")


# --- One writer ----------------------------------------------------------------------------------------


def test_the_second_of_two_runs_in_one_folder_is_refused_at_once(tmp_path):
    message = rf"another run, process {os.getpid()}, writes into .*: wait for its end, or choose another --out"
    with RunFolder(tmp_path) as first:
        (tmp_path / ".writing-step-3").mkdir()  # the first is at it
        with pytest.raises(ValueError, match=message):
            RunFolder(tmp_path)
        assert (tmp_path / ".writing-step-3").is_dir()
        save(first, 3, 3)
        with pytest.raises(ValueError, match=message):
            RunFolder(tmp_path, resume=True)
        save(first, 4, 3)
    with RunFolder(tmp_path, resume=True) as second:
        assert second.latest == "step-4"


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_in_which_nothing_was_written_is_left_as_it_was(tmp_path, there):
    out = tmp_path / "run"
    if there:
        out.mkdir()
    with pytest.raises(KeyboardInterrupt), RunFolder(out):
        raise KeyboardInterrupt
    assert names(tmp_path) == ["run"] * there
    assert not there or names(out) == []


# --- What a killed process left ------------------------------------------------------------------------


def test_what_a_killed_writer_left_is_cleaned(tmp_path):
    saved(tmp_path, 3)
    (tmp_path / ".writing-step-9").mkdir()
    (tmp_path / ".writing-step-9" / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".writing-checkpoint.json").write_bytes(b"{")
    (tmp_path / ".lock").write_text("1", encoding="ascii")
    with RunFolder(tmp_path, resume=True):
        assert names(tmp_path) == [".lock", "checkpoint.json", "log.jsonl", "step-3"]


def test_a_run_killed_before_its_first_checkpoint_can_start_again(tmp_path):
    for name in (".writing-step-9", "tokens"):
        (tmp_path / name).mkdir()
    for name in ("log.jsonl", ".lock"):
        (tmp_path / name).write_text("{}\n", encoding="utf-8")
    with RunFolder(tmp_path):
        assert names(tmp_path) == [".lock", "log.jsonl", "tokens"]


def test_a_step_that_is_whole_is_gone_on_from_whatever_the_pointer_says(tmp_path):
    saved(tmp_path, 9, 10)
    for text in (None, "{", json.dumps({"best": "step-9", "latest": "step-9"})):
        (tmp_path / "checkpoint.json").unlink()
        if text is not None:
            (tmp_path / "checkpoint.json").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match="holds a run at step 10: add --resume"):
            RunFolder(tmp_path)
        with RunFolder(tmp_path, resume=True) as folder:
            assert (folder.latest, folder.notes) == ("step-10", [])
            assert names(tmp_path)[-2:] == ["step-10", "step-9"]
        (tmp_path / "checkpoint.json").touch()


def test_a_pointer_without_steps_is_an_error(tmp_path):
    (tmp_path / "checkpoint.json").write_text("{}", encoding="utf-8")
    for resume in (True, False):
        with pytest.raises(ValueError, match=r"expected the steps that .*checkpoint.json names, but they are missing"):
            RunFolder(tmp_path, resume=resume)


# --- Damage --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "training.safetensors", "training.json", "manifest.json"]
)
def test_a_damaged_step_is_told_and_the_one_before_is_used(tmp_path, name):
    saved(tmp_path, 8, 9, 10, best=8)
    flip(tmp_path / "step-10" / name)
    with RunFolder(tmp_path, resume=True) as folder:
        assert folder.latest == "step-9"
        (note,) = folder.notes
        assert name in note and note.endswith(f"; going on from {tmp_path / 'step-9'}") and "\n" not in note
        assert folder.read()[2] == {"step": 9}
        save(folder, 10, 10)  # the run has come to it again
        assert names(tmp_path)[-2:] == ["step-10", "step-9"]
        assert folder.has(10)
    assert load(tmp_path / "step-10").embedding.weight[0, 0] == 10


def test_two_damaged_steps_are_told(tmp_path):
    saved(tmp_path, 8, 9, 10, best=8)
    flip(tmp_path / "step-10" / "config.json")
    (tmp_path / "step-9" / "training.json").unlink()
    with RunFolder(tmp_path, resume=True) as folder:
        assert folder.latest == "step-8"
        assert len(folder.notes) == 2 and "step-10" in folder.notes[0] and "step-9" in folder.notes[1]


def test_a_run_without_a_whole_step_is_an_error_and_stays_as_it_is(tmp_path):
    saved(tmp_path, 9, 10)
    for step in (9, 10):
        flip(tmp_path / f"step-{step}" / "training.safetensors")
    before = names(tmp_path)
    with pytest.raises(ValueError, match=r"step-10/training.safetensors is damaged: .*; no other step in .* is whole"):
        RunFolder(tmp_path, resume=True)
    assert names(tmp_path) == before


def test_a_best_step_that_is_damaged_is_told(tmp_path):
    saved(tmp_path, 8, 9, best=8)
    flip(tmp_path / "step-8" / "model.safetensors")
    with RunFolder(tmp_path, resume=True) as folder:
        assert folder.has(9) and folder.notes == []
        assert not folder.has(8)
        assert folder.notes == [
            f"the best step, {tmp_path / 'step-8'}, is lost or damaged: the next evaluation is taken for the best"
        ]


@pytest.mark.parametrize("part", ["write_model", "save_file", "write_json", "write_manifest", "replace_text"])
@pytest.mark.parametrize(
    "failure", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()], ids=["full", "ctrl-c"]
)
def test_a_failure_while_saving_keeps_the_steps_before(tmp_path, monkeypatch, part, failure):
    saved(tmp_path, 1, 2, best=1)

    def fail(*_):
        if part == "replace_text" and isinstance(failure, OSError):
            raise ValueError(f"expected to write, but: {failure}")
        raise failure

    expected = KeyboardInterrupt if isinstance(failure, KeyboardInterrupt) else ValueError
    with RunFolder(tmp_path, resume=True) as folder, monkeypatch.context() as patch:
        patch.setattr(runs, part, fail)
        with pytest.raises(expected, match="No space left" if expected is ValueError else None):
            save(folder, 3, 3)
    assert pointer(tmp_path) == {"best": "step-1", "latest": "step-2"}
    assert load(tmp_path).embedding.weight[0, 0] == 1
    with RunFolder(tmp_path, resume=True) as again:
        assert again.latest == ("step-3" if part == "replace_text" else "step-2")
        assert set(names(tmp_path)) >= {"step-1", "step-2"}
        save(again, 4, 4)
    assert load(tmp_path).embedding.weight[0, 0] == 4


# --- The log -------------------------------------------------------------------------------------------


def test_the_log_forgets_what_comes_again(tmp_path):
    with RunFolder(tmp_path) as folder:
        for step in range(5):
            folder.log(Saved(step=step, folder="x", seconds=0.5))
        with (tmp_path / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write('{"event": "stepped", "st')
        folder.truncate_log(2)
        folder.log(Saved(step=3, folder="x", seconds=0.5))
    lines = (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3]
    assert json.loads(lines[0]) == {"event": "saved", "step": 0, "folder": "x", "seconds": 0.5}


@pytest.mark.parametrize("content", [b"[1]\n", b"{]\n[1]\n", b"\xff\n{}\n"])
def test_a_foreign_log_is_an_error(tmp_path, content):
    with RunFolder(tmp_path) as folder:
        (tmp_path / "log.jsonl").write_bytes(content)
        with pytest.raises(ValueError, match=r"line 1 of .*log.jsonl to be an event with a step"):
            folder.truncate_log(2)
