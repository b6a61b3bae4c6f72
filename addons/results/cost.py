"""`--plan`: what will the whole input cost?  Plans it, scores a few hundred rows of it, and extrapolates from measured rates.

Staging is not wasted: the run that follows takes it over. The sample is scored in a folder of its own and thrown away.
"""
import copy
import dataclasses
import json
import pathlib
import tempfile
import typing
from typing import Any

from addons.stores import traffic
from image_text_sim_clip import (
    EXIT_INPUT,
    Clock,
    Job,
    Partition,
    Plan,
    Snapshot,
    Trouble,
    Worker,
    explain,
    output_disk,
    say,
    summarise,
    write_sealed,
)

SPOTS = 6  # places in the input that the sample is taken from; the first one warms up and does not count
SPOT_BATCHES = 2
MOST_SPOT_ROWS = 512
AUTO_BATCH_ROWS = 32  # what a batch is taken for where batch_size is still to be found
WORKERS = (1, 8, 64)  # for how many the hours are told

ADVICE = {
    "fetch": "more loader_threads, a faster network, or a cache_path that keeps what was fetched for the next model",
    "decode": "decode: scaled, more cores for the loaders, or decode: gpu where there is a CUDA device",
    "resize": "decode: scaled, or more cores for the loaders",
    "tokenize": "more workers on this machine: tokenizing is one thread's work in each",
    "image_encoder": "a GPU, dtype: bfloat16, quantization: int8, or a smaller model",
    "text_encoder": "a GPU, dtype: bfloat16, quantization: int8, or a smaller model",
    "score": "larger partition_rows",
    "write": "a faster output disk, or larger partition_rows",
}

Figures = dict[str, Any]  # a JSON object of numbers and names, as profile.json is one


class Measured(typing.NamedTuple):
    """What the sample showed: how many rows it had, the bytes of a part per row, and the profile of those that count.

    `weights_mib` is what each of several models' weights take in memory, by name; empty for one model.
    """

    sampled_rows: int
    part_bytes_per_row: float
    profile: Figures
    weights_mib: dict[str, float]


def tell_cost(job: Job) -> int:
    """Plan, score the sample, print what the whole input needs as a table and as one JSON line; returns the exit code 0.

    Raises Trouble (exit 3) for an input without rows.
    """
    job.make_plan()
    if not job.plan.row_count:
        raise Trouble(EXIT_INPUT, f"{job.config.csv_path} has no rows to plan for")
    with output_disk("a temporary folder"), tempfile.TemporaryDirectory() as folder:
        before = traffic.count_traffic(job.config)
        measured = measure_sample(job, pathlib.Path(folder))
    needs = estimate_needs(job.plan, measured)
    if asked := traffic.estimate_traffic(job.plan, before, measured.sampled_rows, measured.part_bytes_per_row):
        needs["object_store"] = asked
    for name, value in describe_needs(needs).items():
        say(f"{name:>20}  {value}")
    print(json.dumps(needs), flush=True)
    return 0


def measure_sample(job: Job, folder: pathlib.Path) -> Measured:
    """Score the sample into `folder` and sum it up."""
    sample = plan_sample(job, folder)
    score_sample(sample)
    counted = sample.partitions[1:] or sample.partitions
    totals = summarise(Snapshot(dataclasses.replace(sample, partitions=counted)))
    totals["rows"] = count_rows(counted)
    sampled_rows = count_rows(sample.partitions)
    part_bytes = sum(bytes_of_part(partition) for partition in sample.partitions)
    weights_mib = sample.manifest.get("resolved", {}).get("weights_mib", {})
    return Measured(sampled_rows, part_bytes / sampled_rows, totals | explain(totals), weights_mib)


