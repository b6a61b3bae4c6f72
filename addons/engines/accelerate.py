"""Several processes that `accelerate launch` or torchrun has started, on one machine or on many that share a disk or a bucket.

Rank 0 plans and hands out the list of pending partitions; rank r takes every n-th of them (n ranks) from its r-th on.
There is no barrier at the end, which would time out while one rank is still at work: each rank leaves a mark, and rank 0
waits for the marks and writes the results. A rank that dies ends the group (the launcher sees to it), and the same
command does the rest.
"""
import contextlib
import datetime
import os
import pathlib
import signal
import time
import typing
from collections.abc import Iterator

from image_text_sim_clip import EXIT_CONFIG, INTERRUPTION, Job, Trouble, in_store, name_of_mine, output_disk, say

if typing.TYPE_CHECKING:
    from accelerate import PartialState

PATIENCE = datetime.timedelta(days=30)  # rank 0 may stage a large table while the others wait
LOOK_AGAIN_S = 0.1  # how often rank 0 looks for the marks of the others ...
TELL_AFTER_S = 60.0  # whom rank 0 waits for, when it has done its own share
LOOK_INTO_STORE_S = 2.0  # ... and in an object store, where each look is a request


def run(job: Job) -> bool:
    """Plan the job, do this rank's share of it, and wait for the others; True on rank 0, which writes the results."""
    world_size = read_world_size()
    if world_size == 1:
        say("accelerate: world size 1 (accelerate launch --cpu starts one process, whatever --num_processes says: use "
            "--multi_gpu, or torchrun, which start as many as you ask for, with or without a GPU)")
        job.make_plan()
        job.work(job.pending(), "rank 0")
        return True
    rank = join_group(job, world_size).process_index
    name, indices = share_list(job, rank, world_size)
    marks = [job.plan.output / "parts" / name.replace("rank", f"rank-{other}", 1) for other in range(1, world_size)]
    mine = [job.plan.partitions[index] for index in indices[rank::world_size]]
    job.work(mine, f"rank {rank}", judge=rank == 0)
    if rank > 0:
        with output_disk(marks[rank - 1]):
            marks[rank - 1].touch()
        return False
    await_marks(marks)
    return True


def read_world_size() -> int:
    """How many processes the launcher has started; Trouble (exit 2) where what it sets beside that is missing."""
    told = os.environ.get("WORLD_SIZE") or "1"
    lacking = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if not told.isdigit() or int(told) < 1 or (told != "1" and lacking):
        others = f", without {', '.join(lacking)}" if lacking else ""
        raise Trouble(EXIT_CONFIG, f"WORLD_SIZE is {told!r} in the environment{others}: start the command with accelerate "
                                   "launch or torchrun, or do all of it here with --set engine=local")
    return int(told)


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """While in this context, Ctrl-C and SIGTERM end the process: torch waits for other ranks where Python hears no signal."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_DFL)
    try:
        yield
    finally:
        INTERRUPTION.install()


def join_group(job: Job, world_size: int) -> "PartialState":
    """Join the launcher's group of processes; Trouble (exit 2) where it has another size than the environment says."""
    import torch
    from accelerate import PartialState
    with ended_by_signals():
        if job.config.use_cuda and torch.cuda.is_available():
            state = PartialState(timeout=PATIENCE)
        else:
            state = PartialState(cpu=True, backend="gloo", timeout=PATIENCE)
    if state.num_processes != world_size:
        raise Trouble(EXIT_CONFIG, f"the launcher speaks of {world_size} processes, but this group has {state.num_processes}")
    return state


def share_list(job: Job, rank: int, world_size: int) -> tuple[str, list[int]]:
    """Plan the job on every rank; returns what rank 0 tells all: the pattern of the marks' names, the pending partitions.

    The pattern holds rank 0's process id, so that two groups on one folder do not take each other's marks for their own.
    """
    from accelerate.utils import broadcast_object_list
    told: list[tuple[str, list[int]]] = [("", [])]
    if rank == 0:
        job.make_plan()
        say(f"accelerate: world size {world_size}")
        pattern = name_of_mine(pathlib.Path("part-rank")).name
        told = [(pattern, [partition.index for partition in job.pending()])]
    with ended_by_signals():
        broadcast_object_list(told, from_process=0)  # replaces the item on all ranks but 0
    if rank > 0:
        job.make_plan(joins=True)
    return told[0]


def await_marks(marks: list[pathlib.Path]) -> None:
    """Wait until every other rank has left its mark, and remove the marks. After a while it is said who is waited for."""
    began = time.monotonic()
    is_told = False
    with output_disk(marks[0].parent):
        while late := [rank for rank, mark in enumerate(marks, 1) if not mark.exists()]:
            if not is_told and time.monotonic() - began > TELL_AFTER_S:
                is_told = True
                say(f"accelerate: waiting for ranks {', '.join(map(str, late))}; if one has died, stop this and run it again")
            time.sleep(LOOK_INTO_STORE_S if in_store(marks[0]) else LOOK_AGAIN_S)
        for mark in marks:
            mark.unlink(missing_ok=True)
