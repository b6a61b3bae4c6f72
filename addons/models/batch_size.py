"""`batch_size: auto` on a GPU: the smallest batch that is nearly as fast as the fastest one that fits, found once.

On the CPU there is nothing to find: with one arithmetic thread per core, batches of 8 to 64 images of ViT-B/32 differ by
less than their noise (`tests/bench_stages.py` prints them), so the script keeps its default there, and starts at once.
"""
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from image_text_sim_clip import Json, Scorer, say

CANDIDATES = (64, 128, 256, 512, 1024, 2048)
GOOD_ENOUGH = 0.97  # of the best rate: a smaller batch leaves memory to others, and waits less at a partition's edges
SHARE_OF_FREE_MEMORY = 0.6  # the rest is for the longest captions, the batch that is on its way, and whoever shares the GPU
BUDGET_S = 10.0
FEWEST_ROUNDS = 3  # of one batch, and
SHORTEST_S = 0.3  # seconds that they must take together


def choose_batch(rate_of: Callable[[int], float | None], candidates: Sequence[int] = CANDIDATES,
                 budget_s: float = BUDGET_S, now: Callable[[], float] = time.perf_counter) -> int:
    """The smallest of `candidates` (ascending) whose rate is GOOD_ENOUGH of the best.

    `rate_of(batch)` measures items/s, or gives None where the batch does not fit; larger ones are not tried then, nor when
    the last two candidates brought nothing, nor when `budget_s` seconds are over. Without any that fits: the smallest.
    """
    rates: dict[int, float] = {}
    started = now()
    for batch in candidates:
        rate = rate_of(batch)
        if rate is None:
            break
        rates[batch] = rate
        if now() - started > budget_s or _has_stopped_rising(list(rates.values())):
            break
    for batch, rate in rates.items():
        if rate >= GOOD_ENOUGH * max(rates.values()):
            return batch
    return candidates[0]


def _has_stopped_rising(rates: list[float]) -> bool:
    """Whether the last two of more than two rates are no better than those before."""
    return len(rates) > 2 and max(rates[-2:]) <= max(rates[:-2])


def find_batch_size(scorer: Scorer) -> int:
    """The batch size for this GPU and its free memory; on the CPU, where it hardly matters, the default.

    Of several models the smallest of what each is given on its own, as all take the same batches.
    """
    if scorer.device != "cuda":
        return scorer.batch_size
    from addons.models.several import SeveralScorer
    further = scorer.further.values() if isinstance(scorer, SeveralScorer) else ()
    return min(map(search_batch_size, (scorer, *further)))


def search_batch_size(scorer: Scorer) -> int:
    """The batch size for a Scorer on CUDA: rates of its image encoder on ready images, within SHARE_OF_FREE_MEMORY."""
    allowed_bytes = SHARE_OF_FREE_MEMORY * torch.cuda.mem_get_info()[0]
    batch = choose_batch(lambda size: _measure_rate(scorer, size, allowed_bytes))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    say(f"batch_size: {batch}")
    return batch


def _measure_rate(scorer: Scorer, batch: int, allowed_bytes: float) -> float | None:
    """Images/s of the scorer's image encoder in batches of this size; None where that takes more memory than is allowed."""
    height, width = scorer.settings.crop or scorer.settings.resized(1, 1)
    pixels = scorer.stack([np.zeros((3, height, width), np.uint8)] * batch)
    scorer.batch_size = batch
    bytes_before = torch.cuda.memory_allocated()
    halvings_before = scorer.oom_halvings
    torch.cuda.reset_peak_memory_stats()
    scorer.encode_images(pixels)  # the first call chooses kernels; each waits for its result
    rounds = 0
    started = time.perf_counter()
    while rounds < FEWEST_ROUNDS or time.perf_counter() - started < SHORTEST_S:
        scorer.encode_images(pixels)
        rounds += 1
    took_s = time.perf_counter() - started
    has_halved = scorer.oom_halvings > halvings_before
    if has_halved or torch.cuda.max_memory_allocated() - bytes_before > allowed_bytes:
        scorer.oom_halvings = halvings_before
        return None
    return rounds * batch / took_s


def settle_batch_size(scorer: Scorer, recorded: Json, may_change: bool) -> None:
    """Take the batch size that was found before; unless there is none, or `may_change` and the model or device is another."""
    own = scorer.batch_size
    if "batch_size" in recorded:
        scorer.batch_size = recorded["batch_size"]
        is_same = scorer.identity() | {"libraries": None} == recorded | {"libraries": None}
        if not may_change or is_same:
            return
    scorer.batch_size = own
    scorer.batch_size = find_batch_size(scorer)
