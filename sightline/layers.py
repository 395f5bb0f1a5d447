"""Attention with its learned maps: one head, and several side by side.

Tensors are (batch tokens d_model). Knows nothing of the block that it stands in.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Literal, overload

import torch
from torch import Tensor, nn

from sightline import passes, sublayers
from sightline.attention import attention, check_dropout, observe
from sightline.cache import Cache
from sightline.kernels import cpu, products
from sightline.masks import ALiBi, Allowed, Mask
from sightline.positions import Rotary
from sightline.rows import EPSILON, RMSNorm, joined_map, kernel_maps, kernel_norm, linear_maps, normed, plain
from sightline.shapes import ShapeError, shaped


class SelfAttention(nn.Module):
    """One head: three linear maps with bias, then scaled dot-product attention.

        Q = X W_q + b_q,  K = X W_k + b_k,  V = X W_v + b_v
        output = softmax(Q K^T / sqrt(d_k)) V

    >>> layer = SelfAttention(d_in=32, d_k=16, d_v=8)
    >>> output, weights = layer(torch.ones(2, 5, 32), return_weights=True)
    >>> output.shape, weights.shape
    (torch.Size([2, 5, 8]), torch.Size([2, 5, 5]))
    """

    def __init__(self, d_in: int, d_k: int, d_v: int) -> None:
        super().__init__()
        self.d_in = d_in
        self.query = nn.Linear(d_in, d_k)
        self.key = nn.Linear(d_in, d_k)
        self.value = nn.Linear(d_in, d_v)

    @overload
    def forward(self, x: Tensor, mask: Mask | Tensor | None = None) -> Tensor: ...
    @overload
    def forward(
        self, x: Tensor, mask: Mask | Tensor | None = None, *, return_weights: Literal[True]
    ) -> tuple[Tensor, Tensor]: ...
    @shaped
    def forward(
        self,
        x: Annotated[Tensor, "batch tokens d_in"],
        mask: Mask | Tensor | None = None,
        *,
        return_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The output (batch tokens d_v), and with `return_weights` the weights (batch queries keys).

        The weights carry no gradient.
        """
        if x.shape[-1] != self.d_in:
            raise ShapeError(f"SelfAttention: d_in is {x.shape[-1]} in x but {self.d_in} here")
        query, key, value = self.query(x), self.key(x), self.value(x)
        output = attention(query, key, value, mask)
        return (output, _weights(query, key, value, mask)) if return_weights else output


