"""From scores to a training set: keep the rows worth keeping, export them, and show the choice on a page.

    python image_text_sim_clip.py --config config.yaml
    python curate.py --config config.yaml --set curate.max_random_rate=0.01 --set curate.review=true

The second job of the same config file: it works on the finished scores in `output_path`, by the rules of the section
`curate:`, and loads no model. Results go to `output_path`/curated/:

    kept.csv  dropped.csv     every row of the input is in one of them; a dropped one names its rule (dropped_by)
    curated.json              the rules, how many rows each dropped, and where the similarity was cut
    scores.png  throughput.png  memory.png  measure-<column>.png
    kept.parquet | imagefolder/ | webdataset/ | clip-retrieval/    with `export`
    review.html               with `review`: one page that opens from the disk

    finished parts -> cuts -> verdict per row -> kept.csv, dropped.csv -> export -> review page

What it is made of lies in addons/curation/.
"""
import contextlib
import dataclasses
import functools
import io
import itertools
import json
import os
import pathlib
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import NoReturn

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))  # which `python -I` and PYTHONSAFEPATH leave out

from addons.curation import ImageRule, duplicates, examples, marks, plots, review, rules
from addons.curation.export import EXPORTS, Exported, KeptRows, remove_tables_of_other_rows
from addons.curation.finished import FinishedRun, check_embeddings, open_run, read_similarities, read_values
from addons.curation.images import RunImages, ScoredImage
from addons.curation.overlaps import Overlaps
from addons.curation.semantic import SavedImages
from addons.measures import random_pairs
from addons.results.csv_rows import ArrowCsvRows
from addons.results.formulas import escape_formula, escape_table
from addons.sections import check_section
from image_text_sim_clip import (
    EXIT_CONFIG,
    EXIT_VERIFY,
    Config,
    Parser,
    PartsChanged,
    Trouble,
    as_path,
    atomic_file,
    column_names,
    in_store,
    load_config,
    locked,
    output_disk,
    read_times,
    say,
    write_json,
)

# ── Choose ────────────────────────────────────────────────────────────────────────────────────────────────────────────

def find_cuts(curation: rules.Curation, run: FinishedRun, proved: marks.ProvedCut | None) -> rules.Cuts:
    """Turn the rules on similarity into similarities; `proved` is the cut that marked pairs prove, where that is asked for.

    Trouble (exit 2) for max_random_rate without random pairs.
    """
    fraction = None
    if curation.keep_fraction is not None:
        fraction = rules.find_fraction_cut(lambda: run.values(curation.by), curation.keep_fraction, curation.by)
    random_rate = None
    if curation.max_random_rate is not None:
        if run.random_pairs is None or not run.random_pairs.random.count:
            raise Trouble(EXIT_CONFIG, f"curate.max_random_rate: {run.output} holds no random pairs (a dry run, a table with "
                                       "one caption only, or scored without addons/measures/random_pairs.py)")
        random_rate = random_pairs.threshold_for_rate(run.random_pairs.random, curation.max_random_rate)
    precision = proved.similarity if proved and proved.goal == "min_precision" else None
    recall = proved.similarity if proved and proved.goal == "min_recall" else None
    return rules.Cuts(curation.min_similarity, fraction, random_rate, precision, recall)


