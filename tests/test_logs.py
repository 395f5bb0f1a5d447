"""A log is read at its end and while it is written; every event comes back as it was."""

import json
import threading
import time

import pytest

from sightline import logs
from sightline.events import Ended, Evaluated, Saved, Started, Stepped, Warned, as_record, of_record
from sightline.logs import follow, read_log
from sightline.runs import RunFolder

STARTED = Started(
    step=0, resumed=False, steps=2, minutes=None, evaluate_every=1, look_seconds=0.0, parameters=3, train_tokens=9,
    valid_tokens=9, batch=1, context=2, learning_rate=0.1, device="cpu", precision="float32", seconds=0.5,
)  # fmt: skip
EVENTS = [
    STARTED,
    Evaluated(step=0, best=False, loss_nats=2.0, perplexity=7.4, bits_per_byte=1.0, tokens=8, seconds=0.6),
    Stepped(
        step=1, done=0.5, loss_nats=1.9, gradient_norm=1.0, learning_rate=0.1, tokens_per_second=4.0, peak_bytes=7,
        seconds=1.0,
    ),
    Warned(step=1, message="the loss rises", seconds=1.1),
    Saved(step=1, folder="run/step-1", seconds=1.2),
    Ended(step=1, stopped="steps", seconds=1.3, tokens_per_second=4.0, peak_bytes=7),
]  # fmt: skip


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(logs, "_POLL", 0.01)


def written(out, events):
    with RunFolder(out) as folder:
        for event in events:
            folder.log(event)


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_an_event_comes_back_from_its_record(event):
    assert of_record(json.loads(json.dumps(as_record(event)))) == event


def test_an_event_of_another_version_is_passed_over():
    record = as_record(STARTED)
    assert of_record({**record, "mood": 1}) is None
    del record["seconds"]
    assert of_record(record) is None
    assert of_record({"event": "paused", "step": 1}) is None


def test_a_log_is_read_without_the_line_that_is_not_whole(tmp_path):
    written(tmp_path, EVENTS)
    with (tmp_path / "log.jsonl").open("a", encoding="utf-8") as log:
        log.write('{"event": "stepped", "step": 2')
    assert read_log(tmp_path) == [as_record(event) for event in EVENTS]
    assert list(follow(tmp_path)) == EVENTS


@pytest.mark.parametrize("line", ["[1]", "{]", '{"event": "saved"}', '{"step": 1}', "\udcff"])
def test_a_line_that_is_no_event_is_named(tmp_path, line):
    written(tmp_path, EVENTS[:1])
    with (tmp_path / "log.jsonl").open("ab") as log:
        log.write(line.encode(errors="surrogateescape") + b"\n")
    for read in (read_log, follow):
        with pytest.raises(ValueError, match=r"line 2 of .*log.jsonl to be an event with a step"):
            list(read(tmp_path))


def test_a_folder_without_a_log(tmp_path):
    for read in (read_log, follow):
        with pytest.raises(ValueError, match=r"the folder of a run, but .* has no log.jsonl"):
            list(read(tmp_path))


def test_what_comes_is_followed_until_the_writer_is_gone(tmp_path, quick):
    heard = []
    with RunFolder(tmp_path) as folder:
        folder.log(EVENTS[0])
        reader = threading.Thread(target=lambda: heard.extend(follow(tmp_path)))
        reader.start()
        for event in EVENTS[1:]:
            folder.log(event)
            time.sleep(0.02)
        assert reader.is_alive()
    reader.join(timeout=20)
    assert heard == EVENTS


def test_a_line_that_comes_in_two_pieces_is_one_event(tmp_path, quick):
    follower = follow(tmp_path)
    with RunFolder(tmp_path) as folder:
        folder.log(EVENTS[0])
        assert next(follower) == EVENTS[0]
        line = json.dumps(as_record(EVENTS[1])) + "\n"
        heard = []
        reader = threading.Thread(target=lambda: heard.extend(follower))
        with (tmp_path / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(line[:20])
            log.flush()
            reader.start()
            time.sleep(0.05)
            log.write(line[20:])
    reader.join(timeout=20)
    assert heard == [EVENTS[1]]


def test_a_log_that_a_resumed_run_cuts_is_read_again(tmp_path, quick):
    with RunFolder(tmp_path) as folder:
        for event in EVENTS:
            folder.log(event)
        follower = follow(tmp_path)
        assert [next(follower) for _ in EVENTS] == EVENTS
        folder.truncate_log(0)
        folder.log(STARTED)
    assert list(follower) == [*EVENTS[:2], STARTED]
