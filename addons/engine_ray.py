"""Partitions as the items of a Ray Data pipeline, scored by a pool of actors that each hold a model.

A local cluster by default; `ray_address` joins one, whose nodes see the same paths (a shared POSIX disk). The script and
its addons travel along. An actor that dies with its node is started elsewhere and its partition is done again, which is
harmless: a part appears whole or not at all, and its bytes are the same.
"""
import dataclasses
import importlib
import json
import logging
import os
import pathlib
import shutil
import tempfile
from typing import Any

MODULE = "image_text_sim_clip"
JOB = "IMAGE_TEXT_SIM_JOB"  # the environment variable that tells actors what to do: it outlives the node that started them


class RayWorker:
    """An actor: builds the script's Worker in its own process, then maps {"index"} to the partition's summary."""

    def __init__(self) -> None:
        job = json.loads(os.environ[JOB])
        os.chdir(job["folder"])  # Ray starts its workers in a copy of the code; the config's paths are relative to the user's
        script = importlib.import_module(MODULE)
        self.retry, self.trouble_kind = job["retry"], script.Trouble
        try:
            config = script.Config(**job["settings"])
            self.plan = script.plan(config, joins=True)
            import ray
            self.worker = script.Worker(config, self.plan, f"actor {ray.get_runtime_context().get_actor_id()}")
            self.trouble = None
        except script.Trouble as trouble:  # told by the first item, because an actor that fails to start is started for ever
            self.trouble = trouble

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Score and commit one partition; a user's mistake comes back as a value, since an exception would be tried again."""
        try:
            if self.trouble:
                raise self.trouble
            summary, = self.worker.run([self.plan.partitions[row["index"]]], self.retry)
            return {"rows": summary["rows"], "statuses": str(summary["statuses"]), "exit_code": 0, "message": ""}
        except self.trouble_kind as trouble:
            return {"rows": 0, "statuses": "{}", "exit_code": trouble.exit_code, "message": str(trouble)}


def run(job: Any) -> bool:
    """Plan the job here, have the actors do what is pending, follow them; True: this process finalises."""
    least, most = _pool_size(job)
    import ray
    job.make_plan()
    todo = job.pending()
    if not todo:
        return True
    pool = ray.data.ActorPoolStrategy(min_size=min(least, len(todo)), max_size=min(most, len(todo)))
    with tempfile.TemporaryDirectory() as code:
        _copy_code(job.script, pathlib.Path(code))
        # a cluster of one's own listens on this machine only, and serves no page
        mine: dict[str, Any] = {} if job.config.ray_address else {"_node_ip_address": "127.0.0.1", "include_dashboard": False}
        shared = {} if job.config.ray_address else {"LOCAL_WORLD_SIZE": str(most)}  # actors divide this machine's cores
        ray.init(address=job.config.ray_address or "local", log_to_driver=False, logging_level=logging.ERROR,
                 runtime_env={"working_dir": code, "env_vars": {JOB: _describe(job), **shared}}, **mine)
        try:
            job.listen()  # to SIGTERM, which Ray has taken over
            _quieten(ray)
            items = ray.data.from_items([{"index": p.index} for p in todo], override_num_blocks=len(todo))
            results = items.map(
                RayWorker,  # type: ignore[arg-type]
                compute=pool, num_cpus=1, num_gpus=job.config.ray_gpus)
            job.follow(_summaries(job, results), job.progress(todo))
        finally:
            ray.shutdown()
    return True


def _summaries(job: Any, results: Any) -> Any:
    """Each partition's summary as it comes in; raises the Trouble that a worker met."""
    import ast
    for row in results.iter_rows():
        if row["exit_code"]:
            raise job.trouble(row["exit_code"], row["message"])
        yield {"rows": row["rows"], "statuses": ast.literal_eval(row["statuses"])}


def _pool_size(job: Any) -> tuple[int, int]:
    """The least and the most actors, from `ray_workers`: one number, or "min:max"."""
    low, _, high = str(job.config.ray_workers).partition(":")
    if not low.isdigit() or not (high or low).isdigit() or not 0 < int(low) <= int(high or low):
        raise job.trouble(2, f'ray_workers must be a number or "min:max", got {job.config.ray_workers!r}')
    return int(low), int(high or low)


def _describe(job: Any) -> str:
    """What an actor needs to know, as text."""
    return json.dumps({"settings": dataclasses.asdict(job.config), "folder": str(pathlib.Path.cwd()), "retry": job.retry})


def _copy_code(script: pathlib.Path, folder: pathlib.Path) -> None:
    """The script and addons/ for the workers, under the name they import."""
    shutil.copy(script, folder / f"{MODULE}.py")
    shutil.copytree(script.parent / "addons", folder / "addons", ignore=shutil.ignore_patterns("__pycache__"))


def _quieten(ray: Any) -> None:
    """Ray Data's own bars and logs would mix with this program's."""
    logging.disable(logging.WARNING)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
