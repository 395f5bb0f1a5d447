"""`Stack`: the layers of one kind in one part of a model, what they saw in the last pass, and why that is no capture.

Knows nothing of models and texts: it is told of each call of attention.
"""

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sightline.masks import Mask
from sightline.recording import Recorder

CROSS = re.compile(r"cross|encoder_attn|encdec", re.IGNORECASE)

SWAPPED = "beams changed places between steps, so no row is one text; use num_beams=1"
GUESSED = (
    "tokens were guessed and taken back (assisted decoding, prompt lookup), and what was seen of them cannot be; "
    "generate without assistant_model and prompt_lookup_num_tokens"
)
WENT_BACK = (
    "the cache was cropped and the text went on from an earlier token, and what was seen after it cannot be taken "
    "back; run the text in one go, or in a block of its own"
)
SHAPES = "layers of different shapes"
REPEATED = "layers called more than once in a pass"


class Stack:
    """The layers of one kind in one part of a model, and what they saw in the last pass."""

    def __init__(self, name: str, layers: Sequence[int]) -> None:
        self.name, self.layers = name, tuple(layers)
        self.kind = "decoder"
        self.recorder: Recorder | None = None
        self.generation = 0
        """Which call of `generate` the newest call came from."""
        self._forwards = dict.fromkeys(self.layers, 0)
        """Which forward of the model the newest call of each layer came from."""
        self.forget(0, 0)

    def forget(self, layer: int, first: int) -> None:
        """A new pass, which begins with this layer at this query."""
        self.leader, self.start = layer, first
        self.counts = dict.fromkeys(self.layers, 0)
        self.refusal: str | None = None
        """Why what was seen is no capture; nothing more is recorded then."""
        self.own: list[slice] = []
        self.ids: Tensor | None = None
        self.given = 0
        """How many tokens were given, the others being written."""
        self.keys = 0
        """Of the first call."""
        self._repeated: set[int] = set()
        self._shapes: dict[int, tuple[int, ...]] = {}
        self._witness: tuple[int, bool, Tensor] | None = None
        """A layer, whether it sees all keys, and its keys of the newest call."""

    @property
    def padded(self) -> bool:
        return any(own != slice(0, None) for own in self.own)

    def learn(self, mask: Mask, first: int, queries: int, keys: int) -> None:
        """Of a later call: where those begin that were all padding until its first query."""
        pending = [number for number, own in enumerate(self.own) if own.start >= first > 0]
        if pending and self.kind == "decoder":
            left_out = first + queries - keys
            found = own_keys(mask, len(self.own), keys, pending=True)
            for number in pending:
                self.own[number] = slice(left_out + found[number].start, None)

    def begins(self, layer: int, first: int, *, forward: int, generation: int) -> bool:
        """Whether a call, whose first query stands at `first`, begins a new pass."""
        known, same = self.counts[layer], generation == self.generation
        again = 0 < forward == self._forwards[layer]
        self._forwards[layer], self.generation = forward, generation
        if self.recorder is None:
            return True
        if known and again:
            self.refusal = self.refusal or REPEATED
            self._repeated.add(layer)
            return False
        if not known or first == known:
            return False
        if same and self.start < first < known:
            self.refusal = self.refusal or WENT_BACK
            return False
        return True

    def meet(self, layer: int, query: Tensor, key: Tensor, mask: Mask, first: int) -> None:
        """One call: whether it fits to the others, and whether the sequences are still where they were."""
        shape = (len(query), *query.shape[1::2], key.shape[1])
        if self._shapes.setdefault(layer, shape) != shape:
            self.refusal = self.refusal or "the batch changed in the middle of a text; run each batch to its end"
        elif shape != self._shapes[self.leader]:
            self.refusal = self.refusal or SHAPES
        if self.kind != "cross":
            self._expect_one_text(query.shape[2], key.shape[2], first)
        if self.kind == "decoder" and len(key) > 1 and self.refusal is None:
            self._compare(layer, key, query.shape[2], everywhere=mask.before is None and mask.segments is None)

    def _expect_one_text(self, queries: int, keys: int, first: int) -> None:
        if queries > keys:
            self.refusal = (
                f"{self.name} has {queries} queries on {keys} keys, so its keys are no tokens; watch other layers"
            )
        elif not self.start or first != self.start:
            return
        elif first + queries > keys:
            self.refusal = (
                f"the cache was filled before the block, and of its {first} tokens the oldest are gone; run the whole "
                "text inside the block"
            )

    def _compare(self, layer: int, key: Tensor, queries: int, *, everywhere: bool) -> None:
        """All keys of one layer with those of the call before: in layer 0 one key alone tells its token, no more.

        Taken is the last layer that sees all keys, or else the last: its keys follow from the most tokens.
        """
        if not self.counts[layer]:
            if self._witness is None or everywhere or not self._witness[1]:
                self._witness = layer, everywhere, key.clone()
        elif self._witness is not None and layer == self._witness[0]:
            before, past = self._witness[2], key.shape[2] - queries
            count = min(past, before.shape[2])
            now, then = key[:, :, past - count : past], before[:, :, before.shape[2] - count :]
            if not torch.allclose(now, then, rtol=0, atol=0, equal_nan=True):
                self.refusal = SWAPPED
            self._witness = *self._witness[:2], key.clone()

    def reason(self) -> str | None:
        """Why what was seen is no capture, in words."""
        if self.refusal == REPEATED:
            called = f"{_layers(sorted(self._repeated))} of {self.name}"
            return (
                f"{called}: called more than once in a pass, as one module for several layers is, or attention in two "
                "parts; such a model cannot be watched: output_attentions=True gives what each call saw"
            )
        if self.refusal == SHAPES:
            kinds: dict[tuple[int, ...], list[int]] = {}
            for layer, shape in sorted(self._shapes.items()):
                kinds.setdefault(shape, []).append(layer)
            described = "; ".join(
                f"{_layers(layers)}: batch {batch}, {heads} heads of {width}, {groups} groups"
                for (batch, heads, width, groups), layers in kinds.items()
            )
            return (
                f"the layers of {self.name} have different shapes, and a capture holds one ({described}); watch one "
                f"kind: watch(model, layers={next(iter(kinds.values()))})"
            )
        whole = [layer for layer, count in self.counts.items() if count == self.counts[self.leader]]
        if self.refusal is None and len(whole) < len(self.layers):
            missing = [layer for layer in self.layers if layer not in whole]
            return (
                f"{_layers(missing)} of {self.name} did not see what {_layers(whole)} saw; run the model to its end, "
                f"or watch(model, layers={whole})"
            )
        return self.refusal


