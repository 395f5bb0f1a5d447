"""The encoder sees everything but padding, and learns alone: hidden words, and what kind of text it reads."""

import dataclasses

import pytest
import torch
from torch import nn

from sightline.encoder import Classifier, Encoder, EncoderConfig, MaskedWords, hide_tokens

SMALL = {"vocabulary": 20, "context": 16, "d_model": 32, "num_layers": 2}
PRESETS = [
    EncoderConfig.modern(**SMALL),
    EncoderConfig.classic(**SMALL),
    EncoderConfig.modern(**SMALL, positions="alibi"),
    EncoderConfig.modern(**SMALL, positions="learned", norm="layer"),
]


@pytest.mark.parametrize("config", PRESETS)
def test_padding_changes_nothing(config):
    torch.manual_seed(0)
    model = Encoder(config).eval()
    tokens = torch.randint(20, (3, 9))
    lengths = torch.tensor([9, 4, 6])
    with torch.no_grad():
        padded = model(tokens, lengths)
        for row, length in enumerate(lengths.tolist()):
            alone = model(tokens[row : row + 1, :length])[0]
            torch.testing.assert_close(padded[row, :length], alone, atol=1e-5, rtol=1e-5)


def test_every_token_sees_every_other():
    torch.manual_seed(0)
    model = Encoder(EncoderConfig(**SMALL)).eval()
    tokens = torch.randint(20, (1, 6))
    x = model.embedding(tokens).detach().requires_grad_()
    for place in (0, 3, 5):
        (grad,) = torch.autograd.grad(model.read(x)[0, place].sum(), x)
        assert (grad[0].abs().sum(-1) > 0).all()


def test_classic_is_the_papers_base():
    config = EncoderConfig.classic(vocabulary=37_000)
    assert (config.d_model, config.num_layers, config.num_heads, config.d_ff) == (512, 6, 8, 2048)
    assert (config.norm, config.norm_first, config.final_norm, config.dropout) == ("layer", False, False, 0.1)
    assert (config.activation, config.positions, config.scale_embeddings) == ("relu", "sinusoidal", True)


def test_a_config_is_the_dictionary_it_was_written_as():
    for config in PRESETS:
        assert EncoderConfig.from_dict(config.to_dict()) == config
        assert dataclasses.replace(config, dropout=0.5).d_ff == config.d_ff


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"d_model": 30}, "d_model 30 is not divisible by num_heads 4"),
        ({"d_model": 36, "num_heads": 4}, "rotary positions need an even width of heads, got 9"),
        ({"num_layers": 0}, "num_layers must be a whole number of at least 1, got 0"),
        ({"norm": "batch"}, "norm must be one of rms, layer; got 'batch'"),
        ({"final_norm": "yes"}, "final_norm must be one of None, True, False; got 'yes'"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        ({"bias": 1}, "bias must be true or false, got 1"),
        ({"layers": 3}, "unknown key 'layers'; did you mean 'num_layers'"),
    ],
)
def test_bad_settings_are_named(changes, line):
    with pytest.raises(ValueError, match=f"EncoderConfig: {line}"):
        EncoderConfig.from_dict({"vocabulary": 10, **changes})


def test_bad_tokens_are_named():
    model = Encoder(EncoderConfig(**SMALL))
    with pytest.raises(ValueError, match="at most 16 tokens, the context, got 17"):
        model(torch.zeros(1, 17, dtype=torch.int64))
    with pytest.raises(ValueError, match="at least one whole number"):
        model(torch.zeros(1, 3))


def test_hidden_tokens_are_a_share_of_the_real_ones():
    draw = torch.Generator().manual_seed(0)
    tokens, lengths = torch.randint(5, (200, 50), generator=draw), torch.full((200,), 20)
    hidden, where = hide_tokens(tokens, mask_token=9, share=0.3, lengths=lengths, generator=draw)
    assert not where[:, 20:].any() and abs(where[:, :20].float().mean() - 0.3) < 0.02
    assert (hidden[where] == 9).all() and torch.equal(hidden[~where], tokens[~where])
    with pytest.raises(ValueError, match="share must be above 0"):
        hide_tokens(tokens, mask_token=9, share=0.0)


def train(model: nn.Module, loss_of, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(step).backward()
        optimizer.step()


def counting(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts that count up from a random start: what is hidden follows from what stands on either side."""
    draw = torch.Generator().manual_seed(step)
    starts = torch.randint(18, (32, 1), generator=draw)
    return (starts + torch.arange(12)) % 18, torch.randint(6, 13, (32,), generator=draw)


def test_it_learns_hidden_words():
    torch.manual_seed(0)
    model = MaskedWords(Encoder(EncoderConfig(**SMALL)))

    def loss(step: int) -> torch.Tensor:
        tokens, lengths = counting(step)
        hidden, where = hide_tokens(
            tokens, mask_token=19, lengths=lengths, generator=torch.Generator().manual_seed(step)
        )
        return model.loss(hidden, where, tokens, lengths)

    train(model, loss, 120)
    tokens, lengths = counting(10_000)
    hidden, where = hide_tokens(tokens, mask_token=19, lengths=lengths, generator=torch.Generator().manual_seed(1))
    found = model.eval()(hidden, lengths).argmax(-1)
    assert (found[where] == tokens[where]).float().mean() > 0.95
    with pytest.raises(ValueError, match="no token is hidden"):
        model.loss(tokens, torch.zeros_like(where), tokens)


def test_it_learns_to_tell_texts_apart():
    torch.manual_seed(0)
    model = Classifier(Encoder(EncoderConfig(**SMALL)), num_classes=2)

    def texts(step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Is there a 7 right after a 3? Both tokens stand in every text, in some order."""
        draw = torch.Generator().manual_seed(step)
        tokens, classes = torch.randint(8, 18, (32, 10), generator=draw), torch.randint(2, (32,), generator=draw)
        place = torch.randint(5, (32,), generator=draw)
        rows = torch.arange(32)
        tokens[rows, place] = torch.where(classes == 1, 3, 7)
        tokens[rows, place + 1] = torch.where(classes == 1, 7, 3)
        return tokens, classes, torch.randint(7, 11, (32,), generator=draw)

    def loss(step: int) -> torch.Tensor:
        tokens, classes, lengths = texts(step)
        return model.loss(tokens, classes, lengths)

    train(model, loss, 120)
    tokens, classes, lengths = texts(10_000)
    logits = model.eval()(tokens, lengths)
    assert (logits.argmax(-1) == classes).float().mean() > 0.95
    tokens[torch.arange(10) >= lengths[:, None]] = 3
    torch.testing.assert_close(model(tokens, lengths), logits, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="num_classes must be at least 2"):
        Classifier(model.encoder, 1)
