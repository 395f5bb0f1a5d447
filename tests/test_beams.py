"""Beam search finds what an exhaustive search finds; greedy, drawn and searched targets end as they should."""

import itertools

import pytest
import torch

from sightline.beams import DecodeConfig, find_targets
from sightline.encoder_decoder import EncoderDecoder, EncoderDecoderConfig

END = 0


def made(vocabulary: int = 5, seed: int = 0) -> tuple[EncoderDecoder, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    model = EncoderDecoder(EncoderDecoderConfig(vocabulary=vocabulary, context=64, d_model=32, num_layers=1))
    with torch.no_grad():  # sharper than a new model
        model.embedding.tokens.weight.mul_(3)
    return model, torch.randint(1, vocabulary, (3, 6)), torch.tensor([6, 3, 5])


def score(model: EncoderDecoder, source: torch.Tensor, target: list[int], penalty: float) -> float:
    """Of a target that ends, by its definition."""
    whole = torch.tensor([[END, *target, END]])
    with torch.no_grad():
        shares = model.eval()(source[None], whole[:, :-1])[0].double().log_softmax(-1)
    total = float(shares.gather(1, whole[0, 1:, None]).sum())
    return total / ((5 + len(target) + 1) / 6) ** penalty


@pytest.mark.parametrize("penalty", [0.0, 0.6, 2.0])
def test_a_beam_that_holds_everything_is_exhaustive(penalty):
    model, source, lengths = made(vocabulary=4)
    config = DecodeConfig(beam=100, length_penalty=penalty, tokens=3)
    found = find_targets(model, source, lengths, END, config)
    for row, target in enumerate(found):
        own = source[row, : lengths[row]]
        every = [list(t) for n in range(4) for t in itertools.product(range(1, 4), repeat=n)]
        best = max(every, key=lambda t: score(model, own, t, penalty))
        assert target == best


@pytest.mark.parametrize("seed", range(3))
def test_greedy_takes_the_likeliest_token_at_every_step(seed):
    model, source, lengths = made(seed=seed)
    found = find_targets(model, source, lengths, END, DecodeConfig(beam=1, tokens=10))
    for row, target in enumerate(found):
        expected: list[int] = []
        while len(expected) < 10:
            with torch.no_grad():
                logits = model(source[row : row + 1, : lengths[row]], torch.tensor([[END, *expected]]))
            token = int(logits[0, -1].argmax())
            if token == END:
                break
            expected.append(token)
        assert target == expected


def test_a_batch_finds_what_each_source_finds_alone():
    model, source, lengths = made()
    together = find_targets(model, source, lengths, END, DecodeConfig(tokens=12))
    for row in range(3):
        n = int(lengths[row])
        alone = find_targets(model, source[row : row + 1, :n], lengths[row : row + 1], END, DecodeConfig(tokens=12))
        assert together[row] == alone[0]


def test_a_target_is_cut_at_its_limit():
    model, source, lengths = made()
    for config in (DecodeConfig(tokens=1), DecodeConfig(beam=1, tokens=2), DecodeConfig(temperature=1.0, tokens=2)):
        assert all(len(target) <= (config.tokens or 0) for target in find_targets(model, source, lengths, END, config))
    longest = find_targets(model, source, lengths, END, DecodeConfig(temperature=5.0, seed=1))
    assert all(len(target) <= min(int(n) + 50, 63) for target, n in zip(longest, lengths, strict=True))


def test_drawing_follows_the_seed_and_the_distribution():
    model, source, lengths = made()
    draws = [
        find_targets(model, source, lengths, END, DecodeConfig(temperature=1.0, seed=s, tokens=8)) for s in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]
    greedy = find_targets(model, source, lengths, END, DecodeConfig(beam=1, tokens=8))
    assert find_targets(model, source, lengths, END, DecodeConfig(temperature=1e-6, tokens=8)) == greedy
    many = source[:1].expand(4000, -1)
    first = find_targets(model, many, torch.full((4000,), 6), END, DecodeConfig(temperature=1.0, seed=0, tokens=1))
    with torch.no_grad():
        shares = model(source[:1], torch.tensor([[END]]))[0, -1].softmax(-1)
    counts = torch.bincount(torch.tensor([t[0] if t else END for t in first]), minlength=5) / 4000
    assert (counts - shares).abs().max() < 0.03


def test_the_model_keeps_its_mode_and_the_weights_their_gradients():
    model, source, lengths = made()
    model.train()
    find_targets(model, source, lengths, END, DecodeConfig(tokens=2))
    assert model.training and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"beam": 0}, "beam must be at least 1"),
        ({"tokens": 0}, "tokens must be at least 1"),
        ({"length_penalty": -1.0}, "length_penalty must be a number of at least 0"),
        ({"seed": 1}, "no effect without a temperature"),
        ({"temperature": 1.0, "beam": 8}, "drawn or searched for"),
        ({"temperature": 0.0}, "temperature must be a number above 0"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p must be above 0"),
    ],
)
def test_bad_settings_are_named(settings, line):
    with pytest.raises(ValueError, match=line):
        DecodeConfig(**settings)
