"""The moving parts of training: weights, optimisers, random state; one step, one evaluation, all of it saved.

Knows nothing about schedules, folders, logs and listeners.
"""

import hashlib
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from sightline.batches import TokenFile, TokenizedCorpus, batch
from sightline.evaluation import Evaluation, evaluate
from sightline.models import Decoder
from sightline.optimizers import Optimizers, stored
from sightline.schedule import TrainConfig, autocast, choose_precision

# On an accelerator, looking at a loss waits for the device: look at this many steps at a time.
_LOOK_EVERY = 16


class Diverged(ValueError):
    """The loss is no longer a number."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one step came to."""

    step: int
    rate: float
    loss: float
    gradient_norm: float


class Trainer:
    """A model and what moves it.

    Raises:
        ValueError: a split is missing or shorter than one window.
    """

    def __init__(self, model: Decoder, data: TokenizedCorpus, config: TrainConfig) -> None:
        self.model, self.config = model, config
        self.context = model.config.context
        vocabulary = model.config.vocabulary
        self.train_tokens = _checked(data.train, "training", self.context + 1, vocabulary)
        self.valid_tokens = _checked(data.valid, "validation", 2, vocabulary)
        self.device = next(model.parameters()).device
        self.precision = choose_precision(config.precision, self.device)
        self.optimizers = Optimizers(model, config)
        self.step = 0
        self.trained_tokens, self.trained_seconds = 0, 0.0
        self._unseen: list[tuple[int, float, Tensor]] = []

    @property
    def tokens_per_second(self) -> float:
        """Tokens trained on in a second of training, evaluations apart, in this session."""
        return self.trained_tokens / self.trained_seconds if self.trained_seconds else 0.0

    def take_step(self, rate: float) -> list[Step]:
        """Draws a batch and moves the weights.

        Returns the steps whose losses were looked at: on a CPU this one, on an accelerator now and then
        some.

        Raises:
            Diverged: a loss or a gradient is not finite.
        """
        began = time.perf_counter()
        loss, norm = self._gradients()
        self._unseen.append((self.step + 1, rate, torch.stack([loss.detach(), norm])))
        seen = self.seen() if len(self._unseen) >= self._look_every else []
        self.optimizers.step(rate)
        self.step += 1
        self.trained_tokens += self.config.batch * self.context
        self.trained_seconds += time.perf_counter() - began
        return seen

    @property
    def _look_every(self) -> int:
        return 1 if self.device.type == "cpu" else _LOOK_EVERY

    def _gradients(self) -> tuple[Tensor, Tensor]:
        size = {"batch": self.config.batch, "context": self.context}
        inputs, targets = batch(self.train_tokens, step=self.step, seed=self.config.seed, **size)
        with autocast(self.device, self.precision):
            loss = self.model.loss(inputs.to(self.device), targets.to(self.device))
        self.optimizers.zero_grad()
        loss.backward()
        return loss, nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip or math.inf, foreach=True)

    def seen(self) -> list[Step]:
        """Looks at the losses not looked at yet.

        Raises:
            Diverged: one of them is not finite.
        """
        rows = torch.stack([row for *_, row in self._unseen]).tolist() if self._unseen else []
        steps = [
            Step(step=step, rate=rate, loss=loss, gradient_norm=norm)
            for (step, rate, _), (loss, norm) in zip(self._unseen, rows, strict=True)
        ]
        self._unseen = []
        for step in steps:
            for name, value in (("loss", step.loss), ("gradient", step.gradient_norm)):
                if not math.isfinite(value):
                    raise Diverged(f"the {name} became {value} at step {step.step}")
        return steps

    def evaluate(self) -> Evaluation:
        """Scores the validation text.

        Raises:
            Diverged: the loss is not finite.
        """
        with autocast(self.device, self.precision):
            evaluation = evaluate(
                self.model,
                self.valid_tokens,
                context=self.context,
                batch=self.config.batch,
                batches=self.config.evaluate_batches,
            )
        if not math.isfinite(evaluation.loss):
            raise Diverged(f"the validation loss became {evaluation.loss} at step {self.step}")
        return evaluation

    # --- State ----------------------------------------------------------------------------------------

    def seed(self) -> None:
        """Starts the random state that dropout draws from."""
        torch.manual_seed(self.config.seed)

    def state(self) -> dict[str, Tensor]:
        """The optimisers' tensors as `parameter.exp_avg` and the like, and the random state."""
        tensors = self.optimizers.state()
        tensors["random.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self.device)
        if self.device.type == "mps":
            tensors["random.mps"] = torch.mps.get_rng_state()
        return tensors

    def restore(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Goes back to a state; the model's own weights are the caller's business.

        Raises:
            ValueError: the state is another model's.
        """
        self.optimizers.restore(tensors)
        torch.set_rng_state(stored(tensors, "random.cpu", torch.get_rng_state()))
        # A run that moves to another kind of device goes on with that device's seeded state.
        if self.device.type == "cuda" and "random.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random.cuda"], self.device)
        if self.device.type == "mps" and "random.mps" in tensors:
            torch.mps.set_rng_state(tensors["random.mps"])
        self.step = step

    def fingerprint(self) -> dict[str, str]:
        """The sha256 of the ids of each split: what a resumed run must find again."""
        return {"train": _hash(self.train_tokens.ids), "valid": _hash(self.valid_tokens.ids)}


def _checked(tokens: TokenFile | None, split: str, least: int, vocabulary: int) -> TokenFile:
    if tokens is None:
        raise ValueError(f"expected text with a {split} split, but it has none: add one")
    if len(tokens.ids) < least:
        raise ValueError(
            f"expected {split} text of at least {least} tokens, "
            f"got {len(tokens.ids)}: give more text or a smaller --context"
        )
    if tokens.ids.max() >= vocabulary:
        raise ValueError(
            f"expected {split} ids under the model's vocabulary of {vocabulary}, got {tokens.ids.max()}: "
            "build the model with the length of the tokenizer"
        )
    return tokens


def _hash(ids: np.ndarray) -> str:
    digest = hashlib.sha256(ids.dtype.str.encode())
    for start in range(0, len(ids), 1 << 20):
        digest.update(ids[start : start + (1 << 20)].tobytes())
    return digest.hexdigest()
