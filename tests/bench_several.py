"""What does a second model in the same pass cost?  Two models in one pass, against two runs of one model each.

    python tests/bench_several.py --out scores/bench-several      # part of `make bench`

Where loading limits, both runs spend their time on the same images. Twice, with the small bundled model and a copy of it:
JPEGs of 3 MP in a folder, where decoding limits, and small ones from a loopback server that waits 200 ms before it answers,
four at a time, where fetching does. A time counts from the first pair to the last, without imports, model loading and the
score passport. Runs take turns; medians of three rounds.
"""
import argparse
import functools
import http.server
import json
import pathlib
import shutil
import statistics
import subprocess
import sys
import threading
import time

from bench_work import write_pairs

ROOT = pathlib.Path(__file__).resolve().parent.parent
BUNDLED = ROOT / "challenge_set/shapes_clip"
ROUNDS = 3
WAITS_S = 0.2


class LateServer(http.server.SimpleHTTPRequestHandler):
    """Serves a folder's files, each after a while."""

    def do_GET(self) -> None:
        """Wait, and answer."""
        time.sleep(WAITS_S)
        super().do_GET()

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


def run_script(work: pathlib.Path, models: str, image_path: str) -> tuple[float, str]:
    """Seconds from the first pair to the last, and the stage that limits."""
    keys = {"csv_path": work / "pairs.csv", "image_path": image_path, "output_path": work / "out", "use_cuda": "false",
            "parity_rows": 0, "pretrained_model": models, "allow_private_hosts": "true", "max_per_host": 4}
    command = [sys.executable, str(ROOT / "image_text_sim_clip.py"), "--config", str(ROOT / "config.yaml"), "--fresh"]
    for key, value in keys.items():
        command += ["--set", f"{key}={value}"]
    subprocess.run(command, capture_output=True, check=True)
    profile = json.loads((work / "out/profile.json").read_text())
    return profile["wall_s"], profile["bottleneck"]


def compare(work: pathlib.Path, image_path: str) -> float:
    """The time of one pass over that of two runs: the median of ROUNDS."""
    second = work.parent / "second"
    ratios = []
    for _ in range(ROUNDS):
        first_s, stage = run_script(work, str(BUNDLED), image_path)
        second_s, _ = run_script(work, str(second), image_path)
        both_s, stage_of_both = run_script(work, f"{{first: {BUNDLED}, second: {second}}}", image_path)
        ratios.append(both_s / (first_s + second_s))
        print(f"{first_s:.2f} s + {second_s:.2f} s (limited by {stage}), both in one pass {both_s:.2f} s "
              f"(limited by {stage_of_both})", flush=True)
    return statistics.median(ratios)


def main() -> None:
    """Print both ratios, and what limits."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--rows", type=int, default=200)
    options = parser.parse_args()
    out = options.out.resolve()
    shutil.copytree(BUNDLED, out / "second", dirs_exist_ok=True)
    write_pairs(out / "folder", options.rows, [(2000, 1500)])
    write_pairs(out / "web", options.rows, [(320, 240)])
    handler = functools.partial(LateServer, directory=str(out / "web/images"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    table = out / "web/pairs.csv"
    lines = table.read_text(encoding="utf-8").splitlines()
    urls = [f"http://127.0.0.1:{server.server_port}/{line}" for line in lines[1:]]
    table.write_text("\n".join([lines[0], *urls, ""]), encoding="utf-8")
    for name, image_path in (("web", "url"), ("folder", str(out / "folder/images"))):
        print(f"{name}: two models in one pass take {compare(out / name, image_path):.2f} of the time of two runs", flush=True)


if __name__ == "__main__":
    main()