def judge_all(run: FinishedRun, curation: rules.Curation, cuts: rules.Cuts, images: RunImages | None,
              saved: SavedImages | None, verdicts: np.ndarray) -> tuple[Overlaps, dict[str, duplicates.Dropped]]:
    """Fill `verdicts`, uint8 (rows,), with every row's verdict.

    Returns what the rules on one row would drop alone, and by its name what each rule between rows drops.
    """
    import pyarrow.compute as pc
    row_rules = rules.make_row_rules(curation, cuts)
    image_rules = rules.make_image_rules(curation)
    neighbour_rules = duplicates.make_neighbour_rules(curation, saved)
    candidates = duplicates.Candidates()
    overlaps = Overlaps()
    further = list(curation.needs_columns)
    for first_row, table in run.chunks([run.source_name, run.caption_name, "similarity", "status", *further]):
        similarities = read_similarities(table)
        is_ok = pc.equal(table["status"], "ok").to_numpy()
        values = {name: read_values(table, name) for name in further}
        failures = rules.find_failures(row_rules, rules.ScoredRows(first_row, similarities, is_ok,
                                                                     table[run.caption_name].to_pylist, values))
        overlaps.add(failures)
        judged = rules.judge_failures(failures, len(similarities))
        fingerprints = np.zeros(len(judged), np.uint64)
        contents = np.zeros(len(judged), np.uint64)
        if images and rules.looks_at_images(curation, run.holds_images):
            perceptual = curation.duplicate_images == "perceptual"
            judge_images(images, image_rules, images.locate(first_row, table), perceptual, judged, fingerprints, contents)
        if saved:  # whatever the files' own fingerprints are: the embeddings tell which images are alike
            fingerprints = saved.numbers_of(first_row, len(judged))
        verdicts[first_row:first_row + len(judged)] = judged
        if neighbour_rules:
            left = np.flatnonzero(judged == rules.KEPT)
            names = table[run.source_name].to_pylist()
            if images and run.holds_uris:
                names = [image.source for image in images.locate(first_row, table)]
            sources = np.array([duplicates.hash_bytes(names[i].encode()) for i in left], np.uint64)
            if run.holds_images:  # where one name may be that of several images
                sources ^= contents[left]
            captions = table[run.caption_name].to_pylist()
            candidates.add(first_row + left, rules.order_keys(similarities[left]), sources,
                           [duplicates.hash_bytes(captions[i].strip().encode()) for i in left], fingerprints[left])
    dropped = duplicates.find_duplicates(candidates.gather(), neighbour_rules)
    for rule, found in dropped.items():
        verdicts[found.rows] = rules.VERDICTS[rule]
    return overlaps, dropped


def judge_images(images: RunImages, image_rules: Sequence[ImageRule], of_rows: list[ScoredImage], perceptual: bool,
                 judged: np.ndarray, fingerprints: np.ndarray, contents: np.ndarray) -> None:
    """Judge the images `of_rows`, (n,), of the rows that are kept so far: fills in `judged` and, (n,), their hashes."""
    left = np.flatnonzero(judged == rules.KEPT)
    facts_of = images.measure_all((of_rows[i] for i in left), perceptual)
    for i in left:
        facts = facts_of[of_rows[i]]
        judged[i] = rules.judge_image(image_rules, facts)
        if facts:
            fingerprints[i] = facts.fingerprint
            contents[i] = facts.content


@contextlib.contextmanager
def verdict_file(folder: pathlib.Path, rows: int) -> Iterator[np.ndarray]:
    """A byte per row, uint8 (rows,), on disk while it is needed."""
    path = folder / f".verdicts.{os.getpid()}.tmp"
    size = max(1, rows)  # an empty file cannot be mapped
    try:
        with output_disk(path):
            path.write_bytes(b"")
            os.truncate(path, size)
        yield np.memmap(path, np.uint8, "r+", shape=(size,))[:rows]
    finally:
        path.unlink(missing_ok=True)


# ── Write ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

