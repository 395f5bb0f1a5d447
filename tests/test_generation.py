import math
from contextlib import closing
from dataclasses import replace
from functools import cache
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sightline.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from sightline.generation import ContextWarning, SampleConfig, generate, probabilities, sample_tokens
from sightline.models import Decoder, DecoderConfig, Positions
from sightline.tokenizers import Tokenizer

LINES = "The cat is on the mat .\nThe dog is not , and \N{LATIN SMALL LETTER E WITH ACUTE}t\N{EURO SIGN} too .\n"
# No deadline: a busy machine is no failure.
laws = settings(max_examples=30, deadline=None)

KINDS = ["words", "characters", "bpe"]


class Scripted(Decoder):
    """A Decoder whose logits are the next row of a script, whatever it reads; begun again at its end."""

    def __init__(self, rows):
        vocabulary = rows.shape[1]
        sizes = {"d_model": vocabulary, "num_layers": 1, "num_heads": 1, "head_width": 2, "d_ff": 2}
        super().__init__(DecoderConfig(vocabulary=vocabulary, context=10_000, positions="none", tied=False, **sizes))
        assert self.head is not None
        nn.init.eye_(self.head.weight)
        self.rows = rows
        self.read = []

    def features(self, tokens, *, cache=None):
        row = self.rows[len(self.read) % len(self.rows)]
        self.read.append(tokens[0].tolist())
        return row.expand(*tokens.shape, -1)


@cache
def tokenizer_of(kind):
    return Tokenizer.train(kind, [LINES], 400 if kind == "bpe" else None)


def certain_of(tokenizer, tokens):
    rows = torch.full((len(tokens), len(tokenizer)), -1e9)
    rows[range(len(tokens)), tokens] = 0.0
    model = Scripted(rows)
    model.tokenizer = tokenizer
    return model


def scripted(kind, text):
    tokenizer = tokenizer_of(kind)
    return certain_of(tokenizer, tokenizer.encode(text))


