"""Runs of a second, for tests: a model, a text with an order to learn, and what a run has left."""

import json

import numpy as np
import torch

from sightline.batches import TokenFile, TokenizedCorpus
from sightline.events import Stepped
from sightline.models import Decoder, DecoderConfig
from sightline.training import TrainConfig

VOCABULARY = 7
# float32 also where auto would take bfloat16: what is compared is compared exactly.
CONFIG = TrainConfig(steps=20, batch=4, evaluate_every=5, evaluate_batches=2, learning_rate=0.01, precision="float32")
SMALL = {"context": 8, "d_model": 16, "num_layers": 1, "num_heads": 2}


def token_file(length, seed):
    """Text with an order to learn: each token is the last one plus 0, 1 or 2."""
    steps = np.random.default_rng(seed).integers(0, 3, length)
    ids = (np.cumsum(steps) % VOCABULARY).astype(np.uint16)
    return TokenFile(ids=ids, num_bytes=2 * length, num_words=length, num_unknown=0)


DATA = TokenizedCorpus(train=token_file(2000, 0), valid=token_file(300, 1))


def decoder(seed=0, **changes):
    shape = {**SMALL, "dropout": 0.1, **changes}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Decoder(DecoderConfig(vocabulary=VOCABULARY, **shape))


def losses(out):
    lines = (out / "log.jsonl").read_text(encoding="utf-8").splitlines()
    events = [json.loads(line) for line in lines]
    return [(event["step"], event["loss_nats"]) for event in events if event["event"] == "stepped"]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def same_weights(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


class Stopper:
    """A listener that raises Ctrl-C at a step."""

    def __init__(self, step):
        self.step = step

    def __call__(self, event):
        if isinstance(event, Stepped) and event.step == self.step:
            raise KeyboardInterrupt
