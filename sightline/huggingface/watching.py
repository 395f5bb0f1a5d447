"""`watch()`: what the heads of a model of transformers see while it runs, kept for captures.

Knows nothing of browsers. The model's layers are found by their names when they are called.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sightline.attention import attention
from sightline.captures import Capture
from sightline.huggingface.interface import NAME, WATCHERS
from sightline.huggingface.recipes import Recipe
from sightline.masks import Mask
from sightline.recording import Recorder

CROSS = re.compile(r"cross|encoder_attn|encdec", re.IGNORECASE)


@contextmanager
def watch(model: nn.Module, *, layers: Sequence[int] | None = None, top: int = 8) -> Iterator["Seen"]:
    """Keep what the heads of a model of transformers see while the block runs, in O(N) memory; then `capture()` it.

    The model's attention must be "sightline" (see `enable()`). `layers` None means all; `top` is `observe()`'s. Of
    several passes the last is kept; the steps of `generate` with a cache are one pass that grows. Encoder, decoder
    and cross-attention are kept apart. Steps on beams that change places are one text no more: capturing them is
    refused.

    Raises: ValueError for a model with another attention, or a layer that it does not have.

    >>> import sightline as sl
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sl.huggingface.enable()
    >>> shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    >>> config = LlamaConfig(vocab_size=50, **shape, attn_implementation="sightline")
    >>> model = LlamaForCausalLM(config).eval()
    >>> with sl.huggingface.watch(model, layers=[1]) as seen:
    ...     text = model.generate(torch.tensor([[3, 1, 4]]), max_new_tokens=5, do_sample=False)
    >>> capture = seen.capture()
    >>> capture.layers, capture.prompt, len(capture.tokens)  # the last token written has not been read
    ((1,), 3, 7)
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"watch: expected a model of transformers, got {type(model).__name__}: open it first")
    seen = Seen(model, layers=layers, top=top)
    hooks = [
        module.register_forward_pre_hook(seen.read, with_kwargs=True)
        for module in model.modules()
        if hasattr(module, "set_attn_implementation")
    ]
    WATCHERS.append(seen)
    try:
        yield seen
    finally:
        WATCHERS.remove(seen)
        for hook in hooks:
            hook.remove()


class _Stack:
    """The layers of one kind in one part of a model, and what they saw in the last pass."""

    def __init__(self, name: str, layers: Sequence[int]) -> None:
        self.name, self.layers = name, tuple(layers)
        self.kind = "decoder"
        self.recorder: Recorder | None = None
        self.counts = dict.fromkeys(self.layers, 0)
        self.own: list[slice] = []
        self.ids: Tensor | None = None
        self.given = 0
        """Queries of the first call."""
        self.keys = 0
        """Of the first call."""
        self.last_key: Tensor | None = None
        self.in_order = True
        """No sequence took the place of another between two steps."""


