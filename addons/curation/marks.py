"""The file labels.csv that the review page saves, and the cut that its marks prove (`curate.labels`).

Columns: `row` (counted from 0, as the page shows it), `label` (fits, does_not_fit or unsure), and, where they are known, `when`
and `similarity`, by which rows are told whose scores have changed since. The statistics are in addons/curation/labels.py.
"""
import csv
import dataclasses
import pathlib
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from addons.curation.finished import FinishedRun
from addons.curation.labels import ERROR_RATE, LABELS, Cells, Goal, Marks, Shortfall, make_cells, prove_cut
from addons.curation.review import find_limits, scatter
from addons.curation.rules import Curation
from image_text_sim_clip import EXIT_CONFIG, Trouble, as_path, expand_home, say

OUT_OF_TURN = "were made out of turn"
SAME_SCORE = 1e-5  # another machine scores the same pair within 1e-6, and a spreadsheet may have rounded


# ── Reading ───────────────────────────────────────────────────────────────────────────────────────────────────────────

def read_marks(path: pathlib.Path) -> Marks:
    """Read the page's labels.csv. Of several marks of one row the last counts. Trouble (exit 2) for what is no such file."""
    marks: dict[int, tuple[int, float]] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for number, cells in enumerate(csv.DictReader(file), 2):
                row = _read_mark(path, number, cells, marks)
                marks[row] = marks.pop(row)  # the last one decides, also about the order
    except FileNotFoundError:
        raise Trouble(EXIT_CONFIG, f"curate.labels: no such file: {path} (the review page saves it)") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise Trouble(EXIT_CONFIG, f"curate.labels: {path} cannot be read: {error}") from None
    labels = [label for label, _ in marks.values()]
    similarities = [similarity for _, similarity in marks.values()]
    return Marks(np.array(list(marks), np.int64), np.array(labels, np.int8), np.array(similarities, np.float64))


def _read_mark(path: pathlib.Path, number: int, cells: dict[str, str | None],
               marks: dict[int, tuple[int, float]]) -> int:
    """Put the mark on line `number` among `marks` and return its row."""
    if "row" not in cells or "label" not in cells:
        raise Trouble(EXIT_CONFIG, f"curate.labels: {path} needs the columns row and label")
    label = LABELS.get((cells["label"] or "").strip())
    if label is None:
        raise Trouble(EXIT_CONFIG, f"curate.labels: {path}, line {number}: label must be {' | '.join(LABELS)}, "
                                   f"got {cells['label']!r}")
    try:
        row = int(cells["row"] or "")
        similarity = float(cells.get("similarity") or "nan")
    except ValueError:
        raise Trouble(EXIT_CONFIG, f"curate.labels: {path}, line {number}: row must be a whole number and similarity a "
                                   "number") from None
    if not 0 <= row < 2**63:
        raise Trouble(EXIT_CONFIG, f"curate.labels: {path}, line {number}: row must be 0 or more")
    marks[row] = (label, similarity)
    return row


class Sample(NamedTuple):
    """Marks as evidence: those that count, in each cell's order, and how many do not, by the reason."""

    marks: Marks
    left_out: dict[str, int]


Chunks = Callable[[], Iterable[np.ndarray]]


def draw_sample(marks: Marks, cells: Cells, chunks: Chunks, at_random: bool) -> Sample:
    """Find which marks count.

    `chunks()` gives all rows' similarities in input order, float32 with NaN for none. A mark does not count if its row is not
    in this run, has no score or another one than when it was marked, or if a row of its cell that comes earlier in the
    scattered order has no mark that counts. With `at_random` the rows are a sample that somebody drew: all others count.
    """
    now = np.full(len(marks.rows), np.nan)
    first_row = 0
    for similarities in chunks():
        here = (marks.rows >= first_row) & (marks.rows < first_row + len(similarities))
        now[here] = similarities[marks.rows[here] - first_row]
        first_row += len(similarities)
    is_here = marks.rows < first_row
    is_scored = ~np.isnan(now)
    counts = is_scored & ~(np.abs(now - marks.similarities) > SAME_SCORE)
    reasons = {"are of rows that are not in this run": int((~is_here).sum()),
               "are of rows without a score": int((is_here & ~is_scored).sum()),
               "are of rows whose score has changed since": int((is_scored & ~counts).sum())}
    sound = dataclasses.replace(marks, similarities=now).take(counts)
    if not at_random:
        limits = find_limits(cells, chunks, sound.rows)
        order = scatter(sound.rows)
        is_in_turn = order < limits[cells.find(sound.similarities)]
        reasons[OUT_OF_TURN] = int((~is_in_turn).sum())
        in_order = np.argsort(order)
        sound = sound.take(in_order[is_in_turn[in_order]])
    return Sample(sound, {reason: count for reason, count in reasons.items() if count})


# ── The cut ───────────────────────────────────────────────────────────────────────────────────────────────────────────

