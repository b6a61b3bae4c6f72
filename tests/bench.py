"""How fast is the script? The same pairs through the usual ways of scoring them and through it, in turns, as ratios.

    python tests/bench.py --out scores/bench                  # `make bench`: CPU, ViT-B/32, and each stage alone
    python tests/bench.py --out scores/bench --gpu            # `make bench-gpu`: more models, on CUDA

(a) one pair at a time, processor then model, as model cards show it; (b) batches of 32 through the processor, as most
people write it; (c) this script with its defaults and with faster settings. Models have their published shapes and random
weights (speed does not depend on them), the images are cut from the bundled photographs: 70 % 0.3 MP, 20 % 0.8 MP,
10 % 3 MP JPEGs (on a GPU 256 to 512 px), with captions of 6 to 40 words. Nothing comes from the network. A rate counts
from the first pair to the last, without imports, model loading and the score passport. torchmetrics' CLIPScore (batches of
32) and `clip-retrieval inference` (its defaults; it stops at embeddings) join where TORCHMETRICS and CLIP_RETRIEVAL name a
Python that has them, in environments to throw away. Overlap is the script's wall time over what its stages take alone, divided
among the cores: 1.0 means that no core ever waited.
"""
import argparse
import contextlib
import csv
import importlib.util
import json
import multiprocessing
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys
import tarfile
import threading
import time

from bench_work import SIZES, SMALL_SIZES, write_model, write_pairs

ROOT = pathlib.Path(__file__).resolve().parent.parent
LOOPS = {"one by one": 1, "plain batches": 32}
PEERS = {"torchmetrics CLIPScore": os.environ.get("TORCHMETRICS"),  # name -> the Python that has it, or None
         "clip-retrieval": os.environ.get("CLIP_RETRIEVAL")}
ON_CPU = {"defaults": {}, "bfloat16": {"dtype": "bfloat16"},
          "bfloat16, scaled": {"dtype": "bfloat16", "decode": "scaled"},
          "int8, scaled": {"quantization": "int8", "decode": "scaled", "runtime": "torch"},
          "OpenVINO": {"runtime": "openvino"},
          "OpenVINO, bfloat16, scaled": {"runtime": "openvino", "dtype": "bfloat16", "decode": "scaled"},
          "OpenVINO, int8, scaled": {"runtime": "openvino", "quantization": "int8", "decode": "scaled"}}
ON_GPU = {"defaults": {}, "scaled": {"decode": "scaled"}, "gpu decode": {"decode": "gpu"},
          "gpu decode, compiled": {"decode": "gpu", "compile": True},
          "int8, scaled": {"quantization": "int8", "decode": "scaled"}}
MOST_LOOP_ROWS = 2000  # of a loop that would take all day


def loop(work, model_name, batch, device):
    """Contenders (a) and (b): processor and model called directly, `batch` pairs at a time. Prints pairs/s."""
    import torch
    from PIL import Image
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, SiglipModel
    siglip = model_name.startswith("siglip")
    model = (SiglipModel if siglip else CLIPModel).from_pretrained(work / model_name).eval().to(device)
    images = AutoImageProcessor.from_pretrained(work / model_name)
    tokenizer = AutoTokenizer.from_pretrained(work / model_name)
    with (work / "pairs.csv").open() as file:
        rows = list(csv.DictReader(file))[:MOST_LOOP_ROWS if device == "cuda" else None]
    padding = {"padding": "max_length", "max_length": 64} if siglip else {"padding": True}
    started = time.perf_counter()
    for start in range(0, len(rows), batch):
        part = rows[start:start + batch]
        pixels = images([Image.open(work / "images" / row["url"]).convert("RGB") for row in part], return_tensors="pt")
        tokens = tokenizer([row["caption"] for row in part], truncation=True, return_tensors="pt", **padding)
        with torch.no_grad():
            out = model(pixel_values=pixels["pixel_values"].to(device), input_ids=tokens["input_ids"].to(device))
            out.logits_per_image.cpu()
    print(json.dumps({"pairs_per_s": len(rows) / (time.perf_counter() - started)}))


def loop_clip_score(work, model_name, batch):
    """torchmetrics' CLIPScore, `batch` pairs at a time, as its page shows it; in another environment. Prints pairs/s."""
    import numpy as np
    import torch
    from PIL import Image
    from torchmetrics.multimodal.clip_score import CLIPScore
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel, CLIPProcessor

    class Model(CLIPModel):
        """Features as tensors, which it expects and transformers 5 no longer returns."""

        def get_image_features(self, *args, **options):
            features = super().get_image_features(*args, **options)
            return getattr(features, "pooler_output", features)

        def get_text_features(self, *args, **options):
            features = super().get_text_features(*args, **options)
            return getattr(features, "pooler_output", features)
    folder = work / model_name
    processor = CLIPProcessor(CLIPImageProcessor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))
    metric = CLIPScore(model_name_or_path=lambda: (Model.from_pretrained(folder).eval(), processor))
    with (work / "pairs.csv").open() as file:
        rows = list(csv.DictReader(file))
    started = time.perf_counter()
    for start in range(0, len(rows), batch):
        part = rows[start:start + batch]
        images = [torch.from_numpy(np.array(Image.open(work / "images" / row["url"]).convert("RGB"))).permute(2, 0, 1)
                  for row in part]
        metric.update(images, [row["caption"] for row in part])
    metric.compute()
    print(json.dumps({"pairs_per_s": len(rows) / (time.perf_counter() - started)}))


