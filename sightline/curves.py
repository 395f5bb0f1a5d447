"""The log of a run as a picture: loss of training and validation, the learning rate, where it was best.

Made from `log.jsonl` alone, so a run that goes on elsewhere or was killed has one too. Knows nothing about training.
"""

import io
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sightline.events import Evaluated, Event, Stepped
from sightline.files import replace_bytes
from sightline.logs import LOG, read_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from sightline.figures import Figure

PICTURE = "loss.png"
"""Its name in the folder of a run."""

# A line has no more points than the picture has columns: each stands for the mean of as many steps.
_MOST_POINTS = 1000
# The smooth line averages over this share of the run.
_SMOOTH = 0.02
# The losses of the first steps would press all others flat: the axis ends above the losses after this share.
_START = 0.04
_TRAIN, _VALID, _RATE, _INK = "#2f6f9f", "#c8501e", "#5f6b76", "#333333"


class History(NamedTuple):
    """What a log says, as arrays."""

    steps: NDArray[np.int64]
    losses: NDArray[np.float64]
    rates: NDArray[np.float64]
    looks: NDArray[np.int64]
    validation: NDArray[np.float64]
    warned: list[int]
    resumed: list[int]
    tokens_a_step: int | None
    title: str


def plot_run(run: str | Path) -> "Figure":
    """The loss of a run in nats a token, against steps and tokens, from its log; a matplotlib figure.

    Training loss step by step and smoothed, validation loss at each evaluation with the best one named, the learning
    rate below. A triangle at the foot marks a warning, a dotted line where a run was resumed.

    Raises:
        ValueError: the folder has no log, or one without a loss.

    >>> import tempfile
    >>> from sightline.training import TrainConfig, train
    >>> small = {"context": 16, "d_model": 16, "num_layers": 1, "num_heads": 2}
    >>> with tempfile.TemporaryDirectory() as out:
    ...     run = train("embedded", out, model=small, tokenizer="characters",
    ...                 config=TrainConfig(steps=30, evaluate_every=10, evaluate_batches=4))
    ...     plot_run(out).axes[0].get_ylabel()
    'loss (nats a token)'
    """
    from sightline.figures import Figure

    history = _history(Path(run))
    figure = Figure(figsize=(9, 5.6), dpi=150, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    _draw_losses(above, history)
    _draw_rate(below, history)
    figure.suptitle(history.title, fontsize=11, parse_math=False)
    return figure


def draw_run(run: str | Path, file: str | Path | None = None) -> Path:
    """Writes `plot_run` as a PNG (None: into the folder of the run), replaced whole, and gives back where.

    Raises:
        ValueError: as `plot_run`, or the file cannot be written.
    """
    file = Path(run, PICTURE) if file is None else Path(file)
    picture = io.BytesIO()
    plot_run(run).savefig(picture, format="png")
    replace_bytes(file, picture.getvalue())
    return file


class LossPicture:
    """A listener that draws its run when the run is over, however it ended; `every` so many seconds before too."""

    def __init__(self, run: Path, file: Path | None = None, *, every: float = math.inf) -> None:
        self.run, self.file, self.every = run, file, every
        self.drawn: Path | None = None
        self._heard = False
        self._since = time.perf_counter()

    def __call__(self, event: Event) -> None:
        """Hears one event."""
        self._heard = self._heard or isinstance(event, Evaluated | Stepped)
        if self._heard and time.perf_counter() - self._since >= self.every:
            self.drawn = draw_run(self.run, self.file)
            self._since = time.perf_counter()

    def __enter__(self) -> "LossPicture":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not self._heard:
            return  # the folder may be another run's
        try:
            self.drawn = draw_run(self.run, self.file)
        except ValueError:
            if error is None:
                raise
            # Else what ended the run is what a person must hear.


def _history(run: Path) -> History:
    records = read_log(run)
    stepped = _of(records, "stepped", "loss_nats", "learning_rate")
    looked = _of(records, "evaluated", "loss_nats")
    if not stepped and not looked:
        raise ValueError(f"expected a log with a loss, but {run / LOG} has none yet: wait for the first step")
    started = _of(records, "started", "batch", "context")
    steps, losses, rates = np.array(stepped, dtype=np.float64).reshape(-1, 3).T
    looks, validation = np.array(looked, dtype=np.float64).reshape(-1, 2).T
    sizes = {round(batch * context) for _, batch, context in started}
    return History(
        steps=steps.astype(np.int64),
        losses=losses,
        rates=rates,
        looks=looks.astype(np.int64),
        validation=validation,
        warned=[record["step"] for record in records if record["event"] == "warned"],
        resumed=[round(step) for step, *_ in started[1:]],
        tokens_a_step=sizes.pop() if len(sizes) == 1 else None,
        title=_title(run, records),
    )


def _of(records: Sequence[dict[str, Any]], kind: str, *names: str) -> list[list[float]]:
    """Step and numbers of each event of one kind; a log of another version may lack some."""
    wanted = ("step", *names)
    found = [
        record for record in records if record["event"] == kind and all(_is_number(record, name) for name in wanted)
    ]
    return [[record[name] for name in wanted] for record in found]


def _is_number(record: dict[str, Any], name: str) -> bool:
    return isinstance(record.get(name), int | float) and math.isfinite(record[name])


def _title(run: Path, records: Sequence[dict[str, Any]]) -> str:
    parts = [run.absolute().name]
    started = next((record for record in records if record["event"] == "started"), {})
    if "parameters" in started:
        parts.append(f"{started['parameters']:,} parameters, {started['train_tokens']:,} tokens of text")
    ended = records[-1] if records[-1]["event"] == "ended" else None
    if ended is not None:
        minutes, seconds = divmod(round(ended["seconds"]), 60)
        parts.append(f"ended by its {ended['stopped']} after {minutes}:{seconds:02}")
    return "   ".join(parts)


def _draw_losses(axes: "Axes", history: History) -> None:
    from matplotlib.ticker import FuncFormatter

    steps, losses = _thin(history.steps, history.losses)
    if len(steps):
        axes.plot(steps, losses, color=_TRAIN, alpha=0.25, linewidth=0.7)
        axes.plot(steps, _smooth(losses), color=_TRAIN, linewidth=1.7, label="training, smoothed")
    if len(history.looks):
        axes.plot(
            history.looks, history.validation, color=_VALID, linewidth=1.5, marker="o", ms=3.5, label="validation"
        )
        _mark_best(axes, history)
    axes.set_ylim(*_range(history))
    for step in history.resumed:
        axes.axvline(step, color=_INK, linewidth=0.8, linestyle=":")
    if history.warned:
        foot = [0.02] * len(history.warned)
        marks = {"transform": axes.get_xaxis_transform(), "clip_on": False, "label": "warning"}
        axes.plot(history.warned, foot, "^", color="#b8860b", ms=7, **marks)
    axes.set_ylabel("loss (nats a token)")
    axes.legend(frameon=False, loc="upper right", fontsize=9)
    _tidy(axes)
    if history.tokens_a_step is not None:
        size = history.tokens_a_step
        scale: Any = (lambda step: step * size, lambda tokens: tokens / size)
        top = axes.secondary_xaxis("top", functions=scale)
        top.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: _short(tokens)))
        top.set_xlabel("tokens read", fontsize=9)
        top.tick_params(labelsize=8, length=2)
        top.spines["top"].set_visible(False)


