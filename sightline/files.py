"""Files and folders that are written whole or not at all, and read back with one line about what is wrong.

JSON, safetensors, and a manifest with the sha256 of a folder's files. Knows nothing of what they hold.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

TEMPORARY = ".writing-"
MANIFEST = "manifest.json"


# --- Writing -----------------------------------------------------------------------------------------


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """Gives a temporary folder to fill, which takes the name `folder` only when it is complete and on disk.

    Leaves nothing behind when the block fails or is interrupted.

    Raises:
        ValueError: the disk is full or the folder cannot be written.
    """
    temporary = folder.with_name(TEMPORARY + folder.name)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.iterdir():
            # safetensors makes files that only their owner may read; a checkpoint follows the umask.
            file.chmod(temporary.stat().st_mode & 0o666)
            sync(file)
        sync(temporary)
        temporary.replace(folder)
        sync(folder.parent)
    except (OSError, SafetensorError) as error:
        # safetensors reports a full disk as its own error.
        raise ValueError(
            f"expected to write {folder}, but: {error}; free some space or choose another folder "
            "(what was saved there before is untouched)"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_text(file: Path, text: str) -> None:
    """Replaces a text file by rename: a reader sees the old text or the new one, never a part."""
    replace_bytes(file, text.encode())


def replace_bytes(file: Path, content: bytes) -> None:
    """Replaces a file by rename: a reader sees what it held or what it holds now, never a part."""
    temporary = file.with_name(TEMPORARY + file.name)
    try:
        temporary.write_bytes(content)
        sync(temporary)
        temporary.replace(file)
        sync(file.parent)
    except OSError as error:
        with suppress(OSError):  # a read-only disk refuses this even where there is nothing to remove
            temporary.unlink(missing_ok=True)
        raise ValueError(f"expected to write {file}, but: {error}; free some space or choose another folder") from error


def write_json(file: Path, data: Mapping[str, Any]) -> None:
    """Writes a mapping as indented JSON."""
    file.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8", newline="\n")


def sync(path: Path) -> None:
    """Waits until a file or a folder's entries are on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders, and keeps their entries itself.
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """A temporary folder to fill, which takes the name of a new or empty one when it is complete."""
    folder = Path(folder)
    if folder.exists():
        if not folder.is_dir() or any(folder.iterdir()):
            raise ValueError(f"expected a new or empty folder, but {folder} holds something: choose another")
        folder.rmdir()
    with whole(folder) as temporary:
        yield temporary


def write_manifest(folder: Path) -> None:
    """Writes the sha256 of every file of a folder, which `check_whole` compares."""
    files = {file.name: sha256(file) for file in sorted(folder.iterdir()) if file.name != MANIFEST}
    write_json(folder / MANIFEST, {"files": files})


# --- Reading -----------------------------------------------------------------------------------------


def check_whole(folder: Path) -> None:
    """Compares every file of a checkpoint with its manifest.

    Raises:
        ValueError: a file is missing, or has changed since it was written.
    """
    manifest = folder / MANIFEST
    files = read_json(manifest).get("files")
    if not isinstance(files, dict):
        raise ValueError(f"expected {manifest} to hold the sha256 of files, got {files!r}: it is damaged")
    for name, expected in files.items():
        expect_file(folder / name)
        found = sha256(folder / name)
        if found != expected:
            raise ValueError(
                f"{folder / name} is damaged: expected the sha256 {str(expected)[:12]}... of {MANIFEST}, got "
                f"{found[:12]}..."
            )


def is_whole(folder: Path) -> bool:
    """Whether every file of a checkpoint is as it was written."""
    try:
        check_whole(folder)
    except ValueError:
        return False
    return True


def sha256(file: Path) -> str:
    """Of the bytes of a file."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Reads a safetensors file into memory that does not lean on the file."""
    with open_tensors(file) as stored:
        return {name: stored.get_tensor(name).clone() for name in stored.keys()}  # noqa: SIM118 (not a mapping)


@contextmanager
def open_tensors(file: Path) -> Iterator[Any]:
    """A safetensors file, open; a ValueError where it is damaged."""
    expect_file(file)
    try:
        with safe_open(file, framework="pt") as stored:
            yield stored
    except SafetensorError as error:
        raise ValueError(
            f"expected {file} to be a whole safetensors file, but: {error}; "
            f"it holds {file.stat().st_size:,} bytes and was cut short or is of another format: copy it again"
        ) from error


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON object."""
    expect_file(file)
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # both JSONDecodeError and UnicodeDecodeError
        raise ValueError(f"expected {file} to be JSON, but: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"expected {file} to hold a JSON object, but it holds a {type(data).__name__}")
    return data


def expect_file(file: Path) -> None:
    """Raises: ValueError where it is missing."""
    if not file.is_file():
        raise ValueError(f"expected the file {file}, but it is missing: the checkpoint is not complete")
