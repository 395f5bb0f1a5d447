"""The known wrong versions of what stands around attention in a module: heads, biases, which map is used for what."""

import itertools
from typing import Any

from torch import Tensor

from sightline.checking.mistakes import RESHAPED, Mistake, nothing


def _lose(*roles: str) -> dict[str, Any]:
    return {"map": lambda x, weight, bias, role: x @ weight if bias is None or role in roles else x @ weight + bias}


def _cut(x: Tensor, heads: int) -> Tensor:
    return x.reshape(x.shape[0], heads, x.shape[1], -1)


def _glue(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], x.shape[2], -1)


_HEADS_FIX = "to split: view(batch, tokens, heads, width).transpose(1, 2)"
_JOIN_FIX = "to join: transpose(1, 2) first, then reshape(batch, tokens, heads * width)"

HEADS = [
    Mistake(
        name="heads mixed",
        what=f"the heads are mixed when they are split: {RESHAPED}",
        fix=_HEADS_FIX,
        steps={"split": _cut},
    ),
    Mistake(
        name="heads mixed when joined",
        what=f"the heads are mixed when they are joined: {RESHAPED}",
        fix=_JOIN_FIX,
        steps={"join": _glue},
    ),
    Mistake(
        name="heads mixed twice",
        what=f"the heads are mixed when they are split and when they are joined: {RESHAPED}",
        fix=f"{_HEADS_FIX}; {_JOIN_FIX}",
        steps={"split": _cut, "join": _glue},
    ),
    Mistake(
        name="heads interleaved when joined",
        what="the heads are mixed when they are joined: their numbers alternate in place of standing side by side",
        fix=_JOIN_FIX,
        steps={"join": lambda x: x.permute(0, 2, 3, 1).flatten(-2)},
    ),
    Mistake(
        name="heads interleaved when split",
        what="the heads are mixed when they are split: their numbers alternate, and are joined otherwise",
        fix=_HEADS_FIX,
        steps={"split": lambda x, heads: x.unflatten(-1, (-1, heads)).permute(0, 3, 1, 2)},
    ),
    Mistake(
        name="one head only",
        what="there is one head over the whole width: it is never split",
        fix=f"{_HEADS_FIX}; attend in each head; {_JOIN_FIX}",
        steps={"split": lambda x, heads: x[:, None]},
    ),
]

LOST = [
    Mistake(
        name=f"the bias of {role} lost",
        what=f"the map to {role} has a bias that is not added",
        fix="x @ weight + bias; an nn.Linear that is called adds its own",
        steps=_lose(role),
    )
    for role in ("query", "key", "value", "output")
] + [
    Mistake(
        name="all biases lost",
        what="the maps have biases that are not added",
        fix="x @ weight + bias; an nn.Linear that is called adds its own",
        steps=_lose("query", "key", "value", "output"),
    ),
]

ROLES = [
    Mistake(
        name="output map unused",
        what="the heads are returned as they are joined: the output map is not used",
        fix="output = self.output(joined)",
        steps={"map": lambda x, w, b, role: x if role == "output" else x @ w if b is None else x @ w + b},
    ),
    *(
        Mistake(
            name=f"{used}'s map used for {role}",
            what=f"{role} comes from {used}'s map",
            fix=f"{role} = self.{role}(x)",
            steps={"roles": {role: used}},
        )
        for role, used in itertools.permutations(("query", "key", "value"), 2)
    ),
    Mistake(
        name="query and key exchanged",
        what="query and key are exchanged: the weights say who is looked at by whom, the wrong way round",
        fix="scores = query @ key.transpose(-2, -1)",
        steps={"roles": {"query": "key", "key": "query"}},
    ),
    Mistake(
        name="input added",
        what="the input is added to the output: the residual belongs to the block around attention",
        fix="return the output alone",
        steps={"finish": lambda output, x: output + x if output.shape == x.shape else nothing(output)},
    ),
]
