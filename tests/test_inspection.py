"""Captures against the definition in float64, on small models of every kind of mask and position."""

import dataclasses
from functools import partial

import pytest
import torch

from sightline.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from sightline.inspection import Capture, capture
from sightline.layers import MultiHeadAttention
from sightline.masks import Allowed, Bias, Causal, Mask, Padding, Window
from sightline.models import Decoder, DecoderConfig
from sightline.tokenizers import Tokenizer

TEXT = "the cat sat on the mat and the dog sat on the cat\n"


def small(**changes) -> Decoder:
    torch.manual_seed(0)
    shape = {"vocabulary": 20, "context": 48, "d_model": 32, "num_layers": 2, "num_heads": 4}
    model = Decoder(DecoderConfig.modern(**(shape | changes)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "query.weight" in name or "key.weight" in name:
                parameter.mul_(20)  # so that the weights differ
    return model


def tokens(count: int) -> torch.Tensor:
    return torch.randint(20, (count,), generator=torch.Generator().manual_seed(1))


def attention_of(model: Decoder, ids: torch.Tensor, layer: int) -> torch.Tensor:
    """The weights of one layer (heads queries keys), written out in float64 from the layer's own input."""
    calls = []
    module = [m for m in model.modules() if isinstance(m, MultiHeadAttention)][layer]

    def definition(query, key, value, mask, *, scale, softcap, sinks):
        width, length = query.shape[-1], query.shape[-2]
        query, key, value = query.double(), key.double(), value.double()
        share = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(share, dim=1), value.repeat_interleave(share, dim=1)
        scores = query @ key.mT / width**0.5
        distance = torch.arange(length)[:, None] - torch.arange(length)
        if mask.slopes is not None:
            scores = scores - mask.slopes[:, None, None] * distance
        weights = scores.masked_fill(distance < 0, -torch.inf).softmax(-1)
        calls.append(weights)
        return (weights @ value).float()

    module.observer = definition
    with torch.no_grad():
        model.eval().features(ids[None])
    module.observer = None
    return calls[0][0]


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_groups": 2}, {"positions": "alibi"}, {"positions": "sinusoidal", "norm_first": False}],
    ids=["plain", "groups", "alibi", "classic"],
)
def test_weights_and_facts_are_those_of_the_definition(changes):
    model, ids = small(**changes), tokens(37)
    seen = capture(model, ids, top=3, map_block=16)
    for layer in (0, 1):
        exact = attention_of(model, ids, layer)
        for head in range(4):
            torch.testing.assert_close(seen.weights(layer, head).double(), exact[head], atol=2e-6, rtol=1e-5)
        for name, expected in {
            "entropy": -torch.special.xlogy(exact, exact).sum(-1),
            "sink": exact[..., :4].sum(-1),
            "distance": (exact * (torch.arange(37)[:, None] - torch.arange(37)).abs()).sum(-1),
            "received": exact.sum(-2),
            "top_weights": exact.topk(3).values,
        }.items():
            torch.testing.assert_close(getattr(seen, name)[layer].double(), expected, atol=2e-5, rtol=1e-4, msg=name)
        previous = exact.diagonal(offset=-1, dim1=-2, dim2=-1).mean(-1)
        torch.testing.assert_close(seen.previous_token[layer].double(), previous, atol=2e-6, rtol=1e-5)
    assert seen.map_sum.shape == seen.map_max.shape == (2, 4, 3, 3)
    torch.testing.assert_close(seen.map_sum.sum((-1, -2)), torch.full((2, 4), 37.0))


def test_summaries_are_means_over_queries():
    seen = capture(small(), tokens(9))
    torch.testing.assert_close(seen.mean_entropy, seen.entropy.mean(-1))
    torch.testing.assert_close(seen.mean_sink, seen.sink.mean(-1))
    torch.testing.assert_close(seen.mean_distance, seen.distance.mean(-1))
    assert seen.previous_token.shape == (2, 4)


def test_previous_token_of_a_long_text_and_of_one_token():
    seen = capture(small(context=300), tokens(300), layers=[0])
    expected = seen.weights(0, 1).diagonal(offset=-1).mean()
    torch.testing.assert_close(seen.previous_token[0, 1], expected)
    assert capture(small(), [3]).previous_token.tolist() == [[0.0] * 4] * 2


def test_windows_are_cut_from_the_matrix():
    seen = capture(small(), tokens(20))
    whole = seen.weights(1, 2)
    window = seen.weights(1, 2, queries=slice(5, 9), keys=slice(2, 7))
    torch.testing.assert_close(window, whole[5:9, 2:7])


@pytest.mark.parametrize(
    "mask",
    [
        Causal() & Window(before=2, after=0),
        Padding([4]),
        Allowed(torch.rand(1, 4, 6, 6, generator=torch.Generator().manual_seed(0)) > 0.3),
        Bias(torch.randn(6, 6, generator=torch.Generator().manual_seed(0))),
        Mask(slopes=torch.tensor([0.1, 0.2, 0.3, 0.4])),
    ],
    ids=["window", "padding", "allowed", "bias", "slopes"],
)
def test_weights_of_one_head_with_every_mask(mask):
    seen = with_mask(mask)
    scores = seen.queries[0].double() @ seen.keys[0].double().mT * seen.scales[0]
    allowed, bias = mask.dense(6, 6, dtype=torch.float64)
    scores = scores if bias is None else scores + bias.expand(1, 4, 6, 6)[0]
    if allowed is not None:
        scores = scores.masked_fill(~allowed.expand(1, 4, 6, 6)[0], -torch.inf)
    for head in range(4):
        torch.testing.assert_close(seen.weights(0, head).double(), scores[head].softmax(-1), atol=1e-6, rtol=1e-5)


def with_mask(mask: Mask) -> Capture:
    """A capture whose only layer has this mask."""
    model = small(num_layers=1)
    module = next(m for m in model.modules() if isinstance(m, MultiHeadAttention))
    module._mask = lambda given: mask
    return capture(model, tokens(6))


def test_fewer_queries_than_keys_are_the_newest():
    whole = capture(small(), tokens(10))
    names = ("queries", "logsumexp", "entropy", "distance", "sink", "top_weights", "top_keys")
    newest = {name: getattr(whole, name)[:, :, 7:] for name in names}
    part = dataclasses.replace(whole, query_tokens=whole.query_tokens[7:], **newest)
    torch.testing.assert_close(part.weights(1, 3), whole.weights(1, 3)[7:])
    expected = whole.weights(1, 3).diagonal(offset=-1)[6:].mean()
    torch.testing.assert_close(part.previous_token[1, 3], expected)


def test_chosen_layers_keep_the_models_numbers():
    model, ids = small(num_layers=3), tokens(12)
    whole, some = capture(model, ids), capture(model, ids, layers=[2, 0])
    assert whole.layers == (0, 1, 2) and some.layers == (0, 2)
    torch.testing.assert_close(some.weights(2, 1), whole.weights(2, 1))
    with pytest.raises(ValueError, match="layer 1 is not among the captured ones, 0, 2"):
        some.weights(1, 0)
    with pytest.raises(ValueError, match="heads are 0 to 3, got head 4"):
        some.weights(0, 4)


def test_nothing_is_computed_behind_the_last_layer_asked_for():
    model, ids = small(num_layers=3), tokens(12)
    whole, read = capture(model, ids), []
    for layer, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda *_, layer=layer: read.append(layer))
        block.register_forward_hook(lambda *_, layer=layer: read.append(f"{layer} to the end"))
    some = capture(model, ids, layers=[0, 1])
    assert read == [0, "0 to the end", 1]
    torch.testing.assert_close(some.entropy, whole.entropy[:2], rtol=0, atol=0)
    assert all(block.attention.observer is None for block in model.blocks)


