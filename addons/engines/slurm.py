"""One task of a Slurm job array: every task runs the same command and does the partitions that fall to its number.

Nobody hands out work, so a task that dies costs its share only, and submitting its number again does it. The task that
finds no partition pending any more writes the results.
"""
import os
import typing

from image_text_sim_clip import EXIT_CONFIG, Job, Trouble, say


class ArrayTask(typing.NamedTuple):
    """Which task of how many this process is; `place` counts from 0, or beyond `tasks` for one that was resubmitted alone."""

    place: int
    tasks: int


def run(job: Job) -> bool:
    """Plan the job or join it, and do this task's share; True for the one task that writes the results."""
    refuse_what_tasks_would_undo(job)
    task = find_task()
    job.make_plan(joins=True)
    mine = [partition for partition in job.pending() if partition.index % task.tasks == task.place % task.tasks]
    say(f"slurm: task {task.place} of {task.tasks}, {len(mine)} partitions")
    job.work(mine, f"task {task.place}")
    if job.pending():
        say("slurm: other tasks are still at work; the last one writes the results")
        return False
    job.once = bool(mine) or task.place > 0  # of tasks that end at the same time, the first one speaks
    return True


def refuse_what_tasks_would_undo(job: Job) -> None:
    """Trouble (exit 2) for what needs one process that speaks for all."""
    if job.fresh:
        raise Trouble(EXIT_CONFIG, "--fresh would have each task of the array discard what the others did: run it once "
                                   "without Slurm (--set engine=local), or remove the folder, before submitting the array")
    if job.retry:
        raise Trouble(EXIT_CONFIG, "--retry-failed needs one process that knows when all is done: engine local, accelerate "
                                   "or ray")


def find_task() -> ArrayTask:
    """What Slurm says in the environment; Trouble (exit 2) outside an array, or in one whose numbers leave gaps."""
    try:
        number = int(os.environ["SLURM_ARRAY_TASK_ID"])
        count = read_number("COUNT", 1)
        first = read_number("MIN", 0)
        last = read_number("MAX", 0)
        step = read_number("STEP", 1)
    except (KeyError, ValueError):
        raise Trouble(EXIT_CONFIG, "engine: slurm needs SLURM_ARRAY_TASK_ID and SLURM_ARRAY_TASK_COUNT: submit the command "
                                   "with sbatch --array") from None
    if last and (last - first) // step + 1 != count:
        raise Trouble(EXIT_CONFIG, f"an array of {count} tasks between {first} and {last} is no range, so that no task can "
                                   "tell its share: submit --array=0-63 or the like, or a single number for all that is left")
    return ArrayTask((number - first) // step, count)


def read_number(name: str, default: int) -> int:
    """SLURM_ARRAY_TASK_<name>, or the default where it is not set; ValueError where it is no number."""
    return int(os.environ.get(f"SLURM_ARRAY_TASK_{name}") or default)
