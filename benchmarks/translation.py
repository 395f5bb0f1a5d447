"""The encoder-decoder beside torch.nn.Transformer: a step of training, decoding with the cache, the embedded job.

    python benchmarks/translation.py [--row training|decoding|job]

Whole: about six minutes on two idle cores, of which the job is three.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import sightline as sl

SHAPE = {"d_model": 256, "num_layers": 3, "num_heads": 8, "context": 512}
VOCABULARY, BATCH, TOKENS, ROUNDS = 8000, 16, 48, 7


class Peer(nn.Module):
    """What a user of PyTorch's Transformer writes around it: embedding, positions, head."""

    def __init__(self) -> None:
        super().__init__()
        width, layers = SHAPE["d_model"], SHAPE["num_layers"]
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.positions = sl.Sinusoidal(width, SHAPE["context"])
        self.transformer = nn.Transformer(
            width, SHAPE["num_heads"], layers, layers, 4 * width, dropout=0.1, batch_first=True
        )

    def loss(self, source, source_lengths, target, target_lengths):
        hidden = torch.arange(source.shape[1]) >= source_lengths[:, None]
        inputs = target[:, :-1]
        features = self.transformer(
            self.positions(self.embedding(source) * 16),
            self.positions(self.embedding(inputs) * 16),
            tgt_mask=nn.Transformer.generate_square_subsequent_mask(inputs.shape[1]),
            src_key_padding_mask=hidden,
            memory_key_padding_mask=hidden,
            tgt_is_causal=True,
        )
        real = torch.arange(1, target.shape[1]) < target_lengths[:, None]
        logits = F.linear(features, self.embedding.weight)
        return F.cross_entropy(logits[real], target[:, 1:][real], label_smoothing=0.1)


def training() -> None:
    torch.manual_seed(0)
    lengths = torch.randint(TOKENS // 2, TOKENS + 1, (2, BATCH))
    source, target = torch.randint(VOCABULARY, (2, BATCH, TOKENS)).unbind()
    batch = (source, lengths[0], target, lengths[1])
    ours = sl.EncoderDecoder(sl.EncoderDecoderConfig.classic(vocabulary=VOCABULARY, **SHAPE)).train()
    peer = Peer().train()
    losses = {"ours": lambda: ours.loss(*batch, smoothing=0.1), "torch.nn.Transformer": lambda: peer.loss(*batch)}
    optimizers = {
        name: torch.optim.AdamW(model.parameters(), fused=True)
        for name, model in (("ours", ours), ("torch.nn.Transformer", peer))
    }
    for precision in (torch.float32, torch.bfloat16):
        times: dict[str, list[float]] = {name: [] for name in losses}
        for number in range(ROUNDS + 1):
            for name, loss in losses.items():
                began = time.perf_counter()
                optimizers[name].zero_grad()
                with torch.autocast("cpu", dtype=precision, enabled=precision != torch.float32):
                    value = loss()
                value.backward()
                optimizers[name].step()
                if number:
                    times[name].append(time.perf_counter() - began)
        mine, theirs = (statistics.median(times[name]) for name in losses)
        print(f"training, {precision}: {mine * 1e3:.0f} ms a step, torch.nn.Transformer {theirs * 1e3:.0f} ms, "
              f"{theirs / mine:.2f} times its speed", flush=True)  # fmt: skip


def decoding() -> None:
    torch.manual_seed(0)
    model = sl.EncoderDecoder(sl.EncoderDecoderConfig.classic(vocabulary=VOCABULARY, **SHAPE)).eval()
    source, steps, beams = torch.randint(1, VOCABULARY, (1, 64)), 256, 4
    with torch.no_grad():
        memory = model.encode(source)
        began = time.perf_counter()
        cache, newest = model.new_cache(1, 64, beams=beams), torch.zeros(beams, 1, dtype=torch.int64)
        for _ in range(steps):
            logits = F.linear(model.decode(newest, memory, cache=cache)[:, -1], model.head_weight)
            cache.own.reorder(torch.tensor([0, 0, 1, 2]))
            newest = logits.argmax(-1, keepdim=True)
        cached = time.perf_counter() - began
        began = time.perf_counter()
        targets, whole = torch.zeros(beams, 1, dtype=torch.int64), memory.expand(beams, -1, -1)
        for _ in range(steps):
            logits = F.linear(model.decode(targets, whole)[:, -1], model.head_weight)
            targets = torch.cat((targets[[0, 0, 1, 2]], logits.argmax(-1, keepdim=True)), 1)
        again = time.perf_counter() - began
    print(f"decoding {steps} tokens, {beams} beams: {cached:.2f} s with the cache, {again:.2f} s re-running it, "
          f"{again / cached:.1f} times faster", flush=True)  # fmt: skip


def job() -> None:
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        result = sl.train_pairs("numerals", Path(folder) / "job", config=sl.TrainConfig(minutes=2.8))
        seconds = time.perf_counter() - began
        score = sl.score_pairs(sl.load(Path(folder) / "job"), sl.open_pairs("numerals").valid)
    print(f"numbers and dates: {score}, after {result.steps:,} steps in {seconds:.0f} s in all", flush=True)


def main() -> None:
    rows = {"training": training, "decoding": decoding, "job": job}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--row", choices=rows)
    chosen = parser.parse_args().row
    for name, row in rows.items():
        if chosen in (None, name):
            row()


if __name__ == "__main__":
    main()
