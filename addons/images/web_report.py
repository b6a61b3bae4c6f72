"""What a run tells about its fetches: how long they took, which hosts failed most, and what a cache would have saved.

Each part keeps its share in the side file with its times; profile.json has the total. Memory stays the same however many rows,
hosts and URLs there are: seconds are counted in classes, hosts beyond many are forgotten, and repeated URLs are found in a
sample that their hashes choose.
"""
import collections
import hashlib
import math
import re
from typing import TYPE_CHECKING, TypedDict

from addons.images.names import one_spelling
from image_text_sim_clip import Config, Plan, column_name

if TYPE_CHECKING:
    import pyarrow as pa

    from image_text_sim_clip import PartitionRun

CLASSES_PER_OCTAVE = 4  # seconds are counted in classes, each a fourth root of two longer than the one before
HOSTS_OF_A_PART = 50
HOSTS_IN_ALL = 20_000
WORST_HOSTS = 10
SAMPLED_URLS = 20_000  # of a whole run; with fewer rows every URL is in the sample
OWN_STATUSES = ("ok", "empty_caption", "not_tried")  # that say nothing about a host
IMAGE_STATUSES = ("not_image", "unsupported", "corrupt", "bomb", "crashed", "non_finite", "oom")  # nor whether it answers


class Report(TypedDict):
    """What is kept about the fetches of one part."""

    seconds: dict[str, int]  # class -> fetches
    hosts: dict[str, dict[str, int]]  # those that failed most: host -> status -> rows
    urls: int  # distinct ones
    sample: list[str]  # hashes


class Seconds(TypedDict):
    """How long fetches took."""

    p50: float  # the longest of the quickest half
    p90: float
    p99: float
    up_to: dict[str, int]  # the upper edge of a class -> fetches in it


class WorstHost(TypedDict):
    """A host whose rows failed."""

    host: str
    failed: int
    statuses: dict[str, int]


class Total(TypedDict):
    """The entry `fetching` of profile.json."""

    fetches: int  # URLs, each once for every part that has it
    seconds: Seconds | None  # None if nothing was fetched
    worst_hosts: list[WorstHost]
    repeated_share: float  # of the fetches: of URLs that another part had fetched too, which a cache would have saved
    repeated_is_sampled: bool


def count_seconds(counts: "collections.Counter[int]", seconds: float) -> None:
    """Count a fetch that took so long; one that came from the cache, or that was refused untried, took no time."""
    if seconds > 0:
        counts[math.floor(CLASSES_PER_OCTAVE * math.log2(max(seconds, 1e-4)))] += 1


def longest_of_class(number: int) -> float:
    """The upper edge of a class, in seconds."""
    return float(2 ** ((number + 1) / CLASSES_PER_OCTAVE))


def host_of(url: str) -> str:
    """The host that a URL names, in its one spelling; "-" for none."""
    found = re.match(r"\s*\w+://(?:[^/?#]*@)?(\[[^\]/]*\]|[^/:?#]+)", url)
    host = one_spelling(found[1].strip("[]")) if found else "-"
    return host if host.isprintable() else ascii(host)[1:-1]


def describe_partition(config: Config, plan: Plan, run: "PartitionRun", table: "pa.Table",
                       seconds: "collections.Counter[int] | None") -> Report:
    """A part's report; `table` holds the results of all its rows, `seconds` the classes of those fetched now."""
    place = list(run.rows.columns).index(column_name(config.url_column))
    urls = table.column(place).to_pylist()
    statuses = table["status"].to_pylist()
    hosts: dict[str, collections.Counter[str]] = {}
    fetched: set[str] = set()
    for url, status in zip(urls, statuses, strict=True):
        if status != "empty_caption" and url.strip():
            fetched.add(url.strip())
        if status not in OWN_STATUSES and status not in IMAGE_STATUSES:
            hosts.setdefault(host_of(url), collections.Counter())[status] += 1
    return {"seconds": {str(number): count for number, count in sorted((seconds or {}).items())},
            "hosts": {host: dict(counts) for host, counts in keep_worst(hosts, HOSTS_OF_A_PART)},
            "urls": len(fetched), "sample": sample_urls(fetched, plan.row_count)}


def keep_worst(hosts: "dict[str, collections.Counter[str]]", count: int) -> "list[tuple[str, collections.Counter[str]]]":
    """The hosts that failed most, the worst first; of equals the first by name."""
    return sorted(hosts.items(), key=lambda item: (-item[1].total(), item[0]))[:count]


def sample_urls(urls: set[str], row_count: int) -> list[str]:
    """The hashes of those URLs that belong to the run's sample: the same ones wherever they turn up."""
    below = int(2**64 * min(1.0, SAMPLED_URLS / max(1, row_count)))
    hashes = [hashlib.blake2b(url.encode("utf-8", "surrogatepass"), digest_size=8).digest() for url in urls]
    return sorted(digest.hex() for digest in hashes if int.from_bytes(digest, "big") < below)


def add_up(reports: list[Report], row_count: int) -> Total | None:
    """The total of all parts; None if none of them has a report."""
    if not reports:
        return None
    seconds: collections.Counter[int] = collections.Counter()
    hosts: dict[str, collections.Counter[str]] = {}
    sample: collections.Counter[str] = collections.Counter()
    for report in reports:
        seconds.update({int(number): count for number, count in report["seconds"].items()})
        for host, statuses in report["hosts"].items():
            hosts.setdefault(host, collections.Counter()).update(statuses)
        if len(hosts) > 2 * HOSTS_IN_ALL:
            hosts = dict(keep_worst(hosts, HOSTS_IN_ALL))
        sample.update(report["sample"])
    worst: list[WorstHost] = [{"host": host, "failed": counts.total(), "statuses": dict(counts.most_common())}
                              for host, counts in keep_worst(hosts, WORST_HOSTS)]
    return {"fetches": sum(report["urls"] for report in reports), "seconds": describe_seconds(seconds), "worst_hosts": worst,
            "repeated_share": (sample.total() - len(sample)) / max(1, sample.total()),
            "repeated_is_sampled": row_count > SAMPLED_URLS}


def describe_seconds(counts: "collections.Counter[int]") -> Seconds | None:
    """How long fetches took: the longest of the quickest 50, 90 and 99 %, and how many took up to so many seconds."""
    if not counts:
        return None
    found = []
    for share in (0.5, 0.9, 0.99):
        seen = 0
        for number in sorted(counts):
            seen += counts[number]
            if seen >= share * counts.total():
                found.append(longest_of_class(number))
                break
    up_to = {f"{longest_of_class(number):.4g}": counts[number] for number in sorted(counts)}
    return {"p50": found[0], "p90": found[1], "p99": found[2], "up_to": up_to}


def tell(total: Total, config: Config) -> list[tuple[str, str]]:
    """Lines for the summary on the screen, each with its name."""
    lines = []
    seconds = total["seconds"]
    if seconds:
        lines.append(("fetches", f"half of them within {seconds['p50']:.2g} s, 90 % within {seconds['p90']:.2g} s, "
                                 f"99 % within {seconds['p99']:.2g} s"))
    for number, host in enumerate(total["worst_hosts"]):
        statuses = ", ".join(f"{count:,} {status}" for status, count in host["statuses"].items())
        lines.append(("" if number else "failing hosts", f"{host['host']}: {statuses}"))
    repeated = round(total["repeated_share"] * total["fetches"])
    if repeated and not config.cache_path:
        about = "about " if total["repeated_is_sampled"] else ""
        lines.append(("fetched again", f"{about}{repeated:,} of {total['fetches']:,} fetches, which a cache_path would save"))
    return lines
