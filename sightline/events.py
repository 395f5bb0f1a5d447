"""What happens in a training run, as frozen records: what its log holds and a listener hears. Knows no folders."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, get_args

from sightline.evaluation import Evaluation


@dataclass(frozen=True, kw_only=True)
class Started:
    """Training starts, or goes on after `step` steps."""

    step: int
    resumed: bool
    steps: int | None
    minutes: float | None
    evaluate_every: int
    look_seconds: float
    """The longest that an evaluation with its checkpoint took in earlier sessions."""
    parameters: int
    train_tokens: int
    valid_tokens: int
    batch: int
    context: int
    learning_rate: float
    device: str
    processes: int = 1
    sharded: bool = False
    """Whether each process holds a part of the model (FSDP2) rather than all of it (DDP)."""
    precision: str
    seconds: float
    recipe: str | None = None
    """The recipe that filled in what was not said, and its reason."""


@dataclass(frozen=True, kw_only=True)
class Stepped:
    """A batch was drawn and the weights moved."""

    step: int
    done: float
    """Share of the run that is over, from 0 to 1."""
    loss_nats: float
    gradient_norm: float
    learning_rate: float
    tokens_per_second: float
    peak_bytes: int
    """The most memory held so far in this session (`memory.peak_bytes`)."""
    seconds: float
    """Since the start of the run, those of earlier sessions included."""


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """The validation text was scored; `best` says that no earlier step did better."""

    step: int
    best: bool
    loss_nats: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    seconds: float

    @classmethod
    def of(cls, evaluation: Evaluation, *, step: int, best: bool, seconds: float) -> "Evaluated":
        """The event of an evaluation."""
        return cls(
            step=step,
            best=best,
            loss_nats=evaluation.loss,
            perplexity=evaluation.perplexity,
            bits_per_byte=evaluation.bits_per_byte,
            tokens=evaluation.tokens,
            seconds=seconds,
        )


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A step was written to its folder."""

    step: int
    folder: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Ended:
    """Training is over: `stopped` says why."""

    step: int
    stopped: str
    seconds: float
    tokens_per_second: float
    of_peak: float | None = None
    """The share of the GPUs' bfloat16 arithmetic that training used; None elsewhere, and on GPUs not listed."""
    peak_bytes: int


@dataclass(frozen=True, kw_only=True)
class Warned:
    """Something about the run wants a person's attention; `message` says what, and what to do."""

    step: int
    message: str
    seconds: float


Event = Started | Stepped | Evaluated | Saved | Warned | Ended

_KINDS = {kind.__name__.lower(): kind for kind in get_args(Event)}


def as_record(event: Event) -> dict[str, Any]:
    """An event as JSON can hold it, its kind under `event`."""
    return {"event": type(event).__name__.lower(), **asdict(event)}


def of_record(record: dict[str, Any]) -> Event | None:
    """The inverse of `as_record`; None for an event that another version wrote, with other fields."""
    kind = _KINDS.get(record["event"])
    values = {name: value for name, value in record.items() if name != "event"}
    if kind is None or values.keys() != {field.name for field in fields(kind)}:
        return None
    return kind(**values)


def each(*listeners: Callable[[Event], None]) -> Callable[[Event], None]:
    """One listener that tells all of them."""

    def tell(event: Event) -> None:
        for listener in listeners:
            listener(event)

    return tell
