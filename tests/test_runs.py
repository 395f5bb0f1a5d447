import errno
import json
import os
from pathlib import Path

import pytest
import torch

from sightline import runs
from sightline.checkpoints import load
from sightline.models import Decoder, DecoderConfig
from sightline.runs import RunFolder, Saved


def decoder(number=0.0):
    model = Decoder(DecoderConfig(vocabulary=5, context=4, d_model=8, num_layers=1, num_heads=1))
    with torch.no_grad():
        model.embedding.weight.fill_(number)
    return model


def save(folder, step, best_step):
    return folder.save(decoder(step), {"a": torch.full((2,), step)}, {"step": step}, step=step, best_step=best_step)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def pointer(out):
    return json.loads((out / "checkpoint.json").read_text(encoding="utf-8"))


def test_only_the_best_and_the_latest_step_are_kept(tmp_path):
    out = tmp_path / "a" / "run"
    folder = RunFolder(out)
    for step, best, kept in ((10, 10, ["step-10"]), (20, 10, ["step-10", "step-20"]), (30, 30, ["step-30"])):
        save(folder, step, best)
        assert names(out) == ["checkpoint.json", "log.jsonl", *kept]
        assert pointer(out) == {"best": f"step-{best}", "latest": f"step-{step}"}
    assert load(out).embedding.weight[0, 0] == 30


def test_before_any_evaluation_the_latest_is_the_best(tmp_path):
    save(RunFolder(tmp_path), 7, None)
    assert pointer(tmp_path) == {"best": "step-7", "latest": "step-7"}


def test_a_step_is_not_written_twice_but_can_become_the_best(tmp_path):
    folder = RunFolder(tmp_path)
    save(folder, 1, 1)
    save(folder, 2, 1)
    before = (tmp_path / "step-2" / "training.json").stat().st_mtime_ns
    save(folder, 2, 2)
    assert pointer(tmp_path) == {"best": "step-2", "latest": "step-2"}
    assert (tmp_path / "step-2" / "training.json").stat().st_mtime_ns == before
    assert names(tmp_path) == ["checkpoint.json", "log.jsonl", "step-2"]


def test_what_was_saved_is_read(tmp_path):
    save(RunFolder(tmp_path), 3, 3)
    path, tensors, state = RunFolder(tmp_path, resume=True).read()
    assert (path, state) == (tmp_path / "step-3", {"step": 3})
    assert tensors["a"].tolist() == [3, 3]


def test_a_folder_with_a_run_is_refused(tmp_path):
    save(RunFolder(tmp_path), 3, 3)
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


def test_what_a_killed_writer_left_is_cleaned(tmp_path):
    save(RunFolder(tmp_path), 3, 3)
    for name in (".writing-step-9", "step-8"):  # killed while writing; killed before checkpoint.json
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".writing-checkpoint.json").write_bytes(b"{")
    RunFolder(tmp_path, resume=True)
    assert names(tmp_path) == ["checkpoint.json", "log.jsonl", "step-3"]


def test_a_run_killed_before_its_first_checkpoint_can_start_again(tmp_path):
    for name in (".writing-step-9", "tokens"):
        (tmp_path / name).mkdir()
    (tmp_path / "log.jsonl").write_text("{}\n", encoding="utf-8")
    RunFolder(tmp_path)
    assert names(tmp_path) == ["log.jsonl", "tokens"]


@pytest.mark.parametrize("resume", [True, False])
def test_steps_without_their_pointer_are_not_removed(tmp_path, resume):
    for step in (9, 10):
        save(RunFolder(tmp_path, resume=step == 10), step, 9)
    (tmp_path / "checkpoint.json").unlink()
    with pytest.raises(ValueError, match=r"checkpoint.json beside step-10 .* write it as {\"best\": \"step-10\", "):
        RunFolder(tmp_path, resume=resume)
    assert names(tmp_path) == ["log.jsonl", "step-10", "step-9"]


def test_the_second_of_two_runs_in_one_folder_stops(tmp_path):
    first, second = RunFolder(tmp_path), RunFolder(tmp_path)
    save(first, 3, 3)
    with pytest.raises(ValueError, match=r"to name nothing as latest, got step-3: another run writes"):
        save(second, 3, 3)
    save(first, 4, 3)
    assert names(tmp_path) == ["checkpoint.json", "log.jsonl", "step-3", "step-4"]


@pytest.mark.parametrize("part", ["write_model", "save_file", "write_json", "replace_text"])
@pytest.mark.parametrize(
    "failure", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()], ids=["full", "ctrl-c"]
)
def test_a_failure_while_saving_keeps_the_steps_before(tmp_path, monkeypatch, part, failure):
    folder = RunFolder(tmp_path)
    save(folder, 1, 1)
    save(folder, 2, 1)

    def fail(*_):
        if part == "replace_text" and isinstance(failure, OSError):
            raise ValueError(f"expected to write, but: {failure}")
        raise failure

    monkeypatch.setattr(runs, part, fail)
    expected = KeyboardInterrupt if isinstance(failure, KeyboardInterrupt) else ValueError
    with pytest.raises(expected, match="No space left" if expected is ValueError else None):
        save(folder, 3, 3)
    monkeypatch.undo()
    assert pointer(tmp_path) == {"best": "step-1", "latest": "step-2"}
    assert load(tmp_path).embedding.weight[0, 0] == 1
    again = RunFolder(tmp_path, resume=True)
    assert names(tmp_path) == ["checkpoint.json", "log.jsonl", "step-1", "step-2"]
    save(again, 3, 3)
    assert load(tmp_path).embedding.weight[0, 0] == 3


def test_the_log_forgets_what_comes_again(tmp_path):
    folder = RunFolder(tmp_path)
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
    folder = RunFolder(tmp_path)
    (tmp_path / "log.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=r"line 1 of .*log.jsonl to be an event with a step"):
        folder.truncate_log(2)
