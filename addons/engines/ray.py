"""Partitions as the items of a Ray Data pipeline, scored by a pool of actors that each hold a model.

A local cluster by default; `ray_address` joins one, whose nodes see the same paths: a shared POSIX disk, or an object store
with nothing else in common. The script, its add-ons and the config travel along. An actor that dies with its node is started
elsewhere and its partition is done again, which is harmless: a part appears whole or not at all, and its bytes are the same.
"""
import contextlib
import dataclasses
import json
import logging
import math
import os
import pathlib
import shutil
import socket
import tempfile
import typing
import urllib.parse
from collections.abc import Iterator
from typing import Any

import image_text_sim_clip
from image_text_sim_clip import (
    ADDONS,
    EXIT_CONFIG,
    INTERRUPTION,
    Clock,
    Config,
    Job,
    Json,
    Partition,
    PartSummary,
    Trouble,
    Worker,
    make_plan,
    output_disk,
    part_is_done,
    read_part_metadata,
    say,
)

if typing.TYPE_CHECKING:
    import ray.data

ANSWERS_WITHIN_S = 10.0  # the cluster to join; Ray itself would try for minutes, and hear no signal meanwhile
CALLS_OF_AN_ACTOR = 4  # among which the partitions of a table of URLs are divided: at the end of each, late rows are waited for
JOB = "IMAGE_TEXT_SIM_JOB"  # the environment variable that tells actors what to do: it outlives the node that started them


class Answer(typing.TypedDict):
    """What an actor returns of a partition: a PartSummary (`statuses` as JSON), or the Trouble it met (`exit_code` not 0)."""

    rows: int
    statuses: str
    exit_code: int
    message: str


class RayWorker:
    """An actor: builds the script's Worker in its own process, then maps {"indexes"} of partitions to their Answers."""

    def __init__(self, storage_options: Json | None) -> None:
        import ray
        job = json.loads(os.environ[JOB])
        with contextlib.suppress(FileNotFoundError):  # a node that has no such folder has its paths in an object store
            os.chdir(job["folder"])  # Ray starts its workers in a copy of the code; relative paths are the user's
        self.retry: bool = job["retry"]
        self.trouble: Trouble | None = None
        try:
            config = Config(**job["settings"], storage_options=storage_options)
            self.plan = make_plan(config, joins=True)
            self.worker = Worker(config, self.plan, f"actor {ray.get_runtime_context().get_actor_id()}", Clock())
        except Trouble as trouble:  # told by the first item, because an actor that fails to start is started for ever
            self.trouble = trouble

    def __call__(self, row: dict[str, list[int]]) -> list[Answer]:
        """Score and commit some partitions; a user's mistake comes back as a value, since an exception would be tried again."""
        answers: list[Answer] = []
        try:
            if self.trouble:
                raise self.trouble
            partitions = [self.plan.partitions[index] for index in row["indexes"]]
            done = [] if self.retry else [partition for partition in partitions if part_is_done(self.plan, partition)]
            for partition in done:  # by an actor that died before it could say so
                metadata = read_part_metadata(self.plan, partition)
                if metadata:
                    answers.append(describe(PartSummary(metadata["rows"], metadata["statuses"])))
            todo = [partition for partition in partitions if partition not in done]
            answers += map(describe, self.worker.run(todo, self.retry))
        except Trouble as trouble:
            answers.append({"rows": 0, "statuses": "{}", "exit_code": trouble.exit_code, "message": str(trouble)})
        return answers


def describe(summary: PartSummary) -> Answer:
    """What became of a partition, as an actor returns it."""
    return {"rows": summary.rows, "statuses": json.dumps(summary.statuses), "exit_code": 0, "message": ""}


def run(job: Job) -> bool:
    """Plan the job here, have the actors do what is pending, and follow them; True: this process writes the results."""
    least, most = pool_size(job)
    import ray
    job.make_plan()
    todo = job.pending()
    if not todo:
        return True
    pool = ray.data.ActorPoolStrategy(min_size=min(least, len(todo)), max_size=min(most, len(todo)))
    with tempfile.TemporaryDirectory() as code:
        copy_code(pathlib.Path(code))
        start_ray(job, code, most)
        try:
            INTERRUPTION.install()  # Ray has taken SIGTERM over
            quieten_ray()
            look_for_gpus(job)
            groups = group_partitions(job, todo, most)
            items = ray.data.from_items([{"indexes": group} for group in groups], override_num_blocks=len(groups))
            answers = items.flat_map(
                RayWorker,
                fn_constructor_kwargs={"storage_options": job.config.storage_options},  # not with the job: Ray logs that
                compute=pool, num_cpus=1, num_gpus=job.config.ray_gpus)
            job.follow(summaries(job, answers), todo)
        finally:
            ray.shutdown()
    return True


