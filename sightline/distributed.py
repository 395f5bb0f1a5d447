"""Many processes, one run: what torch.distributed does for training, as torchrun starts it.

Every process takes its part of each batch; the first one decides, writes and speaks for all. Alone, nothing is
exchanged. Knows nothing about folders, text and screens.
"""

import inspect
import json
import math
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from sightline.interrupts import Interrupts
from sightline.models import Decoder
from sightline.schedule import Device, Parallel, choose_device

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

T = TypeVar("T")

PATIENCE = timedelta(minutes=30)
"""How long a process waits for the others: longer than the first one takes to make a vocabulary."""
HEAD_START = 2.0
"""Seconds for the first process to tell what ended all: torchrun ends the others as soon as one has ended."""
STATE_BYTES = 16
"""Of one parameter while it is trained, in float32: the number, its gradient, and AdamW's two means."""


class LostProcess(ValueError):
    """Another process of the run has ended or cannot be reached any more."""


@dataclass(frozen=True)
class Team:
    """The processes that train one model together, as one of them sees it.

    >>> Team().agree([1.5], happened=False), Team().total([2.0, 3.0])
    (([1.5], False), [2.0, 3.0])
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def here(cls) -> "Team":
        """The processes of torch.distributed's default group; where there is none, this one."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def leads(self) -> bool:
        """Whether this is the first process: the one that decides, writes and speaks."""
        return self.rank == 0

    def agree(self, decision: Sequence[float], *, happened: bool) -> tuple[list[float], bool]:
        """What the first process decided, and whether it happened to any of them."""
        if self.size == 1:
            return list(decision), happened
        row = torch.full((len(decision) + 1,), -math.inf, dtype=torch.float64)
        if self.leads:
            row[:-1] = torch.tensor(decision, dtype=torch.float64)
        row[-1] = float(happened)
        dist.all_reduce(row, dist.ReduceOp.MAX)
        *decided, any_of_them = row.tolist()
        return decided, bool(any_of_them)

    def total(self, numbers: Sequence[float]) -> list[float]:
        """The sum of each number over all processes."""
        if self.size == 1:
            return list(numbers)
        row = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(row)
        return row.tolist()

    def tell(self, data: Any, *, source: int = 0) -> Any:
        """What one process, the first, has to say, for all of them: anything that JSON can hold."""
        if self.size == 1:
            return data
        content = torch.frombuffer(bytearray(json.dumps(data).encode("utf-8")), dtype=torch.uint8)
        length = torch.tensor([len(content)])
        dist.broadcast(length, source)
        content = content if self.rank == source else torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(content, source)
        return json.loads(content.numpy().tobytes())

    @contextmanager
    def together(self) -> Iterator[None]:
        """Runs a block, in which nothing is exchanged, on every process; where it fails on one, it fails on all.

        Raises ValueError or OSError: the process's own, else that of the first process where it failed.
        """
        error = None
        try:
            yield
        except (ValueError, OSError) as caught:
            if self.size == 1:
                raise
            error = caught
        if self.size == 1:
            return
        failed = torch.tensor([self.size if error is None else self.rank])
        dist.all_reduce(failed, dist.ReduceOp.MIN)
        first = int(failed)
        if first < self.size:
            message = self.tell(str(error), source=first)
            raise error or ValueError(message if first == 0 else f"process {first}: {message}")

    def turns(self, items: Iterable[T]) -> Iterator[tuple[T, bool]]:
        """This process's share of the items, one of each round, and whether it counts.

        All take the same number of turns, because a model that is shared out computes nowhere unless everywhere: in
        a last round that is not full, whoever has no item gets the round's first one, for nothing.

        >>> [list(Team(rank, 2).turns("abc")) for rank in range(2)]
        [[('a', True), ('c', True)], [('b', True), ('c', False)]]
        """
        items = iter(items)
        while round_ := list(islice(items, self.size)):
            counts = self.rank < len(round_)
            yield round_[self.rank if counts else 0], counts