def write_tables(run: FinishedRun, verdicts: np.ndarray, folder: pathlib.Path, escape: bool) -> dict[str, int]:
    """Write kept.csv and dropped.csv, both in input order; returns how many rows have each verdict, by its name.

    dropped.csv has one column more, `dropped_by`. Trouble (exit 7) unless kept + dropped = all.
    """
    import pyarrow as pa
    columns = [*run.names, *column_names(run.result_columns)]
    reason = find_free_name("dropped_by", columns)
    counts = np.zeros(len(rules.RULES), np.int64)
    rule_names = pa.array(rules.RULES, pa.string())
    with atomic_file(folder / "kept.csv") as kept_file, atomic_file(folder / "dropped.csv") as dropped_file:
        shown = [escape_formula(name) for name in columns] if escape else columns
        kept = ArrowCsvRows(kept_file, shown)
        dropped = ArrowCsvRows(dropped_file, [*shown, reason])
        for _, chunk, judged in run.judged_chunks(verdicts):
            table = escape_table(chunk) if escape else chunk
            counts += np.bincount(judged, minlength=len(counts))
            is_kept = judged == rules.KEPT
            kept.write(table.filter(pa.array(is_kept)))
            dropped_by = rule_names.take(pa.array(judged[~is_kept]))
            dropped.write(table.filter(pa.array(~is_kept)).append_column(reason, dropped_by))
        kept.close()
        dropped.close()
    if int(counts.sum()) != run.row_count:
        raise Trouble(EXIT_VERIFY, f"{folder}: {run.row_count} rows came in, {int(counts.sum())} went out")
    return {name: int(count) for name, count in zip(rules.RULES, counts, strict=True)}


def find_free_name(name: str, taken: list[str]) -> str:
    """`name`, or the first of name_2, name_3 ... that is not `taken`."""
    if name not in taken:
        return name
    return next(other for n in itertools.count(2) if (other := f"{name}_{n}") not in taken)


# ── Show ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

def describe_choice(curation: rules.Curation, cuts: rules.Cuts, run: FinishedRun, counts: dict[str, int],
                    overlaps: Overlaps, exported: Exported, proved: marks.ProvedCut | None) -> rules.Choice:
    """What the rules did; `counts` are the rows with each verdict."""
    cut = cuts.similarity
    passing = None
    if cut is not None and run.random_pairs is not None and run.random_pairs.random.count:
        passing = run.random_pairs.random.share_at_or_above(cut)
    return rules.Choice(
        rows=run.row_count, scored=run.scored_count, kept=counts["kept"],
        dropped={name: count for name, count in counts.items() if count and name != "kept"},
        cut_similarity=cut, random_pairs_at_cut=passing, random_pairs=run.profile.get("random_pairs"), model=run.model,
        curate=dataclasses.asdict(curation) | ({"by": run.judged_by} if run.judged_by else {}),
        alone=overlaps.alone, overlap=overlaps.both, together=overlaps.together,
        exported=exported.count, not_exported=len(exported.missing),
        labels=dataclasses.asdict(proved) if proved else None)


def draw_plots(run: FinishedRun, choice: rules.Choice, folder: pathlib.Path) -> None:
    """Write scores.png, throughput.png and memory.png; without matplotlib one line says that there are none."""
    rows = [part["rows"] for part in run.parts]
    times = [read_times(partition) for partition in run.plan.partitions]
    rss_mib = [time["peak_rss_mib"] for time in times]
    gpu_mib = [time["peak_gpu_mib"] for time in times]
    try:
        with output_disk(folder), atomic_file(folder / "scores.png") as file:
            plots.draw_scores(run.matched_counts(), run.random_counts(), random_pairs.EDGES, choice.cut_similarity,
                              choice.tell(), file)
        with output_disk(folder), atomic_file(folder / "throughput.png") as file:
            plots.draw_throughput(rows, [time["wall_s"] for time in times], file)
        with output_disk(folder), atomic_file(folder / "memory.png") as file:
            plots.draw_memory_peaks(rows, rss_mib, gpu_mib, file)
    except ImportError as error:
        say(f"no plots in {folder}: {error} (pip install -r requirements.txt)")


def tell_proof(proved: marks.ProvedCut) -> None:
    """What the marks prove, on stderr."""
    say(f"{'labels':>24}  {proved.tell()}")
    if proved.hint:
        say(f"{'':>24}  {proved.hint}")


