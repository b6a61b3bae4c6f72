"""The review page: one HTML file that opens from the disk and shows what a threshold keeps and what it costs.

All numbers on it are of the whole table: histograms with RESOLUTION-wide bins, from which the page counts exactly how many
rows reach a bin's edge, so the slider moves from edge to edge. Only the pairs shown are a sample, chosen by `choose_sample`.

Captions, URLs and details come from strangers. They travel as JSON in which <, > and & are escaped, so that no text can
end the element it stands in, and reach the page as text nodes. A Content-Security-Policy with the hashes of the page's own
script and style lets nothing else run and nothing be fetched; pictures are data: URLs of thumbnails made here.
"""
import base64
import hashlib
import io
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

TEMPLATE = pathlib.Path(__file__).with_name("review.html")
SAMPLE_BINS = 256  # over [-1, 1]: the sample takes equally many rows of each, as far as there are as many
FAILURE_EXAMPLES = 24  # of each status
THUMBNAIL_PX = 160
CAPTION_CHARS, URL_CHARS = 1000, 300  # shown of each


# ── Which rows are shown ──────────────────────────────────────────────────────────────────────────────────────────────

def share_out(counts: Any, wanted: int) -> Any:
    """How many to take of each bin, int64: equally many of each, all of a small one, `wanted` together (or all there are)."""
    low, high = 0, int(counts.max(initial=0))
    while low < high:  # the largest equal share that does not exceed `wanted`
        middle = (low + high + 1) // 2
        low, high = (middle, high) if np.minimum(counts, middle).sum() <= wanted else (low, middle - 1)
    quotas = np.minimum(counts, low)
    for place in np.flatnonzero(counts > quotas)[:wanted - int(quotas.sum())]:
        quotas[place] += 1
    return quotas


def scatter(rows: Any) -> Any:
    """Row numbers -> numbers without any order, uint64, always the same ones: the finaliser of splitmix64."""
    mixed = np.asarray(rows, np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))


def choose_sample(similarities: Callable[[], Iterable[Any]], wanted: int) -> Any:
    """Row numbers, int64 ascending, of `wanted` scored rows spread evenly over the range of scores.

    `similarities()` gives all rows' in input order, float32 arrays with NaN for none, twice. Within a bin the rows with the
    smallest scattered number are taken, so the sample is the same in every run and in no way chosen by its content.
    """
    counts = np.zeros(SAMPLE_BINS, np.int64)
    for chunk in similarities():
        counts += np.bincount(_sample_bins(chunk[~np.isnan(chunk)]), minlength=SAMPLE_BINS)
    quotas, first_row = share_out(counts, wanted), 0
    rows = bins = np.empty(0, np.int64)
    for chunk in similarities():
        scored = np.flatnonzero(~np.isnan(chunk))
        rows, bins = np.concatenate([rows, first_row + scored]), np.concatenate([bins, _sample_bins(chunk[scored])])
        order = np.lexsort((scatter(rows), bins))
        starts = np.searchsorted(bins[order], bins[order])  # where each one's bin begins
        best = order[np.arange(len(order)) - starts < quotas[bins[order]]]
        rows, bins, first_row = rows[best], bins[best], first_row + len(chunk)
    return np.sort(rows)


def _sample_bins(similarities: Any) -> Any:
    return np.clip((similarities + 1) * (SAMPLE_BINS / 2), 0, SAMPLE_BINS - 1).astype(np.int64)


def collect_rows(chunks: Iterable[tuple[int, Any, Any]], chosen: Any, source_name: str, caption_name: str,
                 rules: tuple[str, ...], locate: Callable[[int, Any], list[str]]) -> tuple[list[dict], dict[str, list[dict]]]:
    """The chosen rows, and up to FAILURE_EXAMPLES rows of each status but ok, as the page's objects.

    `chunks` yields (first row, pyarrow table as in scores.csv, verdicts uint8); `rules` names the verdicts; `locate` gives
    the source of each row's picture in such a chunk.
    """
    sample: list[dict] = []
    failures: dict[str, list[dict]] = {}
    for first_row, table, verdicts in chunks:
        statuses = table["status"].to_pylist()
        inside = chosen[(chosen >= first_row) & (chosen < first_row + table.num_rows)] - first_row
        failed = []
        for place, status in enumerate(statuses):
            if status != "ok" and len(found := failures.setdefault(status, [])) < FAILURE_EXAMPLES:
                found.append({})  # its place; filled below
                failed.append((place, status, len(found) - 1))
        places = [*inside.tolist(), *(place for place, *_ in failed)]
        sources = locate(first_row, table) if places else []
        columns = [table[name].take(places).to_pylist()
                   for name in ("similarity", source_name, caption_name, "status", "detail")]
        made = [{"row": first_row + place, "similarity": similarity, "url": url[:URL_CHARS], "source": sources[place],
                 "caption": caption[:CAPTION_CHARS] + ("…" if len(caption) > CAPTION_CHARS else ""), "status": status,
                 "detail": detail, "rule": rules[verdicts[place]], "thumbnail": None}
                for place, similarity, url, caption, status, detail in zip(places, *columns, strict=True)]
        sample += made[:len(inside)]
        for (_, status, number), row in zip(failed, made[len(inside):], strict=True):
            failures[status][number] = row
    return sample, failures


