"""What has a say in the next token beside the network: counts of the training text, and a pointer into the window.

Knows nothing of the layers below.
"""

import math

import torch
from torch import Tensor, nn

from sightline.cache import Cache
from sightline.counts import Counts

# A share of zero has no logarithm. What this adds to a sum of shares is below its rounding.
_LEAST = 1e-30
# The gate's first odds for counts, as a logarithm: a short run would be over before a gate has learned as much.
_TRUST = 2.0


class Pointer(nn.Module):
    """One more head of attention, which copies: its weight on a token is that token's share of being the next.

        share[i](w) = sum over j <= i with tokens[j] = w of softmax_j(query(x[i]) . key(x[j]) / sqrt(d_model))

    Source: Merity et al. 2016, Pointer sentinel mixture models, without the sentinel.

    >>> pointer = Pointer(d_model=8)
    >>> tokens = torch.tensor([[3, 1, 3]])
    >>> pointer(torch.zeros(1, 3, 8), *pointer.keep(torch.zeros(1, 3, 8), tokens)).detach()[0, 0, -1]
    tensor([0.3333, 0.3333, 0.3333])
    """

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.query = nn.Linear(d_model, d_model, bias=False)
        self.key = nn.Linear(d_model, d_model, bias=False)

    def keep(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """What a later query needs, as a `Cache` holds it: (batch 1 tokens d_model), (batch 1 tokens 1)."""
        return self.key(x)[:, None], tokens[:, None, :, None]

    def forward(self, x: Tensor, keys: Tensor, tokens: Tensor) -> Tensor:
        """The weights (batch 1 queries keys) of the newest of the tokens on all of them, in float32."""
        scores = self.query(x)[:, None] @ keys.mT / math.sqrt(x.shape[-1])
        queries, length = scores.shape[-2:]
        future = torch.ones(queries, length, dtype=torch.bool, device=x.device).triu(1 + length - queries)
        return scores.float().masked_fill(future, -math.inf).softmax(-1)


class Mixture(nn.Module):
    """The shares that several give the next token, weighed anew at every token.

        p(w) = g_1 network(w) + g_2 counts(w) + g_3 pointer(w),    g = softmax(gate(x, log(1 + how often counted)))

    In training, counts are those of other parts of the text than the one at hand (`Counts.apart`): the gate learns what
    counts are worth on new text, and the network what they do not know.

    Source: Jelinek and Mercer 1980 for mixing, Mikolov et al. 2011 for counts beside a network.
    """

    def __init__(self, vocabulary: int, d_model: int, *, counts: int, pointer: bool) -> None:
        super().__init__()
        self.counts = Counts(vocabulary, longest=counts) if counts else None
        self.pointer = Pointer(d_model) if pointer else None
        self.gate = nn.Linear(d_model + max(0, counts - 1), 1 + bool(counts) + pointer)
        self.trust_counts()

    @torch.no_grad()
    def trust_counts(self) -> None:
        """Gives counts, where they are, most of the say: at first they know more than a network that knows nothing."""
        self.gate.bias.zero_()
        if self.counts is not None:
            self.gate.bias[1] = _TRUST

    def weigh(self, x: Tensor, support: Tensor | None) -> list[Tensor]:
        """The logarithms of the weights of network, counts and pointer, as far as they are there: (batch tokens)."""
        if support is not None:
            x = torch.cat((x, support.to(x.dtype)), dim=-1)
        return list(self.gate(x).float().log_softmax(-1).unbind(-1))

    def of_targets(
        self, x: Tensor, tokens: Tensor, targets: Tensor, starts: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The logarithms of the network's weight, and of what the others together give each target: (batch tokens).

        `starts` (batch) are the places of the windows in the counted text, whose counts are then `Counts.apart`.
        """
        shares, support = [], None
        if self.counts is not None and starts is not None:
            places = starts[:, None] + torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
            share, support = self.counts.apart(places)
            shares.append(share)
        elif self.counts is not None:
            shares.append(self.counts.probability(tokens, targets))
            support = self.counts.support(tokens)
        if self.pointer is not None:
            there = targets[:, :, None] == tokens[:, None]
            shares.append((self.pointer(x, *self.pointer.keep(x, tokens))[:, 0] * there).sum(-1))
        network, *weights = self.weigh(x, support)
        logs = [weight + (share + _LEAST).log() for weight, share in zip(weights, shares, strict=True)]
        return network, torch.stack(logs).logsumexp(0)

    def forward(
        self, x: Tensor, logits: Tensor, tokens: Tensor, past: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """The logarithms of all shares (batch tokens vocabulary), from the network's logits of the last of the tokens.

        `past` came before `tokens`; a cache holds both, and the pointer's keys as its last layer.
        """
        kept = None
        if self.pointer is not None:
            kept = self.pointer.keep(x, tokens) if cache is None else cache.read(-1)
        first = x.shape[1] - logits.shape[1]
        if first:
            past = tokens[:, :first] if past is None else torch.cat((past, tokens[:, :first]), dim=1)
            x, tokens = x[:, first:], tokens[:, first:]
        support = None if self.counts is None else self.counts.support(tokens, past)
        weights = [weight.exp()[..., None] for weight in self.weigh(x, support)]
        total = weights.pop(0) * logits.float().softmax(-1)
        if self.counts is not None:
            total = total + weights.pop(0) * self.counts.shares(tokens, past)
        if self.pointer is not None and kept is not None:
            pointed = weights.pop(0) * self.pointer(x, *kept)[:, 0]
            total = total.scatter_add(-1, kept[1][:, :, :, 0].expand_as(pointed), pointed)
        return (total + _LEAST).log()
