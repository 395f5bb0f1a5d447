import errno
import json
import os
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sightline import batches, corpora
from sightline.batches import TokenFile, batch, tokenize, windows
from sightline.corpora import open_corpus
from sightline.locks import Lock
from sightline.tokenizers import Tokenizer

TEXT = "the cat sat on the caf\u00e9 mat\nthe dog did not\n\n" * 40


@pytest.fixture
def file(tmp_path):
    file = tmp_path / "text.txt"
    file.write_bytes(TEXT.encode("utf-8"))
    return file


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def words():
    return Tokenizer.train("words", ["the cat sat on mat not\n"])


def tokens_of(ids):
    return TokenFile(ids=np.asarray(ids, dtype="<u2"), num_bytes=0, num_words=0, num_unknown=0)


def only_folder(cache):
    (folder,) = cache.iterdir()
    return folder


class Unused:
    """A tokenizer that may be hashed and not used: what a cached corpus needs."""

    def __init__(self, tokenizer):
        self.hash = tokenizer.hash

    def __len__(self):
        raise AssertionError("the cache was not used")


# Token files


@pytest.mark.parametrize("kind", ["words", "characters", "bpe"])
@pytest.mark.parametrize("piece", [16, 1 << 20])
def test_ids_and_counts_are_those_of_the_whole_text(file, cache, monkeypatch, kind, piece):
    monkeypatch.setattr(corpora, "PIECE", piece)
    monkeypatch.setattr(batches, "BLOCK", 2 * piece)
    corpus = open_corpus(file)
    tokenizer = Tokenizer.train(kind, ["the cat sat on mat not\n"])
    tokenized = tokenize(corpus, tokenizer, cache)
    for split in ("train", "valid"):
        text = "".join(corpus.texts(split))
        tokens = getattr(tokenized, split)
        assert isinstance(tokens.ids, np.memmap)
        assert tokens.ids.dtype == np.uint16
        assert tokens.ids.tolist() == tokenizer.encode(text)
        assert tokens.num_bytes == len(text.encode("utf-8")) == corpus.size(split)
        assert tokens.num_words == len(text.split())
        assert tokens.num_unknown == sum(i == tokenizer.unknown for i in tokenizer.encode(text))
        assert len(tokens) == len(tokens.ids)
    assert tokenized.test is None
    assert (kind == "bpe") == (tokenized.train.num_unknown == 0)


