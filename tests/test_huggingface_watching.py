"""What was watched against eager attention's weights: every layer and head, step by step, part by part."""

import copy
import inspect

import pytest
import torch

transformers = pytest.importorskip("transformers")

from families import (  # noqa: E402 (after the skip)
    ALTERNATE,
    DECODERS,
    ENCODER,
    FAMILIES,
    PAIRS,
    PICTURE,
    SINCE_5,
    SMALL,
    WIDE,
    build,
    inputs,
)
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402

import sightline as sl  # noqa: E402
from sightline.huggingface.interface import NAME, WATCHERS  # noqa: E402

transformers.logging.set_verbosity_error()
sl.huggingface.enable()

MODERN = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 0)
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


def test_bytes_of_a_split_character_are_no_letters():
    own = sl.Tokenizer.train("bpe", ["the cat"], vocabulary=260)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(own.to_json()))
    ids = own.encode("a é")
    with torch.no_grad(), sl.huggingface.watch(model := build("gemma2", NAME, vocab_size=300)) as seen:
        model(torch.tensor([ids]))
    tokens = seen.capture(theirs).tokens
    assert tokens == seen.capture(own).tokens == ("a", " ", "\\xc3", "\\xa9")


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


@pytest.mark.parametrize("seed", [3, 13, 17, 60])
def test_beams_are_captured_as_texts_or_not_at_all(seed):
    """With few words beams change places that end in the same one, and that layer 0 cannot tell apart by it."""
    model, eager = (build("llama", kind, vocab_size=9) for kind in (NAME, "eager"))
    ids = torch.randint(3, 9, (1, 5), generator=torch.Generator().manual_seed(seed))
    with sl.huggingface.watch(model) as seen:
        model.generate(ids, num_beams=3, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    for sequence in range(3):
        try:
            capture = seen.capture(sequence=sequence)
        except ValueError as error:
            assert "beams changed places" in str(error)
        else:
            with torch.no_grad():
                attentions = eager(torch.tensor([capture.ids]), output_attentions=True).attentions
            same(capture, [weights[0] for weights in attentions])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["mistral", "llama4"])