def write_pair_tar(work):
    """The pairs as a webdataset, for clip-retrieval, whose reader of plain files mixes up their names; returns the tar."""
    path = work / "pairs.tar"
    with (work / "pairs.csv").open() as file, tarfile.open(path, "w") as tar:
        for number, row in enumerate(csv.DictReader(file)):
            caption = work / "caption.txt"
            caption.write_text(row["caption"])
            tar.add((work / "images" / row["url"]).resolve(), f"{number:06d}.jpg")
            tar.add(caption, f"{number:06d}.txt")
    return path


def loop_clip_retrieval(work, model_name, _):
    """`clip-retrieval inference` with its defaults, both encoders; in another environment. Prints pairs/s."""
    from clip_retrieval.clip_inference.main import main as inference
    output = work / "clip-retrieval"
    shutil.rmtree(output, ignore_errors=True)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            inference(str(write_pair_tar(work)), str(output), input_format="webdataset", output_partition_count=1,
                      clip_model=f"hf_clip:{work / model_name}")
    finally:
        for child in multiprocessing.active_children():  # it waits for them for ever where it fails
            child.terminate()
    stats = json.loads((output / "stats/0.json").read_text())  # sums over the batches, without loading the model
    print(json.dumps({"pairs_per_s": stats["sample_count"] / stats["total_duration"]}))


PEER_LOOPS = {"torchmetrics CLIPScore": loop_clip_score, "clip-retrieval": loop_clip_retrieval}


def run_contender(work, name, model_name, device, settings):
    """Pairs/s of one contender, which runs in a process of its own, and the script's profile; None and why if it fails."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    if name in (*LOOPS, *PEERS):
        command = [PEERS.get(name, sys.executable), __file__, "--loop", str(LOOPS.get(name, 32)), "--out", str(work),
                   "--model", model_name, "--device", device]
        if name in PEERS:
            command += ["--peer", name]
    else:
        command = [sys.executable, str(ROOT / "image_text_sim_clip.py"), "--config", str(ROOT / "config.yaml"), "--fresh"]
        keys = {"csv_path": work / "pairs.csv", "image_path": work / "images", "pretrained_model": work / model_name,
                "output_path": work / "out", "use_cuda": device == "cuda", "parity_rows": 0, **settings}
        for key, value in keys.items():
            command += ["--set", f"{key}={str(value).lower() if isinstance(value, bool) else value}"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        return None, done.stderr.strip().splitlines()[-1]
    profile = {} if name in (*LOOPS, *PEERS) else json.loads((work / "out" / "profile.json").read_text())
    if settings.get("decode") == "gpu" and profile["decoder"] != "gpu":
        return None, next(line for line in done.stderr.splitlines() if line.startswith("decode: gpu"))
    return json.loads(done.stdout.splitlines()[-1])["pairs_per_s"], profile


def measure(work, model_name, rounds, device, ways):
    """All contenders in turns, `rounds` times, the peers once: name -> pairs/s of each round, and the profile of its last."""
    rates, profiles = {}, {}
    peers = [peer for peer, python in PEERS.items() if python and device == "cpu"]  # slow, and once is enough
    for number in range(rounds):
        for name in (*LOOPS, *(peers if number == 0 else []), *ways):
            with BusyGpu() as gpu:
                rate, profile = run_contender(work, name, model_name, device, ways.get(name, {}))
            if rate is None:
                print(f"{model_name:14} {name:22} left out: {profile}", flush=True)
                continue
            rates.setdefault(name, []).append(rate)
            profiles[name] = profile | {"gpu_busy_percent": gpu.busy}
            busy = f"   GPU busy {gpu.busy:.0f} %" if gpu.busy else ""
            print(f"{model_name:14} {name:22} {rate:9.1f} pairs/s{busy}", flush=True)
    return rates, profiles


class BusyGpu:
    """`busy`: the middle of how busy nvidia-smi saw the GPU, in percent of the seconds in which it worked; None without it."""

    def __init__(self):
        self.busy, self._seen, self._process = None, [], None

    def __enter__(self):
        try:
            self._process = subprocess.Popen(["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits",
                                              "-lms", "200"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        except OSError:
            return self
        self._reader = threading.Thread(target=lambda: self._seen.extend(self._process.stdout), daemon=True)
        self._reader.start()
        return self

    def __exit__(self, *trouble):
        if self._process:
            self._process.terminate()
            self._process.wait()
            self._reader.join()
            at_work = [int(line) for line in self._seen if line.strip().isdigit() and int(line) > 5]
            self.busy = statistics.median(at_work) if at_work else None


def overlap(profile, stages, bits):
    """Wall seconds over (CPU seconds of the stages, each measured alone, / cores), for a run on the CPU."""
    pairs, model = profile["rows"], stages["model_per_s_per_core"][bits]
    loader = stages["loading"]["images_per_s_per_core"][f"loader, {profile['decode']}"]
    alone_s = pairs / loader + pairs / model["image, batch 16"] + pairs / model["caption"]
    return profile["wall_s"] / (alone_s / len(os.sched_getaffinity(0)))


def typical(name, rates):
    """The rate that stands for all rounds: the median, and for the loops, which wait for whatever else runs here, the best."""
    return max(rates) if name in LOOPS else statistics.median(rates)


def draw(results, path):
    """Bars of the medians, a panel for each model."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, panels = plt.subplots(len(results), 1, figsize=(9, 0.8 + 2.4 * len(results)), layout="constrained", squeeze=False)
    for axes, (model_name, result) in zip(panels[:, 0], results.items(), strict=True):
        names = list(result["pairs_per_s"])
        values = [typical(name, result["pairs_per_s"][name]) for name in names]
        bars = axes.barh(names, values, color=["tab:gray" if name in (*LOOPS, *PEERS) else "tab:blue" for name in names])
        ratios = result["ratio_to_one_by_one"]
        labels = [f"{value:,.1f}  ({ratios[name]:.2f}x)" for name, value in zip(names, values, strict=True)]
        axes.bar_label(bars, labels, padding=4)
        axes.set_xlim(0, 1.2 * max(values))
        axes.invert_yaxis()
        axes.set_title(model_name, loc="left")
    panels[-1, 0].set_xlabel("pairs/s, median of the rounds, the best of the loops' (ratio to one pair at a time)")
    figure.savefig(path, dpi=110)


