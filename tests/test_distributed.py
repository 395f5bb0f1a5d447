"""Many processes are one run: the same batches, the same curve, one decision, one voice; alone, nothing changes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import run, stop_at
from hypothesis import given
from hypothesis import strategies as st

from sightline.batches import TokenFile, TokenizedCorpus, batch
from sightline.cli import main
from sightline.distributed import Team, is_restart, joined, shards
from sightline.evaluation import evaluate
from sightline.events import Stepped
from sightline.interrupts import Interrupts
from sightline.models import Decoder, DecoderConfig
from sightline.schedule import TrainConfig, choose_compile
from sightline.training import Interrupted, fit

SHAPE = ("--d-model", 16, "--num-layers", 2, "--num-heads", 2, "--context", 16, "--tokenizer", "characters")
# Without dropout, whose masks follow the number of processes.
RUN = (
    *SHAPE,
    "--precision",
    "float32",
    "--dropout",
    0,
    "--steps",
    60,
    "--batch",
    6,
    "--evaluate-every",
    15,
    "--evaluate-batches",
    5,
)
TEXT = "".join(f"line {i}: the cat sat on the mat, and the dog ran after the {'cdm'[i % 3]}at.\n" for i in range(200))


def tokens(length: int, seed: int = 0) -> TokenFile:
    ids = (np.cumsum(np.random.default_rng(seed).integers(0, 3, length)) % 7).astype(np.uint16)
    return TokenFile(ids=ids, num_bytes=length, num_words=length, num_unknown=0)


DATA = TokenizedCorpus(train=tokens(2000), valid=tokens(300, 1))


def decoder(**changes) -> Decoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Decoder(DecoderConfig(vocabulary=7, context=8, d_model=16, num_layers=1, num_heads=2, **changes))


def events(out: Path, kind: str) -> list[dict]:
    lines = (out / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def curve(out: Path) -> list[tuple[float, ...]]:
    names = ("step", "loss_nats", "gradient_norm", "learning_rate")
    return [tuple(event.get(n, 0) for n in names) for kind in ("stepped", "evaluated") for event in events(out, kind)]


def check_same_curve(out: Path, other: Path) -> None:
    """Every loss, norm, rate and evaluation of two runs, to rounding."""
    np.testing.assert_allclose(curve(out), curve(other), rtol=2e-4)


# --- Shares --------------------------------------------------------------------------------------------


@given(items=st.lists(st.integers(), max_size=20), size=st.integers(1, 6))
def test_turns_share_all_items_out_and_are_as_many_for_all(items, size):
    turns = [list(Team(rank, size).turns(items)) for rank in range(size)]
    assert {len(mine) for mine in turns} == {-(-len(items) // size)}
    rounds = zip(*turns, strict=True)
    assert [item for round_ in rounds for item, counts in round_ if counts] == items


@given(size=st.integers(1, 12), parts=st.integers(1, 12), step=st.integers(0, 1000))
def test_the_parts_of_a_batch_are_the_batch(size, parts, step):
    same = {"step": step, "seed": 3, "batch": size, "context": 5}
    if parts > size:
        with pytest.raises(ValueError, match=f"part 0 of {parts} parts of a batch of {size}"):
            batch(tokens(100), part=(0, parts), **same)
        return
    pieces = [batch(tokens(100), part=(index, parts), **same) for index in range(parts)]
    for piece, whole in zip(zip(*pieces, strict=True), batch(tokens(100), **same), strict=True):
        assert torch.equal(torch.cat(piece), whole)
    lengths = [len(inputs) for inputs, _ in pieces]
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("size", [2, 3, 7])
def test_an_evaluation_is_the_sum_of_its_shares(size, monkeypatch):
    model, shares = decoder(), []
    monkeypatch.setattr(Team, "total", lambda team, numbers: (shares.append(numbers), numbers)[1])
    whole = evaluate(model, DATA.valid, batch=4)
    (summed,) = shares
    shares.clear()
    for rank in range(size):
        evaluate(model, DATA.valid, batch=4, team=Team(rank, size))
    np.testing.assert_allclose(np.sum(shares, axis=0), summed, rtol=1e-12)
    assert summed[1] == whole.tokens == 299


# --- Micro-batches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_accumulating_is_the_same_step(tmp_path, optimizer):
    config = TrainConfig(steps=12, batch=7, evaluate_every=6, optimizer=optimizer, precision="float32")
    fit(decoder(), DATA, tmp_path / "whole", config)
    for accumulate in (3, 7):
        out = tmp_path / str(accumulate)
        fit(decoder(), DATA, out, replace(config, accumulate=accumulate))
        check_same_curve(out, tmp_path / "whole")
    fit(decoder(), DATA, tmp_path / "other", replace(config, seed=1))
    with pytest.raises(AssertionError):
        check_same_curve(tmp_path / "other", tmp_path / "whole")


def test_a_batch_that_is_too_small_is_refused(tmp_path):
    message = "a window for each of 1 processes x 5 micro-batches, got 4: give a larger --batch"
    with pytest.raises(ValueError, match=message):
        fit(decoder(), DATA, tmp_path, TrainConfig(steps=2, batch=4, accumulate=5))


def test_a_run_may_go_on_with_other_micro_batches(tmp_path):
    config = TrainConfig(steps=8, batch=6, evaluate_every=4, precision="float32")
    fit(decoder(), DATA, tmp_path / "straight", config)

    def stop(event):
        if isinstance(event, Stepped) and event.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        fit(decoder(), DATA, tmp_path / "stopped", config, listener=stop)
    fit(decoder(), DATA, tmp_path / "stopped", replace(config, accumulate=2), resume=True)
    check_same_curve(tmp_path / "stopped", tmp_path / "straight")


# --- Decisions -----------------------------------------------------------------------------------------


def test_where_a_model_is_shared_out(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 * 2**30))
    gpu, team = torch.device("cuda", 0), Team(0, 8)
    fits = 80 * 2**30 // 2 // 16
    assert not shards("auto", fits, gpu, team)
    assert shards("auto", fits + 1, gpu, team)
    assert not shards("auto", fits + 1, gpu, Team())
    assert not shards("replicate", fits + 1, gpu, team)
    with pytest.raises(ValueError, match="got one that is alone: start it by torchrun"):
        shards("shard", 1, torch.device("cpu"), Team())


def test_what_is_compiled():
    assert [choose_compile(choice, torch.device("cpu")) for choice in ("auto", "always", "never")] == [0, 1, 0]


def test_blocks_are_compiled_when_asked(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(module))
    model = decoder()
    fit(model, DATA, tmp_path, TrainConfig(steps=2, batch=2, compile="always"))
    assert compiled == list(model.blocks)


def test_alone_nothing_is_joined():
    with joined({}, "cpu") as team:
        assert team == Team(0, 1) and team.leads
    assert not torch.distributed.is_initialized()


def test_restarts():
    assert not is_restart({})
    assert not is_restart({"TORCHELASTIC_RESTART_COUNT": "0"})
    assert is_restart({"TORCHELASTIC_RESTART_COUNT": "2"})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_a_run_after_its_step(tmp_path, number):
    def press(event):
        if isinstance(event, Stepped) and event.step == 3:
            signal.raise_signal(number)

    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match="stopped at step 3, saved in"):
        fit(decoder(), DATA, tmp_path, TrainConfig(steps=9, batch=2), listener=press)
    assert signal.getsignal(number) is before
    assert [event["step"] for event in events(tmp_path, "stepped")] == [1, 2, 3]


def test_held_signals_wait_for_all():
    with Interrupts(held=True) as interrupts:
        assert not interrupts.came
        with interrupts.postponed():
            signal.raise_signal(signal.SIGTERM)
        assert interrupts.came
    with pytest.raises(KeyboardInterrupt), Interrupts(held=False):
        signal.raise_signal(signal.SIGTERM)


# --- torchrun ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def straight(text, tmp_path_factory) -> Path:
    """A run of one process."""
    out = tmp_path_factory.mktemp("straight") / "run"
    assert main([str(word) for word in ("train", text, "--out", out, *RUN)]) == 0
    return out


def torchrun(processes: int, *words, options: tuple = (), host: tuple = (), **environment: str) -> subprocess.Popen:
    runner = [*host, sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", processes, *options]
    command = [str(word) for word in (*runner, "-m", "sightline", "train", *words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> tuple[int, str, list[str]]:
    """The exit code, what was printed, and what our program told on stderr."""
    out, err = process.communicate(timeout=120)
    return process.returncode, out, [line for line in err.splitlines() if line.startswith("sightline train: ")]


def wait_for_step(process: subprocess.Popen, out: Path, step: int) -> None:
    log = out / "log.jsonl"
    while process.poll() is None and not (log.exists() and f'"stepped", "step": {step},' in log.read_text("utf-8")):
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()


def worker(process: subprocess.Popen, rank: int) -> int:
    """The process id of a rank."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    environments = {int(child): Path(f"/proc/{child}/environ").read_bytes().split(b"\0") for child in children}
    return next(child for child, found in environments.items() if f"RANK={rank}".encode() in found)


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("localhost", 0))
        return bound.getsockname()[1]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """The names of two network namespaces with a wire between them: link0, 10.77.0.1 and 10.77.0.2."""
    names = [f"sightline-{os.getpid()}-{number}" for number in (1, 2)]
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", "link0", "netns", names[0], "type", "veth", "peer", "name", "link0", "netns", names[1])
            for number, name in enumerate(names, start=1):
                ip("-n", name, "address", "add", f"10.77.0.{number}/24", "dev", "link0")
                for device in ("lo", "link0"):
                    ip("-n", name, "link", "set", device, "up")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"network namespaces need Linux, iproute2 and root: {getattr(error, 'stderr', None) or error}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


