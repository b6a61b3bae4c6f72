"""Rows per second of the two ends of a large run: scores.csv out of finished parts, and curate.py on them.

    python tests/bench_ends.py [--rows 1000000]        # a part of `make bench-scale`

URLs of 40 characters, captions of 12 words, one row in 33 without a score, parts of 10,000 rows; `curate` is the whole
command from finished parts to kept.csv, dropped.csv and plots, without the start of Python. "plain" is scores.csv by the
script's own writer, which a script without addons/ uses.
"""
import argparse
import dataclasses
import os
import pathlib
import random
import statistics
import sys
import tempfile
import time

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from bench_work import WORDS  # noqa: E402
from finished_run import write_finished_run  # noqa: E402

import curate  # noqa: E402
import image_text_sim_clip as script  # noqa: E402
from addons.results import csv_rows  # noqa: E402

FAST = csv_rows.ArrowCsvRows


def make_run(output, rows):
    """A finished run of `rows` rows in `output`, as its config and plan."""
    spread, words = np.random.default_rng(0), random.Random(0)
    similarities = np.clip(spread.normal(0.25, 0.07, rows), -1, 1).astype(np.float32)
    similarities[::33] = np.nan
    captions = [" ".join(words.choices(WORDS, k=12)) + ', "quoted"' * (i % 20 == 0) for i in range(rows)]
    write_finished_run(output, similarities, captions, [f"https://example.com/images/{i:08d}.jpg" for i in range(rows)],
                       partition_rows=10_000, random=np.clip(spread.normal(0.1, 0.05, rows), -1, 1))
    manifest = script.read_manifest(output)
    config = dataclasses.replace(script.Config(), **manifest["settings"], output_path=str(output))
    return config, script.Plan(config, output, manifest, script.cut_rows(manifest, output), table=None)


def write_scores(plan, path, writer):
    """Write scores.csv with this class of writer."""
    csv_rows.ArrowCsvRows = writer
    with script.atomic_file(path) as file:
        script.write_csv(script.Snapshot(plan), file)
    csv_rows.ArrowCsvRows = FAST


def time_end(work):
    """Seconds by the clock and of the processor that `work()` takes; the latter count nobody else who is at work."""
    started, before = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - started, time.process_time() - before


def main():
    """Make the run, time each end in turns, print medians and how busy the machine was."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        config, plan = make_run(folder / "out", options.rows)
        chosen = dataclasses.replace(config, curate={"keep_fraction": 0.3, "min_caption_chars": 5})
        ends = {"plain": lambda: write_scores(plan, folder / "plain.csv", script.CsvRows),
                "scores.csv": lambda: write_scores(plan, folder / "fast.csv", FAST),
                "curate": lambda: curate.curate(chosen)}
        seconds, loads = {end: [] for end in ends}, []
        for _ in range(options.rounds):
            for end, work in ends.items():
                seconds[end].append(time_end(work))
            loads.append(os.getloadavg()[0])
        for end, values in seconds.items():
            wall, cpu = (options.rows / statistics.median(column) for column in zip(*values, strict=True))
            print(f"{end:12} {wall:12,.0f} rows/s, {cpu:12,.0f} a second of one core")
        is_same = script.file_sha256(folder / "plain.csv") == script.file_sha256(folder / "fast.csv")
        print("the same bytes;" if is_same else "DIFFERENT bytes;", "load",
              " ".join(f"{load:.1f}" for load in loads), f"on {len(os.sched_getaffinity(0))} cores")


if __name__ == "__main__":
    main()