def test_a_full_matrix_beyond_the_limit_is_refused_with_its_size():
    seen = capture(small(), tokens(40))
    with pytest.raises(ValueError, match=r"40 x 40 weights take .* ask for a window, weights\(queries=slice"):
        seen.weights(0, 0, limit_bytes=1000)
    assert seen.weights(0, 0, queries=slice(0, 4), keys=slice(0, 4), limit_bytes=1000).shape == (4, 4)


@pytest.mark.parametrize("kind", ["words", "characters", "bpe"])
def test_text_is_seen_token_by_token(kind):
    tokenizer = Tokenizer.train(kind, [TEXT], vocabulary=260 if kind == "bpe" else None)
    model = small(vocabulary=len(tokenizer), context=64)
    model.tokenizer = tokenizer
    seen = capture(model, TEXT)
    assert seen.separator.join(seen.tokens).replace(" \n", "\n") == TEXT
    assert seen.ids == tuple(tokenizer.encode(TEXT)) and len(seen.tokens) == len(seen.ids)


def test_a_token_that_is_part_of_a_character_is_shown_as_bytes():
    tokenizer = Tokenizer.train("bpe", ["abc"], vocabulary=256)
    model = small(vocabulary=len(tokenizer))
    model.tokenizer = tokenizer
    assert capture(model, "a\u00e9").tokens == ("a", "\\xc3", "\\xa9")


