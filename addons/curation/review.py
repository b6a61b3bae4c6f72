"""The review page: one HTML file that opens from the disk and shows what a threshold keeps and what it costs.

All numbers on it are of the whole table: histograms with RESOLUTION-wide bins, from which the page counts exactly how many
rows reach a bin's edge, so the slider moves from edge to edge. Only the pairs shown are a sample, chosen by `choose_sample`.

Captions, URLs and details come from strangers. They travel as JSON in which <, > and & are escaped, so that no text can
end the element it stands in, and reach the page as text nodes. A Content-Security-Policy with the hashes of the page's own
script and style lets nothing else run and nothing be fetched; images are data: URLs of thumbnails made here.
"""
import base64
import collections
import dataclasses
import hashlib
import io
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from addons.curation.examples import Examples
from addons.curation.export import Cell, none_for_nan
from addons.curation.finished import FinishedRun
from addons.curation.images import RunImages, ScoredImage
from addons.curation.labels import BETS, ERROR_RATE, Cells, make_cells
from addons.curation.rules import RULE_TEXTS, RULES, Choice
from addons.measures.random_pairs import RESOLUTION
from image_text_sim_clip import Config, Json, RowFailure, atomic_file, decode_image, output_disk

if TYPE_CHECKING:
    import pyarrow as pa

TEMPLATE = pathlib.Path(__file__).with_name("review.html")
SAMPLE_BINS = 256  # over [-1, 1]: the sample takes equally many rows of each, as far as there are as many
FAILURE_EXAMPLES = 24  # of each status
THUMBNAIL_PX = 160
CAPTION_CHARS = 1000  # shown of each
URL_CHARS = 300  # shown of each


# ── Which rows are shown ──────────────────────────────────────────────────────────────────────────────────────────────

def share_out(counts: np.ndarray, wanted: int) -> np.ndarray:
    """How many to take of each bin, int64: equally many of each, all of a small one, `wanted` together (or all there are)."""
    low = 0
    high = int(counts.max(initial=0))
    while low < high:  # the largest equal share that does not exceed `wanted`
        middle = (low + high + 1) // 2
        if np.minimum(counts, middle).sum() <= wanted:
            low = middle
        else:
            high = middle - 1
    quotas = np.minimum(counts, low)
    for place in np.flatnonzero(counts > quotas)[:wanted - int(quotas.sum())]:
        quotas[place] += 1
    return quotas


def scatter(rows: np.ndarray) -> np.ndarray:
    """Row numbers -> numbers without any order, uint64, always the same ones: the finaliser of splitmix64."""
    mixed = np.asarray(rows, np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))


def choose_sample(similarities: Callable[[], Iterable[np.ndarray]], wanted: int) -> np.ndarray:
    """Row numbers, int64 ascending, of `wanted` scored rows spread evenly over the range of scores.

    `similarities()` gives all rows' in input order, float32 arrays with NaN for none, twice. Within a bin the rows with the
    smallest scattered number are taken, so the sample is the same in every run and in no way chosen by its content.
    """
    counts = np.zeros(SAMPLE_BINS, np.int64)
    for chunk in similarities():
        counts += np.bincount(_sample_bins(chunk[~np.isnan(chunk)]), minlength=SAMPLE_BINS)
    quotas = share_out(counts, wanted)
    first_row = 0
    rows = np.empty(0, np.int64)
    bins = np.empty(0, np.int64)
    for chunk in similarities():
        scored = np.flatnonzero(~np.isnan(chunk))
        rows = np.concatenate([rows, first_row + scored])
        bins = np.concatenate([bins, _sample_bins(chunk[scored])])
        order = np.lexsort((scatter(rows), bins))
        starts = np.searchsorted(bins[order], bins[order])  # where each one's bin begins
        best = order[np.arange(len(order)) - starts < quotas[bins[order]]]
        rows = rows[best]
        bins = bins[best]
        first_row += len(chunk)
    return np.sort(rows)


def _sample_bins(similarities: np.ndarray) -> np.ndarray:
    return np.clip((similarities + 1) * (SAMPLE_BINS / 2), 0, SAMPLE_BINS - 1).astype(np.int64)


