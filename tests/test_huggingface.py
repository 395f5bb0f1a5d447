"""Models of transformers on our attention against the same weights on eager attention, family by family."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from families import DECODERS, FAMILIES, PAIRS, PICTURE, SINCE_5, build, inputs  # noqa: E402 (after the skip)

import sightline as sl  # noqa: E402
from sightline.huggingface.interface import NAME, WATCHERS  # noqa: E402
from sightline.huggingface.recipes import Recipe, recipe_mask  # noqa: E402

transformers.logging.set_verbosity_error()
sl.huggingface.enable()

# Rounding, seen through two layers of weights of 0.25: ten times what a family shows.
NEAR = 1e-4
FEW = ("llama", "gemma2", "llama4")
MODERN = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 0)


def some(families):
    """All in the slow suite, a few in the default one."""
    marked = [pytest.param(name, marks=[] if name in FEW else [pytest.mark.slow]) for name in families]
    return pytest.mark.parametrize("family", [mark for mark in marked if MODERN or mark.values[0] not in SINCE_5])


def answer(model, **given):
    with torch.no_grad():
        output = model(**given)
    return output.get("logits", output.get("last_hidden_state", output.get("logits_per_image")))


def padded(ids, side):
    mask = torch.ones_like(ids)
    if side == "left":
        mask[0, :5] = 0
    else:
        mask[0, -5:] = 0
    return mask


@some(FAMILIES)
def test_a_forward_equals_eager(family):
    given = inputs(family)
    expected = answer(build(family, "eager"), **given)
    assert expected.std() > 0.1
    assert torch.allclose(answer(build(family, NAME), **given), expected, atol=NEAR)


@pytest.mark.parametrize("side", ["left", "right"])
@some([name for name in FAMILIES if name not in ("vit", "clip", "whisper")])
def test_a_padded_forward_equals_eager_where_there_is_text(family, side):
    given = inputs(family)
    mask = padded(given["input_ids"], side)
    eager, ours = (answer(build(family, name), **given, attention_mask=mask) for name in ("eager", NAME))
    real = mask.bool() if family not in PAIRS else torch.ones(eager.shape[:2], dtype=torch.bool)
    assert torch.allclose(ours[real], eager[real], atol=NEAR)
    if side == "left":  # causality alone hides what is to the right
        assert (answer(build(family, NAME), **given)[real] - eager[real]).abs().max() > 100 * NEAR


# OPT counts positions itself, gpt-oss turns them by the longest, and llama4 cuts chunks by text from 5.0 on.
@some([name for name in DECODERS if name not in ("opt", "gpt-oss") and (MODERN or name != "llama4")])
def test_packed_texts_equal_eager_and_each_alone(family):
    model, given = build(family, NAME), inputs(family, batch=1)
    packing = {"position_ids": torch.cat([torch.arange(6), torch.arange(8)])[None], "use_cache": False}
    packed = answer(model, **given, **packing)
    assert torch.allclose(packed, answer(build(family, "eager"), **given, **packing), atol=NEAR)
    alone = answer(model, input_ids=given["input_ids"][:, 6:])
    assert torch.allclose(packed[:, 6:], alone, atol=NEAR)


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
@some(DECODERS | PAIRS)
def test_generate_writes_what_eager_writes(family, cache, beams):
    if family == "deepseek_v3" and cache == "static" and not MODERN:
        pytest.skip("this transformers has no static cache for values of another width than keys")
    given = {name: value for name, value in inputs(family).items() if name != "decoder_input_ids"}
    if "input_ids" in given:
        given["attention_mask"] = padded(given["input_ids"], "left")
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": beams}
    options |= {"use_cache": cache != "none"} | ({"cache_implementation": "static"} if cache == "static" else {})
    scores = {"output_scores": True, "return_dict_in_generate": True}
    eager, ours = (build(family, name).generate(**given, **options, **scores) for name in ("eager", NAME))
    assert torch.equal(ours.sequences, eager.sequences)
    for found, expected in zip(ours.scores, eager.scores, strict=True):
        known = expected.isfinite()
        assert torch.allclose(found[known], expected[known], atol=NEAR)


@some([name for name in FAMILIES if name != "clip"])
def test_the_attentions_asked_for_hold_eagers_weights(family):
    given = inputs(family)
    if family in DECODERS:
        given["attention_mask"] = padded(given["input_ids"], "right")
    with torch.no_grad():
        eager, ours = (build(family, name)(**given, output_attentions=True) for name in ("eager", NAME))
    names = [name for name in eager if name.endswith("attentions") and eager[name]]
    assert names
    real = given["attention_mask"].bool() if family in DECODERS else slice(None)
    for name in names:
        assert len(ours[name]) == len(eager[name]) == 2
        for seen, weights in zip(ours[name], eager[name], strict=True):
            assert seen.weights().shape == weights.shape
            found, entropy = seen.weights().transpose(1, 2)[real], seen.entropy.transpose(1, 2)[real]
            weights = weights.transpose(1, 2)[real]
            assert torch.allclose(found, weights, atol=1e-5)
            assert torch.allclose(entropy, torch.special.entr(weights).sum(-1), atol=1e-4)


def test_attentions_come_when_asked_and_only_then():
    model, given = build("gpt2", NAME), inputs("gpt2")
    assert answer(model, **given) is not None
    with torch.no_grad():
        assert all(seen is None for seen in model(**given).get("attentions") or ())
        assert len(model(**given, output_attentions=True).attentions) == 2
        steps = model.generate(**given, max_new_tokens=3, output_attentions=True, return_dict_in_generate=True)
    assert [step[0].query.shape[2] for step in steps.attentions] == [14, 1, 1]
    with pytest.raises(ValueError, match="dropout cannot be observed"):
        model.train()(**given, output_attentions=True)
    with torch.no_grad():  # the failed call asks for nothing any more
        assert all(seen is None for seen in model.eval()(**given).get("attentions") or ())


# What a model has beside plain attention: without it the result is another one.
SPECIAL = {
    "mistral": {"sliding_window": 50},
    "gemma2": {"attn_logit_softcapping": None},
    "gemma3": {"sliding_window": 50},
    "llama4": {"attention_chunk_size": 50},
}


@pytest.mark.parametrize("family", SPECIAL)
def test_ignoring_what_is_special_would_be_caught(family):
    given = inputs(family)
    expected = answer(build(family, "eager"), **given)
    assert (answer(build(family, NAME, **SPECIAL[family]), **given) - expected).abs().max() > 100 * NEAR


def test_ignoring_sinks_would_be_caught():
    given, model = inputs("gpt-oss"), build("gpt-oss", NAME)
    with_sinks = answer(model, **given)
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.constant_(parameter, -torch.inf)
    assert (answer(model, **given) - with_sinks).abs().max() > 100 * NEAR


@pytest.mark.skipif(not MODERN, reason="its attention goes through the interface from 5.0")
def test_ignoring_a_position_bias_would_be_caught():
    given, model = inputs("t5"), build("t5", NAME)
    with_bias = answer(model, **given)
    for name, parameter in model.named_parameters():
        if "relative_attention_bias" in name:
            torch.nn.init.zeros_(parameter)
    assert (answer(model, **given) - with_bias).abs().max() > 10 * NEAR


@pytest.mark.parametrize("reentrant", [None, False, True])
@some(("llama", "gemma2", "gpt-oss", "llama4", "bart"))
def test_gradients_equal_eagers_with_and_without_checkpointing(family, reentrant):
    gradients = []
    for name in ("eager", NAME):
        model = build(family, name).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            for rate in ("dropout", "attention_dropout"):
                if isinstance(getattr(module, rate, None), float):
                    setattr(module, rate, 0.0)
        if reentrant is not None:
            checkpoint = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            checkpoint({"use_reentrant": reentrant})
        given = inputs(family)
        mask = padded(given["input_ids"], "right")
        labels = given.get("decoder_input_ids", given["input_ids"].masked_fill(mask == 0, -100))
        model(**given, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    eager, ours = gradients
    assert eager.keys() == ours.keys()
    for name, expected in eager.items():
        assert torch.allclose(ours[name], expected, atol=2e-5 * max(1, expected.abs().max())), name


def test_an_attention_is_set_on_a_living_model():
    given, model = inputs("llama"), build("llama", "eager")
    expected = answer(model, **given)
    model.set_attn_implementation(NAME)
    assert torch.allclose(answer(model, **given), expected, atol=NEAR)
    with torch.no_grad():
        assert len(model(**given, output_attentions=True).attentions) == 2


@pytest.mark.parametrize("family", ["Bloom", "Falcon", "Mpt"])
def test_a_model_without_the_interface_is_refused_when_it_is_made(family):
    made, config = getattr(transformers, f"{family}ForCausalLM"), getattr(transformers, f"{family}Config")
    sizes = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    refusal = f"{family}ForCausalLM does not go through"
    with pytest.raises(ValueError, match=refusal):
        made._from_config(config(**sizes), attn_implementation=NAME)
    model = made(config(**sizes))
    with pytest.raises(ValueError, match=refusal):
        model.set_attn_implementation(NAME)


def test_a_model_with_its_own_table_of_attentions_is_refused_when_it_is_made():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.GitConfig(vocab_size=20, vision_config=PICTURE | {"image_size": 12, "patch_size": 4}, **sizes)
    with pytest.raises(ValueError, match="of Git does not go through"):
        transformers.GitForCausalLM._from_config(config, attn_implementation=NAME)
    model = transformers.GitForCausalLM._from_config(config, attn_implementation="eager")
    with pytest.raises(ValueError, match="of GitForCausalLM does not go through"):
        model.set_attn_implementation(NAME)
    # What looks nothing up in that table runs as before.
    picture = transformers.GitVisionConfig(**PICTURE, image_size=12, patch_size=4)
    pixels = torch.randn(1, 3, 12, 12)
    torch.manual_seed(0)
    eager = transformers.GitVisionModel._from_config(picture, attn_implementation="eager").eval()
    torch.manual_seed(0)
    ours = transformers.GitVisionModel._from_config(picture, attn_implementation=NAME).eval()
    assert torch.allclose(answer(ours, pixel_values=pixels), answer(eager, pixel_values=pixels), atol=NEAR)


@pytest.mark.parametrize("argument", ["block_indices", "indices", "head_mask", "surprise"])
def test_what_may_change_scores_is_refused_by_name(argument):
    with pytest.raises(ValueError, match=f"LlamaAttention passes '{argument}'"):
        answer(build("llama", NAME), **inputs("llama"), **{argument: torch.ones(1)})
    assert answer(build("llama", NAME), **inputs("llama"), **{argument: None}).isfinite().all()


def test_a_mask_is_a_recipe_of_constant_size():
    model, seen = build("mistral", NAME), []
    layer = model.model.layers[0].self_attn
    layer.register_forward_pre_hook(lambda _, args, given: seen.append(given["attention_mask"]), with_kwargs=True)
    answer(model, **inputs("mistral"), attention_mask=padded(inputs("mistral")["input_ids"], "left"))
    (mask,) = seen
    assert isinstance(mask, Recipe) and mask.numel() == 0 and mask.shape[0] == 2
    assert (mask.mask.before, mask.mask.after, tuple(mask.mask.allowed.shape)) == (4, 0, (2, 1, 1, 14))
    assert mask.to("cpu").contiguous().detach() is mask
    with pytest.raises(ValueError, match="computes with its mask itself"):
        mask + 1


def test_a_mask_given_whole_is_taken_as_it_is():
    given, whole = inputs("llama"), torch.rand(2, 1, 14, 14) < 0.7
    whole |= torch.eye(14, dtype=torch.bool)
    added = torch.zeros(2, 1, 14, 14).masked_fill(~whole, torch.finfo(torch.float32).min)
    expected = answer(build("llama", "eager"), **given, attention_mask=added)
    for mask in (whole, added):
        assert torch.allclose(answer(build("llama", NAME), **given, attention_mask=mask), expected, atol=NEAR)


def test_a_pattern_that_is_not_known_is_asked_for_each_pair_up_to_a_size():
    sizes = {"q_length": 9, "q_offset": 0} if MODERN else {"cache_position": torch.arange(9)}
    recipe = recipe_mask(
        batch_size=1, kv_length=9, mask_function=lambda b, h, query, key: (query - key) % 3 == 0, **sizes
    )
    distance = torch.arange(9)[:, None] - torch.arange(9)
    assert torch.equal(recipe.mask.dense(9, 9).allowed[0, 0], distance % 3 == 0)
    sizes = {"q_length": 5000, "q_offset": 0} if MODERN else {"cache_position": torch.arange(5000)}
    with pytest.raises(ValueError, match="5000 x 5000 pairs are too many"):
        recipe_mask(batch_size=1, kv_length=5000, mask_function=lambda b, h, query, key: query == key, **sizes)


@pytest.mark.skipif(not MODERN, reason="its attention goes through the interface from 5.0")
def test_a_window_of_no_key_that_no_layer_has_changes_nothing():
    given = inputs("qwen2_moe")
    for mask in (None, padded(given["input_ids"], "left")):
        eager, ours = (answer(build("qwen2_moe", name), **given, attention_mask=mask) for name in ("eager", NAME))
        real = slice(None) if mask is None else mask.bool()
        assert torch.allclose(ours[real], eager[real], atol=NEAR)


def test_a_window_of_no_key_sees_none():
    from transformers.masking_utils import sliding_window_causal_mask_function

    sizes = {"q_length": 5, "q_offset": 0} if MODERN else {"cache_position": torch.arange(5)}
    recipe = recipe_mask(batch_size=1, kv_length=5, mask_function=sliding_window_causal_mask_function(0), **sizes)
    assert not recipe.mask.dense(5, 5).allowed.any()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mistral"])
def test_a_compiled_model_equals_eager(family):
    given = inputs(family)
    expected = answer(build(family, "eager"), **given)
    model = torch.compile(build(family, NAME), backend="aot_eager")
    assert torch.allclose(answer(model, **given), expected, atol=NEAR)
    masked = padded(given["input_ids"], "left")
    expected = answer(build(family, "eager"), **given, attention_mask=masked)
    assert torch.allclose(
        answer(model, **given, attention_mask=masked)[masked.bool()], expected[masked.bool()], atol=NEAR
    )


def test_a_graph_without_a_break_is_refused_in_words():
    model = torch.compile(build("mistral", NAME), backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="leave fullgraph=True out"):
        answer(model, **inputs("mistral"))


def test_nobody_is_left_watching():
    assert WATCHERS == []
