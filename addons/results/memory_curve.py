"""Memory over time: sampled by a thread while the run is at work, drawn as memory-time.png at its end."""
import io
import itertools
import threading
import time
import typing

import psutil

from image_text_sim_clip import Clock, gpu_memory_mib, say

if typing.TYPE_CHECKING:
    from matplotlib.axes import Axes

FIRST_INTERVAL_S = 0.05
MAX_SAMPLES = 2000


class Sample(typing.NamedTuple):
    """Memory at one moment: seconds since the curve began, MiB of RAM and of GPU memory, and the main thread's stage."""

    seconds: float
    rss_mib: float
    gpu_mib: float
    stage: str


class MemoryCurve(threading.Thread):
    """Samples memory from its making until `stop`; thins itself out, so that it stays small however long the run."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(daemon=True)
        self.samples: list[Sample] = []
        self._clock = clock
        self._stopped = threading.Event()
        self._every_s = FIRST_INTERVAL_S
        self.start()

    def run(self) -> None:
        """Sample until `stop`."""
        process = psutil.Process()
        began = time.monotonic()
        while not self._stopped.wait(self._every_s):
            rss_mib = process.memory_info().rss / 2**20
            self.samples.append(Sample(time.monotonic() - began, rss_mib, gpu_memory_mib(), self._clock.now))
            if len(self.samples) >= MAX_SAMPLES:
                del self.samples[::2]
                self._every_s *= 2

    def stop(self) -> None:
        """End the thread and wait for it."""
        self._stopped.set()
        self.join()

    def png(self) -> bytes:
        """The samples drawn as a PNG; empty where there are too few, or where matplotlib is missing, which it says."""
        if len(self.samples) < 2:
            return b""
        drawing = io.BytesIO()
        try:
            draw_memory(self.samples, drawing)
        except ImportError as error:
            say(f"no memory-time.png: {error}")
        return drawing.getvalue()


def draw_memory(samples: list[Sample], file: typing.BinaryIO) -> None:
    """Draw at least two samples as a PNG: the curves, and below them the main thread's stages as a band of colours."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, (axes, band) = plt.subplots(2, 1, sharex=True, figsize=(9, 4.5), height_ratios=(8, 1), layout="constrained")
    draw_curves(axes, samples)
    palette = itertools.cycle(plt.colormaps["tab10"].colors)  # type: ignore[attr-defined]
    colours = dict(zip(dict.fromkeys(sample.stage for sample in samples), palette, strict=False))
    for sample, following in itertools.pairwise(samples):
        band.axvspan(sample.seconds, following.seconds, color=colours[sample.stage], linewidth=0)
    band.set_yticks([])
    band.set_ylabel("stage", rotation=0, ha="right", va="center")
    band.set_xlabel("seconds")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in colours.values()]
    figure.legend(handles, list(colours), loc="outside lower center", ncols=min(5, len(colours)), frameon=False)
    figure.savefig(file, format="png", dpi=110)
    plt.close(figure)


def draw_curves(axes: "Axes", samples: list[Sample]) -> None:
    """Plot RAM, and GPU memory where any was used, in MiB over seconds; the title tells the peaks."""
    times = [sample.seconds for sample in samples]
    rss = [sample.rss_mib for sample in samples]
    gpu = [sample.gpu_mib for sample in samples]
    title = f"memory over time, peak {max(rss):,.0f} MiB RAM"
    axes.plot(times, rss, label="RAM", color="tab:blue")
    if max(gpu) > 0:
        axes.plot(times, gpu, label="GPU memory", color="tab:green")
        axes.legend()
        title += f", {max(gpu):,.0f} MiB GPU"
    axes.set_ylabel("MiB")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.set_title(title)