ALONE = Team()


# --- Starting and ending -------------------------------------------------------------------------------


@contextmanager
def joined(environment: Mapping[str, str], device: Device) -> Iterator[Team]:
    """Joins the processes that torchrun has started, if it has, and leaves them at the end.

    On a CPU they talk by gloo; on GPUs gradients go by nccl, and each process takes the GPU of its local rank. What
    ends all of them (an error, Ctrl-C) the first one tells; the others exit with the same code and say nothing.

    Raises:
        ValueError: there are more processes on this machine than GPUs.
        LostProcess: another process has ended.
    """
    if "RANK" not in environment:
        yield Team()
        return
    kind = choose_device(device).type
    if kind == "cuda":
        local, count = int(environment["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= count:
            raise ValueError(f"expected at most {count} processes on this machine, one a GPU, got number {local + 1}")
        torch.cuda.set_device(local)
    _meet("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", environment)
    team = Team.here()
    try:
        with warnings.catch_warnings(), Interrupts(held=False):
            if not team.leads:
                warnings.simplefilter("ignore")
            yield team
    except (RuntimeError, KeyboardInterrupt, ValueError, OSError) as error:
        lost = _loss(error)
        if lost is None and (team.leads or isinstance(error, RuntimeError)):
            raise
        if lost is None:
            time.sleep(HEAD_START)
        if lost is None or team.rank > 1:  # of a loss the second speaks too: the first may be the one that is lost
            raise SystemExit(130 if isinstance(error, KeyboardInterrupt) else 2) from None
        raise LostProcess(
            f"process {team.rank} of {team.size} lost another one ({_first_line(lost)}): what was saved stands; the "
            "same with --resume goes on, with any number of processes (torchrun --max-restarts does so by itself)"
        ) from lost
    finally:
        dist.destroy_process_group()


def _meet(backend: str, environment: Mapping[str, str]) -> None:
    store, rank, size = next(rendezvous("env://", timeout=PATIENCE))
    # torchrun may keep its store over restarts, where the addresses of dead processes would be found again.
    store = PrefixStore(f"start-{_restarts(environment)}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)


def _restarts(environment: Mapping[str, str]) -> int:
    return int(environment.get("TORCHELASTIC_RESTART_COUNT", "0"))


def is_restart(environment: Mapping[str, str]) -> bool:
    """Whether torchrun has started this process again, after another one had failed."""
    return _restarts(environment) > 0


def _loss(error: BaseException | None) -> RuntimeError | None:
    """What says that another process could not be reached; gloo's errors have no type of their own.

    torchrun's SIGTERM follows such a loss at once, and may interrupt the way out of it.
    """
    while error is not None:
        if isinstance(error, RuntimeError) and ("gloo" in str(error).lower() or isinstance(error, dist.DistError)):
            return error
        error = error.__context__
    return None


def _first_line(error: RuntimeError) -> str:
    return str(error).splitlines()[0].rpartition("] ")[2].partition(". ")[0].rstrip(".")


# --- A model over many processes -----------------------------------------------------------------------


def shards(parallel: Parallel, parameters: int, device: torch.device, team: Team) -> bool:
    """Whether each process holds a part of the model (FSDP2) rather than all of it (DDP).

    `auto`: where weights, gradients and optimiser, `STATE_BYTES` a parameter, would fill more than half of a GPU's
    memory; the other half is for what is kept from forward to backward.

    Raises:
        ValueError: there are no processes to share it out to.

    >>> shards("auto", 10**12, torch.device("cpu"), Team(rank=0, size=2))
    False
    """
    if parallel == "shard" and not dist.is_initialized():
        raise ValueError("expected processes to share the model out to, got one that is alone: start it by torchrun")
    if parallel == "auto" and device.type == "cuda" and team.size > 1:
        return STATE_BYTES * parameters > torch.cuda.get_device_properties(device).total_memory / 2
    return parallel == "shard"


class Replica:
    """A model as one of a team trains it: the whole (DDP) or a part (FSDP2), with gradients that meet once a step.

    Built by all processes at the same time; the first one's weights are everybody's.
    """

    def __init__(
        self, model: Decoder, team: Team, *, device: torch.device, sharded: bool, precision: torch.dtype
    ) -> None:
        self.model, self.team, self.sharded = model, team, sharded
        self._loss: nn.Module = _Loss(model)
        if not sharded:
            model.to(device)
        if team.size > 1:
            for tensor in model.parameters():
                dist.broadcast(tensor.detach(), 0)
        if sharded:
            _shard(model, device, precision)
        elif team.size > 1:
            self._loss = _replicate(self._loss, device)

    def backward(self, *drawn: Tensor, share: float, last: bool) -> Tensor:
        """Adds the gradients of a micro-batch that is this share of the batch; after the last they are all's.

        Returns the loss times its share: summed over the micro-batches of all processes it is the batch's.
        """
        with self._held(last):
            loss = self._loss(*drawn) * share
            (loss * self.team.size).backward()  # the library takes the mean over processes, this is a sum
        return loss.detach()

    def _held(self, last: bool) -> AbstractContextManager[object]:
        if self.sharded:
            cast("FSDPModule", self.model).set_requires_gradient_sync(last)
        elif not last and isinstance(self._loss, nn.parallel.DistributedDataParallel):
            return self._loss.no_sync()
        return nullcontext()

    def first_whole(self, tensor: Tensor) -> Tensor | None:
        """All of a parameter, or of its state, on the CPU of the first process; every process must ask."""
        full = whole(tensor.detach())
        return full.cpu().contiguous() if self.team.leads else None

    @torch.no_grad()
    def fill(self, tensor: Tensor, value: Tensor | None) -> None:
        """Gives a parameter, or its state, the first process's value; every process must take part."""
        if is_part(tensor):
            # All of one tensor at a time: a model that does not fit is never whole on any device.
            full = torch.empty(tensor.shape, dtype=tensor.dtype) if value is None else value.to(tensor.dtype)
            tensor.copy_(part(full.to(tensor.device), tensor, source=0))
            return
        if value is not None:
            tensor.copy_(value)
        if self.team.size > 1:
            dist.broadcast(tensor, 0)


def is_part(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether each process holds a part of the tensor."""
    # A class whose import takes a second, which a run that shares nothing out is spared.
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be shared out; every process must ask."""
    return tensor.full_tensor() if is_part(tensor) else tensor


def part(full: Tensor, like: Tensor, *, source: int | None = None) -> Tensor:
    """This process's part of a tensor, if `like` is shared out; its own, or that of the process `source`."""
    if not is_part(like):
        return full
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=source)


class _Loss(nn.Module):
    """What DDP calls: its hooks run around `forward`."""

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, *drawn: Tensor) -> Tensor:
        return self.model.loss(*drawn)


def _replicate(loss: nn.Module, device: torch.device) -> nn.Module:
    make = nn.parallel.DistributedDataParallel
    ids = [torch.cuda.current_device()] if device.type == "cuda" else None
    # Tables of angles are everywhere the same; the option that says so has a new name since torch 2.13.
    new = "forward_sync_buffers" in inspect.signature(make).parameters
    options: dict[str, Any] = {"forward_sync_buffers" if new else "broadcast_buffers": False}
    return make(loss, device_ids=ids, init_sync=False, gradient_as_bucket_view=True, **options)


def _shard(model: Decoder, device: torch.device, precision: torch.dtype) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    options: dict[str, Any] = {"mesh": init_device_mesh(device.type, (dist.get_world_size(),))}
    if precision != torch.float32:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=precision, reduce_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, **options)
    # Left gathered after an evaluation, which has no backward pass, the rest would miss the optimiser's next step.
    fully_shard(model, reshard_after_forward=True, **options)
    register_fsdp_forward_method(model, "loss")
