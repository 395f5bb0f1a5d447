"""`enable()`: Sightline's attention under the name "sightline" in transformers, and what it refuses.

A model whose attention goes through transformers' `AttentionInterface` then runs on `attention()`, or on `observe()`
where somebody looks. Needs transformers 4.56 or newer.
"""

import sys
from collections.abc import Callable
from functools import partial, wraps
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sightline.attention import attention, observe
from sightline.huggingface.recipes import Recipe, recipe_mask
from sightline.masks import Allowed, Bias, Causal, Mask
from sightline.observation import Observation

NAME = "sightline"
"""Names that hold flash, sdpa, flex_attention or a slash mean something to transformers."""
OLDEST = (4, 56)
TABLE = "ATTENTION_CLASSES"
"""How the names end of the tables of classes that some models take their attention from, past the interface."""

HARMLESS = {
    "sliding_window",  # the mask says it, and eager attention reads it there
    "cache",
    "cache_position",
    "deterministic",
    "num_items_in_batch",
    "output_hidden_states",
    "output_router_logits",
    "past_key_value",
    "past_key_values",
    "position_embeddings",
    "position_ids",
    "return_dict",
    "use_cache",
    # Lengths of packed texts, which the positions say too; vision models cut at them themselves.
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
    "seq_idx",
}
"""Arguments that change no score. Any other that is not None is refused."""


uncompiled = partial(
    torch.compiler.disable,
    reason="attn_implementation 'sightline' is a break in the graph of torch.compile: leave fullgraph=True out",
)


class Watcher(Protocol):
    """Somebody who looks at the attention of some modules."""

    def takes(self, module: nn.Module) -> bool: ...

    def see(
        self,
        module: nn.Module,
        tensors: tuple[Tensor, Tensor, Tensor],
        mask: Mask,
        recipe: Recipe | None,
        *,
        scale: float | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """One call of attention, computed in its place: what `attention()` gives."""
        ...


WATCHERS: list[Watcher] = []
"""Those who look now, in the order in which they came."""
_ASKING: list[nn.Module] = []
"""Models that are in a call with `output_attentions=True`: many do not tell their layers."""


def enable() -> None:
    """Make `attn_implementation="sightline"` known to transformers; again costs nothing.

    From then on `from_pretrained(path, attn_implementation="sightline")` and `set_attn_implementation("sightline")`
    give a model that computes with `attention()`: the results of "eager", to rounding, in O(N) memory. A query that
    may see no key (padding) gives zeros, where eager attention gives it the mean of all keys. Under `torch.compile`
    attention is a break in the graph; with `fullgraph=True` it is refused.

    Raises:
        ImportError: transformers is not installed, or older than 4.56.

    A model that cannot run on it raises ValueError at once: when it is made, if its attention does not go through the
    interface; when it is called, if it passes arguments that change scores and are not known.
    """
    _expect_transformers()
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface, PreTrainedModel

    if NAME in AttentionInterface().valid_keys():
        return
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, uncompiled(recipe_mask))
    # Without this, transformers would leave a model that it cannot change as it is, and say so in its log at most.
    for name in ("_check_and_adjust_attn_implementation", "set_attn_implementation"):
        setattr(PreTrainedModel, name, _checked(getattr(PreTrainedModel, name)))


def _expect_transformers() -> None:
    try:
        import transformers
    except ImportError as error:
        raise ImportError("sightline.huggingface needs transformers: pip install 'sightline[transformers]'") from error
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if version < OLDEST:
        raise ImportError(
            f"sightline.huggingface needs transformers 4.56 or newer, and {transformers.__version__} is installed: "
            "pip install --upgrade 'sightline[transformers]'"
        )


def _checked(method: Callable) -> Callable:
    """A method of models that takes the name of an attention, for those that can have ours."""

    @wraps(method)
    def checked(self: Any, attn_implementation: Any, *arguments: Any, **options: Any) -> Any:
        if attn_implementation == NAME:
            tables = _tables(type(self))
            classes = tuple(kind for table in tables for kind in table.values() if isinstance(kind, type))
            if not self._can_set_attn_implementation() or any(isinstance(part, classes) for part in self.modules()):
                raise _without_interface(type(self).__name__)
            for table in tables:  # of a model that is made now: its layers look theirs up after this
                table.setdefault(NAME, _refuse_class)
        if attn_implementation == NAME and _listen not in self._forward_pre_hooks.values():
            self.register_forward_pre_hook(_listen, with_kwargs=True)
            self.register_forward_hook(_forget, with_kwargs=True, always_call=True)
        return method(self, attn_implementation, *arguments, **options)

    return checked