def group_partitions(job: Job, todo: list[Partition], actors: int) -> list[list[int]]:
    """The indexes of the partitions that an actor gets at a time: one, or of URLs several, since late ones wait for nobody."""
    count = math.ceil(len(todo) / (CALLS_OF_AN_ACTOR * actors)) if job.config.image_path == "url" else 1
    return [[partition.index for partition in todo[start:start + count]] for start in range(0, len(todo), count)]


def summaries(job: Job, answers: "ray.data.Dataset") -> Iterator[PartSummary]:
    """Each partition's summary as it comes in; raises the Trouble that an actor met."""
    for number, answer in enumerate(answers.iter_rows()):
        if answer["exit_code"]:
            raise Trouble(answer["exit_code"], answer["message"])
        if number == 0:
            job.plan.refresh()  # the actors have recorded which model it is: parts bear the mark of that, too
        yield PartSummary(answer["rows"], json.loads(answer["statuses"]))


def pool_size(job: Job) -> tuple[int, int]:
    """The least and the most actors, from `ray_workers`: one number, or "min:max"; Trouble (exit 2) for anything else."""
    low, _, high = str(job.config.ray_workers).partition(":")
    high = high or low
    if not low.isdigit() or not high.isdigit() or not 0 < int(low) <= int(high):
        raise Trouble(EXIT_CONFIG, f'ray_workers must be a number or "min:max", got {job.config.ray_workers!r}')
    return int(low), int(high)


def start_ray(job: Job, code: str, most_actors: int) -> None:
    """Join the cluster at `ray_address`, or start one on this machine; the folder `code` and the job travel along."""
    import ray
    address = job.config.ray_address
    variables = {JOB: describe_job(job)}
    options: dict[str, Any] = {}
    if address:
        refuse_unreachable(address)
    else:
        variables["LOCAL_WORLD_SIZE"] = str(most_actors)  # the actors divide this machine's cores among them
        options = {"_node_ip_address": "127.0.0.1", "include_dashboard": False}  # listen on this machine only, serve no page
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR,
                 runtime_env={"working_dir": code, "env_vars": variables}, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:  # no address, no cluster, or one of another version
        if not address:
            raise
        raise Trouble(EXIT_CONFIG, f"ray_address {address!r}: {error}") from error


def refuse_unreachable(address: str) -> None:
    """Trouble (exit 2) where nobody listens at an address of the form host:port; others (`auto`) are Ray's to judge."""
    try:
        place = urllib.parse.urlsplit(address if "://" in address else f"//{address}")
        if place.hostname and place.port:
            socket.create_connection((place.hostname, place.port), ANSWERS_WITHIN_S).close()
    except (OSError, ValueError) as error:
        raise Trouble(EXIT_CONFIG, f"ray_address {address!r}: no cluster answers there ({error})") from error


def look_for_gpus(job: Job) -> None:
    """Trouble (exit 2) where this machine has fewer GPUs than `ray_gpus`: Ray would wait for ever. A cluster may grow."""
    import ray
    most = max((node["Resources"].get("GPU", 0.0) for node in ray.nodes() if node["Alive"]), default=0.0)
    wished = job.config.ray_gpus
    if wished > most and not job.config.ray_address:
        raise Trouble(EXIT_CONFIG, f"ray_gpus is {wished:g}, and Ray finds {most:g} GPUs on this machine")
    if wished > most:
        say(f"ray_gpus is {wished:g}, and no node of the cluster has more than {most:g} GPUs: waiting for one that has")


def describe_job(job: Job) -> str:
    """What an actor needs to know, as text, without the storage_options, which may hold secrets."""
    settings = dataclasses.asdict(job.config)
    del settings["storage_options"]
    return json.dumps({"settings": settings, "folder": str(pathlib.Path.cwd()), "retry": job.retry})


def copy_code(folder: pathlib.Path) -> None:
    """Copy the script and addons/ to `folder`, under the names that actors import; Trouble (exit 5) for its disk."""
    with output_disk(folder):
        shutil.copy(image_text_sim_clip.__file__, folder / "image_text_sim_clip.py")
        shutil.copytree(ADDONS, folder / "addons", ignore=shutil.ignore_patterns("__pycache__"))


def quieten_ray() -> None:
    """Turn off Ray Data's own bars and logs, which would mix with this program's."""
    import ray
    logging.disable(logging.WARNING)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