def draw_measures(run: FinishedRun, curation: rules.Curation, verdicts: np.ndarray, folder: pathlib.Path) -> None:
    """Write measure-<column>.png for each column of a measure: its values in all rows and in those kept, with the cuts."""
    for leftover in folder.glob("measure-*.png"):
        leftover.unlink()
    for column in run.further_columns:
        if column.type != "float":
            continue
        pieces = functools.partial(read_judged_values, run, column.name, verdicts)
        name = find_free_name("measure-" + re.sub(r"[^\w-]", "_", column.name), [path.stem for path in folder.glob("*.png")])
        with contextlib.suppress(ImportError), atomic_file(folder / f"{name}.png") as file:  # `draw_plots` has told of it
            plots.draw_measure(pieces, rules.find_limits(curation, column.name), column, file)


def read_judged_values(run: FinishedRun, column: str, verdicts: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the column's values of rows that follow each other, float32 (n,), and which of these rows are kept, bool (n,)."""
    first_row = 0
    for values in run.values(column):
        yield values, np.asarray(verdicts[first_row:first_row + len(values)]) == rules.KEPT
        first_row += len(values)


def tell_summary(choice: rules.Choice) -> None:
    """The result on stderr, as a short table."""
    say(f"{'kept':>24}  {choice.tell()}")
    for name, count in choice.dropped.items():
        alone = choice.alone.get(name, count)
        by_itself = f" (alone: {alone:,})" if alone != count else ""
        say(f"{name:>24}  {count:,} dropped{by_itself}: {rules.RULE_TEXTS[name]}")
    if choice.curate["export"] != "csv":
        say(f"{'exported':>24}  {choice.exported:,} rows as {choice.curate['export']}")


# ── Main ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

def open_choice(config: Config) -> tuple[rules.Curation, FinishedRun]:
    """The section `curate:`, with its recipe's keys, and the run that it is about. Trouble (exit 2) where they do not fit."""
    curation = check_section(rules.Curation, config.curate or {}, "curate")
    run = open_run(config).judged_by_model(curation.by)
    if curation.by in run.models:
        curation = dataclasses.replace(curation, by="similarity")  # of that model, as the run now has it
    try:
        curation = rules.apply_recipe(curation, run.model)
    except ValueError as error:
        raise Trouble(EXIT_CONFIG, str(error)) from None
    require_libraries(curation)
    for key, value in (("export", "clip-retrieval"), ("duplicate_images", "semantic")):
        if getattr(curation, key) == value and run.plan.config.save_embeddings == "none":
            raise Trouble(EXIT_CONFIG, f"curate.{key}: {value} needs the embeddings: score with save_embeddings first")
        if getattr(curation, key) == value:
            check_embeddings(run)
    rules.check_columns(curation, run.plan.config.measures or {}, run.further_columns)
    refuse_own_input(config, run.output / "curated")
    return curation, run


def curate(config: Config) -> tuple[rules.Choice, pathlib.Path]:
    """Judge, write, export and show; returns what was chosen and the folder it was written to."""
    curation, run = open_choice(config)
    export = EXPORTS[curation.export]
    folder = run.output / "curated"
    with contextlib.ExitStack() as stack:
        images = None
        needs_uris = run.holds_uris and rules.asks_for_sources(curation)
        if needs_uris or rules.looks_at_images(curation, run.holds_images) or curation.review or export.needs_images:
            images = stack.enter_context(RunImages(config, run))
        proved = marks.find_proved_cut(curation, run)
        if proved:
            tell_proof(proved)
        cuts = find_cuts(curation, run, proved)
        stack.enter_context(locked(folder))
        stack.enter_context(output_disk(folder))
        for leftover in folder.rglob(".*.[0-9]*.tmp"):  # of a run that was killed
            leftover.unlink()
        scratch = folder
        if in_store(folder):
            scratch = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        verdicts = stack.enter_context(verdict_file(scratch, run.row_count))
        saved = None
        if curation.duplicate_images == "semantic":
            saved = stack.enter_context(contextlib.closing(SavedImages(run, scratch, os.getpid())))
        overlaps, dropped = judge_all(run, curation, cuts, images, saved, verdicts)
        (folder / "curated.json").unlink(missing_ok=True)  # until all that it tells of is written
        counts = write_tables(run, verdicts, folder, config.escape_formulas)
        remove_tables_of_other_rows(folder)
        exported = export.write(KeptRows(run, verdicts, curation, images, config.escape_formulas), folder)
        choice = describe_choice(curation, cuts, run, counts, overlaps, exported, proved)
        draw_plots(run, choice, folder)
        draw_measures(run, curation, verdicts, folder)
        if curation.review:
            assert images
            shown = examples.choose_examples(verdicts, dropped, review.scatter)
            review.write_review(run, images, config, verdicts, choice, shown, curation.review_rows, folder / "review.html")
        write_json(folder / "curated.json", dataclasses.asdict(choice))
        if images and images.changed:
            say(f"warning: {len(images.changed):,} of the images that were read have changed since they were scored, by their "
                "bytes: they are used for nothing here; score them again (--fresh), or put the scored ones back")
    return choice, folder


def refuse_own_input(config: Config, folder: pathlib.Path) -> None:
    """Trouble (exit 2) for a table, or images, of an earlier choice that lie in `folder`, where this one would replace them."""
    for key in ("csv_path", "image_path"):
        path = as_path(getattr(config, key))
        is_place = key == "csv_path" or in_store(path) or path.is_dir()  # image_path may be the name of a source
        if is_place and path.resolve().is_relative_to(folder.resolve()):
            raise Trouble(EXIT_CONFIG, f"{key} {str(path)!r} lies in {folder}, which is about to be written: score it into "
                                       "another output_path, or take it elsewhere first")


def require_libraries(curation: rules.Curation) -> None:
    """Trouble (exit 2) that names the pip install, before any work, for a library that a key needs and that is missing."""
    if curation.duplicate_images == "perceptual":
        try:
            import imagehash  # noqa: F401
        except ImportError as error:
            raise Trouble(EXIT_CONFIG, f"curate.duplicate_images: perceptual needs the package {error.name} "
                                       "(pip install -r addons/requirements.txt)") from None
    if curation.duplicate_images == "semantic":
        try:
            import faiss  # noqa: F401
        except ImportError as error:
            raise Trouble(EXIT_CONFIG, f"curate.duplicate_images: semantic needs the package {error.name} "
                                       "(pip install -r addons/requirements.txt)") from None


def refuse_rules_without_section(overrides: Sequence[str]) -> None:
    """Trouble (exit 2) for a key of the section `curate` that --set names without it."""
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key in rules.Curation.__dataclass_fields__:
            raise Trouble(EXIT_CONFIG, f"unknown key {key!r}; did you mean 'curate.{key}'?")


def main(arguments: list[str] | None = None) -> int:
    """Config -> curated/. Returns the exit code; the last line on stdout is one JSON object."""
    parser = Parser(prog="curate.py", description=(__doc__ or "").split("\n")[0],
                    epilog="exit codes: 0 done, 2 config, 3 no finished scores, 5 output disk, 7 damaged scores")
    parser.add_argument("--config", required=True, help="the YAML file that the scores were made with")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                        help="override a key: curate.keep_fraction=0.3")
    options = parser.parse_args(arguments)
    refuse_rules_without_section(options.set)
    config = load_config(options.config, options.set)
    try:
        choice, folder = curate(config)
    except PartsChanged:
        raise Trouble(EXIT_VERIFY, f"{config.output_path}: another process has replaced parts meanwhile: run the same command "
                                   "again") from None
    tell_summary(choice)
    result = dataclasses.asdict(choice)
    keys = ("rows", "scored", "kept", "dropped", "cut_similarity", "random_pairs_at_cut", "exported", "not_exported", "labels")
    with output_disk("the summary to stdout"):
        print(json.dumps({key: result[key] for key in keys} | {"output": str(folder)}), flush=True)
    return 0


def run() -> NoReturn:
    """`main` with its endings: one line for a user's mistake, 130 for Ctrl-C, a traceback for a bug."""
    sys.stderr = sys.stderr or io.StringIO()  # closed by whoever started us; or what is said would go to stdout
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