on_linux = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the workers in /proc")


@pytest.mark.slow
def test_four_processes_are_one(text, straight, tmp_path):
    # 6 windows for 4 processes: shares of 1, 2, 1 and 2.
    code, printed, told = finish(torchrun(4, text, "--out", tmp_path / "run", *RUN))
    assert (code, told) == (0, [])
    assert [line.split(":")[0] for line in printed.splitlines()] == ["best at step 60", "loss curve", "next"]
    check_same_curve(tmp_path / "run", straight)
    (started,) = events(tmp_path / "run", "started")
    assert started["processes"] == 4


@pytest.mark.slow
def test_two_hosts_are_one(text, straight, hosts, tmp_path):
    out, started = tmp_path / "run", []
    meet = ("--nnodes", 2, "--rdzv-backend", "c10d", "--rdzv-endpoint", "10.77.0.1:29500", "--rdzv-id", "one")
    for number, name in enumerate(hosts, start=1):
        # Both have this machine's name: each is told its address, and which of them the meeting point is.
        options = (*meet, "--local-addr", f"10.77.0.{number}", "--rdzv-conf", f"is_host={2 - number}")
        host = ("ip", "netns", "exec", name)
        words = (text, "--out", out, *RUN, "--parallel", "shard")
        started.append(torchrun(1, *words, options=options, host=host, GLOO_SOCKET_IFNAME="link0"))
    (code, printed, told), (other_code, other_printed, other_told) = map(finish, started)
    assert (code, other_code, told, other_told) == (0, 0, [], [])
    # Which host leads is the rendezvous' choice.
    assert sorted(map(bool, (printed, other_printed))) == [False, True]
    check_same_curve(out, straight)
    (begun,) = events(out, "started")
    assert begun["processes"] == 2