class MultiHeadAttention(nn.Module):
    """Several heads side by side, each on its own share of the width, joined by one more linear map.

        head_i = attention(X W_q_i, C W_k_i, C W_v_i),  output = concat(head_1 .. head_h) W_o

    C is the context: X itself (self-attention), or what `forward` is given (cross-attention). `d_k` and `d_v`
    are totals over the heads and default to d_model, as `d_out` does. With fewer `num_groups` than heads,
    neighbouring heads share keys and values (grouped-query attention). `query_key_norm` applies an RMSNorm over
    the width of a head to queries and keys, before `rotary` turns them. `before` lets a query see so many keys
    before its own. `output_bias` None is `bias`. `dropout` falls on the weights, in training only. `layer` says
    which layer of a `Cache` is this one's.

    Drawn as separate `nn.Linear` would be, in this order: output, then for each head query, key, value.

    Set `observer` to have it called as `observer(query, key, value, mask, scale=, softcap=, sinks=)` in the place
    of `attention`; it returns the output.

    Raises: ValueError where a width is not divisible by the heads, or the heads by the groups; dropout not in [0, 1).

    Source: Vaswani et al. 2017, section 3.2.2; Ainslie et al. 2023 for groups.

    >>> layer = MultiHeadAttention(d_model=32, num_heads=4, causal=True)
    >>> layer(torch.ones(2, 5, 32)).shape
    torch.Size([2, 5, 32])
    >>> _, weights = layer(torch.ones(2, 5, 32), return_weights=True)
    >>> weights.shape
    torch.Size([8, 5, 5])
    """

    slopes: Tensor | None

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        d_k: int | None = None,
        d_v: int | None = None,
        d_out: int | None = None,
        num_groups: int | None = None,
        causal: bool = False,
        before: int | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        output_bias: bool | None = None,
        query_key_norm: bool = False,
        norm_epsilon: float = EPSILON["rms"],
        rotary: Rotary | None = None,
        alibi: bool = False,
        layer: int = 0,
    ) -> None:
        super().__init__()
        d_k, d_v, d_out = (d_model if width is None else width for width in (d_k, d_v, d_out))
        num_groups = num_heads if num_groups is None else num_groups
        for name, total, parts, part in (
            ("d_k", d_k, num_heads, "num_heads"),
            ("d_v", d_v, num_heads, "num_heads"),
            ("num_heads", num_heads, num_groups, "num_groups"),
        ):
            if parts < 1 or total < parts or total % parts:
                raise ValueError(f"MultiHeadAttention: {name} {total} is not divisible by {part} {parts}")
        width = d_k // num_heads
        if rotary is not None and rotary.width != width:
            raise ValueError(f"MultiHeadAttention: rotary has width {rotary.width} but a head has {width}")
        check_dropout("MultiHeadAttention", dropout)
        self.d_model = d_model
        self.num_heads = num_heads
        self.num_groups = num_groups
        self.causal = causal
        self.before = before
        self.dropout = dropout
        self.layer = layer
        self.norm_epsilon = norm_epsilon
        self.observer: Callable[..., Tensor] | None = None
        self.output = nn.Linear(d_v, d_out, bias=bias if output_bias is None else output_bias)
        self.query, self.key, self.value = (
            nn.Linear(d_model, size, bias=bias, device="meta").to_empty(device=torch.get_default_device())
            for size in (d_k, num_groups * width, num_groups * (d_v // num_heads))
        )
        self._draw()
        self.query_norm = RMSNorm(width, eps=norm_epsilon) if query_key_norm else None
        self.key_norm = RMSNorm(width, eps=norm_epsilon) if query_key_norm else None
        self.rotary = rotary
        self.register_buffer("slopes", ALiBi(num_heads).slopes if alibi else None, persistent=False)

    @shaped
    def forward(
        self,
        x: Annotated[Tensor, "batch queries d_model"],
        context: Annotated[Tensor, "batch keys d_model"] | None = None,
        mask: Mask | Tensor | None = None,
        *,
        cache: Cache | None = None,
        return_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The output (batch queries d_out); with `return_weights` also the weights (batch * heads, queries, keys).

        With a cache, x holds the newest tokens and the cache those before them; with a context too, the cache holds
        the context's keys and values, computed in the first call. The weights are those before dropout, and carry no
        gradient.
        """
        if x.shape[-1] != self.d_model:
            raise ShapeError(f"MultiHeadAttention: d_model is {x.shape[-1]} in x but {self.d_model} here")
        if context is not None and self.rotary is not None:
            raise ValueError("MultiHeadAttention: a context does not go with rotary positions")
        if cache is not None and self.observer is None and not return_weights:
            output = self._step(x, context, mask, cache)
            if output is not None:
                return output
        if context is not None and cache is not None and cache.length:
            query = normed(self.query(x).unflatten(-1, (self.num_heads, -1)), self.query_norm).transpose(1, 2)
            key, value = cache.read(self.layer)
            return self._attend(query, key, value, mask, return_weights=return_weights)
        query, key, value = self._project(x, context, cache)
        if cache is not None:
            key, value = cache.append(self.layer, key, value)
        return self._attend(query, key, value, mask, return_weights=return_weights)

    def added(
        self, x: Tensor, norm: nn.Module, mask: Mask | Tensor | None, dropout: float, cache: Cache | None
    ) -> Tensor | None:
        """x + the output of norm(x), in training or of few tokens behind a cache; None where modules must be called.

        `dropout` falls on what is added, in training.
        """
        if x.ndim != 3 or self.observer is not None:
            return None
        if cache is not None:
            before = None if self.training else kernel_norm(x, norm)
            return None if before is None else self._step(x, None, mask, cache, before)
        if not self._joins() or not plain(self.output):
            return None
        maps, output = sublayers.parameters(self.query, self.key, self.value), sublayers.parameters(self.output)
        heads = self._heads(x)
        if not sublayers.served(x, norm, *maps, *output, *heads.norms):
            return None
        x, query, key, value = sublayers.projected(x, norm, maps, heads)
        seen = attention(query, key, value, self._mask(mask), dropout=self.dropout)
        return sublayers.written(x, seen, output, dropout)

    def _step(
        self,
        x: Tensor,
        context: Tensor | None,
        mask: Mask | Tensor | None,
        cache: Cache,
        norm: products.Norm = products.NO_NORM,
    ) -> Tensor | None:
        """The output of few tokens behind those in the cache, in one call of the native kernel; None: it has none.

        With a norm x + the output of norm(x).
        """
        if not cache.length or (self.training and self.dropout) or isinstance(mask, Tensor):
            return None
        rotary, alone = self.rotary, context is None
        maps = kernel_maps(x, self.query, self.output, *((self.key, self.value) if alone else ()))
        hiding = self._hiding(mask, len(x))
        if maps is None or hiding is None or not self._places():
            return None
        start = cache.length
        stop = start + x.shape[1] if alone else start
        room = cache.room(self.layer, len(x), stop - start)
        norms = self._norms()
        if room is None or not products.projects(x, *room, *norms):
            return None
        return products.attend(
            x,
            maps,
            norms=norms,
            epsilon=self.norm_epsilon,
            tables=None if rotary is None else rotary.tables(stop, x),
            room=room,
            start=start,
            masks=hiding,
            norm=norm,
        )

    def _hiding(self, given: Mask | None, batch: int) -> cpu.Masks | None:
        """All that hides something, as the kernel takes it where tokens follow one another; None: more than that."""
        if given is None:
            return cpu.Masks(self.before, 0 if self.causal else None, slopes=self.slopes)
        mask = self._mask(given)
        assert isinstance(mask, Mask)
        more = mask.allowed is not None or mask.bias is not None or mask.segments is not None
        belongs = mask.lengths is None or mask.lengths.shape == (batch,)
        belongs = belongs and (mask.slopes is None or mask.slopes.shape == (self.num_heads,))
        if more or not belongs:  # who computes it says what is wrong
            return None
        return cpu.Masks(mask.before, mask.after, mask.lengths, slopes=mask.slopes)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Mask | Tensor | None, *, return_weights: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        mask = self._mask(mask)
        if self.observer is not None:
            heads = self.observer(query, key, value, mask, scale=None, softcap=None, sinks=None)
        else:
            heads = attention(query, key, value, mask, dropout=self.dropout if self.training else 0.0)
        (output,) = linear_maps(heads.transpose(1, 2).flatten(-2), self.output)
        return (output, _weights(query, key, value, mask).flatten(0, 1)) if return_weights else output

    def _project(self, x: Tensor, context: Tensor | None, cache: Cache | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys (batch heads tokens width), normed and turned, and values; of the last two groups."""
        maps = (self.query, self.key, self.value)
        if context is None and cache is None and self._joins() and passes.served(x, *self._norms()):
            return passes.placed(joined_map(x, *maps), self._heads(x))
        if context is None:
            query, key, value = self._each(x, *maps)
        else:
            query, (key, value) = self.query(x), self._each(context, self.key, self.value)
        query = normed(query.unflatten(-1, (self.num_heads, -1)), self.query_norm).transpose(1, 2)
        key = normed(key.unflatten(-1, (self.num_groups, -1)), self.key_norm).transpose(1, 2)
        value = value.unflatten(-1, (self.num_groups, -1)).transpose(1, 2)
        if self.rotary is not None:
            start = 0 if cache is None else cache.length
            query, key = self.rotary(query, start), self.rotary(key, start)
        return query, key, value

    def _joins(self) -> bool:
        """Whether the maps may be joined, none of the modules called."""
        if not self.training or not plain(self.query, self.key, self.value):
            return False
        # Of maps whose widths do not belong together attention says so.
        fits = self.query.out_features * self.num_groups == self.key.out_features * self.num_heads
        return fits and self._places()

    def _places(self) -> bool:
        """Whether norms and rotary positions are what the kernel knows."""
        norms = [norm for norm in (self.query_norm, self.key_norm) if norm is not None]
        if not plain(*norms, self.rotary):
            return False
        return all(norm.weight is not None and norm.eps == self.norm_epsilon for norm in norms)

    def _norms(self) -> tuple[Tensor | None, Tensor | None]:
        """The weights of both norms."""
        query, key = self.query_norm, self.key_norm
        return None if query is None else query.weight, None if key is None else key.weight

    def _heads(self, x: Tensor) -> passes.Heads:
        return passes.Heads(
            heads=self.num_heads,
            groups=self.num_groups,
            width=self.query.out_features // self.num_heads,
            norms=self._norms(),
            epsilon=self.norm_epsilon,
            tables=None if self.rotary is None else self.rotary.tables(x.shape[1], x),
        )

    def _each(self, x: Tensor, *maps: nn.Linear) -> Sequence[Tensor]:
        if not self.training or not plain(*maps):
            return linear_maps(x, *maps)
        return joined_map(x, *maps).split([linear.out_features for linear in maps], dim=-1)

    def _mask(self, given: Mask | Tensor | None) -> Mask | Tensor | None:
        if not self.causal and self.before is None and self.slopes is None:
            return given
        own = Mask(before=self.before, after=0 if self.causal else None, slopes=self.slopes)
        if given is None:
            return own
        return own & (Allowed(given) if isinstance(given, Tensor) else given)

    @torch.no_grad()
    def _draw(self) -> None:
        """Draw each head's maps one by one, so that they are what separate `nn.Linear` would hold."""
        for head in range(self.num_heads):
            group, first = divmod(head * self.num_groups, self.num_heads)
            maps = [(self.query, head, self.num_heads)]
            if first == 0:
                maps += [(self.key, group, self.num_groups), (self.value, group, self.num_groups)]
            for linear, part, parts in maps:
                bound = linear.in_features**-0.5
                linear.weight.chunk(parts)[part].uniform_(-bound, bound)
                if linear.bias is not None:
                    linear.bias.chunk(parts)[part].uniform_(-bound, bound)


def _weights(query: Tensor, key: Tensor, value: Tensor, mask: Mask | Tensor | None) -> Tensor:
    return observe(query, key, value, mask, top=0, received=False, map_block=0).weights()
