"""What recorded calls show against one call over everything, and against the definition in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sightline.attention import attention
from sightline.captures import AXES, Capture
from sightline.kernels import reference
from sightline.layers import MultiHeadAttention
from sightline.masks import Allowed, Bias, Causal, Mask, Padding, Window
from sightline.recording import Recorder, record

SLOPES = Mask(slopes=torch.tensor([0.1, 0.2, 0.3, 0.4]))
WORDS = tuple(f"word{number % 12}" for number in range(18))


def draw(length: int, *, batch: int = 1, heads: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, heads, length, 8, generator=torch.Generator().manual_seed(seed)) * 2


def exact(query, key, mask: Mask) -> torch.Tensor:
    """(heads queries keys) of a batch of one, in float64."""
    allowed, bias = mask.dense(query.shape[2], key.shape[2], dtype=torch.float64)
    options = {"scale": 8**-0.5, "softcap": None, "sinks": None}
    facts = reference.attention(query.double(), key.double(), key.double(), allowed, bias, dropout=0.0, **options)
    return facts[1][0]


def assert_shows(seen: Capture, weights: torch.Tensor) -> None:
    """Every number of the only layer is that of these weights, (heads queries keys)."""
    block, (_, queries, keys) = seen.map_block, weights.shape
    distance = (torch.arange(queries)[:, None] + keys - queries - torch.arange(keys)).abs()
    pad = torch.nn.functional.pad(weights, (0, -keys % block, 0, -queries % block))
    squares = pad.unflatten(-1, (-1, block)).unflatten(-3, (-1, block))
    expected = {
        "entropy": -torch.special.xlogy(weights, weights).sum(-1),
        "sink": weights[..., :4].sum(-1),
        "distance": (weights * distance).sum(-1),
        "received": weights.sum(-2),
        "map_sum": squares.sum((-3, -1)),
        "map_max": squares.amax((-3, -1)),
    }
    for name, numbers in expected.items():
        torch.testing.assert_close(getattr(seen, name)[0].double(), numbers, atol=3e-5, rtol=1e-4, msg=name)
    top = weights.topk(min(3, keys)).values
    torch.testing.assert_close(seen.top_weights[0].double()[..., :keys], top, atol=3e-6, rtol=1e-4)
    rows, columns = torch.arange(queries).repeat_interleave(keys), torch.arange(keys).repeat(queries)
    for head in range(len(weights)):
        torch.testing.assert_close(seen.weights(0, head).double(), weights[head], atol=3e-6, rtol=1e-4)
        single = seen.weights_at(0, head, rows, columns).nan_to_num(0)
        torch.testing.assert_close(single, weights[head].flatten(), atol=3e-6, rtol=1e-4)


def test_what_shows_something_else_is_noticed():
    query, key = draw(9), draw(9, seed=1)
    recorder = Recorder([0], top=3, map_block=4)
    recorder(0, query, key, key, Causal())
    weights = exact(query, key, Causal())
    assert_shows(recorder.capture(WORDS[:9]), weights)
    with pytest.raises(AssertionError):
        assert_shows(recorder.capture(WORDS[:9]), exact(query, key, Window(before=3, after=0)))


def grown(query, key, cuts: list[int], mask: Mask, *, alone: bool = False, window: int | None = None, room: int = 0):
    """A text that is read in pieces that end at `cuts`, with the keys so far, or the newest of them."""
    recorder, first = Recorder([0], top=3, map_block=4, room=room), 0
    for last in cuts:
        oldest = 0 if window is None else max(0, first - window)
        keys = key[:, :, oldest:last]
        given = Mask() if alone and last - first == 1 else mask
        output = recorder(0, query[:, :, first:last], keys, keys, given)
        torch.testing.assert_close(output, attention(query[:, :, first:last], keys, keys, given))
        first = last
    return recorder.capture(WORDS[: cuts[-1]])


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_text_that_grows_ends_as_if_it_had_been_read_at_once(data):
    length = data.draw(st.integers(2, 18))
    cuts = sorted({*data.draw(st.lists(st.integers(1, length), max_size=6)), length})
    before = data.draw(st.integers(0, 6) | st.none())
    mask = Mask(after=0, before=before) & data.draw(st.sampled_from([Mask(), SLOPES]))
    query, key = draw(length), draw(length, seed=1, heads=2)
    window = before if data.draw(st.booleans()) else None
    alone = mask.before is None and mask.slopes is None
    seen = grown(query, key, cuts, mask, alone=alone, window=window, room=data.draw(st.sampled_from([0, 5, 40])))
    assert_shows(seen, exact(query, key, mask))
    assert seen.masks[0].allowed is None  # a recipe stays a recipe


def test_masks_that_differ_from_call_to_call_are_written_out():
    query, key = draw(10), draw(10, seed=1)
    recorder = Recorder([0], top=3, map_block=4)
    recorder(0, query[:, :, :6], key[:, :, :6], key[:, :, :6], None)  # a prompt that sees itself in both directions
    recorder(0, query[:, :, 6:7], key[:, :, :7], key[:, :, :7], SLOPES)
    keys = key[:, :, 5:]  # older ones were let go, and no mask says so
    recorder(0, query[:, :, 7:], keys, keys, Causal())
    allowed = torch.ones(10, 10, dtype=torch.bool).tril()
    allowed[:6, :6], allowed[7:, :5] = True, False
    bias = torch.zeros(1, 4, 10, 10)
    bias[0, :, 6] = -SLOPES.slopes[:, None] * (6 - torch.arange(10))
    assert_shows(recorder.capture(WORDS[:10]), exact(query, key, Allowed(allowed) & Bias(bias)))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_cut_away_and_the_output_is_the_models(side):
    lengths, longest = (5, 9, 1), 9
    query, key = draw(longest, batch=3), draw(longest, batch=3, seed=1, heads=2)
    own = [slice(0, n) if side == "right" else slice(longest - n, longest) for n in lengths]
    position = torch.arange(longest)
    real = torch.stack([(position >= one.start) & (position < one.stop) for one in own])
    mask = Causal() & (Padding(lengths) if side == "right" else Allowed(real[:, None, None]))
    recorder = Recorder([0], keys=own, top=3, map_block=4)
    output = recorder(0, query, key, key, mask)
    torch.testing.assert_close(output, attention(query, key, key, mask))
    for number, one in enumerate(own):
        seen = recorder.capture(WORDS[: lengths[number]], sequence=number)
        window = query[number : number + 1, :, one], key[number : number + 1, :, one]
        assert_shows(seen, exact(*window, Causal()))
        assert (seen.masks[0].after, seen.masks[0].has_tensors) == (0, False)


def test_padding_that_is_not_cut_is_shown_as_hidden():
    query, key = draw(6, batch=2), draw(6, batch=2, seed=1)
    recorder = Recorder([0], top=3, map_block=4)
    recorder(0, query, key, key, Causal() & Padding([4, 6]))
    first, second = (recorder.capture(WORDS[:6], sequence=number) for number in (0, 1))
    assert first.masks[0].lengths.tolist() == [4] and second.masks[0].lengths is None
    assert_shows(first, exact(query[:1], key[:1], Causal() & Padding([4])))


def test_a_padded_batch_that_writes_on():
    """The first sequence begins with padding, the second ends early."""
    query, key = draw(8, batch=2), draw(8, batch=2, seed=1)
    recorder = Recorder([0], keys=[slice(2, None), slice(0, 6)], top=3, map_block=4)
    real = torch.ones(2, 1, 1, 8, dtype=torch.bool)
    real[0, ..., :2] = False
    real[1, ..., 6:] = False
    recorder(0, query[:, :, :5], key[:, :, :5], key[:, :, :5], Causal() & Allowed(real[..., :5]))
    for last in (6, 7, 8):
        recorder(0, query[:, :, last - 1 : last], key[:, :, :last], key[:, :, :last], Allowed(real[..., :last]))
    assert_shows(recorder.capture(WORDS[:6]), exact(query[:1, :, 2:], key[:1, :, 2:], Causal()))
    assert_shows(recorder.capture(WORDS[:6], sequence=1), exact(query[1:, :, :6], key[1:, :, :6], Causal()))


def test_queries_of_another_text_arrive_one_by_one():
    query, key = draw(7, batch=2), draw(5, batch=2, seed=1)
    recorder = Recorder([0], same_text=False, keys=[slice(0, 5), slice(0, 3)], queries=[slice(0, 7), slice(0, 4)])
    mask = Padding([5, 3])
    for row in range(7):
        recorder(0, query[:, :, row : row + 1], key, key, mask)
    whole = recorder.capture(WORDS[:5], WORDS[:7])
    assert not whole.same_text and whole.masks[0].is_empty
    torch.testing.assert_close(whole.weights(0, 1).double(), exact(query[:1], key[:1], Mask())[1], atol=3e-6, rtol=1e-4)
    part = recorder.capture(WORDS[:3], WORDS[:4], sequence=1)
    expected = exact(query[1:, :, :4], key[1:, :, :3], Mask())[1]
    torch.testing.assert_close(part.weights(0, 1).double(), expected, atol=3e-6, rtol=1e-4)


def test_a_capture_stays_as_it_is_while_the_text_grows():
    query, key = draw(12), draw(12, seed=1)
    for room in (0, 12):
        recorder = Recorder([0], map_block=4, room=room)
        recorder(0, query[:, :, :6], key[:, :, :6], key[:, :, :6], Causal())
        early = recorder.capture(WORDS[:6])
        before = {name: getattr(early, name).clone() for name in AXES}
        for last in range(7, 13):
            recorder(0, query[:, :, last - 1 : last], key[:, :, :last], key[:, :, :last], Causal())
        assert all(torch.equal(getattr(early, name), tensor) for name, tensor in before.items())
        assert len(recorder.capture(WORDS[:12]).tokens) == 12


def test_modules_of_any_kind_are_recorded_and_left_as_they_were():
    torch.manual_seed(0)
    layers = [MultiHeadAttention(16, 2, num_groups=1) for _ in range(2)]
    mine = layers[1].observer = lambda *arguments, **options: None
    x, context = torch.randn(1, 3, 16), torch.randn(1, 5, 16)
    with record(layers, [4, 7], same_text=False) as recorder:
        output = [layer(x, context) for layer in layers]
    assert layers[0].observer is None and layers[1].observer is mine
    seen = recorder.capture(list("abcab"), list("xyz"), model="two layers")
    assert (seen.layers, seen.ids, seen.shift) == ((4, 7), (0, 1, 2, 0, 1), 2)
    with pytest.raises(RuntimeError, match="stop"), record(layers):
        raise RuntimeError("stop")
    layers[1].observer = None
    for layer, number, there in zip(layers, (4, 7), output, strict=True):
        expected, weights = layer(x, context, return_weights=True)
        torch.testing.assert_close(there, expected)
        torch.testing.assert_close(torch.stack([seen.weights(number, head) for head in (0, 1)]), weights)


def test_a_recorder_among_calls_begins_with_the_keys_there_are():
    query, key = draw(8), draw(8, seed=1)
    recorder = Recorder([0], map_block=4)
    for last in (6, 7, 8):
        recorder(0, query[:, :, last - 1 : last], key[:, :, :last], key[:, :, :last], Causal())
    seen = recorder.capture(WORDS[:8])
    assert seen.query_tokens == WORDS[5:8] and seen.shift == 5
    torch.testing.assert_close(seen.weights(0, 2).double(), exact(query, key, Causal())[2, 5:], atol=3e-6, rtol=1e-4)


def called(*shapes, **options):
    recorder = Recorder(range(2), **options)
    for layer, queries, keys, heads, batch in shapes:
        recorder(layer, draw(queries, heads=heads, batch=batch), *[draw(keys, heads=heads, batch=batch)] * 2, Causal())
    return recorder


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Recorder([0], top=0), "top must be 1 or more, got 0"),
        (lambda: Recorder([0], queries=[slice(0, 1)]), "queries are of the keys' text"),
        (lambda: Recorder([0], keys=[slice(-3, None)]), r"from its first, without a step; got slice\(-3"),
        (lambda: called((2, 3, 3, 4, 1)), r"one of the layers 0, 1; got \(1, 4, 3, 8\) of layer 2"),
        (lambda: Recorder([0])(0, *[torch.ones(1, 2, 3)] * 3, None), r"\(batch heads queries width\)"),
        (lambda: called((0, 3, 3, 4, 1), (1, 3, 3, 2, 1)), "one has 2 heads, 2 groups and width 8 after 4, 4 and 8"),
        (lambda: called((0, 3, 3, 4, 2), (1, 3, 3, 4, 1)), "a batch of 2, got 1 in the call"),
        (lambda: called((0, 3, 3, 4, 1), keys=[slice(0, 2)] * 2), "a batch of 1, got 2 in keys="),
        (lambda: called((0, 4, 3, 4, 1)), "layer 0 has 3 keys at position"),
        (lambda: called((0, 3, 3, 4, 1), (0, 1, 5, 4, 1)), "layer 0 has 5 keys at position 4"),
        (lambda: called((0, 3, 3, 4, 1)).capture("abc"), "each layer to have been called as often"),
        (lambda: called((0, 3, 3, 4, 1), (1, 3, 3, 4, 1)).capture("ab"), "expected 3 key_tokens, .*; got 2"),
        (lambda: called((0, 3, 3, 4, 1), (1, 3, 3, 4, 1)).capture("abc", "ab"), "expected 3 query_tokens, .*; got 2"),
        (lambda: called().capture("a"), "0 sequences were recorded, so there is no 0"),
        (lambda: record([]).__enter__(), "one at least; got 0"),
        (lambda: record([MultiHeadAttention(4, 1)], [0, 1]).__enter__(), "each of 2 layers, .*got 1"),
    ],
)  # fmt: skip
def test_bad_calls_get_one_clear_line(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