def plan_sample(job: Job, folder: pathlib.Path) -> Plan:
    """A plan of SPOTS ranges of rows, spread evenly over the input, whose parts go into `folder`."""
    rows = job.plan.row_count
    batch_rows = job.config.batch_size if isinstance(job.config.batch_size, int) else AUTO_BATCH_ROWS
    spot_rows = min(MOST_SPOT_ROWS, SPOT_BATCHES * batch_rows, max(1, rows // SPOTS))
    last_start = max(0, rows - spot_rows)
    starts = sorted({spot * last_start // (SPOTS - 1) for spot in range(SPOTS)})
    partitions = [Partition(index, start, min(rows, start + spot_rows), folder / "parts") for index, start in enumerate(starts)]
    (folder / "parts").mkdir()
    write_sealed(folder / "manifest.json", job.plan.manifest)
    # no score passport, whose rows are few in a run but not in a sample
    config = dataclasses.replace(job.config, parity_rows=0, max_score_drift=None)
    return Plan(config, folder, copy.deepcopy(job.plan.manifest), partitions, job.plan.table)


def score_sample(sample: Plan) -> None:
    """Score and commit the sample's partitions."""
    for _ in Worker(sample.config, sample, "sample", Clock()).run(sample.partitions):
        pass


def count_rows(partitions: list[Partition]) -> int:
    """How many rows the partitions have together."""
    return sum(partition.stop - partition.start for partition in partitions)


def bytes_of_part(partition: Partition) -> int:
    """What a part and the files next to it take on the disk."""
    others = partition.folder.glob(f"{partition.embeddings.stem}.*.npz")  # of further models
    files = (partition.parquet, partition.times, partition.embeddings, *others)
    return sum(path.stat().st_size for path in files if path.exists())


def estimate_needs(plan: Plan, measured: Measured) -> Figures:
    """The whole input's needs, from the sample's rate; hours are those of workers like this one."""
    profile = measured.profile
    staged = plan.output / "pairs.parquet"
    hours = plan.row_count / profile["pairs_per_s"] / 3600
    return {
        "rows": plan.row_count,
        "partitions": len(plan.partitions),
        "sampled_rows": measured.sampled_rows,
        "pairs_per_s": profile["pairs_per_s"],
        "failed_share": 1 - profile["scored"] / profile["rows"],
        "limited_by": profile["bottleneck"],
        "change_first": ADVICE.get(profile["bottleneck"], ""),
        "hours": {str(workers): hours / workers for workers in WORKERS},
        "gpu_hours": hours if profile["peak_gpu_mib"] > 0 else 0.0,
        "days_for_100_million_pairs": profile["days_for_100_million_pairs"],
        "parts_bytes": int(measured.part_bytes_per_row * plan.row_count),
        "staged_bytes": staged.stat().st_size if staged.exists() else 0,
        "peak_rss_mib": profile["peak_rss_mib"],
        "peak_gpu_mib": profile["peak_gpu_mib"],
        **({"weights_mib": measured.weights_mib} if measured.weights_mib else {}),
    }


def describe_needs(needs: Figures) -> dict[str, str]:
    """The estimate in words, a line each."""
    workers = ", ".join(f"{hours:,.2f} h on {count}" for count, hours in needs["hours"].items())
    models = "".join(f"; weights of {name} {mib:,.0f} MiB" for name, mib in needs.get("weights_mib", {}).items())
    gpu = f", {needs['gpu_hours']:,.1f} GPU-hours" if needs["gpu_hours"] else ""
    return {
        "pairs": f"{needs['rows']:,} in {needs['partitions']:,} partitions; {needs['sampled_rows']:,} of them sampled, "
                 f"{needs['failed_share']:.1%} without a score",
        "rate": f"{needs['pairs_per_s']:,.1f} pairs/s with one worker; 100 million pairs would take "
                f"{needs['days_for_100_million_pairs']:,.2f} days",
        "time": f"{workers} workers like this one{gpu}",
        "disk": f"{needs['parts_bytes'] / 2**20:,.1f} MiB for the parts, {needs['staged_bytes'] / 2**20:,.1f} MiB staged, "
                "and about as much again as the table for scores.csv",
        "memory": f"{needs['peak_rss_mib']:,.0f} MiB RAM, {needs['peak_gpu_mib']:,.0f} MiB GPU each (peaks)"
                  f"{models}",
        **({"object store": traffic.describe_traffic(needs["object_store"])} if "object_store" in needs else {}),
        "limited by": needs["limited_by"],
        "change first": needs["change_first"],
    }
