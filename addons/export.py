"""Write the rows that curation kept: tables, an `imagefolder` for Hugging Face datasets, or webdataset tars.

Pictures are written as the bytes that were scored, never encoded anew, and each row carries `similarity` and
`dissimilarity`, so that a trainer can weight by it. Every file is written beside and renamed: one that exists is complete,
which is all of resuming, and an export that was interrupted ends with the same bytes as one that was not.
"""
import dataclasses
import hashlib
import io
import json
import pathlib
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, BinaryIO

EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tiff", "AVIF": "avif"}
FOLDER_ROWS = 10_000  # pictures in one folder of an imagefolder

AtomicFile = Callable[[pathlib.Path], AbstractContextManager[BinaryIO]]
# sources -> for each its bytes, or the exception that says why there are none; in order
LoadPictures = Callable[[list[str]], Iterator[bytes | Exception]]


@dataclasses.dataclass(frozen=True)
class Record:
    """One kept row: its number in the input, where its picture lies, and what is said of it."""

    row: int
    source: str
    url: str
    caption: str
    similarity: float
    dissimilarity: float

    @property
    def key(self) -> str:
        """The row number as a file name without its ending."""
        return f"{self.row:09d}"

    def describe(self) -> dict:
        """What goes into metadata.jsonl and the tars' JSON files."""
        return {"text": self.caption, "row": self.row, "url": self.url, "similarity": self.similarity,
                "dissimilarity": self.dissimilarity}


@dataclasses.dataclass
class Exported:
    """How many rows were written, and which were not: (row, url, reason)."""

    count: int = 0
    missing: list[tuple[int, str, str]] = dataclasses.field(default_factory=list)


def export_parquet(path: pathlib.Path, tables: Iterable[Any], schema: Any, atomic_file: AtomicFile) -> Exported:
    """Write the kept rows' tables, all of `schema`, as one Parquet file."""
    import pyarrow.parquet as pq
    exported = Exported()
    with atomic_file(path) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for table in tables:
            writer.write_table(table)
            exported.count += table.num_rows
    return exported


def find_extension(data: bytes) -> str:
    """The usual ending of a picture's file, from its content; ValueError for none that is known."""
    from PIL import Image
    try:
        with Image.open(io.BytesIO(data), formats=tuple(EXTENSIONS)) as image:
            return EXTENSIONS[str(image.format)]
    except (OSError, KeyError, SyntaxError, Image.DecompressionBombError):
        raise ValueError("not a picture any more") from None


def _pictures(records: list[Record], load_pictures: LoadPictures, exported: Exported) -> Iterator[tuple[Record, bytes, str]]:
    """Yield (record, bytes, extension) for those whose picture can be had; the others are noted in `exported`."""
    for record, data in zip(records, load_pictures([r.source for r in records]), strict=True):
        if not isinstance(data, Exception):
            try:
                extension = find_extension(data)
            except ValueError as error:
                data = error
        if isinstance(data, Exception):
            exported.missing.append((record.row, record.url, str(data)))
        else:
            yield record, data, extension


def export_imagefolder(folder: pathlib.Path, records: Iterable[Record], load_pictures: LoadPictures,
                       atomic_file: AtomicFile) -> Exported:
    """Write `folder`/train/metadata.jsonl and the pictures it names, 10,000 a folder.

    It loads with datasets.load_dataset("imagefolder", data_dir=folder), and with the diffusers training scripts, whose
    default columns are `image` and `text`. metadata.jsonl comes last.
    """
    exported, root = Exported(), folder / "train"
    root.mkdir(parents=True, exist_ok=True)
    with atomic_file(root / "metadata.jsonl") as file:
        for chunk in batched(records, FOLDER_ROWS):
            places = {record.row: f"{record.row // FOLDER_ROWS:05d}" for record in chunk}
            for place in set(places.values()):
                (root / place).mkdir(exist_ok=True)
            there = {path.stem: path.name for place in sorted(set(places.values()))
                     for path in (root / place).iterdir() if not path.name.startswith(".")}
            missing_ones = [record for record in chunk if record.key not in there]
            for record, data, extension in _pictures(missing_ones, load_pictures, exported):
                there[record.key] = f"{record.key}.{extension}"
                with atomic_file(root / places[record.row] / there[record.key]) as picture:
                    picture.write(data)
            for record in chunk:
                if record.key in there:
                    line = {"file_name": f"{places[record.row]}/{there[record.key]}", **record.describe()}
                    file.write((json.dumps(line, ensure_ascii=False) + "\n").encode())
                    exported.count += 1
    return exported


def export_webdataset(folder: pathlib.Path, records: Iterable[Record], load_pictures: LoadPictures,
                      atomic_file: AtomicFile, shard_rows: int) -> Exported:
    """Write `folder`/kept-00000.tar ..., `shard_rows` rows each: a picture, a .txt (caption) and a .json for every key."""
    exported = Exported()
    folder.mkdir(parents=True, exist_ok=True)
    for number, chunk in enumerate(batched(records, shard_rows)):
        path = folder / f"kept-{number:05d}.tar"
        if path.exists() and _keys_of(path) == [record.key for record in chunk]:
            exported.count += len(chunk)
            continue
        with atomic_file(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for record, data, extension in _pictures(chunk, load_pictures, exported):
                description = json.dumps(record.describe(), ensure_ascii=False)
                for ending, content in ((extension, data), ("txt", record.caption.encode()), ("json", description.encode())):
                    member = tarfile.TarInfo(f"{record.key}.{ending}")  # owner 0, time 0: the same bytes at any time
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
                exported.count += 1
    return exported


def _keys_of(path: pathlib.Path) -> list[str]:
    """The keys of a finished tar, in order."""
    with tarfile.open(path) as tar:
        return [name.removesuffix(".txt") for name in tar.getnames() if name.endswith(".txt")]


def batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of `size` items, the last one shorter."""
    batch: list[Any] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


class ExportState:
    """Which rows the export in `folder`/`kind`/ is of, and whether it is complete: `kind`.json beside it.

    One of other rows is removed before it is written anew, so that the files of two choices never mix. What another kind
    of export left is not touched.
    """

    def __init__(self, folder: pathlib.Path, kind: str, shard_rows: int,
                 write_json: Callable[[pathlib.Path, dict], None]) -> None:
        with (folder / "kept.csv").open("rb") as kept:
            digest = hashlib.file_digest(kept, "sha256").hexdigest()
        self.path, self.target, self._write = folder / f"{kind}.json", folder / kind, write_json
        self.wanted = {"kept_sha256": digest} | ({"shard_rows": shard_rows} if kind == "webdataset" else {})
        try:
            held = json.loads(self.path.read_bytes())
        except (OSError, ValueError):
            held = {}
        self.exported = held.pop("exported", 0)
        self.is_complete = held.pop("complete", False) and held == self.wanted and self.target.exists()
        if held != self.wanted:
            shutil.rmtree(self.target, ignore_errors=True)
            write_json(self.path, self.wanted | {"complete": False})

    def finish(self, exported: Exported) -> None:
        """Record the end; an export that lacks pictures stays incomplete, and the same command tries those again."""
        self.exported = exported.count
        self._write(self.path, self.wanted | {"complete": not exported.missing, "exported": exported.count})
