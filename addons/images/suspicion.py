"""Whether a host that answers 503 now and then, without saying when to come back, is asked too often or just flaky.

Both look the same at first. A host that limits its requests stops refusing, for a while, when it is asked at less than it had
accepted. Where that does not help several times in a row, 503 is supposed to come at random, and the host is asked at its best
rate again; should far fewer requests succeed then, the rate was the reason after all.
"""
import math

SLOWEST_RATE = 0.1  # requests a second
SLOWEST_BETWEEN_IMAGES = 2.0  # requests a second, while it is open whether the rate is the reason
USELESS_SLOWDOWNS = 3  # in a row, each followed by images and soon by another 503: then the rate is not the reason
SOON_S = 5.0  # a host that limits its rate takes longer, until the rate, lowered by a quarter, has grown to the limit again
SOON_IMAGES = 20  # or fewer images than that, where it is asked rarely
BELIEVED_S = 300.0  # how long it stays at that, and then is found out anew
JUDGED_ANSWERS = 30  # by so many answers at full speed it is seen whether the rate was the reason after all
LEAST_SHARE = 0.15  # of them must be images


class Suspicion:
    """What is known of the 503s of one host; `now` and the other times are those of one monotonic clock, in seconds."""

    def __init__(self) -> None:
        self._useless = 0  # slow-downs in a row
        self._since_slower = 0  # images
        self._served = 0  # answers since the first useless slow-down, or since 503 is supposed to come at random
        self._refused = 0
        self._share_when_slow = 0.0  # of the requests that succeeded
        self._random_until = -math.inf
        self._limited_until = -math.inf

    def is_random(self, now: float) -> bool:
        """Whether asking more slowly is of no use."""
        return now < self._random_until

    def slowest_rate(self, now: float) -> float:
        """Below which there is no reason to go, in requests a second."""
        return SLOWEST_RATE if now < self._limited_until else SLOWEST_BETWEEN_IMAGES

    def note_served(self, began: float, slower_since: float) -> None:
        """An image came, by a request that `began` then, from a host that has been asked more slowly since `slower_since`."""
        self._since_slower += began >= slower_since
        self._served += 1

    def note_refusal(self, now: float) -> None:
        """503 came."""
        self._refused += 1
        answers = self._served + self._refused
        least = max(LEAST_SHARE, self._share_when_slow / 3)
        if self.is_random(now) and answers >= JUDGED_ANSWERS and self._served / answers < least:
            self._random_until = -math.inf
            self._limited_until = now + BELIEVED_S

    def judge(self, now: float, slower_since: float) -> bool:
        """503 came from a host that has been asked more slowly since then; returns whether it is random from now on."""
        if not self._since_slower or self.is_random(now) or now < self._limited_until:
            return False
        if now - slower_since < SOON_S or self._since_slower < SOON_IMAGES:
            self._useless += math.isfinite(slower_since)
        else:
            self._useless = 0
            self._restart_counts()
        self._since_slower = 0
        if self._useless < USELESS_SLOWDOWNS:
            return False
        self._useless = 0
        self._random_until = now + BELIEVED_S
        self._share_when_slow = self._served / (self._served + self._refused)
        self._restart_counts()
        return True

    def _restart_counts(self) -> None:
        self._served = 0
        self._refused = 0
