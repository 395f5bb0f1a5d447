"""Tiles, tracks, the wall and single weights against the definition in float64, under every kind of mask."""

import dataclasses
import struct

import numpy as np
import pytest
import torch
from captures import structured
from hypothesis import given
from hypothesis import strategies as st

from sightline import pyramid as pyramid_module
from sightline.attention import observe
from sightline.captures import Capture
from sightline.kernels import cpu, tiled
from sightline.kernels.reference import observe as reference
from sightline.masks import ALiBi, Allowed, Bias, Causal, Mask, Padding, Window
from sightline.pyramid import TRACKS, Pyramid, encode


def drawn(
    seed: int, queries: int, keys: int, mask: Mask, *, heads=2, groups=1, softcap=None, sinks=None, block=4, size=2.0
) -> Capture:
    """A capture of random queries and keys, so large that the weights differ."""
    random = torch.Generator().manual_seed(seed)
    query, key = (
        size * torch.randn(1, n, length, 4, generator=random) for n, length in ((heads, queries), (groups, keys))
    )
    seen = observe(query, key, key, mask, softcap=softcap, sinks=sinks, map_block=block)
    tokens = tuple(map(str, range(keys)))
    names = ("logsumexp", "entropy", "distance", "sink", "top_weights", "top_keys", "received")
    return Capture(
        model="drawn", separator=" ", query_tokens=tuple(map(str, range(queries))), key_tokens=tokens,
        ids=tuple(range(keys)),
        layers=(1,), queries=query, keys=key, masks=(mask,), scales=(seen.scale,), softcaps=(softcap,), sink_keys=4,
        map_sum=seen.map.sum, map_max=seen.map.max, map_block=block, **{name: getattr(seen, name) for name in names},
    )  # fmt: skip


def exactly(seen: Capture, head: int, sinks=None) -> tuple[np.ndarray, np.ndarray]:
    """The weights of one head in float64 from queries and keys alone, and which of them the mask allows."""
    queries, keys = len(seen.query_tokens), len(seen.key_tokens)
    heads = seen.num_heads
    allowed, bias = seen.masks[0].dense(queries, keys, dtype=torch.float64)
    visible = torch.ones(1, heads, queries, keys, dtype=torch.bool)
    visible = visible if allowed is None else visible & allowed
    visible = visible if bias is None else visible & (bias > -torch.inf)
    query, key = seen.queries.double(), seen.keys.double()
    options = {"scale": seen.scales[0], "softcap": seen.softcaps[0], "sinks": None if sinks is None else sinks.double()}
    facts = reference(query, key, key, allowed, bias, **options, top=0, received=False, map_block=1, sink_keys=4)
    return facts["map_max"][0, head].numpy(), visible[0, head].numpy()


def square(weights: np.ndarray, visible: np.ndarray, live: np.ndarray, pool: str, rows: slice, columns: slice) -> float:
    """One pixel, as its definition says."""
    if not visible[rows, columns].any():
        return np.nan
    if pool == "max":
        return weights[rows, columns].max()
    return weights[rows, columns].sum() / live[rows].sum()


def check_tile(seen: Capture, head: int, at: tuple[str, int, int, int], sinks=None) -> None:
    pool, level, row, column = at
    tile = Pyramid(seen).tile(1, head, pool, level, row, column).numpy()
    weights, visible = exactly(seen, head, sinks)
    live = visible.any(axis=1) | (sinks is not None)
    side, tile_side = 1 << level, pyramid_module.TILE << level
    rows = range(row * tile_side, min((row + 1) * tile_side, len(weights)), side)
    columns = range(column * tile_side, min((column + 1) * tile_side, weights.shape[1]), side)
    expected = [
        [square(weights, visible, live, pool, slice(y, y + side), slice(x, x + side)) for x in columns] for y in rows
    ]
    # Twice what float32 scores of this size may be wrong, as in the oracle: exp makes it relative.
    budget = 2 * np.finfo(np.float32).eps * (8 + float(seen.queries.abs().max() * seen.keys.abs().max()) * 4)
    np.testing.assert_allclose(tile, np.array(expected), rtol=budget, atol=1e-7)


