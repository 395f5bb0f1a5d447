"""Whether the native kernel shares torch's threads: in turn with torch's matrix product, and in a training step.

python benchmarks/training_step.py [--rounds 9] [--save]

Two pools of threads that wait for one another by spinning would make turns of kernel and product cost more than the
sum of both alone. The peer is PyTorch's SDPA, which stands in torch's pool by birth.
"""

import functools
from collections.abc import Callable
from unittest import mock

import torch
from measure import Report, arguments

from sightline import layers
from sightline.attention import attention
from sightline.bench import interleaved
from sightline.masks import Causal
from sightline.models import Decoder, DecoderConfig

SIDES = {"SDPA": "sdpa", "ours": "cpu"}
TURN = 10
SHAPES = ((12, 64, 128), (8, 256, 256), (2, 1024, 256), (1, 2048, 256))
"""Batch, tokens, d_model; heads of width 64, or 32 for the smallest."""


def turns(implementation: str, length: int) -> dict[str, Callable[[], object]]:
    """Attention alone, a matrix product of about the same cost alone, and both in turn, `TURN` times each."""
    query, key, value = torch.randn(3, 1, 8, length, 64)
    left, right = torch.randn(length, 512), torch.randn(512, length // 2)

    def attend() -> None:
        attention(query, key, value, Causal(), implementation=implementation)

    def repeat(*steps: Callable[[], object]) -> None:
        with torch.no_grad():
            for _ in range(TURN):
                for step in steps:
                    step()

    def multiply() -> None:
        left @ right

    return {
        "attention": lambda: repeat(attend),
        "product": lambda: repeat(multiply),
        "both": lambda: repeat(attend, multiply),
    }


def training_step(implementation: str, batch: int, tokens: int, d_model: int) -> Callable[[], object]:
    """Forward, backward and AdamW of a decoder of 4 layers whose attention is the implementation's."""
    torch.manual_seed(0)
    heads = max(4, d_model // 64)
    model = Decoder(DecoderConfig(vocabulary=512, context=tokens, d_model=d_model, num_layers=4, num_heads=heads))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(512, (batch, tokens))
    ours = functools.partial(attention, implementation=implementation)

    def step() -> None:
        with mock.patch.object(layers, "attention", ours):
            model(ids).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    report = Report("The native kernel between torch's own operators")
    report.say("## In turn with a matrix product: 1 x 8 heads of width 64, causal, float32")
    report.table("tokens", "side", "attention alone", "product alone", "in turn", "against the sum")
    for length in (256, 512, 1024, 2048):
        sides = {
            (side, what): run
            for side, implementation in SIDES.items()
            for what, run in turns(implementation, length).items()
        }
        times = interleaved(sides, rounds=options.rounds)
        for side in SIDES:
            alone, product, both = (times[side, what] / TURN for what in ("attention", "product", "both"))
            cells = (f"{seconds * 1e3:.2f} ms" for seconds in (alone, product, both))
            report.row(f"{length:,}", side, *cells, f"{both / (alone + product):.2f}")
    report.say("\n## A training step: Decoder of 4 layers, float32, forward, backward and AdamW")
    report.table("batch x tokens", "d_model", "SDPA", "ours", "ours against SDPA")
    for batch, tokens, d_model in SHAPES:
        steps = {side: training_step(name, batch, tokens, d_model) for side, name in SIDES.items()}
        times = interleaved(steps, rounds=options.rounds)
        cells = (f"{times[side] * 1e3:.1f} ms" for side in SIDES)
        report.row(f"{batch} x {tokens:,}", d_model, *cells, f"{times['ours'] / times['SDPA']:.2f}")
    if options.save:
        report.write("training-step")


if __name__ == "__main__":
    main()
