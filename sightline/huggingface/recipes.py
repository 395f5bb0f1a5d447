"""The mask of a transformers model as a recipe: what its mask functions say, as a `Mask`, never as a matrix.

transformers builds masks through a function registered under the name of the attention. Ours returns a `Recipe`: a
tensor without elements, so that it travels wherever a mask does, with the `Mask` as an attribute.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sightline.masks import Causal, Mask, Segments, Window

DENSE_PAIRS = 4096 * 4096
"""Up to this many pairs of a query and a key, a pattern that is not known is asked for each of them."""
METADATA = {
    "__get__",
    "__set__",
    "__repr__",
    "dim",
    "numel",
    "size",
    "stride",
    "storage_offset",
    "element_size",
    "untyped_storage",
}
"""What may be asked of a recipe as of any tensor."""


class Recipe(torch.Tensor):
    """A mask as transformers hands it from the model to the attention: 4 axes, no element, O(1) to carry.

    A model that computes with its mask itself does not go through the attention's interface; it meets an error here
    instead of a wrong result.
    """

    mask: Mask
    """For the keys [0, keys)."""
    queries: int
    keys: int
    """How many of the keys exist: a static cache has room for more."""
    first_query: int
    """The position of the first query in its text."""
    first_key: int

    @staticmethod
    def of(mask: Mask, *, batch: int, queries: int, keys: int, first_query: int, first_key: int) -> "Recipe":
        recipe = torch.empty(batch, 1, queries, 0, dtype=torch.bool).as_subclass(Recipe)
        recipe.mask, recipe.queries, recipe.keys = mask, queries, keys
        recipe.first_query, recipe.first_key = first_query, first_key
        return recipe

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.__name__
        if name in ("to", "contiguous", "detach", "cpu", "cuda"):
            return args[0]
        # The rest of what is harmless says what kind of tensor it is; torch.compile asks a lot.
        if name in METADATA or name.startswith("is_") or (name[0] == "_" and name[1] != "_"):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        raise ValueError(
            f"attn_implementation 'sightline': this model computes with its mask itself ({name}), outside of the "
            "attention's interface; use attn_implementation='eager' for it"
        )


def recipe_mask(
    *,
    batch_size: int,
    kv_length: int,
    mask_function: Callable,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    **others: Any,
) -> Recipe:
    """The mask function to register, as transformers calls it; before 5.0 `cache_position` says where the queries are.

    Raises:
        ValueError: a pattern that is not known, over more than 4,096 x 4,096 pairs.
    """
    if "cache_position" in others:
        queries, first_query = len(others["cache_position"]), int(others["cache_position"][0])
    else:
        queries, first_query = others["q_length"], int(others["q_offset"])
    keys = first_query + queries - kv_offset
    mask = _known(mask_function, first_key=kv_offset, keys=kv_length)
    if mask is not None and mask.before is None and mask.after is None:
        keys = kv_length  # where they stand does not matter
    if mask is None or not 0 < keys <= kv_length or (mask.after != 0 and keys < kv_length):
        keys = kv_length
        mask = _asked(
            queries, batch_size=batch_size, kv_length=kv_length, mask_function=mask_function, kv_offset=kv_offset,
            attention_mask=attention_mask, **others,
        )  # fmt: skip
    else:
        if mask.segments is not None:
            mask = replace(mask, segments=mask.segments[:, :keys])
        existing = _existing(attention_mask, slice(kv_offset, kv_offset + keys))
        mask = (mask if existing.allowed is None else mask.to(existing.allowed.device)) & existing
    return Recipe.of(mask, batch=batch_size, queries=queries, keys=keys, first_query=first_query, first_key=kv_offset)


def _existing(padding: Tensor | None, keys: slice) -> Mask:
    """What is left of a (batch tokens) mask of the tokens that are no padding; beyond its end there are none."""
    if padding is None:
        return Mask()
    exists = padding[:, keys]
    exists = torch.nn.functional.pad(exists, (0, keys.stop - keys.start - exists.shape[1]))
    return Mask() if exists.all() else Mask(allowed=exists[:, None, None, :])


def _known(function: Callable, *, first_key: int, keys: int, positions: Tensor | None = None) -> Mask | None:
    """What a function of (batch, head, query, key) says, where transformers' own makers made it; else None.

    A maker's functions share their code object: no name is compared.
    """
    said = inspect.getclosurevars(function).nonlocals
    maker = _makers().get(function.__code__)
    if maker == "and":
        mask = Mask()
        for part in said["mask_functions"]:
            found = _known(part, first_key=first_key, keys=keys, positions=positions)
            if found is None:
                return None
            mask = mask & found
        return mask
    if maker == "remapped":  # within a packed text, positions rise by one as indices do
        return _known(said["mask_function"], first_key=first_key, keys=keys, positions=said["position_ids"])
    if maker == "causal":
        return Causal()
    if maker == "all":
        return Mask()
    if maker == "window":
        if said["sliding_window"] < 1:  # no key; qwen2_moe makes such a mask where no layer slides
            return Mask(allowed=torch.zeros(1, 1, 1, 1, dtype=torch.bool))
        return Window(before=said["sliding_window"] - 1, after=None)
    if maker == "both sides":
        return Window(before=said["sliding_window"], after=said["sliding_window"])
    if maker == "chunks":
        padding = said["left_padding"][:, None]
        at = torch.arange(first_key, first_key + keys, device=padding.device) if positions is None else positions
        return Segments(torch.div(at - padding, said["chunk_size"], rounding_mode="floor"))
    if maker == "packed":
        return Segments(said["packed_sequence_mask"])
    return None


@cache
def _makers() -> dict[Any, str]:
    """Code of what transformers' makers return -> what it means to us. Some are not in older versions."""
    from transformers import masking_utils as makers

    def nothing(*_: Any) -> None: ...

    examples = {
        "and": ("and_masks", (nothing,)),
        "remapped": ("remap_positions_for_packed_sequence", (nothing, None)),
        "window": ("sliding_window_overlay", (1,)),
        "both sides": ("sliding_window_bidirectional_overlay", (1,)),
        "chunks": ("chunked_overlay", (1, None)),
        "packed": ("packed_sequence_mask_function", (None,)),
    }
    found = {
        getattr(makers, name)(*arguments).__code__: meaning
        for meaning, (name, arguments) in examples.items()
        if hasattr(makers, name)
    }
    for meaning, name in {"causal": "causal_mask_function", "all": "bidirectional_mask_function"}.items():
        if hasattr(makers, name):
            found[getattr(makers, name).__code__] = meaning
    return found


def _asked(queries: int, **arguments: Any) -> Mask:
    """A pattern that is not known, asked for every pair."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    if queries * arguments["kv_length"] > DENSE_PAIRS:
        raise ValueError(
            f"attn_implementation 'sightline': this model's mask is of a pattern that is not known, and {queries} x "
            f"{arguments['kv_length']} pairs are too many to ask for each; use 'sdpa' for it, or a shorter text"
        )
    whole = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return Mask(allowed=ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](**(arguments | whole)))
