"""The capture itself: scores of heads, single weights, chosen heads, and how a notebook shows it."""

import re
from html import unescape

import pytest
import torch
from captures import HEADS, structured

from sightline.inspection import capture
from sightline.masks import Allowed, Bias, Causal, Mask, Padding, Segments, Window
from sightline.models import Decoder, DecoderConfig
from sightline.viewer import page as page_module
from sightline.viewer.page import page

WORDS = ("the", "cat", "sat", "on", "the", "mat", "the", "cat", "ran", "on", "the", "cat", "the")


def with_ids(seen):
    """The ids of the tokens' texts, in which tokens come again."""
    names = sorted(set(seen.key_tokens))
    object.__setattr__(seen, "ids", tuple(names.index(token) for token in seen.key_tokens))
    return seen


def followers(tokens: tuple[str, ...]) -> list[tuple[int, int]]:
    """(query, key): the key after the last occurrence of the query's token before it, as the definition says."""
    found = []
    for query, token in enumerate(tokens):
        earlier = [key for key in range(query) if tokens[key] == token]
        if earlier:
            found.append((query, earlier[-1] + 1))
    return found


def test_induction_is_the_mean_weight_on_what_followed_last_time():
    seen = with_ids(structured(WORDS))
    pairs = followers(WORDS)
    assert pairs[:3] == [(4, 1), (6, 5), (7, 2)] and len(pairs) == 7
    for row, layer in enumerate(seen.layers):
        for head in range(4):
            weights = seen.weights(layer, head).double()
            expected = torch.stack([weights[query, key] for query, key in pairs]).mean()
            torch.testing.assert_close(seen.induction[row, head].double(), expected, rtol=1e-5, atol=1e-8)


def test_a_head_that_copies_is_told_from_one_that_does_not():
    seen = with_ids(structured(WORDS))
    scores = torch.zeros(len(WORDS), len(WORDS))
    for query, key in followers(WORDS):
        scores[query, key] = 9
    queries = seen.queries.clone()
    queries[:, HEADS.index("uniform")] = scores
    logsumexp = torch.where(torch.ones_like(scores).tril() > 0, scores, -torch.inf).logsumexp(-1)
    object.__setattr__(seen, "queries", queries)
    seen.logsumexp[:, HEADS.index("uniform")] = logsumexp
    assert seen.induction[0].argmax() == HEADS.index("uniform") and seen.induction[0].max() > 0.99
    assert seen.previous_token[0].argmax() == HEADS.index("previous")


def test_scores_where_there_is_nothing_to_score():
    assert structured(("a", "b", "c")).induction.tolist() == [[0.0] * 4] * 2  # nothing comes again
    cross = structured(("x", "y"), keys=tuple("abcd"), mask=Mask())
    assert not cross.same_text
    assert cross.induction.tolist() == cross.previous_token.tolist() == [[0.0] * 4] * 2
    assert structured(("a",)).previous_token.tolist() == [[0.0] * 4] * 2