def decoder(context=16, preset=DecoderConfig.modern, **options):
    torch.manual_seed(0)
    sizes = {"vocabulary": 23, "tied": False, "d_model": 16, "num_layers": 2, "num_heads": 2} | options
    model = Decoder(preset(context=context, **sizes)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            # Weights large enough that the drawn tokens depend on every token read.
            parameter.add_(torch.randn_like(parameter))
    return model


# --- configuration ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, r"temperature must be a number above 0, but it is 0\.0: .* use top_k=1"),
        ({"temperature": -0.5}, r"temperature must be a number above 0, but it is -0\.5"),
        ({"temperature": math.nan}, "temperature must be a number above 0, but it is nan"),
        ({"temperature": math.inf}, "temperature must be a number above 0, but it is inf"),
        ({"top_p": 0.0}, r"top_p must be above 0 and at most 1, but it is 0\.0"),
        ({"top_p": 1.5}, r"top_p must be above 0 and at most 1, but it is 1\.5"),
        ({"top_p": math.nan}, "top_p must be above 0 and at most 1, but it is nan"),
        ({"min_p": 1.0}, r"min_p must be at least 0 and below 1, but it is 1\.0"),
        ({"min_p": -0.1}, r"min_p must be at least 0 and below 1, but it is -0\.1"),
        ({"top_k": 0}, "top_k must be at least 1, but it is 0"),
        ({"words": 0}, "words must be at least 1, but it is 0"),
        ({"tokens": -3}, "tokens must be at least 1, but it is -3"),
        ({"words": 5, "tokens": 7}, "words=5 and tokens=7 were given: give one of them"),
        ({"seed": -1}, "seed must be a whole number from 0 .* but it is -1"),
        ({"seed": 2**64}, "seed must be a whole number"),
        ({"stop": ""}, "stop must hold at least one character"),
    ],
)
def test_config_errors_name_the_value_on_one_line(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        SampleConfig(**options)
    assert "\n" not in str(caught.value)


# --- the distribution ---

# Few distinct values, so that ties are common.
logit_lists = st.lists(st.sampled_from([-math.inf, -3.0, -1.0, 0.0, 0.5, 0.5001, 4.0]), min_size=1, max_size=12)
logit_lists = logit_lists.filter(lambda numbers: max(numbers) > -math.inf)
configs = st.builds(
    SampleConfig,
    temperature=st.sampled_from([1e-300, 0.3, 1.0, 2.5, 1e300]),
    top_k=st.none() | st.integers(1, 15),
    top_p=st.floats(0.0, 1.0, exclude_min=True),
    min_p=st.floats(0.0, 1.0, exclude_max=True),
)


@laws
@given(logit_lists, configs)
def test_at_least_one_token_survives_and_shares_sum_to_one(numbers, config):
    shares = probabilities(torch.tensor(numbers), config)
    assert shares.dtype == torch.float64
    assert math.isclose(shares.sum().item(), 1.0)
    assert (shares >= 0).all() and shares.isfinite().all()


@laws
@given(logit_lists, st.sampled_from([0.3, 1.0, 2.5]))
def test_without_filters_it_is_softmax(numbers, temperature):
    logits = torch.tensor(numbers, dtype=torch.float64)
    expected = (logits / temperature).softmax(-1)
    torch.testing.assert_close(probabilities(logits, SampleConfig(temperature=temperature)), expected)


@laws
@given(logit_lists)
def test_top_k_1_is_argmax_of_the_lowest_id(numbers):
    shares = probabilities(torch.tensor(numbers), SampleConfig(top_k=1))
    assert shares[numbers.index(max(numbers))] == 1.0


@laws
@given(logit_lists, st.integers(1, 15))
def test_top_k_keeps_the_likeliest_and_of_ties_the_lowest_ids(numbers, k):
    shares = probabilities(torch.tensor(numbers), SampleConfig(top_k=k))
    ranked = sorted(range(len(numbers)), key=lambda token: (-numbers[token], token))
    expected = {token for token in ranked[:k] if numbers[token] > -math.inf}
    assert set(shares.nonzero()[:, 0].tolist()) == expected


@laws
@given(logit_lists, st.floats(0.01, 0.999))
def test_top_p_keeps_the_smallest_set_that_reaches_the_mass(numbers, top_p):
    full = torch.tensor(numbers, dtype=torch.float64).softmax(-1)
    kept = probabilities(torch.tensor(numbers), SampleConfig(top_p=top_p)).nonzero()[:, 0].tolist()
    ranked = sorted(range(len(numbers)), key=lambda token: (-numbers[token], token))
    assert set(kept) == set(ranked[: len(kept)])
    assert full[kept].sum() >= top_p - 1e-12
    assert full[ranked[: len(kept) - 1]].sum() < top_p + 1e-12


@laws
@given(logit_lists, st.floats(0.0, 0.99))
def test_min_p_keeps_what_is_probable_enough_beside_the_likeliest(numbers, min_p):
    full = torch.tensor(numbers, dtype=torch.float64).softmax(-1)
    kept = probabilities(torch.tensor(numbers), SampleConfig(min_p=min_p)) > 0
    assert torch.equal(kept, (full >= min_p * full.max()) & (full > 0))


def test_top_p_counts_what_top_k_has_left():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    shares = probabilities(logits, SampleConfig(top_k=2, top_p=0.5))
    # Of 0.4 and 0.3 alone the first holds 0.57: enough; of all four it holds 0.4: not enough.
    assert shares.tolist() == [1.0, 0.0, 0.0, 0.0]
    assert (probabilities(logits, SampleConfig(top_p=0.5)) > 0).tolist() == [True, True, False, False]


def test_top_p_stops_where_the_mass_is_reached_exactly():
    assert probabilities(torch.zeros(4), SampleConfig(top_p=0.5)).tolist() == [0.5, 0.5, 0.0, 0.0]


def test_temperature_comes_before_top_p():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert (probabilities(logits, SampleConfig(temperature=0.1, top_p=0.9)) > 0).tolist() == [True, False, False, False]


@pytest.mark.parametrize("wrong", [[math.nan, 1.0], [math.inf, 1.0], [-math.inf, -math.inf]])
def test_logits_that_are_not_numbers_are_an_error(wrong):
    with pytest.raises(ValueError, match=r"the logits of the next token must be numbers, .* use an earlier checkpoint"):
        probabilities(torch.tensor(wrong), SampleConfig())


@pytest.mark.parametrize("options", [{}, {"top_k": 4}, {"top_p": 0.8}, {"min_p": 0.2}, {"temperature": 2.0}])
def test_drawn_tokens_have_the_frequencies_of_the_distribution(options):
    logits = torch.tensor([1.0, 0.2, -1.0, 0.7, -2.0, 1.5, 0.0])
    model = Scripted(logits[None])
    draws = 1000
    tokens = torch.tensor(list(sample_tokens(model, [0], SampleConfig(tokens=draws, seed=5, **options))))
    expected = probabilities(logits, SampleConfig(**options)) * draws
    counts = tokens.bincount(minlength=len(logits)).double()
    alive = expected > 0
    assert (counts[~alive] == 0).all()
    chi_square = ((counts - expected)[alive].square() / expected[alive]).sum()
    # 22.5 is the 99.9 % quantile of chi-square with 6 degrees of freedom.
    assert chi_square < 22.5


@pytest.mark.parametrize(("number", "token"), [(0.0, 1), (math.nextafter(1.0, 0.0), 3)])
def test_a_token_without_probability_is_never_drawn(monkeypatch, number, token):
    model = Scripted(torch.tensor([[-1e9, 0.0, -1e9, 0.0, -1e9]]))
    monkeypatch.setattr(torch, "rand", lambda *size, dtype, generator: torch.full(size, number, dtype=dtype))
    assert list(sample_tokens(model, [0], SampleConfig(tokens=1))) == [token]


# --- tokens ---

MODELS = {positions: {"positions": positions} for positions in get_args(Positions)}
MODELS |= {"classic": {"preset": DecoderConfig.classic}, "tied": {"num_groups": 1, "tied": True}}


@pytest.mark.filterwarnings("ignore::sightline.generation.ContextWarning")
@pytest.mark.parametrize(
    ("prompt", "drawing"), [(1, {"seed": 7, "temperature": 4.0}), (16, {"top_k": 1}), (40, {"seed": 7, "top_p": 0.9})]
)
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_with_and_without_the_cache_the_same_tokens(options, prompt, drawing):
    model = decoder(**options)
    start = [(7 * place) % 23 for place in range(prompt)]
    config = SampleConfig(tokens=40, **drawing)
    with_cache = list(sample_tokens(model, start, config))
    assert with_cache == list(sample_tokens(model, start, config, use_cache=False))
    assert len(with_cache) == 40 and len(set(with_cache)) > 1


def by_definition(model, start, config):
    """Greedy tokens from one whole forward pass each, sliding as the docstring says."""
    window, new = list(start), []
    for _ in range(config.tokens):
        if len(window) > model.config.context:
            window = window[-math.ceil(model.config.context / 2) :]
        with torch.no_grad():
            logits = model(torch.tensor([window]))[0, -1]
        new.append(int(logits.argmax()))
        window.append(new[-1])
    return new


@pytest.mark.filterwarnings("ignore::sightline.generation.ContextWarning")
@pytest.mark.parametrize("context", [1, 2, 7, 16])
def test_greedy_tokens_are_those_of_whole_passes(context):
    model = decoder(context).eval()
    config = SampleConfig(tokens=40, top_k=1)
    expected = by_definition(model, [3, 1, 4], config)
    assert list(sample_tokens(model, [3, 1, 4], config)) == expected
    # The check can fail: another start writes something else.
    assert by_definition(decoder(16).eval(), [3, 1, 4], config) != by_definition(decoder(16).eval(), [9], config)


def test_the_same_seed_draws_the_same_and_another_does_not():
    model = decoder(64)
    first = list(sample_tokens(model, [1], SampleConfig(tokens=40, seed=1)))
    assert first == list(sample_tokens(model, [1], SampleConfig(tokens=40, seed=1)))
    assert first != list(sample_tokens(model, [1], SampleConfig(tokens=40, seed=2)))


def test_the_random_state_of_torch_is_neither_read_nor_moved():
    model = decoder(64)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    unseeded = [list(sample_tokens(model, [1], SampleConfig(tokens=40))) for _ in range(2)]
    assert torch.equal(before, torch.get_rng_state())
    assert unseeded[0] != unseeded[1]


def test_outgrowing_the_context_warns_once_a_call():
    model = decoder(8)
    for _ in range(2):
        with pytest.warns(ContextWarning, match="context of 8 tokens") as caught:
            list(sample_tokens(model, [1], SampleConfig(tokens=50, seed=0)))
        assert len(caught) == 1


def test_filling_the_context_exactly_does_not_warn():
    model = decoder(8)
    # The eighth new token needs a position for each of the start and seven others.
    assert len(list(sample_tokens(model, [1], SampleConfig(tokens=8, seed=0)))) == 8
    assert len(list(sample_tokens(model, list(range(8)), SampleConfig(tokens=1, seed=0)))) == 1


def test_a_prompt_longer_than_the_context_warns_before_its_first_token():
    tokens = sample_tokens(decoder(8), list(range(9)), SampleConfig(tokens=1, seed=0))
    with pytest.warns(ContextWarning):
        next(tokens)


@pytest.mark.parametrize("finish", [list, next], ids=["to the end", "stopped early"])
def test_the_mode_of_every_module_is_as_before(finish):
    model = decoder(16, dropout=0.5).train()
    kept = next(iter(model.children()))
    kept.eval()
    before = [module.training for module in model.modules()]
    with closing(sample_tokens(model, [1], SampleConfig(tokens=5, seed=0))) as tokens:
        finish(tokens)
    assert [module.training for module in model.modules()] == before
    assert any(before) and not all(before)


def test_dropout_is_off_while_tokens_are_drawn():
    config = SampleConfig(tokens=30, top_k=1)
    training = list(sample_tokens(decoder(64, dropout=0.5).train(), [1], config))
    assert training == list(sample_tokens(decoder(64).eval(), [1], config))


def test_switching_gradients_off_does_not_reach_the_caller():
    for _ in sample_tokens(decoder(16), [1], SampleConfig(tokens=2, seed=0)):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_a_model_that_has_written_can_be_trained():
    model = decoder(16).bfloat16()
    list(sample_tokens(model, [1], SampleConfig(tokens=2, seed=0)))
    model(torch.tensor([[1, 2, 3]])).sum().backward()


@pytest.mark.parametrize(
    ("tokens", "message"),
    [([], "needs at least one token"), ([1, 23], "from 0 to 22 .* but one is 23"), ([-1], "but one is -1")],
)
def test_wrong_tokens_are_an_error_at_once(tokens, message):
    with pytest.raises(ValueError, match=message):
        sample_tokens(decoder(16), tokens)


def test_a_model_that_yields_nan_is_an_error():
    model = decoder(16)
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    with pytest.raises(ValueError, match="the logits of the next token must be numbers"):
        list(sample_tokens(model, [1], SampleConfig(tokens=1)))


# --- text ---


@pytest.mark.parametrize("kind", KINDS)
def test_words_come_whole_with_the_space_before_them(kind):
    model = scripted(kind, " cat is on the mat ." if kind != "words" else "cat is on the mat .")
    assert list(generate(model, "The", SampleConfig(words=4))) == [" cat", " is", " on", " the"]


@pytest.mark.parametrize("kind", KINDS)
@laws
@given(seed=st.integers(0, 2**32), tokens=st.integers(1, 150))
def test_pieces_joined_are_the_decoded_new_text(kind, seed, tokens):
    tokenizer = tokenizer_of(kind)
    script = torch.randint(len(tokenizer), (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()
    pieces = list(generate(certain_of(tokenizer, script), "The cat", SampleConfig(tokens=tokens)))
    start = tokenizer.encode("The cat")
    assert "".join(pieces) == tokenizer.decode(start + script)[len(tokenizer.decode(start)) :]


@pytest.mark.parametrize("kind", KINDS)
def test_no_piece_ends_within_a_word_or_a_character(kind):
    pieces = list(generate(scripted(kind, LINES), None, SampleConfig(words=30)))
    assert len(pieces) == 30
    words = LINES.split()
    assert [piece.strip() for piece in pieces] == (words * 3)[:30]


@pytest.mark.parametrize("kind", ["characters", "bpe"])
def test_the_first_piece_may_complete_the_word_of_the_prompt(kind):
    pieces = list(generate(scripted(kind, "at is on"), "The c", SampleConfig(words=2)))
    assert pieces == ["at", " is"]


def test_a_limit_in_tokens_may_end_within_a_word():
    model = scripted("characters", " cat is on")
    assert list(generate(model, "The", SampleConfig(tokens=6))) == [" cat", " i"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop", ["on", "n the", " on the mat", "on the dog"])
def test_the_stop_text_ends_it_and_is_not_written(kind, stop):
    space = "" if kind == "words" else " "
    model = scripted(kind, space + "cat is on the mat .")
    written = "".join(generate(model, "The", SampleConfig(words=6, stop=stop)))
    whole = " cat is on the mat ."
    assert written == (whole[: whole.index(stop)] if stop in whole else whole)


def test_the_stop_text_is_not_looked_for_in_the_prompt():
    model = scripted("characters", "at is on ")
    assert list(generate(model, "The c", SampleConfig(words=2, stop="cat"))) == ["at", " is"]


@pytest.mark.parametrize("text", ["a", "\n", "\N{EURO SIGN}"])
@pytest.mark.parametrize("kind", ["characters", "bpe"])
def test_text_in_which_no_word_ends_comes_to_an_end(kind, text):
    model = scripted(kind, text)
    pieces = list(generate(model, "The", SampleConfig(words=3)))
    assert len(pieces) == 3
    assert set("".join(pieces)) == {text}


def test_line_ends_are_no_words():
    model = scripted("words", "The\n\ncat\n")
    assert "".join(generate(model, None, SampleConfig(words=3))).split() == ["The", "cat", "The"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt", [None, "", "The cat"])
def test_a_real_model_writes_the_same_with_and_without_the_cache(kind, prompt):
    tokenizer = tokenizer_of(kind)
    model = decoder(300)
    model = Decoder(replace(model.config, vocabulary=len(tokenizer))).double()
    model.tokenizer = tokenizer
    config = SampleConfig(words=3, seed=4)
    pieces = list(generate(model, prompt, config))
    assert pieces == list(generate(model, prompt, config, use_cache=False))
    assert len(pieces) == 3


@pytest.mark.parametrize("write", [generate, sample_tokens])
def test_a_model_of_another_kind_is_told_what_writes_with_it(write):
    translator = EncoderDecoder(EncoderDecoderConfig(vocabulary=9, d_model=32, num_layers=1))
    for model in (torch.nn.Linear(2, 2), translator):
        with pytest.raises(
            ValueError, match=rf"{write.__name__}: expected a Decoder, got {type(model).__name__}: sl.t"
        ):
            list(write(model, "a"))


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_prompt_it_starts_after_a_line_end(kind):
    model = scripted(kind, "The cat")
    assert next(generate(model, None, SampleConfig(words=1))) == "The"
    assert model.read[0] == tokenizer_of(kind).encode("\n")


def test_without_a_prompt_or_line_ends_it_starts_after_the_first_token():
    tokenizer = Tokenizer.train("characters", ["ab ab"])
    model = certain_of(tokenizer, tokenizer.encode("ab "))
    assert list(generate(model, "", SampleConfig(words=2))) == ["ab", " ab"]
    assert model.read[0] == [0]


def test_unknown_words_of_the_prompt_are_named():
    with pytest.raises(ValueError, match="lacks 'zebra', 'quagga': choose others or write <unk> in their place"):
        generate(scripted("words", "The cat"), "The zebra is quagga zebra")


def test_of_many_unknown_words_a_few_are_named():
    with pytest.raises(ValueError, match=r"'w3', 'w4', \.\.\. \(999 in all\): choose others"):
        generate(scripted("words", "The cat"), "The " + " ".join(f"w{i}" for i in range(999)))


def test_unknown_written_in_the_prompt_is_taken():
    model = scripted("words", "is on")
    assert list(generate(model, "The <unk>", SampleConfig(words=2))) == [" is", " on"]


def test_unknown_characters_of_the_prompt_are_named():
    with pytest.raises(ValueError, match=r"only use characters of .* lacks 'z': choose other characters"):
        generate(scripted("characters", "The cat"), "The zcat")


def test_a_model_without_a_tokenizer_is_an_error():
    with pytest.raises(ValueError, match=r"needs a model with a tokenizer, but model\.tokenizer is None"):
        generate(decoder(16), "The cat")
