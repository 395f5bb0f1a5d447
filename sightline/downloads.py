"""Corpora that can be fetched by name, and fetching them: only when asked, the right bytes, whole or not at all.

Knows nothing about what is in the text.
"""

import hashlib
import os
import shutil
import tempfile
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Download:
    """A zip archive in WikiText's layout: what it is, where it is, and how to know that it is the right one."""

    url: str
    size: int
    sha256: str
    licence: str


# Metamind's own address has been closed since 2024; this is the dataset author's, with the same archive.
DOWNLOADS = {
    "wikitext-2": Download(
        url="https://wikitext.smerity.com/wikitext-2-v1.zip",
        size=4_475_746,
        sha256="92675f1d63015c1c8b51f1656a52d5bdbc33aafa60cc47a218a66e7ee817488c",
        licence="CC BY-SA",
    ),
}


def cache_folder() -> Path:
    """Where downloads are kept unless a folder is given: `.cache/sightline` in the user's home."""
    return Path.home() / ".cache" / "sightline"


def download(name: str, folder: str | Path) -> Path:
    """Fetch a corpus by name into `folder / name`, unless it is there; the whole of it or nothing.

    Raises ValueError for an unknown name, an address that cannot be reached, an archive that is not the one
    expected (size, sha256), a folder that cannot be written.
    """
    if name not in DOWNLOADS:
        raise ValueError(f"{name!r} cannot be downloaded, expected one of {', '.join(DOWNLOADS)}")
    target = Path(folder) / name
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=target.parent))
    except OSError as error:
        raise ValueError(f"cannot write into {folder}: {error.strerror}: choose another folder") from None
    try:
        _fetch(DOWNLOADS[name], work / "archive.zip")
        _unpack(work / "archive.zip", work / name)
        (work / name).rename(target)
    finally:
        shutil.rmtree(work)
    return target


def _fetch(wanted: Download, file: Path) -> None:
    digest, size = hashlib.sha256(), 0
    # The host turns away urllib's own name for itself.
    request = urllib.request.Request(wanted.url, headers={"User-Agent": "Mozilla/5.0 (compatible; sightline)"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response, file.open("wb") as copy:
            while size <= wanted.size and (chunk := response.read(1 << 16)):
                copy.write(chunk)
                digest.update(chunk)
                size += len(chunk)
    except OSError as error:
        raise ValueError(f"could not fetch {wanted.url} ({error}): try again, or get the text elsewhere") from error
    if (size, digest.hexdigest()) != (wanted.size, wanted.sha256):
        raise ValueError(
            f"{wanted.url} is not the archive expected: {wanted.size} bytes with sha256 {wanted.sha256}, "
            f"got {size} with {digest.hexdigest()}: try again"
        )


def _unpack(archive: Path, folder: Path) -> None:
    """Take the three texts, and nothing that an archive could name besides."""
    folder.mkdir()
    with zipfile.ZipFile(archive) as members:
        for split in ("train", "valid", "test"):
            file = folder / f"wiki.{split}.tokens"
            with members.open(f"wikitext-2/{file.name}") as text, file.open("wb") as copy:
                shutil.copyfileobj(text, copy)
                copy.flush()
                os.fsync(copy.fileno())
