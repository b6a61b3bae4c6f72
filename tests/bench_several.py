"""What does a second model in the same pass cost?  Two models in one pass, against two runs of one model each.

    python tests/bench_several.py --out scores/bench-several      # part of `make bench`

Where loading limits, both runs spend their time on the same images: JPEGs of 3 MP and the small bundled model, a copy of which
is the second. A time counts from the first pair to the last, without imports, model loading and the score passport. Runs take
turns; medians of three rounds.
"""
import argparse
import json
import pathlib
import shutil
import statistics
import subprocess
import sys

from bench_work import write_pairs

ROOT = pathlib.Path(__file__).resolve().parent.parent
BUNDLED = ROOT / "challenge_set/shapes_clip"
ROUNDS = 3
SIZES = [(2000, 1500)]


def run_script(work: pathlib.Path, models: str) -> tuple[float, str]:
    """Seconds from the first pair to the last, and the stage that limits."""
    keys = {"csv_path": work / "pairs.csv", "image_path": work / "images", "output_path": work / "out", "use_cuda": "false",
            "parity_rows": 0, "pretrained_model": models}
    command = [sys.executable, str(ROOT / "image_text_sim_clip.py"), "--config", str(ROOT / "config.yaml"), "--fresh"]
    for key, value in keys.items():
        command += ["--set", f"{key}={value}"]
    subprocess.run(command, capture_output=True, check=True)
    profile = json.loads((work / "out/profile.json").read_text())
    return profile["wall_s"], profile["bottleneck"]


def main() -> None:
    """Print the ratio, and what limits."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--rows", type=int, default=200)
    options = parser.parse_args()
    work = options.out.resolve()
    work.mkdir(parents=True, exist_ok=True)
    write_pairs(work, options.rows, SIZES)
    copy = work / "second"
    shutil.copytree(BUNDLED, copy, dirs_exist_ok=True)
    ratios = []
    for _ in range(ROUNDS):
        first_s, stage = run_script(work, str(BUNDLED))
        second_s, _ = run_script(work, str(copy))
        both_s, stage_of_both = run_script(work, f"{{first: {BUNDLED}, second: {copy}}}")
        ratios.append(both_s / (first_s + second_s))
        print(f"{first_s:.2f} s + {second_s:.2f} s (limited by {stage}), both in one pass {both_s:.2f} s "
              f"(limited by {stage_of_both})")
    print(f"two models in one pass take {statistics.median(ratios):.2f} of the time of two runs")


if __name__ == "__main__":
    main()
