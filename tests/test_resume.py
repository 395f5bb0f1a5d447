"""Nothing is lost: runs that are killed, full and read-only disks, damaged files, two runs in one folder."""

import functools
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import commands
import pytest
from commands import run, stop_at

pytestmark = pytest.mark.usefixtures("no_pictures")

TEXT = "".join(
    f"line {i}: the cat sat on the mat, and the dog ran after the {['cat', 'dog', 'mat'][i % 3]}.\n" for i in range(40)
)
SHAPE = ("--d-model", 16, "--num-layers", 1, "--num-heads", 2, "--context", 16, "--dropout", 0.1)
TINY = (*SHAPE, "--recipe", "long", "--steps", 12, "--batch", 4, "--evaluate-every", 4, "--tokenizer", "characters")


@pytest.fixture(scope="module")
def straight(text, tmp_path_factory) -> Path:
    """A run that nothing happened to."""
    out = tmp_path_factory.mktemp("straight") / "run"
    assert run("train", text, "--out", out, *TINY) == 0
    return out


@pytest.fixture
def stopped(text, tmp_path) -> Path:
    """The same run, stopped at step 10: step-4 and step-8 were saved, and step-10 by Ctrl-C."""
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        stop_at(10, patch)
        assert run("train", text, "--out", out, *TINY) == 130
    assert {path.name for path in out.glob("step-*")} == {"step-8", "step-10"}
    return out


refused = functools.partial(commands.refused, after_progress=True)


def events(out: Path, kind: str) -> list[dict]:
    """What the log says of steps or evaluations, but for the clock and the memory."""
    lines = (out / "log.jsonl").read_text(encoding="utf-8").splitlines()
    found = [event for event in map(json.loads, lines) if event["event"] == kind]
    return [
        {key: value for key, value in event.items() if "second" not in key and key != "peak_bytes"} for event in found
    ]


def check_same_run(out: Path, other: Path) -> None:
    """Every loss, norm and rate of every step, every evaluation, and the weights, bit for bit."""
    for kind in ("stepped", "evaluated"):
        assert events(out, kind) == events(other, kind)
    latest = json.loads((other / "checkpoint.json").read_text(encoding="utf-8"))["latest"]
    assert (out / "checkpoint.json").read_bytes() == (other / "checkpoint.json").read_bytes()
    for name in ("model.safetensors", "training.safetensors", "config.json", "tokenizer.json"):
        assert (out / latest / name).read_bytes() == (other / latest / name).read_bytes()