def test_the_newest_queries_score_what_they_would_in_the_whole():
    whole, newest = with_ids(structured(WORDS)), with_ids(structured(WORDS[9:], keys=WORDS))
    assert newest.same_text and newest.shift == 9
    assert newest.induction.shape == whole.induction.shape
    expected = torch.stack([newest.weights(0, 3)[query - 9, key] for query, key in followers(WORDS) if query >= 9])
    torch.testing.assert_close(newest.induction[0, 3], expected.mean())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mask": Causal() & Window(before=3, after=0)},
        {"mask": Window(before=1, after=2) & Padding([7])},
        {"mask": Causal() & Mask(slopes=torch.tensor([0.5, 0.25, 0.125, 0.0625]))},
        {"mask": Bias(torch.randn(10, 10, generator=torch.Generator().manual_seed(0)).clamp(-1).sub(0.5).log())},
        {"mask": Allowed(torch.rand(1, 4, 10, 10, generator=torch.Generator().manual_seed(0)) > 0.5)},
        {"mask": Allowed(torch.rand(1, 1, 1, 10, generator=torch.Generator().manual_seed(0)) > 0.5)},
        {"mask": Causal() & Segments(torch.arange(10)[None] // 4)},
        {"softcap": 2.0},
        {"sinks": torch.tensor([0.0, 1.0, 2.0, 3.0])},
        {"tokens": ("f", "g"), "keys": tuple("abcdefg")},
    ],
    ids=["causal", "window", "padding", "slopes", "bias", "allowed", "keys", "segments", "softcap", "sinks", "newest"],
)
def test_single_weights_are_those_of_the_matrix(options, monkeypatch):
    monkeypatch.setattr("sightline.captures.PAIRS", 7)
    if "mask" in options and options["mask"].bias is not None:
        options = {"mask": Bias(options["mask"].bias.nan_to_num(-torch.inf, neginf=-torch.inf))}
    seen = structured(**options)
    queries, keys = len(seen.query_tokens), len(seen.key_tokens)
    rows, columns = torch.arange(queries).repeat_interleave(keys), torch.arange(keys).repeat(queries)
    for head in range(4):
        allowed, bias = seen.mask(3, head).dense(queries, keys)
        visible = torch.ones(1, 1, queries, keys, dtype=torch.bool)
        visible = visible if allowed is None else visible & allowed
        visible = visible if bias is None else visible & (bias > -torch.inf)
        found = seen.weights_at(3, head, rows, columns)
        assert found.dtype == torch.float64
        expected = seen.weights(3, head).double().masked_fill(~visible[0, 0], torch.nan).flatten()
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-9, equal_nan=True)


def test_chosen_heads_stand_in_the_order_given_and_copy_nothing():
    seen = structured()
    assert seen.heads == ((0, 0), (0, 1), (0, 2), (0, 3), (3, 0), (3, 1), (3, 2), (3, 3))
    some = seen.select([(3, 1), (0, 2), (3, 1)])
    assert some.heads == ((3, 1), (0, 2)) and seen.chosen is None
    assert some.queries.data_ptr() == seen.queries.data_ptr()
    for heads, message in [
        ([], r"no head asked for; give pairs, select\(\[\(0, 1\)"),
        ([(1, 0)], "layer 1 is not among the captured ones, 0, 3"),
        ([(0, 4)], "heads are 0 to 3, got head 4"),
        ([(0, -1)], "heads are 0 to 3, got head -1"),
    ]:
        with pytest.raises(ValueError, match=message):
            seen.select(heads)


def test_a_notebook_shows_the_page_in_a_frame():
    seen = structured(("<script>alert(1)</script>", '"quoted" & co', "x"))
    html = seen._repr_html_()
    frame = r'<iframe title="Sightline" style="[^"<>]*height: \d+px[^"<>]*" srcdoc="[^"<>]*">'
    assert re.fullmatch(frame + "Sightline: run this cell[^<>]*</iframe>", html)
    assert unescape(re.findall(r'srcdoc="([^"]*)"', html)[0]) == page(seen)


def test_a_notebook_says_what_is_too_large_to_show(monkeypatch):
    monkeypatch.setattr(page_module, "MOST_BYTES", 1000)
    assert re.fullmatch(
        r"<p>page: 8 heads take .*; choose about \d+, capture\.select.*</p>", structured()._repr_html_()
    )


def test_what_the_model_wrote_is_marked():
    torch.manual_seed(0)
    model = Decoder(DecoderConfig.modern(vocabulary=9, d_model=32, num_layers=1))
    assert capture(model, [1, 2, 3]).prompt is None
    assert capture(model, [1, 2, 3], prompt=2).prompt == 2
    with pytest.raises(ValueError, match="prompt must be from 0 to the 3 tokens there are, got 4"):
        capture(model, [1, 2, 3], prompt=4)