def test_ids_without_a_tokenizer_are_shown_as_numbers():
    seen = capture(small(), [5, 7])
    assert seen.tokens == ("5", "7") and seen.separator == " "
    assert capture(small(), torch.tensor([[5, 7]])).ids == (5, 7)


def modes(model):
    return [(module.training, getattr(module, "observer", None)) for module in model.modules()]


def test_the_model_is_afterwards_as_it_was():
    model = small(dropout=0.5).train()
    model.blocks[1].eval()
    before, parameters = modes(model), [p.clone() for p in model.parameters()]
    first, second = capture(model, tokens(8)), capture(model, tokens(8))
    assert modes(model) == before
    torch.testing.assert_close(first.entropy, second.entropy, atol=0, rtol=0)  # no dropout
    assert all(torch.equal(a, b) for a, b in zip(parameters, model.parameters(), strict=True))
    assert not first.queries.requires_grad


def test_the_model_is_as_it_was_after_an_error():
    model = small().train()

    def stop(module, inputs):
        raise RuntimeError("stop")

    mine = object()
    first, last = (m for m in model.modules() if isinstance(m, MultiHeadAttention))
    first.observer = mine
    handle = last.register_forward_pre_hook(stop)
    before = modes(model)
    with pytest.raises(RuntimeError, match="stop"):
        capture(model, tokens(8))
    handle.remove()
    assert modes(model) == before and first.observer is mine


