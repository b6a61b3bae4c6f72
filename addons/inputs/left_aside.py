"""What lies among the files of an input and is no row: counted by its kind, the first of each kind named."""
import re

from image_text_sim_clip import say

MOST_KINDS = 20  # that are told one by one: an input with endings of chance would have a manifest without end
OTHERS = "files of other kinds"
ENDING = re.compile(r"\.[A-Za-z0-9_-]{1,12}")


class LeftAside:
    """Counts of what was left aside, by kind ("files ending in .cls"), and of each kind the first one's name."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.firsts: dict[str, str] = {}

    def add(self, kind: str, name: str, count: int = 1) -> None:
        """Count something of a kind; of several at once, `name` is the first of them."""
        if kind not in self.counts and len(self.counts) >= MOST_KINDS:
            kind = OTHERS
        self.counts[kind] = self.counts.get(kind, 0) + count
        self.firsts.setdefault(kind, name)

    def add_all(self, other: "LeftAside", place: str = "") -> None:
        """Take in what another one counted; `place` is put before the names."""
        for kind, count in other.counts.items():
            self.add(kind, place + other.firsts[kind], count)

    @property
    def total(self) -> int:
        """How many things were left aside."""
        return sum(self.counts.values())

    def describe(self) -> dict[str, dict[str, int | str]]:
        """What manifest.json says under `left_aside`: for each kind how many, and the first."""
        return {kind: {"count": count, "first": self.firsts[kind]} for kind, count in self.counts.items()}

    def tell(self, place: str) -> None:
        """One line on the screen; none where nothing was left aside."""
        if self.counts:
            kinds = [f"{count:,} {kind} (such as {self.firsts[kind]})" for kind, count in self.counts.items()]
            say(f"left aside in {place}, because they are no rows: {', '.join(kinds)}")


def kind_by_ending(name: str) -> str:
    """The kind of a file that is told by its name alone."""
    base = name.rpartition("/")[2]
    if base.startswith((".", "_")):
        return "hidden files"
    dot = base.rfind(".")
    if dot < 0:
        return "files without an ending"
    ending = base[dot:].lower()
    return f"files ending in {ending}" if ENDING.fullmatch(ending) else OTHERS
