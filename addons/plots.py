"""Memory over time: sampled by a thread while the run is at work, drawn as memory-time.png at its end."""
import io
import itertools
import threading
import time
from collections.abc import Callable
from typing import BinaryIO

import psutil

MAX_SAMPLES = 2000


class MemoryCurve(threading.Thread):
    """Samples (seconds, RSS MiB, GPU MiB, stage) from its making on; thins itself out, to stay small however long the run."""

    def __init__(self, gpu_mib: Callable[[], float], stage: Callable[[], str]) -> None:
        super().__init__(daemon=True)
        self.samples: list[tuple[float, float, float, str]] = []
        self._gpu_mib, self._stage = gpu_mib, stage
        self._stopped, self._every_s = threading.Event(), 0.05
        self.start()

    def run(self) -> None:
        """Sample until `stop`."""
        process, begun = psutil.Process(), time.monotonic()
        while not self._stopped.wait(self._every_s):
            rss_mib = process.memory_info().rss / 2**20
            self.samples.append((time.monotonic() - begun, rss_mib, self._gpu_mib(), self._stage()))
            if len(self.samples) >= MAX_SAMPLES:
                del self.samples[::2]
                self._every_s *= 2

    def stop(self) -> None:
        """End the thread and wait for it."""
        self._stopped.set()
        self.join()

    def png(self, say: Callable[[str], None]) -> bytes:
        """The samples drawn as a PNG; empty where there are too few, or where matplotlib is missing, which it says."""
        picture = io.BytesIO()
        try:
            if len(self.samples) > 1:
                draw_memory(self.samples, picture)
        except ImportError as error:
            say(f"no memory-time.png: {error}")
        return picture.getvalue()


def draw_memory(samples: list[tuple[float, float, float, str]], file: BinaryIO) -> None:
    """Draw (seconds, RSS MiB, GPU MiB, stage) samples as a PNG: the curves, with the main thread's stage as a band below."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    times, rss, gpu = ([float(sample[i]) for sample in samples] for i in range(3))
    stages = list(dict.fromkeys(sample[3] for sample in samples))
    colours = dict(zip(stages, itertools.cycle(plt.colormaps["tab10"].colors), strict=False))  # type: ignore[attr-defined]
    figure, (axes, band) = plt.subplots(2, 1, sharex=True, figsize=(9, 4.5), height_ratios=(8, 1), layout="constrained")
    axes.plot(times, rss, label="RAM", color="tab:blue")
    if max(gpu) > 0:
        axes.plot(times, gpu, label="GPU memory", color="tab:green")
        axes.legend()
    axes.set_ylabel("MiB")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.set_title(f"memory over time, peak {max(rss):,.0f} MiB RAM" + (f", {max(gpu):,.0f} MiB GPU" if max(gpu) > 0 else ""))
    for (start, *_, stage), (stop, *_rest) in itertools.pairwise(samples):
        band.axvspan(start, stop, color=colours[stage], linewidth=0)
    band.set_yticks([])
    band.set_ylabel("stage", rotation=0, ha="right", va="center")
    band.set_xlabel("seconds")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colours[s]) for s in stages]
    figure.legend(handles, stages, loc="outside lower center", ncols=min(5, len(stages)), frameon=False)
    figure.savefig(file, format="png", dpi=110)
    plt.close(figure)
