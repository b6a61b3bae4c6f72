"""A cut proved on marked pairs: how far down the rows fit as often as asked, whatever the model's numbers mean.

**What is marked.** Each scored row fits or does not; a person has marked some. The scores are cut into cells of fixed shares of
the rows (`make_cells`), the strata. Within a cell the page asks for rows in the scattered order of their numbers, so a
cell's marks are a random sample of its rows without replacement; only marks within that order count, so nobody can pick what
is easy. How large the sampled share of a cell is may differ from cell to cell and may depend on all marks so far. Nothing
is assumed about how the truth depends on the score. `unsure` counts against what is to be proved.

**Null hypothesis** H(t) of a threshold t: the wanted share is not reached. With F_h fitting rows in cell h, that is
sum(a_h F_h) <= b. Precision, fewer than p of the rows above t fit: a_h = 1 above t, b = ceil(p x rows above) - 1. Recall, fewer
than r of the fitting rows lie above: a_h = 1 - r above t and -r below, b = 0.

**Evidence.** Under one allocation (F_h) that H(t) allows, the next row of cell h fits with the known chance
q = (F_h - fits so far) / (N_h - marks so far). A bet multiplies its stake by e^l / (1 + q (e^l - 1)) if the row fits and by
1 / (1 + q (e^l - 1)) if not, with l = size x a_h: its expectation is 1, whichever cell is asked next and whenever marking
stops, so the stake ever reaches 1 / error with probability `error` at most (Ville 1939). What counts is the smallest stake
over all allocations that H(t) allows, hence it holds whichever is true. It is never found too high: log(1 + q d) is concave in
F_h, Jensen's inequality bounds the sum over a cell's marks, and Lagrange's dual, for which any multiplier is valid, the
maximum over allocations. The mean over bets of several sizes (BETS) is such a bet too. There is no approximation that needs
many marks; it holds for 20 rows as for 20 million, and the page may show it after each mark.

**The threshold that is chosen.** Thresholds are tested in an order that depends on the scores alone: precision from the top
down, recall from the bottom up. H(t) is tested with the error set aside for t (`Cells.errors`, together ERROR_RATE) plus the
error with which the threshold before it was rejected. The farthest one rejected is the cut. The probability of rejecting
any true H(t) is ERROR_RATE at most (the fallback procedure: Wiens 2003; with all error at the first threshold it is testing in
a fixed sequence: Maurer, Hothorn and Lehmacher 1995, as in "Learn then Test", Angelopoulos et al. 2021). Error is set
aside at a few thresholds, because near the top there are few rows, and a single pair that does not fit would end it there.

Sources of the bets: Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting" (2024), without
replacement; over the strata's allocations: Wendell and Schmee, "Exact inference for proportions from a stratified finite
population" (1996), Spertus and Stark, "Sweeter than SUITE" (2022).
"""
import dataclasses
import math

import numpy as np

from addons.measures.random_pairs import BINS, EDGES

ERROR_RATE = 0.05
LABELS = {"fits": 1, "does_not_fit": 0, "unsure": -1}
# Shares of the scored rows, from the top, at which cells end; and how much of the error is set aside for some of them.
SHARES = (0.02, 0.035, 0.05, 0.075, 0.1, 0.15, *(step / 20 for step in range(4, 21)))
PRECISION_ERRORS = {0.02: 0.05, 0.05: 0.1, 0.1: 0.15, 0.2: 0.2, 0.35: 0.5}
RECALL_ERRORS = {0.95: 0.5, 0.8: 0.3, 0.6: 0.2}
BETS = {2.0: 0.3, 1.0: 0.7}  # size: weight; the first needs fewer marks where all fit
MULTIPLIER_STEPS = 40  # halvings of the range of the multiplier's logarithm


# ── Cells ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

