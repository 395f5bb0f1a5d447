"""Heat maps of attention weights and of positional encodings, as matplotlib figures.

Uses matplotlib's objects alone: no pyplot, no window, no setting of matplotlib is changed. A notebook shows a figure
that is the last value of a cell; `figure.savefig("weights.pdf")` saves it. Knows nothing of models.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from sightline.captures import Capture
from sightline.masks import Mask
from sightline.positions import Learned, Sinusoidal

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from sightline.figures import Figure

Scale = Literal["linear", "log"]

MOST_LABELS = 48
"""Tokens stand along an axis up to so many; beyond, positions do."""
LONGEST_LABEL = 16
MOST_EXACT = 1024
INCHES = 4.8


def plot_weights(
    weights: Tensor | np.ndarray | Capture,
    *,
    layer: int | None = None,
    head: int | None = None,
    sequence: int | None = None,
    tokens: Sequence[str] | None = None,
    query_tokens: Sequence[str] | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    mask: Mask | None = None,
    scale: Scale = "linear",
    title: str | None = None,
) -> "Figure":
    """A heat map of one head and one sequence: queries down, keys across.

    `weights` is a `Capture`, with `layer=` and `head=`; or an array (queries keys), (batch queries keys) with
    `sequence=`, or (batch heads queries keys) with `sequence=` and `head=`; an index may be left out where there
    is only one. Keys that a query may not attend to are left empty: those that the mask hides, or, for a tensor
    without `mask=`, those of weight 0. `tokens` names the keys, and the queries where those are the same or the
    newest of them; `query_tokens` names other queries. `lengths` (batch) cuts padding off: keys from there on,
    and in a square the queries too. `scale="log"` shows weights of very different size, down to 1e-4.

    Raises:
        ValueError: an index that is missing or out of range, tokens or lengths of the wrong number, an argument
            that a Capture already answers.

    >>> from sightline.attention import observe
    >>> from sightline.masks import Causal
    >>> x = torch.eye(3)[None]
    >>> figure = plot_weights(observe(x, x, x, Causal()).weights(), tokens=["the", "cat", "sat"])
    >>> [axes.get_ylabel() for axes in figure.axes]
    ['query', 'weight']
    """
    if scale not in get_args(Scale):
        raise ValueError(f"plot_weights: scale must be one of {', '.join(get_args(Scale))}, got {scale!r}")
    if isinstance(weights, Capture):
        given = {"tokens": tokens, "query_tokens": query_tokens, "lengths": lengths, "mask": mask, "sequence": sequence}
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"plot_weights: a Capture has its own {name}; drop {name}=")
        picture = _of_capture(weights, layer, head)
    else:
        if layer is not None:
            raise ValueError(f"plot_weights: layer={layer} is for a Capture; a tensor holds one layer")
        picture = _of_tensor(_tensor(weights), sequence, head, mask)
        picture = _named(picture, tokens, query_tokens)
        picture = _without_padding(picture, lengths, 0 if sequence is None else sequence)
    return _draw(picture, scale, picture.title if title is None else title)


def plot_heads(capture: Capture, *, title: str | None = None) -> "Figure":
    """All heads of all layers as small heat maps of one logarithmic colour scale: layers down, heads across.

    Weights themselves for up to 1,024 queries and keys; beyond, the largest weight of each square of the map.

    >>> from sightline.inspection import capture
    >>> from sightline.models import Decoder, DecoderConfig
    >>> model = Decoder(DecoderConfig.modern(vocabulary=9, d_model=32, num_layers=2))
    >>> len(plot_heads(capture(model, [3, 1, 4, 1, 5])).axes)  # eight heads and the colour bar
    9
    """
    from matplotlib.colors import LogNorm

    from sightline.figures import Figure

    if not isinstance(capture, Capture):
        raise ValueError(f"plot_heads: expected a Capture, as sl.capture gives one, got {type(capture).__name__}")
    layers, heads, exact = len(capture.layers), capture.num_heads, max(capture.queries.shape[2], capture.keys.shape[2])
    figure = Figure(figsize=(1.5 * heads + 1.2, 1.62 * layers + 0.5), dpi=150, layout="compressed")
    grid = figure.subplots(layers, heads, squeeze=False)
    norm = LogNorm(1e-3, 1, clip=True)
    for row, layer in enumerate(capture.layers):
        for head in range(heads):
            axes = grid[row, head]
            if exact <= MOST_EXACT:
                picture = _of_capture(capture, layer, head)
                shown = np.ma.masked_array(picture.weights, picture.hidden)
            else:
                squares = _array(capture.map_max[row, head])
                shown = np.ma.masked_equal(squares, 0)
            axes.imshow(shown, cmap="viridis", norm=norm, interpolation="nearest", aspect="auto")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_title(f"L{layer} H{head}  {float(capture.mean_entropy[row, head]):.1f} nats", fontsize=7, pad=2)
            for spine in axes.spines.values():
                spine.set_linewidth(0.4)
    figure.colorbar(grid[0, 0].images[0], ax=grid, label="weight", fraction=0.03, pad=0.02)
    figure.supxlabel("key (nats: mean entropy)", fontsize=9)
    figure.supylabel("query", fontsize=9)
    if title:
        figure.suptitle(title, fontsize=11, parse_math=False)
    return figure


def plot_positions(table: Tensor | np.ndarray | Sinusoidal | Learned, *, title: str | None = None) -> "Figure":
    """A heat map of a positional encoding: embedding dimension across, position in sequence down.

    `table` is (length d_model), or a module that holds one.

    Raises: ValueError for a table of other axes, or an empty one.

    >>> from sightline.positions import sinusoidal
    >>> plot_positions(sinusoidal(length=64, d_model=32)).axes[0].get_xlabel()
    'embedding dimension'
    """
    if isinstance(table, Sinusoidal):
        table = table.encoding
    elif isinstance(table, Learned):
        table = table.weight
    values = _tensor(table)
    if not isinstance(values, Tensor) or values.ndim != 2 or not values.numel():
        raise ValueError(f"plot_positions: expected a table (length d_model), got {_shown(values)}")
    height, width = values.shape
    figure, axes = _figure(height, width, least=0.7)
    image = axes.imshow(_array(values), cmap="viridis", aspect="auto", interpolation="nearest")
    axes.set_xlabel("embedding dimension")
    axes.set_ylabel("position in sequence")
    _count(axes)
    figure.colorbar(image, ax=axes, label="encoding value", pad=0.03)
    if title is not None:
        axes.set_title(title, parse_math=False)
    return figure


def _tensor(values: object) -> object:
    """An array of numpy as a tensor; anything else is judged by who reads it."""
    return torch.as_tensor(values) if isinstance(values, np.ndarray) and values.dtype.kind == "f" else values


class _Picture(NamedTuple):
    """One matrix, what is hidden in it, and its names."""

    weights: np.ndarray
    hidden: np.ndarray
    query_tokens: Sequence[str] | None
    key_tokens: Sequence[str] | None
    title: str


def _of_capture(capture: Capture, layer: int | None, head: int | None) -> _Picture:
    layer = _chosen("layer", layer, capture.layers)
    head = _chosen("head", head, range(capture.num_heads))
    weights = capture.weights(layer, head)
    hidden = _hidden(capture.mask(layer, head), weights)
    title = f"Layer {layer}, head {head}"
    return _Picture(_array(weights), hidden, capture.query_tokens, capture.key_tokens, title)


def _of_tensor(weights: object, sequence: int | None, head: int | None, mask: Mask | None) -> _Picture:
    if not isinstance(weights, Tensor) or not 2 <= weights.ndim <= 4 or not weights.numel():
        axes = "(queries keys), (batch queries keys) or (batch heads queries keys)"
        raise ValueError(f"plot_weights: expected weights {axes}, got {_shown(weights)}")
    if weights.ndim < 4 and head is not None:
        raise ValueError(
            f"plot_weights: head={head} needs (batch heads queries keys), got {tuple(weights.shape)}; "
            "use weights.unflatten(0, (batch, heads)) if batch and heads are one axis"
        )
    names, row, column = [], 0, 0
    if weights.ndim > 2:
        row = _chosen("sequence", sequence, range(len(weights)))
        names += [f"Sequence {row}"] if len(weights) > 1 else []
    elif sequence is not None:
        raise ValueError(f"plot_weights: sequence={sequence} needs an axis of batch, got {tuple(weights.shape)}")
    if weights.ndim == 4:
        column = _chosen("head", head, range(weights.shape[1]))
        names += [f"head {column}"]
    matrix = weights if weights.ndim == 2 else weights[row] if weights.ndim == 3 else weights[row, column]
    hidden = (matrix == 0).cpu().numpy() if mask is None else _hidden(mask, matrix, row, column)
    return _Picture(_array(matrix), hidden, None, None, ", ".join(names).capitalize())


def _hidden(mask: Mask, matrix: Tensor, row: int = 0, column: int = 0) -> np.ndarray:
    """Where a mask hides the key; it has as many axes of batch and heads as it needs."""
    queries, keys = matrix.shape
    allowed, bias = mask.dense(queries, keys)
    hidden = torch.zeros(1, 1, queries, keys, dtype=torch.bool)
    if allowed is not None:
        hidden = hidden | ~allowed.cpu()
    if bias is not None:
        hidden = hidden | (bias.cpu() == -torch.inf)
    return hidden[min(row, len(hidden) - 1), min(column, hidden.shape[1] - 1)].numpy()


def _named(picture: _Picture, tokens: Sequence[str] | None, query_tokens: Sequence[str] | None) -> _Picture:
    queries, keys = picture.weights.shape
    if query_tokens is None and tokens is not None and queries <= keys:
        query_tokens = tokens[len(tokens) - queries :]
    for name, given, size in (("tokens", tokens, keys), ("query_tokens", query_tokens, queries)):
        if given is not None and len(given) != size:
            axis = "keys" if name == "tokens" else "queries"
            raise ValueError(f"plot_weights: {len(given)} {name} for {size} {axis}; give one token each")
    return picture._replace(query_tokens=query_tokens, key_tokens=tokens)


def _without_padding(picture: _Picture, lengths: Tensor | Sequence[int] | None, sequence: int) -> _Picture:
    if lengths is None:
        return picture
    sizes = lengths.tolist() if isinstance(lengths, Tensor) else list(lengths)
    queries, keys = picture.weights.shape
    if not sequence < len(sizes):
        raise ValueError(f"plot_weights: {len(sizes)} lengths, but sequence {sequence} was asked for")
    length = sizes[sequence]
    if not 1 <= length <= keys:
        raise ValueError(f"plot_weights: lengths[{sequence}] must be 1 to {keys}, the keys there are; got {length}")
    rows, columns = slice(length if queries == keys else queries), slice(length)
    return picture._replace(
        weights=picture.weights[rows, columns],
        hidden=picture.hidden[rows, columns],
        query_tokens=None if picture.query_tokens is None else picture.query_tokens[rows],
        key_tokens=None if picture.key_tokens is None else picture.key_tokens[columns],
    )


def _draw(picture: _Picture, scale: Scale, title: str) -> "Figure":
    from matplotlib.colors import LogNorm, Normalize

    height, width = picture.weights.shape
    figure, axes = _figure(height, width, least=0.35)
    shown = np.ma.masked_array(picture.weights, picture.hidden)
    largest = float(shown.max()) if shown.count() else 1.0
    largest = largest if largest > 0 else 1.0
    norm = Normalize(0, largest) if scale == "linear" else LogNorm(min(1e-4, largest / 10), largest, clip=True)
    image = axes.imshow(shown, cmap="viridis", norm=norm, interpolation="nearest")
    figure.colorbar(image, ax=axes, label="weight", fraction=0.05, pad=0.03)
    axes.set_xlabel("key")
    axes.set_ylabel("query")
    _count(axes)
    if picture.key_tokens is not None and width <= MOST_LABELS:
        axes.set_xticks(range(width), _labels(picture.key_tokens), rotation=90, fontsize=8, parse_math=False)
    if picture.query_tokens is not None and height <= MOST_LABELS:
        axes.set_yticks(range(height), _labels(picture.query_tokens), fontsize=8, parse_math=False)
    axes.tick_params(length=2)
    for spine in axes.spines.values():
        spine.set_linewidth(0.6)
    if title:
        axes.set_title(title, fontsize=11, parse_math=False)
    return figure


def _figure(height: int, width: int, least: float) -> "tuple[Figure, Axes]":
    """One pair of axes, of about the picture's own proportions; no side is below `least` of the other."""
    from sightline.figures import Figure

    longest = INCHES + min(max(height, width), MOST_LABELS) / 24
    share = max(least, min(height, width) / max(height, width))
    sides = (longest * share, longest) if height > width else (longest, longest * share)
    figure = Figure(figsize=(sides[0] + 1.2, sides[1] + 0.6), dpi=150, layout="compressed")
    return figure, figure.add_subplot()


