"""`--verify`: read every part again and hold it against the sha256 that was written before it."""
import hashlib
import json
import pathlib
from collections.abc import Callable
from typing import Any


def verify(job: Any, read_part: Callable[[Any], Any]) -> int:
    """Check all parts, the row count and scores.csv; returns the exit code 0, or raises Trouble (exit 7) naming the flaws.

    What is flawed is removed, so that the same command without --verify does it again.
    """
    output = pathlib.Path(job.config.output_path)
    if not (output / "manifest.json").is_file():
        raise job.trouble(2, f"{output} holds no run to verify")
    job.make_plan(joins=True)
    flaws, missing, rows = [], 0, 0
    for partition in job.plan.partitions:
        try:
            table = read_part(partition)
        except job.trouble:
            flaws.append(partition.parquet.name)
            continue
        if table is not None and not _embeddings_are_as_written(partition):
            partition.parquet.unlink()
            flaws.append(partition.embeddings.name)
        missing += table is None
        rows += 0 if table is None else table.num_rows
    results = job.results_file()
    if not flaws and job.is_finished() and not _is_as_written(output, results):
        results.unlink()
        flaws.append(results.name)
    if flaws:
        (output / "profile.json").unlink(missing_ok=True)
        named = ", ".join(flaws[:10]) + (" ..." if len(flaws) > 10 else "")
        raise job.trouble(7, f"{output}: {named} not as written; removed, and the same command without --verify does it again")
    if not missing and rows != job.plan.rows:
        raise job.trouble(7, f"{output}: {job.plan.rows} rows came in, {rows} are in the parts")
    parts = len(job.plan.partitions)
    left = f"; {missing} are still to do" if missing else ""
    job.say(f"verified: {parts - missing} of {parts} parts, {rows:,} rows{left}")
    print(json.dumps({"verified_parts": parts - missing, "parts": parts, "rows": rows, "output": str(results)}), flush=True)
    return 0


def _is_as_written(output: pathlib.Path, results: pathlib.Path) -> bool:
    """Whether the results file has the sha256 that profile.json recorded."""
    with results.open("rb") as file:
        return bool(json.loads((output / "profile.json").read_text())["scores_sha256"] ==
                    hashlib.file_digest(file, "sha256").hexdigest())


def _embeddings_are_as_written(partition: Any) -> bool:
    """Whether the embeddings saved with a part, if any, have the sha256 that its JSON recorded."""
    saved = json.loads(partition.json.read_text()).get("embeddings")
    try:
        return not saved or hashlib.sha256(partition.embeddings.read_bytes()).hexdigest() == saved["sha256"]
    except FileNotFoundError:
        return False