def flip(file: Path, generator: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    file.write_bytes(content)


def test_the_check_of_two_runs_can_fail(straight, tmp_path):
    other = shutil.copytree(straight, tmp_path / "other")
    check_same_run(other, straight)
    log = (other / "log.jsonl").read_text(encoding="utf-8")
    loss = events(straight, "stepped")[6]["loss_nats"]
    (other / "log.jsonl").write_text(log.replace(str(loss), str(loss * (1 + 1e-15))), encoding="utf-8")
    with pytest.raises(AssertionError):
        check_same_run(other, straight)


# --- Killed at any moment ------------------------------------------------------------------------------

KILLS = 7
LONG = (*SHAPE, "--steps", 300, "--batch", 4, "--evaluate-every", 4, "--evaluate-batches", 2)


def command(text: Path, out: Path, kind: str) -> list[str]:
    """`sightline train`, going on where there is something to go on from."""
    resume = ["--resume"] if any(out.glob("step-*")) else []
    if kind == "counted":
        kind, resume = "characters", ["--recipe", "counted", *resume]
    words = ["train", text, "--out", out, *LONG, "--tokenizer", kind, "--vocabulary", 300 if kind == "bpe" else 60]
    return [sys.executable, "-m", "sightline", *map(str, words), *resume]


def start(arguments: list[str]) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(arguments: list[str]) -> None:
    with start(arguments) as process:
        errors = process.stderr.read().decode()
    assert process.returncode == 0, errors


def is_writing(out: Path) -> bool:
    return out.is_dir() and any(path.name.startswith(".writing-") for path in out.iterdir())


def wait_for_the_moment(process: subprocess.Popen, out: Path, moment: str, generator: random.Random) -> None:
    """Until a checkpoint is being written, some time after training began, or some time after the start."""
    if moment == "starting":
        time.sleep(generator.uniform(0, 2.5))
        return
    size = (out / "log.jsonl").stat().st_size if (out / "log.jsonl").exists() else 0
    while process.poll() is None and not ((out / "log.jsonl").exists() and (out / "log.jsonl").stat().st_size > size):
        time.sleep(0.005)
    if moment == "training":
        time.sleep(generator.uniform(0, 0.6))
        return
    for _ in range(generator.randrange(1, 6)):  # which of the next checkpoints
        while process.poll() is None and is_writing(out):
            pass
        while process.poll() is None and not is_writing(out):
            pass
    time.sleep(generator.uniform(0, 0.01))


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
@pytest.mark.parametrize("kind", ["words", "characters", "bpe", "counted"])
def test_a_run_killed_at_any_moment_is_the_run_that_was_not(text, tmp_path, kind):
    # 300 steps of 64 tokens read this text about ten times: the edge of an epoch is crossed between kills.
    finish(command(text, tmp_path / "straight", kind))
    out, generator = tmp_path / "killed", random.Random(kind)
    moments = ["writing", "training", "writing", "starting", "writing", "training", "writing"]
    killed, halves = 0, 0
    moments = moments[:3] if kind == "counted" else moments[:KILLS]
    for moment in moments:
        with start(command(text, out, kind)) as process:
            wait_for_the_moment(process, out, moment, generator)
            killed += process.poll() is None
            process.kill()
            errors = process.stderr.read().decode()
            assert "Traceback" not in errors and "damaged" not in errors, errors
        halves += is_writing(out)
    assert killed == len(moments)
    assert halves > 0, "no kill met a checkpoint half written"
    finish(command(text, out, kind))
    check_same_run(out, tmp_path / "straight")
    assert not is_writing(out) and not list((out / "tokens").glob(".tokens-*"))


# --- Damaged files -------------------------------------------------------------------------------------

FILES = ["model.safetensors", "training.safetensors", "training.json", "config.json", "tokenizer.json"]


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_latest_step_is_told_and_the_one_before_goes_on(text, straight, stopped, name, capsys):
    flip(stopped / "step-10" / name, random.Random(name))
    assert run("train", text, "--out", stopped, *TINY, "--resume") == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    (line,) = lines
    file = stopped / "step-10" / name
    assert line.startswith(f"warning: {file} is damaged: ")
    assert line.endswith(f"; going on from {stopped / 'step-8'}")
    check_same_run(stopped, straight)
    (warned,) = events(stopped, "warned")
    assert warned["message"] == line.removeprefix("warning: ")


def test_a_damaged_best_step_is_refused_with_one_that_is_whole(text, straight, tmp_path, capsys):
    out = shutil.copytree(straight, tmp_path / "run")
    best = json.loads((out / "checkpoint.json").read_text(encoding="utf-8"))["best"]
    flip(out / best / "model.safetensors", random.Random(0))
    other = next(path for path in sorted(out.glob("step-*"), reverse=True) if path.name != best)
    says = (f"{out / best / 'model.safetensors'} is damaged: ", "is whole: give that")
    refused(capsys, "generate", "the cat", "--model", out, says=says)
    refused(capsys, "evaluate", text, "--model", out, says=says)
    assert run("generate", "the cat", "--model", other, "--tokens", 3) == 0


def test_a_damaged_best_step_that_is_not_the_latest(text, stopped, capsys):
    """The run goes on from its latest, and the next evaluation is the best so far."""
    state = json.loads((stopped / "step-10" / "training.json").read_text(encoding="utf-8"))
    assert state["best_step"] == 8
    flip(stopped / "step-8" / "model.safetensors", random.Random(0))
    assert run("train", text, "--out", stopped, *TINY, "--resume") == 0
    assert f"warning: the best step, {stopped / 'step-8'}, is lost or damaged: " in capsys.readouterr().err
    pointer = json.loads((stopped / "checkpoint.json").read_text(encoding="utf-8"))
    assert pointer == {"best": "step-12", "latest": "step-12"}


def test_a_run_without_a_whole_step(text, stopped, capsys):
    for step in (8, 10):
        flip(stopped / f"step-{step}" / "training.json", random.Random(step))
    refused(
        capsys, "train", text, "--out", stopped, *TINY, "--resume", says=("training.json is damaged", "no other step")
    )


# --- Full and read-only disks --------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path):
    """A disk of 600 kB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if mount is None or subprocess.run([mount, "-t", "tmpfs", "-o", "size=600k", "tmpfs", folder]).returncode:
        pytest.skip("may not mount a disk here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def fill(disk: Path, *, leave: int) -> Path:
    ballast = disk / "ballast"
    free = shutil.disk_usage(disk).free
    ballast.write_bytes(bytes(free - leave))
    return ballast


@pytest.mark.parametrize("leave", [4096, 40_960])
def test_a_disk_that_is_full_while_training(text, straight, stopped, disk, capsys, leave):
    out = shutil.copytree(stopped, disk / "run")
    ballast = fill(disk, leave=leave)
    refused(
        capsys, "train", text, "--out", out, *TINY, "--resume", says=(str(out), "No space left on device", "free some")
    )
    assert {path.name for path in out.glob("step-*")} == {"step-8", "step-10"}
    assert not is_writing(out)
    ballast.unlink()
    assert run("train", text, "--out", out, *TINY, "--resume") == 0
    check_same_run(out, straight)


def test_a_disk_that_is_full_while_tokenizing(text, tmp_path, disk, capsys):
    fill(disk, leave=4096)
    same = ("train", text, "--out", tmp_path / "run", "--cache", disk / "tokens", *TINY)
    refused(capsys, *same, says=(f"cannot write token files into {disk / 'tokens'}: No space left on device",))
    assert not any((disk / "tokens").iterdir())


def test_a_read_only_disk(text, stopped, disk, capsys):
    out = shutil.copytree(stopped, disk / "run")
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    for arguments in ((out, "--resume"), (disk / "new",)):
        says = ("expected a folder that can be written", "Read-only file system", "choose another --out")
        refused(capsys, "train", text, "--out", *arguments, *TINY, says=says)
    assert run("generate", "the cat", "--model", out, "--tokens", 3) == 0
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before


PROGRAM = """
import resource, sys
from sightline.cli import main
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs the limits of POSIX")
@pytest.mark.parametrize("limit", [3_000, 10_000])
def test_a_file_that_cannot_grow(text, straight, stopped, limit):
    """What stands for a full disk where no disk can be mounted: first the log cannot be written, then the weights."""
    arguments = ["train", text, "--out", stopped, *TINY, "--resume"]
    program = [sys.executable, "-c", PROGRAM, *map(str, [limit, *arguments])]
    done = subprocess.run(program, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("sightline train: expected to write ") and "File too large" in line and str(stopped) in line
    assert run(*arguments) == 0
    check_same_run(stopped, straight)


# --- Two runs in one folder ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_a_second_run_in_the_same_folder_is_refused_at_once(text, tmp_path, capsys):
    out = tmp_path / "run"
    with start([*command(text, out, "characters"), "--steps", "100000"]) as process:
        while process.poll() is None and not (out / "log.jsonl").exists():
            time.sleep(0.01)
        says = (f"another run, process {process.pid}, writes into {out}: wait for its end, or choose another --out",)
        refused(capsys, "train", text, "--out", out, *TINY, says=says)
        while process.poll() is None and not any(out.glob("step-*")):
            time.sleep(0.01)
        refused(capsys, "train", text, "--out", out, *TINY, "--resume", says=says)
        refused(capsys, "train", text, "--out", out, *TINY, says=("holds a run at step",))
        process.kill()
    assert (out / ".lock").exists()  # which no living process holds
    assert subprocess.run(command(text, out, "characters"), capture_output=True).returncode in (0, 2)
    assert not (out / ".lock").exists()
