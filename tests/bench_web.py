"""How fast are images fetched from a web where some hosts are slow, refuse, or never answer? `make bench-web` runs it.

    python tests/bench_web.py [--rows 20000] [--webs well,never3,never10,mix,limited] [--img2dataset COMMAND] [--out FOLDER]

A loopback web of 400 hosts (tests/slow_server.py, names by tests/stub_names) and dry runs of this script over its URLs; next to
them, where it is installed, img2dataset over the same tables (2 processes of 256 threads, otherwise its defaults):

    python -m venv /tmp/i2d && /tmp/i2d/bin/pip install img2dataset
    make bench-web IMG2DATASET=/tmp/i2d/bin/img2dataset

Both are timed from start to end, imports included; the server's share of the two cores is in all numbers.
"""
import argparse
import collections
import contextlib
import csv
import hashlib
import io
import json
import os
import pathlib
import random
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
HOSTS = 400
NEVER = {"well": 0.0, "never3": 0.03, "never10": 0.10}  # the share of URLs that never answer
MIX = {"ok": 0.70, "gone": 0.12, "refuse": 0.05, "never": 0.03, "drip": 0.03, "broken": 0.02, "moved": 0.02, "page": 0.03}
LIMITED_ROWS = 400  # of the web `limited`: one host that allows 20 requests a second, among four times as many of others


def write_images(folder, count=24):
    """JPEGs of 640 x 480 pixels and about 95 kB."""
    import numpy as np
    from PIL import Image
    for number in range(count):
        rng = np.random.default_rng(number)
        coarse = Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)).resize((640, 480), Image.Resampling.BICUBIC)
        noisy = np.asarray(coarse).astype(int) + rng.integers(-14, 15, (480, 640, 3))
        data = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(data, "JPEG", quality=83)
        (folder / f"{number}.jpg").write_bytes(data.getvalue())


def make_urls(web, rows, port, closed_port):
    """The URLs of a table, in an order that is the same for the same arguments."""
    rng = random.Random(web)
    if web == "limited":
        urls = [f"http://limited.web.test:{port}/limited/20/{n}.jpg" for n in range(LIMITED_ROWS)]
        urls += [f"http://host{n % HOSTS}.web.test:{port}/ok/100/{n}.jpg" for n in range(4 * LIMITED_ROWS)]
        rng.shuffle(urls)
        return urls
    urls = []
    for number in range(rows):
        if web == "mix":
            kind = rng.choices(list(MIX), list(MIX.values()))[0]
            host = "slow" if number % HOSTS == 0 else "limited" if number % HOSTS == 1 else f"host{rng.randrange(HOSTS - 2)}"
            wait_ms = rng.randrange(50, 400)
            if host == "slow":
                kind, wait_ms = "ok", 2000
            if host == "limited":
                kind = "limited"
        else:
            kind = "never" if rng.random() < NEVER[web] else "ok"
            host = f"host{rng.randrange(HOSTS)}"
            wait_ms = 100
        at = closed_port if kind == "refuse" else port
        urls.append(f"http://{host}.web.test:{at}/{kind}/{wait_ms}/{number}.jpg")
    return urls


def run_timed(command, environment, log):
    """Seconds from start to end, CPU seconds, and the most memory of all processes, MiB; output goes to the file `log`."""
    import psutil
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.monotonic()
    peak = 0.0
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=ROOT)
        while process.poll() is None:
            with contextlib.suppress(psutil.Error):
                top = psutil.Process(process.pid)
                peak = max(peak, sum(each.memory_info().rss for each in [top, *top.children(recursive=True)]) / 2**20)
            time.sleep(0.2)
    if process.returncode:
        raise SystemExit(f"{command[0]} ended with {process.returncode}: {log.read_text()[-2000:]}")
    seconds = time.monotonic() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": seconds, "cpu_s": cpu_s, "peak_mib": peak}


def run_this_script(table, folder, environment, settings):
    """A dry run with the defaults of config.yaml; returns its figures."""
    keys = {"csv_path": table, "image_path": "url", "pretrained_model": "none", "output_path": folder / "scores",
            "allow_private_hosts": "true", **settings}
    command = [sys.executable, str(ROOT / "image_text_sim_clip.py"), "--config", str(ROOT / "config.yaml"), "--fresh"]
    for key, value in keys.items():
        command += ["--set", f"{key}={value}"]
    figures = run_timed(command, environment, folder / "this.log")
    profile = json.loads((folder / "scores/profile.json").read_text())
    return {"rows_per_s": profile["rows"] / figures["seconds"], "scored": profile["scored"], "failed": profile["failed"],
            "own_rate": profile["pairs_per_s"], **figures}


