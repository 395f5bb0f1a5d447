"""A model that must not see its future, held to it.

Knows nothing of how a model is built or trained.
"""

import torch

from sightline.models import Decoder, evaluating


@torch.no_grad()
def check_causal(model: Decoder) -> None:
    """Change future tokens, and demand that the logits of the past do not move (beyond rounding).

    Reads at most 512 random tokens, about ten times, in evaluation mode; draws nothing from the global generator.

    Raises: RuntimeError naming the first position that saw its future.

    >>> from sightline.models import DecoderConfig
    >>> check_causal(Decoder(DecoderConfig.modern(vocabulary=10, d_model=32, num_layers=1)))
    """
    vocabulary, device = model.config.vocabulary, model.embedding.weight.device
    length = min(model.config.context, 512)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (1, length), generator=generator)
    # An offset from 1 to vocabulary - 1: every future token becomes another one.
    other = (tokens + torch.randint(1, max(vocabulary, 2), (1, length), generator=generator)) % vocabulary
    tokens, other = tokens.to(device), other.to(device)
    with evaluating(model):
        logits = model(tokens)
        rounding = 16 * torch.finfo(logits.dtype).eps * logits.abs().max()
        cuts = sorted({1, length - 1} | {2**power for power in range(1, length.bit_length())})
        for cut in (cut for cut in cuts if 0 < cut < length):
            changed = model(torch.cat((tokens[:, :cut], other[:, cut:]), dim=1))
            # Not within rounding, rather than beyond it: so that NaN counts as moved.
            moved = ~((changed - logits)[0, :cut].abs() <= rounding).all(dim=-1)
            if moved.any():
                raise RuntimeError(
                    f"check_causal: the logits at position {int(moved.nonzero()[0])} moved when only tokens from "
                    f"position {cut} on changed; the model sees its future (or its logits are NaN)"
                )
