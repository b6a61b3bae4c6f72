"""How fast inputs become rows: MB/s of staging text, seconds and MiB of planning 100 million rows of Parquet, images/s.

Images: what the loader threads make of the same photographs as plain files, in a tar, as bytes in Parquet and as data: URIs.

    python tests/bench_inputs.py [--megabytes 500] [--files 1000]

Each measurement runs in a process of its own, so that one's memory is not the other's. The tables are made here.
"""
import argparse
import base64
import contextlib
import csv
import dataclasses
import gzip
import io
import json
import multiprocessing
import pathlib
import random
import resource
import statistics
import sys
import tarfile
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
WORDS = ["a", "the", "cat", "dog", "on", "beach", "with", "red", "blue", "large", "small", "person", "riding", "horse", "under",
         "sky", "photo", "of", "some", "people", "café", "naïve", "city", "street", "walking", "through"]


def make_rows(count, rng):
    """Rows as the web has them: each seventh caption with commas, each fiftieth with quotes, some of two lines."""
    for n in range(count):
        caption = " ".join(rng.choices(WORDS, k=rng.randint(4, 18)))
        if n % 7 == 0:
            caption = caption.replace(" ", ", ", 2)
        if n % 50 == 0:
            caption = f'the "{caption}"' + "\nsecond line" * (n % 400 == 0)
        yield (f"https://cdn{rng.randint(0, 99)}.example.com/images/{rng.getrandbits(96):024x}/{n}.jpg", caption,
               str(rng.randint(100, 4000)), str(rng.randint(100, 4000)), f"{rng.random():.6f}")


COLUMNS = ("url", "caption", "width", "height", "similarity")


