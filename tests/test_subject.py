"""The process that somebody's code runs in: its limits, and every way to fail told in one line."""

import json
import os
import time
from pathlib import Path

import pytest

from sightline import cli
from sightline.checking.subject import CheckError, Subject, plain

TORCH = """
import torch

def mine(q, k, v):
    print("here")
    return torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v
"""


def ran(capsys, *arguments) -> tuple[int, str, str]:
    code = cli.main(["check", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "mine.py"


@pytest.mark.slow
def test_what_is_printed_is_kept_apart(file, capsys):
    file.write_text(TORCH)
    code, out, err = ran(capsys, file, "--json")
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert told["verdict"] == "pass"
    assert told["printed"].startswith("here\nhere\n")


def test_an_endless_loop_ends(file, capsys):
    file.write_text("def mine(q, k, v):\n    while True:\n        pass\n")
    code, out, err = ran(capsys, f"{file}:mine", "--seconds", 0.3, "--json")
    assert code == 2
    assert len(err.splitlines()) == 1
    assert f"{file}, line " in err and "did not come back within 0.3 s" in err
    assert json.loads(out)["verdict"] == "error"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("import ctypes\ndef mine(q, k, v):\n    ctypes.string_at(0)\n", "line 3, crashed with SIGSEGV"),
        ("import os\ndef mine(q, k, v):\n    os._exit(7)\n", "ended its process with code 7"),
        ("import sys\ndef mine(q, k, v):\n    sys.exit(0)\n", "line 3, raised SystemExit"),
        (
            "import torch\ndef mine(q, k, v):\n    return torch.zeros(10**11)\n",
            "line 3, needs more than 4 GB of memory",
        ),
        ("def mine(q, k, v):\n    return [0] * 10**10\n", "line 2, needs more than 4 GB of memory"),
        ("def mine(q, k, v:\n    return q\n", "line 1, raised SyntaxError"),
        ("import nothing_of_that_name\n", "line 1, raised ModuleNotFoundError"),
        ("import time\ntime.sleep(60)\n", "line 2, did not come back within 3 s, while being imported"),
        ("def mine(q, k, v):\n    print('x')\n    return mine(q, k, v)\n", "raised RecursionError"),
        ("import os\ndef mine(q, k, v):\n    [os.write(fd, b'x' * 99) for fd in range(3, 9)]\n", "while it was called"),
        (
            "import os, signal\ndef mine(q, k, v):\n    os.kill(os.getpid(), signal.SIGKILL)\n",
            "was ended by the system",
        ),
        ("mine = 3\n", "cannot be called"),
        ("def other(q, k, v): ...\n", "has no 'mine'; it defines other"),
        ("def mine(q, k, v):\n    raise ValueError('\\x1b[31mred\\nmore')\n", r"ValueError: \x1b[31mred, while"),
    ],
)
def test_every_way_to_fail_is_one_line(file, capsys, code, says):
    file.write_text(code)
    code, out, err = ran(capsys, f"{file}:mine", "--seconds", 3)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1, err
    assert says in err


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("nothing.py:mine", "there is no file"),
        ("folder", "expected a Python file"),
        ("notes.txt", "expected a Python file, FILE.py or FILE.py:FUNCTION"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path, monkeypatch, capsys, target, says):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("notes.txt").write_text("text")
    code, out, err = ran(capsys, target)
    assert (code, out) == (2, "")
    assert says in err and len(err.splitlines()) == 1


@pytest.mark.slow
def test_what_the_code_starts_ends_with_it(file):
    file.write_text(
        "import subprocess, sys\n"
        "def mine(q, k, v):\n"
        "    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "    raise ValueError(str(child.pid))\n"
    )
    with Subject(file, None, seconds=20, memory=0) as subject, pytest.raises(CheckError) as raised:
        subject.ask("call", "it was called", arguments=[["value", 0]] * 3, named={}, library="numpy")
    child = int(str(raised.value).split("ValueError: ")[1].split(",")[0])
    for _ in range(50):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    os.kill(child, 9)
    raise AssertionError("it lives on")


@pytest.mark.slow
def test_speed_and_memory_beside_the_reference(file, capsys):
    file.write_text(TORCH)
    code, out, _ = ran(capsys, file, "--speed", "--seconds", 100)
    assert code == 0
    assert "2,048 tokens" in out and "of PyTorch's time" in out


def test_messages_are_plain():
    assert plain("\n\x1b[1mbold\n") == "\\x1b[1mbold"
    assert len(plain("x" * 1000)) == 200
