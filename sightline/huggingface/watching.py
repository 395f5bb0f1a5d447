"""`watch()`: what the heads of a model of transformers see while it runs, kept for captures.

Knows nothing of browsers. The model's layers are found by their names when they are called.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from numbers import Integral
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from sightline.attention import attention
from sightline.captures import Capture
from sightline.huggingface.interface import NAME, WATCHERS
from sightline.huggingface.recipes import Recipe
from sightline.huggingface.stacks import GUESSED, Stack, kind_of, layer_of, own_keys, without_room
from sightline.masks import Mask
from sightline.recording import Recorder
from sightline.tokenizers import Tokenizer, text_of_bytes

GUESSING = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")
"""What lets `generate` guess tokens and take some back."""
ASKED = ("encode", "decode", "convert_ids_to_tokens")
"""What a tokenizer is asked for."""


@contextmanager
def watch(model: nn.Module, *, layers: Sequence[int] | None = None, top: int = 8) -> Iterator["Seen"]:
    """Keep what the heads of a model of transformers see while the block runs, in O(N) memory; then `capture()` it.

    The model's attention must be "sightline" (see `enable()`). `layers` None means all that have such attention;
    `top` is `observe()`'s. Of several passes the last is kept; the steps of `generate` with a cache are one pass that
    grows, and so are the pieces of a prompt (`prefill_chunk_size`). Encoder, decoder and cross-attention are kept
    apart. Of a cache that was filled before the block the keys are seen, but not the tokens: they are shown as
    numbers, and the queries begin after them.

    Steps on beams that change places are one text no more, and tokens that are guessed and taken back (assisted
    decoding, prompt lookup) were never one: capturing them is refused.

    Raises: ValueError for a model with another attention, a layer that it does not have, or `top` below 1.

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
    parts = [module for module in model.modules() if hasattr(module, "set_attn_implementation")]
    hooks = [module.register_forward_pre_hook(seen.read, with_kwargs=True) for module in parts]
    before = [(part, part.__dict__.get("generate")) for part in parts if hasattr(type(part), "generate")]
    for part, method in before:
        part.__dict__["generate"] = MethodType(seen.listening(part, method), part)
    WATCHERS.append(seen)
    try:
        yield seen
    finally:
        WATCHERS.remove(seen)
        for part, method in before:
            part.__dict__.update(generate=method) if method else part.__dict__.pop("generate")
        for hook in hooks:
            hook.remove()