def write_texts(folder, megabytes):
    """clean.csv, the same gzipped and as JSON Lines, and messy.csv in which one line of a thousand has a stray quote."""
    rows = list(make_rows(100_000, random.Random(1)))
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    block = text.getvalue().encode()
    lines = "".join(json.dumps({"url": url, "caption": caption, "width": int(width), "height": int(height),
                                "similarity": float(similarity)}, ensure_ascii=False) + "\n"
                    for url, caption, width, height, similarity in rows).encode()
    messy = block.splitlines(keepends=True)
    messy[::1000] = [b'https://example.com/x.jpg,"a caption without an end,1,2,0.5\n'] * len(messy[::1000])
    header = ",".join(COLUMNS).encode() + b"\n"
    times = max(1, round(megabytes * 1e6 / len(block)))
    bodies = {"clean.csv": (header, block), "messy.csv": (header, b"".join(messy)), "lines.jsonl": (b"", lines)}
    for name, (start, body) in bodies.items():
        with (folder / name).open("wb") as file:
            file.write(start)
            for _ in range(times):
                file.write(body)
    with gzip.open(folder / "clean.csv.gz", "wb", 6) as file:
        file.write(header)
        for _ in range(max(1, times // 4)):
            file.write(block)


def write_parquets(folder, files, rows=100_000):
    """`files` Parquet files of `rows` rows, 13 columns and ten row groups; constants, so that they are all metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    columns = {name: pa.array([name] * rows) for name in ("url", "caption", "key", "status", "error_message", "sha256", "exif")}
    columns |= {name: pa.array([1] * rows) for name in ("width", "height", "original_width", "original_height", "n", "m")}
    pq.write_table(pa.table(columns), folder / "00000.parquet", row_group_size=rows // 10)
    data = (folder / "00000.parquet").read_bytes()
    for n in range(1, files):
        (folder / f"{n:05d}.parquet").write_bytes(data)


def write_tars(folder, tars=4, pairs=10_000):
    """`tars` webdataset tars of `pairs` pairs with small images, as img2dataset writes them."""
    for n in range(tars):
        with tarfile.open(folder / f"{n:05d}.tar", "w") as tar:
            for i, (url, caption, *_) in enumerate(make_rows(pairs, random.Random(n))):
                fields = json.dumps({"url": url, "caption": caption, "key": f"{i:09d}", "status": "success"}).encode()
                for suffix, data in (("jpg", bytes(3000)), ("txt", caption.encode()), ("json", fields)):
                    info = tarfile.TarInfo(f"{i:09d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


def write_images(folder, count):
    """`count` photographs of 640 x 480 as files with a table, in Parquet with row groups of 100 and of all, tar, JSON Lines."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image
    rng = np.random.default_rng(1)
    (folder / "files").mkdir()
    images = []
    for n in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)).resize((640, 480))
        data = io.BytesIO()
        coarse.save(data, "JPEG", quality=90)
        images.append(data.getvalue())
        (folder / f"files/{n:05d}.jpg").write_bytes(images[-1])
    names = [f"{n:05d}.jpg" for n in range(count)]
    (folder / "files.csv").write_text("url,caption\n" + "".join(f"{name},c\n" for name in names))
    cells = pa.array([{"bytes": data, "path": name} for data, name in zip(images, names, strict=True)],
                     pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    table = pa.table({"url": cells, "caption": ["c"] * count})
    pq.write_table(table, folder / "groups-of-100.parquet", row_group_size=100)
    pq.write_table(table, folder / "one-group.parquet", row_group_size=count)
    with (folder / "uris.jsonl").open("w") as file:
        for data in images:
            uri = "data:image/jpeg;base64," + base64.b64encode(data).decode()
            file.write(json.dumps({"url": uri, "caption": "c"}) + "\n")
    with tarfile.open(folder / "images.tar", "w") as tar:
        for name, data in zip(names, images, strict=True):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def load_in_a_process(csv_path, results):
    """Load all images of an input, by the loader threads of a dry run; puts images/s, failures, peak MiB, images per CPU s."""
    import image_text_sim_clip as script
    config = script.Config(csv_path=str(csv_path), image_path=str(csv_path.parent / "files"), pretrained_model="none")
    with tempfile.TemporaryDirectory() as output, contextlib.redirect_stderr(io.StringIO()):
        plan = script.make_plan(dataclasses.replace(config, output_path=output))
        threads = script.loader_threads(config)
        read = plan.table.read_bytes if plan.table.brings_images else script.open_source(config, threads)
        settings = script.DRY_RUN_SETTINGS
        loader = script.ImageLoader(read, script.ImageDecoder(config, settings), script.resize_coarsely)
        pool = script.LoaderPool(threads)
        started = time.perf_counter()
        cpu = time.process_time()
        failures = 0
        for partition in plan.partitions:
            rows = plan.table.read(partition.start, partition.stop)
            sources = plan.table.sources(partition.start, partition.stop) if plan.table.brings_images else rows["url"].tolist()
            pool.add(loader, sources)
            failures += sum(pool.take().failure is not None for _ in sources)
        seconds = time.perf_counter() - started
        cpu = time.process_time() - cpu
        pool.close()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    results.put((plan.row_count / seconds, failures, peak, plan.row_count / cpu))


def plan_in_a_process(csv_path, results):
    """Plan `csv_path` from nothing; puts (rows, malformed, wall s, CPU s, peak MiB, MiB before) into `results`."""
    import numpy  # noqa: F401 - imports are not what is measured
    import pyarrow.csv
    import pyarrow.parquet  # noqa: F401

    import image_text_sim_clip as script

    def peak_mib():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    with tempfile.TemporaryDirectory() as output, contextlib.redirect_stderr(io.StringIO()):
        before, wall, cpu = peak_mib(), time.perf_counter(), time.process_time()
        plan = script.make_plan(script.Config(csv_path=str(csv_path), output_path=output))
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        results.put((plan.row_count, plan.manifest["malformed"], wall, cpu, peak_mib(), before))


def measure(csv_path, work=plan_in_a_process):
    """What `work` found, in a process that knows nothing yet."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=work, args=(csv_path, results))
    process.start()
    found = results.get()
    process.join()
    return found


def measure_images(folder, count, rounds):
    """Print what the loader threads make of the same images, each kind in turns with the others."""
    write_images(folder, count)
    names = ("files.csv", "images.tar", "groups-of-100.parquet", "one-group.parquet", "uris.jsonl")
    found = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            found[name].append(measure(folder / name, load_in_a_process))
    plain = [statistics.median(figures) for figures in zip(*found["files.csv"], strict=True)]
    for name in names:
        rate, failures, peak, per_cpu = (statistics.median(figures) for figures in zip(*found[name], strict=True))
        print(f"load  {name:22} {rate:6.0f} images/s  {rate / plain[0]:5.2f} of plain files  {per_cpu:6.0f} per CPU second  "
              f"{per_cpu / plain[3]:5.2f} of plain files  {failures:.0f} failures  peak {peak:5.0f} MiB")
    for path in folder.glob("*.*"):
        path.unlink()


def main():
    """Make the inputs in a temporary folder, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=500)
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=3, help="of the images, in turns; the median counts")
    parser.add_argument("--only-images", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        measure_images(folder, options.images, options.rounds)
        if options.only_images:
            return
        write_texts(folder, options.megabytes)
        for file in ("clean.csv", "clean.csv.gz", "messy.csv", "lines.jsonl"):
            size = (folder / file).stat().st_size / 1e6
            if file.endswith(".gz"):
                with gzip.open(folder / file) as unzipped:
                    size = unzipped.seek(0, io.SEEK_END) / 1e6
            rows, malformed, wall, cpu, peak, before = measure(folder / file)
            print(f"stage {file:13} {size:6.0f} MB of text  {size / wall:6.0f} MB/s  {size / cpu:6.0f} MB per CPU second  "
                  f"{rows:10,} rows {malformed:6,} malformed  peak {peak:5.0f} MiB ({before:.0f} before)")
        for kind, write in (("parquet", lambda f: write_parquets(f, options.files)), ("tars", write_tars)):
            (folder / kind).mkdir()
            write(folder / kind)
            rows, _, wall, cpu, peak, before = measure(folder / kind)
            print(f"plan  {kind:13} {rows:,} rows  {wall:6.2f} s  {cpu:6.2f} CPU s  peak {peak:5.0f} MiB ({before:.0f} before)")


if __name__ == "__main__":
    main()
