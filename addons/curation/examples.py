"""The rows that the review page shows of each rule: some that it dropped, and of a rule between rows which row stays for them.

They are chosen by their scattered numbers, in no way by their content, so that what a rule does can be judged from them.
"""
import dataclasses
from collections.abc import Callable

import numpy as np

from addons.curation.duplicates import Dropped
from addons.curation.rules import RULES, VERDICTS

ROWS = 12  # of each rule on one row
GROUPS = 8  # of each rule between rows
MEMBERS = 6  # shown of a group, with the row that stays
CHUNK = 1 << 20  # verdicts that are looked at at a time


@dataclasses.dataclass(frozen=True)
class Examples:
    """What one rule dropped, as groups of row numbers."""

    rule: str
    groups: list[list[int]]  # one row each; of a rule between rows the row that stays, then those dropped for its sake
    is_between_rows: bool

    def row_numbers(self) -> list[int]:
        """All the rows, group after group."""
        return [row for group in self.groups for row in group]


def choose_examples(verdicts: np.ndarray, dropped: dict[str, Dropped],
                    scatter: Callable[[np.ndarray], np.ndarray]) -> list[Examples]:
    """Examples of each rule that dropped a row of these verdicts, uint8 (rows,), in the order of RULES.

    `dropped` is what the rules between rows did. `scatter` gives row numbers (n,) an order of their own.
    """
    found = []
    for rule in RULES:
        if rule in ("kept", "not_scored"):  # shown above and below the cut; and among the failures
            continue
        if rule in dropped:
            groups = _choose_groups(dropped[rule], scatter)
        else:
            groups = [[row] for row in _choose_rows(verdicts, VERDICTS[rule], scatter)]
        if groups:
            found.append(Examples(rule, groups, rule in dropped))
    return found


def _choose_rows(verdicts: np.ndarray, verdict: int, scatter: Callable[[np.ndarray], np.ndarray]) -> list[int]:
    """The ROWS rows with this verdict whose scattered numbers are the smallest, in the order of the input."""
    best = np.empty(0, np.int64)
    for start in range(0, len(verdicts), CHUNK):
        rows = np.concatenate([best, start + np.flatnonzero(verdicts[start:start + CHUNK] == verdict)])
        best = rows[np.argsort(scatter(rows))[:ROWS]]
    return sorted(best.tolist())


def _choose_groups(dropped: Dropped, scatter: Callable[[np.ndarray], np.ndarray]) -> list[list[int]]:
    """GROUPS groups: the row that stays, and the first rows that were dropped for its sake."""
    staying = np.unique(dropped.stays)
    chosen = np.sort(staying[np.argsort(scatter(staying))[:GROUPS]])
    groups = []
    for row in chosen.tolist():
        members = np.sort(dropped.rows[dropped.stays == row])[:MEMBERS - 1]
        groups.append([row, *members.tolist()])
    return groups
