"""The loss over a large vocabulary beside the loss of all logits: memory and time, forward and backward.

python benchmarks/losses.py [--rounds 3] [--save]
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from measure import Report, arguments

from sightline.bench import interleaved
from sightline.losses import next_token_loss

WORDS, TOKENS, D_MODEL = 33_278, 8_192, 200


def draw() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    features = torch.randn(TOKENS, D_MODEL, requires_grad=True)
    return features, (torch.randn(WORDS, D_MODEL) * 0.05).requires_grad_(), torch.randint(WORDS, (TOKENS,))


def sides(features: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> dict[str, Callable[[], object]]:
    def gradients(loss: torch.Tensor) -> object:
        return torch.autograd.grad(loss, (features, weight))

    return {
        "ours": lambda: gradients(next_token_loss(features, weight, targets)),
        "eager": lambda: gradients(F.cross_entropy(F.linear(features, weight), targets)),
    }


def memory(side: str) -> float:
    """Megabytes above the inputs, in a process of its own."""
    code = (
        "import sys, losses as b; from measure import peak_bytes\n"
        "inputs = b.draw(); before = peak_bytes(); b.sides(*inputs)[sys.argv[1]](); print(peak_bytes() - before)"
    )
    command = [sys.executable, "-c", code, side]
    done = subprocess.run(command, cwd=Path(__file__).parent, check=True, capture_output=True, text=True)
    return int(done.stdout) / 1e6


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.set_defaults(rounds=3)
    options = parser.parse_args()
    report = Report("The loss over a large vocabulary")
    report.say(f"{WORDS:,} words, {TOKENS:,} tokens, d_model {D_MODEL}, float32, forward and backward.")
    report.table("", "ours", "eager logits", "ratio")
    times = interleaved(sides(*draw()), rounds=options.rounds)
    used = {side: memory(side) for side in times}
    for what, numbers in (("seconds", times), ("MB above the inputs", used)):
        form = ".2f" if what == "seconds" else ",.0f"
        ratio = numbers["eager"] / numbers["ours"]
        report.row(what, f"{numbers['ours']:{form}}", f"{numbers['eager']:{form}}", f"{ratio:.2f}")
    if options.save:
        report.write("losses")


if __name__ == "__main__":
    main()