@dataclasses.dataclass
class ShownRow:
    """A row as the page shows it."""

    row: int  # its number in the input
    similarity: float | None
    url: str
    image: ScoredImage  # stays off the page
    caption: str
    status: str
    detail: str
    rule: str  # its verdict: one of RULES
    further: dict[str, Cell]  # the columns of further measures
    thumbnail: int | None = None  # the number of its thumbnail; None: there is none
    cell: int | None = None  # its cell (labels.Cells)
    turn: int | None = None  # the how-maniest of its cell to be marked; None: rows before it are not on the page

    def for_page(self) -> Json:
        """The row as an object of the page's JSON."""
        shown = dataclasses.asdict(self)
        del shown["image"]
        return shown


def collect_rows(run: FinishedRun, images: RunImages, verdicts: np.ndarray,
                 chosen: np.ndarray) -> tuple[list[ShownRow], dict[str, list[ShownRow]]]:
    """The rows whose numbers are `chosen`, and of each status but ok up to FAILURE_EXAMPLES rows."""
    sample: list[ShownRow] = []
    failures: dict[str, list[ShownRow]] = {}
    seen = collections.Counter[str]()
    for first_row, table, judged in run.judged_chunks(verdicts):
        in_chunk = chosen[(chosen >= first_row) & (chosen < first_row + table.num_rows)] - first_row
        places = in_chunk.tolist() + find_first_failures(table["status"].to_pylist(), seen)
        if not places:
            continue
        shown = _read_rows(run, images, first_row, table, judged, places)
        sample += shown[:len(in_chunk)]
        for row in shown[len(in_chunk):]:
            failures.setdefault(row.status, []).append(row)
    return sample, failures


def find_first_failures(statuses: list[str], seen: "collections.Counter[str]") -> list[int]:
    """The places of rows to show for their status; `seen` counts the examples of each status so far, and goes on."""
    places = []
    for place, status in enumerate(statuses):
        if status != "ok" and seen[status] < FAILURE_EXAMPLES:
            seen[status] += 1
            places.append(place)
    return places


def _read_rows(run: FinishedRun, images: RunImages, first_row: int, table: "pa.Table", verdicts: np.ndarray,
               places: list[int]) -> list[ShownRow]:
    """The rows at these places of a chunk."""
    of_rows = images.locate(first_row, table)
    further_names = [column.name for column in run.further_columns]
    names = [run.source_name, run.caption_name, run.similarity_column, "status", "detail", *further_names]
    columns = [table[name].take(places).to_pylist() for name in names]
    rows = []
    for place, (url, caption, similarity, status, detail, *cells) in zip(places, zip(*columns, strict=True), strict=True):
        rows.append(ShownRow(
            row=first_row + place, similarity=similarity, url=url[:URL_CHARS], image=of_rows[place],
            caption=_shorten(caption), status=status, detail=detail, rule=RULES[verdicts[place]],
            further=dict(zip(further_names, map(_show_cell, cells), strict=True))))
    return rows


def _show_cell(cell: Cell) -> Cell:
    return _shorten(cell) if isinstance(cell, str) else none_for_nan(cell)


def _shorten(text: str) -> str:
    return text if len(text) <= CAPTION_CHARS else text[:CAPTION_CHARS] + "…"


def set_turns(rows: Sequence[ShownRow], cells: Cells, similarities: Callable[[], Iterable[np.ndarray]]) -> None:
    """Number the rows of each cell in the order in which they are to be marked: the scattered order of all rows of the table.

    Where a row of the table that is not on the page would come first, the rows after it have no turn.
    """
    if not rows:
        return
    numbers = np.array([row.row for row in rows], np.int64)
    limits = find_limits(cells, similarities, numbers)
    places = cells.find(np.array([row.similarity for row in rows]))
    order = scatter(numbers)
    taken = collections.Counter[int]()
    for place in np.argsort(order).tolist():
        cell = int(places[place])
        rows[place].cell = cell
        if order[place] < limits[cell]:
            rows[place].turn = taken[cell]
            taken[cell] += 1


def find_limits(cells: Cells, similarities: Callable[[], Iterable[np.ndarray]], numbers: np.ndarray) -> np.ndarray:
    """The smallest scattered number, uint64 (cells,), of the scored rows of each cell that are not among `numbers` (n,)."""
    limits = np.full(len(cells.rows), np.iinfo(np.uint64).max, np.uint64)
    first_row = 0
    for chunk in similarities():
        is_other = ~np.isnan(chunk)
        here = numbers[(numbers >= first_row) & (numbers < first_row + len(chunk))]
        is_other[here - first_row] = False
        others = np.flatnonzero(is_other)
        np.minimum.at(limits, cells.find(chunk[others]), scatter(first_row + others))
        first_row += len(chunk)
    return limits


