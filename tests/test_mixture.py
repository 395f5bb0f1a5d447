"""What counts and a pointer say beside the network: shares that sum to one, the same in every way of asking."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sightline import losses
from sightline.batches import TokenFile, TokenizedCorpus, window_starts
from sightline.causality import check_causal
from sightline.checkpoints import load, save
from sightline.evaluation import evaluate
from sightline.generation import SampleConfig, sample_tokens
from sightline.losses import next_token_loss
from sightline.mixture import Pointer
from sightline.models import Decoder, DecoderConfig
from sightline.schedule import TrainConfig
from sightline.trainer import Trainer
from sightline.training import fit, train

SHAPE: dict[str, Any] = {"context": 16, "d_model": 16, "num_layers": 1, "num_heads": 2}
KINDS = [{"counts": 3}, {"pointer": True}, {"counts": 2, "pointer": True}, {"counts": 1}]


def text(length: int, seed: int = 0) -> TokenFile:
    """Tokens that mostly follow one another in a circle of nine."""
    random = np.random.default_rng(seed)
    ids = np.where(random.random(length) < 0.7, np.arange(length) % 9, random.integers(0, 9, length))
    return TokenFile(ids=ids.astype(np.uint16), num_bytes=length, num_words=length, num_unknown=0)


def built(**kind: Any) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(vocabulary=10, **SHAPE, **kind))
    if model.counts is not None:
        model.counts.count(text(300).ids)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def window() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.from_numpy(text(26, seed=1).ids.astype(np.int64)).view(2, 13)
    return ids[:, :-1], ids[:, 1:]


@pytest.mark.parametrize("kind", KINDS)
def test_shares_sum_to_one_and_the_loss_is_theirs(kind):
    model, (tokens, targets) = built(**kind), window()
    logits = model(tokens)
    torch.testing.assert_close(logits.exp().sum(-1), torch.ones(2, 12))
    torch.testing.assert_close(model.loss(tokens, targets), F.cross_entropy(logits.flatten(0, 1), targets.flatten()))
    last = F.cross_entropy(logits[:, -3:].flatten(0, 1), targets[:, -3:].flatten())
    torch.testing.assert_close(model.loss(tokens, targets, last=3), last)
    check_causal(model)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_with_the_cache_as_in_one_pass(kind):
    model, (tokens, _) = built(**kind), window()
    logits, cache = model(tokens), model.new_cache(batch=2)
    found = [model(tokens[:, :5], cache=cache), model(tokens[:, 5:6], cache=cache), model(tokens[:, 6:], cache=cache)]
    torch.testing.assert_close(torch.cat(found, dim=1), logits)
    torch.testing.assert_close(model(tokens, last=4), logits[:, -4:])
    again = model.new_cache(batch=2)
    model(tokens[:, :5], cache=again)
    again.reorder(torch.tensor([1, 1]))
    torch.testing.assert_close(model(tokens[[1, 1], 5:], cache=again), logits[[1, 1], 5:])
    config = SampleConfig(tokens=10, seed=1)
    assert list(sample_tokens(model, [1, 2], config)) == list(sample_tokens(model, [1, 2], config, use_cache=False))


def test_a_pointer_gives_what_it_attends_to():
    torch.manual_seed(0)
    pointer, x, tokens = Pointer(4).double(), torch.randn(1, 5, 4, dtype=torch.float64), torch.tensor([[0, 1, 0, 2, 1]])
    weights = pointer(x, *pointer.keep(x, tokens))[0, 0]
    for i in range(5):
        scores = torch.stack([pointer.query(x[0, i]) @ pointer.key(x[0, j]) for j in range(i + 1)]) / math.sqrt(4)
        torch.testing.assert_close(weights[i, : i + 1], scores.softmax(0).float())
        assert not weights[i, i + 1 :].any()


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_the_mixed_loss_in_chunks(rows, monkeypatch):
    random = torch.Generator().manual_seed(0)
    features, weight, share, beside = leaves = [
        torch.randn(*size, generator=random, dtype=torch.float64).requires_grad_()
        for size in ((20, 4), (11, 4), (20,), (20,))
    ]
    targets = torch.randint(11, (20,), generator=random)
    right = F.linear(features, weight).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    exact = -(share.exp() * right.exp() + beside.exp()).log().mean()
    monkeypatch.setattr(losses, "CHUNK_BYTES", rows * 11 * 8)
    found = next_token_loss(features, weight, targets, mixed=(share, beside))
    torch.testing.assert_close(found, exact)
    alone = torch.autograd.grad(2.5 * right.mean(), (features, weight), retain_graph=True)
    shared = torch.autograd.grad(-2.5 * exact, (share, beside))
    for ours, theirs in zip(torch.autograd.grad(-2.5 * found, leaves), (*alone, *shared), strict=True):
        torch.testing.assert_close(ours, theirs)
    with pytest.raises(ValueError, match="smoothing or a mixture"):
        next_token_loss(features, weight, targets, smoothing=0.1, mixed=(share, beside))


def test_in_training_a_window_is_read_by_counts_of_the_rest():
    """With its own counts a text looks easy; the trainer's loss must be that of text which was left out."""
    valid, data = text(300, seed=1), text(300)
    model = built(counts=3)
    assert model.mixture is not None
    with torch.no_grad():
        model.mixture.gate.weight.zero_()
        model.mixture.gate.bias.copy_(torch.tensor([-50.0, 0.0]))  # counts alone
    trainer = Trainer(model, TokenizedCorpus(train=data, valid=valid), TrainConfig(steps=1, batch=64))
    own = evaluate(model, data).loss
    (step,) = trainer.take_step(0.0)
    assert step.loss > own + 0.3
    assert model.counts is not None
    places = window_starts(data, step=0, seed=0, batch=64, context=16)[:, None] + np.arange(1, 17)
    share, _ = model.counts.apart(torch.from_numpy(places))
    assert step.loss == pytest.approx(-share.log().mean().item(), rel=1e-5)


def test_a_run_keeps_its_counts(tmp_path):
    data = TokenizedCorpus(train=text(400), valid=text(200, seed=1))
    config = TrainConfig(steps=6, batch=2, evaluate_every=3, precision="float32")
    torch.manual_seed(0)
    kind: dict[str, Any] = {**SHAPE, "counts": 3, "pointer": True}
    model = Decoder(DecoderConfig(vocabulary=10, **kind))
    result = fit(model, data, tmp_path / "run", config)
    loaded = load(tmp_path / "run" / "step-6")
    assert evaluate(loaded, text(200, seed=1), context=16, batch=2).loss == result.final.loss
    save(tmp_path / "again", loaded)
    assert torch.equal(
        load(tmp_path / "again").get_buffer("mixture.counts.runs_3"), model.get_buffer("mixture.counts.runs_3")
    )


@pytest.mark.parametrize("kind", KINDS[:2])
def test_no_model_of_transformers(kind, tmp_path):
    with pytest.raises(ValueError, match=f"no model of transformers computes this one: {next(iter(kind))} is"):
        save(tmp_path / "model", built(**kind), format="huggingface")


def test_the_command_goes_on_with_it(tmp_path):
    source = tmp_path / "text.txt"
    source.write_text("the cat sat on the mat. " * 60, encoding="utf-8")
    run: dict[str, Any] = {"model": {**SHAPE, "counts": 4}, "tokenizer": "characters"}
    train(source, tmp_path / "run", config={"steps": 4, "batch": 2}, **run)
    with_more = train(source, tmp_path / "run", config={"steps": 8, "batch": 2}, resume=True, **run)
    assert with_more.final.loss < with_more.start.loss
