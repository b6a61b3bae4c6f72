"""`--plan`: what will the whole input cost?  Plans it, scores a few hundred rows of it, and extrapolates from measured rates.

Staging is not wasted: the run that follows takes it over. The sample is scored in a folder of its own and thrown away.
"""
import dataclasses
import json
import pathlib
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from addons import report

SPOTS = 6  # places in the input that the sample is taken from; the first one warms up and does not count
SPOT_BATCHES, MOST_SPOT_ROWS = 2, 512  # of each spot
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


def plan_ahead(job: Any, make_worker: Callable[..., Any], summarise: Callable[..., dict], prepare: Sequence[str],
               metric: Sequence[str]) -> int:
    """Plan, score the sample, print what the whole input needs as a table and as one JSON line; returns 0."""
    job.make_plan()
    if not job.plan.rows:
        raise job.trouble(3, f"{job.config.csv_path} has no rows to plan for")
    with tempfile.TemporaryDirectory() as folder:
        sample = score_sample(job, pathlib.Path(folder), make_worker)
        totals = summarise(dataclasses.replace(sample, partitions=sample.partitions[1:] or sample.partitions))
        part_bytes = sum(path.stat().st_size for p in sample.partitions for path in (p.parquet, p.json, p.embeddings)
                         if path.exists())
        sampled_rows = sum(p.stop - p.start for p in sample.partitions)
    totals["rows"] = sum(p.stop - p.start for p in sample.partitions[1:] or sample.partitions)
    explained = report.explain(totals, prepare, metric)
    needs = estimate(job, totals, explained, part_bytes / sampled_rows, sampled_rows)
    for name, value in describe(needs).items():
        job.say(f"{name:>20}  {value}")
    print(json.dumps(needs), flush=True)
    return 0


def score_sample(job: Any, folder: pathlib.Path, make_worker: Callable[..., Any]) -> Any:
    """Score SPOTS ranges of rows, spread over the input, into `folder`; returns the plan of the sample."""
    rows, size = job.plan.rows, job.config.batch_size
    spot = min(MOST_SPOT_ROWS, SPOT_BATCHES * (size if isinstance(size, int) else 32), max(1, rows // SPOTS))
    starts = sorted({i * max(0, rows - spot) // max(1, SPOTS - 1) for i in range(SPOTS)})
    (folder / "parts").mkdir()
    if (job.plan.output / "pairs.parquet").exists():
        (folder / "pairs.parquet").symlink_to((job.plan.output / "pairs.parquet").resolve())
    pattern = job.plan.partitions[0]
    partitions = [dataclasses.replace(pattern, index=i, start=start, stop=min(rows, start + spot), folder=folder / "parts")
                  for i, start in enumerate(starts)]
    sample = dataclasses.replace(job.plan, output=folder, partitions=partitions,
                                 manifest={**job.plan.manifest, "parity_rows": 0})
    for _ in make_worker(job.config, sample, "sample").run(partitions):
        pass
    return sample


def estimate(job: Any, totals: dict, explained: dict, part_bytes_per_row: float, sampled_rows: int) -> dict[str, Any]:
    """The whole input's needs, from the sample's rate; hours are those of workers like this one."""
    rows, rate = job.plan.rows, totals["pairs_per_s"]
    staged = job.plan.output / "pairs.parquet"
    hours = rows / rate / 3600
    on_gpu = totals["peak_gpu_mib"] > 0
    return {
        "rows": rows, "partitions": len(job.plan.partitions), "sampled_rows": sampled_rows, "pairs_per_s": rate,
        "failed_share": 1 - totals["scored"] / max(1, totals["rows"]),
        "limited_by": explained["bottleneck"], "change_first": ADVICE.get(explained["bottleneck"], ""),
        "hours": {str(n): hours / n for n in WORKERS}, "gpu_hours": hours if on_gpu else 0.0,
        "days_for_100_million_pairs": explained["days_for_100_million_pairs"],
        "parts_bytes": int(part_bytes_per_row * rows), "staged_bytes": staged.stat().st_size if staged.exists() else 0,
        "peak_rss_mib": totals["peak_rss_mib"], "peak_gpu_mib": totals["peak_gpu_mib"],
    }


def describe(needs: dict[str, Any]) -> dict[str, str]:
    """The estimate in words, a line each."""
    workers = ", ".join(f"{hours:,.2f} h on {n}" for n, hours in needs["hours"].items())
    gpu = f", {needs['gpu_hours']:,.1f} GPU-hours" if needs["gpu_hours"] else ""
    return {
        "pairs": f"{needs['rows']:,} in {needs['partitions']:,} partitions; {needs['sampled_rows']:,} of them sampled, "
                 f"{needs['failed_share']:.1%} without a score",
        "rate": f"{needs['pairs_per_s']:,.1f} pairs/s with one worker; 100 million pairs would take "
                f"{needs['days_for_100_million_pairs']:,.2f} days",
        "time": f"{workers} workers like this one{gpu}",
        "disk": f"{needs['parts_bytes'] / 2**20:,.1f} MiB for the parts, {needs['staged_bytes'] / 2**20:,.1f} MiB staged, "
                "and about as much again as the table for scores.csv",
        "memory": f"{needs['peak_rss_mib']:,.0f} MiB RAM, {needs['peak_gpu_mib']:,.0f} MiB GPU each (peaks)",
        "limited by": needs["limited_by"], "change first": needs["change_first"],
    }
