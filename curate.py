"""From scores to a training set: keep the rows worth keeping, export them, and show the choice on a page.

    python image_text_sim_clip.py --config config.yaml
    python curate.py --config config.yaml --set curate.max_random_rate=0.01 --set curate.review=true

The second job of the same config file: it works on the finished scores in `output_path`, by the rules of the section
`curate:`, and loads no model. Results go to `output_path`/curated/:

    kept.csv  dropped.csv     every row of the input is in one of them; a dropped one names its rule (dropped_by)
    curated.json              the rules, how many rows each dropped, and where the similarity was cut
    scores.png  throughput.png  memory.png
    kept.parquet | imagefolder/ | webdataset/    with `export`
    review.html               with `review`: one page that opens from the disk

    finished parts -> cuts -> verdict per row -> kept.csv, dropped.csv -> export -> review page
"""
import contextlib
import csv
import dataclasses
import functools
import hashlib
import io
import json
import os
import pathlib
import sys
import typing
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

import image_text_sim_clip as scoring
from addons import curation as rules
from addons import curation_plots, duplicates, export, null, outputs, review
from image_text_sim_clip import EXIT_CONFIG, EXIT_INPUT, EXIT_VERIFY, Trouble, say

CHUNK_ROWS = 1 << 14  # rows in memory at a time


# ── The finished run ──────────────────────────────────────────────────────────────────────────────────────────────────

@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """What the scoring script left in `output_path`: its parts, in input order, and what is known of the whole."""

    output: pathlib.Path
    manifest: dict
    partitions: list[scoring.Partition]
    parts: list[dict]  # each part's JSON
    profile: dict  # profile.json
    null: null.Null | None  # random and matched pairs; None after a dry run
    names: list[str]  # the input's columns, as scores.csv names them
    source_name: str
    caption_name: str

    @property
    def model(self) -> str:
        """What gave the scores: a Hub id or a folder."""
        return self.manifest["settings"]["pretrained_model"]

    @property
    def rows(self) -> int:
        """How many rows there are, scored or not."""
        return sum(part["rows"] for part in self.parts)

    def chunks(self, columns: list[str] | None = None) -> Iterator[tuple[int, Any]]:
        """Yield (number of the first row, pyarrow table) for up to CHUNK_ROWS rows at a time."""
        import pyarrow as pa
        import pyarrow.parquet as pq
        first_row = 0
        for partition in self.partitions:
            with pq.ParquetFile(partition.parquet) as part:
                for batch in part.iter_batches(CHUNK_ROWS, columns=columns):
                    yield first_row, pa.Table.from_batches([batch])
                    first_row += batch.num_rows

    def similarities(self) -> Iterator[Any]:
        """The same, as float32 arrays of the similarities alone, NaN for none."""
        return (_cosines(table) for _, table in self.chunks(["similarity"]))


def _cosines(table: Any) -> Any:
    return table["similarity"].to_numpy().astype(np.float32)


def open_run(config: scoring.Config) -> FinishedRun:
    """Find the finished run in `output_path` and verify its parts. Trouble: exit 3 for none, 7 for a flawed part."""
    output = pathlib.Path(config.output_path)
    manifest, profile = (_read_json(output / name) for name in ("manifest.json", "profile.json"))
    if not manifest or not profile:
        raise Trouble(EXIT_INPUT, f"{output} holds no finished scores: run image_text_sim_clip.py with this config first")
    partitions, parts = scoring.cut_rows(manifest, output), []
    for partition in partitions:
        part = _read_json(partition.json)
        if not part or not partition.parquet.exists():
            raise Trouble(EXIT_INPUT, f"{output} is not finished ({partition.parquet.name} is missing): run "
                                      "image_text_sim_clip.py with this config again")
        with partition.parquet.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != part["sha256"]:
                raise Trouble(EXIT_VERIFY, f"{partition.parquet} is not what had been written: remove it and run "
                                           "image_text_sim_clip.py with this config again")
        parts.append(part)
    settings, names = manifest["settings"], scoring.output_names(manifest["columns"])
    shown = dict(zip(manifest["columns"], names, strict=True))
    source, caption = (shown[scoring.column_name(settings[key])] for key in ("url_column", "caption_column"))
    merged = null.Null.merge_parts(parts)
    for part in parts:
        part["null"] = None  # some kB each, and merged by now
    return FinishedRun(output, manifest, partitions, parts, profile, merged, names, source, caption)


