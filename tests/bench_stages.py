"""Each stage alone: what it could do if nothing else were to be done. A part of bench.py, run as a program of its own.

    python tests/bench_stages.py WORK MODEL      # prints one JSON object; WORK as bench.py makes it

Times are CPU seconds of the process, so that a busy machine disturbs them little; each is a median of rounds
in which the ways alternate.
"""
import csv
import io
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
ROUNDS, BATCH, PASSES = 3, 16, 4


def cpu_seconds(work):
    """CPU seconds that `work()` takes this process, whose threads are its own or OpenVINO's."""
    started = time.process_time()
    work()
    return time.process_time() - started


def medians(ways):
    """name -> median seconds of `ways` (name -> callable giving seconds), in alternating rounds after one that warms up."""
    times = {name: [] for name in ways}
    for number in range(ROUNDS + 1):
        for name, way in ways.items():
            seconds = way()
            if number:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def measure_loading(work, model, count=60):
    """Images/s of one core: Pillow + CLIPProcessor, and the script's loader with `decode: exact` and `scaled`; and how much
    faster two threads are than one, in wall time."""
    import torch
    from PIL import Image
    from transformers import AutoImageProcessor

    import image_text_sim_clip as script
    torch.set_num_threads(1)
    processor = AutoImageProcessor.from_pretrained(work / model, backend="pil")
    files = [path.read_bytes() for path in sorted((work / "images").glob("*.jpg"))[:count]]
    settings = script.ImageSettings.of(processor)

    def loader(how):
        decode = script.ImageDecoder(script.Config(decode=how), settings)
        return lambda data: script.resize_fast(decode(data), settings)

    def usual(data):
        return processor(Image.open(io.BytesIO(data)).convert("RGB"), return_tensors="pt")["pixel_values"]
    ways = {"Pillow + CLIPProcessor": usual, "loader, exact": loader("exact"), "loader, scaled": loader("scaled")}
    alone = medians({name: lambda way=way: cpu_seconds(lambda: [way(data) for data in files]) for name, way in ways.items()})

    def wall(way, threads):
        with ThreadPoolExecutor(threads, initializer=script.compute_in_one_thread) as pool:
            started = time.perf_counter()
            list(pool.map(way, files * PASSES * threads))
            return (time.perf_counter() - started) / threads
    two = medians({(name, threads): lambda way=way, threads=threads: wall(way, threads)
                   for name, way in list(ways.items())[1:] for threads in (1, 2)})
    base = alone["Pillow + CLIPProcessor"]
    return {"images_per_s_per_core": {name: len(files) / seconds for name, seconds in alone.items()},
            "ratio_to_pillow_and_processor": {name: base / seconds for name, seconds in alone.items()},
            "two_threads_to_one": {name: two[name, 1] / two[name, 2] for name in list(ways)[1:]}}


def measure_model(work, model, keys, sizes=(BATCH,)):
    """Pairs/s of one core on ready tensors, images and captions apart, for one setting of the script."""
    import torch

    import image_text_sim_clip as script
    torch.set_num_threads(1)
    scorer = script.Scorer(script.Config(pretrained_model=str(work / model), use_cuda=False, **keys))
    side = scorer.settings.crop or scorer.settings.size
    with (work / "pairs.csv").open() as file:
        ids = scorer.tokenize([row["caption"] for row in csv.DictReader(file)])[0][:128]
    scorer.lanes = 0  # in this thread, which is timed

    def images(size):
        return cpu_seconds(lambda: scorer.encode_images(torch.randint(0, 256, (size, 3, *side), dtype=torch.uint8))) / size
    seconds = medians({**{f"image, batch {size}": lambda size=size: images(size) for size in sizes},
                       "caption": lambda: cpu_seconds(lambda: scorer.encode_texts(ids)) / len(ids)})
    return {name: 1 / value for name, value in seconds.items()}


PLAIN_START = """
import torch
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel
folder = {folder!r}
model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
AutoTokenizer.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder, backend="pil")
"""
SCRIPT_START = """
import sys
sys.path.insert(0, {root!r})
import image_text_sim_clip as script
scorer = script.Scorer(script.Config(pretrained_model={folder!r}, use_cuda=False, **{keys!r}))
scorer.similarity([{image!r}], ["a photo of a dog"])
"""


