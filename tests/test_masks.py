"""Masks: drawings, composition, spans and tiles against the dense picture."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sightline.masks import ALiBi, Allowed, Bias, Causal, Mask, Padding, Segments, Window
from sightline.shapes import ShapeError

limits = st.none() | st.integers(0, 9)
recipes = st.builds(
    lambda before, after, lengths: Window(before=before, after=after) & (Padding(lengths) if lengths else Mask()),
    limits,
    limits,
    st.none() | st.lists(st.integers(0, 9), min_size=1, max_size=1),
)
segments = st.lists(st.integers(-2, 2), min_size=9, max_size=9).map(lambda numbers: torch.tensor([numbers]))


def picture(mask: Mask, queries: int, keys: int) -> list[list[bool]]:
    return [[cell == "#" for cell in line.split()] for line in mask.draw(queries=queries, keys=keys).splitlines()]


@pytest.mark.parametrize(
    ("mask", "queries", "keys", "expected"),
    [
        (Causal(), 2, 5, "# # # # .\n# # # # #"),
        (Causal(), 3, 2, ". .\n# .\n# #"),
        (Window(before=1, after=0), 3, 3, "# . .\n# # .\n. # #"),
        (Window(before=0, after=None), 2, 3, ". # #\n. . #"),
        (Padding([1]) & Causal(), 2, 2, "# .\n# ."),
        (Allowed(torch.tensor([[True, False]])), 2, 2, "# .\n# ."),
        (Bias(torch.tensor([[0.0, -torch.inf]])), 1, 2, "# ."),
        (Segments(torch.tensor([[5, 5, 2]])), 3, 3, "# # .\n# # .\n. . #"),
        (Segments(torch.tensor([[0, 1, 1, 0]])) & Causal(), 2, 4, ". # # .\n# . . #"),
    ],
)
def test_drawings(mask, queries, keys, expected):
    assert mask.draw(queries=queries, keys=keys) == expected


def test_str_draws():
    assert str(Causal()).splitlines()[0] == "# . . . . . . ."


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (Allowed(torch.ones(1, 1, 2, 2, dtype=torch.bool)), "# #\n# #"),
        (Segments(torch.tensor([[0, 0, 1]])) & Causal(), "# . .\n# # .\n. . #"),
        (Bias(torch.zeros(3, 3)) & Causal(), "# . .\n# # .\n# # #"),
        (Allowed(torch.tensor([[True], [False]])), "# #\n. ."),
        (Allowed(torch.ones(2, 4, dtype=torch.bool)) & Causal(), "# # # .\n# # # #"),
        (Bias(torch.zeros(1, 1)), "\n".join(["# # # # # # # #"] * 8)),
        (Allowed(torch.ones(9, 20, dtype=torch.bool)) & Causal(), "\n".join(["# # # # # # # #"] * 8)),
        (Segments(torch.arange(20)[None] // 5), "\n".join(["# # # # # . . ."] * 5 + [". . . . . # # #"] * 3)),
    ],
)
def test_str_draws_what_the_tensors_hold(mask, expected):
    assert str(mask) == expected


@given(recipes, st.integers(1, 9), st.integers(1, 9), st.data())
def test_a_tile_is_a_cut_of_the_dense_mask_and_nothing_lies_outside_the_span(mask, queries, keys, data):
    whole = torch.tensor(picture(mask, queries, keys))
    first = data.draw(st.integers(0, queries - 1))
    last = data.draw(st.integers(first + 1, queries))
    start, stop = mask.span(first, last, queries=queries, keys=keys)
    assert not whole[first:last, :start].any()
    assert not whole[first:last, stop:].any()
    tile = mask.tile(
        (first, last), (start, stop), queries=queries, keys=keys, device=torch.device("cpu"), dtype=torch.float32
    )
    allowed = torch.ones(1, 1, 1, 1, dtype=torch.bool) if tile.allowed is None else tile.allowed
    allowed = allowed.expand(1, 1, last - first, stop - start)[0, 0]
    assert torch.equal(allowed, whole[first:last, start:stop])


@given(recipes, recipes, st.integers(1, 9), st.integers(1, 9))
def test_and_allows_what_both_allow_in_either_order(left, right, queries, keys):
    one, other = (torch.tensor(picture(mask, queries, keys)) for mask in (left, right))
    both = (one & other).tolist()
    assert picture(left & right, queries, keys) == both == picture(right & left, queries, keys)


@given(recipes, segments, segments, st.integers(1, 9), st.integers(1, 9), st.data())
def test_segments_see_their_own_in_any_tile_span_and_window(mask, one, other, queries, keys, data):
    queries = min(queries, keys)
    one, other = Segments(one[:, :keys]), Segments(other[:, :keys])
    numbers = torch.stack([one.segments[0], other.segments[0]])
    same = (numbers[:, keys - queries :, None] == numbers[:, None]).all(0)
    whole = torch.tensor(picture(mask, queries, keys)) & same
    both = mask & one & other
    assert picture(both, queries, keys) == whole.tolist()
    first = data.draw(st.integers(0, queries - 1))
    start, stop = both.span(first, first + 1, queries=queries, keys=keys)
    assert not whole[first, :start].any() and not whole[first, stop:].any()
    newest = both.window((first, queries), (first, keys))
    assert picture(newest, queries - first, keys - first) == whole[first:, first:].tolist()


def test_segments_hold_a_key_for_every_query():
    with pytest.raises(ShapeError, match="5 queries, 4 keys"):
        mask = Segments(torch.zeros(1, 4, dtype=torch.int64))
        mask.check(batch=1, heads=1, queries=5, keys=4, device=torch.device("cpu"))


def test_biases_and_slopes_add_up():
    mask = Bias(torch.ones(2, 2)) & Bias(torch.full((2, 2), 2.0)) & ALiBi(1)
    _, bias = mask.dense(2, 2, dtype=torch.float64)
    slope = 2.0**-8
    assert torch.equal(bias[0, 0], torch.tensor([[3.0, 3 - slope], [3 - slope, 3.0]], dtype=torch.float64))


def test_alibi_slopes_are_those_of_the_paper():
    assert ALiBi(8).slopes.tolist() == [2.0**-i for i in range(1, 9)]
    assert ALiBi(3).slopes.tolist() == [2.0**-4, 2.0**-8, 2.0**-2]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Window(before=-1, after=0), "before must be a whole number of keys, 0 or more, or None; got -1"),
        (lambda: Window(before=1.5, after=0), "got 1.5"),
        (lambda: Padding(torch.ones(2)), "lengths must be whole numbers"),
        (lambda: Allowed(torch.ones(2, 2)), "expected a bool tensor, got torch.float32; use .bool"),
        (lambda: Bias(torch.ones(2, 2, dtype=torch.bool)), "expected a float tensor, got torch.bool; use Allowed"),
        (lambda: ALiBi(0), "at least one head, got 0"),
        (lambda: Segments(torch.zeros(1, 3)), "expected whole numbers .batch keys., got torch.float32"),
        (lambda: Segments(torch.zeros(3, dtype=torch.int64)), "got torch.int64 .3,."),
    ],
)
def test_what_cannot_be_a_mask_says_why(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (Allowed(torch.ones(3, 4, dtype=torch.bool)), "queries is 3 in allowed but 2 in the call"),
        (Bias(torch.ones(2, 5)), "keys is 5 in bias but 4 in the call"),
        (Bias(torch.ones(3, 2, 4)), "bias has 3 axes"),
        (Padding([1, 2, 3]), "3 lengths but the call has batch 2"),
        (ALiBi(8), "8 slopes but the call has 1 heads"),
        (Segments(torch.zeros(2, 3, dtype=torch.int64)), "shape .2, 3. but the call has batch 2 and 4 keys"),
    ],
)
def test_a_mask_of_another_call_is_refused(mask, message):
    with pytest.raises(ShapeError, match=message):
        mask.check(batch=2, heads=1, queries=2, keys=4, device=torch.device("cpu"))
