"""A `Capture` as one HTML file that opens from disk, without a server and without a network.

The file holds queries, keys, logsumexp and the pooled maps, never the matrix; the browser recomputes the weights it
shows. What the page does is in `assets/`; this module only puts the parts together. Knows nothing of models.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from sightline.captures import Capture
from sightline.passages import Passages
from sightline.pyramid import FACTOR, Pyramid
from sightline.viewer.manifest import manifest, named

MOST_BYTES = 256 * 1024**2
"""Arrays beyond this make a file that browsers open slowly or not at all."""
EXACT_TOKENS = 4096
"""Longer captures put queries and keys into the file as half floats."""

PARTS = (
    "elements", "sources", "state", "tiles", "colours", "words", "view", "pens", "painting", "axes", "wall", "choice",
    "panel", "search", "exports", "controls", "growing", "link",
)  # fmt: skip
"""What `map.js` is joined of, in this order: one module, so that nothing is exported and imported."""

Captures = Capture | Sequence[Capture] | Mapping[str, Capture]


@overload
def page(capture: Captures, file: None = None) -> str: ...
@overload
def page(capture: Captures, file: str | Path) -> Path: ...
def page(capture: Captures, file: str | Path | None = None) -> str | Path:
    """One self-contained HTML page: all heads as a wall, one head as a map, the text, the weight under the pointer.

    Returns the page, or writes it to `file` and returns its path. Several captures (by name, where they are given as
    a dict) are compared. The same capture gives the same bytes. The fragment of the address holds the view.

    Raises:
        ValueError: more than 256 MiB of arrays, or a file that cannot be written.

    >>> from sightline.inspection import capture
    >>> from sightline.models import Decoder, DecoderConfig
    >>> model = Decoder(DecoderConfig.modern(vocabulary=9, d_model=32, num_layers=1))
    >>> page(capture(model, [3, 1, 4])).startswith("<!doctype html>")
    True
    """
    pyramids = {name: Pyramid(one) for name, one in named(capture).items()}
    _check([pyramid.capture for pyramid in pyramids.values()])
    style, script = asset("map.css"), asset("map.js")
    policy = "; ".join(
        [
            "default-src 'none'",
            f"script-src 'sha256-{_digest(script)}'",
            f"style-src 'sha256-{_digest(style)}'",
            "img-src data: blob:",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    parts = {
        "<!-- policy -->": f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<link rel="stylesheet" href="map.css">': f"<style>{style}</style>",
        '<script type="module" src="map.js"></script>': f'{_data(pyramids)}\n<script type="module">{script}</script>',
    }
    # One pass, so that a text which looks like a place stays a text.
    html = re.sub("|".join(map(re.escape, parts)), lambda found: parts[found[0]], asset("map.html"))
    if file is None:
        return html
    path = Path(file)
    try:
        path.write_text(html, encoding="utf-8", newline="\n")
    except OSError as error:
        raise ValueError(f"page: cannot write {path}: {error.strerror or error}") from error
    return path


def _check(captures: Sequence[Capture]) -> None:
    """Refuse before anything is computed."""
    size = sum(map(_size, captures))
    if size > MOST_BYTES:
        heads = sum(len(capture.heads) for capture in captures)
        fit = max(1, heads * MOST_BYTES // size)
        raise ValueError(
            f"page: {heads} heads take {size / 2**20:.0f} MiB, more than the {MOST_BYTES // 2**20} MiB that browsers "
            f"open well; choose about {fit}, capture.select([(layer, head), ...]), or look with serve(capture)"
        )


def _size(capture: Capture) -> int:
    """About how many bytes of arrays a page of it holds."""
    width, top = capture.queries.shape[-1], capture.top_keys.shape[-1]
    queries, keys = len(capture.query_tokens), len(capture.key_tokens)
    number = 2 if max(queries, keys) > EXACT_TOKENS else 4
    groups = {(layer, capture.group(head)) for layer, head in capture.heads}
    a_head = queries * (number * width + 8 * top + 5 * 4) + 4 * keys + 4 * capture.map_max[0, 0].numel()
    return len(capture.heads) * a_head + len(groups) * number * width * keys


def _data(pyramids: Mapping[str, Pyramid]) -> str:
    """The elements that hold what is shown."""
    passages = [Passages(one.capture.key_tokens, one.capture.separator) for one in pyramids.values()]
    said, elements = manifest(pyramids, passages), []
    arrays: dict[str, dict[str, Any]] = {}
    for number, pyramid in enumerate(pyramids.values()):
        capture = pyramid.capture
        elements.append(_element(f"array-c{number}-keytokens", _json(capture.key_tokens)))
        if not capture.same_text:
            elements.append(_element(f"array-c{number}-querytokens", _json(capture.query_tokens)))
        for name, values in _arrays(pyramid):
            name = f"c{number}-{name}"
            arrays[name] = {"dtype": str(values.dtype), "shape": values.shape}
            text = base64.b64encode(values.astype(values.dtype.newbyteorder("<")).tobytes()).decode("ascii")
            elements.append(_element(f"array-{name}", text))
    said["embedded"] = {"arrays": arrays, "captures": [_numbers(one.capture) for one in pyramids.values()]}
    return "\n".join([f'<script type="application/json" id="manifest">{_json(said)}</script>', *elements])


def _element(name: str, text: str) -> str:
    return f'<script type="text/plain" id="{name}">{text}</script>'


def _numbers(capture: Capture) -> dict[str, Any]:
    """What weights are recomputed with, by captured layer."""
    slopes, lengths = ([getattr(mask, name) for mask in capture.masks] for name in ("slopes", "lengths"))
    return {
        "groups": capture.keys.shape[1],
        "heads": capture.num_heads,
        "scales": capture.scales,
        "softcaps": capture.softcaps,
        "slopes": [None if slope is None else slope.tolist() for slope in slopes],
        "lengths": [None if length is None else int(length[0]) for length in lengths],
    }


def _arrays(pyramid: Pyramid) -> Iterator[tuple[str, np.ndarray]]:
    capture = pyramid.capture
    short = max(pyramid.queries, pyramid.keys) <= EXACT_TOKENS
    number = torch.float32 if short else torch.float16
    yield "wall", _half(pyramid.wall.flatten(0, 1))
    for layer, group in dict.fromkeys((layer, capture.group(head)) for layer, head in capture.heads):
        yield f"l{layer}-g{group}-keys", capture.keys[capture.index(layer), group].to(number).numpy()
    for layer, head in capture.heads:
        at, name = (capture.index(layer), head), f"l{layer}-h{head}"
        yield f"{name}-queries", capture.queries[at].to(number).numpy()
        for fact in ("logsumexp", "entropy", "sink", "distance", "received"):
            yield f"{name}-{fact}", getattr(capture, fact)[at].float().numpy()
        yield f"{name}-top", capture.top_weights[at][:, 0].float().numpy()
        yield f"{name}-topweights", capture.top_weights[at].float().numpy()
        yield f"{name}-topkeys", capture.top_keys[at].int().numpy()
        if pyramid.map_level is not None:
            yield f"{name}-mapmax", _half(pyramid.whole(layer, head, "max", pyramid.map_level))
            yield f"{name}-mapmass", _half(pyramid.whole(layer, head, "sum", pyramid.map_level))
        extra = _extra(capture, layer, head)
        if extra is not None:
            yield f"{name}-extra", extra.numpy()


def _extra(capture: Capture, layer: int, head: int) -> Tensor | None:
    """What a mask says in tensors, as one number to add to each score: (queries or 1, keys or 1)."""
    mask = capture.mask(layer, head)
    if mask.allowed is None and mask.bias is None and mask.segments is None:
        return None
    extra = torch.zeros(1, 1)
    if mask.segments is not None:
        queries, keys = mask.segments[0, capture.shift :], mask.segments[0]
        extra = torch.where(queries[:, None] == keys, 0.0, -torch.inf)
    if mask.bias is not None:
        extra = extra + mask.bias.float().reshape(mask.bias.shape[-2:])
    if mask.allowed is not None:
        extra = torch.where(mask.allowed.reshape(mask.allowed.shape[-2:]), extra, -torch.inf)
    return extra


def _half(values: Tensor) -> np.ndarray:
    return (values * FACTOR).to(torch.float16).numpy()


def _json(value: Any) -> str:
    """JSON in ASCII that no HTML parser can take for markup."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def asset(name: str) -> str:
    """map.html, map.css or map.js as the browser gets it."""
    if name != "map.js":
        return _read(name)
    # Indentation and comments are for those who read the parts; no text in them holds what begins a comment.
    return re.sub(
        r"^(\t*//.*\n|\t+|\n)| // .*", "", "".join(_read(f"map/{part}.js") for part in PARTS), flags=re.MULTILINE
    )


def _read(name: str) -> str:
    """Line ends as browsers read them, for the policy holds a hash of the text."""
    text = resources.files("sightline.viewer").joinpath("assets", *name.split("/")).read_text(encoding="utf-8")
    return text.replace("\r\n", "\n")


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
