"""What each rule on one row would drop alone, and how much of it another one drops too.

A verdict names the first rule that a row fails, so the counts of verdicts depend on the order of the rules. These do not.
They are of the scored rows and of the rules that look at a row's text and numbers: images are read, and neighbours compared,
only for the rows that these rules leave.
"""
from collections.abc import Mapping

import numpy as np

NOT_COUNTED = "not_scored"


class Overlaps:
    """Counts, chunk by chunk, how many scored rows fail each rule, and each two rules."""

    def __init__(self) -> None:
        self._alone: dict[str, int] = {}
        self._both: dict[str, dict[str, int]] = {}
        self.together = 0  # rows that fail any of the rules

    def add(self, failures: Mapping[str, np.ndarray]) -> None:
        """Count a chunk: for each rule's name which of n rows fail it, bool (n,)."""
        is_scored = ~failures[NOT_COUNTED]
        counted = {name: fails & is_scored for name, fails in failures.items() if name != NOT_COUNTED}
        any_of_them = np.zeros(len(is_scored), bool)
        for name, fails in counted.items():
            self._alone[name] = self._alone.get(name, 0) + int(fails.sum())
            any_of_them |= fails
            others = self._both.setdefault(name, {})
            for other, other_fails in counted.items():
                if other != name:
                    others[other] = others.get(other, 0) + int((fails & other_fails).sum())
        self.together += int(any_of_them.sum())

    @property
    def alone(self) -> dict[str, int]:
        """For each rule how many rows it would drop if it were the only one."""
        return dict(self._alone)

    @property
    def both(self) -> dict[str, dict[str, int]]:
        """For each rule how many of the rows that fail it fail each other rule too."""
        return {name: dict(others) for name, others in self._both.items()}
