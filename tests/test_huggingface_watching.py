"""What was watched against eager attention's weights: every layer and head, step by step, part by part."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from families import DECODERS, FAMILIES, PAIRS, build, inputs  # noqa: E402 (after the skip)
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402

import sightline as sl  # noqa: E402
from sightline.huggingface.interface import NAME, WATCHERS  # noqa: E402

transformers.logging.set_verbosity_error()
sl.huggingface.enable()

MODERN = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 0)
SINCE_5 = {"bert", "roberta", "t5"}
FEW = ("gemma2", "llama4")
LEFT = torch.tensor([[0] * 5 + [1] * 9, [1] * 14])


def some(families):
    marked = [pytest.param(name, marks=[] if name in FEW else [pytest.mark.slow]) for name in families]
    return pytest.mark.parametrize("family", [mark for mark in marked if MODERN or mark.values[0] not in SINCE_5])


def same(capture, weights, *, queries=slice(None), keys=slice(None)):
    """All layers and heads; `weights`: (heads queries keys) a layer."""
    assert len(capture.layers) == len(weights)
    for layer, expected in zip(capture.layers, weights, strict=True):
        expected = expected[:, queries, keys].double()
        found = torch.stack([capture.weights(layer, head) for head in range(capture.num_heads)]).double()
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-3)
        row = capture.index(layer)
        torch.testing.assert_close(
            capture.entropy[row].double(), torch.special.entr(expected).sum(-1), atol=1e-4, rtol=1e-3
        )
        torch.testing.assert_close(capture.received[row].double(), expected.sum(1), atol=1e-4, rtol=1e-3)
        best = expected.topk(1).values[..., 0]
        torch.testing.assert_close(capture.top_weights[row, ..., 0].double(), best, atol=2e-5, rtol=1e-3)


@some(DECODERS)
def test_a_watched_forward_of_a_padded_batch(family):
    given, model = inputs(family), build(family, NAME)
    with torch.no_grad():
        eager = build(family, "eager")(**given, attention_mask=LEFT, output_attentions=True)
        plain = model(**given, attention_mask=LEFT).logits
        with sl.huggingface.watch(model) as seen:
            watched = model(**given, attention_mask=LEFT).logits
    assert torch.allclose(watched[LEFT.bool()], plain[LEFT.bool()], atol=1e-4)
    for sequence, start in enumerate((5, 0)):
        capture = seen.capture(sequence=sequence)
        assert capture.ids == tuple(given["input_ids"][sequence, start:].tolist())
        own = slice(start, None)
        same(capture, [weights[sequence] for weights in eager.attentions], queries=own, keys=own)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@some(DECODERS)
def test_steps_grow_one_capture(family, cache):
    if family == "deepseek_v3" and cache == "static" and not MODERN:
        pytest.skip("this transformers has no static cache for values of another width than keys")
    given, model = inputs(family), build(family, NAME)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    options |= {"cache_implementation": "static"} if cache == "static" else {}
    with sl.huggingface.watch(model, top=3) as seen:
        written = model.generate(**given, attention_mask=LEFT, **options)
    whole = torch.cat([LEFT, torch.ones(2, 5, dtype=torch.int64)], dim=1)
    counted = {"position_ids": (whole.cumsum(1) - 1).clamp(min=0)} if family == "gpt2" else {}
    with torch.no_grad():
        eager = build(family, "eager")(
            input_ids=written[:, :-1], attention_mask=whole, output_attentions=True, **counted
        )
    for sequence, start in enumerate((5, 0)):
        capture = seen.capture(sequence=sequence)
        assert capture.ids == tuple(written[sequence, start:-1].tolist())
        assert (capture.prompt, capture.top_keys.shape[-1]) == (14 - start, 3)
        own = slice(start, None)
        same(capture, [weights[sequence] for weights in eager.attentions], queries=own, keys=own)


@some(PAIRS)
def test_encoder_decoder_and_cross_attention_are_told_apart(family):
    given, model = inputs(family), build(family, NAME)
    with torch.no_grad():
        eager = build(family, "eager")(**given, output_attentions=True)
        with sl.huggingface.watch(model) as seen:
            model(**given)
    assert len(seen.stacks) == 3
    parts = {"encoder": eager.encoder_attentions, "decoder": eager.decoder_attentions, "cross": eager.cross_attentions}
    for kind, attentions in parts.items():
        capture = seen.capture(of=kind, sequence=1)
        assert capture.same_text == (kind != "cross")
        same(capture, [weights[1] for weights in attentions])
    assert seen.capture(sequence=1).ids == tuple(given["decoder_input_ids"][1].tolist())
    if family != "whisper":
        assert seen.capture(of="cross").ids == seen.capture(of="encoder").ids == tuple(given["input_ids"][0].tolist())


@some(PAIRS)
def test_cross_attention_grows_with_what_is_written(family):
    given, model = inputs(family, batch=1), build(family, NAME)
    start = given.pop("decoder_input_ids")[:, :1] * 0 + model.config.decoder_start_token_id
    with sl.huggingface.watch(model) as seen:
        model.generate(**given, max_new_tokens=5, min_new_tokens=5, do_sample=False, decoder_input_ids=start)
    written = torch.tensor([seen.capture().ids])
    assert written.shape[1] >= 5
    with torch.no_grad():
        eager = build(family, "eager")(**given, decoder_input_ids=written, output_attentions=True)
    same(seen.capture(of="cross"), [weights[0] for weights in eager.cross_attentions])
    same(seen.capture(of="decoder"), [weights[0] for weights in eager.decoder_attentions])


@some(["bert", "roberta", "vit"])
def test_encoders(family):
    given, model = inputs(family), build(family, NAME)
    with torch.no_grad():
        eager = build(family, "eager")(**given, output_attentions=True)
        with sl.huggingface.watch(model, layers=[1]) as seen:
            model(**given)
    capture = seen.capture()
    assert capture.layers == (1,)
    same(capture, [eager.attentions[1][0]])
    assert len(capture.tokens) == eager.attentions[1].shape[-1]


@pytest.mark.slow
def test_two_encoders_are_named():
    with torch.no_grad(), sl.huggingface.watch(model := build("clip", NAME)) as seen:
        model(**inputs("clip"))
    with pytest.raises(ValueError, match=r"of='model' is 2 of the parts.*vision_model.*text_model"):
        seen.capture(of="model")
    assert len(seen.capture(of="vision").tokens) == 10
    assert len(seen.capture(of="text").tokens) == 14


def llama_tokenizer():
    words = {word: number for number, word in enumerate(["<unk>", "a", "\u2581a", "\u2581cat", "s", "\u2581sat"])}
    inner = Tokenizer(models.BPE(words, [], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    from tokenizers import decoders

    inner.decoder = decoders.Metaspace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


def test_tokens_are_shown_as_they_stand_in_the_text():
    with torch.no_grad(), sl.huggingface.watch(model := build("gemma2", NAME)) as seen:
        model(torch.tensor([[3, 4, 5, 0]]))
    capture = seen.capture(llama_tokenizer())
    assert capture.tokens == (" cat", "s", " sat", "<unk>")
    assert "sat" in sl.page(capture)
    assert "Gemma2ForCausalLM" in capture.model


def test_the_last_pass_is_kept_and_gradients_flow():
    model, given = build("gemma2", NAME), inputs("gemma2", batch=1)
    with sl.huggingface.watch(model) as seen:
        model(given["input_ids"][:, :9])
        model(given["input_ids"]).logits.sum().backward()
    assert len(seen.capture().tokens) == 14
    watched = model.model.layers[0].self_attn.q_proj.weight.grad.clone()
    model.zero_grad()
    model(given["input_ids"]).logits.sum().backward()
    assert torch.allclose(watched, model.model.layers[0].self_attn.q_proj.weight.grad, atol=1e-4)


def test_beams_that_change_places_are_no_text():
    model = build("gemma2", NAME)
    with sl.huggingface.watch(model) as seen:
        model.generate(**inputs("gemma2", batch=1), max_new_tokens=6, num_beams=4, do_sample=False)
    with pytest.raises(ValueError, match="beams changed places"):
        seen.capture()


def test_what_cannot_be_watched_says_why():
    model = build("gemma2", NAME)
    other = "expected attn_implementation='sightline', and this Gemma2ForCausalLM has another"
    with pytest.raises(ValueError, match=other), sl.huggingface.watch(build("gemma2", "eager")):
        pass
    with pytest.raises(ValueError, match="has no layer 2"), sl.huggingface.watch(model, layers=[0, 2]):
        pass
    with sl.huggingface.watch(model) as seen:
        pass
    with pytest.raises(ValueError, match="nothing was seen"):
        seen.capture()
    with torch.no_grad(), sl.huggingface.watch(model) as seen:
        model(**inputs("gemma2"))
    with pytest.raises(ValueError, match="of='cross' is 0 of the parts"):
        seen.capture(of="cross")
    with pytest.raises(ValueError, match="so there is no 2"):
        seen.capture(sequence=2)
    with pytest.raises(RuntimeError, match="in the block"), sl.huggingface.watch(model):
        raise RuntimeError("in the block")
    assert WATCHERS == [] and not any(module._forward_pre_hooks for module in model.model.layers)


def test_every_family_is_watched():
    assert {*DECODERS, *PAIRS, "bert", "roberta", "vit", "clip"} == set(FAMILIES)
