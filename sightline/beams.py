"""Searching for a target: the likeliest of several kept side by side (beam search), or one drawn token by token.

`DecodeConfig` says how. All sources of a batch go together. Knows nothing of text.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sightline.encoder_decoder import EncoderDecoder, TargetCache
from sightline.generation import SampleConfig, draw
from sightline.models import evaluating


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """How a target is searched for, and when to stop."""

    beam: int = 4
    """Targets kept side by side; 1: the likeliest token at every step (greedy)."""
    length_penalty: float = 0.6
    """The score of n tokens is their log-probability / ((5 + n) / 6) ** length_penalty: above 0 favours longer ones."""
    tokens: int | None = None
    """Tokens of a target at most. None: 50 more than the source has, as in the paper."""
    temperature: float | None = None
    """Draw tokens with the logits divided by this, in place of searching for the likeliest."""
    top_p: float = 1.0
    """Draw only among the likeliest tokens that together reach this probability."""
    seed: int | None = None
    """The same seed draws the same targets."""

    def __post_init__(self) -> None:
        for name in ("beam", "tokens"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        if not (math.isfinite(self.length_penalty) and self.length_penalty >= 0):
            raise ValueError(f"length_penalty must be a number of at least 0, got {self.length_penalty}")
        if self.temperature is None and (self.top_p != 1 or self.seed is not None):
            raise ValueError("top_p and seed are about drawing and have no effect without a temperature: give one")
        if self.temperature is not None and self.beam not in (1, DecodeConfig.beam):
            raise ValueError(f"a target is drawn or searched for, but temperature and beam {self.beam} were given")
        if self.temperature is not None:
            self.sampling  # noqa: B018 (it checks the numbers)

    @property
    def sampling(self) -> SampleConfig:
        """How a token is drawn."""
        assert self.temperature is not None
        return SampleConfig(temperature=self.temperature, top_p=self.top_p, seed=self.seed)


def find_targets(
    model: EncoderDecoder, source: Tensor, source_lengths: Tensor, end: int, config: DecodeConfig = DecodeConfig()
) -> list[list[int]]:
    """The target that is found for each source (batch tokens): ids, without the `end` before and after it.

    Targets are at most as long as the context. A target that reaches the limit is cut there. The search ends when no
    target that goes on could beat those that have ended. The keys and values of a source are computed once, those of a
    target are kept and follow it when targets live on and die. The model reads in evaluation mode.

    Source: Wu et al. 2016, section 7 for the length penalty; Vaswani et al. 2017, section 6.1 for the numbers.

    >>> from sightline.encoder_decoder import EncoderDecoderConfig
    >>> model = EncoderDecoder(EncoderDecoderConfig(vocabulary=9, context=16, d_model=32, num_layers=1))
    >>> len(find_targets(model, torch.tensor([[3, 4], [5, 0]]), torch.tensor([2, 1]), end=0))
    2
    """
    with evaluating(model), torch.no_grad():
        memory = model.encode(source, source_lengths)
        limits = source_lengths + 50 if config.tokens is None else torch.full_like(source_lengths, config.tokens)
        limits = limits.clamp(max=model.config.context - 1)
        if config.temperature is not None:
            return _drawn(_Steps(model, memory, source_lengths, 1, int(limits.max())), limits, end, config.sampling)
        steps = _Steps(model, memory, source_lengths, config.beam, int(limits.max()))
        return _Search(steps, limits, end, config).run()


class _Steps:
    """The next token's logits of all targets, one token at a time."""

    def __init__(
        self, model: EncoderDecoder, memory: Tensor, source_lengths: Tensor, beams: int, capacity: int
    ) -> None:
        self.model, self.memory, self.lengths, self.beams = model, memory, source_lengths, beams
        sources, tokens, _ = memory.shape
        self.cache: TargetCache = model.new_cache(sources, tokens, beams=beams, capacity=capacity + 1)

    def __call__(self, newest: Tensor) -> Tensor:
        """(targets vocabulary), after the newest token of each target (targets)."""
        features = self.model.decode(newest[:, None], self.memory, self.lengths, cache=self.cache)
        return self.model.logits(features[:, -1])


