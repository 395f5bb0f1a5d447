"""The course of one run: when to step, to evaluate, to save and to stop, and how to go on with it.

Knows no text and no terminal; what happens is written to the run's log and told to a listener.
"""

import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from sightline.advice import Advice
from sightline.evaluation import Evaluation
from sightline.events import Ended, Evaluated, Event, Saved, Started, Stepped, Warned
from sightline.interrupts import Interrupts
from sightline.memory import peak_bytes
from sightline.resuming import EVALUATIONS, read_state
from sightline.runs import Follower, RunFolder
from sightline.schedule import TrainConfig
from sightline.trainer import Diverged, Step, Trainer

Listener = Callable[[Event], None]
Stopped = Literal["steps", "minutes", "patience"]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C (or SIGTERM) came: what was trained is saved, and the message says how to go on."""


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run came to: validation before the first step, at its best, and after the last step."""

    out: Path
    start: Evaluation
    best: Evaluation
    best_step: int
    final: Evaluation
    steps: int
    seconds: float
    tokens_per_second: float
    stopped: Stopped


class Run:
    """The course of one run: when to step, to evaluate, to save and to stop."""

    def __init__(
        self,
        trainer: Trainer,
        folder: RunFolder | Follower,
        config: TrainConfig,
        listener: Listener | None,
        began: float,
        recipe: str | None = None,
    ) -> None:
        self.trainer, self.folder, self.config, self.listener = trainer, folder, config, listener
        self.team = trainer.team
        self.interrupts = Interrupts(held=self.team.size > 1)
        self.recipe = recipe
        self.began = began  # less what earlier sessions took
        self.fingerprint = trainer.fingerprint()
        self.start: Evaluation | None = None
        self.best: Evaluation | None = None
        self.best_step: int | None = None
        self.final: Evaluation | None = None
        self.without_gain = 0
        self.advice = Advice()
        self.slowest_look = self.slowest_step = 0.0

    def complete(self, resumed: bool) -> TrainResult:
        """Trains until something ends the run."""
        if resumed and (ended := self._decided()[0]) is not None:
            raise ValueError(self._nothing_to_do(ended))
        self.folder.truncate_log(self.trainer.step if resumed else -1)
        self._tell_start(resumed)
        for note in self.folder.notes:
            self._warn(note)
        self._warn(self._advice_of_size())
        with self.interrupts:
            try:
                stopped = self._train()
            except KeyboardInterrupt:
                raise Interrupted(self._save_interrupted()) from None
            except Diverged as error:
                raise Diverged(self._log_divergence(error)) from error
        speed = self.trainer.tokens_per_second
        step, seconds = self.trainer.step, self._seconds()
        peak, share = peak_bytes(self.trainer.device), self.trainer.of_peak
        ended = Ended(
            step=step, stopped=stopped, seconds=seconds, tokens_per_second=speed, of_peak=share, peak_bytes=peak
        )
        self._tell(ended)
        assert self.start and self.best and self.best_step and self.final
        return TrainResult(
            out=self.folder.out,
            start=self.start,
            best=self.best,
            best_step=self.best_step,
            final=self.final,
            steps=step,
            seconds=seconds,
            tokens_per_second=speed,
            stopped=stopped,
        )

    def _train(self) -> Stopped:
        if self.start is None:
            self.start = self._evaluate()
        stopped, rate = self._decided()
        if stopped is not None:
            raise ValueError(self._nothing_to_do(stopped))
        while stopped is None:
            began = time.perf_counter()
            self.final = None
            with self.interrupts.postponed():
                for step in self.trainer.take_step(rate):
                    self._tell_step(step)
            # Once in a while a machine stands still for many steps' time: that is forgotten by and by.
            self.slowest_step = max(0.9 * self.slowest_step, time.perf_counter() - began)
            if self.trainer.step % self.config.evaluate_every == 0 and self._shall_look():
                self._look()
            stopped, rate = self._decided()
        if self.final is None:
            self._look()
        return stopped

    def _log_divergence(self, error: Diverged) -> str:
        kept = f"{self.folder.step} is the last good checkpoint" if self.folder.latest else "nothing was saved yet"
        line = f"{error}: {kept}; start again with a lower --learning-rate (now {self.config.learning_rate})"
        # A listener would tell a person the same line twice.
        self.folder.log(Warned(step=self.trainer.step, message=line, seconds=self._seconds()))
        return line

    # --- Decisions, the same in all processes ---------------------------------------------------------

    def _decided(self) -> tuple[Stopped | None, float]:
        """Whether to stop, and the next learning rate, by the first process's clock; a Ctrl-C of any is all's."""
        reasons = (None, *get_args(Stopped))
        mine = (reasons.index(self._stopped()), self.config.rate(self._done()))
        (reason, rate), interrupted = self.team.agree(mine, happened=self.interrupts.came)
        if interrupted:
            raise KeyboardInterrupt
        return reasons[int(reason)], rate

    def _shall_look(self) -> bool:
        (near,), _ = self.team.agree((self._last_look_is_near(),), happened=False)
        return not near

    # --- Time -----------------------------------------------------------------------------------------

    def _seconds(self) -> float:
        return time.perf_counter() - self.began

    def _stopped(self) -> Stopped | None:
        limit, patience = self.config.step_limit, self.config.patience
        if limit is not None and self.trainer.step >= limit:
            return "steps"
        if patience is not None and self.without_gain >= patience:
            return "patience"
        if self.config.minutes is not None and self._seconds() + self.slowest_step >= self._training_seconds():
            return "minutes"
        return None

    def _training_seconds(self) -> float:
        """When the last evaluation must begin, so that it ends inside the time limit."""
        assert self.config.minutes is not None
        return 60 * self.config.minutes - 1.25 * self.slowest_look

    def _last_look_is_near(self) -> bool:
        """Whether evaluating now would leave no time to train before the last evaluation."""
        return self.config.minutes is not None and self._seconds() + self.slowest_look >= self._training_seconds()

    def _done(self) -> float:
        """The share of the run that is over in the middle of the next step."""
        shares = []
        if self.config.step_limit is not None:
            shares.append((self.trainer.step + 0.5) / self.config.step_limit)
        if self.config.minutes is not None:
            shares.append(self._seconds() / max(self._training_seconds(), 1e-9))
        return min(1.0, max(shares))

    def _nothing_to_do(self, stopped: Stopped) -> str:
        if self.trainer.step:
            return (
                f"the run in {self.folder.out} ended at step {self.trainer.step} because of its {stopped}: "
                f"give a larger --{stopped} to go on"
            )
        return (
            f"expected time to train in --minutes {self.config.minutes:g}, but none was left for a first step: give "
            f"more --minutes, or fewer --evaluate-batches, since an evaluation takes {self.slowest_look:.1f} s"
        )

    # --- Evaluations and checkpoints ------------------------------------------------------------------

    def _evaluate(self) -> Evaluation:
        began = time.perf_counter()
        evaluation = self.trainer.evaluate()
        step = self.trainer.step
        if step > 0 and (self.best is None or evaluation.loss < self.best.loss):
            self.best, self.best_step, self.without_gain = evaluation, step, 0
        elif step > 0:
            self.without_gain += 1
        self.slowest_look = max(self.slowest_look, time.perf_counter() - began)
        best = self.best_step == step
        self._tell(Evaluated.of(evaluation, step=step, best=best, seconds=self._seconds()))
        if self.best is not None and self.best_step is not None:
            so_far = {"best": self.best.loss, "best_step": self.best_step, "without_gain": self.without_gain}
            self._warn(self.advice.of_evaluation(loss=evaluation.loss, **so_far))
        return evaluation

    def _look(self) -> None:
        began = time.perf_counter()
        for step in self.trainer.seen():
            self._tell_step(step)
        self.final = self._evaluate()
        self._save()
        self.slowest_look = max(self.slowest_look, time.perf_counter() - began)

    def _save(self) -> Path:
        step = self.trainer.step
        state = {
            "step": step,
            "seconds": self._seconds(),
            "look_seconds": self.slowest_look,
            "start": self.start and asdict(self.start),
            "best": self.best and asdict(self.best),
            "best_step": self.best_step,
            "final": self.final and asdict(self.final),
            "without_gain": self.without_gain,
            "advice": self.advice.state(),
            "data": self.fingerprint,
            "config": asdict(self.config),
        }
        model, weights, tensors = self.trainer.model, self.trainer.weights(), self.trainer.state()
        with self.team.together():
            path = self.folder.save(model, tensors, state, step=step, best_step=self.best_step, weights=weights)
        self._tell(Saved(step=step, folder=str(path), seconds=self._seconds()))
        return path

    def _save_interrupted(self) -> str:
        if not self.trainer.step:
            return "stopped before the first step: nothing to save"
        for step in self.trainer.seen():
            self._tell_step(step)
        path = self._save()
        return f"stopped at step {self.trainer.step}, saved in {path}: the same with --resume (resume=True) goes on"

    def restore(self) -> None:
        """Goes back to the folder's latest step, after checking that it is of the same run."""
        with self.team.together():
            weights, tensors, state = {}, {}, {}
            if not isinstance(self.folder, Follower):
                weights, tensors, state = read_state(self.folder, self.trainer.model, self.config, self.fingerprint)
        state = self.team.tell(state)
        self.trainer.restore(weights, tensors, state["step"])
        evaluations = (value and Evaluation(**value) for value in (state[name] for name in EVALUATIONS))
        self.start, self.best, self.final = evaluations
        self.best_step, self.without_gain = state["best_step"], state["without_gain"]
        self.advice = Advice.of_state(state["advice"])
        self.began -= state["seconds"]
        self.slowest_look = state["look_seconds"]

    # --- What happens, told ---------------------------------------------------------------------------

    def _tell(self, event: Event) -> None:
        self.folder.log(event)
        if self.listener is not None:
            self.listener(event)

    def _warn(self, message: str | None) -> None:
        if message is None:
            return
        self._tell(Warned(step=self.trainer.step, message=message, seconds=self._seconds()))
        if self.listener is None:
            warnings.warn(message, stacklevel=2)

    def _advice_of_size(self) -> str | None:
        limit = self.config.step_limit
        return self.advice.of_size(
            parameters=self.trainer.model.num_parameters,
            tokens=len(self.trainer.train_tokens.ids),
            drawn=limit and limit * self.config.batch * self.trainer.context,
        )

    def _tell_start(self, resumed: bool) -> None:
        trainer = self.trainer
        self._tell(
            Started(
                step=trainer.step,
                resumed=resumed,
                steps=self.config.step_limit,
                minutes=self.config.minutes,
                evaluate_every=self.config.evaluate_every,
                look_seconds=self.slowest_look,
                parameters=trainer.model.num_parameters,
                train_tokens=len(trainer.train_tokens.ids),
                valid_tokens=len(trainer.valid_tokens.ids),
                batch=self.config.batch,
                context=trainer.context,
                learning_rate=self.config.learning_rate,
                device=trainer.device.type,
                processes=self.team.size,
                sharded=trainer.sharded,
                precision=str(trainer.precision).removeprefix("torch."),
                seconds=self._seconds(),
                recipe=self.recipe,
            )
        )

    def _tell_step(self, step: Step) -> None:
        self._tell(
            Stepped(
                step=step.step,
                done=self._done(),
                loss_nats=step.loss,
                gradient_norm=step.gradient_norm,
                learning_rate=step.rate,
                tokens_per_second=self.trainer.tokens_per_second,
                peak_bytes=peak_bytes(self.trainer.device),
                seconds=self._seconds(),
            )
        )
        self._warn(self.advice.of_step(loss=step.loss, learning_rate=self.config.learning_rate))
