"""What a run that goes on must find in its folder: the same model, text and settings, and a state that is whole.

Knows nothing about how it goes on.
"""

from collections.abc import Mapping, Set
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from sightline.advice import Advice
from sightline.checkpoints import Model, read_config, read_weights
from sightline.evaluation import Evaluation
from sightline.runs import RunFolder
from sightline.schedule import TrainConfig
from sightline.tokenizers import Tokenizer

# Settings that a resumed run may change; any other would make it another run.
_MAY_CHANGE = {
    *("steps", "minutes", "evaluate_every", "evaluate_batches", "patience"),
    *("device", "accumulate", "parallel", "compile"),
}
EVALUATIONS = ("start", "best", "final")
"""What the state of a run has of evaluations; None for one that was not made yet."""
_STATE: dict[str, Any] = {
    **dict.fromkeys(EVALUATIONS, dict | None),
    "step": int,
    "best_step": int | None,
    "without_gain": int,
    "seconds": int | float,
    "look_seconds": int | float,
    **dict.fromkeys(("advice", "data", "config"), dict),
}


def read_state(
    folder: RunFolder, model: Model, config: TrainConfig, fingerprint: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Weights, the trainer's tensors and the state of the run in the folder's latest step.

    Where the best step is lost the state has no best.

    Raises: ValueError for another model, tokenizer, text or setting than that of the run, and for a damaged file.
    """
    path, tensors, state = folder.read()
    stored, tokenizer = read_config(path)
    _check_same("model", stored.to_dict(), model.config.to_dict(), path)
    _check_tokenizer(tokenizer, model.tokenizer, path)
    for name, kind in _STATE.items():
        _check_entry(state, name, path, kind)
    if any(state["data"].get(split) != name for split, name in fingerprint.items()):
        raise ValueError(
            f"expected the text of the run to resume, got another than {path} has learned from: "
            "give the same, or start a new run in another --out"
        )
    given = {**asdict(config), "betas": list(config.betas)}
    _check_same("config", state["config"], given, path, may_change=_MAY_CHANGE)
    for name in EVALUATIONS:
        _check_evaluation(state, name, path)
    try:
        Advice.of_state(state["advice"])
    except ValueError as error:
        raise ValueError(f"in {path / 'training.json'}: {error}") from None
    if state["best_step"] is not None and not folder.has(state["best_step"]):
        state["best"] = state["best_step"] = None
    return read_weights(model, path), tensors, state


def _check_entry(state: Mapping[str, Any], key: str, path: Path, kind: Any) -> None:
    if key not in state:
        raise ValueError(f"expected the key {key!r} in {path / 'training.json'}, but it is missing")
    if not isinstance(state[key], kind):
        raise ValueError(
            f"expected {key!r} in {path / 'training.json'} to be {getattr(kind, '__name__', kind)}, got {state[key]!r}"
        )


def _check_evaluation(state: Mapping[str, Any], key: str, path: Path) -> None:
    values = state[key]
    names = {field.name for field in fields(Evaluation)}
    if values is not None and values.keys() != names:
        raise ValueError(
            f"expected {key!r} in {path / 'training.json'} to hold {', '.join(sorted(names))}, got {values!r}"
        )


def _check_same(
    what: str,
    stored: Mapping[str, Any],
    given: Mapping[str, Any],
    path: Path,
    *,
    may_change: Set[str] = frozenset(),
) -> None:
    for name in given:
        if name not in may_change and stored.get(name) != given[name]:
            raise ValueError(
                f"expected the {what} of the run to resume, whose {name} is {stored.get(name)!r} in {path}, "
                f"got {name} {given[name]!r}: give the same, or start a new run in another --out"
            )


def _check_tokenizer(stored: Tokenizer | None, given: Tokenizer | None, path: Path) -> None:
    if (stored and stored.hash) != (given and given.hash):
        raise ValueError(
            f"expected the tokenizer of the run to resume, {stored} in {path}, got {given} with other tokens: "
            "give the same, or start a new run in another --out"
        )
