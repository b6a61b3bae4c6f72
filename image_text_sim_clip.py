"""How well do an image and a caption belong together?  One number per row, from a pretrained CLIP or SigLIP model.

    python image_text_sim_clip.py --config config.yaml

`similarity` is the cosine of the angle between the image's and the caption's embedding, in [-1, 1]; higher means a
better match. It compares rows scored by one model; it is no percentage, and two models' numbers do not compare.
For SigLIP, `probability` is sigmoid(scale * cosine + bias): the model's own chance that the two belong together.

    pairs: CSV, JSON Lines | Parquet, webdataset tars
        | stage + plan    text: one streaming pass into Parquet, malformed lines aside; fixed row ranges; manifest.json
        v
    partition 00000 ... N      an engine only decides WHERE a partition runs
        |
        v   Scorer(config)(partition)
        |      rows -> loader threads: fetch, decode, resize to uint8   (bounded, in order, across partition edges)
        |           -> batch -> image encoder, text encoder (fp32 normalise, fp32 dot)
        |      every row ends as a score or as a reason
        v
    parts/part-00012.json, then parts/part-00012.parquet    written beside, fsync, renamed: "it exists" = "done" = resume
        | finalize
        v
    scores.csv (input order) . profile.json . memory-time.png . summary

The file reads in that order: trouble, config, pairs, images, model, one partition, parts, engines, results, main.
Heavy libraries are imported where they are used, so that a mistake in the config is answered at once.
"""
import argparse
import builtins
import collections
import concurrent.futures
import contextlib
import copy
import csv
import ctypes
import dataclasses
import difflib
import fnmatch
import functools
import hashlib
import importlib
import importlib.util
import io
import itertools
import json
import math
import os
import pathlib
import pickle
import platform
import re
import signal
import stat
import struct
import sys
import threading
import time
import types
import typing
import urllib.parse
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import yaml

__version__ = "0.1.0"

# memory_profiler (-m, mprof) and kernprof put `profile` among the builtins; without them it does nothing. Tracing two
# profiled functions in two threads crashes the run, so PROFILED also turns the loader threads off; and where a profiled
# function calls another, the caller's table shows wrong increments, so none of those marked here calls another.
PROFILED = hasattr(builtins, "profile")
profile: Callable[[Callable], Callable] = getattr(builtins, "profile", lambda function: function)


# ── Trouble ───────────────────────────────────────────────────────────────────────────────────────────────────────────
# Three kinds, three fates: a user's mistake is one line and an exit code, a row's failure is a status, a bug is a traceback.

EXIT_CONFIG, EXIT_INPUT, EXIT_FAILURES, EXIT_DISK, EXIT_MODEL, EXIT_VERIFY = 2, 3, 4, 5, 6, 7

STATUSES = ("ok", "missing", "forbidden", "timeout", "dns", "connect", "http_4xx", "http_5xx", "too_large", "not_image",
            "unsupported", "corrupt", "bomb", "empty_caption", "opted_out", "non_finite", "oom", "crashed", "not_tried")


class Trouble(Exception):
    """What the user can mend: told in one line on stderr, ends the program with `exit_code`."""

    def __init__(self, exit_code: int, message: str) -> None:
        super().__init__(" ".join(message.split()))
        self.exit_code = exit_code


class RowFailure(Exception):
    """Why one row gets no score: a `status` of STATUSES and a `detail` without times, addresses or absolute paths."""

    def __init__(self, status: str, detail: str) -> None:
        super().__init__(f"{status}: {detail}")
        self.status, self.detail = status, detail


class Interrupted(BaseException):
    """SIGINT or SIGTERM: unwinds to `run`, which exits with 128 + the signal's number."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


class Interruption:
    """Turns the first signal into a wish to stop that `check` obeys between batches; the second one stops at once."""

    def __init__(self) -> None:
        self.signum, self.deferred = 0, False

    def install(self) -> None:
        """Listen to SIGINT and SIGTERM (main thread only)."""
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self._on_signal)

    def _on_signal(self, signum: int, frame: object) -> None:
        if self.signum or not self.deferred:
            raise Interrupted(signum)
        self.signum = signum
        say("stopping after this batch; finished partitions are kept, the same command goes on from there")

    def check(self) -> None:
        """Raise Interrupted if a signal came while `deferred` was set."""
        if self.signum:
            raise Interrupted(self.signum)


INTERRUPTION = Interruption()


def say(message: str) -> None:
    """One line of talk, on stderr (stdout belongs to the result)."""
    print(message, file=sys.stderr, flush=True)


@contextlib.contextmanager
def output_disk(path: os.PathLike | str) -> Iterator[None]:
    """Turn an OSError while writing `path` into Trouble with the exit code for a full or broken output disk."""
    try:
        yield
    except OSError as error:
        raise Trouble(EXIT_DISK, f"cannot write {path}: {error.strerror or error}") from error


def addon(name: str, key: str) -> Any:
    """Import addons/<name>.py because `key` asks for it; Trouble (exit 2) says what is missing.

    An addon gets what it needs as arguments and never imports this script, which, run as __main__, would be loaded twice.
    """
    try:
        return importlib.import_module(f"addons.{name}")
    except ImportError as error:
        missing = f"the file addons/{name}.py beside the script" if (error.name or "").startswith("addons") else \
            f"the package {error.name} (pip install -r requirements.txt)"
        raise Trouble(EXIT_CONFIG, f"{key} needs {missing}") from error


@functools.cache
def optional_addon(name: str, otherwise: str) -> Any:
    """addons/<name>.py, or None and one line, said once, on what the run goes without."""
    try:
        return importlib.import_module(f"addons.{name}")
    except ImportError as error:
        return say_alone() if error.name == "addons" else say(f"{otherwise}: {error}")


@functools.cache
def say_alone() -> None:
    """One line, said once, on what a script that stands alone goes without."""
    say("the folder addons/ is not beside the script: no progress bar, percentiles, score passport, table of times or picture")


# ── Config ────────────────────────────────────────────────────────────────────────────────────────────────────────────

def _setting(default: Any, low: float = -math.inf, high: float = math.inf) -> Any:
    """A config key with a default and, for numbers, the range it must lie in (both ends included)."""
    return dataclasses.field(default=default, metadata={"low": low, "high": high})


@dataclasses.dataclass(frozen=True)
class Config:
    """Every key of config.yaml, which says in a comment what each is for. Raises Trouble (exit 2) on a bad value."""

    # the original's four
    csv_path: str = "challenge_set/challenge_set.csv"
    image_path: str = "challenge_set/photos"
    use_cuda: bool = True
    pretrained_model: str = "openai/clip-vit-base-patch32"
    # the model
    revision: str = "main"
    safetensors_only: bool = False
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Literal["none", "int8"] = "none"
    compile: bool = False
    # the table
    url_column: str | int = _setting("url", 0)
    caption_column: str | int = _setting("caption", 0)
    caption_template: str = "{}"
    separator: str = "auto"
    encoding: str = "utf-8"
    limit: int | None = _setting(None, 1)
    escape_formulas: bool = False
    # images
    preprocess: Literal["fast", "exact"] = "fast"
    decode: Literal["exact", "scaled", "gpu"] = "exact"
    transparent_over: str = "white"
    exif_orientation: bool = False
    avif: bool = False
    max_image_bytes: int = _setting(50_000_000, 1)
    max_image_pixels: int = _setting(50_000_000, 1)
    # fetching (image_path: url)
    fetch_timeout_s: float = _setting(30.0, 0.01, 3600)
    fetch_retries: int = _setting(2, 0, 100)
    user_agent: str = "image_text_sim_clip/0.1 (image-caption similarity; respects X-Robots-Tag: noai)"
    respect_opt_out: bool = True
    max_per_host: int = _setting(16, 1, 1024)
    cache_path: str | None = None
    use_environment_proxies: bool = False
    allow_private_hosts: bool = False
    # the run
    output_path: str = "scores"
    batch_size: int | Literal["auto"] = _setting("auto", 1, 65536)
    partition_rows: int | Literal["auto"] = _setting("auto", 1, 10_000_000)
    loader_threads: int | Literal["auto"] = _setting("auto", 0, 1024)
    engine: Literal["auto", "local", "accelerate", "slurm", "ray"] = "auto"
    ray_address: str | None = None
    ray_workers: str | int = _setting(1, 1)
    ray_gpus: float = _setting(0.0, 0.0, 64)
    output_format: Literal["csv", "parquet"] = "csv"
    save_embeddings: Literal["none", "float32", "float16", "int8"] = "none"
    parity_rows: int | Literal["auto"] = _setting("auto", 0, 10_000)
    max_score_drift: float | None = _setting(None, 0.0, 2.0)
    max_failure_rate: float = _setting(0.9, 0.0, 1.0)
    # the second job, curate.py, which checks what is in it (addons/curation.py)
    curate: dict | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check_value(field, getattr(self, field.name))
        if isinstance(self.url_column, int) != isinstance(self.caption_column, int):
            raise Trouble(EXIT_CONFIG, "url_column and caption_column must both be names, or both be numbers")
        for key in ("csv_path", "image_path", "output_path", "pretrained_model", "cache_path"):
            path = (getattr(self, key) or "").encode("utf-8", "surrogatepass")
            if b"\0" in path or max(map(len, path.split(b"/"))) > 255:
                raise Trouble(EXIT_CONFIG, f"{key} holds what no file name can: a NUL, or more than 255 bytes between two /")
        if self.caption_template.count("{}") != 1:
            raise Trouble(EXIT_CONFIG, f"caption_template must hold {{}} exactly once, got {self.caption_template!r}")
        if self.max_score_drift is not None and self.parity_rows == 0:
            raise Trouble(EXIT_CONFIG, "max_score_drift needs parity_rows: with 0 nothing is scored twice")
        if self.separator != "auto" and (len(self.separator) != 1 or self.separator in '"\r\n'):
            raise Trouble(EXIT_CONFIG, f"separator must be auto or one character that can separate, got {self.separator!r}")
        try:
            "a".encode(self.encoding)
        except (LookupError, ValueError):
            raise Trouble(EXIT_CONFIG, f"encoding: Python knows none called {self.encoding!r}") from None
        from PIL import ImageColor
        try:
            ImageColor.getrgb(self.transparent_over)
        except ValueError:
            raise Trouble(EXIT_CONFIG, f"transparent_over must be a colour such as white or #ff8800, got "
                                       f"{self.transparent_over!r}") from None


# Keys that may differ between a run and its resumption, because no score and no status hangs on them. `use_cuda` is here
# because the device that was really used is recorded, and compared, in the manifest's `resolved`.
HARMLESS_KEYS = {"csv_path", "use_cuda", "output_path", "output_format", "loader_threads", "engine", "ray_address",
                 "ray_workers", "ray_gpus", "max_failure_rate", "user_agent", "safetensors_only", "max_per_host", "cache_path",
                 "use_environment_proxies", "curate", "parity_rows", "max_score_drift"}


def _accepts(kind: Any, value: Any) -> bool:
    """Whether `value` is of the annotated `kind`; True is no int, 3 is a float."""
    if typing.get_origin(kind) is Literal:
        return isinstance(value, str) and value in typing.get_args(kind)
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return any(_accepts(k, value) for k in typing.get_args(kind))
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


def _describe(kind: Any) -> str:
    """The annotated `kind` in a user's words."""
    if typing.get_origin(kind) is Literal:
        return " | ".join(typing.get_args(kind))
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return " | ".join(_describe(k) for k in typing.get_args(kind))
    return {str: "text", bool: "true | false", int: "a whole number", float: "a number", type(None): "null",
            dict: "a section of keys"}[kind]


