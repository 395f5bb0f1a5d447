"""The folder of a training run: its steps, which of them is best, its log, and the events written there.

    out/
      checkpoint.json   {"best": "step-800", "latest": "step-1000"}, replaced whole
      step-800/         model.safetensors config.json tokenizer.json training.safetensors training.json
      step-1000/
      log.jsonl         one line an event

A kill at any moment leaves checkpoint.json naming two whole steps. Knows nothing about optimisers.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from sightline.checkpoints import (
    STEP_FOLDER,
    TEMPORARY,
    read_json,
    read_pointer,
    read_tensors,
    replace_text,
    whole,
    write_json,
    write_model,
)
from sightline.evaluation import Evaluation
from sightline.models import Decoder

# What a run that was stopped before its first checkpoint leaves: starting over loses nothing.
_OURS = {"log.jsonl", "tokens"}


@dataclass(frozen=True, kw_only=True)
class Started:
    """Training starts, or goes on after `step` steps."""

    step: int
    resumed: bool
    steps: int | None
    minutes: float | None
    parameters: int
    train_tokens: int
    valid_tokens: int
    batch: int
    context: int
    learning_rate: float
    device: str
    precision: str


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


Event = Started | Stepped | Evaluated | Saved | Ended


class RunFolder:
    """A run's folder, opened for writing: cleared of what a killed writer left, and known to be writable.

    Raises:
        ValueError: the folder cannot be written; it holds a run and `resume` is off; it holds none and
            `resume` is on; it holds somebody else's files.
    """

    def __init__(self, out: str | Path, *, resume: bool = False) -> None:
        self.out = Path(out)
        pointer = self._pointer(resume)
        self.best: str | None = pointer.get("best")
        self.latest: str | None = pointer.get("latest")
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            with self._log.open("a", encoding="utf-8"):
                pass
            self._clean()
        except OSError as error:
            raise ValueError(
                f"expected a folder that can be written, but {self.out}: {error}; choose another --out"
            ) from error

    def _pointer(self, resume: bool) -> Mapping[str, str]:
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"expected a folder, but {self.out} is a file: choose another --out")
        if (self.out / "checkpoint.json").exists():
            pointer = read_pointer(self.out)
            if not resume:
                step = pointer["latest"].removeprefix("step-")
                raise ValueError(
                    f"{self.out} holds a run at step {step}: add --resume to go on, or choose another --out"
                )
            return pointer
        steps = [path.name for path in self.out.glob("step-*") if STEP_FOLDER.fullmatch(path.name)]
        if steps:
            # Killed between the two renames of its first checkpoint, or checkpoint.json was lost: a step is whole.
            newest = max(steps, key=lambda name: int(name.removeprefix("step-")))
            raise ValueError(
                f"expected checkpoint.json beside {newest} in {self.out}, but it is missing: to go on from there write "
                f"it as {json.dumps({'best': newest, 'latest': newest})}, else choose another --out"
            )
        if resume:
            raise ValueError(
                f"expected a run to go on with, but {self.out} holds none: leave --resume out to start one"
            )
        if self.out.exists():
            names = {path.name for path in self.out.iterdir() if not path.name.startswith(TEMPORARY)}
            if names - _OURS:
                raise ValueError(
                    f"expected a new or empty folder, but {self.out} holds {min(names - _OURS)!r} and no run: "
                    "choose another --out"
                )
        return {}

    def _clean(self) -> None:
        """Removes half-written files, and steps that are neither best nor latest."""
        for path in self.out.iterdir():
            ours = path.name.startswith(TEMPORARY) or STEP_FOLDER.fullmatch(path.name)
            if ours and path.name not in (self.best, self.latest):
                if path.is_dir():
                    # A file that another program holds open is no reason to stop: the next save tries again.
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink()

    @property
    def _log(self) -> Path:
        return self.out / "log.jsonl"

    def read(self) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
        """The latest step: its folder, the tensors of its training state, and the rest of that state."""
        assert self.latest is not None
        folder = self.out / self.latest
        return folder, read_tensors(folder / "training.safetensors"), read_json(folder / "training.json")

    def save(
        self,
        model: Decoder,
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        *,
        step: int,
        best_step: int | None,
    ) -> Path:
        """Writes a step's folder, points checkpoint.json at it, and removes the steps no longer needed.

        Without a best step (nothing was evaluated yet) the latest counts as the best.
        """
        name = f"step-{step}"
        folder = self.out / name
        best = name if best_step is None else f"step-{best_step}"
        self._expect_own_pointer()
        if name not in (self.best, self.latest):
            shutil.rmtree(folder, ignore_errors=True)  # renamed by a writer that was stopped just then
            with whole(folder) as temporary:
                write_model(temporary, model)
                save_file(dict(tensors), temporary / "training.safetensors")
                write_json(temporary / "training.json", state)
        replace_text(self.out / "checkpoint.json", json.dumps({"best": best, "latest": name}, indent=2) + "\n")
        self.best, self.latest = best, name
        self._clean()
        return folder

    def _expect_own_pointer(self) -> None:
        """Two runs in one folder would remove each other's steps: the first to save keeps it."""
        file = self.out / "checkpoint.json"
        pointer = read_json(file) if file.exists() else {}
        if (pointer.get("best"), pointer.get("latest")) != (self.best, self.latest):
            raise ValueError(
                f"expected {file} to name {self.latest or 'nothing'} as latest, got {pointer.get('latest')}: another "
                "run writes into this folder and goes on; start this one again in another --out"
            )

    def truncate_log(self, step: int) -> None:
        """Forgets the events after a step, which a resumed run will write again."""
        kept = []
        lines = self._log.read_bytes().splitlines()
        for number, line in enumerate(lines, start=1):
            try:
                event = json.loads(line)
            except ValueError:  # both JSONDecodeError and UnicodeDecodeError
                if number == len(lines):
                    break  # a kill cut the last line short
                event = None
            if not isinstance(event, dict) or not isinstance(event.get("step"), int):
                raise ValueError(
                    f"expected line {number} of {self._log} to be an event with a step, got "
                    f"{line[:80].decode(errors='replace')!r}: remove the file, only the log is lost"
                )
            if event["step"] <= step:
                kept.append(line.decode("utf-8") + "\n")
        replace_text(self._log, "".join(kept))

    def log(self, event: Event) -> None:
        """Appends an event to log.jsonl, one line of JSON that is on its way to the disk at once."""
        record = {"event": type(event).__name__.lower(), **asdict(event)}
        try:
            with self._log.open("a", encoding="utf-8", newline="\n") as log:
                log.write(json.dumps(record) + "\n")
        except OSError as error:
            raise ValueError(f"expected to write {self._log}, but: {error}; free some space") from error