def _tables(model: type) -> list[dict[str, Any]]:
    """Tables from the name of an attention to its class, in the modules that a model's class comes from."""
    sources = [vars(sys.modules[kind.__module__]) for kind in model.__mro__ if kind.__module__ in sys.modules]
    found = {id(value): value for names in sources for name, value in names.items() if name.endswith(TABLE)}
    return [value for value in found.values() if isinstance(value, dict)]


def _refuse_class(config: Any, *_: Any, **__: Any) -> None:
    raise _without_interface(type(config).__name__.removesuffix("Config"))


def _without_interface(name: str) -> ValueError:
    return ValueError(
        f"attn_implementation 'sightline': the attention of {name} does not go through transformers' "
        "AttentionInterface, so nothing else can take its place; use 'eager' for this model"
    )


@uncompiled
def _listen(model: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    if options.get("output_attentions"):
        _ASKING.append(model)


@uncompiled
def _forget(model: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
    if model in _ASKING:
        _ASKING.remove(model)


@uncompiled
def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    is_causal: bool | None = None,
    output_attentions: bool | None = None,
    **others: Any,
) -> tuple[Tensor, Observation | None]:
    """Attention as transformers calls it: tensors (batch heads length width) in, (batch length heads width) out."""
    _refuse(module, others)
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    mask, keys = _mask(attention_mask, query, key, causal=causal)
    key, value = key[:, :, :keys], value[:, :, :keys]
    if position_bias is not None:
        mask = mask & Bias(position_bias[..., :keys])
    sinks = None if s_aux is None else s_aux.flatten()
    options: dict[str, Any] = {"scale": scaling, "softcap": softcap, "sinks": sinks}
    watchers = [watcher for watcher in WATCHERS if watcher.takes(module)]
    asked = output_attentions or bool(_ASKING)
    if dropout and (watchers or asked):
        raise ValueError("attention with dropout cannot be observed: call model.eval(), or do not look while training")
    if asked:
        seen = observe(query, key, value, mask, **options, map_block=0)
        output = seen.output
    else:
        seen = None
        output = None if watchers else attention(query, key, value, mask, dropout=dropout, **options)
    for watcher in watchers:
        recipe = attention_mask if isinstance(attention_mask, Recipe) else None
        output = watcher.see(module, (query, key, value), mask, recipe, **options)
    assert output is not None
    # The native kernel's output lies so already.
    return output.transpose(1, 2).contiguous(), seen


def _refuse(module: nn.Module, others: dict[str, Any]) -> None:
    for name, value in others.items():
        if value is not None and name not in HARMLESS:
            raise ValueError(
                f"attn_implementation 'sightline': {type(module).__name__} passes {name!r}, which may change its "
                "scores in a way that is not known here; use attn_implementation='eager' for this model"
            )


def _mask(given: Tensor | None, query: Tensor, key: Tensor, *, causal: bool) -> tuple[Mask, int]:
    """The mask of a call, and how many of its keys exist."""
    queries, keys = query.shape[2], key.shape[2]
    if given is None:
        # As in transformers' own: one query sees all keys, and others start where the keys do.
        causal = causal and queries > 1
        return (Causal(), min(queries, keys)) if causal else (Mask(), keys)
    if isinstance(given, Recipe):
        if given.queries != queries or given.keys > keys:
            raise ValueError(
                f"attn_implementation 'sightline': the mask is of {given.queries} queries and {given.keys} keys, but "
                f"the call has {queries} and {keys}; this model needs another implementation"
            )
        return given.mask.to(query.device), given.keys
    if given.ndim != 4:
        raise ValueError(
            f"attn_implementation 'sightline': expected a mask of 4 axes, got {tuple(given.shape)}; this model needs "
            "another implementation"
        )
    given = given[..., :keys]
    return Allowed(given) if given.dtype == torch.bool else Bias(given), keys