def run_img2dataset(command, table, folder, environment):
    """img2dataset over the same table; returns its figures."""
    out = folder / "img2dataset"
    shutil.rmtree(out, ignore_errors=True)
    words = [command, "--url_list", table, "--input_format", "csv", "--url_col", "url", "--caption_col", "caption",
             "--output_folder", out, "--processes_count", "2", "--thread_count", "256"]
    figures = run_timed([str(word) for word in words], environment, folder / "img2dataset.log")
    counts = collections.Counter()
    for path in out.glob("*_stats.json"):
        stats = json.loads(path.read_text())
        counts.update({key: stats[key] for key in ("count", "successes")})
    shutil.rmtree(out, ignore_errors=True)
    return {"rows_per_s": counts["count"] / figures["seconds"], "scored": counts["successes"], **figures}


def count_limited(folder):
    """How many rows of the limited host have been scored, and how many it has."""
    with (folder / "scores/scores.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if "/limited/" in row["url"]]
    return sum(row["status"] == "ok" for row in rows), len(rows)


def write_table(folder, name, urls):
    """A table of these URLs; returns its path."""
    table = folder / f"{name}.csv"
    table.write_text("url,caption\n" + "".join(f"{url},caption {number}\n" for number, url in enumerate(urls)))
    return table


def seconds_of_others(urls, folder, environment, settings):
    """How long a run is at the images of the hosts without a limit, from the first one's arrival in the cache to the last's."""
    cache = folder / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    run_this_script(write_table(folder, "limited", urls), folder, environment, {**settings, "cache_path": cache})
    names = [hashlib.sha256(url.encode()).hexdigest() for url in urls if "/limited/" not in url]
    arrived = [(cache / name[:2] / name).stat().st_mtime for name in names]
    return max(arrived) - min(arrived)


def measure_limited(urls, folder, environment, settings):
    """Rows scored of a host with a limit, and what its rows cost those of other hosts, against the time they take alone."""
    with_limited, alone = [], []
    others = [url for url in urls if "/limited/" not in url]
    for _ in range(3):
        alone.append(seconds_of_others(others, folder, environment, settings))
        with_limited.append(seconds_of_others(urls, folder, environment, settings))
        scored, rows = count_limited(folder)
        print(f"limited  {scored} of {rows} rows of the limited host scored; the others' images {with_limited[-1]:.1f} s, "
              f"alone {alone[-1]:.1f} s", flush=True)
    print(f"limited  ratio {statistics.median(with_limited) / statistics.median(alone):.2f}", flush=True)


def measure(web, arguments, folder, port, closed_port, environment):
    """Run everybody over one web and print a line for each."""
    urls = make_urls(web, arguments.rows, port, closed_port)
    settings = dict(pair.split("=", 1) for pair in arguments.set)
    if web == "limited":
        measure_limited(urls, folder, environment, settings)
        return
    table = write_table(folder, web, urls)
    ours = run_this_script(table, folder, environment, settings)
    report(web, "this script", ours)
    if arguments.img2dataset:
        theirs = run_img2dataset(arguments.img2dataset, table, folder, environment)
        report(web, "img2dataset", theirs)
        print(f"{web:8} ratio {ours['rows_per_s'] / theirs['rows_per_s']:.2f}", flush=True)


def report(web, who, figures):
    """One line for people, one for programs."""
    failed = " ".join(f"{status} {count}" for status, count in figures.get("failed", {}).items())
    print(f"{web:8} {who:12} {figures['rows_per_s']:7.1f} rows/s  {figures['seconds']:6.1f} s  {figures['scored']:6} images  "
          f"CPU {figures['cpu_s']:5.0f} s  {figures['peak_mib']:5.0f} MiB  load {os.getloadavg()[0]:.1f}  {failed}", flush=True)
    print(json.dumps({"web": web, "who": who, **figures}), file=sys.stderr, flush=True)


def main():
    """Serve, and measure each web."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--webs", default="well,never3,never10,mix,limited")
    parser.add_argument("--img2dataset", default=os.environ.get("IMG2DATASET") or shutil.which("img2dataset"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out")
    arguments = parser.parse_args()
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests/stub_names"), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as temporary, socket.socket() as closed:
        folder = pathlib.Path(arguments.out or temporary)
        images = folder / "images"
        images.mkdir(parents=True, exist_ok=True)
        write_images(images)
        closed.bind(("127.0.0.1", 0))  # nobody listens there
        command = [sys.executable, str(ROOT / "tests/slow_server.py"), str(images), "0.1"]
        server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            port = int(server.stdout.readline())
            for web in arguments.webs.split(","):
                measure(web, arguments, folder, port, closed.getsockname()[1], environment)
        finally:
            server.stdin.close()
            server.wait(10)


if __name__ == "__main__":
    main()
