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
    handed_out: list[Any] = [None]
    if rank == 0:
        job.make_plan()
        job.say(f"accelerate: world size {world}")
        # rank 0's own name, so that two groups on one folder do not take each other's marks for theirs
        handed_out = [(job.mine_beside(pathlib.Path("part-rank")).name, [p.index for p in job.pending()])]
    broadcast_object_list(handed_out, from_process=0)
    if rank > 0:
        job.make_plan(joins=True)
    name, indices = handed_out[0]
    marks = [job.plan.output / "parts" / name.replace("rank", f"rank-{n}", 1) for n in range(1, world)]
    job.work([job.plan.partitions[index] for index in indices[rank::world]], f"rank {rank}", judge=rank == 0)
    if rank > 0:
        marks[rank - 1].touch()
        return False
    while not all(mark.exists() for mark in marks):
        time.sleep(0.1)
    for mark in marks:
        mark.unlink(missing_ok=True)
    return True
