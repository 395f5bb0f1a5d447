"""The op: attention, and attention that says what it saw.

This module holds the contract, the checks and the one place where "auto" is decided; the numbers are computed
in `kernels/`. It knows nothing of layers and models.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import FunctionType
from typing import Annotated, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from sightline.kernels import cpu, reference, sdpa, tiled
from sightline.masks import Allowed, Mask
from sightline.observation import Observation
from sightline.shapes import ShapeError, shaped

Implementation = Literal["auto", "reference", "tiled", "sdpa", "cpu", "triton"]

SMALL_PRODUCT = 2**17
"""Up to this many multiply-adds for all scores, PyTorch's SDPA costs less to call in float32, if it needs no mask."""

IMPLEMENTATIONS: tuple[str, ...] = get_args(Implementation)

DENSE_SCORES = 2048 * 2048
"""Up to this many scores a head, an O(queries x keys) mask or weight matrix is worth SDPA's speed."""


NOTHING = Mask()


class Choice(NamedTuple):
    """Which implementation computes a call, and why."""

    implementation: str
    reason: str


@shaped
def attention(
    query: Annotated[Tensor, "batch (heads) queries width"],
    key: Annotated[Tensor, "batch (groups) keys width"],
    value: Annotated[Tensor, "batch (groups) keys value_width"],
    mask: Mask | Tensor | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Annotated[Tensor, "heads"] | None = None,
    dropout: float = 0.0,
    implementation: Implementation = "auto",
) -> Annotated[Tensor, "batch (heads) queries value_width"]:
    """Average `value` over keys, weighted by the softmax of query-key products.

        output = softmax(scale * query @ key.T + bias) @ value

    With fewer queries than keys, the queries are the newest; with `Causal()`, 2 queries and 5 keys:

        # # # # .
        # # # # #

    Consecutive heads // groups heads share one group of keys and values. A query that may see no key gives
    zeros, and no gradient. `scale` None means width ** -0.5. `softcap` c turns a scaled score s into
    c * tanh(s / c). `sinks` are logits, one a head, that take weight and give no value. `dropout` drops weights
    whenever it is above 0: pass 0.0 outside training. A bool tensor as mask is `Allowed(mask)`.

    Raises:
        ShapeError: axes of one name differ, or heads is not a multiple of groups.
        ValueError: a float tensor as mask, or an implementation that cannot do what was asked; it says why.

    Source: Vaswani et al. 2017, section 3.2.1; groups: Ainslie et al. 2023, section 2.2.

    >>> import torch
    >>> x = torch.eye(2)[None]
    >>> attention(x, x, x, Mask(after=0))
    tensor([[[1.0000, 0.0000],
             [0.3302, 0.6698]]])
    """
    check_dropout("attention", dropout)
    call = _prepare("attention", query, key, value, mask, scale, softcap, sinks)
    query, key, value, recipe, number, _ = call
    name = choose(
        query,
        key,
        value,
        recipe,
        softcap=softcap,
        sinks=sinks,
        dropout=dropout,
        implementation=implementation,
    ).implementation
    queries, keys = query.shape[-2], key.shape[-2]
    options = {"softcap": softcap, "sinks": sinks, "dropout": dropout}
    if name == "cpu":
        output = cpu.attention(query, key, value, _numbers(recipe, queries), scale=number, **options)
    elif name == "tiled":
        with _exactly(query.device):
            output = tiled.attention(query, key, value, *_lazily(recipe, query, key), scale=number, **options)
    elif name == "reference":
        allowed, bias = recipe.dense(queries, keys, device=query.device, dtype=_exact(query))
        with _exactly(query.device):
            output, _, _ = reference.attention(query, key, value, allowed, bias, scale=number, **options)
    else:
        causal = _is_square_causal(recipe, queries, keys)
        allowed = bias = None
        if not causal and not recipe.is_empty:
            allowed, bias = recipe.dense(queries, keys, device=query.device, dtype=query.dtype)
        output = sdpa.attention(query, key, value, allowed, bias, is_causal=causal, scale=scale, dropout=dropout)
    return output.squeeze(1) if call.single_head else output


