"""How long an image has been waited for: the seconds in which this process ran, whatever the clocks on the wall say.

Ctrl-Z, Slurm's suspension, a paused container or a debugger stop a process in the middle of an image, for hours maybe. That
is not the image's fault; so what passes between two looks counts for little more than a look takes.
"""
import time

LOOK_S = 0.25  # how often whoever waits for an image looks whether that is overdue
MOST_A_LOOK_S = 1.0  # what the time between two looks counts for at most: threads of a busy machine come late, too


class Stopwatch:
    """Begins with 0 seconds when it is made; has to be looked at every LOOK_S."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._looked = time.monotonic()

    def look(self) -> float:
        """The seconds so far."""
        now = time.monotonic()
        self._seconds += min(now - self._looked, MOST_A_LOOK_S)
        self._looked = now
        return self._seconds

    def restart(self) -> None:
        """Begin again with 0 seconds."""
        self._seconds = 0.0
