"""Tasks that Slurm has started: those of a job array, those of one srun, or both. Each does the partitions of its number.

Nobody hands out work, so a task that dies costs its share only, and submitting its number again does it. The task that
finds no partition pending any more writes the results.
"""
import os
import typing

from image_text_sim_clip import EXIT_CONFIG, Config, Job, Trouble, say


class Task(typing.NamedTuple):
    """Which task of how many this process is; `place` counts from 0, or beyond `tasks` for one that was resubmitted alone."""

    place: int
    tasks: int


def run(job: Job) -> bool:
    """Plan the job or join it, and do this task's share; True for the one task that writes the results."""
    refuse_what_tasks_would_undo(job)
    task = find_task(job.config)
    job.make_plan(joins=True)
    mine = [partition for partition in job.pending() if partition.index % task.tasks == task.place % task.tasks]
    say(f"slurm: task {task.place} of {task.tasks}, {len(mine)} partitions")
    job.work(mine, f"task {task.place}")
    if left := len(job.pending()):
        say(f"slurm: {left} partitions are left to the other tasks, the last of which writes the results (where each task has "
            "a table and an output_path of its own: --set engine=local)")
        return False
    job.once = bool(mine) or task.place > 0  # of tasks that end at the same time, the first one speaks
    return True


def refuse_what_tasks_would_undo(job: Job) -> None:
    """Trouble (exit 2) for what needs one process that speaks for all."""
    if job.fresh:
        raise Trouble(EXIT_CONFIG, "--fresh would have each task discard what the others did: run it once without Slurm "
                                   "(--set engine=local), or remove the folder, before submitting the tasks")
    if job.retry:
        raise Trouble(EXIT_CONFIG, "--retry-failed needs one process that knows when all is done: engine local, accelerate "
                                   "or ray")


def find_task(config: Config) -> Task:
    """This process's place among all tasks: the array's tasks, each of which srun may have started several times.

    Raises Trouble (exit 2) outside an array and srun, for an array whose numbers leave gaps, and for keys that do not fit.
    """
    is_array = "SLURM_ARRAY_TASK_ID" in os.environ
    check_keys_fit(config, is_array)
    try:
        array = read_array(config) if is_array else Task(0, 1)
        step = read_step()
    except ValueError:
        raise Trouble(EXIT_CONFIG, "engine: slurm cannot read the numbers in SLURM_ARRAY_TASK_ID, SLURM_ARRAY_TASK_COUNT, "
                                   "SLURM_PROCID or SLURM_STEP_NUM_TASKS") from None
    if not is_array and step is None:
        raise Trouble(EXIT_CONFIG, "engine: slurm needs the tasks of an array (SLURM_ARRAY_TASK_ID) or of srun "
                                   "(SLURM_STEP_NUM_TASKS): submit the command with sbatch --array, or start it with srun")
    step = step or Task(0, 1)
    return Task(array.place * step.tasks + step.place, array.tasks * step.tasks)


def check_keys_fit(config: Config, is_array: bool) -> None:
    """Raise Trouble (exit 2) for one of the two keys of arrays that share a run where it can mean nothing."""
    if config.slurm_offset and config.slurm_total is None:
        raise Trouble(EXIT_CONFIG, f"slurm_offset {config.slurm_offset} needs slurm_total: how many tasks all arrays have")
    if config.slurm_total is not None and not is_array:
        raise Trouble(EXIT_CONFIG, "slurm_total is for job arrays (sbatch --array): there is none here")


def read_array(config: Config) -> Task:
    """The task of a job array, or of all arrays that `slurm_total` puts together.

    Raises ValueError for what is no number, Trouble (exit 2) for an array with gaps and for a number beyond the total.
    """
    number = read_number("SLURM_ARRAY_TASK_ID", 0)
    if config.slurm_total is not None:
        place = config.slurm_offset + number
        if place >= config.slurm_total:
            raise Trouble(EXIT_CONFIG, f"slurm_offset {config.slurm_offset} and the array's task {number} lie beyond the "
                                       f"{config.slurm_total} tasks of slurm_total, which are counted from 0")
        return Task(place, config.slurm_total)
    count = read_number("SLURM_ARRAY_TASK_COUNT", 1)
    first = read_number("SLURM_ARRAY_TASK_MIN", 0)
    last = read_number("SLURM_ARRAY_TASK_MAX", 0)
    step = read_number("SLURM_ARRAY_TASK_STEP", 1)
    if last and (last - first) // step + 1 != count:
        raise Trouble(EXIT_CONFIG, f"an array of {count} tasks between {first} and {last} is no range, so that no task can "
                                   "tell its share: submit --array=0-63 or the like, or a single number for all that is left")
    return Task((number - first) // step, count)


def read_step() -> Task | None:
    """The task of an srun; None without one: sbatch alone sets SLURM_NTASKS and SLURM_PROCID too, and runs one process."""
    if not os.environ.get("SLURM_STEP_NUM_TASKS"):
        return None
    return Task(read_number("SLURM_PROCID", 0), max(1, read_number("SLURM_STEP_NUM_TASKS", 1)))


def read_number(name: str, default: int) -> int:
    """The number in an environment variable, or the default where it is not set; ValueError where it is none."""
    return int(os.environ.get(name) or default)