def check_value(field: dataclasses.Field, value: Any, section: str = "") -> None:
    """Raise Trouble (exit 2) unless `value` is of the field's type and within its range; `section` is named before it."""
    if not _accepts(field.type, value):
        raise Trouble(EXIT_CONFIG, f"{section}{field.name} must be {_describe(field.type)}, got {value!r}")
    low, high = field.metadata.get("low", -math.inf), field.metadata.get("high", math.inf)
    if isinstance(value, (int, float)) and not low <= value <= high:
        raise Trouble(EXIT_CONFIG, f"{section}{field.name} must lie in [{low}, {high}], got {value}")


def check_keys(kind: Any, values: dict, section: str = "") -> None:
    """Raise Trouble (exit 2) for a key that the dataclass `kind` does not have, and name the nearest one it has."""
    known = [field.name for field in dataclasses.fields(kind)]
    for key in values:
        if key not in known:
            nearest = difflib.get_close_matches(str(key), known, 1, 0.5)
            raise Trouble(EXIT_CONFIG, f"unknown key {section + str(key)!r}"
                                       + (f"; did you mean {section + nearest[0]!r}?" if nearest else ""))


class _UniqueKeys(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice instead of silently keeping the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise Trouble(EXIT_CONFIG, f"{key} is given twice (line {key_node.start_mark.line + 1})")
            seen.add(key)
        return super().construct_mapping(node, deep)


# what its constructors raise for "2001-99-99", "{a: 1}: 2" and the like is not all YAMLError
_YAML_ERRORS = (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, RecursionError)


def load_config(path: os.PathLike | str, overrides: Iterable[str] = ()) -> Config:
    """Read the YAML file at `path`, apply `overrides` ("key=value", value as YAML) and return the checked Config.

    Raises Trouble (exit 2) for an unreadable file, an unknown or repeated key, a wrong type or a value out of range.
    """
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8")
        values = yaml.load(text, _UniqueKeys)  # noqa: S506 - a SafeLoader
    except OSError as error:
        raise Trouble(EXIT_CONFIG, f"cannot read the config {path}: {error.strerror}") from None
    except _YAML_ERRORS as error:
        raise Trouble(EXIT_CONFIG, f"{path} is not valid YAML: {error}") from None
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise Trouble(EXIT_CONFIG, f"{path} must hold 'key: value' lines")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise Trouble(EXIT_CONFIG, f"--set needs key=value, got {override!r}")
        try:
            loaded = yaml.load(value, _UniqueKeys)  # noqa: S506 - a SafeLoader
        except _YAML_ERRORS:
            raise Trouble(EXIT_CONFIG, f"--set {override}: the value is not valid YAML") from None
        section, dot, inner = key.strip().partition(".")
        held = values.get(section) or {}
        if dot and isinstance(held, dict):
            values[section] = held | {inner: loaded}
        else:
            values[key.strip()] = loaded
    check_keys(Config, values)
    drift = values.get("max_score_drift")
    if isinstance(drift, str) and re.fullmatch(r"\d+(\.\d*)?[eE]-?\d+", drift):
        values["max_score_drift"] = float(drift)  # YAML 1.1 takes 1e-3 for text
    return Config(**values)


# ── Pairs: stage and plan ─────────────────────────────────────────────────────────────────────────────────────────────

STAGE_ROWS = 8192  # rows of one Parquet row group of the staged table: what is held in memory at a time
RESULT_COLUMNS = ("similarity", "dissimilarity", "probability", "percentile", "random_percentile", "truncated", "status",
                  "detail")  # a part holds all but the two percentiles, which only the whole run can tell


@dataclasses.dataclass(frozen=True)
class Partition:
    """A fixed range of rows, [start, stop), and the part files its results go to."""

    index: int
    start: int
    stop: int
    folder: pathlib.Path

    @property
    def parquet(self) -> pathlib.Path:
        """The rows and their results; that it exists is the mark of done."""
        return self.folder / f"part-{self.index:05d}.parquet"

    @property
    def json(self) -> pathlib.Path:
        """Its sha256, counts and seconds; written first."""
        return self.folder / f"part-{self.index:05d}.json"

    @property
    def embeddings(self) -> pathlib.Path:
        """With save_embeddings: the embeddings of its pictures and captions; written before both."""
        return self.folder / f"part-{self.index:05d}.npz"

    @property
    def trying(self) -> pathlib.Path:
        """Exists while a worker is at the partition; one left behind tells of a worker that was killed or hung."""
        return self.folder / f"part-{self.index:05d}.trying"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run is: the manifest (see `plan`) and its partitions, the same for every engine and every resumption."""

    output: pathlib.Path
    manifest: dict
    partitions: list[Partition]
    shards: Any = None  # reads an input that is not staged (addons/inputs.py)

    @property
    def rows(self) -> int:
        """How many rows came in."""
        return self.manifest["rows"]

    def read_rows(self, start: int, stop: int) -> Any:
        """Rows [start, stop) of the input as a pandas DataFrame of text columns."""
        import pyarrow.parquet as pq
        if self.shards:
            return self.shards.read(start, stop)
        with pq.ParquetFile(self.output / "pairs.parquet") as staged:
            step = staged.metadata.row_group(0).num_rows if staged.num_row_groups else 1  # all groups but the last are alike
            first, last = start // step, (max(start, stop - 1)) // step
            groups = [g for g in range(first, last + 1) if g < staged.num_row_groups]
            table = staged.read_row_groups(groups) if groups else staged.schema_arrow.empty_table()
        return table.slice(start - first * step, stop - start).to_pandas()


def column_name(column: str | int) -> str:
    """A column's name in the staged table; a number means a table without a header, counted from 0."""
    return column if isinstance(column, str) else f"column_{column}"


def stage_plain(config: Config, output: pathlib.Path) -> dict:
    """Stage a CSV without a flaw, as addons/inputs.py would: all that a script without it reads; else Trouble (exit 3)."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    path, rows, info = pathlib.Path(config.csv_path), 0, pathlib.Path(config.csv_path).stat()
    try:
        with path.open(encoding="utf-8-sig", newline="") as text, output_disk(output), \
                atomic_file(output / "bad_rows.csv") as bad, atomic_file(output / "pairs.parquet") as staged:
            bad.write(b"line,reason,text\n")
            csv.field_size_limit(16_000_000)
            records: Iterator[list[str]] = filter(None, csv.reader(text, strict=True))
            columns = [name.strip() for name in next(records, [])]
            if any(columns.count(column_name(name)) != 1 for name in (config.url_column, config.caption_column)):
                raise ValueError(f"no columns {config.url_column!r} and {config.caption_column!r} among {columns}")
            schema = pa.schema([(name, pa.string()) for name in columns])
            with pq.ParquetWriter(staged, schema, compression="zstd", use_dictionary=False) as writer:
                records = itertools.islice(records, config.limit)
                while batch := list(itertools.islice(records, STAGE_ROWS)):
                    writer.write_table(pa.table([pa.array(cells) for cells in zip(*batch, strict=True)], schema=schema))
                    rows += len(batch)
    except (csv.Error, ValueError) as error:
        raise Trouble(EXIT_INPUT, f"{path}: {error}; other tables than a plain CSV need the folder addons/ beside the script") \
            from None
    file = {"name": path.name, "rows": rows, "bytes": info.st_size, "mtime_ns": info.st_mtime_ns, "sha256": file_sha256(path)}
    return {"kind": "csv", "columns": columns, "rows": rows, "malformed": 0, "files": [file]}


def inputs_addon() -> Any:
    """addons/inputs.py, which reads every kind of input at speed; None for a script that stands alone."""
    there = importlib.util.find_spec("addons") and importlib.util.find_spec("addons.inputs")
    return importlib.import_module("addons.inputs") if there else None


@profile
def plan(config: Config, fresh: bool = False, joins: bool = False) -> Plan:
    """Stage the input, or check that `output_path` holds this very run; cut the rows into partitions.

    The manifest holds the input's identity, the settings that decide a score (`settings`) and what only the loaded
    model can tell (`resolved`, added by `settle`). Raises Trouble: exit 2 if the folder holds another run, 3 for the
    input, 5 for the output disk. One that `joins` others at work on the run leaves what they have settled.
    """
    output, inputs, trouble = pathlib.Path(config.output_path), inputs_addon(), functools.partial(Trouble, EXIT_INPUT)
    if fresh or not _has_parts(output):  # nothing is made, and nothing discarded, for an input that is not there
        if inputs:
            inputs.check_there(config.csv_path, trouble)
        elif not pathlib.Path(config.csv_path).is_file():
            raise trouble(f"csv_path {config.csv_path!r} is no file here (in {pathlib.Path.cwd().name}/)")
    if _overlap(pathlib.Path(config.csv_path), output):
        raise Trouble(EXIT_CONFIG, f"csv_path {config.csv_path!r} is where results go in output_path {config.output_path!r}: "
                                   "write elsewhere with --set output_path=...")
    with locked(output):
        remove_leftovers(output)
        if fresh:
            discard_run(output)
        manifest = _find_or_make_manifest(config, output)
        if not joins and not _has_parts(output) and manifest.pop("resolved", None):
            write_json(output / "manifest.json", manifest)  # nothing scored yet: the model and device may be others
    shards = inputs.open_rows(manifest, config, trouble, RowFailure) if manifest["kind"] in ("parquet", "tar") else None
    return Plan(output, manifest, cut_rows(manifest, output), shards)


def _overlap(source: pathlib.Path, output: pathlib.Path) -> bool:
    """Whether a run into the folder `output` would write over its own input `source`: a table, a folder or a glob."""
    own = source.parent.resolve() == output.resolve() and any(fnmatch.fnmatch(name, source.name) for name in RUN_FILES)
    return own or source.resolve() in (output.resolve(), (output / "parts").resolve())


def cut_rows(manifest: dict, output: pathlib.Path) -> list[Partition]:
    """The partitions of the run that `manifest` describes."""
    step, rows = manifest["partition_rows"], manifest["rows"]
    edges = [*manifest.get("starts", [0][:rows]), rows]  # of tars, which no partition crosses
    starts = [start for a, b in itertools.pairwise(edges) for start in range(a, b, step)]
    return [Partition(i, a, b, output / "parts") for i, (a, b) in enumerate(itertools.pairwise([*starts, rows]))]


def _find_or_make_manifest(config: Config, output: pathlib.Path) -> dict:
    """The manifest of the run that `output` holds, if it is this one; a new one where nothing is scored yet."""
    settings, inputs = {k: v for k, v in dataclasses.asdict(config).items() if k not in HARMLESS_KEYS}, inputs_addon()
    manifest = _read_json(output / "manifest.json")
    if manifest is not None:
        differences = _differences(manifest, settings, config)
        if differences and _has_parts(output):
            raise Trouble(EXIT_CONFIG, f"{output} holds another run ({'; '.join(differences)}): discard it with --fresh, "
                                       "or write elsewhere with --set output_path=...")
        manifest = None if differences else manifest  # nothing scored yet, so nothing is lost by planning anew
    if manifest is None:
        if _has_parts(output):
            raise Trouble(EXIT_CONFIG, f"{output} holds parts of a run but no readable manifest.json: discard it with --fresh, "
                                       "or write elsewhere with --set output_path=...")
        with output_disk(output):
            described = inputs.describe(config, output, functools.partial(Trouble, EXIT_INPUT), say, atomic_file) if inputs \
                else stage_plain(config, output)
            (output / "parts").mkdir(parents=True, exist_ok=True)
            (output / "profile.json").unlink(missing_ok=True)  # of a run whose table was empty
        # as it will be read back, so that the two can be compared
        manifest = json.loads(json.dumps({"version": __version__, "settings": settings, **described}))
        size = config.partition_rows
        if size == "auto":  # a tar is one partition
            size = max(1, manifest["rows"]) if "starts" in manifest else min(10_000, max(256, manifest["rows"] // 200))
        manifest["partition_rows"] = size
        if config.pretrained_model != "none" and (passport := optional_addon("passport", "no score passport")):
            manifest["parity_rows"] = passport.count_rows(manifest["rows"], config.parity_rows)
        write_json(output / "manifest.json", manifest)
        if manifest["malformed"]:
            say(f"{manifest['malformed']} lines of {config.csv_path} are no rows: see {output / 'bad_rows.csv'}")
    return manifest


def _differences(manifest: dict, settings: dict, config: Config) -> list[str]:
    """What differs between the run that `manifest` describes and the one asked for now, in words."""
    differences = [f"{key} was {manifest['settings'].get(key)!r}, now {value!r}"
                   for key, value in settings.items() if manifest["settings"].get(key) != value]
    inputs, path, recorded = inputs_addon(), pathlib.Path(config.csv_path), manifest["files"]
    if inputs:
        return differences + inputs.same_input(manifest, config)
    same = path.is_file() and file_sha256(path) == recorded[0]["sha256"]
    return differences + ([] if same else [f"the content of {path} has changed"])


def _has_parts(output: pathlib.Path) -> bool:
    return any((output / "parts").glob("part-*.parquet"))


def refuse_other_run(plan: Plan, known: dict | None) -> None:
    """Trouble (exit 2) unless `known`, the manifest on disk, is this plan's: another process may have planned anew since."""
    if known is None or known | {"resolved": 0} != plan.manifest | {"resolved": 0}:
        raise Trouble(EXIT_CONFIG, f"{plan.output} has been planned anew by another process: this run's parts are not for it")


def settle(plan: Plan, scorer: "Scorer | None") -> None:
    """Record what only the loaded model could tell (weights, device, dtype, batch size), or refuse a worker that differs.

    A batch size that is left to be found is found by the first worker, and taken from the manifest by all others.
    From here on there is work under way: what an earlier run summed up no longer counts.
    """
    with locked(plan.output):
        manifest = _read_json(plan.output / "manifest.json")
        if manifest:
            refuse_other_run(plan, manifest)
        known = (manifest or {}).get("resolved")
        if scorer and scorer.config.batch_size == "auto":
            scorer.batch_size = (known or {}).get("batch_size") or scorer.find_batch_size()
        resolved = scorer.identity() if scorer else {}
        recorded = resolved if known is None else known
        differences = [f"{key} was {recorded.get(key)!r}, now {value!r}"
                       for key, value in resolved.items() if recorded.get(key) != value]
        if differences:
            raise Trouble(EXIT_CONFIG, f"{plan.output} was begun with another model or device ({'; '.join(differences)}): "
                                       "discard it with --fresh, or write elsewhere with --set output_path=...")
        plan.manifest["resolved"] = resolved
        write_json(plan.output / "manifest.json", plan.manifest)
        with output_disk(plan.output):
            (plan.output / "profile.json").unlink(missing_ok=True)


RUN_FILES = ("manifest.json", "pairs.parquet", "bad_rows.csv", "scores.csv", "scores.parquet", "profile.json",
             "memory-time.png")


def discard_run(output: pathlib.Path) -> None:
    """Remove this program's own files from `output`, the manifest last; anything else there stays."""
    with output_disk(output):
        for path in [*(output / "parts").glob("part-*"), *(output / name for name in reversed(RUN_FILES))]:
            path.unlink(missing_ok=True)


# ── Images: find, fetch, decode ───────────────────────────────────────────────────────────────────────────────────────

ALLOWED_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
LARGE_PIXELS = 16_000_000  # pictures above this are decoded one at a time: 50 megapixels are 150 MB as RGB
MAX_ASPECT = 200  # a strip of 1 x 100,000 px would be resized to gigabytes before its centre is cut out; so that is cut first


def read_file(folder: pathlib.Path, source: str, max_bytes: int) -> bytes:
    """The bytes of the file that `source` (a relative path, or a URL whose last segment counts) names inside `folder`."""
    try:
        is_url = "://" in source
        last = (urllib.parse.urlsplit(source).path if is_url else source).rsplit("/", 1)[-1]
    except ValueError:
        raise RowFailure("missing", "not a URL") from None
    if not last:
        raise RowFailure("missing", "no file name")
    for name in dict.fromkeys((last, urllib.parse.unquote(last)) if is_url else (source, last)):
        try:
            path = (folder / name).resolve()
            if not path.is_relative_to(folder):
                raise RowFailure("forbidden", "outside image_path")
            handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a FIFO must not block the open
        except (FileNotFoundError, NotADirectoryError):
            continue
        except PermissionError:
            raise RowFailure("forbidden", "no permission to read the file") from None
        except (OSError, ValueError, RuntimeError):  # a name too long, with a NUL, or a loop of links
            raise RowFailure("missing", "no usable file name") from None
        try:
            info = os.fstat(handle)
            if not stat.S_ISREG(info.st_mode):
                raise RowFailure("forbidden", "not a regular file")
            if info.st_size > max_bytes:
                raise RowFailure("too_large", f"{info.st_size} bytes")
            with open(handle, "rb", closefd=False) as file:
                return file.read(max_bytes + 1)
        except OSError:
            raise RowFailure("corrupt", "the disk cannot read the file") from None
        finally:
            os.close(handle)
    raise RowFailure("missing", "no such file in image_path")


def decode_image(data: bytes, config: Config, target: tuple[int, int] | None = None,
                 holding: contextlib.ExitStack | None = None) -> Any:
    """Bytes to an 8-bit RGB PIL picture; raises RowFailure. `target` (width, height) lets `decode: scaled` shrink JPEGs.

    A caller that goes on to work with the picture gives `holding`, in which the turn of a large one is kept.
    """
    from PIL import Image, UnidentifiedImageError
    _prepare_pillow(config.max_image_pixels)
    try:
        formats = (*ALLOWED_FORMATS, "AVIF") if config.avif else ALLOWED_FORMATS
        with contextlib.ExitStack() as mine, Image.open(io.BytesIO(data), formats=formats) as image:
            pixels = image.width * image.height
            if pixels > config.max_image_pixels:
                raise RowFailure("bomb", f"{image.width} x {image.height} pixels")
            if config.decode == "scaled" and target and image.format == "JPEG":
                image.draft(None, (2 * target[0], 2 * target[1]))  # never below twice the target: nearer shows in the score
            if pixels > LARGE_PIXELS:
                stack = holding or mine
                stack.enter_context(_LARGE_IMAGE)
                stack.callback(trim_memory)
            image.load()
            return to_rgb(image, config)
    except RowFailure:
        raise
    except UnidentifiedImageError:
        raise RowFailure(*_odd_pictures().why_unidentified(data)) from None
    except Image.DecompressionBombError:
        raise RowFailure("bomb", "too many pixels") from None
    except MemoryError:
        raise RowFailure("bomb", "not enough memory to decode") from None
    except (OSError, ValueError, TypeError, SyntaxError, NotImplementedError, IndexError, KeyError, AttributeError,
            EOFError, OverflowError, ZeroDivisionError, AssertionError, RuntimeError, struct.error) as error:
        raise RowFailure("corrupt", type(error).__name__) from None


_LARGE_IMAGE = threading.Lock()


@functools.cache
def _prepare_pillow(max_pixels: int) -> None:
    """Keep Pillow's own pixel limit from lying below ours, and its warnings about strangers' pictures off stderr."""
    from PIL import Image
    if Image.MAX_IMAGE_PIXELS is not None:
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)
    warnings.filterwarnings("ignore", module=r"PIL\.")


