"""Partitions as the items of a Ray Data pipeline, scored by a pool of actors that each hold a model.

A local cluster by default; `ray_address` joins one, whose nodes see the same paths (a shared POSIX disk). The script and
its addons travel along. An actor that dies with its node is started elsewhere and its partition is done again, which is
harmless: a part appears whole or not at all, and its bytes are the same.
"""
import dataclasses
import importlib
import logging
import os
import pathlib
import shutil
import tempfile
from typing import Any

MODULE = "image_text_sim_clip"


class RayWorker:
    """An actor: builds the script's Worker in its own process, then maps {"index"} to the partition's summary."""

    def __init__(self, settings: dict[str, Any], folder: str, retry: bool) -> None:
        os.chdir(folder)  # Ray starts its workers in a copy of the code; paths in the config are relative to the user's folder
        script = importlib.import_module(MODULE)
        self.retry, self.trouble_kind = retry, script.Trouble
        try:
            config = script.Config(**settings)
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
    import ray
    job.make_plan()
    todo = job.pending()
    if not todo:
        return True
    with tempfile.TemporaryDirectory() as code:
        _copy_code(job.script, pathlib.Path(code))
        ray.init(address=job.config.ray_address or "local", log_to_driver=False, logging_level=logging.ERROR,
                 runtime_env={"working_dir": code})
        try:
            _quieten(ray)
            items = ray.data.from_items([{"index": p.index} for p in todo], override_num_blocks=len(todo))
            results = items.map(
                RayWorker,  # type: ignore[arg-type]
                fn_constructor_args=(dataclasses.asdict(job.config), str(pathlib.Path.cwd()), job.retry),
                compute=_pool(job, len(todo)), num_cpus=1, num_gpus=job.config.ray_gpus)
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


def _pool(job: Any, partitions: int) -> Any:
    """The actor pool that `ray_workers` describes: one number, or "min:max"."""
    import ray
    low, _, high = str(job.config.ray_workers).partition(":")
    if not low.isdigit() or not (high or low).isdigit() or not 0 < int(low) <= int(high or low):
        raise job.trouble(2, f'ray_workers must be a number or "min:max", got {job.config.ray_workers!r}')
    most = min(int(high or low), partitions)
    return ray.data.ActorPoolStrategy(min_size=min(int(low), most), max_size=most)


def _copy_code(script: pathlib.Path, folder: pathlib.Path) -> None:
    """The script and addons/ for the workers, under the name they import."""
    shutil.copy(script, folder / f"{MODULE}.py")
    shutil.copytree(script.parent / "addons", folder / "addons", ignore=shutil.ignore_patterns("__pycache__"))


def _quieten(ray: Any) -> None:
    """Ray Data's own bars and logs would mix with this program's."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
