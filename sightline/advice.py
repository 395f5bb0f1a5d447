"""What a run's own numbers say about it: a line of advice, each once. Knows nothing about models, folders, screens."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

# More parameters than this for a token of text: even with dropout and decay the text is learned by heart.
_PARAMETERS_A_TOKEN = 20
# Evaluations in a row without a new best: one or two may be noise.
_WITHOUT_GAIN = 3
# Nats by which the training loss may rise; one batch's noise is averaged over about fifty steps.
_RISE = 0.5
_DECAY, _SETTLED = 0.98, 50


@dataclass(kw_only=True)
class Advice:
    """The running mean of the training loss, where it was lowest and at the best step, and what has been said.

    >>> advice = Advice()
    >>> advice.of_size(parameters=3_000_000, tokens=100_000, drawn=None)[:53]
    '3,000,000 parameters are many for 100,000 tokens of t'
    >>> advice.of_size(parameters=3_000_000, tokens=100_000, drawn=None) is None
    True
    """

    steps: int = 0
    mean: float = 0.0
    lowest: float | None = None
    at_best: float | None = None
    said: list[str] = field(default_factory=list)

    def of_size(self, *, parameters: int, tokens: int, drawn: int | None) -> str | None:
        """Before the first step: is the text too small? `drawn` tokens will be read in all, if that is known."""
        if parameters <= _PARAMETERS_A_TOKEN * tokens or (drawn is not None and drawn <= tokens):
            return None
        return self._once(
            "text too small",
            f"{parameters:,} parameters are many for {tokens:,} tokens of text: they can learn it by heart; give more "
            "text or a smaller model (--d-model, --num-layers), or let --patience end the run",
        )

    def of_step(self, *, loss: float, learning_rate: float) -> str | None:
        """After each step: does the training loss rise?"""
        self.steps += 1
        self.mean += (loss - self.mean) * max(1 - _DECAY, 1 / self.steps)
        if self.steps < _SETTLED:
            return None
        self.lowest = self.mean if self.lowest is None else min(self.lowest, self.mean)
        if self.mean <= self.lowest + _RISE:
            return None
        return self._once(
            "divergence",
            f"the training loss rises, from {self.lowest:.3f} at its lowest to {self.mean:.3f}: stop with Ctrl-C and "
            f"start again with a lower --learning-rate (now {learning_rate:g})",
        )

    def of_evaluation(self, *, loss: float, best: float, best_step: int, without_gain: int) -> str | None:
        """After each evaluation: does the validation loss turn up while the training loss falls?"""
        if without_gain == 0:
            self.at_best = self.mean
            return None
        falls = self.at_best is not None and self.mean < self.at_best
        if without_gain < _WITHOUT_GAIN or loss <= best or not falls:
            return None
        return self._once(
            "overfitting",
            f"the validation loss turns up, from {best:.4f} at step {best_step:,} to {loss:.4f}, while the training "
            f"loss falls: the model learns the text by heart; step {best_step:,} is kept, --patience {without_gain} "
            "would stop here; more text, more --dropout or a smaller model goes further",
        )

    def state(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return asdict(self)

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> "Advice":
        """What `state` gave.

        Raises:
            ValueError: it is something else.
        """
        kinds = {"steps": int, "mean": float, "lowest": float | None, "at_best": float | None, "said": list}
        if state.keys() != kinds.keys() or not all(isinstance(state[name], kinds[name]) for name in kinds):
            raise ValueError(f"expected advice of {', '.join(kinds)}, got {dict(state)}")
        return cls(**state)

    def _once(self, about: str, line: str) -> str | None:
        if about in self.said:
            return None
        self.said.append(about)
        return line
