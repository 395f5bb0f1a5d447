"""Captures made by hand, with heads whose behaviour is known, for the tests of pictures and pages."""

import torch

from sightline.attention import observe
from sightline.inspection import Capture
from sightline.masks import Causal, Mask

TOKENS = ("the", " cat", " sat", "\n", "the", " dog", " ran", ",", " the", " end")
HEADS = ("previous", "sink", "uniform", "random")


def structured(
    tokens: tuple[str, ...] = TOKENS,
    *,
    mask: Mask | None = None,
    keys: tuple[str, ...] | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    layers: tuple[int, ...] = (0, 3),
) -> Capture:
    """Layers of four heads: one looks at the token before, one at the first, one everywhere, one anywhere.

    Keys are rows of the identity, so that queries are the scores themselves.
    """
    mask = Causal() if mask is None else mask
    queries_count, keys_count = len(tokens), len(keys or tokens)
    distance = torch.arange(queries_count)[:, None] + keys_count - queries_count - torch.arange(keys_count)
    random = 3 * torch.randn(len(layers), queries_count, keys_count, generator=torch.Generator().manual_seed(0))
    sink = torch.zeros(queries_count, keys_count)
    sink[:, 0] = 8
    heads = [8.0 * (distance == 1), sink, torch.zeros_like(sink)]
    query = torch.stack([torch.stack([*heads, noise]) for noise in random])
    key = torch.eye(keys_count).expand(len(layers), 1, keys_count, keys_count).contiguous()
    seen = [
        observe(q[None], k[None], k[None], mask, scale=1.0, softcap=softcap, sinks=sinks, map_block=4)
        for q, k in zip(query, key, strict=True)
    ]
    return Capture(
        model="by hand",
        query_tokens=tokens,
        key_tokens=keys or tokens,
        same_text=keys is None or keys[len(keys) - len(tokens) :] == tokens,
        ids=tuple(range(keys_count)),
        separator="",
        layers=layers,
        queries=query,
        keys=key,
        masks=(mask,) * len(layers),
        scales=(1.0,) * len(layers),
        softcaps=(softcap,) * len(layers),
        sink_keys=4,
        map_sum=torch.cat([one.map.sum for one in seen]),
        map_max=torch.cat([one.map.max for one in seen]),
        map_block=4,
        **{
            name: torch.cat([getattr(one, name) for one in seen])
            for name in ("logsumexp", "entropy", "distance", "sink", "top_weights", "top_keys", "received")
        },
    )