def test_words_that_run_over_pieces_count_once(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(corpora, "PIECE", 4)
    monkeypatch.setattr(batches, "BLOCK", 4)
    (tmp_path / "a.txt").write_bytes(b"onelongword another " * 3)
    corpus = open_corpus(tmp_path / "a.txt")
    tokenized = tokenize(corpus, Tokenizer.train("characters", ["a"]), cache)
    assert tokenized.train.num_words == len("".join(corpus.texts("train")).split())


def test_num_bytes_are_those_of_the_text_where_bytes_are_replaced(tmp_path, cache):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 " * 20)
    tokenized = tokenize(open_corpus(tmp_path / "a.txt", errors="replace"), Tokenizer.train("bpe", ["a"]), cache)
    assert tokenized.train.num_bytes == 90 // 5 * len("caf\ufffd ".encode())


@pytest.mark.parametrize(("words", "dtype"), [(65_534, np.uint16), (65_535, np.uint32)])
def test_ids_are_as_wide_as_the_vocabulary_needs(file, cache, words, dtype):
    tokenizer = Tokenizer.train("words", [" ".join(map(str, range(words))), "the cat cat"], vocabulary=words + 2)
    tokens = tokenize(open_corpus(file), tokenizer, cache).train
    assert len(tokenizer) == words + 2
    assert tokens.ids.dtype == dtype
    assert tokens.ids.tolist() == tokenizer.encode("".join(open_corpus(file).texts("train")))


def test_progress_ends_at_all_bytes(file, cache, words, monkeypatch):
    monkeypatch.setattr(corpora, "PIECE", 100)
    monkeypatch.setattr(batches, "BLOCK", 100)
    seen = []
    tokenize(open_corpus(file), words, cache, lambda done, total: seen.append((done, total)))
    assert len(seen) > 10
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert {total for _, total in seen} == {len(TEXT.encode())}
    assert seen[-1][0] == seen[-1][1]


# The cache


def test_the_second_call_reads_the_cache(file, cache, words):
    first = tokenize(open_corpus(file), words, cache)
    second = tokenize(open_corpus(file), Unused(words), cache)
    assert second.train.ids.tolist() == first.train.ids.tolist()
    assert second.valid.num_words == first.valid.num_words
    assert [entry.name for entry in cache.iterdir()] == [only_folder(cache).name]


def test_a_copy_of_the_text_elsewhere_is_the_same_text(file, cache, words, tmp_path):
    tokenize(open_corpus(file), words, cache)
    shutil.copy(file, tmp_path / "copy.txt")
    tokenize(open_corpus(tmp_path / "copy.txt"), Unused(words), cache)


def test_a_changed_text_is_never_served_from_the_cache(file, cache, words):
    tokenize(open_corpus(file), words, cache)
    stat = file.stat()
    file.write_bytes(TEXT.replace("the cat", "not cat").encode("utf-8"))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    tokens = tokenize(open_corpus(file), words, cache).train
    assert words.decode(tokens.ids[:2]) == "not cat"


def test_another_tokenizer_or_format_is_another_entry(file, cache, words, monkeypatch):
    tokenize(open_corpus(file), words, cache)
    tokenize(open_corpus(file), Tokenizer.train("words", ["the dog\n"]), cache)
    assert len(list(cache.iterdir())) == 2
    monkeypatch.setattr(batches, "FORMAT", batches.FORMAT + 1)
    tokenize(open_corpus(file), words, cache)
    assert len(list(cache.iterdir())) == 3


def truncate(folder):
    (folder / "train").write_bytes((folder / "train").read_bytes()[:-2])


def flip_a_bit(folder):
    content = bytearray((folder / "valid").read_bytes())
    content[3] ^= 1
    (folder / "valid").write_bytes(content)


def lose_a_file(folder):
    (folder / "valid").unlink()


def lose_the_manifest(folder):
    (folder / "manifest.json").unlink()


def cut_the_manifest(folder):
    (folder / "manifest.json").write_bytes((folder / "manifest.json").read_bytes()[:50])


def empty_the_manifest(folder):
    (folder / "manifest.json").write_text("{}", encoding="utf-8")


def list_in_the_manifest(folder):
    (folder / "manifest.json").write_text("[]", encoding="utf-8")


def foreign_manifest(folder):
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    (folder / "manifest.json").write_text(json.dumps(manifest | {"tokenizer": "another"}), encoding="utf-8")


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        flip_a_bit,
        lose_a_file,
        lose_the_manifest,
        cut_the_manifest,
        empty_the_manifest,
        list_in_the_manifest,
        foreign_manifest,
    ],
)
def test_a_damaged_entry_is_written_anew(file, cache, words, damage):
    ids = tokenize(open_corpus(file), words, cache).valid.ids.tolist()
    damage(only_folder(cache))
    assert tokenize(open_corpus(file), words, cache).valid.ids.tolist() == ids
    assert tokenize(open_corpus(file), Unused(words), cache).valid.ids.tolist() == ids
    assert len(list(cache.iterdir())) == 1


def test_an_interrupted_call_leaves_nothing_behind(file, cache, words):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenize(open_corpus(file), words, cache, stop)
    assert list(cache.iterdir()) == []


