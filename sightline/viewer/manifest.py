"""What a viewer must know of captures before it draws: names, sizes, masks, summaries, headings."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from sightline.captures import Capture
from sightline.passages import Passages
from sightline.pyramid import EXACT_LEVEL, Pyramid

SUMMARIES = {
    "entropy": "mean_entropy",
    "sink": "mean_sink",
    "distance": "mean_distance",
    "previous": "previous_token",
    "induction": "induction",
}
"""By what heads are sorted and filtered, and the capture's word for it."""


def named(captures: Capture | Sequence[Capture] | Mapping[str, Capture]) -> dict[str, Capture]:
    """Each capture with a name; one without is called by its model, and numbered where that says too little."""
    if isinstance(captures, Mapping):
        return dict(captures)
    listed = list(captures) if isinstance(captures, Sequence) else [captures]
    if wrong := [type(one).__name__ for one in listed if not isinstance(one, Capture)]:
        raise ValueError(f"expected a Capture, as sl.capture gives one, several, or a dict of them, got {wrong[0]}")
    names = [capture.model for capture in listed]
    if len(set(names)) < len(names):
        names = [f"{number}: {name}" for number, name in enumerate(names, 1)]
    return dict(zip(names, listed, strict=True))


def parse_heads(text: str) -> list[tuple[int, int]]:
    """Heads as people write them, "0.1,2.3" for head 1 of layer 0 and head 3 of layer 2.

    Raises: ValueError for anything else.

    >>> parse_heads("0.1,2.3")
    [(0, 1), (2, 3)]
    """
    if not re.fullmatch(r"[0-9]{1,9}\.[0-9]{1,9}(,[0-9]{1,9}\.[0-9]{1,9})*", text):
        raise ValueError(f"heads are pairs of layer and head such as 0.1,2.3; got {text!r}")
    return [(int(layer), int(head)) for layer, head in (pair.split(".") for pair in text.split(","))]


def manifest(pyramids: Mapping[str, Pyramid], passages: Sequence[Passages]) -> dict[str, Any]:
    """JSON-able facts of all captures; `version` changes with anything that they hold."""
    digest = hashlib.sha256()
    for pyramid in pyramids.values():
        capture = pyramid.capture
        digest.update(repr((capture.ids, capture.layers, capture.heads, capture.scales)).encode("utf-8"))
        digest.update(capture.logsumexp.contiguous().numpy().tobytes())
    pairs = enumerate(zip(pyramids.items(), passages, strict=True))
    said = [_facts(number, name, pyramid, text) for number, ((name, pyramid), text) in pairs]
    return {"version": digest.hexdigest()[:16], "captures": said}


def _facts(number: int, name: str, pyramid: Pyramid, passages: Passages) -> dict[str, Any]:
    capture = pyramid.capture
    lengths = [int(mask.lengths[0]) for mask in capture.masks if mask.lengths is not None]
    rows = [(capture.index(layer), head) for layer, head in capture.heads]
    return {
        "id": number,
        "name": name,
        "model": capture.model,
        "queries": pyramid.queries,
        "keys": pyramid.keys,
        "same": capture.same_text,
        "prompt": capture.prompt,
        "length": min(lengths) if lengths else None,
        "separator": capture.separator,
        "layers": capture.layers,
        "heads": capture.num_heads,
        "pairs": capture.heads,
        "levels": pyramid.levels,
        "map_level": pyramid.map_level,
        "exact_level": EXACT_LEVEL if pyramid.map_level is None else min(EXACT_LEVEL, pyramid.map_level),
        "wall": pyramid.thumbnail_shape,
        "sink_keys": capture.sink_keys,
        "masks": [{"before": mask.before, "after": mask.after} for mask in capture.masks],
        "summaries": {
            word: [float(getattr(capture, attribute)[row]) for row in rows] for word, attribute in SUMMARIES.items()
        },
        "sections": {"titles": passages.titles, "lines": passages.lines},
    }
