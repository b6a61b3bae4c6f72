"""`batch_size: auto` on a GPU: the smallest batch that is nearly as fast as the fastest one that fits, found once.

On the CPU there is nothing to find: with one arithmetic thread per core, batches of 8 to 64 pictures of ViT-B/32 differ by
less than their noise (`tests/bench_stages.py` prints them), so the script keeps its default there, and starts at once.
"""
import time
from collections.abc import Callable, Sequence
from typing import Any

CANDIDATES = (64, 128, 256, 512, 1024, 2048)
GOOD_ENOUGH = 0.97  # of the best rate: a smaller batch leaves memory to others, and waits less at a partition's edges
SHARE_OF_FREE_MEMORY = 0.6  # the rest is for the longest captions, the batch that is on its way, and whoever shares the card
BUDGET_S = 10.0


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
        seen = list(rates.values())
        if now() - started > budget_s or (len(seen) > 2 and max(seen[-2:]) <= max(seen[:-2])):
            break
    return next((batch for batch, rate in rates.items() if rate >= GOOD_ENOUGH * max(rates.values())), candidates[0])


def tune(scorer: Any, say: Callable[[str], None]) -> int:
    """The batch size for a Scorer on CUDA: rates of its image encoder on ready pictures, within SHARE_OF_FREE_MEMORY."""
    import torch
    height, width = scorer.settings.crop or scorer.settings.resized(1, 1)
    allowed = SHARE_OF_FREE_MEMORY * torch.cuda.mem_get_info()[0]

    def rate_of(batch: int) -> float | None:
        pixels = torch.zeros(batch, 3, height, width, dtype=torch.uint8).pin_memory()
        scorer.batch_size = batch
        before, halvings = torch.cuda.memory_allocated(), scorer.oom_halvings
        torch.cuda.reset_peak_memory_stats()
        scorer.encode_images(pixels)  # the first call chooses kernels; each waits for its result
        started, rounds = time.perf_counter(), 0
        while rounds < 3 or time.perf_counter() - started < 0.3:
            scorer.encode_images(pixels)
            rounds += 1
        if scorer.oom_halvings > halvings or torch.cuda.max_memory_allocated() - before > allowed:
            scorer.oom_halvings = halvings
            return None
        return rounds * batch / (time.perf_counter() - started)

    batch = choose_batch(rate_of)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    say(f"batch_size: {batch}")
    return batch