def test_a_text_that_changes_meanwhile_is_an_error(file, cache, words):
    def change(done, total):
        file.write_bytes(TEXT.replace("cat", "dog").encode("utf-8"))

    with pytest.raises(ValueError, match="text changed while it was tokenized: start again"):
        tokenize(open_corpus(file), words, cache, change)
    assert list(cache.iterdir()) == []


def test_an_entry_that_another_call_writes_is_waited_for_and_used(file, cache, words, monkeypatch):
    corpus = open_corpus(file)
    found, heard, waiting = [], [], threading.Event()

    def hear(message, **_):
        heard.append(message)
        waiting.set()

    monkeypatch.setattr(batches.warnings, "warn", hear)
    other = threading.Thread(target=lambda: found.append(tokenize(corpus, words, cache)))

    def start(done, total):
        if not waiting.is_set():
            other.start()
            assert waiting.wait(60)

    tokens = tokenize(corpus, words, cache, start).train
    other.join()
    assert found[0].train.ids.filename == tokens.ids.filename
    assert heard == [f"process {os.getpid()} tokenizes the same text: waiting for it"]
    assert len(list(cache.iterdir())) == 1


# A call that was killed


class Killed(BaseException):
    """Ends a call as SIGKILL does: nothing is tidied up."""


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(corpora, "PIECE", 64)
    monkeypatch.setattr(batches, "BLOCK", 64)
    monkeypatch.setattr(batches, "NOTED_EVERY", 3)


def kill_at(share, monkeypatch):
    """A progress that ends the call when so much is done, and keeps it from removing anything."""

    def progress(done, total):
        if done >= share * total:
            monkeypatch.setattr(batches.shutil, "rmtree", lambda *_, **__: None)
            raise Killed

    return progress


@pytest.mark.parametrize("kind", ["words", "characters", "bpe"])
@pytest.mark.parametrize("share", [0.3, 0.97])
def test_what_a_killed_call_has_written_is_gone_on_with(file, cache, monkeypatch, small_blocks, kind, share):
    corpus, tokenizer = open_corpus(file), Tokenizer.train(kind, ["the cat sat on mat not\n"])
    straight = tokenize(corpus, tokenizer, cache / "straight")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        tokenize(corpus, tokenizer, cache / "killed", kill_at(share, patch))
    (work,) = (cache / "killed").iterdir()
    with (work / "train").open("ab") as torn:
        torn.write(b"rubbish")
    done = []
    resumed = tokenize(corpus, tokenizer, cache / "killed", lambda now, total: done.append(now / total))
    assert done[0] > share - 0.15
    for split in ("train", "valid"):
        one, other = getattr(straight, split), getattr(resumed, split)
        assert one.ids.tolist() == other.ids.tolist()
        assert facts(one) == facts(other)
    assert [path.name for path in (cache / "killed").iterdir()] == [only_folder(cache / "straight").name]
    assert {path.name for path in only_folder(cache / "killed").iterdir()} == {"train", "valid", "manifest.json"}


def facts(tokens):
    return tokens.num_bytes, tokens.num_words, tokens.num_unknown


@pytest.mark.parametrize("damage", ["cut", "foreign", "short"])
def test_what_a_killed_call_has_written_is_not_trusted_where_it_cannot_be(
    file, cache, words, monkeypatch, small_blocks, damage
):
    corpus = open_corpus(file)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        tokenize(corpus, words, cache, kill_at(0.5, patch))
    (work,) = cache.iterdir()
    if damage == "short":
        (work / "train").write_bytes(b"")
    else:
        (work / "journal.json").write_text('{"train": {' if damage == "cut" else '{"train": {"lines": 3}}')
    assert words.decode(tokenize(corpus, words, cache).train.ids[:4]) == "the cat sat on"
    assert len(list(cache.iterdir())) == 1


