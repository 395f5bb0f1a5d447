"""What a run would be: its tokens, parameters, memory and time, from a few steps that are thrown away.

Writes nothing: neither the run's folder nor the cache of token files is touched.
"""

import hashlib
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sightline.advice import Advice
from sightline.batches import TokenFile, TokenizedCorpus
from sightline.causality import check_causal
from sightline.checkpoints import steps
from sightline.corpora import Corpus, Errors, open_corpus
from sightline.evaluation import evaluate
from sightline.files import read_json
from sightline.memory import held_bytes, machine_bytes, peak_bytes, shown
from sightline.models import Decoder, DecoderConfig
from sightline.pace import clock
from sightline.recipes import RecipeName, check_changes, settle
from sightline.runs import check_folder
from sightline.schedule import TrainConfig, autocast, choose_device, choose_precision
from sightline.tokenizers import Kind, Tokenizer
from sightline.trainer import Trainer
from sightline.training import Preset, new_tokenizer, preset_config, same_tokenizer

# Of a longer text so much is read, evenly taken: its tokens and vocabulary are then estimates.
_READ_BYTES = 16 << 20
# Steps are timed for so many seconds, at least three of them; the first of all is not counted.
_TIMED_SECONDS, _LEAST_STEPS, _MOST_STEPS = 6.0, 3, 100
# Batches of validation text that are timed: of one alone, read again, everything would lie in the caches.
_LOOKED_AT = 4
# The share of the machine's memory that a run may take before its steps are not even tried.
_FITS = 0.9


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes that a run holds at most, and what for."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """What the forward pass keeps for the backward pass, of a whole batch."""
    rest: int
    """The program and its libraries, and room to work in."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.rest


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """Seconds until the first step, of one step, of one evaluation, of one checkpoint, and of the whole run."""

    start: float
    """Counting, checks, and what the first step takes beyond the others; the first evaluation is not in it."""
    step: float
    evaluation: float
    checkpoint: float
    total: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `train` would do. Printed, it is what `sightline train --plan` says."""

    text: str
    tokenizer: str
    vocabulary: int
    train_tokens: int
    valid_tokens: int
    exact: bool
    """Whether all of the text was read; else its tokens are estimates."""
    model: DecoderConfig
    parameters: int
    config: TrainConfig
    done: int
    """Steps that a resumed run has behind it."""
    steps: int | None
    """Steps to the end; None: as many as the time allows, where no step was timed."""
    device: str
    memory: Memory
    machine: int | None
    """All the memory of the device, where the system tells."""
    seconds: Seconds | None
    """None: the run does not fit into the memory, so no step was tried."""
    advice: str | None
    recipe: str | None
    """The recipe that filled in what was not said, and its reason."""

    def __str__(self) -> str:
        return "\n".join(f"{name:<11}{said}" for name, said in _said(self))


def plan(
    source: str | Path,
    out: str | Path,
    *,
    preset: Preset = "modern",
    recipe: RecipeName | None = None,
    model: Mapping[str, Any] | None = None,
    tokenizer: Kind | None = None,
    vocabulary: int | None = None,
    config: TrainConfig | Mapping[str, Any] | None = None,
    errors: Errors = "strict",
    resume: bool = False,
) -> Plan:
    """What `train` with the same arguments would do: nothing is written, and a few seconds are computed.

    Memory: the bytes of weights, gradients and optimiser; the tensors that the forward pass keeps, counted for one
    and two windows and taken on to the batch; or what the timed steps took, if that is more. Time: the timed steps,
    the evaluations and checkpoints due, the limit of time.

    Raises: ValueError as `train`.

    >>> small = {"context": 16, "d_model": 16, "num_layers": 1, "num_heads": 2}
    >>> planned = plan("embedded", "run", model=small, tokenizer="characters", config=TrainConfig(steps=30))
    >>> planned.steps, planned.memory.gradients == 4 * planned.parameters
    (30, True)
    """
    device = choose_device(check_changes(recipe, config))
    changes = dict(model or {})
    preset_config(DecoderConfig, preset, 1, changes)
    check_folder(Path(out), resume=resume)
    corpus = open_corpus(source, errors=errors)
    newest = steps(Path(out))[0] if resume else None
    if newest is None:
        text = new_tokenizer(corpus, tokenizer, vocabulary, most_bytes=_READ_BYTES)
    else:
        text = same_tokenizer(newest, tokenizer, vocabulary)
    done = 0 if newest is None else int(read_json(newest / "training.json")["step"])
    used = 0.0 if newest is None else float(read_json(newest / "training.json")["seconds"])
    data, exact, sizes = _sample(corpus, text)
    config, changes, said = settle(recipe, config, changes, preset, tokens=sizes["train"], vocabulary=len(text))
    shape = preset_config(DecoderConfig, preset, len(text), changes)
    memory, seconds, parameters = _measured(shape, data, config, device)
    limit = config.step_limit
    if seconds is not None:
        limit, seconds = _course(config, seconds, sizes["valid"], context=shape.context, done=done, used=used)
        if limit <= done:
            raise ValueError(_nothing_to_do(config, seconds, done))
    drawn = None if limit is None else limit * config.batch * shape.context
    return Plan(
        text=corpus.name,
        tokenizer=text.kind,
        vocabulary=len(text),
        train_tokens=sizes["train"],
        valid_tokens=sizes["valid"],
        exact=exact,
        model=shape,
        parameters=parameters,
        config=config,
        done=done,
        steps=limit,
        device=f"{device.type}, {str(choose_precision(config.precision, device)).removeprefix('torch.')}",
        memory=memory,
        machine=machine_bytes(device),
        seconds=seconds,
        advice=Advice().of_size(parameters=parameters, tokens=sizes["train"], drawn=drawn),
        recipe=said,
    )


def _sample(corpus: Corpus, tokenizer: Tokenizer) -> tuple[TokenizedCorpus, bool, dict[str, int]]:
    """Token files in memory: all of the text or, of a long one, a part; whether it is all; tokens in each split."""
    files, sizes, exact = {}, {}, True
    for split in ("train", "valid"):
        if split not in corpus.splits:
            raise ValueError(f"expected text with a {split} split, but {corpus.name} has none: add one")
        size, pieces, read = corpus.size(split), [np.zeros(0, dtype=np.uint32)], 0
        every = max(1, math.ceil(size / _READ_BYTES))
        for piece in islice(corpus.texts(split), 0, None, every):
            pieces.append(np.array(tokenizer.encode(piece), dtype=np.uint32))
            read += len(piece.encode())
        ids = np.concatenate(pieces)
        files[split] = TokenFile(ids=ids, num_bytes=read, num_words=0, num_unknown=0)
        sizes[split] = len(ids) if every == 1 else round(len(ids) * size / read)
        exact = exact and every == 1
    return TokenizedCorpus(**files), exact, sizes


def _measured(
    shape: DecoderConfig, data: TokenizedCorpus, config: TrainConfig, device: torch.device
) -> tuple[Memory, Seconds | None, int]:
    """Memory, seconds where the run fits into it, and the number of parameters."""
    before = held_bytes() if device.type == "cpu" else 0
    with torch.device("meta"):
        parameters = Decoder(shape).num_parameters
    weights, machine = 4 * parameters, machine_bytes(device)
    if machine is not None and before + 4 * weights > _FITS * machine:  # AdamW has two numbers for a weight
        least = Memory(weights=weights, gradients=weights, optimizer=2 * weights, activations=0, rest=before)
        return least, None, parameters
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        began = time.perf_counter()
        trainer = Trainer(Decoder(shape).to(device).train(), data, config)
        trainer.fingerprint()
        start = time.perf_counter() - began
        activations = _activations(trainer, config)
        room = before + 4 * weights + activations
        if machine is not None and room > _FITS * machine:
            parts = {"weights": weights, "gradients": weights, "optimizer": 2 * weights, "activations": activations}
            return Memory(**parts, rest=before), None, parameters
        seconds = _seconds(trainer, config, start)
    parts = {
        "weights": sum(tensor.nbytes for tensor in (*trainer.model.parameters(), *trainer.model.buffers())),
        "gradients": sum(tensor.nbytes for tensor in trainer.model.parameters()),
        "optimizer": sum(tensor.nbytes for tensor in trainer.optimizers.state().values()),
        "activations": activations,
    }
    rest = max(before, peak_bytes(device) - sum(parts.values()))
    return Memory(**parts, rest=rest), seconds, parameters


def _activations(trainer: Trainer, config: TrainConfig) -> int:
    """Bytes that a forward pass keeps: counted for one and for two windows, and taken on to those it has at once."""
    at_once = math.ceil(config.batch / config.accumulate)
    one = _kept(trainer, 1)
    if at_once == 1:
        return one  # two would be more than the run ever has
    return one + (at_once - 1) * max(0, _kept(trainer, 2) - one)


def _kept(trainer: Trainer, windows: int) -> int:
    """Bytes of the tensors that the forward pass of so many windows keeps, the weights apart."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.from_numpy(trainer.train_tokens.ids[: trainer.context + 1].astype(np.int64)).to(trainer.device)
    window = ids.expand(windows, -1)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with autocast(trainer.device, trainer.precision):
            loss = trainer.model.loss(window[:, :-1].contiguous(), window[:, 1:].contiguous())
        for parameter in trainer.model.parameters():
            kept.pop(parameter.untyped_storage().data_ptr(), None)
    del loss
    return sum(kept.values())