def anywhere(draw, queries: int, keys: int, heads: int) -> Mask:
    """Any mask, and several at once."""
    random = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    mask = Mask(
        before=draw(st.none() | st.integers(0, keys)),
        after=draw(st.none() | st.integers(0, keys)),
        lengths=draw(st.none() | st.integers(0, keys).map(lambda n: torch.tensor([n]))),
        slopes=draw(st.none() | st.just(torch.rand(heads, generator=random))),
    )
    shape = draw(st.sampled_from([(queries, keys), (1, 1, 1, keys), (1, heads, queries, keys), (1, 1, queries, 1)]))
    kind = draw(st.sampled_from(["nothing", "allowed", "bias", "hiding bias"]))
    if kind == "allowed":
        mask = mask & Allowed(torch.rand(shape, generator=random) > 0.5)
    elif kind != "nothing":
        bias = torch.randn(shape, generator=random)
        mask = mask & Bias(bias.masked_fill(bias > 0.5, -torch.inf) if kind == "hiding bias" else bias)
    return mask


@given(st.data())
def test_every_tile_is_pooled_from_the_weights_of_the_definition(data):
    draw = data.draw
    queries, keys = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    heads, groups = draw(st.sampled_from([(1, 1), (2, 1), (4, 2)]))
    sinks = draw(st.none() | st.just(torch.linspace(-1, 1, heads)))
    seen = drawn(
        draw(st.integers(0, 99)), queries, keys, anywhere(draw, queries, keys, heads),
        heads=heads, groups=groups, softcap=draw(st.none() | st.just(2.0)), sinks=sinks,
        block=draw(st.sampled_from([1, 2, 3, 4, 8, 64])),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pyramid_module, "TILE", 4)
        patch.setattr(pyramid_module, "STRIP_QUERIES", 4)
        patch.setattr(tiled, "POOL_QUERIES", 4)
        patch.setattr(tiled, "POOL_KEYS", 8)
        if not draw(st.booleans()):
            patch.setattr(cpu, "MISSING", "not today")
        level = draw(st.integers(0, Pyramid(seen).levels - 1))
        side = 4 << level
        row, column = (draw(st.integers(0, (count - 1) // side)) for count in (queries, keys))
        check_tile(
            seen, draw(st.integers(0, heads - 1)), (draw(st.sampled_from(["max", "sum"])), level, row, column), sinks
        )


def test_the_check_of_tiles_can_fail():
    seen = drawn(0, 9, 9, Causal())
    check_tile(seen, 1, ("max", 0, 0, 0))
    wrong = [
        dataclasses.replace(seen, logsumexp=seen.logsumexp + 1e-3),
        dataclasses.replace(seen, masks=(Mask(),)),
        dataclasses.replace(seen, queries=seen.queries.flip(1)),
    ]
    for bad in wrong:
        with pytest.raises(AssertionError):
            tile = Pyramid(bad).tile(1, 1, "max", 0, 0, 0).numpy()
            np.testing.assert_allclose(tile, Pyramid(seen).tile(1, 1, "max", 0, 0, 0).numpy(), rtol=1e-5)


@given(st.data())
def test_levels_agree_and_mass_is_kept(data):
    seen = drawn(
        data.draw(st.integers(0, 99)), 70, 70, Causal() & Window(before=data.draw(st.integers(0, 70)), after=0)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pyramid_module, "TILE", 16)
        pyramid = Pyramid(seen)
        for level in range(pyramid.levels - 1):
            fine, coarse = (pyramid.whole(1, 0, "max", one).nan_to_num(-1) for one in (level, level + 1))
            pooled_again = torch.nn.functional.max_pool2d(fine[None], 2, ceil_mode=True)[0]
            torch.testing.assert_close(pooled_again, coarse)
            # Each query gives away all of its weight: the masses of a row of blocks sum to 1.
            torch.testing.assert_close(pyramid.whole(1, 0, "sum", level).nansum(-1), torch.ones(len(fine)))


def test_a_mask_that_leaves_nothing_hides_everything():
    seen = drawn(0, 6, 6, Padding([0]))
    pyramid = Pyramid(seen)
    assert pyramid.tile(1, 0, "sum", 0, 0, 0).isnan().all() and pyramid.wall.isnan().all()
    assert pyramid.weight(1, 0, 3, 3) is None
    assert pyramid.query_facts(1, 0, 3)["keys"] == [] and pyramid.query_facts(1, 0, 3)["logsumexp"] is None
    assert pyramid.key_facts(1, 0, 3) == {"received": 0.0, "queries": [], "weights": []}


def test_the_wall_is_every_head_small():
    seen = structured(tuple("ab" * 50), layers=(0, 2))
    pyramid = Pyramid(seen)
    assert pyramid.thumbnail_level == 1 and pyramid.thumbnail_shape == (50, 50)
    assert pyramid.wall.shape == (8, 50, 50)
    weights = seen.weights(2, 3)
    torch.testing.assert_close(pyramid.wall[7, 40, 21], weights[80:82, 42:44].max())
    assert pyramid.wall[7, 3].isnan().tolist() == [False] * 4 + [True] * 46
    some = Pyramid(seen.select([(2, 3), (0, 1)])).wall
    torch.testing.assert_close(some, pyramid.wall[[7, 1]], equal_nan=True)


@pytest.mark.parametrize("name", TRACKS)
def test_tracks_are_means_and_largest_over_blocks(name, monkeypatch):
    monkeypatch.setattr(pyramid_module, "TRACK", 8)
    monkeypatch.setattr(pyramid_module, "TILE", 4)
    seen = drawn(0, 37, 37, Causal(), block=4)
    values = (seen.top_weights[..., 0] if name == "top" else getattr(seen, name))[0, 1].numpy()
    for level in (0, 2):
        blocks = [values[start : start + (1 << level)] for start in range(0, 37, 1 << level)]
        for piece in range(-(-len(blocks) // 8)):
            here = blocks[piece * 8 : piece * 8 + 8]
            expected = [[block.mean() for block in here], [block.max() for block in here]]
            found = Pyramid(seen).track(1, 1, name, level, piece).numpy()
            np.testing.assert_allclose(found, np.array(expected), rtol=1e-6)


def test_what_a_query_and_a_key_have_to_say():
    seen = drawn(3, 30, 30, Causal() & Window(before=9, after=0), heads=4, groups=2)
    pyramid, (weights, _) = Pyramid(seen), exactly(seen, 2)
    facts = pyramid.query_facts(1, 2, 20)
    order = np.argsort(-weights[20], kind="stable")[:8]
    assert facts["keys"] == order.tolist()
    np.testing.assert_allclose(facts["weights"], weights[20][order], rtol=1e-4)
    np.testing.assert_allclose(facts["sink"], weights[20, :4].sum(), atol=1e-6)
    facts = pyramid.key_facts(1, 2, 12)
    looking = np.argsort(-weights[:, 12], kind="stable")[:10]
    assert facts["queries"] == looking.tolist()  # the window lets ten queries see a key
    np.testing.assert_allclose(facts["weights"], weights[looking, 12], rtol=1e-5)
    np.testing.assert_allclose(facts["received"], weights[:, 12].sum(), rtol=1e-5)
    for query, key in [(20, 12), (29, 29), (5, 0)]:
        np.testing.assert_allclose(pyramid.weight(1, 2, query, key), weights[query, key], rtol=2e-6)
    assert pyramid.weight(1, 2, 12, 20) is None and pyramid.weight(1, 2, 20, 2) is None


def test_bytes_on_the_wire():
    values = torch.tensor([[1.0, float("nan"), 2.0**-26], [0.25, 0.0, 1e-3]])
    magic, kind, level, zero, rows, columns, factor = struct.unpack(
        "<4sBBHIIf", encode(values, kind="tile", level=7)[:20]
    )
    assert (magic, kind, level, zero, rows, columns, factor) == (b"SLT1", 0, 7, 0, 2, 3, 4096)
    numbers = np.frombuffer(encode(values, kind="tile", level=7)[20:], "<f2").astype(np.float64) / 4096
    np.testing.assert_allclose(numbers.reshape(2, 3), values.double().numpy(), rtol=5e-4)
    track = encode(torch.tensor([[70000.5], [1.0]]), kind="track", level=0)
    assert track[4] == 1 and np.frombuffer(track[20:], "<f4").tolist() == [70000.5, 1.0]


def test_what_is_not_there_gets_one_clear_line():
    pyramid = Pyramid(structured())
    for call, message in [
        (lambda: pyramid.tile(0, 0, "max", 1, 0, 0), "levels are 0 to 0, got 1"),
        (lambda: pyramid.tile(0, 0, "max", 10**30, 0, 0), "levels are 0 to 0, got 1000"),
        (lambda: pyramid.tile(0, 0, "mean", 0, 0, 0), "pool must be max or sum, got 'mean'"),
        (lambda: pyramid.tile(0, 0, "max", 0, 1, 0), "level 0 has 1 x 1 tiles, got row 1 and column 0"),
        (lambda: pyramid.tile(0, 0, "max", 0, 0, -1), "got row 0 and column -1"),
        (lambda: pyramid.tile(1, 0, "max", 0, 0, 0), "layer 1 is not among the captured ones, 0, 3"),
        (lambda: pyramid.tile(0, 4, "max", 0, 0, 0), "heads are 0 to 3, got head 4"),
        (lambda: pyramid.track(0, 0, "height", 0, 0), "track must be one of received, entropy"),
        (lambda: pyramid.track(0, 0, "sink", 0, 1), "sink has 1 pieces at level 0, got 1"),
        (lambda: pyramid.track(0, -1, "sink", 0, 0), "heads are 0 to 3, got head -1"),
        (lambda: pyramid.weight(0, 0, 10, 0), "query must be from 0 to 9, got 10"),
        (lambda: pyramid.query_facts(0, 0, -1), "query must be from 0 to 9, got -1"),
        (lambda: pyramid.key_facts(0, 0, 10), "key must be from 0 to 9, got 10"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mask",
    [Causal(), Causal() & ALiBi(2), Mask(), Window(before=9000, after=100)],
    ids=["causal", "alibi", "full", "window"],
)
def test_places_in_a_text_of_131072_tokens(mask):
    """Tiles hold the float64 weights of their queries; each row of pixels needs the logsumexp of its own alone."""
    length = 131_072
    random = torch.Generator().manual_seed(0)
    queries, keys = (torch.randn(1, 2, length, 32, generator=random) for _ in range(2))
    small = drawn(0, 2, 2, mask)
    seen = dataclasses.replace(
        small, query_tokens=("",) * length, key_tokens=("",) * length, queries=queries, keys=keys, map_block=128,
        logsumexp=torch.zeros(1, 2, length), scales=(32**-0.5,),
    )  # fmt: skip
    pyramid = Pyramid(seen)
    assert pyramid.levels == 10 and pyramid.map_level == 7
    for level, row, column, y in [(0, 511, 3, 0), (0, 300, 300, 255), (2, 80, 79, 101), (4, 31, 31, 200), (6, 7, 0, 7)]:
        side, count = 1 << level, 256 << level
        first = row * count + y * side
        scores = queries[0, 1, first : first + side].double() @ keys[0, 1].double().T * seen.scales[0]
        tensors = mask.tile(
            (first, first + side),
            (0, length),
            queries=length,
            keys=length,
            device=torch.device("cpu"),
            dtype=scores.dtype,
        )
        visible = torch.ones(side, length, dtype=torch.bool) if tensors.allowed is None else tensors.allowed
        scores += 0 if tensors.bias is None else tensors.bias[1]
        scores.masked_fill_(~visible, -torch.inf)
        seen.logsumexp[0, 1, first : first + side] = scores.logsumexp(-1).float()
        weights = scores.softmax(-1)[:, column * count : (column + 1) * count].view(side, -1, side)
        hidden = ~visible[:, column * count : (column + 1) * count].view(side, -1, side).any(2).any(0)
        for pool, values in (("max", weights.amax((0, 2))), ("sum", weights.sum((0, 2)) / side)):
            found = pyramid.tile(1, 1, pool, level, row, column)[y].double()
            torch.testing.assert_close(
                found, values.masked_fill(hidden, torch.nan), rtol=3e-5, atol=1e-30, equal_nan=True
            )
        key = column * count + 5
        weight = pyramid.weight(1, 1, first, key)
        exact = float(weights[0, 5 // side, 5 % side])
        assert weight is None if not visible[0, key] else abs(weight - exact) <= 3e-6 * exact + 1e-30