@shaped
def observe(
    query: Annotated[Tensor, "batch (heads) queries width"],
    key: Annotated[Tensor, "batch (groups) keys width"],
    value: Annotated[Tensor, "batch (groups) keys value_width"],
    mask: Mask | Tensor | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Annotated[Tensor, "heads"] | None = None,
    top: int = 8,
    received: bool = True,
    map_block: int = 64,
    sink_keys: int = 4,
    implementation: Implementation = "auto",
) -> Observation:
    """`attention()`, and what it saw: facts of every head and query in O(N) memory.

    `top` is how many of the largest weights to keep a query, `map_block` the side of the squares that the pooled
    map takes together; 0 switches either off. `sink_keys` is how many first keys count as the sink (four is what
    Xiao et al. 2024 keep). Gradients flow through `output`; the facts carry none.

    Raises:
        ShapeError, ValueError: as `attention()`; a negative option; NaN in query, key or bias.

    >>> import torch, sightline as sl
    >>> x = torch.eye(3)[None]
    >>> seen = observe(x, x, x, sl.Causal(), scale=9.0, top=1)
    >>> seen.top_keys[..., 0]
    tensor([[0, 1, 2]])
    """
    for option, number in (("top", top), ("map_block", map_block), ("sink_keys", sink_keys)):
        if number is None or number < 0:
            raise ValueError(f"observe: {option} must be 0 or more, got {number}; 0 switches it off")
    call = _prepare("observe", query, key, value, mask, scale, softcap, sinks)
    with torch.no_grad():
        name = choose(
            call.query, call.key, call.value, call.mask, softcap=softcap, sinks=sinks, observing=True,
            implementation=implementation,
        ).implementation  # fmt: skip
    queries, keys = call.query.shape[-2], call.key.shape[-2]
    options = {
        "scale": call.scale, "softcap": softcap, "sinks": sinks,
        "top": top, "received": received, "map_block": map_block, "sink_keys": sink_keys,
    }  # fmt: skip
    tensors = call.query, call.key, call.value
    differentiates = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (*tensors, call.mask.bias, call.mask.slopes, sinks)
    )
    own = name == "cpu"  # whose output carries its gradient already
    with torch.set_grad_enabled(own and differentiates), _exactly(call.query.device):
        if own:
            facts = cpu.observe(*tensors, _numbers(call.mask, queries), **options)
        elif name == "tiled":
            facts = tiled.observe(*tensors, *_lazily(call.mask, call.query, call.key), **options)
        else:
            dense = call.mask.dense(queries, keys, device=call.query.device, dtype=_exact(call.query))
            facts = reference.observe(*tensors, *dense, **options)
    if facts["logsumexp"].isnan().any():
        batch, head, row = facts["logsumexp"].isnan().nonzero()[0].tolist()
        raise ValueError(
            f"observe: the scores of query {row} (sequence {batch}, head {head}) are NaN; "
            "query, key or bias holds NaN or infinity"
        )
    if call.single_head:
        facts = {fact: tensor.squeeze(1) for fact, tensor in facts.items()}
    output = facts.pop("output")
    if differentiates and not own:
        output = attention(
            query, key, value, mask, scale=scale, softcap=softcap, sinks=sinks, implementation=implementation
        )
    always = {fact: facts.pop(fact) for fact in ("logsumexp", "entropy", "distance", "sink")}
    squeeze = (lambda t: t.squeeze(1)) if call.single_head else (lambda t: t)
    return Observation(
        output=output,
        **always,
        query=squeeze(call.query),
        key=squeeze(call.key),
        mask=call.mask,
        scale=call.scale,
        softcap=softcap,
        facts=facts,
    )


def check_dropout(where: str, dropout: float) -> None:
    """Raise ValueError unless it is a probability below 1."""
    if not 0 <= dropout < 1:
        raise ValueError(f"{where}: dropout must be at least 0 and below 1, got {dropout}")


def choose(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask,
    *,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
    observing: bool = False,
    implementation: Implementation = "auto",
) -> Choice:
    """The implementation of a call on (batch heads length width) tensors. `auto` is decided here and nowhere else.

    Raises:
        ValueError: the implementation asked for by name cannot compute this call; it says why.
    """
    if implementation not in ("auto", "cpu"):
        return _asked_for(implementation, observing, plain=softcap is None and sinks is None)
    queries, keys = query.shape[-2], key.shape[-2]
    plain, few = softcap is None and sinks is None, queries * keys <= DENSE_SCORES
    unmasked = mask.is_empty or _is_square_causal(mask, queries, keys)
    light = (
        plain and unmasked and not dropout and query.dtype == torch.float32 and query.numel() * keys <= SMALL_PRODUCT
    )
    if implementation == "auto" and light and not observing:
        return Choice("sdpa", "costs least to call for so few scores")
    refusal = cpu.refusal(query, value)
    if implementation == "cpu":
        if refusal:
            raise ValueError(f"implementation 'cpu' cannot compute this call: {refusal}; or use 'auto'")
        return Choice("cpu", "asked for by name")
    if not refusal:
        return Choice("cpu", "the native kernel is the fastest here")
    if observing:
        return Choice("tiled", "says what it saw in O(N) memory on any device")
    if not plain:
        return Choice("tiled", "PyTorch's SDPA has neither softcap nor sinks")
    if few:
        return Choice("sdpa", f"the fastest here, and {queries} x {keys} scores a head are few")
    if value.shape[-1] != query.shape[-1] or dropout:
        return Choice("tiled", "SDPA would hold all weights: dropout, or values of another width than keys")
    if mask.bias is not None and mask.bias.requires_grad:
        return Choice("tiled", "SDPA would hold all weights: the bias takes a gradient")
    given = any(t is not None and t.numel() >= queries * keys for t in (mask.allowed, mask.bias))
    if not mask.is_positional or unmasked or given:
        return Choice("sdpa", "the fastest here, in O(N) memory beside what was given")
    return Choice("tiled", f"SDPA would need the mask as {queries} x {keys} numbers")


