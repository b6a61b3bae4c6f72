"""Finished scores without a model: what the scoring script leaves, made from similarities that a test chooses."""
import dataclasses
import json

import numpy as np
import pandas as pd

import image_text_sim_clip as script
from addons import null, report


def write_finished_run(output, similarities, captions=None, sources=None, statuses=None, partition_rows=256,
                       model="openai/clip-vit-base-patch32", random=None, extra=None):
    """Write manifest, parts and profile.json to `output`, as a run of `model` would have.

    `similarities` (n,) float32, NaN for none; `random` gives the cosines of random pairs (spread over the partitions), None
    for a run without them; `extra` are further input columns.
    """
    count = len(similarities)
    similarities = np.asarray(similarities, np.float32)
    statuses = statuses or ["not_image" if np.isnan(s) else "ok" for s in similarities.tolist()]
    columns = {"url": sources or [f"{n}.png" for n in range(count)],
               "caption": captions or [f"caption {n}" for n in range(count)], **(extra or {})}
    rows = pd.DataFrame(columns, dtype=object)
    (output / "parts").mkdir(parents=True)
    config = script.Config(pretrained_model=model, output_path=str(output), csv_path="table.csv")
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in script.HARMLESS_KEYS}
    manifest = {"version": script.__version__, "settings": settings, "columns": list(columns), "rows": count, "malformed": 0,
                "partition_rows": partition_rows}
    script.write_json(output / "manifest.json", manifest)
    starts = range(0, count, partition_rows)
    partitions = [script.Partition(n, a, min(a + partition_rows, count), output / "parts") for n, a in enumerate(starts)]
    for number, partition in enumerate(partitions):
        cut = slice(partition.start, partition.stop)
        table = script._with_results(rows[cut].reset_index(drop=True), None, similarities[cut],
                                     [False] * (partition.stop - partition.start), statuses[cut],
                                     ["" if s == "ok" else "detail" for s in statuses[cut]])
        histograms = None
        if random is not None:
            made = {"random": null.Histogram(), "matched": null.Histogram()}
            made["random"].add(random[number::len(partitions)])
            made["matched"].add(similarities[cut])
            histograms = {name: histogram.to_json() for name, histogram in made.items()}
        clock = script.Clock({"fetch": 0.1, "image_encoder": 0.5})
        script.commit_part(partition, table, clock, 0.7, "local", {"null": histograms})
    plan = script.Plan(output, manifest, partitions)
    totals = script.summarise(plan)
    script.write_json(output / "profile.json", totals | report.explain(totals, script.PREPARE_STAGES, script.METRIC_STAGES))
    return output


def last_json(text):
    """The object on the last line of what a program printed."""
    return json.loads(text.strip().splitlines()[-1])