class Seen:
    """What was seen while somebody watched; `capture()` gives it text by text."""

    def __init__(self, model: nn.Module, *, layers: Sequence[int] | None, top: int) -> None:
        configs = (getattr(module, "config", None) for module in model.modules())
        if not any(getattr(config, "_attn_implementation", None) == NAME for config in configs):
            raise ValueError(
                f"watch: expected attn_implementation={NAME!r}, and this {type(model).__name__} has another; "
                f"call sl.huggingface.enable() and model.set_attn_implementation({NAME!r})"
            )
        self._model, self._top = model, top
        self._names = {module: name for name, module in model.named_modules()}
        there = {_layer(name) for name in self._names.values()} - {None}
        for layer in layers or ():
            if layer not in there:
                raise ValueError(f"watch: {type(model).__name__} has no layer {layer}")
        self._layers = None if layers is None else set(layers)
        self._read: dict[str, Tensor] = {}
        self._stacks: dict[str, _Stack] = {}
        self._first_query = 0
        """Of the decoder, for the cross-attention that follows."""

    @property
    def stacks(self) -> tuple[str, ...]:
        """The parts of the model that were seen, by the names of their attention modules."""
        return tuple(name for name, stack in self._stacks.items() if stack.recorder is not None)

    def capture(self, tokenizer: Any = None, *, of: str | None = None, sequence: int = 0) -> Capture:
        """What was seen of one sequence of the batch: the same `Capture` as of our own models.

        `tokenizer` is the model's; None shows ids. `of` is "decoder", "encoder", "cross", or a part of one of the
        names in `stacks`; None is the decoder, or the only part there is.

        Raises: ValueError for nothing seen, no such part or several, or beams that changed places.
        """
        stack = self._chosen(of)
        if not stack.in_order:
            raise ValueError("watch: beams changed places between steps, so no row is one text; use num_beams=1")
        if not 0 <= sequence < len(stack.own):
            raise ValueError(
                f"watch: {len(stack.own)} sequences were seen, so there is no {sequence}; they count from 0"
            )
        assert stack.recorder is not None
        counts = next(iter(stack.counts.values()))
        numbers, own = self._numbers(stack, sequence, counts)
        texts = _texts(tokenizer, numbers)
        options: dict[str, Any] = {"sequence": sequence, "model": self._description(stack), "separator": ""}
        if stack.kind == "cross":
            query_texts = _texts(tokenizer, self._cross_queries(stack, sequence, counts))
            return stack.recorder.capture(texts, query_texts, ids=_ids(numbers), **options)
        prompt = stack.given - own.start if counts > stack.given else None
        return stack.recorder.capture(texts, ids=_ids(numbers), prompt=prompt, **options)

    # What follows is called by the model.

    def read(self, module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        """The tokens that a part of the model is given."""
        ids = options.get("input_ids", arguments[0] if arguments else None)
        if isinstance(ids, Tensor) and ids.ndim == 2 and not ids.is_floating_point():
            self._read[self._names[module]] = ids

    def takes(self, module: nn.Module) -> bool:
        """Whether this module is watched."""
        layer = _layer(self._names.get(module, ""))
        return layer is not None and (self._layers is None or layer in self._layers)

    def see(
        self,
        module: nn.Module,
        tensors: tuple[Tensor, Tensor, Tensor],
        mask: Mask,
        recipe: Recipe | None,
        **options: Any,
    ) -> Tensor:
        """One call of attention, in its place."""
        tensors, mask = _without_room(tensors, mask) if recipe is None else (tensors, mask)
        query, key, _ = tensors
        stack, layer = self._stack(module), _layer(self._names[module])
        assert layer is not None
        if stack.recorder is None:
            stack.kind = _kind(stack.name, causal=mask.after == 0)
        first = self._position(stack, recipe, query, key)
        if stack.recorder is None or (stack.counts[layer] and (stack.counts[layer] != first or not first)):
            self._begin(stack, mask, query, key)
        if layer == stack.layers[0]:
            self._follow(stack, query, key, first)
        assert stack.recorder is not None
        output = stack.recorder(layer, *tensors, mask, **options)
        stack.counts[layer] = first + query.shape[2]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return attention(*tensors, mask, **options)
        return output

    def _stack(self, module: nn.Module) -> _Stack:
        name = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", self._names[module], count=1)
        if name not in self._stacks:
            pattern = re.compile(re.escape(name).replace(r"\*", r"\d+", 1) + "$")
            numbers = {_layer(other) for other in self._names.values() if pattern.match(other)}
            watched = sorted(n for n in numbers if n is not None and (self._layers is None or n in self._layers))
            self._stacks[name] = _Stack(name, watched)
        return self._stacks[name]

    def _position(self, stack: _Stack, recipe: Recipe | None, query: Tensor, key: Tensor) -> int:
        """Where the first query of a call stands in its text."""
        if stack.kind == "cross":
            return self._first_query
        first = key.shape[2] - query.shape[2] if recipe is None else recipe.first_query
        if stack.kind == "decoder":
            self._first_query = first
        return first

    def _begin(self, stack: _Stack, mask: Mask, query: Tensor, key: Tensor) -> None:
        """A new pass: what was seen before is forgotten."""
        stack.own = _own(mask, len(query))
        stack.counts = dict.fromkeys(stack.layers, 0)
        stack.ids, stack.last_key, stack.in_order, stack.given, stack.keys = None, None, True, 0, 0
        padded = any(own != slice(0, None) for own in stack.own)
        options: dict[str, Any] = {"top": self._top, "keys": stack.own if padded else None}
        if stack.kind == "cross":
            before = next(
                (other for other in self._stacks.values() if other.kind == "decoder" and other.recorder), None
            )
            options |= {"same_text": False, "queries": None}
            if before is not None and any(own != slice(0, None) for own in before.own):
                options["queries"] = before.own
        stack.recorder = Recorder(stack.layers, **options)

    def _follow(self, stack: _Stack, query: Tensor, key: Tensor, first: int) -> None:
        """The tokens of the queries, and whether the sequences are still where they were."""
        ids = self._ids_of(stack.name, tuple(query.shape[::2][:2]))
        known = stack.ids
        stack.ids = ids if known is None or ids is None else torch.cat([known, ids], dim=1)
        stack.given = stack.given or first + query.shape[2]
        stack.keys = stack.keys or key.shape[2]
        if stack.last_key is not None and stack.kind == "decoder" and len(key) > 1:
            before = key[:, :, -query.shape[2] - 1]
            stack.in_order &= torch.equal(before, stack.last_key)
            for other in self._stacks.values():
                other.in_order &= stack.in_order or other.kind != "cross"
        stack.last_key = key[:, :, -1].clone()

    def _ids_of(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        """What the innermost part of the model around these layers was given, if it has a token for each query."""
        around = [part for part in self._read if name == part or name.startswith(f"{part}." if part else "")]
        for part in sorted(around, key=len, reverse=True):
            if tuple(self._read[part].shape) == shape:
                return self._read[part]
        return None

    def _chosen(self, of: str | None) -> _Stack:
        seen = [stack for stack in self._stacks.values() if stack.recorder is not None]
        if not seen:
            raise ValueError("watch: nothing was seen; run the model inside the block: with watch(model) as seen: ...")
        if of is None:
            found = [stack for stack in seen if stack.kind == "decoder"] or seen
        else:
            found = [stack for stack in seen if of == stack.kind] or [stack for stack in seen if of in stack.name]
        if len(found) != 1:
            there = ", ".join(f"{stack.name} ({stack.kind})" for stack in seen)
            raise ValueError(f"watch: of={of!r} is {len(found)} of the parts that were seen; name one of {there}")
        return found[0]

    def _numbers(self, stack: _Stack, sequence: int, count: int) -> tuple[list[int] | int, slice]:
        """The ids of one sequence's own keys, or how many there are."""
        own = stack.own[sequence]
        if stack.kind == "cross":
            encoder = next(
                (other for other in self._stacks.values() if other.kind == "encoder" and other.recorder), None
            )
            if encoder is not None and encoder.ids is not None:
                return encoder.ids[sequence, own].tolist(), own
            return len(range(*own.indices(stack.keys))), own
        if stack.ids is None or stack.ids.shape[1] != count:
            return len(range(*own.indices(count))), own
        return stack.ids[sequence, own].tolist(), own

    def _cross_queries(self, stack: _Stack, sequence: int, count: int) -> list[int] | int:
        decoder = next((other for other in self._stacks.values() if other.kind == "decoder" and other.recorder), None)
        return count if decoder is None else self._numbers(decoder, sequence, count)[0]

    def _description(self, stack: _Stack) -> str:
        return f"{type(self._model).__name__}, {stack.name}"


def _layer(name: str) -> int | None:
    """The first number in the name of a module."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def _kind(name: str, *, causal: bool) -> str:
    last = name.rpartition("*")[2]
    if CROSS.search(last):
        return "cross"
    if "decoder" in name:
        return "decoder"
    return "decoder" if causal else "encoder"


def _without_room(tensors: tuple[Tensor, Tensor, Tensor], mask: Mask) -> tuple[tuple[Tensor, Tensor, Tensor], Mask]:
    """A call with a matrix for a mask, without the keys at the end that its newest query does not see."""
    query, key, value = tensors
    seen = _seen(mask)
    queries, keys = query.shape[2], key.shape[2]
    if seen is None or seen.shape[-2] != queries or queries >= keys:
        return tensors, mask
    newest = seen[:, :, -1].flatten(0, 1).any(0).nonzero().flatten().tolist() or [keys - 1]
    there = newest[-1] + 1
    return (query, key[:, :, :there], value[:, :, :there]), mask.window((0, queries), (0, there))


def _own(mask: Mask, batch: int) -> list[slice]:
    """Which keys are each sequence's own: what is hidden before the first and after the last of them is padding."""
    seen = _seen(mask)
    if seen is None:
        return [slice(0, None)] * batch
    slices = []
    for exists in seen.any(2).expand(batch, -1, -1)[:, 0]:
        places = exists.nonzero().flatten().tolist() or [0]
        slices.append(slice(places[0], None if places[-1] == len(exists) - 1 else places[-1] + 1))
    return slices


def _seen(mask: Mask) -> Tensor | None:
    """(batch 1 queries keys), some of size 1: which pairs the tensors of a mask let see in any head."""
    parts = [None if mask.bias is None else mask.bias > torch.finfo(mask.bias.dtype).min / 2, mask.allowed]
    planes = [part.any(1, keepdim=True) for part in parts if part is not None and part.ndim == 4]
    return None if not planes else planes[0] if len(planes) == 1 else planes[0] & planes[1]


def _ids(numbers: list[int] | int) -> list[int]:
    return list(range(numbers)) if isinstance(numbers, int) else numbers


def _texts(tokenizer: Any, numbers: list[int] | int) -> list[str]:
    """Each token as it stands in the text; a token that is no whole character as the tokenizer names it."""
    if tokenizer is None or isinstance(numbers, int):
        return list(map(str, _ids(numbers)))
    # Alone, a token would lose the space before it; behind another it does not.
    anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]
    before = tokenizer.decode(anchor)
    texts = {}
    for number in set(numbers):
        text = tokenizer.decode([*anchor, number], clean_up_tokenization_spaces=False)
        text = text[len(before) :] if text.startswith(before) else tokenizer.decode([number])
        if not text or "\ufffd" in text:
            # A model may have more ids than its tokenizer has names.
            text = tokenizer.convert_ids_to_tokens(number) or f"<{number}>"
        texts[number] = text
    return [texts[number] for number in numbers]