class Seen:
    """What was seen while somebody watched; `capture()` gives it text by text."""

    def __init__(self, model: nn.Module, *, layers: Sequence[int] | None, top: int) -> None:
        configs = (getattr(module, "config", None) for module in model.modules())
        if not any(getattr(config, "_attn_implementation", None) == NAME for config in configs):
            raise ValueError(
                f"watch: expected attn_implementation={NAME!r}, and this {type(model).__name__} has another; "
                f"call sl.huggingface.enable() and model.set_attn_implementation({NAME!r})"
            )
        if layers is not None and not (
            isinstance(layers, Iterable) and (layers := list(layers)) and all(map(_is_whole, layers))
        ):
            raise ValueError(f"watch: expected layers like [0, 2], or None for all; got {layers!r}")
        if not _is_whole(top) or top < 1:
            raise ValueError(f"watch: expected top to be a whole number, 1 or more; got {top!r}")
        self._model, self._top = model, top
        self._names = {module: name for name, module in model.named_modules()}
        there = {layer_of(name) for name in self._names.values()} - {None}
        for layer in layers or ():
            if layer not in there:
                raise ValueError(f"watch: {type(model).__name__} has no layer {layer}")
        self._layers = None if layers is None else set(layers)
        self._read: dict[str, Tensor] = {}
        self._stacks: dict[str, Stack] = {}
        self._first_query = 0
        """Of the decoder, for the cross-attention that follows."""
        self._forward = self._generation = 0
        """How many calls of the model's parts, and of `generate`, there were."""
        self._given: int | None = None
        """How many tokens `generate` was given, while it runs."""
        self._embedded = self._guessing = False
        """It was given vectors; it goes on from tokens that were guessed."""

    @property
    def stacks(self) -> tuple[str, ...]:
        """The parts of the model that were seen, by the names of their attention modules."""
        return tuple(name for name, stack in self._stacks.items() if stack.recorder is not None)

    def capture(self, tokenizer: Any = None, *, of: str | None = None, sequence: int = 0) -> Capture:
        """What was seen of one sequence of the batch: the same `Capture` as of our own models.

        `tokenizer` is the model's; None shows ids. `of` is "decoder", "encoder", "cross", or a part of one of the
        names in `stacks`; None is the decoder, or the only part there is.

        Raises: ValueError for nothing seen, no such part or several, a tokenizer that is none, or what is no text:
        beams that changed places, tokens that were taken back, layers of different shapes or called twice.
        """
        stack = self._chosen(of)
        reason = stack.reason()
        if stack.kind == "cross" and (decoder := self._first("decoder")):
            reason = reason or decoder.reason()
        if reason is not None:
            raise ValueError(f"watch: {reason}")
        if not 0 <= sequence < len(stack.own):
            raise ValueError(
                f"watch: {len(stack.own)} sequences were seen, so there is no {sequence}; they count from 0"
            )
        assert stack.recorder is not None
        counts = stack.counts[stack.leader]
        numbers, own = self._numbers(stack, sequence, counts)
        if not len(_ids(numbers)):
            raise ValueError(f"watch: sequence {sequence} is padding alone, so nothing was seen of it")
        if stack.kind == "decoder" and own.stop is not None and counts > stack.keys:
            raise ValueError(
                f"watch: sequence {sequence} has padding behind its first {own.stop - own.start} tokens and went on "
                "after it; give the tokenizer padding_side='left'"
            )
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
        self._forward += 1
        ids = options.get("input_ids", arguments[0] if arguments else None)
        if isinstance(ids, Tensor) and ids.ndim == 2 and not ids.is_floating_point():
            self._read[self._names[module]] = ids

    def listening(self, part: Any, method: Callable | None) -> Callable:
        """`generate` of a part of the model, or the method in its place, of which is known what it was given."""

        @wraps(method or type(part).generate)
        def listened(model: Any, *arguments: Any, **options: Any) -> Any:
            before = self._given, self._embedded, self._guessing
            config = options.get("generation_config") or getattr(model, "generation_config", None)
            asked = [options.get(name) or getattr(config, name, None) for name in GUESSING]
            vectors = options.get("inputs_embeds")
            given = options.get("input_ids", options.get("inputs", arguments[0] if arguments else None))
            given, self._embedded = (given, False) if vectors is None else (vectors, True)
            self._given = None
            if isinstance(given, Tensor) and not getattr(model.config, "is_encoder_decoder", False):
                self._given = given.shape[1] if given.ndim == 2 + self._embedded else None
            self._guessing |= any(asked)
            self._generation += 1
            try:
                return method(*arguments, **options) if method else type(model).generate(model, *arguments, **options)
            finally:
                self._given, self._embedded, self._guessing = before

        return listened

    def takes(self, module: nn.Module) -> bool:
        """Whether this module is watched."""
        layer = layer_of(self._names.get(module, ""))
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
        tensors, mask = without_room(tensors, mask) if recipe is None else (tensors, mask)
        query, key, _ = tensors
        stack, layer = self._stack(module), layer_of(self._names[module])
        assert layer is not None
        if torch._C._current_graph_task_id() != -1:  # gradient checkpointing computes again what was seen
            return attention(*tensors, mask, **options)
        if stack.recorder is None:
            stack.kind = kind_of(stack.name, module, mask)
        first = self._position(stack, recipe, query, key)
        if stack.begins(layer, first, forward=self._forward, generation=self._generation):
            self._begin(stack, layer, first, mask, query, key)
        if self._guessing:
            stack.refusal = GUESSED
        stack.meet(layer, query, key, mask, first)
        if layer == stack.leader:
            self._follow(stack, mask, query, key, first)
        output = None
        if stack.refusal is None:
            assert stack.recorder is not None
            output = stack.recorder(layer, *tensors, mask, **options)
        stack.counts[layer] = first + query.shape[2]
        if output is None or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)):
            return attention(*tensors, mask, **options)
        return output

    def _stack(self, module: nn.Module) -> Stack:
        name = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", self._names[module], count=1)
        pattern = re.compile(re.escape(name).replace(r"\*", r"\d+", 1) + "$")
        if name in self._stacks and layer_of(self._names[module]) not in self._stacks[name].layers:
            name += f" ({type(module).__name__})"
        if name not in self._stacks:
            # Under one name some layers may have no attention, but something else.
            alike = (other for other, it in self._names.items() if type(other) is type(module) and pattern.match(it))
            numbers = {layer_of(self._names[other]) for other in alike}
            watched = sorted(n for n in numbers if n is not None and (self._layers is None or n in self._layers))
            self._stacks[name] = Stack(name, watched)
        return self._stacks[name]

    def _position(self, stack: Stack, recipe: Recipe | None, query: Tensor, key: Tensor) -> int:
        """Where the first query of a call stands in its text."""
        if stack.kind == "cross":
            return self._first_query
        first = key.shape[2] - query.shape[2] if recipe is None else recipe.first_query
        if stack.kind == "decoder":
            self._first_query = first
        return first

    def _begin(self, stack: Stack, layer: int, first: int, mask: Mask, query: Tensor, key: Tensor) -> None:
        """A new pass: what was seen before is forgotten."""
        stack.forget(layer, first)
        stack.own = own_keys(mask, len(query), key.shape[2], pending=stack.kind == "decoder")
        options: dict[str, Any] = {"top": self._top, "keys": stack.own if stack.padded else None}
        if stack.kind == "cross":
            before = self._first("decoder")
            options |= {"same_text": False, "queries": before.own if before and before.padded else None}
        elif stack.kind == "decoder":
            options["room"] = self._given or 0
        stack.recorder = Recorder(stack.layers, **options)

    def _first(self, kind: str) -> Stack | None:
        return next((stack for stack in self._stacks.values() if stack.kind == kind and stack.recorder), None)

    def _follow(self, stack: Stack, mask: Mask, query: Tensor, key: Tensor, first: int) -> None:
        """The tokens of the queries, and where their sequences begin."""
        ids = self._ids_of(stack.name, tuple(query.shape[::2][:2]))
        if not stack.counts[stack.leader]:
            stack.ids, stack.keys = ids, key.shape[2]
            stack.given = first + query.shape[2]
            if stack.kind == "decoder" and self._given is not None and (ids is not None or self._embedded):
                stack.given = self._given if first < self._given else stack.given
        else:
            stack.ids = None if ids is None or stack.ids is None else torch.cat([stack.ids, ids], dim=1)
            stack.learn(mask, first, query.shape[2], key.shape[2])

    def _ids_of(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        """What the innermost part of the model around these layers was given, if it has a token for each query."""
        around = [part for part in self._read if name == part or name.startswith(f"{part}." if part else "")]
        for part in sorted(around, key=len, reverse=True):
            if tuple(self._read[part].shape) == shape:
                return self._read[part]
        return None

    def _chosen(self, of: str | None) -> Stack:
        seen = [stack for stack in self._stacks.values() if stack.recorder is not None]
        if not seen and self._forward:
            layers = "" if self._layers is None else f" of the layers {sorted(self._layers)}"
            raise ValueError(
                f"watch: {type(self._model).__name__} ran, and no attention{layers} went through transformers' "
                "AttentionInterface; what has another kind of layer there cannot be watched"
            )
        if not seen:
            raise ValueError("watch: nothing was seen; run the model inside the block: with watch(model) as seen: ...")
        if of is None:
            found = [stack for stack in seen if stack.kind == "decoder"] or seen
        else:
            found = [stack for stack in seen if of == stack.kind] or [stack for stack in seen if of == stack.name]
            found = found or [stack for stack in seen if of in stack.name]
        if len(found) != 1:
            there = ", ".join(f"{stack.name} ({stack.kind})" for stack in seen)
            raise ValueError(f"watch: of={of!r} is {len(found)} of the parts that were seen; name one of {there}")
        return found[0]

    def _numbers(self, stack: Stack, sequence: int, count: int) -> tuple[list[int] | int, slice]:
        """The ids of one sequence's own keys, or how many there are."""
        own = stack.own[sequence]
        if stack.kind == "cross":
            encoder = self._first("encoder")
            if encoder is not None and encoder.ids is not None:
                return encoder.ids[sequence, own].tolist(), own
            return len(range(*own.indices(stack.keys))), own
        if stack.ids is None or stack.ids.shape[1] != count:
            return len(range(*own.indices(count))), own
        return stack.ids[sequence, own].tolist(), own

    def _cross_queries(self, stack: Stack, sequence: int, count: int) -> list[int] | int:
        decoder = self._first("decoder")
        return count if decoder is None else self._numbers(decoder, sequence, count)[0]

    def _description(self, stack: Stack) -> str:
        return f"{type(self._model).__name__}, {stack.name}"


def _ids(numbers: list[int] | int) -> list[int]:
    return list(range(numbers)) if isinstance(numbers, int) else numbers


def _is_whole(number: Any) -> bool:
    return isinstance(number, Integral) and not isinstance(number, bool)


def _texts(tokenizer: Any, numbers: list[int] | int) -> list[str]:
    """Each token as it stands in the text; a token that is no whole character as the tokenizer names it."""
    if isinstance(tokenizer, Tokenizer):
        return _texts(None, numbers) if isinstance(numbers, int) else tokenizer.pieces(numbers)
    if tokenizer is not None and not all(hasattr(tokenizer, name) for name in ASKED):
        raise ValueError(f"watch: expected the tokenizer of the model, or None; got {type(tokenizer).__name__}")
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
            name = tokenizer.convert_ids_to_tokens(number) or f"<{number}>"
            text = text_of_bytes(name) if "\ufffd" in text else name
        texts[number] = text
    return [texts[number] for number in numbers]
