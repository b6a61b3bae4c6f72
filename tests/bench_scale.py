"""Rows per second of one process, two ranks and Ray on the same dry run (images read, decoded and resized; no model).

    python tests/bench_scale.py [--rows 20000]        # `make bench-scale`, with the staging benchmark after it

`rows/s` is that of the workers together, from their first partition to their last; `whole` counts the command from its
start to its end, with imports, planning, the launcher and scores.csv.
"""
import argparse
import io
import json
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile
import time

from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parent.parent
WAYS = {
    "one process": ([], []),
    "two ranks": (["-m", "torch.distributed.run", "--nproc-per-node", "2"], []),
    "Ray, two actors": ([], ["--set", "engine=ray", "--set", "ray_workers=2"]),
}


def make_work(folder, rows):
    """A table of `rows` rows over 2,000 JPEGs of 320 x 240 pixels, and its config."""
    (folder / "images").mkdir()
    photo, rng = Image.open(ROOT / "challenge_set/photos/rocket.jpg").convert("RGB"), random.Random(1)
    for i in range(2000):
        x, y = rng.randrange(photo.width - 320), rng.randrange(photo.height - 240)
        buffer = io.BytesIO()
        photo.crop((x, y, x + 320, y + 240)).save(buffer, "JPEG", quality=85)
        (folder / f"images/{i}.jpg").write_bytes(buffer.getvalue())
    lines = [f"{rng.randrange(2000)}.jpg,caption number {i}\n" for i in range(rows)]
    (folder / "table.csv").write_text("url,caption\n" + "".join(lines))
    (folder / "c.yaml").write_text(f"csv_path: {folder / 'table.csv'}\nimage_path: {folder / 'images'}\n"
                                   "pretrained_model: none\npartition_rows: 250\n")


def main():
    """Make the work, run each way in turns, print medians."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        make_work(folder, options.rows)
        rates, whole, results = {way: [] for way in WAYS}, {way: [] for way in WAYS}, set()
        for number in range(options.rounds):
            for way, (launcher, keys) in WAYS.items():
                out = folder / f"out-{number}-{way[:3]}"
                command = [sys.executable, *launcher, str(ROOT / "image_text_sim_clip.py"), "--config", str(folder / "c.yaml"),
                           "--set", f"output_path={out}", *keys]
                began = time.perf_counter()
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
                whole[way].append(options.rows / (time.perf_counter() - began))
                rates[way].append(json.loads(done.stdout.splitlines()[-1])["pairs_per_s"])
                results.add((out / "scores.csv").read_bytes())
        for way in WAYS:
            rate, in_all = statistics.median(rates[way]), statistics.median(whole[way])
            print(f"{way:16} {rate:10,.0f} rows/s   whole {in_all:10,.0f} rows/s")
        print("the same scores.csv from all" if len(results) == 1 else "DIFFERENT scores.csv")


if __name__ == "__main__":
    main()