def _read_json(path: pathlib.Path) -> dict | None:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


# ── Pictures, read again ──────────────────────────────────────────────────────────────────────────────────────────────

class Pictures:
    """Sources -> bytes, as the scoring script finds and fetches them, several at a time and in order."""

    def __init__(self, config: scoring.Config, run: FinishedRun) -> None:
        threads, self._tars, read = scoring.loader_threads(config), None, None
        if run.manifest.get("kind") == "tar":  # tars bring their pictures along
            self._tars = scoring.addon("inputs", "csv_path").open_rows(
                run.manifest, config, functools.partial(Trouble, EXIT_INPUT), scoring.RowFailure)
            read = self._tars.read_bytes
        elif config.image_path == "url" and not config.cache_path:
            say("image_path: url without cache_path: the pictures are fetched again")
        elif config.image_path != "url" and not pathlib.Path(config.image_path).is_dir():
            raise Trouble(EXIT_INPUT, f"image_path {config.image_path!r} is no folder here (in {pathlib.Path.cwd().name}/)")
        self._config, self._source_name = config, run.source_name
        self._read = scoring.ImageLoader(config, scoring.DRY_RUN_SETTINGS, scoring.resize_pillow, threads, read).read
        self._pool = scoring.LoaderPool(threads)

    def locate(self, first_row: int, table: Any) -> list[str]:
        """The source of each row of a chunk: its URL or path, or its place in a tar."""
        if self._tars:
            return self._tars.sources(first_row, first_row + table.num_rows)
        return table[self._source_name].to_pylist()

    def load(self, sources: list[str]) -> Iterator[bytes | Exception]:
        """For each source its bytes, or the RowFailure that says why there are none."""
        self._pool.add(self._read_or_fail, sources)  # type: ignore[arg-type]
        for _ in sources:
            yield typing.cast(bytes | Exception, self._pool.take())

    def close(self) -> None:
        """Drop what is still queued."""
        self._pool.close()

    def _read_or_fail(self, source: str) -> bytes | Exception:
        try:
            return self._read(source.strip())
        except scoring.RowFailure as failure:
            return failure.with_traceback(None)

    def decode(self, data: bytes) -> Any:
        """Bytes -> 8-bit RGB PIL picture; raises RowFailure."""
        return scoring.decode_image(data, self._config)

    def measure(self, data: bytes | Exception, perceptual: bool) -> duplicates.PictureFacts | None:
        """What the rules need to know of the picture, or None where it cannot be read."""
        from PIL import Image
        try:
            return None if isinstance(data, Exception) else duplicates.measure_picture(data, self.decode, perceptual)
        except (scoring.RowFailure, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            return None


# ── Choose ────────────────────────────────────────────────────────────────────────────────────────────────────────────

def find_cuts(curation: rules.Curation, run: FinishedRun) -> rules.Cuts:
    """Turn the rules on similarity into similarities. Trouble (exit 2) for max_random_rate without random pairs."""
    fraction = random_rate = None
    if curation.keep_fraction is not None:
        fraction = rules.find_fraction_cut(run.similarities, curation.keep_fraction)
    if curation.max_random_rate is not None:
        if run.null is None or not run.null.random.count:
            raise Trouble(EXIT_CONFIG, f"curate.max_random_rate: {run.output} holds no random pairs (a dry run, a table with "
                                       "one caption only, or scored without addons/null.py)")
        random_rate = null.threshold_for_rate(run.null.random, curation.max_random_rate)
    return rules.Cuts(curation.min_similarity, fraction, random_rate)


def judge_all(run: FinishedRun, curation: rules.Curation, cuts: rules.Cuts, pictures: Pictures | None, verdicts: Any) -> None:
    """Fill `verdicts`, uint8 (rows,), with every row's verdict."""
    import pyarrow.compute as pc
    candidates = duplicates.Candidates()
    for first_row, table in run.chunks([run.source_name, run.caption_name, "similarity", "status"]):
        captions, sources = (table[name].to_pylist() for name in (run.caption_name, run.source_name))
        similarities, is_ok = _cosines(table), pc.equal(table["status"], "ok").to_numpy()
        judged = rules.judge_rows(curation, cuts, first_row, similarities, is_ok, captions)
        left = np.flatnonzero(judged == rules.KEPT)
        fingerprints = np.zeros(len(judged), np.uint64)
        if pictures:
            places = pictures.locate(first_row, table)
            facts = measure_all(pictures, dict.fromkeys(places[i] for i in left), curation.duplicate_images == "perceptual")
            for i in left:
                if (fact := facts[places[i]]) is None:
                    judged[i] = rules.VERDICTS["unreadable_image"]
                else:
                    judged[i], fingerprints[i] = rules.judge_picture(curation, fact.width, fact.height), fact.fingerprint
            left = np.flatnonzero(judged == rules.KEPT)
        verdicts[first_row:first_row + len(judged)] = judged
        if curation.needs_neighbours:
            candidates.add(first_row + left, rules.order_keys(similarities[left]),
                           [duplicates.hash_bytes(sources[i].encode()) for i in left],
                           [duplicates.hash_bytes(captions[i].strip().encode()) for i in left], fingerprints[left])
    dropped = duplicates.find_duplicates(candidates, curation.one_caption_per_image, curation.duplicate_images,
                                         curation.perceptual_distance, curation.duplicate_captions)
    for rule, rows in dropped.items():
        verdicts[rows] = rules.VERDICTS[rule]


def measure_all(pictures: Pictures, sources: Iterable[str], perceptual: bool) -> dict[str, duplicates.PictureFacts | None]:
    """Each source's facts; it is read once."""
    names = list(sources)
    return {name: pictures.measure(data, perceptual) for name, data in zip(names, pictures.load(names), strict=True)}


@contextlib.contextmanager
def verdict_file(folder: pathlib.Path, rows: int) -> Iterator[Any]:
    """A byte per row, uint8 (rows,), on disk while it is needed."""
    path = folder / f".verdicts.{os.getpid()}.tmp"
    try:
        with scoring.output_disk(path):
            path.write_bytes(b"")
            os.truncate(path, max(1, rows))
        yield np.memmap(path, np.uint8, "r+", shape=(max(1, rows),))[:rows]
    finally:
        path.unlink(missing_ok=True)


# ── Write ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

def judged_chunks(run: FinishedRun, verdicts: Any) -> Iterator[tuple[int, Any, Any]]:
    """Yield (first row, table with the columns of scores.csv, verdicts) for all rows, chunk by chunk."""
    for first_row, table in run.chunks():
        yield first_row, scoring.add_percentiles(table, run.null), np.asarray(verdicts[first_row:first_row + table.num_rows])


def write_tables(run: FinishedRun, verdicts: Any, folder: pathlib.Path, escape: bool) -> dict[str, int]:
    """Write kept.csv and dropped.csv, both in input order; returns how many rows have each verdict, by its name.

    dropped.csv has one column more, `dropped_by`. Trouble (exit 7) unless kept + dropped = all.
    """
    import pyarrow as pa
    columns = [*run.names, *scoring.RESULT_COLUMNS]
    reason = next(name for name in ("dropped_by", *(f"dropped_by_{n}" for n in range(2, 1000))) if name not in columns)
    counts, escaping = np.zeros(len(rules.RULES), np.int64), outputs.escape_formula if escape else None
    with contextlib.ExitStack() as files:
        open_file = [files.enter_context(scoring.atomic_file(folder / name)) for name in ("kept.csv", "dropped.csv")]
        kept = scoring.CsvRows(open_file[0], columns, escaping, len(scoring.RESULT_COLUMNS))
        dropped = scoring.CsvRows(open_file[1], [*columns, reason], escaping, len(scoring.RESULT_COLUMNS) + 1)
        for _, table, judged in judged_chunks(run, verdicts):
            counts += np.bincount(judged, minlength=len(counts))
            is_kept = judged == rules.KEPT
            kept.write(table.filter(pa.array(is_kept)))
            out = table.filter(pa.array(~is_kept))
            dropped.write(out.append_column(reason, pa.array([rules.RULES[v] for v in judged[~is_kept]], pa.string())))
        kept.close()
        dropped.close()
    if int(counts.sum()) != run.rows:
        raise Trouble(EXIT_VERIFY, f"{folder}: {run.rows} rows came in, {int(counts.sum())} went out")
    return {name: int(count) for name, count in zip(rules.RULES, counts, strict=True)}


def kept_tables(run: FinishedRun, verdicts: Any) -> Iterator[Any]:
    """The kept rows as pyarrow tables, in input order."""
    import pyarrow as pa
    return (table.filter(pa.array(judged == rules.KEPT)) for _, table, judged in judged_chunks(run, verdicts))


def scores_schema(run: FinishedRun) -> Any:
    """The columns of scores.csv with their types."""
    import pyarrow as pa
    types = {"truncated": pa.bool_(), "status": pa.string(), "detail": pa.string()}
    return pa.schema([(name, pa.string()) for name in run.names]
                     + [(name, types.get(name, pa.float32())) for name in scoring.RESULT_COLUMNS])


def kept_records(run: FinishedRun, pictures: Pictures, verdicts: Any) -> Iterator[export.Record]:
    """The kept rows, one by one."""
    for first_row, table, judged in judged_chunks(run, verdicts):
        at = np.flatnonzero(judged == rules.KEPT)
        if not len(at):
            continue
        places = pictures.locate(first_row, table)
        columns = [table[name].take(at).to_pylist()
                   for name in (run.source_name, run.caption_name, "similarity", "dissimilarity")]
        for place, values in zip(at.tolist(), zip(*columns, strict=True), strict=True):
            yield export.Record(first_row + place, places[place], *values)


def export_kept(run: FinishedRun, curation: rules.Curation, pictures: Pictures | None, verdicts: Any,
                folder: pathlib.Path) -> export.Exported:
    """Write what `export` asks for; rows whose picture is gone are listed in not_exported.csv."""
    if curation.export == "csv":
        return export.Exported(int((np.asarray(verdicts) == rules.KEPT).sum()))
    if curation.export == "parquet":
        return export.export_parquet(folder / "kept.parquet", kept_tables(run, verdicts), scores_schema(run),
                                     scoring.atomic_file)
    state = export.ExportState(folder, curation.export, curation.shard_rows, scoring.write_json)
    if state.is_complete:
        return export.Exported(state.exported)
    assert pictures
    records = kept_records(run, pictures, verdicts)
    exported = export.export_imagefolder(state.target, records, pictures.load, scoring.atomic_file) \
        if curation.export == "imagefolder" else \
        export.export_webdataset(state.target, records, pictures.load, scoring.atomic_file, curation.shard_rows)
    write_missing(folder / "not_exported.csv", exported.missing)
    state.finish(exported)
    return exported


def write_missing(path: pathlib.Path, missing: list[tuple[int, str, str]]) -> None:
    """Write not_exported.csv: kept rows whose picture cannot be had any more; no file where there are none."""
    path.unlink(missing_ok=True)
    if not missing:
        return
    with scoring.atomic_file(path) as file:
        text = io.TextIOWrapper(file, "utf-8", newline="", write_through=True)
        csv.writer(text, lineterminator="\n").writerows([("row", "url", "reason"), *missing])
        text.detach()
    say(f"{len(missing)} kept rows have no picture any more: see {path}; the same command tries them again")


# ── Show ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

def describe_choice(curation: rules.Curation, cuts: rules.Cuts, run: FinishedRun, counts: dict[str, int]) -> dict:
    """What curated.json holds: settings, counts by verdict, and what the similarity's cut means."""
    cut, scored = cuts.similarity, sum(part["similarity_count"] for part in run.parts)
    passing = run.null.random.share_at_or_above(cut) if run.null and run.null.random.count and cut is not None else None
    return {"rows": run.rows, "scored": scored, "kept": counts["kept"],
            "dropped": {name: count for name, count in counts.items() if count and name != "kept"},
            "cut_similarity": cut, "random_pairs_at_cut": passing, "random_pairs": run.profile.get("null"),
            "model": run.model, "curate": dataclasses.asdict(curation)}


def tell_choice(choice: dict) -> str:
    """One line for people: how many rows stay, and what the cut means."""
    scored, text = choice["scored"], f"{choice['kept']:,} of {choice['scored']:,} scored rows kept"
    text += f" ({100 * choice['kept'] / scored:.1f} %)" if scored else ""
    if choice["cut_similarity"] is not None:
        text += f", cut at similarity {choice['cut_similarity']:.4f}"
    if choice["random_pairs_at_cut"] is not None:
        text += f", which {100 * choice['random_pairs_at_cut']:.2f} % of random pairs reach"
    return text


def draw_plots(run: FinishedRun, choice: dict, folder: pathlib.Path) -> None:
    """Write scores.png, throughput.png and memory.png; without matplotlib one line says that there are none."""
    matched = matched_counts(run)
    random = run.null.random.counts if run.null and run.null.random.count else None
    rows, wall_s, rss, gpu = ([part[key] for part in run.parts] for key in ("rows", "wall_s", "peak_rss_mib", "peak_gpu_mib"))
    pictures = {"scores.png": lambda file: curation_plots.draw_scores(matched, random, null.EDGES, choice["cut_similarity"],
                                                                      tell_choice(choice), file),
                "throughput.png": lambda file: curation_plots.draw_throughput(rows, wall_s, file),
                "memory.png": lambda file: curation_plots.draw_memory_peaks(rows, rss, gpu, file)}
    for name, draw in pictures.items():
        try:
            with scoring.output_disk(folder / name), scoring.atomic_file(folder / name) as file:
                draw(file)
        except ImportError as error:
            say(f"no pictures in {folder}: {error} (pip install -r requirements.txt)")
            return


def matched_counts(run: FinishedRun) -> Any:
    """How many rows score in each bin of addons.null, (BINS,) int64."""
    if run.null:
        return run.null.matched.counts
    histogram = null.Histogram()
    for similarities in run.similarities():
        histogram.add(similarities)
    return histogram.counts


def write_review(run: FinishedRun, curation: rules.Curation, config: scoring.Config, pictures: Pictures, verdicts: Any,
                 choice: dict, folder: pathlib.Path) -> None:
    """Write review.html."""
    chosen = review.choose_sample(run.similarities, curation.review_rows)
    sample, failures = review.collect_rows(judged_chunks(run, verdicts), chosen, run.source_name, run.caption_name, rules.RULES,
                                           pictures.locate)
    small = dataclasses.replace(config, decode="scaled")
    size = (review.THUMBNAIL_PX, review.THUMBNAIL_PX)
    thumbnails = review.add_thumbnails(sample, pictures.load, lambda data: scoring.decode_image(data, small, size),
                                       scoring.RowFailure)
    failed, counts = run.profile["failed"], {"kept": choice["kept"], **choice["dropped"]}
    for row in [*sample, *(row for examples in failures.values() for row in examples)]:
        del row["source"]
    random = run.null.random.counts if run.null and run.null.random.count else None
    content = review.describe_run(run.profile, f"Review of {run.output.name}") | {
        "subtitle": f"{run.model}: {tell_choice(choice)}.",
        "resolution": null.RESOLUTION, "matched": review.pack_histogram(matched_counts(run)),
        "random": None if random is None else review.pack_histogram(random), "cut": choice["cut_similarity"],
        "rules": [[name, count, rules.RULE_TEXTS.get(name, "passes every rule")] for name, count in counts.items()],
        "sample": sample, "thumbnails": thumbnails,
        "failures": [{"status": status, "count": failed.get(status, len(examples)), "examples": examples}
                     for status, examples in sorted(failures.items())],
        "plot_text": tell_plot(choice), "notes": tell_notes(len(sample), choice["scored"])}
    with scoring.output_disk(folder / "review.html"), scoring.atomic_file(folder / "review.html") as file:
        file.write(review.render_page(content))


def tell_plot(choice: dict) -> str:
    """What stands beneath the page's histogram."""
    if not (pairs := choice["random_pairs"]):
        return "There are no random pairs to compare with (a dry run, or scored without addons/null.py)."
    return f"Of {pairs['pairs']:,} random pairs 95 % score below {pairs['q95']:.4f}, 99 % below {pairs['q99']:.4f} and " \
           f"99.9 % below {pairs['q99.9']:.4f}. Click or drag in the picture to move the threshold."


def tell_notes(shown: int, scored: int) -> list[str]:
    """What the page's numbers are, and what its sample is."""
    return [f"Counts, shares and histograms are of all {scored:,} scored rows; the threshold moves in steps of "
            f"{null.RESOLUTION:.6f} and is judged on the similarity alone, whatever other rules say.",
            f"The pairs shown are {shown:,} of the {scored:,} scored rows, spread evenly over the range of scores and chosen "
            f"by row number (counted from 0); of rows without a score, the first {review.FAILURE_EXAMPLES} of each status."]


# ── Main ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

def check_section(kind: Any, values: dict, section: str) -> Any:
    """The dataclass `kind` made of a section's `values`, its keys, types and ranges checked as those of Config are."""
    scoring.check_keys(kind, values, section + ".")
    made = kind(**values)
    for field in dataclasses.fields(kind):
        scoring.check_value(field, getattr(made, field.name), section + ".")
    return made


def curate(config: scoring.Config) -> dict:
    """Judge, write, export and show; returns what the last line on stdout says."""
    curation = check_section(rules.Curation, config.curate or {}, "curate")
    run = open_run(config)
    try:
        curation = rules.apply_recipe(curation, run.model)
    except ValueError as error:
        raise Trouble(EXIT_CONFIG, str(error)) from None
    require_libraries(curation)
    reads = curation.needs_pictures or curation.review or curation.export in ("imagefolder", "webdataset")
    pictures, folder = Pictures(config, run) if reads else None, run.output / "curated"
    cuts = find_cuts(curation, run)
    with contextlib.ExitStack() as stack:
        if pictures:
            stack.callback(pictures.close)
        stack.enter_context(scoring.locked(folder))
        stack.enter_context(scoring.output_disk(folder))
        for leftover in folder.rglob(".*.[0-9]*.tmp"):  # of a run that was killed
            leftover.unlink()
        verdicts = stack.enter_context(verdict_file(folder, run.rows))
        judge_all(run, curation, cuts, pictures if curation.needs_pictures else None, verdicts)
        choice = describe_choice(curation, cuts, run, write_tables(run, verdicts, folder, config.escape_formulas))
        exported = export_kept(run, curation, pictures, verdicts, folder)
        choice |= {"exported": exported.count, "not_exported": len(exported.missing)}
        scoring.write_json(folder / "curated.json", choice)
        draw_plots(run, choice, folder)
        if curation.review:
            assert pictures
            write_review(run, curation, config, pictures, verdicts, choice, folder)
    return choice | {"output": str(folder)}


def require_libraries(curation: rules.Curation) -> None:
    """Trouble (exit 2) that names the pip install, before any work, for a library that a key needs and that is missing."""
    if curation.duplicate_images == "perceptual":
        try:
            import imagehash  # noqa: F401
        except ImportError as error:
            raise Trouble(EXIT_CONFIG, f"curate.duplicate_images: perceptual needs the package {error.name} "
                                       "(pip install -r addons/requirements.txt)") from None


def tell_summary(choice: dict) -> None:
    """The result on stderr, as a short table."""
    say(f"{'kept':>24}  {tell_choice(choice)}")
    for name, count in choice["dropped"].items():
        say(f"{name:>24}  {count:,} dropped: {rules.RULE_TEXTS[name]}")
    if choice["curate"]["export"] != "csv":
        say(f"{'exported':>24}  {choice['exported']:,} rows as {choice['curate']['export']}")


def main(arguments: list[str] | None = None) -> int:
    """Config -> curated/. Returns the exit code; the last line on stdout is one JSON object."""
    parser = scoring._Parser(prog="curate.py", description=(__doc__ or "").split("\n")[0],
                             epilog="exit codes: 0 done, 2 config, 3 no finished scores, 5 output disk, 7 flawed scores")
    parser.add_argument("--config", required=True, help="the YAML file that the scores were made with")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                        help="override a key: curate.keep_fraction=0.3")
    options = parser.parse_args(arguments)
    choice = curate(scoring.load_config(options.config, options.set))
    tell_summary(choice)
    keys = ("rows", "scored", "kept", "dropped", "cut_similarity", "random_pairs_at_cut", "exported", "not_exported", "output")
    print(json.dumps({key: choice[key] for key in keys}, ensure_ascii=False), flush=True)
    return 0


def run() -> typing.NoReturn:
    """`main` with its endings: one line for a user's mistake, 130 for Ctrl-C, a traceback for a bug."""
    try:
        sys.exit(main())
    except Trouble as trouble:
        say(f"error: {trouble}")
        sys.exit(trouble.exit_code)
    except KeyboardInterrupt:
        say("interrupted: the same command goes on from there")
        sys.exit(130)


if __name__ == "__main__":
    run()