def trim_memory() -> None:
    """Have the C library give freed memory back: without it, each thread keeps what its largest picture took."""
    with contextlib.suppress(OSError, AttributeError):  # glibc has it, others do not
        ctypes.CDLL(None).malloc_trim(0)


def _odd_pictures() -> Any:
    """The addon for pictures that are rarely met; without it beside the script, such a picture is `unsupported`."""
    try:
        return importlib.import_module("addons.odd_pictures")
    except ImportError:
        raise RowFailure("unsupported", "needs addons/odd_pictures.py beside the script") from None


def to_rgb(image: Any, config: Config) -> Any:
    """Any PIL picture (first frame) as 8-bit RGB, where a bare `convert` would give silent white or black.

    16-bit grey is scaled by 1/257, wider integers and floats by the range they fill ([0, 1], [0, 255] and [0, 65535] are
    kept as scales, anything else is stretched), transparency is laid over `transparent_over`.
    """
    from PIL import Image, ImageOps
    if config.exif_orientation:
        image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return _odd_pictures().grey_from_numbers(image).convert("RGB")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        below = Image.new("RGB", image.size, config.transparent_over)
        below.paste(image, mask=image.getchannel("A"))
        return below
    return image if image.mode == "RGB" else image.convert("RGB")


# ── Images: resize to what the model reads ────────────────────────────────────────────────────────────────────────────