def test_what_a_killed_call_for_another_text_left_is_removed(file, cache, words, monkeypatch, small_blocks):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        tokenize(open_corpus(file), words, cache, kill_at(0.5, patch))
    (cache / ".tokens-old").mkdir()
    (cache / ".tokens-gone.lock").write_text("12", encoding="ascii")
    file.write_bytes(TEXT.replace("cat", "dog").encode("utf-8"))
    tokenize(open_corpus(file), words, cache)
    assert len(list(cache.iterdir())) == 1


def test_what_a_living_call_for_another_text_writes_is_left_alone(file, cache, words):
    other = cache / ".tokens-other"
    other.mkdir(parents=True)
    lock = Lock(cache / ".tokens-other.lock")
    assert lock.take()
    tokenize(open_corpus(file), words, cache)
    assert other.is_dir()
    lock.give_back()


def test_ctrl_c_keeps_what_is_noted(file, cache, words, small_blocks):
    def stop(done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenize(open_corpus(file), words, cache, stop)
    assert [path.name for path in only_folder(cache).iterdir() if path.suffix] == ["journal.json"]
    first = []
    tokenize(open_corpus(file), words, cache, lambda done, total: first.append(done / total))
    assert first[0] > 0.4


PROGRAM = """
import sys, time
from sightline import batches, corpora
corpora.PIECE, batches.BLOCK, batches.NOTED_EVERY = 1 << 12, 1 << 12, 4
tokenizer = batches.Tokenizer.train("bpe", ["the cat sat on mat not\\n"])

def progress(done, total):
    print(done, flush=True)
    time.sleep(0.002)

batches.tokenize(corpora.open_corpus(sys.argv[1]), tokenizer, sys.argv[2], progress)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_a_call_killed_for_real_is_gone_on_with(tmp_path, cache):
    file = tmp_path / "text.txt"
    file.write_bytes(TEXT.encode("utf-8") * 400)
    command = [sys.executable, "-c", PROGRAM, file, cache]
    began = []
    for kills in range(6):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            began.append(int(process.stdout.readline()))
            for _ in range(3 + 4 * kills):
                process.stdout.readline()
            process.kill()
    assert began == sorted(began) and began[-1] > began[0]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    assert len(list(cache.iterdir())) == 1
    corpus, tokenizer = open_corpus(file), Tokenizer.train("bpe", ["the cat sat on mat not\n"])
    resumed = tokenize(corpus, Unused(tokenizer), cache)
    straight = tokenize(corpus, tokenizer, tmp_path / "straight")
    for split in ("train", "valid"):
        assert getattr(resumed, split).ids.tobytes() == getattr(straight, split).ids.tobytes()
        assert facts(getattr(resumed, split)) == facts(getattr(straight, split))


# All cores


def test_processes_write_what_one_process_writes(file, cache, monkeypatch):
    corpus, tokenizer = open_corpus(file), Tokenizer.train("bpe", ["the cat sat on mat not\n"])
    alone = tokenize(corpus, tokenizer, cache / "alone")
    monkeypatch.setattr(batches, "BLOCK", 100)
    monkeypatch.setattr(batches, "SHARED_FROM", 0)
    monkeypatch.setattr(batches, "cores", lambda: 3)
    shared = tokenize(corpus, tokenizer, cache / "shared")
    for split in ("train", "valid"):
        assert getattr(shared, split).ids.tobytes() == getattr(alone, split).ids.tobytes()
        assert facts(getattr(shared, split)) == facts(getattr(alone, split))


def test_a_full_disk_is_an_error_that_names_the_cache(file, cache, words, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(batches.os, "fsync", full)
    with pytest.raises(ValueError, match=r"cannot write token files into .*cache: No space left on device: choose"):
        tokenize(open_corpus(file), words, cache)
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_an_error(file, words):
    with pytest.raises(ValueError, match=r"cannot write token files into .*text\.txt: .*: choose another folder"):
        tokenize(open_corpus(file), words, file)


def test_a_split_without_a_word_is_an_error(tmp_path, cache, words):
    (tmp_path / "train.txt").write_bytes(TEXT.encode("utf-8"))
    (tmp_path / "valid.txt").write_bytes(b"   ")
    with pytest.raises(ValueError, match="has no words in its valid split: give more text"):
        tokenize(open_corpus(tmp_path), words, cache)


# Batches


@given(
    length=st.integers(2, 60),
    context=st.integers(1, 59),
    size=st.integers(1, 5),
    step=st.integers(0),
    seed=st.integers(0),
)
def test_a_batch_is_windows_of_the_text_and_depends_on_its_arguments_only(length, context, size, step, seed):
    context = min(context, length - 1)
    tokens = tokens_of(range(1000, 1000 + length))
    inputs, targets = batch(tokens, step=step, seed=seed, batch=size, context=context)
    assert inputs.shape == targets.shape == (size, context)
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.is_contiguous() and targets.is_contiguous()
    assert torch.equal(targets, inputs + 1)
    assert torch.equal(inputs, inputs[:, :1] + torch.arange(context))
    assert inputs.min() >= 1000 and targets.max() < 1000 + length
    again = batch(tokens, step=step, seed=seed, batch=size, context=context)
    assert torch.equal(again[0], inputs) and torch.equal(again[1], targets)


def test_steps_and_seeds_draw_different_windows():
    tokens = tokens_of(range(10_000))
    drawn = {
        tuple(batch(tokens, step=step, seed=seed, batch=4, context=8)[0][:, 0].tolist())
        for step in range(5)
        for seed in range(5)
    }
    assert len(drawn) == 25


def test_a_batch_reaches_both_ends_of_the_text_and_nothing_is_left_out():
    tokens = tokens_of(range(20))
    starts = batch(tokens, step=0, seed=0, batch=2000, context=5)[0][:, 0]
    counts = torch.bincount(starts)
    assert len(counts) == 15  # 20 - 5: the last target is the last token
    assert counts.min() > 90 and counts.max() < 180


def test_ids_above_32767_stay_positive():
    tokens = TokenFile(ids=np.asarray([65_535, 40_000, 65_535], dtype="<u2"), num_bytes=0, num_words=0, num_unknown=0)
    assert batch(tokens, step=0, seed=0, batch=1, context=2)[0].tolist() == [[65_535, 40_000]]


@given(length=st.integers(2, 80), context=st.integers(1, 79), size=st.integers(1, 5))
def test_windows_predict_every_token_but_the_first_once_and_in_order(length, context, size):
    context = min(context, length - 1)
    ids = np.random.default_rng(length).integers(0, 65_536, size=length)
    pairs = list(windows(tokens_of(ids), context=context, batch=size))
    assert torch.cat([targets.flatten() for _, targets in pairs]).tolist() == ids[1:].tolist()
    assert torch.cat([inputs.flatten() for inputs, _ in pairs]).tolist() == ids[:-1].tolist()
    for inputs, targets in pairs[:-1]:
        assert inputs.shape == targets.shape
        assert inputs.shape[1] == context and 1 <= inputs.shape[0] <= size
    assert sum(1 for inputs, _ in pairs if inputs.shape[0] != size) <= 2


def test_a_text_shorter_than_a_context_is_an_error():
    tokens = tokens_of(range(5))
    message = r"text has 5 tokens, needs at least context\+1 = 6: lower --context or give more text"
    with pytest.raises(ValueError, match=message):
        batch(tokens, step=0, seed=0, batch=1, context=5)
    with pytest.raises(ValueError, match=message):
        windows(tokens, context=5, batch=1)
    assert batch(tokens, step=0, seed=0, batch=1, context=4)[1].tolist() == [[1, 2, 3, 4]]


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"context": 0}, {"step": -1}, {"seed": -1}])
def test_numbers_out_of_range_are_an_error(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        batch(tokens_of(range(9)), **({"step": 0, "seed": 0, "batch": 1, "context": 2} | wrong))
