import hashlib
import zipfile
from dataclasses import replace

import pytest

from sightline import downloads
from sightline.corpora import open_corpus
from sightline.downloads import download


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """A small archive in the place of the real one; the address is a file's."""
    file = tmp_path / "server" / "wikitext-2-v1.zip"
    file.parent.mkdir()
    with zipfile.ZipFile(file, "w") as members:
        for split in ("train", "valid", "test"):
            members.writestr(f"wikitext-2/wiki.{split}.tokens", f" \n = {split} = \n")
        members.writestr("../outside.txt", "not taken")
    content = file.read_bytes()
    entry = replace(
        downloads.DOWNLOADS["wikitext-2"],
        url=file.as_uri(),
        size=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
    )
    monkeypatch.setitem(downloads.DOWNLOADS, "wikitext-2", entry)
    return file


def test_a_download_is_opened_by_name(tmp_path, archive):
    cache = tmp_path / "cache"
    assert download("wikitext-2", cache) == cache / "wikitext-2"
    archive.unlink()
    assert download("wikitext-2", str(cache)) == cache / "wikitext-2"
    corpus = open_corpus("wikitext-2", cache=cache)
    assert (corpus.name, corpus.skipped) == ("wikitext-2", ())
    assert {split: "".join(corpus.texts(split)) for split in corpus.splits} == {
        split: f" \n = {split} = \n" for split in ("train", "valid", "test")
    }
    assert [entry.name for entry in cache.iterdir()] == ["wikitext-2"]
    assert not (tmp_path / "outside.txt").exists()


@pytest.mark.parametrize("damage", [lambda b: b[:-9], lambda b: b + b"more", lambda b: b"X" + b[1:]])
def test_another_archive_is_refused_and_nothing_is_left(tmp_path, archive, damage):
    archive.write_bytes(damage(archive.read_bytes()))
    with pytest.raises(ValueError, match=r"is not the archive expected: .* bytes with sha256 .* got"):
        download("wikitext-2", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_an_address_that_cannot_be_reached_is_an_error(tmp_path, archive):
    archive.unlink()
    with pytest.raises(ValueError, match=r"could not fetch file:.* try again"):
        download("wikitext-2", tmp_path / "cache")


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path, archive):
    (tmp_path / "file").write_bytes(b"in the way")
    with pytest.raises(ValueError, match=r"cannot write into .*: choose another folder"):
        download("wikitext-2", tmp_path / "file")


def test_an_unknown_download_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="'wikitext-3' cannot be downloaded, expected one of wikitext-2"):
        download("wikitext-3", tmp_path)