@pytest.mark.slow
@on_linux
def test_shared_out_stopped_by_a_signal_and_gone_on_with_alone(text, straight, tmp_path):
    out = tmp_path / "run"
    with torchrun(2, text, "--out", out, *RUN, "--parallel", "shard", "--accumulate", 2) as process:
        wait_for_step(process, out, 20)
        os.kill(process.pid, signal.SIGTERM)
        code, _, (line,) = finish(process)
    assert code != 0
    step = events(out, "stepped")[-1]["step"]
    assert line == (
        f"sightline train: stopped at step {step}, saved in {out / f'step-{step}'}: "
        "the same with --resume (resume=True) goes on"
    )
    assert main([str(word) for word in ("train", text, "--out", out, *RUN, "--resume")]) == 0
    check_same_curve(out, straight)


@pytest.mark.slow
def test_begun_alone_and_gone_on_with_by_four_and_then_by_two(text, straight, tmp_path):
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        stop_at(20, patch)
        assert run("train", text, "--out", out, *RUN) == 130
    with torchrun(4, text, "--out", out, *RUN, "--resume") as process:
        wait_for_step(process, out, 35)
        os.kill(process.pid, signal.SIGTERM)
        finish(process)
    code, _, told = finish(torchrun(2, text, "--out", out, *RUN, "--parallel", "shard", "--resume"))
    assert (code, told) == (0, [])
    check_same_curve(out, straight)
    assert [event["processes"] for event in events(out, "started")] == [1, 4, 2]