def add_thumbnails(rows: Sequence[ShownRow], images: RunImages, config: Config) -> list[str]:
    """Make a thumbnail of each image that the rows show, once; set their `thumbnail` to its number. Returns data: URLs."""
    thumbnails: list[str] = []
    number_of: dict[ScoredImage, int] = {}
    distinct = list(dict.fromkeys(row.image for row in rows))
    for image, data in zip(distinct, images.load(distinct), strict=True):
        if isinstance(data, RowFailure):
            continue
        try:
            thumbnail = make_thumbnail(data, config)
        except RowFailure:
            continue
        number_of[image] = len(thumbnails)
        thumbnails.append("data:image/webp;base64," + base64.b64encode(thumbnail).decode())
    for row in rows:
        row.thumbnail = number_of.get(row.image)
    return thumbnails


def make_thumbnail(data: bytes, config: Config) -> bytes:
    """Encoded image -> a WebP of at most THUMBNAIL_PX x THUMBNAIL_PX; raises RowFailure for a broken one."""
    size = (THUMBNAIL_PX, THUMBNAIL_PX)
    image = decode_image(data, dataclasses.replace(config, decode="scaled"), size)
    image.thumbnail(size)
    encoded = io.BytesIO()
    image.save(encoded, "WEBP", quality=70)
    return encoded.getvalue()


# ── The page ──────────────────────────────────────────────────────────────────────────────────────────────────────────

def pack_histogram(counts: np.ndarray) -> Json:
    """Counts per bin (BINS,) without the empty ends."""
    occupied = np.flatnonzero(counts)
    if not len(occupied):
        return {"first": 0, "counts": []}
    first = int(occupied[0])
    return {"first": first, "counts": counts[first:int(occupied[-1]) + 1].tolist()}


def embed_json(content: Json) -> str:
    """JSON that may stand inside a <script> element: no caption can close it, open a comment or end a line of script."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode("utf-8", "replace").decode()  # a lone surrogate is no UTF-8


def render_page(content: Json) -> bytes:
    """The template with `content` in it and a policy that allows its own script and style and nothing else."""
    page = TEMPLATE.read_text(encoding="utf-8")
    policy = (f"default-src 'none'; img-src data:; script-src {_hash_element(page, 'script')}; "
              f"style-src {_hash_element(page, 'style')}; base-uri 'none'; form-action 'none'")
    before, after = page.replace("{{CSP}}", policy).split("{{DATA}}")
    return (before + embed_json(content) + after).encode()


def _hash_element(page: str, element: str) -> str:
    """The policy's source for the one <element> without attributes in the page."""
    found = re.search(rf"<{element}>(.*?)</{element}>", page, re.S)
    assert found
    return "'sha256-" + base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode() + "'"


def describe_run(profile: Json) -> Json:
    """The page's facts, stages and memory, from profile.json."""
    failed = sum(profile["failed"].values())
    facts = [["pairs", f"{profile['rows']:,}"], ["scored", f"{profile['scored']:,}"], ["without a score", f"{failed:,}"],
             ["malformed lines", f"{profile['malformed']:,}"]]
    if profile.get("mean_similarity") is not None:
        facts.append(["mean similarity", f"{profile['mean_similarity']:.4f}"])
    pairs = profile.get("random_pairs")
    if pairs:
        facts.append(["random pairs, mean ± sd", f"{pairs['mean']:.4f} ± {pairs['sd']:.4f}"])
    memory = (f"Peaks: {profile['peak_rss_mib']:,.0f} MiB RAM, {profile['peak_gpu_mib']:,.0f} MiB GPU memory. "
              f"{profile['pairs_per_s']:,.1f} pairs/s, {profile['wall_s']:,.1f} s in all")
    if profile.get("bottleneck"):
        memory += f", limited by {profile['bottleneck']}"
    stages = [[name, seconds] for name, seconds in profile["seconds_per_pair"]["stages"].items()]
    return {"facts": facts, "stages": stages, "memory_text": memory + "."}


