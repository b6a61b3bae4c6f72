"""The run in numbers: what profile.json tells beside the totals, and the table of time and memory on stderr."""
import math
import platform
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

from addons import null, passport

PACKAGES = ("torch", "transformers", "tokenizers", "pillow", "numpy", "pyarrow")  # what the scores depend on
LOADED = ("fetch", "decode", "resize")  # what loader threads do; all else is the main thread's work


def add_up(parts: list[dict[str, Any]], stages: Sequence[str]) -> dict[str, Any]:
    """Times, scores and memory of all parts, from their JSON files; the rate is rows over the seconds of `busy_time`."""
    seconds = {stage: math.fsum(part["seconds"].get(stage, 0.0) for part in parts) for stage in stages}
    tried, wall_s = sum(part["tried"] for part in parts), busy_time(parts)
    cosines, random_pairs = sum(part["similarity_count"] for part in parts), null.Null.merge_parts(parts)
    return {
        "truncated": sum(part["truncated"] for part in parts),
        "mean_similarity": math.fsum(part["similarity_sum"] for part in parts) / cosines if cosines else None,
        "null": random_pairs and random_pairs.describe(), "tried": tried, "wall_s": wall_s,
        "pairs_per_s": tried / wall_s if wall_s else 0.0,
        "workers": round(math.fsum(part["wall_s"] for part in parts) / wall_s) if wall_s else 0,
        "stage_seconds": seconds,
        "peak_rss_mib": max([part["peak_rss_mib"] for part in parts], default=0.0),
        "peak_gpu_mib": max([part["peak_gpu_mib"] for part in parts], default=0.0),
        "oom_halvings": sum(part["oom_halvings"] for part in parts),
        **(passport.tell_drifts(parts) if any("passport" in part or "embeddings" in part for part in parts) else {}),
    }


def busy_time(parts: list[dict[str, Any]]) -> float:
    """Seconds in which anybody was at work on the parts, whose JSON files these are: interruptions and company count once."""
    busy_s, until = 0.0, -math.inf
    for begun, ended in sorted((part["ended"] - part["wall_s"], part["ended"]) for part in parts):
        busy_s += max(0.0, ended - max(begun, until))
        until = max(until, ended)
    return busy_s


def explain(totals: dict[str, Any], prepare: Sequence[str], metric: Sequence[str]) -> dict[str, Any]:
    """Times per pair, the stage that limits, each stage's own capacity, days for 100 million pairs, versions.

    `totals` holds what the script adds up from the parts; `prepare` and `metric` name the stages of a pair's way.
    """
    done = totals["tried"]
    rate, seconds = totals["pairs_per_s"], totals["stage_seconds"]
    per_pair = {stage: seconds[stage] / max(1, done) for stage in seconds}
    return {
        "days_for_100_million_pairs": 1e8 / rate / 86400 if rate else None,
        "seconds_per_pair": {"pre-processing": sum(per_pair[s] for s in prepare), "metric": sum(per_pair[s] for s in metric),
                             "stages": per_pair},
        "bottleneck": find_bottleneck(seconds, metric) if done else None,
        "capacity_pairs_per_s": {stage: 1 / per_pair[stage] for stage in (*prepare, *metric) if per_pair[stage]},
        "python": platform.python_version(), "versions": find_versions(), "image_backend": "pil",
    }


def find_bottleneck(seconds: dict[str, float], metric: Sequence[str]) -> str:
    """The stage that the others wait for: one of the loaders' if the main thread waited for them more than for the model."""
    loaders_limit = seconds["wait_for_images"] > seconds["wait_for_model"]
    candidates = LOADED if loaders_limit else ("tokenize", *metric, "write")
    return max(candidates, key=lambda stage: seconds[stage])


def find_versions() -> dict[str, str]:
    """The installed versions of PACKAGES."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def print_summary(profile: dict[str, Any], prepare: Sequence[str], metric: Sequence[str], say: Callable[[str], None]) -> None:
    """The table of time and memory, a line each through `say`, as the original work reports it."""
    times, failed = profile["seconds_per_pair"], profile["failed"]

    def of_stages(total: float, stages: Sequence[str]) -> str:
        return f"{total:.6f} s a pair   (" + ", ".join(f"{s} {times['stages'][s]:.6f}" for s in stages) + ")"
    pairs = f"{profile['rows']:,}: {profile['scored']:,} scored" + "".join(f", {n:,} {k}" for k, n in failed.items())
    lines = [("pairs", pairs + (f"; {profile['malformed']:,} malformed lines" if profile["malformed"] else "")),
             ("pre-processing", of_stages(times["pre-processing"], prepare)),
             ("metric", of_stages(times["metric"], metric)),
             ("total", f"{times['pre-processing'] + times['metric']:.6f} s a pair"),
             ("memory", f"{profile['peak_rss_mib']:,.0f} MiB RAM, {profile['peak_gpu_mib']:,.0f} MiB GPU (peaks)")]
    if profile["pairs_per_s"]:
        workers = f" with {profile['workers']} workers" if profile["workers"] > 1 else ""
        lines += [("rate", f"{profile['pairs_per_s']:,.1f} pairs/s{workers}; 100 million pairs would take "
                           f"{profile['days_for_100_million_pairs']:,.2f} days"), ("limited by", profile["bottleneck"])]
    if profile["mean_similarity"] is not None:
        lines.append(("mean similarity", f"{profile['mean_similarity']:.4f}"))
    if null := profile["null"]:
        lines.append(("random pairs", f"mean {null['mean']:.4f}, sd {null['sd']:.4f}; 95 % lie below {null['q95']:.4f}, 99 % "
                                      f"below {null['q99']:.4f}, 99.9 % below {null['q99.9']:.4f}"))
    for key in ("passport", "saved_embeddings"):
        if profile.get(key):
            from .passport import describe
            lines.append((key.replace("_", " "), describe(profile[key])))
    for name, value in lines:
        say(f"{name:>16}  {value}")