def _asked_for(implementation: Implementation, observing: bool, *, plain: bool) -> Choice:
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation {implementation!r}; expected one of {', '.join(IMPLEMENTATIONS)}")
    if implementation == "triton":
        raise ValueError(
            f"implementation {implementation!r} is not part of this build; "
            "use 'auto', or see `sightline doctor` for what is here"
        )
    if implementation == "sdpa" and observing:
        raise ValueError("implementation 'sdpa' cannot observe: PyTorch gives no weights; use 'tiled' or 'auto'")
    if implementation == "sdpa" and not plain:
        raise ValueError("implementation 'sdpa' has neither softcap nor sinks; use 'tiled' or 'auto'")
    return Choice(implementation, "asked for by name")


class _Call(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Mask
    scale: float
    single_head: bool


def _prepare(
    where: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask | Tensor | None,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> _Call:
    """The call with a heads axis, one dtype and a checked mask."""
    device, dtype = query.device, query.dtype
    if _knows_autocast(device) and torch.is_autocast_enabled(device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if key.dtype != dtype or value.dtype != dtype:
        dtypes = ", ".join(str(t.dtype).removeprefix("torch.") for t in (query, key, value))
        raise ValueError(f"{where}: query, key and value must have one dtype, got {dtypes}; convert with .to()")
    if not dtype.is_floating_point:
        raise ValueError(f"{where}: expected float tensors, got {dtype}; convert with .float()")
    if key.device != device or value.device != device:
        raise ValueError(f"{where}: query is on {device}, key on {key.device}, value on {value.device}; move them")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{where}: softcap must be above 0, got {softcap}")
    single_head = query.ndim == 3
    if single_head:
        query, key, value = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
    batch, heads, queries, width = query.shape
    groups, keys = key.shape[1:3]
    if not width:
        raise ShapeError(f"{where}: width is 0 in query and key; scores need at least 1")
    if heads != groups and (groups == 0 or heads % groups):
        raise ShapeError(f"{where}: {heads} heads cannot share {groups} groups of keys; heads must be a multiple")
    recipe = _recipe(where, mask)
    if not recipe.is_empty:
        recipe = recipe.with_heads() if single_head else recipe
        recipe.check(batch=batch, heads=heads, queries=queries, keys=keys, device=device)
    return _Call(query, key, value, recipe, width**-0.5 if scale is None else scale, single_head)


def _exactly(device: torch.device) -> AbstractContextManager[object]:
    """Without autocast, where there is such a thing."""
    return torch.autocast(device.type, enabled=False) if _knows_autocast(device) else nullcontext()


def _knows_autocast(device: torch.device) -> bool:
    """False for a device that may not be asked about autocast: torch's own question does not compile before 2.12."""
    return device.type != "meta"


def _recipe(where: str, mask: Mask | Tensor | None) -> Mask:
    if mask is None:
        return NOTHING
    if isinstance(mask, Mask):
        return mask
    if not isinstance(mask, Tensor):
        came = f"{mask.__name__} itself: call it" if isinstance(mask, FunctionType) else type(mask).__name__
        raise TypeError(f"{where}: mask must be a Mask such as Causal(), a bool tensor or None, got {came}")
    if mask.dtype != torch.bool:
        raise ValueError(
            f"{where}: a {mask.dtype} tensor as mask means different things in different libraries; "
            "use mask.bool() if nonzero means 'may attend', or Bias(mask) to add it to the scores"
        )
    return Allowed(mask)


def _numbers(mask: Mask, queries: int) -> cpu.Masks:
    segments = mask.segments
    if segments is not None:
        segments = torch.cat((segments[:, segments.shape[1] - queries :], segments), dim=1)
    return cpu.Masks(mask.before, mask.after, mask.lengths, segments, mask.allowed, mask.bias, mask.slopes)


def _lazily(mask: Mask, query: Tensor, key: Tensor) -> tuple[tiled.Span, tiled.TileOf]:
    """The mask as the two questions that a tiled kernel asks."""
    sizes = {"queries": query.shape[-2], "keys": key.shape[-2]}
    return partial(mask.span, **sizes), partial(mask.tile, **sizes, device=query.device, dtype=_exact(query))


def _exact(query: Tensor) -> torch.dtype:
    return torch.promote_types(query.dtype, torch.float32)


def _is_square_causal(mask: Mask, queries: int, keys: int) -> bool:
    """Nothing but `Causal()`, where SDPA's upper-left causal mask means the same."""
    return queries == keys and mask.after == 0 and mask.before is None and mask.slopes is None and not mask.has_tensors