class _Search:
    """Beam search; targets are (sources beams), the best first."""

    def __init__(self, steps: _Steps, limits: Tensor, end: int, config: DecodeConfig) -> None:
        self.steps, self.limits, self.end, self.config = steps, limits, end, config
        sources, beams = len(limits), config.beam
        self.tokens = limits.new_full((sources, beams, 1), end)
        self.scores = torch.full((sources, beams), -math.inf, dtype=torch.float64, device=limits.device)
        self.scores[:, 0] = 0.0  # else every beam would begin alike
        self.first = torch.arange(sources, device=limits.device)[:, None] * beams
        self.last_divisor = ((6 + limits.double()) / 6) ** config.length_penalty
        self.best: list[tuple[float, list[int]]] = [(-math.inf, [])] * sources

    def run(self) -> list[list[int]]:
        """The best target of each source."""
        for length in range(1, int(self.limits.max()) + 2):
            log_shares = self.steps(self.tokens[:, :, -1].flatten()).double().log_softmax(-1)
            self._step(log_shares.view(*self.scores.shape, -1), length)
            if not self.scores.isfinite().any():
                break
        return [tokens for _, tokens in self.best]

    def _step(self, log_shares: Tensor, length: int) -> None:
        beams, vocabulary = self.config.beam, log_shares.shape[-1]
        totals = self.scores[..., None] + log_shares
        # Of twice as many candidates at most one a beam ends, so enough are left that go on.
        scores, places = totals.flatten(1).topk(min(2 * beams, beams * vocabulary))
        rows, tokens = places // vocabulary, places % vocabulary
        ends = (tokens == self.end) & scores.isfinite()
        for source, candidate in ends[:, :beams].nonzero().tolist():
            self._finish(source, float(scores[source, candidate]), int(rows[source, candidate]), length)
        scores = scores.masked_fill(tokens == self.end, -math.inf)
        scores, kept = scores.topk(min(beams, scores.shape[1]))
        rows, tokens = rows.gather(1, kept), tokens.gather(1, kept)
        if scores.shape[1] < beams:
            missing = beams - scores.shape[1]
            scores = F.pad(scores, (0, missing), value=-math.inf)
            rows, tokens = F.pad(rows, (0, missing)), F.pad(tokens, (0, missing))
        history = self.tokens.gather(1, rows[..., None].expand(-1, -1, self.tokens.shape[-1]))
        self.tokens = torch.cat((history, tokens[..., None]), -1)
        for source in (length >= self.limits).nonzero().flatten().tolist():
            if self.best[source][0] == -math.inf:  # cut at its limit
                self.best[source] = (float(scores[source, 0]), self.tokens[source, 0, 1:].tolist())
            scores[source] = -math.inf
        self.scores = self._hopeful(scores)
        self.steps.cache.own.reorder((rows + self.first).flatten())

    def _finish(self, source: int, score: float, row: int, length: int) -> None:
        score /= self._divisor(length)
        if score > self.best[source][0]:
            self.best[source] = (score, self.tokens[source, row, 1:].tolist())

    def _hopeful(self, scores: Tensor) -> Tensor:
        """Only what could still beat the best: a sum of logarithms can but fall, and its divisor ends here."""
        best = scores.new_tensor([score for score, _ in self.best])
        beaten = scores[:, 0] / self.last_divisor <= best
        if self.config.beam == 1:
            beaten |= best.isfinite()
        return scores.masked_fill(beaten[:, None], -math.inf)

    def _divisor(self, length: int) -> float:
        return ((5 + length) / 6) ** self.config.length_penalty


def _drawn(steps: _Steps, limits: Tensor, end: int, config: SampleConfig) -> list[list[int]]:
    generator = config.generator()
    newest = torch.full_like(limits, end)
    targets: list[list[int]] = [[] for _ in limits]
    going = set(range(len(limits)))
    for length in range(1, int(limits.max()) + 1):
        logits = steps(newest)
        for row in sorted(going):
            token = draw(logits[row], config, generator)
            newest[row] = token
            if token != end:
                targets[row].append(token)
            if token == end or length >= limits[row]:
                going.discard(row)
        if not going:
            break
    return targets
