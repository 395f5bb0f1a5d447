"""The encoder-decoder beside torch.nn.Transformer: a step of training, decoding with the cache, the embedded job.

python benchmarks/translation.py [--row training decoding job] [--rounds 9] [--save]

Whole: about six minutes on two idle cores, of which the job is three.
"""

import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from measure import Report, arguments
from torch import Tensor, nn

import sightline as sl
from sightline.bench import interleaved

SHAPE = {"d_model": 256, "num_layers": 3, "num_heads": 8, "context": 512}
VOCABULARY, BATCH, TOKENS = 8000, 16, 48
SOURCE, STEPS, BEAMS = 64, 256, 4
MINUTES = 2.7
"""Of training; reading, the vocabulary and the last checkpoint are within three minutes with it."""


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

    def loss(self, source: Tensor, source_lengths: Tensor, target: Tensor, target_lengths: Tensor) -> Tensor:
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


def training(report: Report, rounds: int) -> None:
    torch.manual_seed(0)
    lengths = torch.randint(TOKENS // 2, TOKENS + 1, (2, BATCH))
    source, target = torch.randint(VOCABULARY, (2, BATCH, TOKENS)).unbind()
    batch = (source, lengths[0], target, lengths[1])
    ours = sl.EncoderDecoder(sl.EncoderDecoderConfig.classic(vocabulary=VOCABULARY, **SHAPE)).train()
    peer = Peer().train()

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, precision: torch.dtype, **options: float) -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=precision, enabled=precision != torch.float32):
            loss = model.loss(*batch, **options)  # pyright: ignore[reportCallIssue] (both have it)
        loss.backward()
        optimizer.step()

    moved = {model: torch.optim.AdamW(model.parameters(), fused=True) for model in (ours, peer)}
    report.say(
        f"\nTraining: 3 + 3 layers, 256 wide, 8 heads, dropout 0.1, {VOCABULARY:,} tokens of vocabulary, {BATCH} pairs "
        f"of {TOKENS // 2} to {TOKENS} tokens; milliseconds a step, AdamW for both."
    )
    report.table("precision", "ours", "torch.nn.Transformer", "times its speed")
    for precision in (torch.float32, torch.bfloat16):
        times = interleaved(
            {
                "ours": lambda precision=precision: step(ours, moved[ours], precision, smoothing=0.1),
                "peer": lambda precision=precision: step(peer, moved[peer], precision),
            },
            rounds=rounds if precision == torch.float32 else min(rounds, 3),  # where it is emulated: 9 s a step
        )
        name = str(precision).removeprefix("torch.")
        cells = (f"{times[side] * 1e3:.0f}" for side in ("ours", "peer"))
        report.row(name, *cells, f"{times['peer'] / times['ours']:.2f}")


@torch.no_grad()
def decoding(report: Report, rounds: int) -> None:
    torch.manual_seed(0)
    model = sl.EncoderDecoder(sl.EncoderDecoderConfig.classic(vocabulary=VOCABULARY, **SHAPE)).eval()
    memory = model.encode(torch.randint(1, VOCABULARY, (1, SOURCE)))
    order, begin = torch.tensor([0, 0, 1, 2]), torch.zeros(BEAMS, 1, dtype=torch.int64)

    def cached() -> None:
        cache, newest = model.new_cache(1, SOURCE, beams=BEAMS), begin
        for _ in range(STEPS):
            logits = F.linear(model.decode(newest, memory, cache=cache)[:, -1], model.head_weight)
            cache.own.reorder(order)
            newest = logits.argmax(-1, keepdim=True)

    def again() -> None:
        targets, whole = begin, memory.expand(BEAMS, -1, -1)
        for _ in range(STEPS):
            logits = F.linear(model.decode(targets, whole)[:, -1], model.head_weight)
            targets = torch.cat((targets[order], logits.argmax(-1, keepdim=True)), 1)

    times = interleaved({"ours": cached, "peer": again}, rounds=min(rounds, 3))
    report.say(f"\nDecoding {STEPS} tokens with {BEAMS} beams from a source of {SOURCE}, the same model; seconds.")
    report.table("with the cache", "running the decoder again", "times as fast")
    report.row(f"{times['ours']:.2f}", f"{times['peer']:.2f}", f"{times['peer'] / times['ours']:.1f}")


def job(report: Report, rounds: int) -> None:
    """Once: it is what a user does, and its time is given."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        result = sl.train_pairs("numerals", Path(folder) / "job", config=sl.TrainConfig(minutes=MINUTES))
        seconds = time.perf_counter() - began
        score = sl.score_pairs(sl.load(Path(folder) / "job"), sl.open_pairs("numerals").valid)
    report.say("\nThe embedded job, `sightline train numerals --task translate`, defaults; beam search with 4 beams.")
    report.table("seconds in all", "steps", "exact", "token accuracy", "held-out pairs")
    cells = (f"{score.exact:.2%}", f"{score.accuracy:.2%}", f"{score.pairs:,}")
    report.row(f"{seconds:.0f}", f"{result.steps:,}", *cells)


def main() -> None:
    rows = {"training": training, "decoding": decoding, "job": job}
    parser = arguments(__doc__ or "")
    parser.add_argument("--row", nargs="+", choices=rows, default=list(rows), help="some parts alone")
    options = parser.parse_args()
    report = Report("The encoder-decoder")
    for name in options.row:
        rows[name](report, options.rounds)
    if options.save:
        report.write("-".join(["translation", *(options.row if options.row != list(rows) else ())]))


if __name__ == "__main__":
    main()
