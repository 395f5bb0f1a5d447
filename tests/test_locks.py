import os
import subprocess
import sys
import threading

import pytest

from sightline import locks
from sightline.locks import Lock

PROGRAM = """
import sys, time
from pathlib import Path
from sightline.locks import Lock
print(Lock(Path(sys.argv[1])).take(), flush=True)
time.sleep(600)
"""


@pytest.fixture
def file(tmp_path):
    return tmp_path / "lock"


def test_one_holder_at_a_time(file):
    first, second = Lock(file), Lock(file)
    assert first.take()
    assert not second.take()
    assert second.holder() == str(os.getpid())
    first.give_back()
    assert not file.exists()
    assert second.take()
    second.give_back()
    second.give_back()


def test_a_killed_process_holds_nothing(file):
    with subprocess.Popen([sys.executable, "-c", PROGRAM, file], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "True\n"
        lock = Lock(file)
        assert not lock.take()
        assert lock.holder() == str(process.pid)
        process.kill()
    assert file.exists()
    assert lock.take()
    assert lock.holder() == str(os.getpid())
    lock.give_back()


def test_waiting_for_the_holder(file):
    first, second, taken = Lock(file), Lock(file), threading.Event()
    assert first.take()

    def wait():
        assert second.take(wait=True)
        taken.set()
        second.give_back()

    thread = threading.Thread(target=wait)
    thread.start()
    assert not taken.wait(0.05)
    first.give_back()
    thread.join()
    assert taken.is_set() and not file.exists()


def test_many_takers_never_share(file):
    """Whoever opened the file before it was removed must not hold what nobody else can see."""
    holders, most = [], []

    def work():
        for _ in range(50):
            lock = Lock(file)
            assert lock.take(wait=True)
            holders.append(lock)
            most.append(len(holders))
            holders.remove(lock)
            lock.give_back()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(most) == {1} and len(most) == 200


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        Lock(tmp_path / "nowhere" / "lock").take()
    assert Lock(tmp_path / "lock").holder() == "just ended"


@pytest.mark.skipif(os.name == "nt", reason="needs flock")
def test_a_file_system_without_locks_is_told(file, monkeypatch):
    def refuse(*_):
        raise OSError(locks.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    lock = Lock(file)
    with pytest.warns(UserWarning, match="has no locks .No locks available.: see to it that no second process"):
        assert lock.take()
    lock.give_back()