def _seconds(trainer: Trainer, config: TrainConfig, start: float) -> Seconds:
    """Seconds of each part, `start` what it took to make the trainer; all that a run does first is done here too."""
    began = time.perf_counter()
    check_causal(trainer.model)
    trainer.take_step(0.0)
    trainer.seen()
    first = time.perf_counter() - began
    began, taken = time.perf_counter(), 0
    while taken < _LEAST_STEPS or (taken < _MOST_STEPS and time.perf_counter() - began < _TIMED_SECONDS):
        trainer.take_step(0.0)
        taken += 1
    trainer.seen()  # where steps run ahead of the clock this waits for them
    step = (time.perf_counter() - began) / taken
    return Seconds(
        start=start + max(0.0, first - step),
        step=step,
        evaluation=_evaluation(trainer, config),
        checkpoint=_checkpoint(trainer),
        total=0.0,
    )


def _evaluation(trainer: Trainer, config: TrainConfig) -> float:
    """Seconds for one batch of validation text; `_course` knows how many there are."""
    tokens, context = trainer.valid_tokens, trainer.context
    few = min(_LOOKED_AT, _batches(config, len(tokens.ids), context=context))
    began = 0.0
    with autocast(trainer.device, trainer.precision):
        for batches in (1, few):  # the first may set something up
            began = time.perf_counter()
            evaluate(trainer.model, tokens, context=context, batch=config.batch, batches=batches)
    return (time.perf_counter() - began) / few