def describe_machine(gpu):
    """What the numbers were measured on, and which optional decoders there are."""
    import torch
    processor = platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines()
             if line.startswith("model name")] if pathlib.Path("/proc/cpuinfo").exists() else []
    decoders = [name for name in ("torchvision", "torchcodec") if importlib.util.find_spec(name)]
    return {"cores": len(os.sched_getaffinity(0)), "processor": (names or [processor])[0], "torch": torch.__version__,
            "gpu": torch.cuda.get_device_name() if gpu else None, "gpu_decoders": decoders}


def main():
    """Make the work, measure, print ratios, write bench.json into --out and the plot where --plot says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--pairs", type=int, help="1,000; on a GPU 30,000, and a third of it for the larger models")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--plot", type=pathlib.Path, help="default: throughput.png in --out")
    parser.add_argument("--model", help="only this model")
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    parser.add_argument("--loop", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cpu", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        return PEER_LOOPS[options.peer](options.out, options.model, options.loop)
    if options.loop:
        return loop(options.out, options.model, options.loop, options.device)
    options.out = options.out.resolve()
    names = ["clip-b32", "clip-l14", "clip-l14-336", "siglip"] if options.gpu else ["clip-b32"]
    names, results, stages = [options.model] if options.model else names, {}, None
    machine = describe_machine(options.gpu)
    print(json.dumps(machine | {"load": os.getloadavg()[0]}), flush=True)
    for name in names:
        pairs = options.pairs or (1000 if not options.gpu else 30_000 if name == "clip-b32" else 10_000)
        write_pairs(options.out, pairs, SMALL_SIZES if options.gpu else SIZES)
        write_model(options.out / name)
        rates, profiles = measure(options.out, name, options.rounds, "cuda" if options.gpu else "cpu",
                                  ON_GPU if options.gpu else ON_CPU)
        base = typical("one by one", rates["one by one"])
        results[name] = {"pairs": pairs, "pairs_per_s": rates, "profiles": profiles,
                         "ratio_to_one_by_one": {k: round(typical(k, v) / base, 2) for k, v in rates.items()}}
        print(json.dumps(results[name]["ratio_to_one_by_one"]), "load", os.getloadavg()[0], flush=True)
    if not options.gpu:
        done = subprocess.run([sys.executable, str(ROOT / "tests/bench_stages.py"), str(options.out), names[0]], check=True,
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        stages = json.loads(done.stdout.splitlines()[-1])
        for way, bits in (("defaults", "float32"), ("bfloat16, scaled", "bfloat16"), ("int8, scaled", "int8"),
                          ("OpenVINO, bfloat16, scaled", "OpenVINO, bfloat16"),
                          ("OpenVINO, int8, scaled", "OpenVINO, int8")):
            stages.setdefault("overlap", {})[way] = overlap(results[names[0]]["profiles"][way], stages, bits)
        print(json.dumps(stages, indent=1), flush=True)
    (options.out / "bench.json").write_text(json.dumps({"machine": machine, "models": results, "stages": stages}, indent=1))
    draw(results, options.plot or options.out / "throughput.png")
    return None


if __name__ == "__main__":
    main()
