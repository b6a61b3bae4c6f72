"""Pictures beside kept.csv: both distributions with the chosen cut, throughput and memory of the scoring run."""
from typing import Any, BinaryIO

import numpy as np

MATCHED, RANDOM, CUT = "#2563b8", "#c26a00", "#1d2733"


def _axes(height: float = 4.2) -> tuple[Any, Any]:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt.subplots(figsize=(9, height), layout="constrained")


def _save(figure: Any, file: BinaryIO) -> None:
    import matplotlib.pyplot as plt
    figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
    plt.close(figure)


def draw_scores(matched: Any, random: Any | None, edges: Any, cut: float | None, cut_text: str, file: BinaryIO) -> None:
    """Draw the matched and random histograms, counts (BINS,) over `edges` (BINS + 1,), as shares, with the chosen cut.

    `random` may be None, and so may `cut`, a similarity; `cut_text` says in the title what is kept.
    """
    figure, axes = _axes()
    occupied = np.flatnonzero(matched + (random if random is not None else 0))
    first, last = (int(occupied[0]), int(occupied[-1]) + 1) if len(occupied) else (0, len(matched))
    bars = np.unique(np.linspace(first, last, min(last - first, 100) + 1).astype(int))  # bin numbers at which bars meet
    for counts, name, colour in ((random, "random pairs", RANDOM), (matched, "this table's pairs", MATCHED)):
        if counts is None or not counts.sum():
            continue
        heights = np.add.reduceat(counts, bars[:-1]) / counts.sum() / np.diff(edges[bars])
        axes.stairs(heights, edges[bars], fill=True, color=colour, alpha=0.3)
        axes.stairs(heights, edges[bars], color=colour, linewidth=1.5, label=name)
    if cut is not None:
        axes.axvline(cut, color=CUT, linewidth=1.8, label=f"cut at {cut:.4f}")
    axes.set(xlabel="similarity (cosine)", ylabel="density", title=cut_text)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    axes.grid(alpha=0.25)
    _save(figure, file)


def draw_throughput(rows: Any, seconds: Any, file: BinaryIO) -> None:
    """Draw pairs per second of each part against the rows done, both (parts,)."""
    figure, axes = _axes(3.4)
    done, rate = np.concatenate([[0], np.cumsum(rows)]), np.asarray(rows) / np.maximum(np.asarray(seconds), 1e-9)
    axes.stairs(rate, done, color=MATCHED, linewidth=1.8, fill=True, alpha=0.35)
    mean = np.sum(rows) / max(np.sum(seconds), 1e-9)
    axes.axhline(mean, color=CUT, linewidth=1.2, linestyle="--", label=f"whole run: {mean:,.1f} pairs/s")
    axes.set(xlabel="rows done", ylabel="pairs/s", title="throughput, part by part", ylim=(0, None), xlim=(0, max(done[-1], 1)))
    axes.legend(frameon=False)
    axes.grid(alpha=0.25)
    _save(figure, file)


def draw_memory_peaks(rows: Any, rss_mib: Any, gpu_mib: Any, file: BinaryIO) -> None:
    """Draw the peak memory (MiB) that each part recorded against the rows done, all (parts,)."""
    figure, axes = _axes(3.4)
    done = np.cumsum(rows)
    axes.plot(done, rss_mib, color=MATCHED, marker=".", label="RAM")
    if np.max(gpu_mib, initial=0.0) > 0:
        axes.plot(done, gpu_mib, color=RANDOM, marker=".", label="GPU memory")
    axes.set(xlabel="rows done", ylabel="MiB", title="peak memory so far, part by part", ylim=(0, None))
    axes.legend(frameon=False)
    axes.grid(alpha=0.25)
    _save(figure, file)
