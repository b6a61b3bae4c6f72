"""`--verify`: read every part again, and compare it and the results with the sha256 that were recorded when written."""
import json
import pathlib

from image_text_sim_clip import (
    EXIT_CONFIG,
    EXIT_VERIFY,
    FlawedPart,
    Job,
    Partition,
    Trouble,
    as_path,
    file_sha256,
    forget_results,
    look_at_parts,
    output_disk,
    read_part,
    remove_flawed_part,
    say,
)

MOST_NAMED = 10  # flaws that the message names; there may be thousands


def verify(job: Job) -> int:
    """Check all parts, the row count and the results; returns the exit code 0, or raises Trouble (exit 7) naming the flaws.

    What is flawed is removed, so that the same command without --verify does it again.
    """
    output = as_path(job.config.output_path)
    if not (output / "manifest.json").is_file():
        raise Trouble(EXIT_CONFIG, f"{output} holds no run to verify")
    job.make_plan(joins=True)
    look_at_parts(job.plan, reads_all=True)
    flaws: list[str] = []
    missing = 0
    rows = 0
    for partition in job.plan.partitions:
        found = check_part(job, partition, flaws)
        if found is None:
            missing += 1
        else:
            rows += found
    if not flaws:
        check_results(job, flaws)
    if flaws:
        refuse_flaws(output, flaws)
    if not missing and rows != job.plan.row_count:
        raise Trouble(EXIT_VERIFY, f"{output}: {job.plan.row_count} rows came in, {rows} are in the parts")
    tell_result(job, missing, rows)
    return 0


def check_part(job: Job, partition: Partition, flaws: list[str]) -> int | None:
    """The rows of the partition's part, None where there is none; a flawed one is removed, added to `flaws`, and 0."""
    try:
        part = read_part(job.plan, partition, thorough=True)
    except FlawedPart as flaw:
        flaws.append(flaw.name)
        remove_flawed_part(job.plan, partition, thorough=True)
        return 0
    return part.table.num_rows if part else None


def check_results(job: Job, flaws: list[str]) -> None:
    """Remove the results of a finished run, and add them to `flaws`, unless they have the sha256 in profile.json."""
    results = job.results_path()
    profile = job.plan.output / "profile.json"
    stored = job.read_profile()
    if not stored and profile.exists():
        flaws.append(profile.name)
    if stored.get("finished") and results.is_file() and file_sha256(results) != stored["scores_sha256"]:
        flaws.append(results.name)
        with output_disk(results):
            results.unlink()


def refuse_flaws(output: pathlib.Path, flaws: list[str]) -> None:
    """Raise Trouble (exit 7) that names the flaws; what was summed up from the flawed no longer counts."""
    forget_results(output)
    named = ", ".join(flaws[:MOST_NAMED])
    if len(flaws) > MOST_NAMED:
        named += f" and {len(flaws) - MOST_NAMED} more"
    raise Trouble(EXIT_VERIFY, f"{output}: not as written: {named}; removed, and the same command without --verify does it "
                               "again")


def tell_result(job: Job, missing: int, rows: int) -> None:
    """Say how much was read: a line on stderr, and the last line of stdout as one JSON object."""
    parts = len(job.plan.partitions)
    left = f"; {missing} are still to do" if missing else ""
    say(f"verified: {parts - missing} of {parts} parts, {rows:,} rows{left}")
    told = {"verified_parts": parts - missing, "parts": parts, "rows": rows, "output": str(job.results_path())}
    print(json.dumps(told), flush=True)