def _count(axes: "Axes") -> None:
    """Positions are whole numbers."""
    from matplotlib.ticker import MaxNLocator

    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=9, integer=True, min_n_ticks=1))


def _labels(tokens: Sequence[str]) -> list[str]:
    """Tokens on one line each, in characters that the font has."""
    drawable = _drawable()
    labels = []
    for token in tokens:
        text = token.strip(" ") or token.replace(" ", "\u2423")
        text = "".join(c if c.isprintable() and ord(c) in drawable else _escape(c) for c in text)
        labels.append(text if len(text) <= LONGEST_LABEL else text[: LONGEST_LABEL - 1] + "\u2026")
    return labels


def _drawable() -> set[int]:
    """The characters of the fonts that matplotlib would use; it warns about any other and draws a box."""
    from matplotlib import font_manager

    characters: set[int] = set()
    for family in font_manager.FontProperties().get_family():
        file = font_manager.findfont(font_manager.FontProperties(family=[family]))
        characters |= font_manager.get_font(file).get_charmap().keys()
    return characters


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _chosen(name: str, given: int | None, there: Sequence[int]) -> int:
    if given is None and len(there) == 1:
        return there[0]
    if given is None or given not in there:
        every = f"{there[0]} to {there[-1]}" if isinstance(there, range) else ", ".join(map(str, there))
        say = f"say which with {name}=" if given is None else f"got {given}"
        raise ValueError(f"plot_weights: {name} is one of {every}; {say}")
    return given


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()


def _shown(value: object) -> str:
    if isinstance(value, Tensor):
        return str(tuple(value.shape))
    return f"{type(value).__name__}: give a tensor or an array of floats"