def _mark_best(axes: "Axes", history: History) -> None:
    trained = history.looks > 0
    if not trained.any():
        return
    best = np.flatnonzero(trained)[int(np.argmin(history.validation[trained]))]
    step, loss = int(history.looks[best]), float(history.validation[best])
    axes.plot([step], [loss], "o", color=_VALID, ms=9, markerfacecolor="none", markeredgewidth=1.5)
    late = step > 0.6 * max(int(history.looks.max()), int(history.steps.max(initial=0)))
    axes.annotate(
        f"best {loss:.4f} at step {step:,}", (step, loss), xytext=(-10 if late else 10, 16),
        textcoords="offset points", ha="right" if late else "left", color=_VALID, fontsize=10,
        bbox={"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
    )  # fmt: skip


def _draw_rate(axes: "Axes", history: History) -> None:
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    axes.plot(*_thin(history.steps, history.rates), color=_RATE, linewidth=1.3)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("learning rate", fontsize=9)
    axes.set_xlabel("step")
    axes.tick_params(axis="y", labelsize=8)
    axes.yaxis.set_major_locator(MaxNLocator(3))
    axes.xaxis.set_major_locator(MaxNLocator(9, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    _tidy(axes)


def _tidy(axes: "Axes") -> None:
    axes.grid(color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.margins(x=0.015)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _range(history: History) -> tuple[float, float]:
    """The losses that the picture shows: all of them but the fall at the very start."""
    end = max(history.steps.max(initial=0), history.looks.max(initial=0))
    steps, losses = _thin(history.steps, history.losses)
    smooth = _smooth(losses)
    values = [*smooth[steps >= _START * end], *history.validation[history.looks >= _START * end]]
    if not values:  # an evaluation before the first step is all there is
        values = [*history.validation]
    low, high = min(values), max(values)
    room = max(high - low, 0.02)
    return low - 0.08 * room, high + 0.35 * room


def _thin(steps: NDArray, values: NDArray) -> tuple[NDArray, NDArray]:
    """The means of neighbours, so that few enough points are left."""
    size = -(-len(steps) // _MOST_POINTS)
    if size <= 1:
        return steps, values
    starts = np.arange(0, len(steps), size)
    counts = np.diff(np.append(starts, len(steps)))
    return np.add.reduceat(steps, starts) / counts, np.add.reduceat(values, starts) / counts


def _smooth(values: NDArray) -> NDArray:
    """A centred mean over a share of the run, narrower at its ends."""
    half = max(1, round(_SMOOTH * len(values) / 2))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    place = np.arange(len(values))
    reach = np.minimum(half, np.minimum(place, len(values) - 1 - place))
    return (sums[place + reach + 1] - sums[place - reach]) / (2 * reach + 1)


def _short(number: float) -> str:
    """A count of tokens, short: 12k, 1.5M.

    >>> _short(0), _short(12_000), _short(1_500_000), _short(20_000_000), _short(2.5e9)
    ('0', '12k', '1.5M', '20M', '2.5B')
    """
    for size, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{name}"
    return f"{number:.0f}"
