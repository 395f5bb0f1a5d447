import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sightline import evaluation
from sightline.batches import TokenFile
from sightline.causality import check_causal
from sightline.evaluation import Bigram, Evaluation, bigram, evaluate, unigram, unigram_probabilities
from sightline.models import Decoder, DecoderConfig


def token_file(ids, num_bytes=None, num_unknown=0):
    ids = np.asarray(ids, dtype=np.uint16)
    num_bytes = 3 * len(ids) if num_bytes is None else num_bytes
    return TokenFile(ids=ids, num_bytes=num_bytes, num_words=len(ids), num_unknown=num_unknown)


def decoder(context=8, dropout=0.0):
    torch.manual_seed(0)
    return Decoder(
        DecoderConfig(vocabulary=11, context=context, d_model=16, num_layers=2, num_heads=2, dropout=dropout)
    )


def random_ids(length, vocabulary=11, seed=0):
    return np.random.default_rng(seed).integers(0, vocabulary, length)


def loss_by_definition(model, ids, context):
    """Nats of every token but the first, each window read on its own, in float64."""
    model = model.double().eval()
    nats = []
    for start in range(0, len(ids) - 1, context):
        window = torch.tensor(ids[start : start + context + 1])
        logits = model(window[None, :-1])[0]
        for position, target in enumerate(window[1:]):
            scores = [math.exp(score) for score in logits[position].tolist()]
            nats.append(-math.log(scores[int(target)] / sum(scores)))
    model.float()
    return nats


@pytest.mark.parametrize(("length", "context", "batch"), [(50, 8, 3), (49, 8, 2), (9, 8, 4), (5, 8, 4), (33, 4, 100)])
def test_evaluate_is_the_definition(length, context, batch):
    model, ids = decoder(), random_ids(length)
    result = evaluate(model, token_file(ids), context=context, batch=batch)
    nats = loss_by_definition(model, ids, context)
    assert result.tokens == len(nats) == length - 1
    assert result.loss == pytest.approx(sum(nats) / len(nats), rel=1e-5)


def test_perplexity_and_bits_per_byte():
    result = Evaluation(loss=math.log(8), tokens=30, bytes=90, unknown=0.0)
    assert result.perplexity == pytest.approx(8)
    assert result.bits_per_byte == pytest.approx(1.0)
    assert "perplexity 8.00" in str(result)


def test_perplexity_of_a_hopeless_model_is_infinite():
    assert Evaluation(loss=1e4, tokens=1, bytes=1, unknown=0.0).perplexity == math.inf


def test_a_model_that_knows_nothing_needs_log_vocabulary():
    model = decoder()
    with torch.no_grad():
        model.embedding.weight.zero_()
    assert evaluate(model, token_file(random_ids(30))).loss == pytest.approx(math.log(11), rel=1e-6)


def test_some_batches_stand_for_their_share_of_the_bytes():
    result = evaluate(decoder(), token_file(random_ids(1000), num_bytes=5000), batch=2, batches=3)
    assert (result.tokens, result.bytes) == (48, 240)


def test_unknown_is_the_share_of_the_file():
    assert evaluate(decoder(), token_file(random_ids(50), num_unknown=5)).unknown == 0.1


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_put_back_and_dropout_is_off(training):
    model = decoder(dropout=0.5).train(training)
    first, second = (evaluate(model, token_file(random_ids(50))) for _ in range(2))
    assert first == second
    assert model.training is training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_mode_is_put_back_after_an_error():
    model = decoder().train()
    with pytest.raises(ValueError, match="ids under the vocabulary's 11, got 60"):
        evaluate(model, token_file([0, 1, 2, 60, 3]))
    assert model.training


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"context": 9}, "context from 1 to the model's 8, got 9"),
        ({"context": 0}, "context from 1 to the model's 8, got 0"),
        ({"batch": 0}, "batch of at least 1, got 0"),
        ({"batches": 0}, "batches of at least 1, got 0"),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluate(decoder(), token_file(random_ids(50)), **arguments)


@pytest.mark.parametrize(
    "score", [lambda t: evaluate(decoder(), t), lambda t: unigram(t, t, 11), lambda t: bigram(t, t, 11)]
)
def test_one_token_is_nothing_to_predict(score):
    with pytest.raises(ValueError, match="at least 2 tokens, got 1"):
        score(token_file([3]))


# --- Baselines ---------------------------------------------------------------------------------------

sequences = st.lists(st.integers(0, 6), min_size=2, max_size=60)


def bigram_by_definition(train, vocabulary):
    tokens, pairs = Counter(train), Counter(pairwise(train))

    def p(last, token):
        one = (tokens[token] + 1) / (len(train) + vocabulary)
        follow = {pair[1]: count for pair, count in pairs.items() if pair[0] == last}
        if not follow:
            return one
        return (follow.get(token, 0) + len(follow) * one) / (sum(follow.values()) + len(follow))

    return p


@given(train=sequences, held_out=sequences)
def test_baselines_are_their_definition(train, held_out):
    p = bigram_by_definition(train, 7)
    nats = [-math.log(p(last, token)) for last, token in pairwise(held_out)]
    result = bigram(token_file(train), token_file(held_out), vocabulary=7)
    assert result.loss == pytest.approx(sum(nats) / len(nats), rel=1e-12)
    assert result.tokens == len(nats)
    counts = Counter(train)
    nats = [-math.log((counts[token] + 1) / (len(train) + 7)) for token in held_out[1:]]
    assert unigram(token_file(train), token_file(held_out), 7).loss == pytest.approx(sum(nats) / len(nats), rel=1e-12)


