"""One task of a Slurm job array: every task runs the same command and does the partitions that fall to its number.

Nobody hands out work, so a task that dies costs its share only, and submitting its number again does it. Whoever finds
that no partition is pending any more finalises.
"""
import os
from typing import Any


def run(job: Any) -> bool:
    """Plan the job or join it, do this task's share; True for the one task that finalises."""
    if job.fresh:
        raise job.trouble(2, "--fresh would have each task of the array discard what the others did: run it once without "
                             "Slurm (--set engine=local), or remove the folder, before the array is submitted")
    if job.retry:
        raise job.trouble(2, "--retry-failed needs one process that knows when all is done: engine local, accelerate or ray")
    try:
        number, tasks = int(os.environ["SLURM_ARRAY_TASK_ID"]), int(os.environ.get("SLURM_ARRAY_TASK_COUNT") or 1)
        first, last, step = (int(os.environ.get(f"SLURM_ARRAY_TASK_{name}") or default)
                             for name, default in (("MIN", 0), ("MAX", 0), ("STEP", 1)))
    except (KeyError, ValueError):
        raise job.trouble(2, "engine: slurm needs SLURM_ARRAY_TASK_ID and SLURM_ARRAY_TASK_COUNT: submit the command with "
                             "sbatch --array") from None
    if last and (last - first) // step + 1 != tasks:
        raise job.trouble(2, f"an array of {tasks} tasks between {first} and {last} is no range: no task would know its "
                             "share: submit --array=0-63 or the like, or a single number for all that is left")
    task = (number - first) // step
    job.make_plan(joins=True)
    mine = [p for p in job.pending() if p.index % tasks == task % tasks]
    job.say(f"slurm: task {task} of {tasks}, {len(mine)} partitions")
    job.work(mine, f"task {task}")
    if job.pending():
        job.say("slurm: other tasks are still at work; the last one writes the results")
        return False
    job.once = bool(mine) or task > 0  # of tasks that end at the same time, the first one speaks
    return True
