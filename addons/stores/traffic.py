"""What a run will ask of an object store: requests of each kind, and bytes, per million rows, for `--plan`."""
import collections

from addons.stores import SCHEME
from image_text_sim_clip import Config, Json, Plan, addon, in_store

# by a part: its mark, itself and its times are written, the mark goes, mark and manifest are looked at; to sum up, its footer,
# itself and its times are read again
REQUESTS_OF_A_PART = {"HEAD": 2, "PUT": 3, "DELETE": 1, "GET": 3}


def count_traffic(config: Config) -> dict[str, int]:
    """The requests of each kind and the bytes of this process so far; {} for a run of which nothing lies in a store."""
    if not any(map(SCHEME.match, (config.csv_path, config.image_path, config.output_path))):
        return {}
    return dict(addon("stores.remote", "output_path").TRAFFIC.counts)


def estimate_traffic(plan: Plan, before: dict[str, int], sampled_rows: int, part_bytes_per_row: float) -> Json:
    """Requests and bytes per million rows: those that a sample took since `before`, and those that parts will take.

    Tars are fetched whole, once, however few of their rows the sample had.
    """
    now = count_traffic(plan.config)
    per_million = {kind: round((count - before.get(kind, 0)) / sampled_rows * 1e6) for kind, count in now.items()}
    if plan.manifest["kind"] == "tar" and SCHEME.match(plan.config.csv_path):
        per_million = {kind: round(count / plan.row_count * 1e6) for kind, count in count_tars(plan).items()}
    if in_store(plan.output):
        parts = len(plan.partitions) / plan.row_count * 1e6
        for kind, count in REQUESTS_OF_A_PART.items():
            per_million[kind] = per_million.get(kind, 0) + round(count * parts)
        per_million["bytes_written"] = round(part_bytes_per_row * 1e6)
    return {kind: count for kind, count in sorted(per_million.items()) if count}


def count_tars(plan: Plan) -> dict[str, int]:
    """The requests and bytes that all tars of the input take."""
    total: collections.Counter[str] = collections.Counter()
    for entry in plan.manifest["files"]:
        total.update(addon("stores.spool", "csv_path").count_requests(entry))
    return dict(total)


def describe_traffic(traffic: Json) -> str:
    """The requests and bytes in words."""
    requests = ", ".join(f"{count:,} {kind}" for kind, count in traffic.items() if not kind.startswith("bytes"))
    moved = [f"{count / 2**30:,.2f} GiB {kind.removeprefix('bytes_')}" for kind, count in traffic.items()
             if kind.startswith("bytes")]
    return f"per million rows {requests} requests, {' and '.join(moved)}"
