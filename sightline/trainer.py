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

from sightline.batches import TokenFile, TokenizedCorpus, batch, window_starts
from sightline.checkpoints import own_tensors
from sightline.costs import flops_per_token, peak
from sightline.distributed import ALONE, Replica, Team, shards, whole
from sightline.evaluation import Evaluation, evaluate
from sightline.models import Decoder
from sightline.optimizers import Optimizers, stored
from sightline.schedule import TrainConfig, autocast, choose_compile, choose_precision

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
    """A model and what moves it, on one device or, as one of a team, on several.

    Raises:
        ValueError: a split is missing or shorter than one window.
    """

    def __init__(
        self,
        model: Decoder,
        data: TokenizedCorpus,
        config: TrainConfig,
        team: Team = ALONE,
        device: torch.device | None = None,
    ) -> None:
        self.model, self.config, self.team = model, config, team
        self.device = next(model.parameters()).device if device is None else device
        self.context = model.config.context
        vocabulary = model.config.vocabulary
        with team.together():
            self.train_tokens = _checked(data.train, "training", self.context + 1, vocabulary)
            self.valid_tokens = _checked(data.valid, "validation", 2, vocabulary)
            self.parts = _checked_parts(config, team)
            self.sharded = shards(config.parallel, model.num_parameters, self.device, team)
        self.counts = model.counts if isinstance(model, Decoder) else None
        if self.counts is not None:
            self.counts.count(self.train_tokens.ids)
        self.precision = choose_precision(config.precision, self.device)
        if choose_compile(config.compile, self.device):
            for block in model.blocks:
                block.compile()
        self.replica = Replica(model, team, device=self.device, sharded=self.sharded, precision=self.precision)
        self.optimizers = Optimizers(model, config)
        self._parameters = list(model.parameters())  # in order of their names; walking through the modules takes time
        self.step = 0
        self.trained_tokens, self.trained_seconds = 0, 0.0
        self._unseen: list[tuple[int, float, Tensor]] = []

    @property
    def tokens_per_second(self) -> float:
        """Tokens trained on in a second of training, evaluations apart, in this session."""
        return self.trained_tokens / self.trained_seconds if self.trained_seconds else 0.0

    @property
    def of_peak(self) -> float | None:
        """The share of the GPUs' arithmetic that this is; None where their peak is not known."""
        if self.device.type != "cuda" or self.precision != torch.bfloat16:
            return None
        most = peak(torch.cuda.get_device_name(self.device))
        return most and self.tokens_per_second * flops_per_token(self.model.config) / (most * self.team.size)

    def take_step(self, rate: float) -> list[Step]:
        """Draws a batch and moves the weights.

        Returns the steps whose losses were looked at: on a CPU this one, on an accelerator now and then
        some.

        Raises:
            Diverged: a loss or a gradient is not finite.
        """
        began = time.perf_counter()
        self._unseen.append((self.step + 1, rate, torch.stack(self._gradients())))
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
        """The gradients of a batch: this process's part of its loss, and their norm."""
        self._seed()
        self.optimizers.zero_grad()
        losses = []
        for turn in range(self.config.accumulate):
            drawn = self._part(self.team.rank * self.config.accumulate + turn)
            share = len(drawn[0]) / self.config.batch
            with autocast(self.device, self.precision):
                last = turn + 1 == self.config.accumulate
                losses.append(self.replica.backward(*drawn, share=share, last=last))
        return torch.stack(losses).sum(), whole(self._clipped())

    def _clipped(self) -> Tensor:
        """Scales the gradients down, if they are to be; their norm before."""
        most = self.config.clip or math.inf
        norm = nn.utils.get_total_norm([each.grad for each in self._parameters if each.grad is not None], foreach=True)
        # On a CPU the norm can be looked at without waiting, and most steps spare themselves a call a parameter.
        if self.sharded or self.device.type != "cpu" or not norm + 1e-6 <= most:
            nn.utils.clip_grads_with_norm_(self._parameters, most, norm, foreach=True)
        return norm

    def _part(self, part: int) -> tuple[Tensor, ...]:
        """Inputs, targets and, for a model that has counted the text, where the windows begin."""
        size = {"batch": self.config.batch, "context": self.context, "part": (part, self.parts)}
        drawn = batch(self.train_tokens, step=self.step, seed=self.config.seed, **size)
        if self.counts is not None:
            starts = window_starts(self.train_tokens, step=self.step, seed=self.config.seed, **size)
            drawn = (*drawn, torch.from_numpy(starts))
        if self.device.type != "cuda":
            return tuple(ids.to(self.device) for ids in drawn)
        return tuple(ids.pin_memory().to(self.device, non_blocking=True) for ids in drawn)

    def seen(self) -> list[Step]:
        """Looks at the losses not looked at yet.

        Raises:
            Diverged: one of them is not finite.
        """
        rows = torch.stack([row for *_, row in self._unseen]).tolist() if self._unseen else []
        losses = self.team.total([loss for loss, _ in rows])
        steps = [
            Step(step=step, rate=rate, loss=loss, gradient_norm=norm)
            for (step, rate, _), loss, (_, norm) in zip(self._unseen, losses, rows, strict=True)
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
            evaluation = self._evaluation()
        if not math.isfinite(evaluation.loss):
            raise Diverged(f"the validation loss became {evaluation.loss} at step {self.step}")
        return evaluation

    def _evaluation(self) -> Evaluation:
        return evaluate(
            self.model,
            self.valid_tokens,
            context=self.context,
            batch=self.config.batch,
            batches=self.config.evaluate_batches,
            team=self.team,
        )

    # --- State ----------------------------------------------------------------------------------------

    def _seed(self) -> None:
        """Sets what dropout draws from in this step: a function of the seed, the step and the process."""
        (drawn,) = np.random.SeedSequence([self.config.seed, self.step, self.team.rank]).generate_state(1, np.uint64)
        if self.device.type == "cpu":
            torch.default_generator.manual_seed(int(drawn))
        else:  # every device's; it keeps a stack trace for each that is not in use yet, a millisecond a step
            torch.manual_seed(int(drawn))

    def weights(self) -> dict[str, Tensor]:
        """The model's tensors, whole, on the first process; nothing on the others, which must ask too."""
        return self._whole(own_tensors(self.model))

    def state(self) -> dict[str, Tensor]:
        """The optimisers' tensors as `parameter.exp_avg` and the like; where, as of `weights`."""
        return self._whole(self.optimizers.state())

    def _whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        gathered = ((name, self.replica.first_whole(tensor)) for name, tensor in tensors.items())
        return {name: tensor for name, tensor in gathered if tensor is not None}

    def restore(self, weights: Mapping[str, Tensor], state: Mapping[str, Tensor], step: int) -> None:
        """Goes back to weights and a state that the first process has read; the others bring nothing.

        Raises:
            ValueError: the state is another model's.
        """
        blank = self.optimizers.blank_state()
        with self.team.together():
            if self.team.leads:
                state = {name: stored(state, name, tensor) for name, tensor in blank.items()}
        for name, tensor in own_tensors(self.model).items():
            self.replica.fill(tensor, weights.get(name))
        for name, tensor in blank.items():
            self.replica.fill(tensor, state.get(name))
        self.step = step

    def fingerprint(self) -> dict[str, str]:
        """The sha256 of the ids of each split: what a resumed run must find again."""
        return {"train": _hash(self.train_tokens.ids), "valid": _hash(self.valid_tokens.ids)}


def _checked_parts(config: TrainConfig, team: Team) -> int:
    parts = team.size * config.accumulate
    if parts > config.batch:
        raise ValueError(
            f"expected a batch of at least a window for each of {team.size} processes x {config.accumulate} "
            f"micro-batches, got {config.batch}: give a larger --batch"
        )
    return parts


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