def measure_start(work, model, rounds=5):
    """Seconds from the start of Python to a loaded model (transformers alone) and to the first score (this script).

    CPU seconds of the whole process stand next to wall seconds, because they do not count who else is at work.
    """
    texts = {"transformers": PLAIN_START, "this script": SCRIPT_START, "this script, OpenVINO, int8": SCRIPT_START}
    keys = {"this script, OpenVINO, int8": {"runtime": "openvino", "quantization": "int8"}}
    image = str(next((work / "images").glob("*.jpg")))
    seconds = {name: ([], []) for name in texts}
    for _ in range(rounds):
        for name, text in texts.items():
            code = text.format(folder=str(work / model), root=str(ROOT), image=image, keys=keys.get(name, {}))
            before, started = os.times(), time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True, capture_output=True,
                           env=os.environ | {"HF_HUB_OFFLINE": "1"})
            after = os.times()
            seconds[name][0].append(time.perf_counter() - started)
            seconds[name][1].append(after[2] + after[3] - before[2] - before[3])
    wall, cpu = ({name: statistics.median(values[i]) for name, values in seconds.items()} for i in (0, 1))
    return {"wall_s": wall, "cpu_s": cpu, "ratio_wall": wall["this script"] / wall["transformers"],
            "openvino_to_torch_wall": wall["this script, OpenVINO, int8"] / wall["this script"],
            "openvino_to_torch_cpu": cpu["this script, OpenVINO, int8"] / cpu["this script"],
            "ratio_cpu": cpu["this script"] / cpu["transformers"]}


def measure_fetching(work, count=2000, wait_s=0.1):
    """Images/s of a dry run over URLs of a loopback server that waits before it answers; None without the fetcher's needs."""
    folder = work / "fetched"
    folder.mkdir(exist_ok=True)
    write_sixty_kb(work, folder)
    server = subprocess.Popen([sys.executable, str(ROOT / "tests/slow_server.py"), str(folder), str(wait_s)],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        port = int(server.stdout.readline())
        lines = [f"http://127.0.0.1:{port}/{i}.jpg,caption {i}\n" for i in range(count)]
        (work / "urls.csv").write_text("url,caption\n" + "".join(lines))
        settings = {"csv_path": work / "urls.csv", "image_path": "url", "pretrained_model": "none", "max_per_host": 64,
                    "output_path": work / "out-urls", "allow_private_hosts": "true"}
        command = [sys.executable, str(ROOT / "image_text_sim_clip.py"), "--config", str(ROOT / "config.yaml"), "--fresh"]
        for key, value in settings.items():
            command += ["--set", f"{key}={value}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return {"skipped": done.stderr.splitlines()[-1]}
        profile = json.loads((work / "out-urls/profile.json").read_text())
        return {"images_per_s": profile["pairs_per_s"], "peak_rss_mib": profile["peak_rss_mib"], "scored": profile["scored"]}
    finally:
        server.stdin.close()
        server.wait(10)


def write_sixty_kb(work, folder, count=24):
    """Images of 640 x 480 saved at the quality that makes about 60 kB."""
    from PIL import Image
    def is_large(path):
        with Image.open(path) as image:
            return sorted(image.size) == [480, 640]
    for path in [path for path in sorted((work / "images").glob("*.jpg")) if is_large(path)][:count]:
        for quality in range(95, 20, -5):
            data = io.BytesIO()
            Image.open(path).save(data, "JPEG", quality=quality)
            if data.tell() <= 64_000:
                break
        (folder / path.name).write_bytes(data.getvalue())


def main():
    """Measure all stages and print them as one JSON object."""
    work, model = pathlib.Path(sys.argv[1]), sys.argv[2]
    ways = {"float32": {}, "bfloat16": {"dtype": "bfloat16"}, "int8": {"quantization": "int8", "runtime": "torch"},
            "OpenVINO, bfloat16": {"dtype": "bfloat16", "runtime": "openvino"},
            "OpenVINO, int8": {"quantization": "int8", "runtime": "openvino"}}
    result = {"fetching": measure_fetching(work), "loading": measure_loading(work, model), "start": measure_start(work, model)}
    sizes = {"float32": (8, BATCH, 32, 64)}
    result["model_per_s_per_core"] = {name: measure_model(work, model, keys, sizes.get(name, (BATCH,)))
                                      for name, keys in ways.items()}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