def describe_choice(choice: Choice, run: FinishedRun) -> Json:
    """The page's title, its histograms, the chosen cut, and what each rule dropped."""
    random_counts = run.random_counts()
    counts = {"kept": choice.kept, **choice.dropped}
    return {
        "title": f"Review of {run.output.name}",
        "subtitle": f"{run.model}: {choice.tell()}.",
        "resolution": RESOLUTION,
        "matched": pack_histogram(run.matched_counts()),
        "random": None if random_counts is None else pack_histogram(random_counts),
        "cut": choice.cut_similarity,
        "rules": [[name, count, RULE_TEXTS.get(name, "passes every rule")] for name, count in counts.items()],
        "plot_text": tell_plot(choice),
    }


def describe_cells(cells: Cells) -> list[Json]:
    """The page's cells, the best first: how many rows each holds, and the lowest similarity that can be in it."""
    return [{"rows": int(rows), "from": cells.threshold(cell)} for cell, rows in enumerate(cells.rows)]


def describe_proof(cells: Cells) -> Json:
    """What the page needs to find the cut that its marks prove, as labels.prove_cut does."""
    return {"error_rate": ERROR_RATE, "bets": list(BETS.items()), "precision_errors": cells.precision_errors.tolist(),
            "recall_errors": cells.recall_errors.tolist()}


def tell_plot(choice: Choice) -> str:
    """What stands beneath the page's histogram."""
    pairs = choice.random_pairs
    if not pairs:
        return "There are no random pairs to compare with (a dry run, or scored without addons/measures/random_pairs.py)."
    return (f"Of {pairs['pairs']:,} random pairs 95 % score below {pairs['q95']:.4f}, 99 % below {pairs['q99']:.4f} and "
            f"99.9 % below {pairs['q99.9']:.4f}. Click or drag in the plot to move the threshold.")


def tell_notes(shown: int, scored: int) -> list[str]:
    """What the page's numbers are, and what its sample is."""
    return [f"Counts, shares and histograms are of all {scored:,} scored rows; the threshold moves in steps of "
            f"{RESOLUTION:.6f} and is judged on the similarity alone, whatever other rules say.",
            f"The pairs shown are {shown:,} of the {scored:,} scored rows, spread evenly over the range of scores and chosen "
            f"by row number (counted from 0); of rows without a score, the first {FAILURE_EXAMPLES} of each status."]


def describe_failures(failures: dict[str, list[ShownRow]], counts: dict[str, int]) -> list[Json]:
    """The page's rows without a score: of each status how many there are (`counts`), and its examples."""
    described = []
    for status, examples in sorted(failures.items()):
        described.append({"status": status, "count": counts.get(status, len(examples)),
                          "examples": [row.for_page() for row in examples]})
    return described


def describe_examples(examples: Sequence[Examples], rows: dict[int, ShownRow]) -> list[Json]:
    """The page's examples of each rule; `rows` holds the rows by their numbers."""
    described = []
    for example in examples:
        groups = [[rows[row].for_page() for row in group] for group in example.groups]
        described.append({"rule": example.rule, "between_rows": example.is_between_rows, "groups": groups})
    return described


def write_review(run: FinishedRun, images: RunImages, config: Config, verdicts: np.ndarray, choice: Choice,
                 examples: Sequence[Examples], wanted: int, path: pathlib.Path) -> None:
    """Write the page to `path`, with `wanted` pairs on it (or all, where there are fewer), and the rules' examples."""
    chosen = choose_sample(run.similarities, wanted)
    of_rules = np.array([row for example in examples for row in example.row_numbers()], np.int64)
    collected, failures = collect_rows(run, images, verdicts, np.union1d(chosen, of_rules))
    in_sample = np.isin([row.row for row in collected], chosen)
    sample = [row for row, is_in in zip(collected, in_sample, strict=True) if is_in]
    cells = make_cells(run.matched_counts())
    set_turns(sample, cells, run.similarities)
    thumbnails = add_thumbnails(collected, images, config)
    content = describe_run(run.profile) | describe_choice(choice, run) | {
        "further": [{"name": column.name, "meaning": column.meaning, "type": column.type} for column in run.further_columns],
        "cells": describe_cells(cells),
        "proof": describe_proof(cells),
        "strata": SAMPLE_BINS,
        "run": run.plan.fingerprint,
        "sample": [row.for_page() for row in sample],
        "examples": describe_examples(examples, {row.row: row for row in collected}),
        "thumbnails": thumbnails,
        "failures": describe_failures(failures, run.profile["failed"]),
        "notes": tell_notes(len(sample), choice.scored),
    }
    with output_disk(path), atomic_file(path) as file:
        file.write(render_page(content))