def layer_of(name: str) -> int | None:
    """The first number in the name of a module."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def kind_of(name: str, module: nn.Module, mask: Mask) -> str:
    """What the layers do: the name tells it first, then the mask, then the module.

    A decoder whose first tokens see both ways has a mask that does not look like one.
    """
    if CROSS.search(name.rpartition("*")[2]):
        return "cross"
    if "decoder" in name or mask.after == 0:
        return "decoder"
    return "decoder" if getattr(module, "is_causal", False) is True and "encoder" not in name else "encoder"


def without_room(tensors: tuple[Tensor, Tensor, Tensor], mask: Mask) -> tuple[tuple[Tensor, Tensor, Tensor], Mask]:
    """A call with a matrix for a mask, without the keys at the end that its newest query does not see."""
    query, key, value = tensors
    seen = _pairs_seen(mask)
    queries, keys = query.shape[2], key.shape[2]
    if seen is None or seen.shape[-2] != queries or queries >= keys:
        return tensors, mask
    newest = seen[:, :, -1].flatten(0, 1).any(0).nonzero().flatten().tolist() or [keys - 1]
    there = newest[-1] + 1
    return (query, key[:, :, :there], value[:, :, :there]), mask.window((0, queries), (0, there))


def own_keys(mask: Mask, batch: int, keys: int, *, pending: bool) -> list[slice]:
    """Which keys are each sequence's own: what is hidden before the first and after the last of them is padding.

    With `pending`, a sequence of which no key is seen begins after them.
    """
    seen = _pairs_seen(mask)
    if seen is None:
        return [slice(0, None)] * batch
    slices = []
    for exists in seen.any(2).expand(batch, -1, -1)[:, 0]:
        places = exists.nonzero().flatten().tolist() or [keys if pending else 0]
        slices.append(slice(places[0], None if places[-1] >= keys - 1 else places[-1] + 1))
    return slices


def _pairs_seen(mask: Mask) -> Tensor | None:
    """(batch 1 queries keys), some of size 1: which pairs the tensors of a mask let see in any head."""
    parts = [None if mask.bias is None else mask.bias > torch.finfo(mask.bias.dtype).min / 2, mask.allowed]
    planes = [part.any(1, keepdim=True) for part in parts if part is not None and part.ndim == 4]
    return None if not planes else planes[0] if len(planes) == 1 else planes[0] & planes[1]


def _layers(layers: Sequence[int]) -> str:
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"