@dataclasses.dataclass(frozen=True)
class ImageSettings:
    """How the model's own image processor resizes and crops: sizes are (height, width) in pixels."""

    shortest_edge: int | None
    size: tuple[int, int] | None
    crop: tuple[int, int] | None
    resample: int  # Pillow's number: 2 bilinear, 3 bicubic

    @classmethod
    def of(cls, processor: Any) -> "ImageSettings":
        """Read them from a transformers image processor; raises Trouble (exit 6) for steps this program does not know."""
        size, edge = dict(processor.size), processor.size.get("shortest_edge")
        pair = (size["height"], size["width"]) if size.get("height") and size.get("width") else None
        crop = processor.crop_size if getattr(processor, "do_center_crop", False) else None
        if not processor.do_resize or size.get("longest_edge") or not (edge or pair) or getattr(processor, "do_pad", False):
            raise Trouble(EXIT_MODEL, f"the model's image processor asks for an unknown resize: {size}")
        return cls(edge, pair, (crop["height"], crop["width"]) if crop else None, int(processor.resample))

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after the resize, rounded as transformers rounds."""
        if self.size:
            return self.size
        assert self.shortest_edge
        long_edge = int(self.shortest_edge * max(height, width) / min(height, width))
        return (long_edge, self.shortest_edge) if height > width else (self.shortest_edge, long_edge)

    def knows_fast_resize(self) -> bool:
        """Whether torch's antialiased kernel has the model's way of resampling."""
        return self.resample in (2, 3)

    def without_ends(self, image: Any) -> Any:
        """A strip longer than MAX_ASPECT cut to its centre, where the crop keeps the centre only; others as they are."""
        if not self.shortest_edge or not self.crop or max(image.size) <= MAX_ASPECT * min(image.size):
            return image
        return _odd_pictures().trim_strip(image, MAX_ASPECT)


# What the dry run (`pretrained_model: none`) resizes to: the shape most models read.
DRY_RUN_SETTINGS = ImageSettings(224, None, (224, 224), 3)


def resize_fast(image: Any, settings: ImageSettings) -> Any:
    """RGB picture -> (3, H, W) uint8 array by torch's antialiased kernel, within one level of 255 of Pillow's.

    It is the kernel that transformers' own default backend calls, on bytes and without torchvision.
    """
    import torch
    pixels = _lend_pixels(image).permute(2, 0, 1)[None]  # (1, 3 or 4, h, w), channels last in memory
    size = settings.resized(image.height, image.width)
    mode = {2: "bilinear", 3: "bicubic"}[settings.resample]
    return center_crop(torch.nn.functional.interpolate(pixels, size, mode=mode, antialias=True)[0, :3].numpy(), settings.crop)


def _lend_pixels(image: Any) -> Any:
    """The picture's (h, w, 4) uint8 tensor in Pillow's own memory, which has four bytes a pixel; a copy (h, w, 3) where
    Pillow cannot lend it: before 11.3, and beyond 16 MB."""
    import numpy as np
    import pyarrow as pa
    import torch
    if hasattr(image, "__arrow_c_array__"):
        with contextlib.suppress(ValueError):
            return torch.from_dlpack(pa.array(image).flatten()).view(image.height, image.width, 4)
    return torch.from_numpy(np.array(image))


def resize_pillow(image: Any, settings: ImageSettings) -> Any:
    """RGB picture -> (3, H, W) uint8 array by Pillow alone: the dry run, which loads no torch."""
    import numpy as np
    height, width = settings.resized(image.height, image.width)
    return center_crop(np.asarray(image.resize((width, height), settings.resample)).transpose(2, 0, 1), settings.crop)


def center_crop(pixels: Any, crop: tuple[int, int] | None) -> Any:
    """The middle of a (3, h, w) array, the same pixels that transformers takes; black border where it is too small."""
    import numpy as np
    if crop is None:
        return np.ascontiguousarray(pixels)
    height, width = pixels.shape[1:]
    if height < crop[0] or width < crop[1]:
        missing = max(0, crop[0] - height), max(0, crop[1] - width)
        pixels = np.pad(pixels, [(0, 0), *((math.ceil(n / 2), n // 2) for n in missing)])
        height, width = pixels.shape[1:]
    top, left = (height - crop[0]) // 2, (width - crop[1]) // 2
    return np.ascontiguousarray(pixels[:, top:top + crop[0], left:left + crop[1]])


@dataclasses.dataclass
class Loaded:
    """What a loader thread made of one source: `pixels` (3, H, W) uint8 or a `failure`; seconds per stage."""

    pixels: Any = None
    failure: RowFailure | None = None
    digest: bytes = b""
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)


class ImageLoader:
    """Source (URL or path) -> Loaded. Runs in loader threads; knows the model only by its ImageSettings and resize."""

    def __init__(self, config: Config, settings: ImageSettings, resize: Callable[[Any, ImageSettings], Any],
                 threads: int, read: Callable[[str], bytes] | None = None) -> None:
        self.config, self.settings, self.resize = config, settings, resize
        self.decode_bytes: Callable[..., Any] = decode_image
        self.for_the_card: Callable[[bytes, bytes], Any] | None = None  # with decode: gpu, what takes pictures off our hands
        self.read: Callable[[str], bytes]
        if read:
            self.read = read
        elif config.image_path == "url":
            self.read = addon("fetch", "image_path: url").Fetcher(config, max(1, threads), RowFailure)
        else:
            folder = pathlib.Path(config.image_path).resolve()
            self.read = lambda source: read_file(folder, source, config.max_image_bytes)

    def __call__(self, source: str) -> Loaded:
        """Read, decode and resize one source; never raises for what is wrong with it."""
        loaded = Loaded()
        clock = Clock(loaded.seconds)
        try:
            if not source.strip():
                raise RowFailure("missing", "no URL")
            with clock.stage("fetch"):
                data = self.read(source.strip())
            loaded.digest = hashlib.blake2b(data, digest_size=16).digest()
            if self.for_the_card and (on_card := self.for_the_card(data, loaded.digest)):
                loaded.pixels = on_card
                return loaded
            with contextlib.ExitStack() as holding:
                with clock.stage("decode", time.thread_time):
                    image = self.decode(data, holding)
                with clock.stage("resize", time.thread_time):
                    loaded.pixels = self.resize(image, self.settings)
                del image  # before another thread's large picture gets its turn
        except RowFailure as failure:
            loaded.failure = failure.with_traceback(None)
        return loaded

    @functools.cached_property
    def isolated(self) -> "ImageLoader":
        """A copy that decodes in a child process, for a partition at which an earlier run died or hung."""
        loader = copy.copy(self)
        loader.for_the_card = None
        loader.decode_bytes = addon("isolate", "a partition left behind").IsolatedDecoder(
            dataclasses.asdict(self.config), RowFailure)
        return loader

    @profile
    def decode(self, data: bytes, holding: contextlib.ExitStack | None = None) -> Any:
        """Bytes -> RGB picture, ready to be resized."""
        edge = self.settings.shortest_edge
        image = self.decode_bytes(data, self.config, (edge, edge) if edge else self.settings.size, holding)
        return self.settings.without_ends(image)


def wait_for(future: "Future[Any]") -> None:
    """Wait until the future has a result, but not through an interruption."""
    while not concurrent.futures.wait([future], timeout=0.2).done:
        INTERRUPTION.check()


def compute_in_one_thread() -> None:
    """Keep torch to this thread for its arithmetic: there are as many threads as cores already. No torch: a dry run."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


HANGS_S = 15.0  # a picture that was waited for longer than this when the run was stopped is tried in isolation by the next


class LoaderPool:
    """Loads sources ahead of their use: `add` them, `take` them in the same order; a bounded number is in flight."""

    hangs = False  # the run was stopped while it waited for a picture that does not come

    def __init__(self, threads: int) -> None:
        self._window = 4 * threads + 8
        self._waiting: collections.deque[tuple[Callable[[str], Loaded], str]] = collections.deque()
        self._flying: collections.deque[Future[Loaded]] = collections.deque()
        self._pool = ThreadPoolExecutor(threads, "loader", compute_in_one_thread) if threads else None

    def add(self, load: Callable[[str], Loaded], sources: Iterable[str]) -> None:
        """Queue names (not pictures: those stay within the window) to be loaded by `load`."""
        self._waiting.extend((load, source) for source in sources)
        self._launch()

    def _launch(self) -> None:
        while self._pool and self._waiting and len(self._flying) < self._window:
            load, source = self._waiting.popleft()
            self._flying.append(self._pool.submit(load, source))

    def take(self) -> Loaded:
        """The oldest source's result; waits for it, but not through an interruption."""
        if not self._pool:
            load, source = self._waiting.popleft()
            return load(source)
        future, since = self._flying.popleft(), time.monotonic()
        try:
            wait_for(future)
        finally:
            self.hangs = not future.done() and time.monotonic() - since > HANGS_S
        self._launch()
        return future.result()

    def close(self) -> None:
        """Drop what is queued; a fetch under way ends by its own deadline."""
        if self._pool:
            self._pool.shutdown(wait=False, cancel_futures=True)


def loader_threads(config: Config) -> int:
    """How many loader threads `auto` means: the cores for files, many waiting ones for URLs, none under a line profiler."""
    if PROFILED:
        return 0
    if config.loader_threads != "auto":
        return config.loader_threads
    return max(32, 4 * usable_cores()) if config.image_path == "url" else min(32, usable_cores())


def usable_cores() -> int:
    """The cores that this process may use: its share where a launcher started several here."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE") or 1))


# ── Clock ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

# The stages of one pair's way, in order. Several threads share the work, so decode, resize and, on the CPU, the encoders
# count CPU seconds of their thread; fetch and a GPU's encoders count wall seconds. The last two are what the main thread
# waited for.
PREPARE_STAGES = ("fetch", "decode", "resize", "tokenize")
METRIC_STAGES = ("image_encoder", "text_encoder", "score")
STAGES = (*PREPARE_STAGES, *METRIC_STAGES, "null", "write", "wait_for_images", "wait_for_model")


class Clock:
    """Seconds per stage, added up in the dict given."""

    current = "start"  # what the main thread is at, for the memory curve

    def __init__(self, seconds: dict[str, float] | None = None) -> None:
        self.seconds = seconds if seconds is not None else {}

    def add(self, seconds: dict[str, float]) -> None:
        """Add another clock's seconds to this one's."""
        for name, value in seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + value

    @contextlib.contextmanager
    def stage(self, name: str, timer: Callable[[], float] = time.perf_counter) -> Iterator[None]:
        """Count what happens inside towards `name`."""
        started = timer()
        if threading.current_thread() is threading.main_thread():
            Clock.current = name
        try:
            yield
        finally:
            self.add({name: timer() - started})


def gpu_memory_mib(peak: bool = False) -> float:
    """Memory that torch holds on the GPU, in MiB; 0 without one (and without importing torch to find out)."""
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "cuda") or not torch.cuda.is_initialized():
        return 0.0
    return (torch.cuda.max_memory_reserved() if peak else torch.cuda.memory_reserved()) / 2**20


def peak_memory_mib() -> float:
    """The most memory this process has ever held, in MiB."""
    with contextlib.suppress(OSError):  # elsewhere than on Linux; the number below counts who started this process, too
        status = pathlib.Path("/proc/self/status").read_text(encoding="utf-8", errors="replace")
        if peak := re.search(r"^VmHWM:\s+(\d+) kB", status, re.M):
            return int(peak[1]) / 2**10
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


# ── Model: find and load ──────────────────────────────────────────────────────────────────────────────────────────────

BUNDLED_HINT = "without the Hub, run the bundled model: python image_text_sim_clip.py --config challenge_set/demo.yaml"
SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")


@dataclasses.dataclass(frozen=True)
class ModelFiles:
    """A folder with a model in it, and where it came from: `identity` is the Hub commit or the weights' fingerprint."""

    folder: pathlib.Path
    identity: str
    safetensors: bool


def find_model(config: Config) -> ModelFiles:
    """A local folder, the Hub (at one commit) or the Hub's local cache; raises Trouble (exit 6) that says what was tried."""
    name, folder = config.pretrained_model, pathlib.Path(config.pretrained_model)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise Trouble(EXIT_MODEL, f"{name} holds no config.json: not a model folder")
        if not any((folder / f).is_file() for f in SAFETENSORS):
            raise Trouble(EXIT_MODEL, f"{name} holds no model.safetensors: local folders must (a pickle can run code)")
        return ModelFiles(folder, _weights_fingerprint(folder), True)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise Trouble(EXIT_MODEL, f"pretrained_model {name!r} is neither a folder nor a Hub id (owner/name); {BUNDLED_HINT}")
    hub = addon("hub", f"pretrained_model {name!r}")
    try:
        snapshot, safetensors = hub.find_on_hub(name, config.revision, config.safetensors_only)
    except hub.NotFound as error:
        raise Trouble(EXIT_MODEL, f"{error}; {BUNDLED_HINT}") from None
    if not safetensors:
        say(f"warning: {name} has no safetensors at this revision; reading pytorch_model.bin with weights_only")
    return ModelFiles(snapshot, snapshot.resolve().name, safetensors)