def test_bad_input_gets_one_clear_line():
    model = small(context=8)
    for call, message in [
        (lambda: capture(model, "the"), "no tokenizer to read text with; set model.tokenizer, or give token ids"),
        (lambda: capture(model, []), "the text holds no token; give at least one"),
        (lambda: capture(model, [1] * 9), r"9 tokens are beyond the model's context of 8; .*tokens\[:8\]"),
        (lambda: capture(model, [1, 20]), "token ids are 0 to 19, got 20"),
        (lambda: capture(model, [-1]), "token ids are 0 to 19, got -1"),
        (lambda: capture(model, torch.ones(3)), r"expected whole numbers .*float32 \(3,\)"),
        (lambda: capture(model, torch.ones(2, 3, dtype=torch.long)), r"\(2, 3\); one text at a time"),
        (lambda: capture(model, [1], layers=[2]), "layers are 0 to 1, got 2"),
        (lambda: capture(model, [1], layers=[-1]), "layers are 0 to 1, got -1"),
        (lambda: capture(model, [1], layers=[]), "no layer asked for; layers are 0 to 1"),
        (lambda: capture(model, [1], top=0), "top must be 1 or more, got 0"),
        (lambda: capture(model, [1], map_block=0), "map_block must be 1 or more, got 0"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert "\n" not in str(error.value)


def test_unknown_words_are_named():
    tokenizer = Tokenizer.train("words", [TEXT])
    model = small(vocabulary=len(tokenizer))
    model.tokenizer = tokenizer
    with pytest.raises(ValueError, match=r"not in the vocabulary: 'zebra', 'yak' \(2 in all\).*tokenizer.encode"):
        capture(model, "the zebra sat on the yak zebra")
    assert capture(model, tokenizer.encode("the zebra")).tokens == ("the", "<unk>")
    with pytest.raises(ValueError, match="no token"):
        capture(model, "")


# --- A source and a target ----------------------------------------------------------------------------


def translator(make=EncoderDecoderConfig.modern, **changes) -> EncoderDecoder:
    torch.manual_seed(0)
    shape = {"vocabulary": 20, "context": 24, "d_model": 32, "num_layers": 2, "num_heads": 4}
    model = EncoderDecoder(make(**(shape | changes)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "query.weight" in name or "key.weight" in name:
                parameter.mul_(3)  # so that the weights differ
    return model


def weights_of(model: EncoderDecoder, source: torch.Tensor, target: torch.Tensor) -> dict[str, list[torch.Tensor]]:
    """The weights of each layer of each part, written out in float64 from what the layer was given."""
    found: dict[str, list[torch.Tensor]] = {"encoder": [], "decoder": [], "cross": []}

    def definition(part, query, key, value, mask, *, scale, softcap, sinks):
        query, key, value = query.double(), key.double(), value.double()
        scores = query @ key.mT / query.shape[-1] ** 0.5
        distance = torch.arange(query.shape[-2])[:, None] - torch.arange(key.shape[-2])
        if mask is not None and mask.slopes is not None:
            scores = scores - mask.slopes[:, None, None] * distance.abs()
        weights = (scores.masked_fill(distance < 0, -torch.inf) if part == "decoder" else scores).softmax(-1)
        found[part].append(weights[0])
        return (weights @ value).float()

    modules = [("encoder", block.attention) for block in model.encoder.blocks]
    modules += [(part, getattr(block, name)) for block in model.blocks for part, name in PARTS.items()]
    for part, module in modules:
        module.observer = partial(definition, part)
    with torch.no_grad():
        model.eval()(source[None], target[None])
    for _, module in modules:
        module.observer = None
    return found


PARTS = {"decoder": "attention", "cross": "cross_attention"}


@pytest.mark.parametrize(
    ("make", "changes"),
    [
        (EncoderDecoderConfig.modern, {}),
        (EncoderDecoderConfig.classic, {}),
        (EncoderDecoderConfig.modern, {"positions": "alibi", "decoder_layers": 1, "tied": False}),
    ],
    ids=["modern", "classic", "alibi"],
)
def test_all_three_kinds_of_weights_are_those_of_the_definition(make, changes):
    model, source, target = translator(make, **changes), tokens(11), tokens(7)
    seen = capture(model, source, target, top=3)
    exact = weights_of(model, source, target)
    assert list(seen) == ["cross", "encoder", "decoder"]
    for part, one in seen.items():
        assert len(one.layers) == len(exact[part]) == (1 if changes and part != "encoder" else 2)
        for layer, weights in enumerate(exact[part]):
            for head in range(4):
                torch.testing.assert_close(one.weights(layer, head).double(), weights[head], atol=2e-6, rtol=1e-4)
            torch.testing.assert_close(one.top_weights[layer].double(), weights.topk(3).values, atol=2e-6, rtol=1e-4)
    assert seen["cross"].weights(0, 0).shape == (7, 11) and not seen["cross"].same_text
    assert seen["encoder"].same_text and seen["decoder"].same_text


def test_a_source_and_a_target_are_seen_token_by_token():
    model = translator()
    model.tokenizer = Tokenizer.train("words", ["le chat est assis\n the cat sits\n"])
    model.train()
    seen = capture(model, "le chat assis", "the cat", layers=[1], prompt=1)
    assert seen["cross"].key_tokens == seen["encoder"].tokens == ("le", "chat", "assis", "\n")
    assert seen["cross"].query_tokens == seen["decoder"].tokens == ("\n", "the", "cat")
    assert seen["cross"].ids == seen["encoder"].ids == tuple(model.tokenizer.encode("le chat assis\n"))
    assert [one.prompt for one in seen.values()] == [None, None, 1]
    assert {one.layers for one in seen.values()} == {(1,)} and model.training
    assert {one.model for one in seen.values()} == {"EncoderDecoder, 2 + 2 x 4 heads, d_model 32"}
    given = capture(model, "le chat assis", model.tokenizer.encode("\nthe cat"), layers=[1])
    assert given["cross"].query_tokens == seen["cross"].query_tokens


def test_a_bad_source_or_target_gets_one_clear_line(tmp_path):
    model, spoken, known = translator(), translator(decoder_layers=1), translator()
    spoken.tokenizer = Tokenizer.train("characters", ["the cat sat"])  # no line ends here
    known.tokenizer = Tokenizer.train("words", ["the cat sat\n"])
    for call, message in [
        (lambda: capture(model, [1, 2]), "the target is missing"),
        (lambda: capture(model, [1, 2], [0], folder=tmp_path / "seen"), "use save_capture for each"),
        (lambda: capture(model, [1, 2], []), "holds no token"),
        (lambda: capture(model, [], [0]), "holds no token"),
        (lambda: capture(model, [1, 2], [0, 20]), "token ids are 0 to 19, got 20"),
        (lambda: capture(model, [1, 2], [0] * 25), "beyond the model's context of 24"),
        (lambda: capture(model, [1, 2], "the"), "no tokenizer"),
        (lambda: capture(model, [1, 2], [0], prompt=2), "prompt must be from 0 to the 1 tokens"),
        (lambda: capture(model, [1, 2], [0], layers=[2]), "layers are 0 to 1, got 2"),
        (lambda: capture(spoken, [1, 2], [0], layers=[1]), "layers are 0 to 0, got 1"),
        (lambda: capture(spoken, "the cat", "sat"), "one token for the end of a line"),
        (lambda: capture(known, "the cat", "the dog"), "not in the vocabulary: 'dog'"),
        (lambda: capture(known, "", "the"), "holds no token"),
        (lambda: capture(small(), [1, 2], [3]), "a decoder reads one text"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert "\n" not in str(error.value)


def test_what_is_no_model_of_ours_is_told_where_to_go():
    with pytest.raises(
        ValueError, match=r"expected a Decoder or an EncoderDecoder, got Linear: sl\.huggingface\.watch"
    ):
        capture(torch.nn.Linear(2, 2), [1])  # type: ignore[call-overload]