@dataclasses.dataclass(frozen=True)
class Cells:
    """The strata, the best first: cell h holds the rows from `lower[h]` up to the cell before.

    `lower` (H,) int64 are bins of the histogram, whose lower edges are the thresholds; `rows` (H,) int64 how many rows each
    cell holds; `precision_errors`, `recall_errors` (H,) the shares of ERROR_RATE set aside for the threshold beneath each.
    """

    lower: np.ndarray
    rows: np.ndarray
    precision_errors: np.ndarray
    recall_errors: np.ndarray

    def find(self, similarities: np.ndarray) -> np.ndarray:
        """The cell of each similarity (n,), which is none below the lowest cell: int64 (n,)."""
        bins = np.clip(np.floor(np.asarray(similarities, np.float64) * (BINS / 2)) + BINS // 2, 0, BINS - 1)
        return np.searchsorted(-self.lower, -bins.astype(np.int64))

    def threshold(self, cell: int) -> float:
        """The lowest similarity that can be in the cell."""
        return float(EDGES[self.lower[cell]])

    def tell_range(self, cell: int) -> str:
        """Which similarities the cell holds, for people."""
        if not cell:
            return f"above {self.threshold(0):.4f}"
        return f"between {self.threshold(cell):.4f} and {self.threshold(cell - 1):.4f}"


def make_cells(counts: np.ndarray) -> Cells:
    """Cells of a histogram, `counts` (BINS,) of all scored rows: they end where SHARES of the rows are reached."""
    reaching = np.cumsum(counts[::-1])[::-1]
    occupied = np.flatnonzero(counts)
    total = int(counts.sum())
    lower: list[int] = []
    errors: list[list[float]] = []
    for share in SHARES:
        wanted = occupied[reaching[occupied] >= min(share * total, total)]
        if not len(wanted):
            break
        aside = [PRECISION_ERRORS.get(share, 0.0), RECALL_ERRORS.get(share, 0.0)]
        if lower and lower[-1] == wanted[-1]:  # many rows with one score: the cell holds them all
            errors[-1] = [kept + more for kept, more in zip(errors[-1], aside, strict=True)]
        else:
            lower.append(int(wanted[-1]))
            errors.append(aside)
    ends = np.array(lower, np.int64)
    shares = np.array(errors, np.float64).reshape(-1, 2)
    return Cells(ends, np.diff(reaching[ends], prepend=0), shares[:, 0], shares[:, 1])


# Marks and bets ──────────────────────────────────────────────────────────────────────────────────────────────────────────

@dataclasses.dataclass(frozen=True)
class Marks:
    """Marked rows: their numbers in the input (n,) int64, what they were marked as (n,) int8, see LABELS, and the similarity
    that they had then (n,) float64, NaN where the file does not say."""

    rows: np.ndarray
    labels: np.ndarray
    similarities: np.ndarray

    def take(self, which: np.ndarray) -> "Marks":
        """Some of them, by bool (n,) or by places."""
        return Marks(self.rows[which], self.labels[which], self.similarities[which])


@dataclasses.dataclass(frozen=True)
class Counts:
    """What is known of each of H strata: rows, marks, marks that fit, all (H,) float64.

    `slope` and `offset` (H,) sum up the order of the marks: with F fitting rows in all, the mean over the marks of the chance
    that the next one fits, (F - fits before) / (rows - marks before), is slope x F - offset.
    """

    rows: np.ndarray
    marked: np.ndarray
    fitting: np.ndarray
    slope: np.ndarray
    offset: np.ndarray


def count_marks(rows: np.ndarray, strata: np.ndarray, fits: np.ndarray) -> Counts:
    """Counts of `rows` (H,), from the stratum (n,) and the truth (n,) bool of each mark, each stratum's in its order."""
    many = len(rows)
    order = np.argsort(strata, kind="stable")
    ordered = strata[order]
    fitting = fits[order].astype(np.float64)
    starts = np.searchsorted(ordered, ordered)  # where each one's stratum begins
    left = rows[ordered] - (np.arange(len(ordered)) - starts)
    before = np.cumsum(fitting) - fitting
    fits_before = before - before[starts]
    marked = np.bincount(ordered, minlength=many).astype(np.float64)
    most = np.maximum(marked, 1)
    return Counts(rows.astype(np.float64), marked, np.bincount(ordered, fitting, many),
                  np.bincount(ordered, 1 / left, many) / most, np.bincount(ordered, fits_before / left, many) / most)


def log_stake(counts: Counts, factors: np.ndarray, most: float) -> float:
    """The logarithm of the smallest mean stake over all allocations with sum(factors x fitting rows) <= `most`.

    `factors` (H,) are the a_h of the module's text, not 0. Infinite where no allocation that agrees with the marks is left.
    """
    fewest = counts.fitting
    highest = counts.rows - counts.marked + counts.fitting
    bound = np.where(factors > 0, fewest, highest)  # where the null hypothesis has the most room
    if float((factors * bound).sum()) > most:
        return math.inf
    sizes = np.array(list(BETS))[:, None] * factors  # (bets, H)
    has_marks = counts.marked > 0
    room = most - float((factors * bound)[~has_marks].sum())
    seen = Counts(*(column[has_marks] for column in dataclasses.astuple(counts)))
    best = _bound_growth(seen, factors[has_marks], sizes[:, has_marks], room)
    stakes = (sizes * counts.fitting).sum(axis=1) - best + np.log(list(BETS.values()))
    return float(np.logaddexp.reduce(stakes))


def _bound_growth(counts: Counts, factors: np.ndarray, sizes: np.ndarray, room: float) -> np.ndarray:
    """An upper bound, (bets,), on the sum of marked x log(1 + d (slope x F - offset)) over allocations F, d = exp(size) - 1."""
    fewest = counts.fitting
    highest = counts.rows - counts.marked + counts.fitting
    gains = np.expm1(sizes)
    shift = (1 - gains * counts.offset) / (gains * counts.slope)

    def allocate(multiplier: np.ndarray) -> np.ndarray:
        """Where the derivative equals multiplier x factors, within what the marks allow: (bets, H)."""
        return np.clip(counts.marked / (multiplier * factors) - shift, fewest, highest)

    low = np.full((len(sizes), 1), -40.0)
    high = np.full((len(sizes), 1), 40.0)
    for _ in range(MULTIPLIER_STEPS):
        middle = (low + high) / 2
        is_over = (allocate(np.exp(middle)) * factors).sum(axis=1, keepdims=True) > room
        low = np.where(is_over, middle, low)
        high = np.where(is_over, high, middle)
    multiplier = np.exp(high)
    allocation = allocate(multiplier)
    growth = (counts.marked * np.log1p(gains * (counts.slope * allocation - counts.offset))).sum(axis=1)
    slack: np.ndarray = multiplier[:, 0] * (room - (allocation * factors).sum(axis=1))
    return growth + slack


# ── The cut ───────────────────────────────────────────────────────────────────────────────────────────────────────────

@dataclasses.dataclass(frozen=True)
class Goal:
    """What is to be proved: at least `share` of the kept rows fit (precision), or of the fitting rows are kept (recall)."""

    kind: str
    share: float

    @property
    def key(self) -> str:
        """The key of the section `curate:` that asks for it."""
        return f"min_{self.kind}"

    def factors(self, cells: int, kept: int) -> np.ndarray:
        """The a_h of the module's text, (cells,) for recall and (kept,) for precision, when the first `kept` cells are kept."""
        if self.kind == "precision":
            return np.ones(kept)
        return np.where(np.arange(cells) < kept, 1 - self.share, -self.share)


@dataclasses.dataclass(frozen=True)
class Proof:
    """The cut: the first `kept` cells. `next_try` is the threshold beyond it that takes the fewest more marks, if any."""

    kept: int
    next_try: "Shortfall | None"


@dataclasses.dataclass(frozen=True)
class Shortfall:
    """Why the threshold beneath the first `kept` cells was not passed.

    `more`: how many more marks it would probably take, if they are as those so far, in the cell `cell` and the others that it
    needs; None where what is marked speaks against it.
    """

    kept: int
    more: int | None
    cell: int


def prove_cut(cells: Cells, sample: Marks, goal: Goal, at_random: bool = False) -> Proof | Shortfall:
    """Find the farthest threshold for which the goal is proved; a Shortfall where it is for none."""
    strata = cells.find(sample.similarities)
    is_recall = goal.kind == "recall"
    fits = sample.labels == LABELS["fits"]
    order = list(range(1, len(cells.rows) + 1))
    errors = cells.recall_errors if is_recall else cells.precision_errors
    if is_recall:
        order = order[-2::-1]  # the lowest threshold keeps everything
        # all of the fitting rows are all but half a row of them, and no a_h is 0
        goal = dataclasses.replace(goal, share=min(goal.share, 1 - 0.5 / float(cells.rows.sum())))
    best = len(cells.rows) if is_recall else 0
    failures: list[Shortfall] = []  # since the last threshold that was passed
    carried = 0.0
    for kept in order:
        error = ERROR_RATE * float(errors[kept - 1]) + carried
        carried = 0.0
        if not error:
            continue
        if is_recall:  # unsure: against it on either side
            fits = np.where(strata < kept, sample.labels == LABELS["fits"], sample.labels != LABELS["does_not_fit"])
        counts = _count_above(cells, strata, fits, kept, at_random, is_recall)
        factors = np.ones(1) if at_random and not is_recall else goal.factors(len(cells.rows), kept)
        most = 0.0 if is_recall else math.ceil(goal.share * float(counts.rows.sum()) - 1e-9) - 1
        evidence = log_stake(counts, factors, most)
        if evidence >= -math.log(error):
            carried = error
            best = kept
            failures.clear()
        else:
            failures.append(estimate_shortfall(counts, factors, most, -math.log(error), kept))
    hopeful = [failure for failure in failures if failure.more is not None]
    easiest = min(hopeful, key=lambda failure: failure.more or 0, default=failures[-1] if failures else None)
    if best == (len(cells.rows) if is_recall else 0) and easiest:
        return easiest
    return Proof(best, easiest)


def _count_above(cells: Cells, strata: np.ndarray, fits: np.ndarray, kept: int, at_random: bool, is_recall: bool) -> Counts:
    """Counts of the cells that a threshold needs; all rows are one stratum in a sample drawn at random (for precision)."""
    if is_recall:
        return count_marks(cells.rows, strata, fits)
    is_above = strata < kept
    if at_random:
        return count_marks(cells.rows[:kept].sum(keepdims=True), np.zeros(int(is_above.sum()), np.int64), fits[is_above])
    return count_marks(cells.rows[:kept], strata[is_above], fits[is_above])


def estimate_shortfall(counts: Counts, factors: np.ndarray, most: float, wanted: float, kept: int) -> Shortfall:
    """How many more marks, shared out by the rows of the cells, would carry the evidence to `wanted`, the truth being as the
    marks so far say: the smallest number that does, by halving."""
    rates = (counts.fitting + 0.5 * (factors > 0)) / (counts.marked + 0.5)
    thinnest = int(np.argmin(counts.marked / counts.rows))

    def evidence(more: float) -> float:
        share = (counts.marked.sum() + more) / counts.rows.sum()
        marked = np.clip(share * counts.rows, counts.marked, counts.rows)
        fitting = counts.fitting + rates * (marked - counts.marked)
        left = counts.rows - marked / 2
        planned = Counts(counts.rows, marked, fitting, 1 / left, fitting / 2 / left)
        return log_stake(planned, factors, most)

    enough = float(counts.rows.sum() - counts.marked.sum())
    if evidence(enough) < wanted:
        return Shortfall(kept, None, thinnest)
    low = 0.0
    while enough - low > 1:
        middle = (low + enough) / 2
        if evidence(middle) >= wanted:
            enough = middle
        else:
            low = middle
    return Shortfall(kept, math.ceil(enough), thinnest)
