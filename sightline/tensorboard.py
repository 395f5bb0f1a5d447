"""A run's events as TensorBoard's files, in the folder `tensorboard` of the run. Knows nothing about training."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sightline.events import Ended, Evaluated, Event, Started, Stepped, Warned

FOLDER = "tensorboard"
"""Its name in the folder of a run."""

# What a kill may cost of the curves; the run's own log loses nothing.
_FLUSH_SECONDS = 10


class TensorBoard:
    """A listener that writes what it hears for TensorBoard, and a context that closes the files.

    Losses of training and validation, bits per byte, perplexity, gradient norm, learning rate, speed and memory
    against steps; settings and warnings as text. A resumed run hides the steps that come again.

    with TensorBoard(Path("out")) as board:
        train("my.txt", "out", listener=board)

    Raises:
        ValueError: the package tensorboard is not installed.
    """

    def __init__(self, run: Path) -> None:
        if find_spec("tensorboard") is None:
            raise ValueError(
                "--log tensorboard needs the package tensorboard: pip install 'sightline[tensorboard]', or leave it out"
            )
        self.folder = run / FOLDER
        self._writer: Any = None

    def __enter__(self) -> "TensorBoard":
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def __call__(self, event: Event) -> None:
        """Writes one event."""
        if isinstance(event, Started):
            self._start(event)
        assert self._writer is not None
        if isinstance(event, Stepped):
            self._write(event.step, {
                "loss/training": event.loss_nats,
                "gradient_norm": event.gradient_norm,
                "learning_rate": event.learning_rate,
                "tokens_per_second": event.tokens_per_second,
                "memory_gigabytes": event.peak_bytes / 1e9,
            })  # fmt: skip
        elif isinstance(event, Evaluated):
            self._write(event.step, {
                "loss/validation": event.loss_nats,
                "validation/perplexity": event.perplexity,
                "validation/bits_per_byte": event.bits_per_byte,
            })  # fmt: skip
        elif isinstance(event, Warned):
            self._writer.add_text("warnings", event.message, event.step)
        elif isinstance(event, Ended):
            self._writer.add_text("ended", f"by its {event.stopped}, after {event.seconds:.0f} s", event.step)

    def _start(self, event: Started) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.__exit__()
        # The steps after the checkpoint that a resumed run goes on from are not those of this run any more.
        purge = event.step + 1 if event.resumed else 0
        self._writer = SummaryWriter(str(self.folder), purge_step=purge, flush_secs=_FLUSH_SECONDS)
        rows = "".join(f"| {name} | {value} |\n" for name, value in vars(event).items())
        self._writer.add_text("run", f"| | |\n|---|---|\n{rows}", event.step)

    def _write(self, step: int, numbers: dict[str, float]) -> None:
        for name, number in numbers.items():
            self._writer.add_scalar(name, number, step)