@dataclasses.dataclass(frozen=True)
class ProvedCut:
    """Where the marks allow to cut, and what they prove of it: fields of `labels` in curated.json."""

    goal: str  # the key that asked
    share: float  # what is proved: this precision, or recall, at least
    confidence: float
    similarity: float  # rows that score lower go
    rows_at_or_above: int
    estimate: float | None  # of the precision or recall there, weighted by the rows that each mark stands for
    marks: int  # that count
    left_out: dict[str, int]
    hint: str | None  # what more marks would gain

    def tell(self) -> str:
        """The cut and its bound in one line, for people."""
        if self.goal == "min_precision":
            proved = (f"at least {100 * self.share:g} % of the {self.rows_at_or_above:,} rows at or above "
                      f"{self.similarity:.4f} fit")
        else:
            proved = (f"the {self.rows_at_or_above:,} rows at or above {self.similarity:.4f} hold at least "
                      f"{100 * self.share:g} % of all that fit")
        text = f"{proved}, with {100 * self.confidence:g} % confidence, by {self.marks:,} marks"
        return text if self.estimate is None else f"{text} (estimate {100 * self.estimate:.1f} %)"


def make_goal(curation: Curation) -> Goal | None:
    """What the section asks the marks to prove; None without `labels`. Trouble (exit 2) for half a request."""
    wanted = [Goal(kind, share) for kind, share in (("precision", curation.min_precision), ("recall", curation.min_recall))
              if share is not None]
    if curation.labels is None:
        if wanted:
            raise Trouble(EXIT_CONFIG, f"curate.{wanted[0].key} needs curate.labels: the file that the review page saves")
        return None
    if len(wanted) != 1:
        raise Trouble(EXIT_CONFIG, "curate.labels needs one of curate.min_precision and curate.min_recall")
    return wanted[0]


def find_proved_cut(curation: Curation, run: FinishedRun) -> ProvedCut | None:
    """The cut that `curate.labels` proves; None where it is not asked for. Trouble (exit 2) where it proves none."""
    goal = make_goal(curation)
    if goal is None or curation.labels is None:
        return None
    path = as_path(expand_home("curate.labels", curation.labels))
    marks = read_marks(path)
    cells = make_cells(run.matched_counts())
    if not len(cells.rows):
        raise Trouble(EXIT_CONFIG, f"curate.labels: no row of {run.output} has a score")
    at_random = curation.labels_drawn == "at_random"
    sample = draw_sample(marks, cells, run.similarities, at_random)
    for reason, count in sample.left_out.items():
        say(f"curate.labels: {count:,} of {len(marks.rows):,} marks {reason}: they do not count")
    found = prove_cut(cells, sample.marks, goal, at_random)
    if isinstance(found, Shortfall):
        raise Trouble(EXIT_CONFIG, tell_shortfall(found, cells, sample, goal, path))
    hint = None
    if found.next_try and found.next_try.more is not None:
        hint = (f"with about {tell_more(found.next_try.more)}, first {cells.tell_range(found.next_try.cell)}, the cut may move "
                f"to {cells.threshold(found.next_try.kept - 1):.4f}")
    kept = found.kept
    return ProvedCut(goal.key, goal.share, 1 - ERROR_RATE, cells.threshold(kept - 1), int(cells.rows[:kept].sum()),
                     estimate_share(cells, sample.marks, goal, kept), len(sample.marks.rows), sample.left_out, hint)


def tell_more(more: int) -> str:
    """A number of marks that are still to be made."""
    return "1 more mark" if more == 1 else f"{more:,} more marks"


def tell_shortfall(shortfall: Shortfall, cells: Cells, sample: Sample, goal: Goal, path: pathlib.Path) -> str:
    """Why there is no cut, and what would help, in one line."""
    marks = sample.marks
    text = f"curate.{goal.key}: the {len(marks.rows):,} marks of {path} that count prove no cut for {goal.share:g}: "
    threshold = cells.threshold(shortfall.kept - 1)
    if shortfall.more is None:
        above = cells.find(marks.similarities) < shortfall.kept
        fitting = int((marks.labels[above] == LABELS["fits"]).sum())
        text += (f"{fitting:,} of the {int(above.sum()):,} marked at {threshold:.4f} and above fit, and more such marks would "
                 "not help")
    else:
        where = f"at similarities of {threshold:.4f} and above" if goal.kind == "precision" else "over all similarities"
        text += f"it takes about {tell_more(shortfall.more)} {where}, first {cells.tell_range(shortfall.cell)}"
    if sample.left_out.get(OUT_OF_TURN, 0) > len(marks.rows):
        text += " (if you drew the rows at random yourself, say labels_drawn: at_random)"
    return text


def estimate_share(cells: Cells, marks: Marks, goal: Goal, kept: int) -> float | None:
    """The precision or recall of the first `kept` cells, each cell's marks standing for all its rows; None where a cell that
    holds rows has no marks, or nothing fits."""
    strata = cells.find(marks.similarities)
    marked = np.bincount(strata, minlength=len(cells.rows))
    fitting = np.bincount(strata, marks.labels == LABELS["fits"], len(cells.rows))
    needed = kept if goal.kind == "precision" else len(cells.rows)
    if not marked[:needed].all():
        return None
    expected = cells.rows * fitting / np.maximum(marked, 1)
    whole = cells.rows[:kept].sum() if goal.kind == "precision" else expected.sum()
    return float(expected[:kept].sum() / whole) if whole else None