def test_a_prompt_in_pieces_is_one_prompt(family, cache):
    if (family, cache) == ("mistral", "static") and not MODERN:
        pytest.skip("this transformers has no static cache with a window that takes a prompt in pieces")
    ids = torch.randint(3, 61, (2, 40), generator=torch.Generator().manual_seed(3))
    padding = torch.ones_like(ids)
    padding[0, :17] = 0  # two whole pieces, and a part of the third
    options = {"prefill_chunk_size": 7, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    options |= {"cache_implementation": "static"} if cache == "static" else {}
    with sl.huggingface.watch(model := build(family, NAME)) as seen:
        written = model.generate(ids, attention_mask=padding, pad_token_id=0, **options)
    whole = torch.cat([padding, torch.ones(2, 3, dtype=torch.int64)], dim=1)
    positions = (whole.cumsum(1) - 1).clamp(min=0)
    if not MODERN:  # all but the last token are given positions that count the padding
        positions[:, :39] = torch.arange(39)
    with torch.no_grad():
        eager = build(family, "eager")(
            written[:, :-1], attention_mask=whole, position_ids=positions, output_attentions=True
        )
    for sequence, start in enumerate((17, 0)):
        capture, own = seen.capture(sequence=sequence), slice(start, None)
        assert (capture.ids, capture.prompt) == (tuple(written[sequence, start:-1].tolist()), 40 - start)
        same(capture, [weights[sequence] for weights in eager.attentions], queries=own, keys=own)


def test_the_map_of_a_long_prompt_in_pieces_is_as_coarse_as_in_one():
    model = build("mistral", NAME, max_position_embeddings=70_000, num_hidden_layers=1)
    with sl.huggingface.watch(model) as seen:
        model.generate(torch.full((1, 66_000), 5), prefill_chunk_size=8192, max_new_tokens=1, do_sample=False)
    assert seen.capture().map_block == 128


def test_the_prompt_is_known_without_a_cache_and_of_vectors():
    model, given = build("gemma2", NAME), inputs("gemma2")
    vectors = model.get_input_embeddings()(given["input_ids"])
    options = {"attention_mask": LEFT, "max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    for asked in (given | {"use_cache": False}, {"inputs_embeds": vectors}):
        with sl.huggingface.watch(model) as seen:
            model.generate(**asked, **options)
        capture = seen.capture()
        assert (capture.prompt, len(capture.tokens)) == (9, 11)
    assert "generate" not in vars(model)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_tokens_that_were_guessed_are_no_text(family):
    model, ids = build(family, NAME), inputs(family, batch=1)["input_ids"]
    ids = ids[:, :5].repeat(1, 5)
    with sl.huggingface.watch(model) as seen:
        model.generate(ids, prompt_lookup_num_tokens=3, max_new_tokens=8, do_sample=False, eos_token_id=60)
    with pytest.raises(ValueError, match=r"watch: tokens were guessed and taken back.*prompt_lookup_num_tokens$"):
        seen.capture()
    with sl.huggingface.watch(model) as seen:
        model.generate(ids, assistant_model=build("llama", NAME), max_new_tokens=4, do_sample=False)
        with pytest.raises(ValueError, match=r"watch: tokens were guessed and taken back"):
            seen.capture()
        model.generate(ids, max_new_tokens=4, do_sample=False)
    assert len(seen.capture().tokens) == 28  # a later text is its own


def test_a_cache_that_is_cropped_is_no_text_and_a_filled_one_begins_where_it_ends():
    model, ids = build("llama", NAME), inputs("llama", batch=1)["input_ids"]
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    caches = [transformers.DynamicCache(config=model.config) for _ in range(3)]
    with torch.no_grad():
        with sl.huggingface.watch(model) as seen:
            model(ids, **{name: caches[0]})
            caches[0].crop(-5)
            model(ids[:, 9:11], **{name: caches[0]})
        with pytest.raises(ValueError, match="watch: the cache was cropped"):
            seen.capture()
        eager = build("llama", "eager")(ids, output_attentions=True).attentions
        for cache in caches[1:]:
            model(ids[:, :9], **{name: cache})
        with sl.huggingface.watch(model) as seen:  # two texts that begin alike: the last is kept
            model(ids[:, 9:12], **{name: caches[1]})
            model(ids[:, 9:], **{name: caches[2]})
    capture = seen.capture()
    assert capture.shift == 9
    weights = torch.stack([capture.weights(1, head) for head in range(4)])
    torch.testing.assert_close(weights, eager[1][0, :, 9:], atol=2e-5, rtol=1e-3)


def other(name, shape, options):
    made, config = getattr(transformers, name), getattr(transformers, shape)(**options)
    return made._from_config(config, attn_implementation=NAME).eval()


@pytest.mark.skipif(not MODERN, reason="these models' attention does not go through the interface yet")
def test_layers_that_are_no_capture_are_named():
    given = inputs("bert")
    albert = other("AlbertModel", "AlbertConfig", ENCODER | {"embedding_size": 16, "num_hidden_layers": 3})
    split = other("DiffLlamaForCausalLM", "DiffLlamaConfig", SMALL)
    swin = {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2}
    windows, pixels = other("SwinModel", "SwinConfig", swin), {"pixel_values": torch.randn(2, 3, 16, 16)}
    for model, asked, words in (
        (albert, given, r"layer 0 of encoder\..*: called more than once in a pass"),
        (split, given, r"layers 0, 1 of model\.layers.*: called more than once in a pass"),
        (windows, pixels, r"have different shapes.*layer 0: batch 32, .*layer 1: batch 8, .*layers=\[0\]"),
    ):
        with torch.no_grad(), sl.huggingface.watch(model) as seen:
            model(**asked)
        with pytest.raises(ValueError, match=f"watch: .*{words}"):
            seen.capture()
    with torch.no_grad(), sl.huggingface.watch(windows, layers=[0]) as seen:
        windows(**pixels)
    assert len(seen.capture(sequence=31).tokens) == 4


def test_layers_without_attention_are_left_out():
    options = SMALL | {"num_local_experts": 2, "layer_types": ["linear_attention", "full_attention"]}
    model, given = other("MiniMaxForCausalLM", "MiniMaxConfig", options), inputs("llama")
    with torch.no_grad(), sl.huggingface.watch(model) as seen:
        model(**given)
    assert seen.capture().layers == (1,)
    model = other("MambaForCausalLM", "MambaConfig", {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 1})
    with torch.no_grad(), sl.huggingface.watch(model) as seen:
        model(**given)
    with pytest.raises(ValueError, match="watch: MambaForCausalLM ran, and no attention went through"):
        seen.capture()


def test_a_decoder_whose_first_tokens_see_both_ways_is_a_decoder():
    text = WIDE | {"vocab_size": 64, "sliding_window": 5, "query_pre_attn_scalar": 3, "layer_types": ALTERNATE}
    picture = PICTURE | {"image_size": 12, "patch_size": 4, "vision_use_head": False}
    ids = torch.tensor([[3, 4, 60, *[62] * 9, 61, 5, 6, 7]])
    given = {"input_ids": ids, "token_type_ids": (ids == 62).long(), "pixel_values": torch.randn(1, 3, 12, 12)}

    def made(kind):
        config = transformers.Gemma3Config(
            text_config=text, vision_config=picture, mm_tokens_per_image=9, image_token_index=62, boi_token_index=60,
            eoi_token_index=61,
        )  # fmt: skip
        torch.manual_seed(0)
        return transformers.Gemma3ForConditionalGeneration._from_config(config, attn_implementation=kind).eval()

    with torch.no_grad(), sl.huggingface.watch(model := made(NAME)) as seen:
        model(**given)
        eager = made("eager")(**given, output_attentions=True)
    capture = seen.capture()
    assert capture.ids == tuple(ids[0].tolist()) and capture.weights(1, 0)[3, 11] > 0
    same(capture, [weights[0] for weights in eager.attentions])
    assert seen.capture(of="encoder").tokens == tuple(map(str, range(9)))


def test_padding_behind_a_text_that_goes_on_and_padding_alone():
    model, given = build("gemma2", NAME), inputs("gemma2")
    with sl.huggingface.watch(model) as seen:
        model.generate(**given, attention_mask=LEFT.flip(1), max_new_tokens=3, do_sample=False)
    with pytest.raises(ValueError, match=r"sequence 0 has padding behind its first 9 tokens.*padding_side='left'"):
        seen.capture()
    assert len(seen.capture(sequence=1).tokens) == 16
    with torch.no_grad(), sl.huggingface.watch(model) as seen:
        model(**given, attention_mask=torch.tensor([[0] * 14, [1] * 14]))
    with pytest.raises(ValueError, match="sequence 0 is padding alone"):
        seen.capture()


def test_two_may_watch_and_a_copy_writes_with_its_own_weights():
    model, given = build("gemma2", NAME), inputs("gemma2", batch=1)
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    with sl.huggingface.watch(model) as all_layers, sl.huggingface.watch(model, layers=[1]) as one:
        model.generate(**given, **options)
        copied = copy.deepcopy(model)
        assert copied.generate.__self__ is copied
    assert [(seen.capture().layers, seen.capture().prompt) for seen in (all_layers, one)] == [((0, 1), 14), ((1,), 14)]


def test_what_was_computed_again_for_a_gradient_is_seen_once():
    model = build("llama", NAME).train()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    with sl.huggingface.watch(model) as seen:
        model(**inputs("llama", batch=1), use_cache=False).logits.sum().backward()
    assert len(seen.capture().tokens) == 14


def test_what_cannot_be_watched_says_why():
    model = build("gemma2", NAME)
    other = "expected attn_implementation='sightline', and this Gemma2ForCausalLM has another"
    with pytest.raises(ValueError, match=other), sl.huggingface.watch(build("gemma2", "eager")):
        pass
    with pytest.raises(ValueError, match="has no layer 2"), sl.huggingface.watch(model, layers=[0, 2]):
        pass
    for layers in ([], 0, "01", [0.5], [True]):
        with pytest.raises(ValueError, match="expected layers like"), sl.huggingface.watch(model, layers=layers):
            pass
    for top in (0, 2.5, "a"):
        with pytest.raises(ValueError, match="expected top to be"), sl.huggingface.watch(model, top=top):
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
    with pytest.raises(ValueError, match="expected the tokenizer of the model, or None; got str"):
        seen.capture("folder")
    with pytest.raises(RuntimeError, match="in the block"), sl.huggingface.watch(model):
        raise RuntimeError("in the block")
    assert WATCHERS == [] and not any(module._forward_pre_hooks for module in model.model.layers)


def test_every_family_is_watched():
    assert {*DECODERS, *PAIRS, "bert", "roberta", "vit", "clip"} == set(FAMILIES)
