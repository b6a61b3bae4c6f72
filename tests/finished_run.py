"""Finished scores without a model: what the scoring script leaves, made from similarities that a test chooses."""
import dataclasses
import json

import numpy as np
import pandas as pd

import image_text_sim_clip as script
from addons.measures.random_pairs import Histogram


def write_finished_run(output, similarities, captions=None, sources=None, statuses=None, partition_rows=256,
                       model="openai/clip-vit-base-patch32", random=None, extra=None):
    """Write manifest, parts, their times and profile.json to `output`, as a run of `model` would have.

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
    manifest = {"version": script.__version__, "format": script.FOLDER_FORMAT, "settings": settings, "kind": "csv",
                "columns": list(columns), "rows": count, "malformed": 0, "files": [], "partition_rows": partition_rows,
                "staged": {}, "resolved": {}}
    script.write_sealed(output / "manifest.json", manifest)
    plan = script.Plan(config, output, manifest, script.cut_rows(manifest, output), table=None)
    for partition in plan.partitions:
        cut = slice(partition.start, partition.stop)
        scored = script.Scored.nothing(partition.stop - partition.start, "ok")
        scored.cosines = similarities[cut]
        scored.status = statuses[cut]
        scored.detail = ["" if status == "ok" else "detail" for status in statuses[cut]]
        table = script.result_table(plan, rows[cut].reset_index(drop=True), scored)
        kept = {}
        if random is not None:
            counted = {"random": Histogram(), "matched": Histogram()}
            counted["random"].add(random[partition.index::len(plan.partitions)])
            counted["matched"].add(similarities[cut])
            kept["random_pairs"] = {name: histogram.to_json() for name, histogram in counted.items()}
        script.commit_part(plan, partition, table, kept)
        script.write_times(partition, script.NO_TIMES | {
            "seconds": {"fetch": 0.1, "image_encoder": 0.5}, "wall_s": 0.7, "ended": 1e9 + partition.index, "worker": "local",
            "tried": table.num_rows, "peak_rss_mib": 300.0})
    totals = script.summarise(script.Snapshot(plan))
    script.write_sealed(output / "profile.json", totals | script.explain(totals))
    return output


def last_json(text):
    """The object on the last line of what a program printed."""
    return json.loads(text.strip().splitlines()[-1])
