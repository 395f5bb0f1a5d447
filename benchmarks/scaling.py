"""Steps of 1, 2 and 4 processes beside what the cost model says of them.

python benchmarks/scaling.py [--rounds 9] [--save]

Two processes that exchange nothing say how many operations a second training reaches where all cores are busy;
all-reduces of one number and of the gradients say what a message and a byte cost, gathering and scattering what a byte
costs where the model is shared out. From these `costs.step_cost` predicts the step of every number of processes.
Processes beyond the cores take turns, also at copying what they exchange.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace

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

PROCESSES = (2, 4)
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
    data = TokenizedCorpus(train=tokens, valid=tokens)
    config = TrainConfig(batch=BATCH, optimizer="adamw", parallel="shard" if sharded else "replicate")
    with joined(os.environ, "cpu") as team:
        torch.manual_seed(0)
        trainer = Trainer(Decoder(SHAPE), data, config, team)
        found = {"step": timed(lambda: trainer.take_step(1e-4), rounds)}
        apart = Trainer(Decoder(SHAPE), data, replace(config, parallel="replicate"))
        dist.barrier()
        found["apart"] = timed(lambda: apart.take_step(1e-4), rounds)
        gradients = torch.zeros(trainer.model.num_parameters // team.size * team.size)
        part = torch.zeros(len(gradients) // team.size)
        for name, exchange in {
            "message": lambda: dist.all_reduce(torch.zeros(1)),
            "reduce": lambda: dist.all_reduce(gradients),
            "gather": lambda: dist.all_gather_into_tensor(gradients, part),
            "scatter": lambda: dist.reduce_scatter_tensor(part, gradients),
        }.items():
            found[name] = timed(exchange, 20 * rounds)
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
    latency, size = pair["message"] / 2, 4 * pair["parameters"]
    # A pair sends all gradients once to sum them, and half of the weights three times where they are shared out.
    seconds = {False: pair["reduce"] - pair["message"], True: 2 * pair["gather"] + pair["scatter"] - 3 * latency}
    bandwidths = {False: size / max(seconds[False], 1e-9), True: 1.5 * size / max(seconds[True], 1e-9)}
    report.say(
        f"{alone['parameters'] / 1e6:.1f} million parameters, {BATCH} x {SHAPE.context} tokens a step, gloo, one "
        f"thread a process, {cores} cores: {flops / alone['step'] / 1e9:.1f} GFLOP/s alone, "
        f"{flops / pair['apart'] / 1e9:.1f} beside another, {latency * 1e6:.0f} us a message, "
        f"{bandwidths[False] / 1e9:.2f} GB/s summing, {bandwidths[True] / 1e9:.2f} GB/s gathering and scattering.\n"
    )
    report.table("processes", "way", "predicted", "measured", "measured / predicted", "speed-up")
    report.row(1, "alone", "", f"{alone['step'] * 1e3:.0f} ms", "", "1.00")
    for processes in PROCESSES:
        for sharded in (False, True):
            machine = Machine(flops=flops / pair["apart"], bandwidth=bandwidths[sharded], latency=latency)
            cost = step_cost(flops, int(alone["parameters"]), machine, processes=processes, sharded=sharded)
            predicted = cost.seconds * max(1.0, processes / cores)
            step = measured(processes, options.rounds, sharded)["step"]
            cells = (f"{predicted * 1e3:.0f} ms", f"{step * 1e3:.0f} ms", f"{step / predicted:.2f}")
            report.row(processes, "FSDP2" if sharded else "DDP", *cells, f"{alone['step'] / step:.2f}")
    if options.save:
        report.write("scaling")


if __name__ == "__main__":
    main()
