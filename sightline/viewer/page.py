"""A `Capture` as one HTML file that opens from disk, without a server and without a network.

The file holds queries, keys and logsumexp, never the matrix; the browser recomputes the weights it shows. What the
page does is in `assets/page.js`; this module only puts the parts together. Knows nothing of models.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sightline.inspection import Capture

MOST_TOKENS = 1024
MOST_BYTES = 256 * 1024**2
"""Arrays beyond this make a file that browsers open slowly or not at all."""
FLOOR = 1e-4
"""Weights below share the lowest colour of the logarithmic scale."""
THUMBNAIL = 64


@overload
def page(capture: Capture, file: None = None) -> str: ...
@overload
def page(capture: Capture, file: str | Path) -> Path: ...
def page(capture: Capture, file: str | Path | None = None) -> str | Path:
    """One self-contained HTML page: all heads as a wall, one head large, the text, and the weight under the pointer.

    Returns the page, or writes it to `file` and returns its path. The same capture gives the same bytes. The
    fragment of the address chooses what is shown first: `attention.html#layer=2&head=1&theme=dark`.

    Raises:
        ValueError: more than 1,024 queries or keys, more than 256 MiB of queries and keys, or a file that cannot
            be written.

    >>> from sightline.inspection import capture
    >>> from sightline.models import Decoder, DecoderConfig
    >>> model = Decoder(DecoderConfig.modern(vocabulary=9, d_model=32, num_layers=1))
    >>> page(capture(model, [3, 1, 4])).startswith("<!doctype html>")
    True
    """
    _check(capture)
    style, script = _asset("page.css"), _asset("page.js")
    parts = {
        "policy": "; ".join(
            [
                "default-src 'none'",
                f"script-src 'sha256-{_digest(script)}'",
                f"style-src 'sha256-{_digest(style)}'",
                "img-src data:",
                "base-uri 'none'",
                "form-action 'none'",
            ]
        ),
        "style": style,
        "script": script,
        "capture": _json(_facts(capture)),
        "arrays": "\n".join(
            f'<script type="text/plain" id="{name}">{base64.b64encode(array.tobytes()).decode("ascii")}</script>'
            for name, array in _arrays(capture)
        ),
    }
    # One pass, so that a text which looks like a placeholder stays a text.
    html = re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _asset("page.html"))
    if file is None:
        return html
    path = Path(file)
    try:
        path.write_text(html, encoding="utf-8", newline="\n")
    except OSError as error:
        raise ValueError(f"page: cannot write {path}: {error.strerror or error}") from error
    return path


def _check(capture: Capture) -> None:
    queries, keys = len(capture.query_tokens), len(capture.key_tokens)
    if max(queries, keys) > MOST_TOKENS:
        raise ValueError(
            f"page: a page shows at most {MOST_TOKENS} tokens, this capture has {max(queries, keys)}; "
            f"capture a slice of the text, capture(model, tokens[:{MOST_TOKENS}])"
        )
    size = 4 * (capture.queries.numel() + capture.keys.numel())
    if size > MOST_BYTES:
        raise ValueError(
            f"page: queries and keys of {len(capture.layers)} layers take {size / 2**20:.0f} MiB, more than the "
            f"{MOST_BYTES // 2**20} MiB that browsers open well; capture fewer, capture(model, text, layers=[0, 1])"
        )


def _facts(capture: Capture) -> dict[str, Any]:
    """All but the large arrays."""
    summaries = {
        "entropy": capture.mean_entropy,
        "sink": capture.mean_sink,
        "distance": capture.mean_distance,
        "previous": capture.previous_token,
    }
    return {
        "model": capture.model,
        "query_tokens": capture.query_tokens,
        "key_tokens": capture.key_tokens,
        "same": capture.same_text,
        "separator": capture.separator,
        "layers": capture.layers,
        "heads": capture.num_heads,
        "groups": capture.keys.shape[1],
        "width": capture.queries.shape[-1],
        "top": capture.top_keys.shape[-1],
        "sink_keys": capture.sink_keys,
        "floor": FLOOR,
        "thumb": _thumbnail_shape(capture),
        "scales": capture.scales,
        "softcaps": capture.softcaps,
        "masks": [_mask(capture, layer) for layer in capture.layers],
        "summaries": {name: _floats(values).flatten().tolist() for name, values in summaries.items()},
    }


def _mask(capture: Capture, layer: int) -> dict[str, Any]:
    mask, extra = capture.masks[capture.index(layer)], _extra(capture, layer)
    return {
        "before": mask.before,
        "after": mask.after,
        "length": None if mask.lengths is None else int(mask.lengths[0]),
        "slopes": None if mask.slopes is None else _floats(mask.slopes).tolist(),
        "extra": 0 if extra is None else len(extra),
    }


def _extra(capture: Capture, layer: int) -> Tensor | None:
    """What a mask says in tensors, as one number to add to each score: (heads or 1, queries, keys)."""
    mask = capture.masks[capture.index(layer)]
    if mask.allowed is None and mask.bias is None:
        return None
    extra = torch.zeros(1, 1, len(capture.query_tokens), len(capture.key_tokens))
    if mask.bias is not None:
        extra = extra + mask.bias.float()
    if mask.allowed is not None:
        extra = torch.where(mask.allowed, extra, -torch.inf)
    return extra[0]


def _arrays(capture: Capture) -> Iterator[tuple[str, np.ndarray]]:
    for row, layer in enumerate(capture.layers):
        yield f"queries-{row}", _floats(capture.queries[row])
        yield f"keys-{row}", _floats(capture.keys[row])
        extra = _extra(capture, layer)
        if extra is not None:
            yield f"extra-{row}", _floats(extra)
    for name in ("logsumexp", "entropy", "distance", "sink", "received"):
        yield name, _floats(getattr(capture, name))
    yield (
        "thumbs",
        np.stack([_thumbnail(capture, layer, h) for layer in capture.layers for h in range(capture.num_heads)]),
    )


def _thumbnail_shape(capture: Capture) -> tuple[int, int]:
    return min(THUMBNAIL, len(capture.query_tokens)), min(THUMBNAIL, len(capture.key_tokens))


def _thumbnail(capture: Capture, layer: int, head: int) -> np.ndarray:
    """The largest weight of each square on the logarithmic scale: 1 for `FLOOR` and below, 255 for 1, 0 for hidden."""
    weights = capture.weights(layer, head).float()
    allowed, bias = capture.mask(layer, head).dense(*weights.shape)
    if bias is not None:
        weights = weights.masked_fill((bias == -torch.inf)[0, 0], -1)
    if allowed is not None:
        weights = weights.masked_fill(~allowed[0, 0] if allowed.ndim == 4 else ~allowed, -1)
    pooled = F.adaptive_max_pool2d(weights[None], _thumbnail_shape(capture))[0]
    share = (1 - pooled.clamp(min=FLOOR).log10() / np.log10(FLOOR)).clamp(0, 1)
    levels = (1 + (254 * share).round()) * (pooled >= 0)
    return levels.to(torch.uint8).numpy()


def _floats(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().numpy().astype("<f4")


def _json(value: Any) -> str:
    """JSON in ASCII that no HTML parser can take for markup."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _asset(name: str) -> str:
    """Line ends as browsers read them, for the policy holds a hash of the text."""
    text = resources.files("sightline.viewer").joinpath("assets", name).read_text(encoding="utf-8")
    return text.replace("\r\n", "\n")


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