def _weights_fingerprint(folder: pathlib.Path) -> str:
    """A hash of the config and of each weights file's size, head and 16 samples: training again changes all of them."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for i in range(17):
                file.seek(i * size // 17)
                digest.update(file.read(65536))
    return digest.hexdigest()[:16]


def choose_device(config: Config) -> str:
    """'cuda' where there is one and it is asked for; warns where it is asked for and missing."""
    import torch
    if config.use_cuda and torch.cuda.is_available():
        return "cuda"
    if config.use_cuda:
        say("warning: use_cuda is true, but torch sees no CUDA device; running on the CPU")
    return "cpu"


def choose_dtype(config: Config, device: str) -> str:
    """The dtype that `auto` means: bfloat16 on a GPU that has it, float16 on an older one, float32 on the CPU."""
    import torch
    if config.dtype != "auto":
        return config.dtype
    if device == "cpu":
        return "float32"
    return "bfloat16" if torch.cuda.get_device_capability()[0] >= 8 else "float16"


def load_model(files: ModelFiles, name: str) -> tuple[Any, Any, Any]:
    """Model (eval mode, float32, on the CPU), tokenizer and Pillow image processor; raises Trouble (exit 6).

    Remote code never runs.
    """
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")  # transformers would ask an outside service to convert
    import torch
    import transformers
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        model_config = transformers.AutoConfig.from_pretrained(files.folder, trust_remote_code=False)
        kind = model_config.model_type
        if kind == "siglip2":
            raise Trouble(EXIT_MODEL, f"{name} is a NaFlex SigLIP 2, which this program does not score; take one of a fixed "
                                      "resolution, such as google/siglip2-base-patch16-224")
        if kind not in ("clip", "siglip"):
            raise Trouble(EXIT_MODEL, f"{name} is a {kind!r} model; this program scores with CLIP and SigLIP models")
        architecture: Any = transformers.CLIPModel if kind == "clip" else transformers.SiglipModel
        model, loading = architecture.from_pretrained(
            files.folder, dtype=torch.float32, attn_implementation="sdpa", use_safetensors=files.safetensors,
            output_loading_info=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(files.folder, trust_remote_code=False)
        # explicit, because the default backend depends on what is installed, and the two differ slightly
        processor = transformers.AutoImageProcessor.from_pretrained(files.folder, backend="pil", trust_remote_code=False)
    except Trouble:
        raise
    except pickle.UnpicklingError:  # torch's own text recommends weights_only=False
        raise Trouble(EXIT_MODEL, f"cannot load {name}: its pytorch_model.bin holds more than weights") from None
    except Exception as error:  # a broken folder makes transformers raise nearly anything
        raise Trouble(EXIT_MODEL, f"cannot load {name}: {type(error).__name__}: {str(error)[:300]}") from error
    if loading["missing_keys"]:  # transformers fills these with random numbers and goes on
        raise Trouble(EXIT_MODEL, f"{name} lacks weights: {', '.join(sorted(loading['missing_keys'])[:3])} ...")
    return model.eval().requires_grad_(False), tokenizer, processor


def _align_weights(model: Any) -> Any:
    """Copy the weights whose place in a mapped file is not aligned as torch's own memory is: another alignment chooses
    other CPU kernels, and the same weights score an ulp apart."""
    import torch

    def copy_weight(weight: Any) -> None:
        if weight.data_ptr() % 64 or not weight.is_contiguous():
            weight.data = weight.data.clone(memory_format=torch.contiguous_format)
    with ThreadPoolExecutor(usable_cores()) as pool:  # it reads the file, half of what a start takes
        collections.deque(pool.map(copy_weight, [*model.parameters(), *model.buffers()]), 0)
    return model


# ── Model: score ──────────────────────────────────────────────────────────────────────────────────────────────────────

DEFAULT_BATCH = {"cpu": 16, "cuda": 256}  # of one core: larger ones are no faster, and leave a core idle at a partition's end


class Scorer:
    """A loaded model that turns pictures and captions into embeddings and cosines.

    `Scorer(load_config(path)).similarity(images, captions)` is all most callers need.
    """

    @profile
    def __init__(self, config: Config) -> None:
        import torch
        self.config, self.oom_halvings = config, 0
        self.device = choose_device(config)
        self.dtype = choose_dtype(config, self.device)
        self.batch_size = DEFAULT_BATCH[self.device] if config.batch_size == "auto" else config.batch_size
        self.files = find_model(config)
        self.model, self.tokenizer, self.processor = load_model(self.files, config.pretrained_model)
        # read before the model is cast: bfloat16 makes 115.58 of SigLIP's 117.35
        self.scale = self.model.logit_scale.exp().item()
        self.bias = self.model.logit_bias.item() if self.model.config.model_type == "siglip" else 0.0
        self.quantization = "none"
        if config.quantization != "none":
            self.quantization = addon("quantize", "quantization").quantize_model(self.model, self.device)
        _align_weights(self.model.to(self.device, getattr(torch, self.dtype)))
        self._compiled = addon("compiled", "compile") if config.compile else None
        if self._compiled:
            self._compiled.compile_encoders(self.model)
        self.kind = self.model.config.model_type
        self.settings = ImageSettings.of(self.processor)
        self.context_length = self.model.config.text_config.max_position_embeddings
        self._check_tokenizer()
        self._pixel_table = torch.from_numpy(self._normalised_levels()).to(self.device)  # (3, 256) float32
        self._float32_model: Any = None
        self.card: Any = None  # decodes pictures: decode: gpu
        self.lanes = 0 if PROFILED else usable_cores() if self.device == "cpu" else 1

    @functools.cached_property
    def _lane_pool(self) -> ThreadPoolExecutor:
        """On the CPU a lane for each core, with one thread for its arithmetic: no core waits for another at the end of each
        layer, and no score depends on how many there are. On a GPU one lane, so that the main thread need not wait."""
        return ThreadPoolExecutor(self.lanes, "lane", compute_in_one_thread if self.device == "cpu" else None)

    def submit(self, stage: str, encode: Callable[[Any], Any], batch: Any) -> "Future[tuple[Any, dict[str, float]]]":
        """Have a lane compute `encode(batch)`; the future gives the embeddings and the seconds they took in `stage`."""
        def timed() -> tuple[Any, dict[str, float]]:
            clock = Clock()
            with clock.stage(stage, time.thread_time if self.device == "cpu" else time.perf_counter):
                embeddings = encode(batch)
            return embeddings, clock.seconds
        if self.lanes:
            return self._lane_pool.submit(timed)
        future: Future[tuple[Any, dict[str, float]]] = Future()
        future.set_result(timed())
        return future

    def find_batch_size(self) -> int:
        """The batch size for this GPU and its free memory; on the CPU, where it hardly matters, the default."""
        tuner = optional_addon("tune", f"batch_size {self.batch_size}") if self.device == "cuda" else None
        return tuner.tune(self, say) if tuner else self.batch_size

    def identity(self) -> dict:
        """What decides the scores and only the loaded model can tell; kept in the manifest."""
        return {"model_type": self.kind, "weights": self.files.identity, "safetensors": self.files.safetensors,
                "device": self.device, "dtype": self.dtype, "quantization": self.quantization,
                "decoder": "card" if self.card else "pillow", "batch_size": self.batch_size}

    def _check_tokenizer(self) -> None:
        """Refuse a tokenizer whose end-of-text the model would not pool at; find out whether it lower-cases."""
        known, embedded = set(self.tokenizer.get_vocab().values()), self.model.config.text_config.vocab_size
        probe = self._encode(["Ab"])[0]
        never = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special} - set(probe)
        if max(known - never) >= embedded or len(known) < embedded / 2:  # transformers makes one up where files are missing
            raise Trouble(EXIT_MODEL, f"{self.config.pretrained_model}: its tokenizer has {len(known)} tokens and its model "
                                      f"{embedded}: they do not belong together")
        if self.kind == "siglip":
            # SigLIP was trained on lower case; SigLIP 2's published tokenizer leaves that to its user
            self._lower_case = probe != self._encode(["ab"])[0]
            return
        self._lower_case = False
        eos = self.model.config.text_config.eos_token_id
        legacy = eos == 2  # transformers then pools at the largest id, as OpenAI's published configs need
        expected = max(self.tokenizer.get_vocab().values()) if legacy else eos
        if probe[-1] != expected:
            raise Trouble(EXIT_MODEL, f"{self.config.pretrained_model}: its config pools captions at id {expected}, but its "
                                      f"tokenizer ends them with id {probe[-1]}")

    def _normalised_levels(self) -> Any:
        """(3, 256) float32: what the model's own processor makes of each byte value in each channel."""
        import numpy as np
        ramp = np.broadcast_to(np.arange(256, dtype=np.uint8), (3, 1, 256))
        out = self.processor(ramp, do_resize=False, do_center_crop=False, do_convert_rgb=False,
                             input_data_format="channels_first")
        return np.ascontiguousarray(np.asarray(out["pixel_values"][0], dtype=np.float32)[:, 0])

    def resize(self, image: Any, settings: ImageSettings) -> Any:
        """RGB picture -> (3, H, W) uint8, the fast or the exact way (`preprocess`)."""
        if self.config.preprocess == "fast" and settings.knows_fast_resize():
            return resize_fast(image, settings)
        import numpy as np
        pixels = self.processor(image, do_rescale=False, do_normalize=False)["pixel_values"][0]
        return np.asarray(pixels, dtype=np.uint8)

    def _encode(self, captions: list[str], **options: Any) -> list[list[int]]:
        # split_special_tokens: a caption that contains <|endoftext|> would otherwise end there
        return self.tokenizer(captions, split_special_tokens=True, return_attention_mask=False, verbose=False,
                              **options)["input_ids"]

    def tokenize(self, captions: list[str]) -> tuple[list[list[int]], list[bool]]:
        """Token ids per caption, cut at the context length with end-of-text kept; and which captions were cut."""
        if self._lower_case:
            captions = [caption.lower() for caption in captions]
        ids = self._encode(captions, truncation=True, max_length=self.context_length)
        truncated = [False] * len(captions)
        full = [i for i, row in enumerate(ids) if len(row) >= self.context_length]
        for i, whole in zip(full, self._encode([captions[i] for i in full]) if full else [], strict=True):
            truncated[i] = len(whole) > self.context_length
        return ids, truncated

    @profile
    def encode_images(self, pixels: Any) -> Any:
        """uint8 tensor (n, 3, H, W), or a future of one -> unit embeddings (n, d), float32, on the CPU."""
        import torch
        pixels = pixels.result() if isinstance(pixels, Future) else pixels
        channel = torch.arange(3, device=self.device).view(1, 3, 1, 1)

        def forward(model: Any, part: Any) -> Any:
            values = self._pixel_table[channel, part.to(self.device, non_blocking=True).long()]  # (n, 3, H, W)
            return model.get_image_features(pixel_values=values.to(model.dtype))
        return self._embed(forward, pixels)

    @profile
    def encode_texts(self, ids: list[list[int]], clock: Clock | None = None) -> Any:
        """Token ids -> unit embeddings (n, d), float32, on the CPU; batches of like length, order kept."""
        import torch
        order, pad, flying = sorted(range(len(ids)), key=lambda i: len(ids[i])), self.tokenizer.pad_token_id, []
        for own_length, alike in itertools.groupby(order, lambda i: self._own_length(ids[i])):
            group = list(alike)
            for start in range(0, len(group), self.batch_size):
                rows = [ids[i] for i in group[start:start + self.batch_size]]
                length = own_length or max(map(len, rows))
                batch = torch.tensor([row + [pad] * (length - len(row)) for row in rows])  # (n, length)
                flying.append(self.submit("text_encoder", functools.partial(
                    self._embed, lambda model, part: model.get_text_features(input_ids=part.to(self.device))), batch))
        parts = [collect(future, clock or Clock()) for future in flying]
        if not parts:
            return torch.empty(0, 0)
        inverse = torch.empty(len(ids), dtype=torch.long)
        inverse[torch.tensor(order)] = torch.arange(len(ids))
        return torch.cat(parts)[inverse]

    def stack(self, batch: list[Any]) -> Any:
        """Loaders' arrays (3, H, W) as one uint8 tensor (n, 3, H, W) that `encode_images` takes, or a future of it."""
        import numpy as np
        import torch
        if self.card:
            return self.card.start(batch)
        pixels = torch.from_numpy(np.stack(batch))
        return pixels.pin_memory() if self.device == "cuda" else pixels  # pinned, so that the upload need not wait

    def _own_length(self, ids: list[int]) -> int:
        """The length that a caption must be padded to whatever its neighbours, or 0 where the longest of its batch will do.

        CLIP's text tower is causal and pooled at end-of-text, so nothing behind that counts, except in the scale of int8
        values, which is the whole caption's. SigLIP's is neither, and was trained on the full length without a mask.
        """
        if self.kind == "siglip":
            return self.context_length
        if self._compiled:
            return self._compiled.few_lengths(len(ids), self.context_length)
        return min(self.context_length, -(-len(ids) // 8) * 8) if self.quantization != "none" else 0

    def _embed(self, forward: Callable[[Any, Any], Any], batch: Any) -> Any:
        """Run `forward(model, batch)`, halving the batch when the GPU is full; normalise in fp32; redo what is not finite."""
        import torch
        unit = None
        try:
            whole = self._compiled.pad_batch(batch, self.batch_size) if self._compiled else batch
            with torch.inference_mode():
                features = forward(self.model, whole)
                features = getattr(features, "pooler_output", features).float()  # transformers 5 wraps it, projected already
                unit = torch.nn.functional.normalize(features[:len(batch)], dim=-1).cpu()
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise Trouble(EXIT_MODEL, f"the GPU has no room for {self.config.pretrained_model} and a single row: take a "
                                          "smaller model, dtype: float16, or use_cuda: false") from None
        if unit is None:  # not in the handler: the error's traceback holds on to what was computed before there was no room
            torch.cuda.empty_cache()
            self._compiled = None  # no padding to a size that does not fit
            self.oom_halvings += 1
            half = len(batch) // 2
            return torch.cat([self._embed(forward, batch[:half]), self._embed(forward, batch[half:])])
        broken = ~torch.isfinite(unit).all(dim=-1)
        if broken.any() and not self.is_plain_float32():
            with torch.inference_mode():
                features = forward(self._in_float32(), batch[broken])
                features = getattr(features, "pooler_output", features)
                unit[broken] = torch.nn.functional.normalize(features, dim=-1).cpu()
        return unit

    def is_plain_float32(self) -> bool:
        """Whether the model's weights and arithmetic are those of the files, in float32."""
        return self.dtype == "float32" and self.quantization == "none"

    def load_plain(self) -> Any:
        """The model once more, in float32 on the CPU."""
        return _align_weights(load_model(self.files, self.config.pretrained_model)[0])

    def _in_float32(self) -> Any:
        """The model in float32, loaded when half precision first overflows."""
        if self._float32_model is None:
            self._float32_model = self.load_plain().to(self.device)
        return self._float32_model

    def cosines(self, image_embeddings: Any, text_embeddings: Any) -> Any:
        """Row-wise dot products of unit embeddings (n, d) -> float32 numpy (n,), clipped to [-1, 1] (rounding)."""
        return (image_embeddings * text_embeddings).sum(-1).clamp(-1, 1).numpy()

    def probabilities(self, cosines: Any) -> Any:
        """SigLIP's sigmoid(scale * cosine + bias), float32; None for CLIP, whose softmax needs competing captions."""
        import numpy as np
        if self.kind != "siglip":
            return None
        with np.errstate(over="ignore"):
            return (1 / (1 + np.exp(-(np.asarray(cosines, np.float64) * self.scale + self.bias)))).astype(np.float32)

    def similarity(self, images: Iterable[Any], captions: Iterable[str]) -> Any:
        """Cosines (n,) float32 of n PIL pictures or paths with n captions. Raises RowFailure for a picture it cannot read."""
        import numpy as np
        import torch
        loader = ImageLoader(dataclasses.replace(self.config, image_path="."), self.settings, self.resize, 0)
        texts, flying, batch = [self.config.caption_template.replace("{}", c) for c in captions], [], []
        pictures = list(images)
        if len(pictures) != len(texts):
            raise ValueError(f"{len(pictures)} images but {len(texts)} captions")
        for number, picture in enumerate(pictures):
            if isinstance(picture, (str, os.PathLike)):
                rgb = loader.decode(pathlib.Path(picture).read_bytes())
            else:
                rgb = self.settings.without_ends(to_rgb(picture, self.config))
            batch.append(self.resize(rgb, self.settings))
            if len(batch) == self.batch_size or number == len(pictures) - 1:
                flying.append(self.submit("image_encoder", self.encode_images, self.stack(batch)))
                batch = []
        if not flying:
            return np.empty(0, np.float32)
        return self.cosines(torch.cat([collect(future, Clock()) for future in flying]),
                            self.encode_texts(self.tokenize(texts)[0]))


def collect(future: "Future[tuple[Any, dict[str, float]]]", clock: Clock) -> Any:
    """The embeddings that a lane computed, its seconds added to `clock`; waits, but not through an interruption."""
    with clock.stage("wait_for_model"):
        wait_for(future)
    embeddings, seconds = future.result()
    clock.add(seconds)
    return embeddings


# ── One partition ─────────────────────────────────────────────────────────────────────────────────────────────────────

@dataclasses.dataclass
class PartitionRun:
    """One partition on its way: the rows to score (a DataFrame) and, for each, where its picture is: URL, path, place in a tar.

    `finish` makes the whole part of the scored rows, which with `--retry-failed` are only some of it.
    """

    partition: Partition
    rows: Any
    sources: list[str]
    finish: Callable[[Any], Any]
    null: dict | None = None  # histograms of random and matched pairs (addons/null.py); at first, those of an earlier run
    watch: Any = None  # what the score passport wants to know of it
    embedded: Any = None  # for save_embeddings: images, texts, and of each row the image and the text (-1: none)

    @classmethod
    def open(cls, plan: Plan, partition: Partition, config: Config, retry: bool) -> "PartitionRun":
        """Read the rows, with `retry` those alone that failed for a passing reason, which no picture in a tar does."""
        rows, finish, null = plan.read_rows(partition.start, partition.stop), lambda table: table, None
        if retry and part_is_done(partition):
            rows, finish = addon("retry", "--retry-failed").failed_rows(rows, read_part(partition))
            null = (_read_json(partition.json) or {}).get("null")
        if hasattr(plan.shards, "sources"):
            return cls(partition, rows, plan.shards.sources(partition.start, partition.stop), finish, null)
        return cls(partition, rows, rows[column_name(config.url_column)].tolist(), finish, null)

    def wanted(self, config: Config) -> list[str]:
        """The distinct sources to load, in order of first use; rows without a caption need none."""
        pairs = zip(self.sources, self.rows[column_name(config.caption_column)], strict=True)
        return list(dict.fromkeys(source for source, caption in pairs if caption.strip()))


def embed_sources(scorer: Scorer | None, sources: list[str], pool: LoaderPool, clock: Clock,
                  on_loaded: Callable[[], None]) -> tuple[dict[str, int | RowFailure], Any]:
    """Load and encode each source once: source -> row of the embeddings (m, d), or why not. Equal files are encoded once."""
    places: dict[str, int | RowFailure] = {}
    known: dict[bytes, int] = {}
    on_card: dict[Any, Any] = {}  # row of the embeddings -> the picture that the card decodes
    batch: list[Any] = []
    parts: list[Any] = []
    flying: collections.deque[Any] = collections.deque()

    def encode_batch(most_in_flight: int) -> None:
        assert scorer
        if batch:
            flying.append(scorer.submit("image_encoder", scorer.encode_images, scorer.stack(batch)))
            batch.clear()
        while len(flying) > most_in_flight:
            parts.append(collect(flying.popleft(), clock))
    for source in sources:
        with clock.stage("wait_for_images"):
            loaded = pool.take()
        clock.add(loaded.seconds)
        if loaded.failure:
            places[source] = loaded.failure
        elif loaded.digest in known:
            places[source] = known[loaded.digest]
        else:
            places[source] = known[loaded.digest] = len(known)
            if scorer:
                batch.append(loaded.pixels)
                if hasattr(loaded.pixels, "failure"):
                    on_card[known[loaded.digest]] = loaded.pixels
        on_loaded()
        if scorer and len(batch) == scorer.batch_size:
            encode_batch(scorer.lanes)
        INTERRUPTION.check()
    if scorer:
        encode_batch(0)
    places = {source: getattr(on_card.get(place), "failure", None) or place for source, place in places.items()}
    if not parts:
        return places, None
    import torch
    return places, torch.cat(parts)


def score_partition(scorer: Scorer | None, run: PartitionRun, pool: LoaderPool, config: Config, clock: Clock,
                    on_loaded: Callable[[], None]) -> Any:
    """The partition's rows with RESULT_COLUMNS added: every row ends as a score or as a reason. No scorer: a dry run."""
    import numpy as np
    places, image_embeddings = embed_sources(scorer, run.wanted(config), pool, clock, on_loaded)
    rows, captions = run.rows, run.rows[column_name(config.caption_column)].tolist()
    sources, count = run.sources, len(rows)
    status, detail = ["ok"] * count, [""] * count
    cosine, truncated = np.full(count, np.nan, np.float32), [False] * count
    scored: list[int] = []
    for i in range(count):
        place = places.get(sources[i]) if captions[i].strip() else RowFailure("empty_caption", "")
        if isinstance(place, RowFailure):
            status[i], detail[i] = place.status, place.detail
        else:
            scored.append(i)
    if scorer and scored:
        texts = list(dict.fromkeys(captions[i] for i in scored))
        with clock.stage("tokenize"):
            ids, cut = scorer.tokenize([config.caption_template.replace("{}", text) for text in texts])
        text_embeddings = scorer.encode_texts(ids, clock)
        with clock.stage("score"):
            at = {text: n for n, text in enumerate(texts)}
            image_rows, text_rows = [places[sources[i]] for i in scored], [at[captions[i]] for i in scored]
            cosine[scored] = scorer.cosines(image_embeddings[image_rows], text_embeddings[text_rows])
            for i, n in zip(scored, text_rows, strict=True):
                truncated[i] = cut[n]
                if not np.isfinite(cosine[i]):
                    status[i], detail[i] = "non_finite", "the model gave no finite embedding, in float32 neither"
            of_row = np.full((2, count), -1, np.int32)
            of_row[:, scored] = np.array([image_rows, text_rows])
            run.embedded = image_embeddings, text_embeddings, *np.where(np.isfinite(cosine), of_row, -1)
        if null := optional_addon("null", "no percentiles"):
            with clock.stage("null"):
                run.null = null.describe_partition(image_embeddings.numpy(), text_embeddings.numpy(), image_rows, text_rows,
                                                   cosine[scored], run.null)
    return _with_results(rows, scorer, cosine, truncated, status, detail)


def _with_results(rows: Any, scorer: Scorer | None, cosine: Any, truncated: list[bool], status: list[str],
                  detail: list[str]) -> Any:
    """The input's columns, one that clashes renamed to input_<name>, then RESULT_COLUMNS; a pyarrow table."""
    import numpy as np
    import pyarrow as pa
    none = ~np.isfinite(cosine)
    probability = scorer.probabilities(cosine) if scorer else None
    results = {
        "similarity": pa.array(cosine, pa.float32(), mask=none),
        "dissimilarity": pa.array(np.float32(1) - cosine, pa.float32(), mask=none),
        "probability": pa.nulls(len(rows), pa.float32()) if probability is None else pa.array(probability, mask=none),
        "truncated": pa.array(truncated, pa.bool_(), mask=none),
        "status": pa.array(status, pa.string()),
        "detail": pa.array(detail, pa.string()),
    }
    inputs = dict(zip(output_names(rows.columns), (pa.array(rows[name], pa.string()) for name in rows.columns), strict=True))
    return pa.table(inputs | results)


def output_names(columns: Iterable[str]) -> list[str]:
    """The input's column names as scores.csv shows them: one that a result needs becomes input_<name>."""
    taken, names = {*columns, *RESULT_COLUMNS}, []
    for name in columns:
        if name in RESULT_COLUMNS:
            name = next(n for k in itertools.count(1) if (n := "input_" * k + name) not in taken)
            taken.add(name)
        names.append(name)
    return names


# ── Parts: exactly once ───────────────────────────────────────────────────────────────────────────────────────────────

_HOST = platform.node().replace(".", "-")  # names whose half-written file it is


def mine_beside(path: pathlib.Path) -> pathlib.Path:
    """A name beside `path` that tells whose it is: `remove_leftovers` takes it away once this process has ended."""
    return path.with_name(f".{path.name}.{_HOST}.{os.getpid()}.tmp")


@contextlib.contextmanager
def atomic_file(path: pathlib.Path) -> Iterator[typing.BinaryIO]:
    """Write beside, fsync, rename: `path` is either what it was or complete, whatever happens in between."""
    beside = mine_beside(path)
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # or the rename itself could be lost with the power
        finally:
            os.close(folder)
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def write_bytes(path: pathlib.Path, content: bytes) -> None:
    """Write `content` to `path` atomically; Trouble (exit 5) where the disk refuses."""
    with output_disk(path), atomic_file(path) as file:
        file.write(content)


def write_json(path: pathlib.Path, content: dict) -> None:
    """Write `content` to `path` atomically; Trouble (exit 5) where the disk refuses."""
    write_bytes(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def file_sha256(path: pathlib.Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_json(path: pathlib.Path) -> dict | None:
    """The object in `path`, or None where there is none that can be read."""
    try:
        content = json.loads(path.read_bytes())
        return content if isinstance(content, dict) else None
    except (OSError, ValueError):
        return None


def commit_part(partition: Partition, table: Any, clock: Clock, wall_s: float, worker: str, extra: dict | None = None) -> dict:
    """Write the part: its JSON first (with what is `extra`), then its Parquet, whose existence is the mark of done.

    Returns the JSON's content. `tried` in it is how many rows the time was spent on: with --retry-failed not all of them.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, compression="zstd")
    data = buffer.getvalue().to_pybytes()
    counts = {entry["values"]: entry["counts"] for entry in table["status"].value_counts().to_pylist()}
    summary = {
        "partition": partition.index, "rows": table.num_rows, "statuses": dict(sorted(counts.items())),
        "similarity_sum": pc.sum(table["similarity"].cast(pa.float64())).as_py() or 0.0,
        "similarity_count": table.num_rows - table["similarity"].null_count,
        "truncated": pc.sum(table["truncated"].cast(pa.int64())).as_py() or 0,
        "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(),
        "worker": worker, "tried": table.num_rows, "ended": round(time.time(), 6),
        "wall_s": round(wall_s, 6), "seconds": {k: round(v, 6) for k, v in sorted(clock.seconds.items())},
        "peak_rss_mib": round(peak_memory_mib(), 1), "peak_gpu_mib": round(gpu_memory_mib(peak=True), 1),
        "oom_halvings": 0, "null": None,
    } | (extra or {})
    write_json(partition.json, summary)
    write_bytes(partition.parquet, data)
    return summary


def part_is_done(partition: Partition) -> bool:
    """Whether the part exists and has the length and the footer it was written with (the sha256 is checked by `finalize`)."""
    summary = _read_json(partition.json)
    try:
        with partition.parquet.open("rb") as file:
            file.seek(-4, os.SEEK_END)
            whole = bool(summary) and file.read() == b"PAR1" and file.tell() == summary["bytes"]  # type: ignore[index]
        return whole and (not (saved := summary.get("embeddings"))  # type: ignore[union-attr]
                          or partition.embeddings.stat().st_size == saved["bytes"])
    except (OSError, KeyError):
        return False


def remove_leftovers(output: pathlib.Path) -> None:
    """Remove what killed processes of this machine left half-written; another machine's may still be at work."""
    import psutil
    for leftover in itertools.chain((output / "parts").glob(".part-*.tmp"), output.glob(".*.tmp")):
        *_, host, pid, _ = leftover.name.rsplit(".", 3)
        with contextlib.suppress(OSError, ValueError):
            if host == _HOST and not psutil.pid_exists(int(pid)):
                leftover.unlink()


@contextlib.contextmanager
def locked(output: pathlib.Path) -> Iterator[None]:
    """Only one process at a time plans, settles or finalises a run; the system frees the lock of one that died."""
    import filelock
    with output_disk(output):
        output.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(output / ".lock")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


# ── Engines: where a partition runs ───────────────────────────────────────────────────────────────────────────────────

class Worker:
    """A loaded model and its loader threads: scores and commits the partitions that an engine gives it."""

    def __init__(self, config: Config, plan: Plan, name: str) -> None:
        read = getattr(plan.shards, "read_bytes", None)  # tars bring their pictures along
        if not read and config.image_path != "url" and not pathlib.Path(config.image_path).is_dir():
            raise Trouble(EXIT_INPUT, f"image_path {config.image_path!r} is no folder here (in {pathlib.Path.cwd().name}/)")
        self.config, self.plan, self.name, self.threads = config, plan, name, loader_threads(config)
        with Clock().stage("load_model"):
            self.scorer = Scorer(config) if config.pretrained_model != "none" else None
        self.loader = ImageLoader(config, self.scorer.settings if self.scorer else DRY_RUN_SETTINGS,
                                  self.scorer.resize if self.scorer else resize_pillow, self.threads, read)
        if self.scorer and config.decode == "gpu":
            addon("gpu_decode", "decode: gpu").attach(self.scorer, copy.copy(self.loader), self.loader, RowFailure, say)
        settle(plan, self.scorer)
        self.passport = self._issue_passport()

    def _issue_passport(self) -> Any:
        """What keeps the bytes of the rows chosen to be scored twice, and scores them; None where there are none."""
        count = self.plan.manifest.get("parity_rows", 0) if self.scorer else 0
        passports = optional_addon("passport", "no score passport") if count else None
        plain = ImageLoader(dataclasses.replace(self.config, decode="exact"), self.loader.settings, self.loader.resize, 0,
                            self.loader.read)
        return passports and passports.issue(self.scorer, self.loader, plain.decode, self.plan.rows, count)

    def _begin(self, partition: Partition, retry: bool, pool: LoaderPool, marked: list[Partition]) -> PartitionRun:
        """Open the partition, mark it as being tried and queue its pictures; one marked before is decoded in isolation."""
        run, load = PartitionRun.open(self.plan, partition, self.config, retry), self.loader
        if self.passport:
            captions = run.rows[column_name(self.config.caption_column)]
            known = (_read_json(partition.json) or {}).get("passport", []) if retry else []
            run.watch = self.passport.watch(partition, run.rows.index, run.sources, [
                self.config.caption_template.replace("{}", caption) for caption in captions], known)
        if partition.trying.exists():
            load = self.loader.isolated
        else:
            with output_disk(partition.trying):
                partition.trying.touch()  # before the first picture is decoded, which may be the one that kills
            marked.append(partition)
        pool.add(load, run.wanted(self.config))
        return run

    def run(self, todo: list[Partition], retry: bool = False, on_loaded: Callable[[], None] = lambda: None) -> Iterator[dict]:
        """Score and commit each partition, loading images ahead across their edges; yields each one's summary."""
        pool, marked = LoaderPool(self.threads), list[Partition]()
        INTERRUPTION.deferred = True
        try:
            clock, since = Clock(), time.perf_counter()
            run = self._begin(todo[0], retry, pool, marked)
            for following in [*todo[1:], None]:
                ahead = self._begin(following, retry, pool, marked) if following else None
                table = score_partition(self.scorer, run, pool, self.config, clock, on_loaded)
                wall_s, extra = time.perf_counter() - since, {"null": run.null, "tried": len(table)}
                if run.watch:  # a stage of its own: neither its time nor its pairs count in the rate
                    with Clock().stage("passport"):
                        extra["passport"] = run.watch.check(table["similarity"].to_pylist())
                now = time.perf_counter()
                refuse_other_run(self.plan, _read_json(self.plan.output / "manifest.json"))
                if self.scorer:
                    extra["oom_halvings"], self.scorer.oom_halvings = self.scorer.oom_halvings, 0
                if self.scorer and self.config.save_embeddings != "none":
                    extra["embeddings"] = addon("embeddings", "save_embeddings").save(
                        run.partition, self.config.save_embeddings, run.rows.index, run.embedded, write_bytes)
                summary = commit_part(run.partition, run.finish(table), clock, wall_s, self.name, extra)
                run.partition.trying.unlink(missing_ok=True)
                clock, since = Clock({"write": time.perf_counter() - now}), now  # a part's writing counts in the next's time
                yield summary
                INTERRUPTION.check()  # a partition without a picture to load has not looked
                if ahead:
                    run = ahead
        finally:
            INTERRUPTION.deferred = False
            pool.close()
            if "isolated" in self.loader.__dict__:
                self.loader.__dict__.pop("isolated").decode_bytes.close()
            if self.passport:
                self.passport.close()
            for partition in marked if not pool.hangs else ():  # only what is killed, or hung until it was stopped, leaves them
                partition.trying.unlink(missing_ok=True)


class Job:
    """One run of the script, as an engine sees it: plan it, list what is pending, do some of it.

    With `once` a run that others have finalised already is not summed up again.
    """

    say, trouble, script, listen = staticmethod(say), Trouble, pathlib.Path(__file__), INTERRUPTION.install
    mine_beside = staticmethod(mine_beside)

    def __init__(self, config: Config, fresh: bool = False, retry: bool = False) -> None:
        self.config, self.fresh, self.retry, self.once = config, fresh, retry, False
        self.plan: Plan

    def make_plan(self, joins: bool = False) -> None:
        """Plan the run, or read the plan that another process has made; see `plan`."""
        with Clock().stage("plan"):
            self.plan = plan(self.config, self.fresh and not joins, joins)

    def pending(self) -> list[Partition]:
        """What is left to do."""
        may_pass = addon("retry", "--retry-failed").may_pass_in if self.retry else lambda partition: False
        return [p for p in self.plan.partitions if not part_is_done(p) or may_pass(p.parquet)]

    def results_file(self) -> pathlib.Path:
        """Where `output_format` has the results go."""
        return self.plan.output / f"scores.{self.config.output_format}"

    def progress(self, todo: list[Partition]) -> Any:
        """The bar for `todo`, and the judge of `max_failure_rate`; None, and one line, without addons/progress.py."""
        bars, done = optional_addon("progress", "no progress bar, no max_failure_rate"), sum(p.stop - p.start for p in todo)
        too_many = functools.partial(Trouble, EXIT_FAILURES)
        return bars and bars.Progress(self.plan.rows, self.plan.rows - done, self.config.max_failure_rate, too_many)

    def is_finished(self) -> bool:
        """Whether the results are there and complete."""
        stored, scores = _read_json(self.plan.output / "profile.json") or {}, self.results_file()
        return bool(stored.get("finished")) and scores.is_file() and scores.stat().st_size == stored.get("scores_bytes")

    def work(self, todo: list[Partition], name: str = "local", judge: bool = True) -> None:
        """Score and commit `todo` in this process; with `judge`, Trouble (exit 4) when too many rows fail."""
        if todo:
            worker, progress = Worker(self.config, self.plan, name), self.progress(todo)
            self.follow(worker.run(todo, self.retry, progress.image_loaded if progress else lambda: None), progress, judge)

    def follow(self, summaries: Iterator[dict], progress: Any, judge: bool = True) -> None:
        """Show each finished partition's summary on the bar, and judge by them (see `work`)."""
        bar = contextlib.closing(progress) if progress else contextlib.nullcontext()
        with contextlib.closing(summaries), bar:  # type: ignore[type-var]
            for summary in summaries:
                if progress:
                    progress.partition_done(summary, judge)


def run_local(job: Job) -> bool:
    """This process does everything that is pending, and finalises."""
    job.make_plan()
    job.work(job.pending())
    return True


def choose_engine(config: Config) -> Callable[[Job], bool]:
    """The engine that the config names, or the one that the launcher's environment tells of.

    An engine plans the job, sees to it that every pending partition is done by somebody, and returns whether this
    process finalises.
    """
    name: str = config.engine
    if name == "auto":
        launched = os.environ.get("WORLD_SIZE", "1") not in ("", "1") or "ACCELERATE_MIXED_PRECISION" in os.environ
        name = "accelerate" if launched else "slurm" if "SLURM_ARRAY_TASK_ID" in os.environ else "local"
    if name == "local":
        return run_local
    return addon(f"engine_{name}", f"engine: {name}").run


# ── Results ───────────────────────────────────────────────────────────────────────────────────────────────────────────

def read_part(partition: Partition) -> Any:
    """The part as a pyarrow table, its sha256 checked; None where there is none; Trouble (exit 7) for a flawed one."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    summary = _read_json(partition.json)
    try:
        data = partition.parquet.read_bytes()
    except FileNotFoundError:
        return None
    if not summary or hashlib.sha256(data).hexdigest() != summary.get("sha256"):
        partition.parquet.unlink()
        raise Trouble(EXIT_VERIFY, f"{partition.parquet.name} was not what had been written; it is removed, and the same "
                                   "command does it again")
    return pq.read_table(pa.BufferReader(data), use_threads=False, pre_buffer=False)  # threads may not outlive the program


def result_tables(plan: Plan) -> Iterator[Any]:
    """Each partition's rows with their results, in input order; rows of one that never ran are `not_tried`.

    Raises Trouble (exit 7) for a flawed part, and where fewer or more rows go out than came in.
    """
    import numpy as np
    written, null = 0, merge_null(plan)
    for partition in plan.partitions or [Partition(0, 0, 0, plan.output)]:  # of no rows: the columns still come out
        table = read_part(partition)
        if table is None:
            rows = plan.read_rows(partition.start, partition.stop)
            n = len(rows)
            table = _with_results(rows, None, np.full(n, np.nan, np.float32), [False] * n, ["not_tried"] * n, [""] * n)
        yield add_percentiles(table, null)
        written += table.num_rows
    if written != plan.rows:
        raise Trouble(EXIT_VERIFY, f"{plan.output}: {plan.rows} rows came in, {written} went out")


def merge_null(plan: Plan) -> Any:
    """The run's random and matched pairs (addons.null.Null), added up from its parts; None where they have none."""
    null = optional_addon("null", "no percentiles")
    return null and null.Null.merge_parts(_read_json(p.json) for p in plan.partitions if p.parquet.exists())


def add_percentiles(table: Any, null: Any) -> Any:
    """A part's table with `percentile` and `random_percentile` after `probability`; empty cells without a null or a score."""
    import numpy as np
    import pyarrow as pa
    cosines = table["similarity"].to_numpy().astype(np.float32)  # (n,), NaN for no score
    shares = null.percentiles(cosines) if null else [np.full(len(cosines), np.nan, np.float32)] * 2
    after = table.schema.get_field_index("probability") + 1
    for place, (name, share) in enumerate(zip(("percentile", "random_percentile"), shares, strict=True), after):
        table = table.add_column(place, name, pa.array(share, pa.float32(), mask=~np.isfinite(share)))
    return table


class CsvRows:
    """A CSV being written, of pyarrow tables: floats in the shortest digits that read back the same float32, '' for nothing.

    `escape` is applied to each cell of all but the last `results` columns.
    """

    def __init__(self, file: typing.BinaryIO, names: list[str], escape: Callable[[str], str] | None, results: int) -> None:
        self._text, self._escape, self._results = io.TextIOWrapper(file, "utf-8", newline=""), escape, results
        self._plain = csv.writer(self._text, lineterminator="\n")
        self._quoted = csv.writer(self._text, lineterminator="\n", quoting=csv.QUOTE_ALL)
        self._write_rows([names], any("\r" in name for name in names))

    def _write_rows(self, rows: Iterable[Iterable[str]], returns: bool) -> None:
        if not returns:
            self._plain.writerows(rows)
        for row in rows if returns else ():
            # csv.writer leaves a lone carriage return unquoted, which breaks the row for whoever reads it
            (self._quoted if any("\r" in cell for cell in row) else self._plain).writerow(row)

    def write(self, table: Any) -> None:
        """Append the table's rows."""
        import pyarrow as pa
        import pyarrow.compute as pc
        columns = [column.cast(pa.string()).fill_null("") for column in table.columns]
        returns = any(pc.any(pc.match_substring(column, "\r")).as_py() for column in columns)
        cells = [column.to_pylist() for column in columns]
        if self._escape:
            inputs = len(cells) - self._results
            cells[:inputs] = [[self._escape(cell) for cell in column] for column in cells[:inputs]]
        self._write_rows(zip(*cells, strict=True), returns)

    def close(self) -> None:
        """Hand the file back, complete."""
        self._text.detach()  # flushes first


def write_csv(config: Config, plan: Plan, file: typing.BinaryIO) -> None:
    """Stream all results as CSV."""
    escape = addon("outputs", "escape_formulas").escape_formula if config.escape_formulas else None
    rows = CsvRows(file, [*output_names(plan.manifest["columns"]), *RESULT_COLUMNS], escape, len(RESULT_COLUMNS))
    for table in result_tables(plan):
        rows.write(table)
    rows.close()


def summarise(plan: Plan) -> dict:
    """Count the rows of the parts by status, from their JSON files; addons/report.py adds up times, scores and memory."""
    parts = [part for p in plan.partitions if (part := _read_json(p.json)) and p.parquet.exists()]
    statuses = collections.Counter[str]()
    for part in parts:
        statuses.update(part["statuses"])
    if missing := plan.rows - sum(part["rows"] for part in parts):
        statuses["not_tried"] = missing
    scored, report = statuses.pop("ok", 0), optional_addon("report", "no table of time and memory")
    return {"rows": plan.rows, "scored": scored, "failed": dict(sorted(statuses.items())),
            "malformed": plan.manifest["malformed"], "partitions": len(plan.partitions), "finished": not missing,
            **(report.add_up(parts, STAGES) if report else {"pairs_per_s": None, "mean_similarity": None})}


@profile
def finalize(job: Job, curve: Any = None) -> dict | None:
    """Write scores.csv (or .parquet), profile.json and memory-time.png from the parts; print and return the summary."""
    config, plan = job.config, job.plan
    scores, report = job.results_file(), optional_addon("report", "no table of time and memory")
    with locked(plan.output):
        if job.is_finished():
            if job.once:
                return None
            stored = _read_json(plan.output / "profile.json") or {}
        else:
            stored = summarise(plan)  # first: a part that another worker adds meanwhile does not make the run finished
            with output_disk(scores), atomic_file(scores) as file:
                if config.output_format == "parquet":
                    addon("outputs", "output_format: parquet").write_parquet(result_tables(plan), file)
                else:
                    write_csv(config, plan, file)
            keys = ("revision", "preprocess", "decode", "transparent_over", "exif_orientation")
            stored |= {"scores_bytes": scores.stat().st_size, "scores_sha256": file_sha256(scores)}
            stored |= {"model": config.pretrained_model, **{key: getattr(config, key) for key in keys},
                       **plan.manifest.get("resolved", {}), "script": __version__}
            if report:
                stored |= report.explain(stored, PREPARE_STAGES, METRIC_STAGES)
            write_json(plan.output / "profile.json", stored)
            for marker in (plan.output / "parts").glob("*.trying") if stored["finished"] else ():
                marker.unlink(missing_ok=True)  # of a worker that was killed just after its part was written
            if curve and (picture := curve.png(say)):
                write_bytes(plan.output / "memory-time.png", picture)
    if report:
        report.print_summary(stored, PREPARE_STAGES, METRIC_STAGES, say)
    return {key: stored[key] for key in ("rows", "scored", "failed", "malformed", "pairs_per_s", "mean_similarity")} \
        | {"output": str(scores)}


def start_memory_curve() -> Any:
    """Begin to sample memory for memory-time.png; None, and one line, where the addon is not beside the script."""
    plots = optional_addon("plots", "no memory-time.png")
    return plots and plots.MemoryCurve(gpu_memory_mib, lambda: Clock.current)


# ── Main ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise Trouble(EXIT_CONFIG, f"{message}; --help lists the options")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; raises Trouble (exit 2) for a wrong one."""
    parser = _Parser(prog="image_text_sim_clip.py", description=(__doc__ or "").split("\n")[0],
                     epilog="exit codes: 0 done, 2 config, 3 input, 4 too many failures, 5 output disk, 6 model, "
                            "7 results do not verify, 130/143 interrupted (run again to resume)")
    parser.add_argument("--config", required=True, help="the YAML file with every key, such as config.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one key of the config")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--fresh", action="store_true", help="discard what output_path holds of an earlier run")
    how.add_argument("--retry-failed", action="store_true", help="score again the rows whose failure may have passed "
                                                                 "(timeout, connect, dns, 429, 5xx)")
    how.add_argument("--verify", action="store_true", help="check every part of output_path bit by bit; score nothing")
    how.add_argument("--plan", action="store_true", help="score a few hundred rows and tell what the whole input will cost")
    parser.add_argument("--version", action="version", version=__version__)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Config -> plan -> parts -> results. Returns the exit code; the last line on stdout is one JSON object."""
    options = parse_arguments(arguments)
    config = load_config(options.config, options.set)
    job, stopped = Job(config, options.fresh, options.retry_failed), None
    if options.verify:
        return addon("verify", "--verify").verify(job, read_part)
    if options.plan:
        return addon("planner", "--plan").plan_ahead(job, Worker, summarise, PREPARE_STAGES, METRIC_STAGES)
    curve = start_memory_curve()
    try:
        finalises = choose_engine(config)(job)
    except Trouble as trouble:
        if trouble.exit_code != EXIT_FAILURES:
            raise
        finalises, stopped = True, trouble  # the rows that were done are worth having: write them, then say why it stopped
    finally:
        if curve:
            curve.stop()
    if finalises and (result := finalize(job, curve)):
        with output_disk("the summary to stdout"):
            print(json.dumps(result, ensure_ascii=False), flush=True)
        if config.max_score_drift is not None and config.pretrained_model != "none" and not stopped and (
                excess := addon("passport", "max_score_drift").find_excess(job.plan.output, config.max_score_drift)):
            stopped = Trouble(EXIT_VERIFY, excess)
    if stopped:
        raise stopped
    return 0


def run() -> typing.NoReturn:
    """`main` with its endings: one line for a user's mistake, 128 + n for a signal, a traceback for a bug."""
    INTERRUPTION.install()
    sys.stderr = sys.stderr or io.StringIO()  # closed by who started us: the talk is lost, no more
    code = 0
    try:
        main()
    except Trouble as trouble:
        say(f"error: {trouble}")
        code = trouble.exit_code
    except Interrupted as interrupted:
        say("interrupted: finished partitions are kept, the same command resumes")
        code = 128 + interrupted.signum
        if not PROFILED:  # loader threads may sit in a fetch until its deadline; who pressed Ctrl-C does not wait for them
            sys.stdout.flush()
            os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    run()
