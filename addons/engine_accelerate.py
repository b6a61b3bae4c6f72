"""Several processes that `accelerate launch` or torchrun started, on one machine or on many that share the output disk.

Rank 0 plans and hands out the list of pending partitions; rank r does every world-th of them, from its r-th on. There is
no barrier at the end, which would time out while one rank is still at work: each rank leaves a mark, and rank 0 waits for
the marks and finalises. A rank that dies ends the group (the launcher sees to it), and the same command does the rest.
"""
import datetime
import os
import pathlib
import time
from typing import Any

PATIENCE = datetime.timedelta(days=30)  # rank 0 may stage a large table while the others wait


def run(job: Any) -> bool:
    """Plan the job, do this rank's share of it, and wait for the others; True on rank 0, which finalises."""
    asked = int(os.environ.get("WORLD_SIZE") or 1)
    if asked == 1:
        job.say("accelerate: world size 1 (accelerate launch --cpu starts one process, whatever --num_processes says: take "
                "--multi_gpu, or torchrun, which start as many as you ask for, with or without a GPU)")
        job.make_plan()
        job.work(job.pending(), "rank 0")
        return True
    import torch
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list
    on_cpu = not (job.config.use_cuda and torch.cuda.is_available())
    state = PartialState(cpu=on_cpu, timeout=PATIENCE, **({"backend": "gloo"} if on_cpu else {}))
    rank, world = state.process_index, state.num_processes
    if world != asked:
        raise job.trouble(2, f"the launcher speaks of {asked} processes, but this group has {world}")
    if rank == 0:
        job.make_plan()
        job.say(f"accelerate: world size {world}")
        _clear_marks(job.plan.output)
    indices: list[Any] = [[p.index for p in job.pending()] if rank == 0 else None]
    broadcast_object_list(indices, from_process=0)
    if rank > 0:
        job.make_plan(joins=True)
    mine = [job.plan.partitions[index] for index in indices[0][rank::world]]
    job.work(mine, f"rank {rank}", judge=rank == 0)
    if rank > 0:
        _mark(job.plan.output, rank).touch()
        return False
    while not all(_mark(job.plan.output, other).exists() for other in range(1, world)):
        time.sleep(0.1)
    _clear_marks(job.plan.output)
    return True


def _mark(output: pathlib.Path, rank: int) -> pathlib.Path:
    return output / "parts" / f".rank-{rank}-is-done"


def _clear_marks(output: pathlib.Path) -> None:
    for mark in (output / "parts").glob(".rank-*-is-done"):
        mark.unlink(missing_ok=True)
