import codecs
import hashlib
import io
import os
import sys
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sightline import corpora
from sightline.corpora import open_corpus
from sightline.tokenizers import Kind, Tokenizer


def write(file: Path, content: str | bytes) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return file


def read(corpus, split):
    return "".join(corpus.texts(split))


def error_of(source, **options):
    with pytest.raises(ValueError) as error:
        open_corpus(source, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(corpora, "PIECE", 7)


# One text


def test_a_file_is_cut_at_nine_tenths_of_its_bytes(tmp_path):
    text = "".join(f"line {i}\n" for i in range(99)) + "end"
    corpus = open_corpus(write(tmp_path / "notes.txt", text))
    cut = int(len(text) * 0.9)  # nanoGPT's
    assert (corpus.name, corpus.splits, corpus.errors, corpus.skipped) == ("notes", ("train", "valid"), "strict", ())
    assert read(corpus, "train") == text[:cut]
    assert read(corpus, "valid") == text[cut:]
    assert (corpus.size("train"), corpus.size("valid")) == (cut, len(text) - cut)


@given(text=st.text(min_size=40, alphabet=st.characters(blacklist_characters="\x00", blacklist_categories=["Cs"])))
def test_the_cut_is_between_characters(tmp_path_factory, text):
    corpus = open_corpus(write(tmp_path_factory.mktemp("text") / "a.txt", text))
    whole = text.removeprefix("\ufeff")
    assert read(corpus, "train") + read(corpus, "valid") == whole
    size = len(whole.encode("utf-8"))
    assert size * 0.9 - 4 <= corpus.size("train") <= size * 0.9


def test_a_text_can_be_read_again_and_side_by_side(tmp_path):
    corpus = open_corpus(write(tmp_path / "a.txt", "one two three four\n" * 10))
    first, second = zip(*zip(corpus.texts("train"), corpus.texts("train"), strict=True), strict=True)
    assert "".join(first) == "".join(second) == read(corpus, "train")


def test_line_ends_are_kept(tmp_path, small_pieces):
    text = "a\r\nb\rc\n\r\n\n" * 20
    corpus = open_corpus(write(tmp_path / "a.txt", text))
    assert read(corpus, "train") + read(corpus, "valid") == text


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    plain = open_corpus(write(tmp_path / "plain.txt", "caf\u00e9 " * 20))
    marked = open_corpus(write(tmp_path / "marked.txt", codecs.BOM_UTF8 + ("caf\u00e9 " * 20).encode()))
    for split in plain.splits:
        assert read(marked, split) == read(plain, split)
        assert marked.hash(split) == plain.hash(split)


def test_the_hash_is_that_of_the_bytes_and_of_nothing_else(tmp_path):
    one = open_corpus(write(tmp_path / "one.txt", "the same text\n" * 9))
    two = open_corpus(write(tmp_path / "two.txt", "the same text\n" * 9))
    assert one.hash("train") == two.hash("train") == hashlib.sha256(read(one, "train").encode()).hexdigest()
    write(tmp_path / "two.txt", "the same taxt\n" * 9)
    assert two.hash("train") != one.hash("train")


@given(
    words=st.lists(
        st.tuples(
            st.sampled_from(["the", "cat", "'s", "12", "\u00fc\u4e2d."]),
            st.sampled_from([" ", "\n", "\n\n  ", "\r\n  ", "\n\t\x1c"]),
        )
    ),
    piece=st.integers(8, 20),
)
def test_pieces_have_the_tokens_of_the_whole(words, piece):
    text = "".join(word + space for word, space in words)
    pieces = list(corpora._pieces(text[i : i + piece] for i in range(0, len(text), piece)))
    assert "".join(pieces) == text
    for kind in ("words", "characters", "bpe"):
        tokenizer = trained(kind)
        assert [i for part in pieces for i in tokenizer.encode(part)] == tokenizer.encode(text)


@cache
def trained(kind: Kind) -> Tokenizer:
    return Tokenizer.train(kind, ["the cat's \n\n  12\n\n  the cat \r\n  \n\u00fcber\n" * 9])


def test_pieces_are_short_even_without_white_space(tmp_path, small_pieces):
    corpus = open_corpus(write(tmp_path / "a.txt", "\u4e2d" * 100))
    assert max(map(len, corpus.texts("train"))) <= 14
    corpus = open_corpus(write(tmp_path / "b.txt", "one two three four\n" * 10))
    assert max(map(len, corpus.texts("train"))) <= 14


def test_a_split_that_is_not_there_is_an_error(tmp_path):
    corpus = open_corpus(write(tmp_path / "a.txt", "text " * 10))
    for method in (corpus.texts, corpus.hash, corpus.size):
        with pytest.raises(ValueError, match="a has the splits train, valid, not 'test'"):
            method("test")


def test_a_file_that_has_shrunk_is_an_error(tmp_path):
    corpus = open_corpus(write(tmp_path / "a.txt", "text " * 10))
    write(tmp_path / "a.txt", "text ")
    with pytest.raises(ValueError, match=r"a\.txt has lost its last 40 bytes since it was opened"):
        read(corpus, "train")


# Bad bytes


def test_an_empty_name_is_not_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("some words " * 99, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"the source is empty, .*: \. is this folder"):
        open_corpus("")


def test_a_missing_file_names_the_nearest(tmp_path):
    write(tmp_path / "tinyshakespeare.txt", "text")
    assert error_of(tmp_path / "tinyshakespear.txt").endswith(f"did you mean {tmp_path / 'tinyshakespeare.txt'}?")
    assert "give a file, a folder, - for standard input" in error_of(tmp_path / "q")
    assert error_of(tmp_path / "no" / "a.txt").endswith(f"there is no folder {tmp_path / 'no'} either")


def test_a_misspelt_name_names_the_corpus(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert error_of("embeded").endswith("did you mean embedded?")
    assert error_of("wikitext2").endswith("did you mean wikitext-2?")


@pytest.mark.parametrize("content", [b"", codecs.BOM_UTF8])
def test_an_empty_file_is_an_error(tmp_path, content):
    file = write(tmp_path / "a.txt", content)
    assert error_of(file) == f"{file} is empty, expected text: give a file that has some"


def test_a_binary_file_is_an_error_that_says_where(tmp_path, small_pieces):
    file = write(tmp_path / "a.bin", b"some text and\x00more")
    assert error_of(file) == f"{file} is binary, not text: NUL byte at offset 13"
    assert error_of(file, errors="replace") == error_of(file)


def test_utf_16_is_named(tmp_path):
    for encoding in ("utf-16", "utf-16-be"):
        mark = codecs.BOM_UTF16_BE if encoding == "utf-16-be" else b""
        file = write(tmp_path / "a.txt", mark + "some text".encode(encoding))
        assert "it looks like UTF-16: convert it to UTF-8" in error_of(file)


@pytest.mark.parametrize(
    ("before", "bad", "after"),
    [
        (b"one\ntwo\ncaf", b"\xe9", b" au lait\n" * 9),
        (b"", b"\xff", b"abc"),
        ("\u4e2d\n".encode() * 5, b"\xe4", b"x"),
        (b"one\n" * 5, b"\xe4\xb8", b""),
    ],
)
def test_bytes_that_are_not_utf_8_are_an_error_that_says_where(tmp_path, small_pieces, before, bad, after):
    file = write(tmp_path / "a.txt", before + bad + after)
    message = error_of(file)
    line = 1 + before.count(b"\n")
    assert f"{file} is not UTF-8: byte 0x{bad[0]:02x} at offset {len(before)} (line {line})" in message
    assert '--errors replace (errors="replace")' in message


def test_bytes_that_are_not_utf_8_can_be_replaced(tmp_path):
    corpus = open_corpus(write(tmp_path / "a.txt", b"caf\xe9 au lait\n" * 10), errors="replace")
    assert read(corpus, "train").startswith("caf\ufffd au lait\n")
    with pytest.raises(ValueError, match="errors must be 'strict' or 'replace', got 'ignore'"):
        open_corpus(tmp_path / "a.txt", errors="ignore")


@pytest.mark.parametrize("content", ["a", "\U0001f600"])
def test_a_text_too_short_to_cut_is_an_error(tmp_path, content):
    size = len(content.encode())
    assert f"a has {size} bytes, too few to cut into train and valid" in error_of(write(tmp_path / "a.txt", content))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_an_error(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "is neither a file nor a folder" in error_of(tmp_path / "pipe")


# Folders


def test_a_folder_with_splits_is_taken_as_it_is(tmp_path):
    for name in ("train.txt", "valid.txt", "test.txt"):
        write(tmp_path / "data" / name, f"text of {name}")
    corpus = open_corpus(tmp_path / "data")
    assert (corpus.name, corpus.splits, corpus.skipped) == ("data", ("train", "valid", "test"), ())
    assert [read(corpus, split) for split in corpus.splits] == [
        "text of train.txt",
        "text of valid.txt",
        "text of test.txt",
    ]


@pytest.mark.parametrize(
    "names",
    [
        ("train.md", "valid.md"),
        ("train", "valid"),
        ("wiki.train.tokens", "wiki.valid.tokens"),
        ("Train.TXT", "validation.txt"),
        ("train.txt", "val.txt"),
        ("train/a.txt", "dev/b.txt"),
    ],
)
def test_names_of_splits(tmp_path, names):
    for name in names:
        write(tmp_path / name, f"text of {name}")
    corpus = open_corpus(str(tmp_path))
    assert corpus.splits == ("train", "valid")
    assert [read(corpus, split) for split in corpus.splits] == [f"text of {name}" for name in names]


def test_without_valid_train_is_cut_and_test_kept(tmp_path):
    write(tmp_path / "train.txt", "0123456789")
    write(tmp_path / "test.txt", "test")
    write(tmp_path / "README.md", "read me")
    corpus = open_corpus(tmp_path)
    assert {split: read(corpus, split) for split in corpus.splits} == {
        "train": "012345678",
        "valid": "9",
        "test": "test",
    }
    assert corpus.skipped == ("README.md is not train, valid or test",)
    assert corpus.left_out == f"{corpus.name}: 1 left out: README.md is not train, valid or test"


def test_two_texts_for_a_split_are_an_error(tmp_path):
    for name in ("train.md", "train.txt"):
        write(tmp_path / name, "text")
    assert error_of(tmp_path).endswith("has two texts for train, train.md and train.txt: keep one")


def test_a_bad_split_is_an_error_and_not_left_out(tmp_path):
    write(tmp_path / "train.txt", "text")
    write(tmp_path / "valid.txt", "")
    assert "valid.txt is empty" in error_of(tmp_path)


def test_a_folder_of_files_is_one_text(tmp_path):
    files = {"b.txt": "of b", "a.py": "of a\n", "c/d.rst": "of d\n", "c/e": "of e", "f.md": codecs.BOM_UTF8 + b"of f"}
    for name, content in files.items():
        write(tmp_path / name, content)
    corpus = open_corpus(tmp_path)
    text = "of a\nof b\nof f\nof d\nof e"
    assert read(corpus, "train") + read(corpus, "valid") == text
    assert corpus.size("train") == len(text) * 9 // 10
    assert corpus.skipped == ()


def test_what_a_folder_leaves_out_is_reported(tmp_path):
    for name in ("a.txt", ".hidden", ".git/config", "c/.d", "c/e.txt"):
        write(tmp_path / name, "some text ")
    write(tmp_path / "b.png", b"\x89PNG\x00")
    write(tmp_path / "c/empty.txt", "")
    write(tmp_path / "latin.txt", b"caf\xe9")
    corpus = open_corpus(tmp_path)
    assert read(corpus, "train") + read(corpus, "valid") == "some text \nsome text "
    assert sorted(line.partition(",")[0].partition(":")[0] for line in corpus.skipped) == [
        ".git is hidden",
        ".hidden is hidden",
        "b.png is binary",
        "c/.d is hidden",
        "c/empty.txt is empty",
        "latin.txt is not UTF-8",
    ]
    replaced = open_corpus(tmp_path, errors="replace")
    assert "caf\ufffd" in read(replaced, "train") + read(replaced, "valid")


def test_links_that_lead_nowhere_or_to_folders_are_reported(tmp_path):
    write(tmp_path / "texts" / "a.txt", "some text")
    try:
        (tmp_path / "texts" / "loop").symlink_to(tmp_path, target_is_directory=True)
        (tmp_path / "texts" / "gone").symlink_to(tmp_path / "nowhere")
    except OSError:
        pytest.skip("links are not allowed here")
    corpus = open_corpus(tmp_path / "texts")
    assert corpus.skipped == ("loop is a link to a folder", "gone is not a regular file")


def test_a_folder_without_text_is_an_error(tmp_path):
    assert error_of(tmp_path) == f"folder {tmp_path} has no text, it is empty: give one that has text files"
    write(tmp_path / "a.png", b"\x00")
    assert "has no text: 1 left out, a.png is binary, not text: NUL byte at offset 0" in error_of(tmp_path)


# By name


def test_the_embedded_corpus_is_real_text_and_always_the_same():
    corpus = open_corpus("embedded")
    assert (corpus.name, corpus.splits) == ("embedded", ("train", "valid"))
    assert corpus.size("train") + corpus.size("valid") > 300_000
    assert corpus.hash("train") == open_corpus("embedded").hash("train")
    assert "statement" in next(corpus.texts("train"))


def test_without_its_module_the_embedded_corpus_is_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert "this Python lacks the embedded corpus" in error_of("embedded")


def test_a_path_is_never_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "embedded", "a file of that name")
    for source in (Path("embedded"), "./embedded"):
        corpus = open_corpus(source)
        assert read(corpus, "train") + read(corpus, "valid") == "a file of that name"


def test_standard_input_can_be_read_again(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"one\r\ntwo caf\xc3\xa9\n" * 10)))
    corpus = open_corpus("-")
    assert corpus.name == "standard input"
    for _ in range(2):
        assert read(corpus, "train") + read(corpus, "valid") == "one\r\ntwo caf\u00e9\n" * 10


def test_standard_input_without_text_is_an_error(monkeypatch):
    class Terminal(io.TextIOWrapper):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdin", Terminal(io.BytesIO()))
    assert error_of("-").startswith("standard input is a terminal")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    assert error_of("-").startswith("standard input is empty")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9")))
    assert error_of("-").startswith("standard input is not UTF-8: byte 0xe9 at offset 3 (line 1)")


def test_a_corpus_by_name_is_not_fetched_unasked(tmp_path):
    message = error_of("wikitext-2", cache=tmp_path)
    for part in ("https://wikitext.smerity.com/", "4.5 MB", "CC BY-SA", "--download", "download('wikitext-2', folder)"):
        assert part in message
    assert list(tmp_path.iterdir()) == []


def test_the_cache_is_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert f"wikitext-2 is not in {tmp_path / '.cache' / 'sightline'}" in error_of("wikitext-2")
