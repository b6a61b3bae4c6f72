"""The plots next to kept.csv: both distributions with the chosen cut, throughput and memory of the scoring run."""
import warnings
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from image_text_sim_clip import Column

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike

MATCHED = "#2563b8"
RANDOM = "#c26a00"
CUT = "#1d2733"
MOST_BARS = 100
MOST_CHARS = 90  # of a title


def _make_axes(height: float) -> "tuple[Figure, Axes]":
    """A plot nine inches wide; ImportError without matplotlib."""
    import matplotlib
    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # the prompts of labels are titles: a $ in them is a dollar
    import matplotlib.pyplot as plt
    return plt.subplots(figsize=(9, height), layout="constrained")


def _save(figure: "Figure", axes: "Axes", file: BinaryIO) -> None:
    import matplotlib.pyplot as plt
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    axes.grid(alpha=0.25)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a prompt in a script that the font has not: boxes, and no noise
        figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
    plt.close(figure)


def shorten(text: str) -> str:
    """What fits a plot's width."""
    return text if len(text) <= MOST_CHARS else text[:MOST_CHARS - 1] + "…"


def draw_scores(matched: np.ndarray, random: np.ndarray | None, edges: np.ndarray, cut: float | None, title: str,
                file: BinaryIO) -> None:
    """Draw the matched and random histograms, counts (BINS,) over `edges` (BINS + 1,), as shares, with the chosen cut.

    `random` may be None, and so may `cut`, a similarity; `title` says what is kept.
    """
    figure, axes = _make_axes(4.2)
    occupied = np.flatnonzero(matched if random is None else matched + random)
    first = int(occupied[0]) if len(occupied) else 0
    stop = int(occupied[-1]) + 1 if len(occupied) else len(matched)
    bars = np.unique(np.linspace(first, stop, min(stop - first, MOST_BARS) + 1).astype(int))  # bin numbers where bars meet
    if random is not None:
        _draw_histogram(axes, random, edges, bars, "random pairs", RANDOM)
    _draw_histogram(axes, matched, edges, bars, "this table's pairs", MATCHED)
    if cut is not None:
        axes.axvline(cut, color=CUT, linewidth=1.8, label=f"cut at {cut:.4f}")
    axes.set(xlabel="similarity (cosine)", ylabel="density", title=title)
    _save(figure, axes, file)


def _draw_histogram(axes: "Axes", counts: np.ndarray, edges: np.ndarray, bars: np.ndarray, label: str, colour: str) -> None:
    """Draw counts (BINS,) as a density, in bars that reach from bin bars[i] to bars[i + 1]."""
    if not counts.sum():
        return
    heights = np.add.reduceat(counts, bars[:-1]) / counts.sum() / np.diff(edges[bars])
    axes.stairs(heights, edges[bars], fill=True, color=colour, alpha=0.3)
    axes.stairs(heights, edges[bars], color=colour, linewidth=1.5, label=label)


def draw_measure(pieces: Callable[[], Iterable[tuple[np.ndarray, np.ndarray]]], limits: list[float], column: Column,
                 file: BinaryIO) -> None:
    """Draw the distribution of a measure's column, of all rows and of those kept, with the `limits` that rules set.

    `pieces()` gives the values (n,) of rows that follow each other, NaN for none, and which are kept; it is called twice.
    """
    low = np.inf
    high = -np.inf
    for values, _ in pieces():
        present = values[np.isfinite(values)]
        low = min(low, float(present.min(initial=np.inf)))
        high = max(high, float(present.max(initial=-np.inf)))
    if low > high:  # no row has a value
        low = 0.0
        high = 1.0
    edges = np.linspace(low, max(high, np.nextafter(np.float32(low), np.float32(np.inf))), MOST_BARS + 1)
    everything = np.zeros(MOST_BARS, np.int64)
    kept = np.zeros(MOST_BARS, np.int64)
    for values, is_kept in pieces():
        is_there = np.isfinite(values)
        everything += np.histogram(values[is_there], edges)[0]
        kept += np.histogram(values[is_there & is_kept], edges)[0]
    figure, axes = _make_axes(3.4)
    axes.stairs(everything, edges, fill=True, color=RANDOM, alpha=0.3, label=f"all rows ({everything.sum():,})")
    axes.stairs(kept, edges, fill=True, color=MATCHED, alpha=0.6, label=f"kept ({kept.sum():,})")
    for limit in limits:
        axes.axvline(limit, color=CUT, linewidth=1.8, label=f"cut at {limit:g}")
    axes.set(xlabel=shorten(column.name), ylabel="rows", title=shorten(column.meaning))
    _save(figure, axes, file)


def draw_throughput(rows: "ArrayLike", seconds: "ArrayLike", file: BinaryIO) -> None:
    """Draw pairs per second of each part against the rows done, both (parts,); a part of 0 s has no known rate."""
    figure, axes = _make_axes(3.4)
    counts = np.asarray(rows, np.float64)
    durations = np.asarray(seconds, np.float64)
    is_known = durations > 0
    rates = np.divide(counts, durations, out=np.zeros(len(counts)), where=is_known)
    rows_done = np.concatenate([[0], np.cumsum(counts)])
    axes.stairs(rates, rows_done, color=MATCHED, linewidth=1.8, fill=True, alpha=0.35)
    if is_known.any():
        mean = counts[is_known].sum() / durations[is_known].sum()
        axes.axhline(mean, color=CUT, linewidth=1.2, linestyle="--", label=f"whole run: {mean:,.1f} pairs/s")
    axes.set(xlabel="rows done", ylabel="pairs/s", title="throughput, part by part", ylim=(0, None),
             xlim=(0, max(rows_done[-1], 1)))
    _save(figure, axes, file)


def draw_memory_peaks(rows: "ArrayLike", rss_mib: "ArrayLike", gpu_mib: "ArrayLike", file: BinaryIO) -> None:
    """Draw the peak memory (MiB) that each part recorded against the rows done, all (parts,)."""
    figure, axes = _make_axes(3.4)
    rows_done = np.cumsum(np.asarray(rows, np.int64))
    axes.plot(rows_done, rss_mib, color=MATCHED, marker=".", label="RAM")
    if np.max(gpu_mib, initial=0.0) > 0:
        axes.plot(rows_done, gpu_mib, color=RANDOM, marker=".", label="GPU memory")
    axes.set(xlabel="rows done", ylabel="MiB", title="peak memory so far, part by part", ylim=(0, None))
    _save(figure, axes, file)
