"""The folder of a training run: its steps, which of them is best, and its log.

    out/
      checkpoint.json   {"best": "step-800", "latest": "step-1000"}, replaced whole
      step-800/         model.safetensors config.json tokenizer.json training.safetensors training.json manifest.json
      step-900/
      step-1000/
      log.jsonl         one line an event
      loss.png          what `curves` makes of it
      .lock             while a process writes here

Kept are the best step, the latest, and the one before it, which a run goes on from where the latest is damaged. A
kill at any moment leaves checkpoint.json naming whole steps. Knows nothing about optimisers.
"""

import contextlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from sightline.checkpoints import Model, steps, write_model
from sightline.events import Event, as_record
from sightline.files import (
    TEMPORARY,
    check_whole,
    is_whole,
    read_json,
    read_tensors,
    replace_text,
    sync,
    whole,
    write_json,
    write_manifest,
)
from sightline.locks import LOCK, Lock
from sightline.logs import LOG, record

# What a run that was stopped before its first checkpoint leaves: starting over loses nothing.
_OURS = {LOG, "loss.png", "tensorboard", "tokens", LOCK}


class RunFolder:
    """A run's folder, opened for writing by one process: locked, cleared of what a killed writer left.

    A context manager. With `resume`, `latest` is the newest step that is whole, and `notes` has a line for each newer
    one that is not.

    Raises:
        ValueError: the folder cannot be written, or another process writes it; it holds a run and `resume` is off;
            it holds none, or none that is whole, and `resume` is on; it holds somebody else's files.
    """

    def __init__(self, out: str | Path, *, resume: bool = False) -> None:
        self.out = Path(out)
        self.latest: str | None = None
        self.previous: str | None = None
        self.notes: list[str] = []
        self._lock = Lock(self.out / LOCK)
        self._is_new = not self.out.exists()
        check_folder(self.out, resume=resume)
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            if not self._lock.take():
                raise ValueError(
                    f"another run, process {self._lock.holder()}, writes into {self.out}: wait for its end, or choose "
                    "another --out"
                )
        except OSError as error:
            raise self._cannot_write(error) from error
        try:
            check_folder(self.out, resume=resume)  # what that process may have left since
            with self._log.open("a", encoding="utf-8"):
                pass
            for path in self.out.glob(TEMPORARY + "*"):
                _remove(path)
            if resume:
                self.latest = self._newest_whole_step()
        except OSError as error:
            self.close()
            raise self._cannot_write(error) from error
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets another process write here; a folder in which nothing was written is left as it was found."""
        with contextlib.suppress(OSError):  # on the way out of an error that tells more
            if self._log.exists() and not self._log.stat().st_size:
                self._log.unlink()
        self._lock.give_back()
        if self._is_new:
            with contextlib.suppress(OSError):  # it is not empty
                self.out.rmdir()

    def _cannot_write(self, error: OSError) -> ValueError:
        return ValueError(
            f"expected a folder that can be written, but {self.out}: {error.strerror or error}; choose another --out"
        )

    def _newest_whole_step(self) -> str:
        damage = []
        for folder in steps(self.out):
            try:
                check_whole(folder)
            except ValueError as error:
                damage.append(str(error))
            else:
                self.notes += [f"{line}; going on from {folder}" for line in damage]
                return folder.name
        raise ValueError(f"{damage[0]}; no other step in {self.out} is whole")

    def has(self, step: int) -> bool:
        """Whether the folder holds that step, whole; if not, `notes` says so."""
        folder = self.out / f"step-{step}"
        if is_whole(folder):
            return True
        self.notes.append(f"the best step, {folder}, is lost or damaged: the next evaluation is taken for the best")
        return False

    def _clean(self, best: str) -> None:
        """Removes the steps that are neither best, nor latest, nor the one before the latest."""
        for folder in steps(self.out):
            if folder.name not in (best, self.latest, self.previous):
                _remove(folder)

    @property
    def _log(self) -> Path:
        return self.out / LOG

    @property
    def step(self) -> Path:
        """The folder of the latest step."""
        assert self.latest is not None
        return self.out / self.latest

    def read(self) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
        """The latest step: its folder, the tensors of its training state, and the rest of that state."""
        folder = self.step
        return folder, read_tensors(folder / "training.safetensors"), read_json(folder / "training.json")

    def save(
        self,
        model: Model,
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        *,
        step: int,
        best_step: int | None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> Path:
        """Writes a step's folder, points checkpoint.json at it, and removes the steps no longer needed.

        Without a best step (nothing was evaluated yet) the latest counts as the best. `weights` stand for the
        model's own.
        """
        name = f"step-{step}"
        folder = self.out / name
        best = name if best_step is None else f"step-{best_step}"
        if name != self.latest:
            _remove(folder)  # a damaged one that the run has come to again
            with whole(folder) as temporary:
                write_model(temporary, model, weights)
                save_file(dict(tensors), temporary / "training.safetensors")
                write_json(temporary / "training.json", state)
                write_manifest(temporary)
            self.latest, self.previous = name, self.latest
        sync(self._log)
        replace_text(self.out / "checkpoint.json", json.dumps({"best": best, "latest": name}, indent=2) + "\n")
        self._clean(best)
        return folder

    def truncate_log(self, step: int) -> None:
        """Forgets the events after a step, which a resumed run will write again."""
        kept = []
        lines = self._log.read_bytes().splitlines(keepends=True)
        for number, line in enumerate(lines, start=1):
            if number == len(lines) and not line.endswith(b"\n"):
                break  # a kill cut the last line short
            if record(line, number, self._log)["step"] <= step:
                kept.append(line.decode("utf-8"))
        replace_text(self._log, "".join(kept))

    def log(self, event: Event) -> None:
        """Appends an event to log.jsonl, one line of JSON that is on its way to the disk at once."""
        try:
            with self._log.open("a", encoding="utf-8", newline="\n") as log:
                log.write(json.dumps(as_record(event)) + "\n")
        except OSError as error:
            raise ValueError(f"expected to write {self._log}, but: {error}; free some space") from error


def check_folder(out: Path, *, resume: bool) -> None:
    """Whether a run may start in a folder, or go on there; nothing is written.

    Raises:
        ValueError: as `RunFolder`, but for what only writing tells.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"expected a folder, but {out} is a file: choose another --out")
    found = steps(out)
    pointer = out / "checkpoint.json"
    if found and not resume:
        step = found[0].name.removeprefix("step-")
        raise ValueError(f"{out} holds a run at step {step}: add --resume to go on, or choose another --out")
    if not found and pointer.exists():
        raise ValueError(f"expected the steps that {pointer} names, but they are missing: choose another --out")
    if not found and resume:
        raise ValueError(f"expected a run to go on with, but {out} holds none: leave --resume out to start one")
    if not found and out.exists():
        names = {path.name for path in out.iterdir() if not path.name.startswith(TEMPORARY)}
        if names - _OURS:
            raise ValueError(
                f"expected a new or empty folder, but {out} holds {min(names - _OURS)!r} and no run: "
                "choose another --out"
            )


class Follower:
    """A run's folder for the processes that do not write there, because the first one does."""

    def __init__(self, out: str | Path, latest: str | None) -> None:
        self.out, self.latest = Path(out), latest
        self.notes: list[str] = []

    @property
    def step(self) -> Path:
        """The folder of the latest step when the run started."""
        assert self.latest is not None
        return self.out / self.latest

    def save(self, *_: Any, step: int, **__: Any) -> Path:
        """Where the first process saves."""
        return self.out / f"step-{step}"

    def truncate_log(self, step: int) -> None:
        """Is done by the first process."""

    def log(self, event: Event) -> None:
        """Is done by the first process."""


def _remove(path: Path) -> None:
    if path.is_dir():
        # A file that another program holds open is no reason to stop: the next save tries again.
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
