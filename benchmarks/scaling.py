"""Steps of 1, 2 and 4 processes beside what the cost model says of them.

python benchmarks/scaling.py [--rounds 9] [--save]

One process says how many operations a second training reaches; all-reduces of one byte and of the gradients' bytes
say what a message and a byte cost. From these `costs.step_cost` predicts the step of every number of processes.
Processes beyond the cores take turns, which the prediction counts as well.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from measure import Report, arguments

from sightline.batches import TokenFile, TokenizedCorpus
from sightline.costs import Machine, flops_per_token, step_cost
from sightline.distributed import joined
from sightline.models import Decoder, DecoderConfig
from sightline.schedule import TrainConfig
from sightline.trainer import Trainer

PROCESSES = (1, 2, 4)
SHAPE = DecoderConfig(vocabulary=512, context=128, d_model=256, num_layers=4, num_heads=4)
BATCH = 16


def timed(work: Callable[[], object], rounds: int) -> float:
    """The median of the slowest process's seconds."""
    times = []
    for _ in range(rounds + 2):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times[2:])


def worker(rounds: int, sharded: bool) -> None:
    """What one process of a team measures; the first prints it."""
    ids = np.random.default_rng(0).integers(0, SHAPE.vocabulary, 100_000).astype(np.uint16)
    tokens = TokenFile(ids=ids, num_bytes=len(ids), num_words=len(ids), num_unknown=0)
    config = TrainConfig(batch=BATCH, optimizer="adamw", parallel="shard" if sharded else "replicate")
    with joined(os.environ, "cpu") as team:
        torch.manual_seed(0)
        trainer = Trainer(Decoder(SHAPE), TokenizedCorpus(train=tokens, valid=tokens), config, team)
        found = {"step": timed(lambda: trainer.take_step(1e-4), rounds)}
        gradients = torch.zeros(trainer.model.num_parameters)
        for name, tensor in (("message", torch.zeros(1)), ("reduce", gradients)):
            found[name] = timed(lambda tensor=tensor: dist.all_reduce(tensor), rounds)
        if team.leads:
            print(json.dumps({"parameters": trainer.model.num_parameters, **found}))


def measured(processes: int, rounds: int, sharded: bool) -> dict[str, float]:
    runner = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), __file__]
    command = [*runner, "--rounds", str(rounds), "--worker", *(["--sharded"] if sharded else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--worker", action="store_true", help="one process of a team (torchrun starts it)")
    parser.add_argument("--sharded", action="store_true", help="FSDP2 in a worker")
    options = parser.parse_args()
    if options.worker:
        worker(options.rounds, options.sharded)
        return
    report = Report("Processes")
    cores = os.cpu_count() or 1
    flops = flops_per_token(SHAPE) * BATCH * SHAPE.context
    alone = measured(1, options.rounds, sharded=False)
    pair = measured(2, options.rounds, sharded=False)
    latency = pair["message"] / 2
    bandwidth = 4 * pair["parameters"] / max(pair["reduce"] - pair["message"], 1e-9)
    machine = Machine(flops=flops / alone["step"], bandwidth=bandwidth, latency=latency)
    report.say(
        f"{alone['parameters'] / 1e6:.1f} million parameters, {BATCH} x {SHAPE.context} tokens a step, gloo, one "
        f"thread a process, {cores} cores: {machine.flops / 1e9:.1f} GFLOP/s, {bandwidth / 1e9:.2f} GB/s, "
        f"{latency * 1e6:.0f} us a message.\n"
    )
    report.table("processes", "way", "predicted", "measured", "measured / predicted", "speed-up")
    for processes in PROCESSES:
        for sharded in (False, True) if processes > 1 else (False,):
            cost = step_cost(flops, int(alone["parameters"]), machine, processes=processes, sharded=sharded)
            predicted = cost.compute * max(1.0, processes / cores) + cost.communicate
            step = measured(processes, options.rounds, sharded)["step"]
            way = "alone" if processes == 1 else "FSDP2" if sharded else "DDP"
            cells = (f"{predicted * 1e3:.0f} ms", f"{step * 1e3:.0f} ms", f"{step / predicted:.2f}")
            report.row(processes, way, *cells, f"{alone['step'] / step:.2f}")
    if options.save:
        report.write("scaling")


if __name__ == "__main__":
    main()