@given(train=sequences, vocabulary=st.integers(7, 12))
def test_probabilities_sum_to_one(train, vocabulary):
    assert unigram_probabilities(token_file(train), vocabulary).sum() == pytest.approx(1)
    model = Bigram(token_file(train), vocabulary)
    everything = np.arange(vocabulary)
    for last in everything:
        assert model.probabilities(np.full(vocabulary, last), everything).sum() == pytest.approx(1)


def test_counting_in_pieces_changes_nothing(monkeypatch):
    train, held_out = token_file(random_ids(500)), token_file(random_ids(301, seed=1))
    whole = unigram(train, held_out, 11), bigram(train, held_out, 11)
    for size in (1, 7, 100, 300):
        monkeypatch.setattr(evaluation, "_CHUNK", size)
        pieces = unigram(train, held_out, 11), bigram(train, held_out, 11)
        assert [each.loss for each in pieces] == pytest.approx([each.loss for each in whole], rel=1e-12)


def test_a_bigram_beats_a_unigram_on_text_with_order():
    tokens = token_file([0, 1, 2, 3] * 100)
    assert bigram(tokens, tokens, 4).loss < 0.1 < unigram(tokens, tokens, 4).loss


def test_ids_beyond_the_vocabulary():
    with pytest.raises(ValueError, match="ids under the vocabulary's 5, got 9"):
        unigram(token_file([1, 9]), token_file([1, 2]), 5)
    with pytest.raises(ValueError, match="ids under the vocabulary's 5, got 9"):
        bigram(token_file([1, 2]), token_file([1, 9]), 5)


def test_the_mode_of_every_module_is_as_before():
    model = Decoder(DecoderConfig(vocabulary=5, context=4, d_model=8, num_layers=2, num_heads=2, dropout=0.5))
    model.blocks[0].eval()
    before = [module.training for module in model.modules()]
    evaluate(model, token_file(np.arange(20) % 5))
    check_causal(model)
    assert [module.training for module in model.modules()] == before


# --- Overlapping windows, and learning on the way ------------------------------------------------------


def a_model_and_text(length=30, context=8):
    torch.manual_seed(3)
    model = Decoder(DecoderConfig(vocabulary=10, context=context, d_model=16, num_layers=1, num_heads=2))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ids = np.random.default_rng(0).integers(0, 10, length).astype(np.uint16)
    return model.double(), TokenFile(ids=ids, num_bytes=length, num_words=1, num_unknown=0)


@pytest.mark.parametrize("length", [4, 9, 10, 29, 30])
@pytest.mark.parametrize("stride", [1, 3, 7, 8])
def test_overlapping_windows_are_their_definition(length, stride):
    """Each token's past reaches back to where its window begins: the first that has not scored it yet."""
    model, text = a_model_and_text(length)
    context, ids, losses = min(8, length - 1), torch.from_numpy(text.ids.astype(np.int64)), []
    scored = 0
    while scored < length - 1:
        end = context if not scored else min(scored + stride, length - 1)
        window = ids[end - context : end]
        with torch.no_grad():
            log_p = model(window[None])[0].log_softmax(-1)
        losses += [-log_p[i - (end - context), ids[i + 1]] for i in range(scored, end)]
        scored = end
    found = evaluate(model, text, stride=stride, batch=2)
    assert (found.tokens, found.loss) == (length - 1, pytest.approx(torch.stack(losses).mean().item(), rel=1e-9))


def test_a_past_helps_and_a_whole_stride_is_the_plain_number():
    model, text = a_model_and_text(25)  # three windows
    assert evaluate(model, text, stride=8).loss == pytest.approx(evaluate(model, text).loss, rel=1e-12)
    assert evaluate(model, text, stride=1).loss != evaluate(model, text).loss


def test_dynamic_evaluation_is_its_definition():
    model, text = a_model_and_text()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = evaluate(model.train(), text, dynamic=0.1)
    assert model.training and all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    optimizer, total, ids = torch.optim.SGD(model.parameters(), lr=0.1), 0.0, torch.from_numpy(text.ids.astype(int))
    for first in range(0, 29, 8):
        inputs, targets = ids[first : first + 8][: 29 - first], ids[first + 1 : first + 9]
        loss = torch.nn.functional.cross_entropy(model(inputs[None])[0], targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() * len(targets)
    assert found.tokens == 29 and found.loss == pytest.approx(total / 29, rel=1e-9)


def test_a_text_that_repeats_is_learned_on_the_way():
    model, _ = a_model_and_text()
    text = TokenFile(ids=np.tile(np.arange(5), 40).astype(np.uint16), num_bytes=200, num_words=1, num_unknown=0)
    assert evaluate(model, text, dynamic=0.1).loss < 0.8 * evaluate(model, text).loss


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"stride": 0}, "stride from 1 to the context's 8, got 0"),
        ({"stride": 9}, "stride from 1 to the context's 8, got 9"),
        ({"dynamic": 0.0}, "dynamic rate above 0, got 0.0"),
        ({"dynamic": float("nan")}, "dynamic rate above 0, got nan"),
        ({"stride": 2, "dynamic": 0.1}, "got both"),
        ({"dynamic": 1e30}, r"the loss became \S+: give a dynamic rate below 1e\+30"),
    ],
)
def test_bad_strides_and_rates(setting, says):
    model, text = a_model_and_text()
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(ValueError, match=says):
        evaluate(model, text, **setting)
    assert all(torch.equal(one, two) for one, two in zip(before, model.parameters(), strict=True))


def test_a_text_is_no_token_file():
    model = Decoder(DecoderConfig(vocabulary=10, context=8, d_model=16, num_layers=1, num_heads=2))
    with pytest.raises(ValueError, match=r"expected a TokenFile, got str: sightline\.batches\.tokenize makes"):
        evaluate(model, "book.txt")  # type: ignore[arg-type]