def add_thumbnails(rows: list[dict], load: Callable[[list[str]], Iterator[bytes | Exception]],
                   decode: Callable[[bytes], Any], unreadable: type[Exception]) -> list[str]:
    """Make a thumbnail of each picture that the rows show, once; set their `thumbnail` to its number. Returns data: URLs."""
    thumbnails: list[str] = []
    number_of: dict[str, int] = {}
    sources = list(dict.fromkeys(row["source"] for row in rows))
    for source, data in zip(sources, load(sources), strict=True):
        if isinstance(data, Exception):
            continue
        try:
            picture = decode(data)
        except unreadable:
            continue
        picture.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
        encoded = io.BytesIO()
        picture.save(encoded, "WEBP", quality=70)
        number_of[source] = len(thumbnails)
        thumbnails.append("data:image/webp;base64," + base64.b64encode(encoded.getvalue()).decode())
    for row in rows:
        row["thumbnail"] = number_of.get(row["source"])
    return thumbnails


# ── The page ──────────────────────────────────────────────────────────────────────────────────────────────────────────

def pack_histogram(counts: Any) -> dict:
    """Counts per bin (BINS,) without the empty ends."""
    occupied = np.flatnonzero(counts)
    first, last = (int(occupied[0]), int(occupied[-1]) + 1) if len(occupied) else (0, 0)
    return {"first": first, "counts": counts[first:last].tolist()}


def embed_json(content: dict) -> str:
    """JSON that may stand inside a <script> element: no caption can close it, open a comment or end a line of script."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode("utf-8", "replace").decode()  # a lone surrogate is no UTF-8


def render_page(content: dict) -> bytes:
    """The template with `content` in it and a policy that allows its own script and style and nothing else."""
    page = TEMPLATE.read_text(encoding="utf-8")

    def hash_of(element: str) -> str:
        found = re.search(rf"<{element}>(.*?)</{element}>", page, re.S)
        assert found
        return "'sha256-" + base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode() + "'"
    policy = f"default-src 'none'; img-src data:; script-src {hash_of('script')}; style-src {hash_of('style')}; " \
             "base-uri 'none'; form-action 'none'"
    before, after = page.replace("{{CSP}}", policy).split("{{DATA}}")
    return (before + embed_json(content) + after).encode()


def describe_run(profile: dict, wall_title: str) -> dict[str, Any]:
    """The page's facts, stages and memory, from profile.json."""
    failed = sum(profile["failed"].values())
    facts = [["pairs", f"{profile['rows']:,}"], ["scored", f"{profile['scored']:,}"], ["without a score", f"{failed:,}"],
             ["malformed lines", f"{profile['malformed']:,}"]]
    if profile.get("mean_similarity") is not None:
        facts.append(["mean similarity", f"{profile['mean_similarity']:.4f}"])
    if null := profile.get("null"):
        facts.append(["random pairs, mean ± sd", f"{null['mean']:.4f} ± {null['sd']:.4f}"])
    memory = f"Peaks: {profile['peak_rss_mib']:,.0f} MiB RAM, {profile['peak_gpu_mib']:,.0f} MiB GPU memory. " \
             f"{profile['pairs_per_s']:,.1f} pairs/s, {profile['wall_s']:,.1f} s in all" \
             + (f", limited by {profile['bottleneck']}." if profile.get("bottleneck") else ".")
    times = profile.get("seconds_per_pair", {"stages": {}})  # the script alone, without its addons, records none
    stages = [[name, seconds] for name, seconds in times["stages"].items()]
    return {"title": wall_title, "facts": facts, "stages": stages, "memory_text": memory}