def _batches(config: TrainConfig, valid_tokens: int, *, context: int) -> int:
    """Batches of an evaluation."""
    batches = math.ceil(valid_tokens / (config.batch * context))
    return min(batches, config.evaluate_batches or batches)


def _checkpoint(trainer: Trainer) -> float:
    """Seconds to copy and to hash what a checkpoint holds; that long again for the disk."""
    tensors = [*trainer.model.parameters(), *trainer.optimizers.state().values()]
    size, piece = sum(tensor.nbytes for tensor in tensors), bytes(1 << 24)
    began = time.perf_counter()
    hashlib.sha256(piece)
    return 2 * size / len(piece) * (time.perf_counter() - began)


def _course(
    config: TrainConfig, seconds: Seconds, valid_tokens: int, *, context: int, done: int, used: float
) -> tuple[int, Seconds]:
    """The last step, and the seconds from here to the end, evaluations and checkpoints included."""
    evaluation = seconds.evaluation * _batches(config, valid_tokens, context=context)
    look = evaluation + seconds.checkpoint
    first = seconds.start + (0.0 if done else evaluation)
    limit = math.inf if config.step_limit is None else config.step_limit
    if config.minutes is not None:
        left = 60 * config.minutes - used - first - 1.25 * look
        limit = min(limit, done + max(0, int(left / (seconds.step + look / config.evaluate_every))))
    looks = math.ceil(limit / config.evaluate_every) - done // config.evaluate_every
    total = first + (limit - done) * seconds.step + looks * look
    return int(limit), replace(seconds, evaluation=evaluation, total=total)


def _nothing_to_do(config: TrainConfig, seconds: Seconds, done: int) -> str:
    if config.step_limit is not None and config.step_limit <= done:
        return f"the run ended at step {done} because of its steps: give a larger --steps to go on"
    return (
        f"expected time to train in --minutes {config.minutes}, but a step takes {seconds.step:.1f} s and an "
        f"evaluation {seconds.evaluation:.1f} s: give more --minutes or fewer --evaluate-batches"
    )


# --- Told -------------------------------------------------------------------------------------------------


def _said(plan: Plan) -> Iterator[tuple[str, str]]:
    shape, config, about = plan.model, plan.config, "" if plan.exact else "about "
    yield "text", f"{plan.text}: {about}{plan.train_tokens:,} tokens to train on, {plan.valid_tokens:,} to validate"
    yield "tokenizer", f"{plan.tokenizer}, a vocabulary of {about}{plan.vocabulary:,}"
    if plan.recipe is not None:
        yield "recipe", plan.recipe.removeprefix("recipe ")
    yield (
        "model",
        (
            f"{plan.parameters:,} parameters: {shape.num_layers} layers, d_model {shape.d_model}, "
            f"{shape.num_heads} heads, context {shape.context}"
        ),
    )
    if plan.steps is None:
        yield "run", f"as many steps as fit into {config.minutes:g} minutes, of {config.batch} x {shape.context} tokens"
    else:
        read = (plan.steps - plan.done) * config.batch * shape.context
        times = f"{read / plan.train_tokens:.1f} times the text"
        behind = f" ({plan.done:,} done)" if plan.done else ""
        yield "run", f"{plan.steps:,} steps{behind} of {config.batch} x {shape.context} tokens: {times}; {plan.device}"
    yield "memory", _memory_said(plan)
    if plan.seconds is None:
        yield "time", "unknown: it does not fit into the memory, so no step was tried"
    else:
        yield "time", _time_said(plan.seconds, plan)
    if plan.advice is not None:
        yield "warning", plan.advice


def _memory_said(plan: Plan) -> str:
    memory, machine = plan.memory, "" if plan.machine is None else f" of {shown(plan.machine)}"
    parts = ("weights", "gradients", "optimizer", "activations", "rest")
    return f"{shown(memory.total)}{machine}: " + ", ".join(f"{name} {shown(getattr(memory, name))}" for name in parts)


def _time_said(seconds: Seconds, plan: Plan) -> str:
    assert plan.steps is not None
    speed, every = plan.config.batch * plan.model.context / seconds.step, plan.config.evaluate_every
    return (
        f"about {clock(seconds.total)}: {seconds.step:.3g} s a step ({speed:,.0f} tokens/s), "
        f"{seconds.evaluation:.2g} s an evaluation, {seconds.checkpoint:.2g} s a checkpoint, every {every:,} steps"
    )