@pytest.mark.slow
def test_two_processes_count_as_one_does(text, tmp_path):
    """The recipe counted: its counts are of the whole text, whoever reads which part."""
    words = (text, *RUN, "--recipe", "counted")
    assert run("train", *words, "--out", tmp_path / "one") == 0
    code, _, told = finish(torchrun(2, *words, "--out", tmp_path / "two"))
    assert (code, told) == (0, [])
    check_same_curve(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
@on_linux
def test_the_machines_that_are_left_go_on(text, straight, tmp_path):
    out, port = tmp_path / "run", free_port()
    meet = ("--nnodes", "1:2", "--max-restarts", 3, "--rdzv-backend", "c10d", "--rdzv-id", "some")
    meet = (*meet, "--rdzv-endpoint", f"localhost:{port}", "--local-addr", "localhost")
    first, second = (
        torchrun(1, text, "--out", out, *RUN, options=(*meet, "--rdzv-conf", f"is_host={host},last_call_timeout=3"))
        for host in (1, 0)
    )
    with first, second:
        wait_for_step(first, out, 20)
        assert events(out, "started")[0]["processes"] == 2
        (child,) = Path(f"/proc/{second.pid}/task/{second.pid}/children").read_text().split()
        for lost in (second.pid, int(child)):  # a machine that is switched off
            os.kill(lost, signal.SIGKILL)
        code, printed, _ = finish(first)
    assert code == 0 and printed.startswith("best at step 60")
    check_same_curve(out, straight)
    assert [event["processes"] for event in events(out, "started")] == [2, 1]


@pytest.mark.slow
@on_linux
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_worker_is_told_and_the_restarted_run_goes_on(text, straight, tmp_path, rank):
    out = tmp_path / "run"
    shared_out = ("--parallel", "shard") if rank else ()
    with torchrun(2, text, "--out", out, *RUN, *shared_out, options=("--max-restarts", 1)) as process:
        wait_for_step(process, out, 20)
        os.kill(worker(process, rank), signal.SIGKILL)
        code, printed, (line,) = finish(process)
    assert line.startswith(f"sightline train: process {1 - rank} of 2 lost another one (") and "--resume" in line
    assert code == 0 and printed.startswith("best at step 60")
    check_same_curve(out, straight)
    assert [event["resumed"] for event in events(out, "started")] == [False, True]


@pytest.mark.slow
def test_what_goes_wrong_is_told_once(text, tmp_path):
    out = tmp_path / "run"
    wild = ("--optimizer", "adamw", "--learning-rate", 1e38, "--clip", 1e38)
    code, printed, (line,) = finish(torchrun(2, text, "--out", out, *RUN, *wild))
    assert code != 0 and not printed
    assert "became" in line and "nothing was saved yet; start again with a lower --learning-rate" in line
