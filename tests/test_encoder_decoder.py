"""The whole Transformer: the paper's size, padding on both sides, causality, the cache, the loss."""

import pytest
import torch
import torch.nn.functional as F

from sightline.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from sightline.layers import MultiHeadAttention

SMALL = {"vocabulary": 20, "context": 24, "d_model": 32, "num_layers": 2}
PRESETS = [
    EncoderDecoderConfig.modern(**SMALL),
    EncoderDecoderConfig.classic(**SMALL),
    EncoderDecoderConfig.modern(**SMALL, positions="alibi", decoder_layers=1, tied=False),
]


def made(config: EncoderDecoderConfig) -> tuple[EncoderDecoder, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return EncoderDecoder(config).eval(), torch.randint(20, (3, 9)), torch.randint(20, (3, 7))


def test_the_papers_base_has_the_papers_number_of_parameters():
    with torch.device("meta"):
        model = EncoderDecoder(EncoderDecoderConfig.classic(vocabulary=37_000))
    attention, feed_forward, norm = 4 * (512 * 512 + 512), 2 * 512 * 2048 + 2048 + 512, 2 * 512
    encoder, decoder = attention + feed_forward + 2 * norm, 2 * attention + feed_forward + 3 * norm
    assert model.num_parameters == 37_000 * 512 + 6 * (encoder + decoder) == 63_082_496
    assert abs(model.num_parameters / 65e6 - 1) < 0.05  # table 3 says 65 million


@pytest.mark.parametrize("config", PRESETS)
def test_padding_on_both_sides_changes_nothing(config):
    model, source, target = made(config)
    source_lengths, target_lengths = torch.tensor([9, 4, 6]), torch.tensor([3, 7, 5])
    with torch.no_grad():
        padded = model(source, target, source_lengths)
        for row, (n, m) in enumerate(zip(source_lengths.tolist(), target_lengths.tolist(), strict=True)):
            alone = model(source[row : row + 1, :n], target[row : row + 1, :m])[0]
            torch.testing.assert_close(padded[row, :m], alone, atol=1e-5, rtol=1e-5)
        other = torch.where(torch.arange(9) < source_lengths[:, None], source, 3)
        late = torch.where(torch.arange(7) < target_lengths[:, None], target, 5)
        loss = model.loss(source, source_lengths, target, target_lengths)
        torch.testing.assert_close(model.loss(other, source_lengths, late, target_lengths), loss)


@pytest.mark.parametrize("config", PRESETS)
def test_a_later_token_of_the_target_changes_nothing_before_it(config):
    model, source, target = made(config)
    with torch.no_grad():
        before = model(source, target)
        target[:, 4] = (target[:, 4] + 1) % 20
        after = model(source, target)
    torch.testing.assert_close(after[:, :4], before[:, :4], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(after[:, 4:], before[:, 4:], atol=1e-3)


def test_the_target_sees_all_of_its_source():
    model, source, target = made(PRESETS[0])
    with torch.no_grad():
        before = model(source, target)
        for place in range(9):
            other = source.clone()
            other[:, place] = (other[:, place] + 1) % 20
            assert (model(other, target) - before).abs().amax((1, 2)).min() > 1e-4


@pytest.mark.parametrize("config", PRESETS)
def test_token_by_token_with_the_cache_is_one_pass(config):
    model, source, target = made(config)
    lengths = torch.tensor([9, 4, 6])
    with torch.no_grad():
        memory = model.encode(source, lengths)
        cache = model.new_cache(3, 9, capacity=7)
        steps = [model.decode(target[:, i : i + 1], memory, lengths, cache=cache) for i in range(7)]
        torch.testing.assert_close(torch.cat(steps, 1), model.decode(target, memory, lengths), atol=1e-5, rtol=1e-5)


def test_the_sources_keys_are_computed_once():
    model, source, target = made(PRESETS[0])
    calls = []
    for block in model.blocks:
        block.cross_attention.key.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        memory, cache = model.encode(source), model.new_cache(3, 9)
        for i in range(5):
            model.decode(target[:, i : i + 1], memory, cache=cache)
    assert len(calls) == len(model.blocks)


def test_several_targets_of_one_source_share_its_keys():
    model, source, _ = made(PRESETS[0])
    targets, lengths = torch.randint(20, (6, 5)), torch.tensor([9, 4, 6])
    with torch.no_grad():
        memory = model.encode(source, lengths)
        cache = model.new_cache(3, 9, beams=2)
        found = torch.cat([model.decode(targets[:, i : i + 1], memory, lengths, cache=cache) for i in range(5)], 1)
        twice = (memory.repeat_interleave(2, 0), lengths.repeat_interleave(2))
        torch.testing.assert_close(found, model.decode(targets, *twice), atol=1e-5, rtol=1e-5)


def test_the_loss_is_that_of_the_real_tokens():
    model, source, target = made(PRESETS[0])
    source_lengths, target_lengths = torch.tensor([9, 4, 6]), torch.tensor([3, 7, 5])
    with torch.no_grad():
        logits = model(source, target[:, :-1], source_lengths)
        real = torch.cat([logits[row, : n - 1] for row, n in enumerate(target_lengths.tolist())])
        wanted = torch.cat([target[row, 1:n] for row, n in enumerate(target_lengths.tolist())])
        for smoothing in (0.0, 0.1):
            expected = F.cross_entropy(real, wanted, label_smoothing=smoothing)
            found = model.loss(source, source_lengths, target, target_lengths, smoothing=smoothing)
            torch.testing.assert_close(found, expected)


def test_every_parameter_is_trained():
    for config in PRESETS:
        model, source, target = made(config)
        model.train().loss(source, torch.tensor([9, 4, 6]), target, torch.tensor([3, 7, 5])).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_training_and_evaluation_compute_the_same():
    model, source, target = made(PRESETS[0])  # joined products in training, without dropout
    torch.testing.assert_close(model.train()(source, target), model.eval()(source, target), atol=1e-5, rtol=1e-5)


def test_tied_is_one_embedding():
    model = EncoderDecoder(PRESETS[0])
    assert model.embedding is model.encoder.embedding and model.head_weight is model.embedding.tokens.weight
    apart = EncoderDecoder(EncoderDecoderConfig.modern(**SMALL, tied=False))
    assert apart.num_parameters == model.num_parameters + 2 * 20 * 32
    assert apart.embedding is not apart.encoder.embedding


def test_too_much_is_refused_with_both_numbers():
    model, source, target = made(PRESETS[0])
    with pytest.raises(ValueError, match="at most 24 tokens, the context, got 25"):
        model(torch.zeros(1, 25, dtype=torch.int64), target[:1])
    with pytest.raises(ValueError, match="30 tokens are beyond the context of 24"):
        model.new_cache(1, 9, capacity=30)
    with pytest.raises(ValueError, match="sources is 2 in source_lengths but 3 before it"):
        model.decode(target, model.encode(source), torch.tensor([1, 2]))


def test_every_kind_of_attention_is_there_to_be_watched():
    model, *_ = made(PRESETS[0])
    kinds = [name.split(".")[-1] for name, module in model.named_modules() if isinstance(module, MultiHeadAttention)]
    assert sorted(kinds) == ["attention"] * 4 + ["cross_attention"] * 2
