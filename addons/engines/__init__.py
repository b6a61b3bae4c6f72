"""Engines: where the partitions of a run are scored. Without this room the script scores them in its own process.

    accelerate.py  several processes that `accelerate launch` or torchrun has started
    slurm.py       the tasks of a Slurm job array
    ray.py         a pool of Ray actors, on this machine or on a cluster

A run takes the engine that the key `engine` names; with `auto` it looks at what the launcher has left in the environment.
What an engine does never changes a result: a part has the same bytes wherever it was scored, so a run that was begun
under one engine may be finished under another.

To add one, put a file addons/engines/<name>.py with a function `run` (see `Engine`) here, and set `engine: <name>`.
"""
import typing

if typing.TYPE_CHECKING:
    from image_text_sim_clip import Job


class Engine(typing.Protocol):
    """What each module of this room offers."""

    def run(self, job: "Job") -> bool:
        """See to it that every pending partition is done by somebody; returns whether this process writes the results.

        `job.make_plan()` comes first (`joins=True` for a process that finds a plan made by another). `job.pending()` lists
        what is left to do, `job.work(partitions, name)` scores and commits partitions in this process, and
        `job.follow(summaries, partitions)` shows and judges those that were scored elsewhere. Raises Trouble for a user's
        mistake.
        """
