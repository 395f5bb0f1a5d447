"""A `Capture` in the forms that other libraries take: numpy, pandas, xarray, BertViz and CircuitsVis.

Every captured head, also those that `Capture.select` hides. Knows nothing of models and pages.
"""

from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from sightline.captures import AXES, Capture
from sightline.memory import shown
from sightline.observation import LIMIT_BYTES

if TYPE_CHECKING:
    import pandas

Rows = Literal["queries", "keys", "top"]


def to_numpy(capture: Capture) -> dict[str, np.ndarray]:
    """Every tensor of a capture by its name; half precision becomes float32. Memory is shared where it can be.

    The axes of each are `sightline.captures.AXES`.

    >>> from sightline.inspection import capture
    >>> from sightline.models import Decoder, DecoderConfig
    >>> seen = capture(Decoder(DecoderConfig.modern(vocabulary=9, d_model=32, num_layers=2)), [3, 1, 4])
    >>> to_numpy(seen)["entropy"].shape
    (2, 4, 3)
    """
    return {name: _numpy(getattr(capture, name)) for name in AXES}


def to_named(capture: Capture) -> dict[str, Any]:
    """The tensors with named axes and their coordinates, as xarray takes them: `xarray.Dataset.from_dict(...)`.

    Coordinates are the layers' numbers, heads, positions of queries and keys among the keys, and their tokens.

    >>> from sightline.inspection import capture
    >>> from sightline.models import Decoder, DecoderConfig
    >>> seen = capture(Decoder(DecoderConfig.modern(vocabulary=9, d_model=32, num_layers=2)), [3, 1, 4], layers=[1])
    >>> named = to_named(seen)
    >>> named["data_vars"]["received"]["dims"], named["coords"]["layers"]["data"].tolist()
    (('layers', 'heads', 'keys'), [1])
    """
    # Queries and keys are names of tensors here, and there an axis may not be called as a variable of other axes.
    called = {"queries": "query_vectors", "keys": "key_vectors"}
    keys = len(capture.key_tokens)
    coordinates = {
        "layers": ("layers", np.asarray(capture.layers)),
        "heads": ("heads", np.arange(capture.num_heads)),
        "queries": ("queries", np.arange(capture.shift, keys)),
        "keys": ("keys", np.arange(keys)),
        "query_token": ("queries", np.asarray(capture.query_tokens, dtype=object)),
        "key_token": ("keys", np.asarray(capture.key_tokens, dtype=object)),
    }
    return {
        "coords": {name: {"dims": (axis,), "data": data} for name, (axis, data) in coordinates.items()},
        "data_vars": {
            called.get(name, name): {"dims": tuple(AXES[name].split()), "data": array}
            for name, array in to_numpy(capture).items()
        },
        "attrs": {"model": capture.model, "sink_keys": capture.sink_keys, "map_block": capture.map_block},
    }


def to_pandas(capture: Capture, rows: Rows = "queries") -> "pandas.DataFrame":
    """A long table: one row for each layer, head and query; or key, with what it received; or each of the top weights.

    Positions count among the keys.

    Raises: ValueError without pandas, or for other rows.

    >>> from sightline.inspection import capture
    >>> from sightline.models import Decoder, DecoderConfig
    >>> seen = capture(Decoder(DecoderConfig.modern(vocabulary=9, d_model=32, num_layers=2)), [3, 1, 4])
    >>> table = to_pandas(seen)  # doctest: +SKIP
    >>> table.groupby(["layer", "head"])["entropy"].mean()  # doctest: +SKIP
    """
    if rows not in get_args(Rows):
        raise ValueError(f"to_pandas: rows must be one of {', '.join(get_args(Rows))}, got {rows!r}")
    try:
        import pandas
    except ImportError:
        raise ValueError("to_pandas needs pandas, which is not installed: pip install pandas") from None
    keys = len(capture.key_tokens)
    if rows == "keys":
        index = _index(capture, key=np.arange(keys))
        tokens = np.asarray(capture.key_tokens, dtype=object)[index["key"]]
        return pandas.DataFrame(index | {"token": tokens, "received": _numpy(capture.received).ravel()})
    queries = np.arange(capture.shift, keys)
    if rows == "queries":
        index = _index(capture, query=queries)
        tokens = np.asarray(capture.query_tokens, dtype=object)[index["query"] - capture.shift]
        facts = ("entropy", "distance", "sink", "logsumexp")
        return pandas.DataFrame(
            index | {"token": tokens} | {fact: _numpy(getattr(capture, fact)).ravel() for fact in facts}
        )
    index = _index(capture, query=queries, rank=np.arange(capture.top_keys.shape[-1]))
    found = _numpy(capture.top_keys).ravel()
    there = found >= 0  # a query that sees fewer keys has fewer
    index = {name: column[there] for name, column in index.items()}
    tokens = {
        "token": np.asarray(capture.query_tokens, dtype=object)[index["query"] - capture.shift],
        "key": found[there],
        "key_token": np.asarray(capture.key_tokens, dtype=object)[found[there]],
    }
    return pandas.DataFrame(index | tokens | {"weight": _numpy(capture.top_weights).ravel()[there]})


def to_matrices(capture: Capture, *, limit_bytes: int = LIMIT_BYTES) -> tuple[Tensor, ...]:
    """The whole weights, layer by layer, (1 heads queries keys) each: what these tools take, and why they stop early.

    For BertViz `head_view(to_matrices(seen), list(seen.tokens))`; for CircuitsVis
    `attention_patterns(list(seen.tokens), to_matrices(seen)[layer][0])`.

    Raises: ValueError for more than `limit_bytes`; the message gives the size.

    >>> from sightline.inspection import capture
    >>> from sightline.models import Decoder, DecoderConfig
    >>> seen = capture(Decoder(DecoderConfig.modern(vocabulary=9, d_model=32, num_layers=2)), [3, 1, 4])
    >>> [tuple(matrix.shape) for matrix in to_matrices(seen)]
    [(1, 4, 3, 3), (1, 4, 3, 3)]
    """
    layers, heads = len(capture.layers), capture.num_heads
    queries, keys = len(capture.query_tokens), len(capture.key_tokens)
    size = 4 * layers * heads * queries * keys
    if size > limit_bytes:
        raise ValueError(
            f"to_matrices: {layers} layers x {heads} heads x {queries} x {keys} weights take {shown(size)}, "
            f"more than the {shown(limit_bytes)} of limit_bytes; capture fewer layers or a shorter text, "
            "take windows of capture.weights, or look at all of it with serve(capture)"
        )
    return tuple(
        torch.stack([capture.weights(layer, head, limit_bytes=limit_bytes) for head in range(heads)])[None]
        for layer in capture.layers
    )


def _index(capture: Capture, **axes: np.ndarray) -> dict[str, np.ndarray]:
    """The columns that say what a row is of, in the order of a tensor's numbers."""
    named = {"layer": np.asarray(capture.layers), "head": np.arange(capture.num_heads)} | axes
    grid = np.meshgrid(*named.values(), indexing="ij")
    return {name: column.ravel() for name, column in zip(named, grid, strict=True)}


def _numpy(tensor: Tensor) -> np.ndarray:
    half = tensor.dtype in (torch.bfloat16, torch.float16)
    return (tensor.float() if half else tensor).numpy()
