"""Room for the tensors of a capture, in memory or on disk: `save_capture`, `load_capture`.

A saved capture is `capture.json`, `tensors.safetensors` and, where the masks hold tensors, `masks.safetensors`. It is
opened memory-mapped and without the model. Nothing is pickled. Knows nothing of models.
"""

import json
import mmap
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sightline.captures import AXES, Capture
from sightline.files import new_folder, read_json
from sightline.masks import TENSORS, Mask

FORMAT = 1
MEMORY = 512 * 2**20
"""What a capture of more bytes holds is memory-mapped from a temporary file."""

Shapes = Mapping[str, tuple[torch.dtype, Sequence[int]]]

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
}


def _list_of(kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(kind, value))


def _or_none(kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or kind(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _is_mask(value: Any) -> bool:
    return isinstance(value, dict) and all(_or_none(_is_count)(value.get(side, "")) for side in ("before", "after"))


_FIELDS: dict[str, Callable[[Any], bool]] = {
    "model": _is_text,
    "separator": _is_text,
    "same_text": lambda value: isinstance(value, bool),
    "prompt": _or_none(_is_count),
    "query_tokens": _or_none(_list_of(_is_text)),  # None: the keys'
    "key_tokens": _list_of(_is_text),
    "ids": _list_of(_is_count),
    "layers": lambda value: _list_of(_is_count)(value) and value == sorted(set(value)) != [],
    "chosen": _or_none(_list_of(_list_of(_is_count))),
    "scales": _list_of(_is_number),
    "softcaps": _list_of(_or_none(_is_number)),
    "sink_keys": _is_count,
    "map_block": lambda value: _is_count(value) and value > 0,
    "masks": _list_of(_is_mask),
}
"""What capture.json holds beside its format."""


class Store:
    """Room for tensors, all 0: in memory, or in a safetensors file that is mapped into memory."""

    def __init__(self, shapes: Shapes, file: Path | None = None) -> None:
        """Without a file, more than `MEMORY` bytes go to a temporary one, which ends with the last tensor in it."""
        # Wide numbers first, so that all of them stand where their size divides the place.
        shapes = dict(sorted(shapes.items(), key=lambda item: -item[1][0].itemsize))
        self._map: mmap.mmap | None = None
        if file is None and sum(map(_size, shapes.values())) <= MEMORY:
            self.tensors = {name: torch.zeros(tuple(shape), dtype=dtype) for name, (dtype, shape) in shapes.items()}
            return
        head, offsets = _header(shapes)
        with tempfile.TemporaryFile() if file is None else file.open("w+b") as opened:
            opened.truncate(len(head) + offsets[-1])
            self._map = mmap.mmap(opened.fileno(), len(head) + offsets[-1])
        self._map[: len(head)] = head
        self.tensors = {
            name: torch.frombuffer(
                self._map, dtype=dtype, count=torch.Size(shape).numel(), offset=len(head) + start
            ).view(*shape)
            for (name, (dtype, shape)), start in zip(shapes.items(), offsets, strict=False)
        }

    def release(self) -> None:
        """Let the system take back the memory of what was written; it is read again from the file."""
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


def _size(kind: tuple[torch.dtype, Sequence[int]]) -> int:
    return kind[0].itemsize * torch.Size(kind[1]).numel()


def _header(shapes: Shapes) -> tuple[bytes, list[int]]:
    """What stands before the numbers of a safetensors file, and where they begin and end after it."""
    entries, offsets = {}, [0]
    for name, (dtype, shape) in shapes.items():
        offsets.append(offsets[-1] + _size((dtype, shape)))
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": offsets[-2:]}
    text = json.dumps(entries).encode("ascii")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offsets


def save_capture(capture: Capture, folder: str | Path) -> Path:
    """Save a capture as a new folder, whole or not at all, to be looked at later without the model.

    Returns the folder.

    Raises:
        ValueError: the folder holds something already, or cannot be written.

    >>> import tempfile
    >>> from sightline.inspection import capture
    >>> from sightline.models import Decoder, DecoderConfig
    >>> model = Decoder(DecoderConfig.modern(vocabulary=9, d_model=32, num_layers=1))
    >>> seen = capture(model, [3, 1, 4, 1])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     again = load_capture(save_capture(seen, folder + "/seen"))
    >>> again.tokens == seen.tokens
    True
    """
    with new_folder(folder) as temporary:
        tensors = {name: getattr(capture, name) for name in AXES}
        store = Store({name: (t.dtype, t.shape) for name, t in tensors.items()}, temporary / "tensors.safetensors")
        for name, tensor in tensors.items():
            for row, layer in zip(store.tensors[name], tensor, strict=True):
                row.copy_(layer)
            store.release()
        write_description(capture, temporary)
    return Path(folder)


def write_description(capture: Capture, folder: Path) -> None:
    """Write all of a capture but its tensors."""
    said: dict[str, Any] = {"format": FORMAT, "kind": "capture"}
    said |= {name: getattr(capture, name) for name in _FIELDS}
    said["query_tokens"] = None if capture.query_tokens == capture.key_tokens else capture.query_tokens
    said["masks"] = [{"before": mask.before, "after": mask.after} for mask in capture.masks]
    (folder / "capture.json").write_text(json.dumps(said) + "\n", encoding="utf-8", newline="\n")
    tensors = {
        f"{row}.{name}": value.contiguous().clone()
        for row, mask in enumerate(capture.masks)
        for name, value in vars(mask).items()
        if isinstance(value, Tensor)
    }
    if tensors:
        save_file(tensors, folder / "masks.safetensors")


def load_capture(folder: str | Path) -> Capture:
    """Open a capture that `save_capture` or `capture(folder=)` wrote; its tensors are read when they are looked at.

    Raises:
        ValueError: a file is missing, truncated or foreign; the line names the file and what is wrong.

    Example: see `save_capture`.
    """
    folder = Path(folder)
    file = folder / "capture.json"
    if not file.is_file():
        raise ValueError(f"expected the folder of a saved capture, but {folder} holds no capture.json")
    said = read_json(file)
    if (said.get("format"), said.get("kind")) != (FORMAT, "capture"):
        raise ValueError(
            f"expected {file} to say format {FORMAT} and kind 'capture', got {said.get('format')!r} and "
            f"{said.get('kind')!r}: it was written by another program or a newer version"
        )
    for name, is_right in _FIELDS.items():
        if name not in said or not is_right(said[name]):
            raise ValueError(f"expected {file} to hold {name!r} as save_capture writes it; it is damaged: capture anew")
    said = {name: tuple(said[name]) if isinstance(said[name], list) else said[name] for name in _FIELDS}
    if said["query_tokens"] is None:
        said["query_tokens"] = said["key_tokens"]
    if said["chosen"] is not None:
        said["chosen"] = tuple(map(tuple, said["chosen"]))
    tensors = _open(folder / "tensors.safetensors")
    _check(folder, said, tensors)
    own = folder / "masks.safetensors"
    said["masks"] = _masks(own, said, _open(own) if own.exists() else {})
    parts: dict[str, Any] = said | tensors
    return Capture(**parts)


def _open(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped into memory."""
    if not file.is_file():
        raise ValueError(f"expected the file {file}, but it is missing: the capture is not complete")
    try:
        with safe_open(file, framework="pt") as stored:
            return {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise ValueError(f"expected {file} to be a whole safetensors file, but: {error}; capture anew") from error


def _check(folder: Path, said: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Every tensor is there, and all agree on the length of each axis."""
    file = folder / "tensors.safetensors"
    sizes = {"layers": len(said["layers"]), "queries": len(said["query_tokens"]), "keys": len(said["key_tokens"])}
    for side in ("query", "key"):
        sizes[f"{side}_blocks"] = -(-len(said[f"{side}_tokens"]) // said["map_block"])
    for name, axes in AXES.items():
        words = axes.split()
        if name not in tensors or tensors[name].ndim != len(words):
            raise ValueError(f"expected {file} to hold {name} ({axes}); it is damaged: capture anew")
        for axis, size in zip(words, tensors[name].shape, strict=True):
            if sizes.setdefault(axis, size) != size or not size:
                raise ValueError(
                    f"expected {sizes[axis]} {axis} in {name} of {file}, got {size}: its files are of two captures"
                )
    rows = {len(said[name]) for name in ("layers", "scales", "softcaps", "masks")}
    if len(said["ids"]) != sizes["keys"] or len(rows) != 1 or sizes["heads"] % sizes["groups"]:
        raise ValueError(f"expected {folder / 'capture.json'} to describe {file}: its files are of two captures")


def _masks(file: Path, said: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[Mask, ...]:
    masks = [dict(mask) for mask in said["masks"]]
    for name, tensor in tensors.items():
        row, _, part = name.partition(".")
        if not row.isdecimal() or int(row) >= len(masks) or part not in TENSORS:
            raise ValueError(f"expected no tensor {name} in {file}: its files are of two captures")
        masks[int(row)][part] = tensor
    return tuple(Mask(**mask) for mask in masks)
