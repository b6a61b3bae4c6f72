"""Write the rows that curation kept: tables, an `imagefolder` for Hugging Face datasets, or webdataset tars.

Images are written as the bytes that were scored, never encoded anew. Each row carries the table's other columns, `similarity`,
`dissimilarity` and the columns of further measures, so that a trainer can weight by them. Every file is written under another
name and then renamed: one that exists is complete, which is all of resuming, and an export that was interrupted ends with the
same bytes as one that was not. That the whole is complete is written last and taken away first.
"""
import csv
import dataclasses
import functools
import io
import json
import math
import pathlib
import re
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, BinaryIO, ClassVar, TypeVar

import numpy as np

from addons.curation import Export
from addons.curation.finished import FinishedRun
from addons.curation.images import RunImages, ScoredImage
from addons.curation.rules import KEPT, Curation
from addons.measures.embeddings import read_embeddings
from addons.results.formulas import escape_formula
from image_text_sim_clip import (
    EXIT_CONFIG,
    Partition,
    RowFailure,
    Trouble,
    atomic_file,
    file_sha256,
    in_store,
    read_sealed,
    say,
    write_sealed,
)

if TYPE_CHECKING:
    import pyarrow as pa

# how the files begin that can be scored, and their usual endings; what lies around the pixels does not matter here
STARTS = {b"\xff\xd8\xff": "jpg", b"\x89PNG\r\n\x1a\n": "png", b"GIF8": "gif", b"BM": "bmp", b"II*\0": "tiff", b"MM\0*": "tiff",
          b"II+\0": "tiff", b"MM\0+": "tiff"}
BOX_STARTS = {b"WEBP": "webp", b"avif": "avif", b"avis": "avif", b"mif1": "avif"}  # at the ninth byte, of RIFF and ISO files
ENDINGS = {*STARTS.values(), *BOX_STARTS.values()}
FILE_NAME = re.compile(r"(?<![^_])file_name(s?)\Z")  # how the columns end that an imagefolder takes for paths
FOLDER_ROWS = 10_000  # images in one folder of an imagefolder

OF_ROWS = "kept_sha256"  # what tells of which rows an export is: of kept.csv

Cell = float | bool | str | None  # of a further measure's column
Item = TypeVar("Item")


# ── What is exported ──────────────────────────────────────────────────────────────────────────────────────────────────

@dataclasses.dataclass(frozen=True)
class Record:
    """One kept row: its number in the input, where its image is, and what is said of it."""

    row: int
    image: ScoredImage
    url: str
    caption: str
    similarity: float
    dissimilarity: float
    columns: dict[str, Cell]  # the table's other columns, typed where the table was
    further: dict[str, Cell]  # the columns of further measures

    @property
    def key(self) -> str:
        """The row number as a file name without its ending."""
        return f"{self.row:09d}"

    def describe(self) -> dict[str, Cell]:
        """What goes into metadata.jsonl and the tars' JSON files.

        A column of the table that clashes becomes input_<name>, one of a measure measure_<name>; `file_name`, or what ends so,
        is called filename, because `datasets` would take its cells for paths of images.
        """
        described: dict[str, Cell] = {"text": self.caption, "row": self.row, "url": self.url,
                                      "similarity": self.similarity, "dissimilarity": self.dissimilarity}
        reserved = {*described, "file_name", "image"}
        for prefix, columns in (("input_", self.columns), ("measure_", self.further)):
            for name, value in columns.items():
                shown = FILE_NAME.sub(r"filename\1", name)
                while shown in reserved or shown in described:
                    shown = prefix + shown
                described[shown] = value
        return described


@dataclasses.dataclass
class Exported:
    """How many rows were written, and which were not: (row, url, reason)."""

    count: int = 0
    missing: list[tuple[int, str, str]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class KeptRows:
    """The rows that an export writes, in input order, and the section `curate:` that chose them."""

    run: FinishedRun
    verdicts: np.ndarray  # uint8 (rows,)
    curation: Curation
    images: RunImages | None  # None for an export that needs none
    escape: bool = False  # whether formulas in CSV files are made plain text

    @property
    def count(self) -> int:
        """How many rows were kept."""
        return int((np.asarray(self.verdicts) == KEPT).sum())

    @functools.cached_property
    def types(self) -> dict[str, str]:
        """The type of each column of the input that is exported as another than text.

        Whole numbers beyond 64 bits with a sign, as unsigned hashes are, stay text: Arrow, and so `datasets`, would round them.
        """
        types = self.run.types
        for name in [name for name, kind in types.items() if kind == "int"]:
            if not all(are_64_bits(table[name]) for _, table in self.run.chunks([name])):
                del types[name]
        return types

    def tables(self) -> Iterator["pa.Table"]:
        """Yield the kept rows as tables with the columns of scores.csv."""
        import pyarrow as pa
        for _, table, verdicts in self.run.judged_chunks(self.verdicts):
            yield table.filter(pa.array(verdicts == KEPT))

    def records(self, images: RunImages) -> Iterator[Record]:
        """Yield the kept rows one by one."""
        further_names = [column.name for column in self.run.further_columns]
        names = [self.run.source_name, self.run.caption_name, "similarity", "dissimilarity", *further_names]
        others = [name for name in self.run.names if name not in (self.run.source_name, self.run.caption_name)]
        for first_row, table, verdicts in self.run.judged_chunks(self.verdicts):
            places = np.flatnonzero(verdicts == KEPT)
            if not len(places):
                continue
            of_rows = images.locate(first_row, table)
            columns = [table[name].take(places).to_pylist() for name in names]
            cells_of = {name: typed_cells(table[name].take(places).to_pylist(), self.types.get(name, ""))
                        for name in others}
            for number, (url, caption, similarity, dissimilarity, *cells) in enumerate(zip(*columns, strict=True)):
                place = int(places[number])
                own = {name: column[number] for name, column in cells_of.items()}
                further = dict(zip(further_names, map(none_for_nan, cells), strict=True))
                yield Record(first_row + place, of_rows[place], url, caption, similarity, dissimilarity, own, further)


def are_64_bits(cells: "pa.ChunkedArray") -> bool:
    """Whether all the numbers in a column of text, some of whose cells may be empty, lie in [-2^63, 2^63)."""
    import pyarrow as pa
    import pyarrow.compute as pc
    try:
        pc.cast(pc.if_else(pc.equal(cells, ""), None, cells), pa.int64())
        return True
    except pa.ArrowInvalid:
        return False


def typed_cells(texts: list[str], kind: str) -> list[Cell]:
    """Cells of the input as it had them: whole numbers ("int"), numbers ("float"), truth values ("bool") or, else, text.

    An empty cell of a typed column is None, and one that is not of its type stays text.
    """
    if not kind:
        return list(texts)
    read = READ_TYPES[kind]
    cells: list[Cell] = []
    for text in texts:
        try:
            cells.append(read(text) if text else None)
        except (ValueError, KeyError):
            cells.append(text)
    return cells


def read_number(text: str) -> Cell:
    """A number that JSON can hold; None for one that is not finite."""
    number = float(text)
    return number if math.isfinite(number) else None


READ_TYPES: dict[str, Callable[[str], Cell]] = {"int": int, "float": read_number,
                                                "bool": {"true": True, "false": False}.__getitem__}


def none_for_nan(cell: Cell) -> Cell:
    """The cell as JSON can hold it: None for a number that is not finite."""
    return None if isinstance(cell, float) and not math.isfinite(cell) else cell


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yield lists of `size` items, the last one shorter."""
    batch: list[Item] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


# ── Tables ────────────────────────────────────────────────────────────────────────────────────────────────────────────

class Csv:
    """kept.csv alone, which every run writes."""

    name: ClassVar[str] = "csv"
    needs_images: ClassVar[bool] = False

    def write(self, kept: KeptRows, folder: pathlib.Path) -> Exported:
        """Write nothing more."""
        return Exported(kept.count)


class Parquet:
    """kept.parquet: the columns of kept.csv with their types."""

    name: ClassVar[str] = "parquet"
    needs_images: ClassVar[bool] = False

    def write(self, kept: KeptRows, folder: pathlib.Path) -> Exported:
        """Write `folder`/kept.parquet."""
        import pyarrow.parquet as pq
        exported = Exported()
        schema = kept.run.schema.with_metadata({OF_ROWS: file_sha256(folder / "kept.csv")})
        with atomic_file(folder / "kept.parquet") as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
            for table in kept.tables():
                writer.write_table(table)
                exported.count += table.num_rows
        return exported


def remove_tables_of_other_rows(folder: pathlib.Path) -> None:
    """Remove kept.parquet and not_exported.csv if they are not of the rows in kept.csv, but of an earlier choice."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    table = folder / "kept.parquet"
    missing = folder / "not_exported.csv"
    if not table.exists() and not missing.exists():
        return
    sha256 = file_sha256(folder / "kept.csv")
    states = [read_sealed(folder / f"{name}.json") for name in (ImageFolder.name, WebDataset.name)]
    if all(state is None or state.get(OF_ROWS) != sha256 for state in states):
        missing.unlink(missing_ok=True)
    try:
        with table.open("rb") as file:
            is_of_these_rows = (pq.read_schema(file).metadata or {}).get(OF_ROWS.encode()) == sha256.encode()
    except (FileNotFoundError, pa.ArrowException):
        is_of_these_rows = False
    if not is_of_these_rows:
        table.unlink(missing_ok=True)


# ── Images ────────────────────────────────────────────────────────────────────────────────────────────────────────────

class ImageExport:
    """An export that writes images too, below `folder`/`name`/. A class of it writes what is not yet there."""

    name: ClassVar[str]
    needs_images: ClassVar[bool] = True
    own_files: ClassVar[re.Pattern[str]]  # the names, below `folder`/`name`, that are this export's

    def write(self, kept: KeptRows, folder: pathlib.Path) -> Exported:
        """Write what is not there yet; kept rows whose image is gone are listed in `folder`/not_exported.csv."""
        assert kept.images
        state = ExportState(folder, self.name, self.own_files, self.parameters(kept.curation))
        if state.is_complete:
            return Exported(state.exported)
        exported = self.write_images(state.target, kept, kept.images)
        write_missing(folder / "not_exported.csv", exported.missing, kept.escape)
        state.finish(exported)
        return exported

    def parameters(self, curation: Curation) -> dict[str, int]:
        """The keys, besides the rows kept, that decide how the files are cut."""
        return {}

    def write_images(self, target: pathlib.Path, kept: KeptRows, images: RunImages) -> Exported:
        """Write the kept rows below `target`; files that are there already are of these rows."""
        raise NotImplementedError


class ExportState:
    """Which rows the export in `folder`/`name`/ is of, and whether it is complete: `name`.json next to it.

    An export of other rows is removed before the new one is written, so that the files of two choices never mix; so is one
    that was complete and is not as it was. What another kind of export left is not touched. What others have laid next to its
    own files, such as an index, changes nothing; where it would be removed there is Trouble (exit 2).
    """

    def __init__(self, folder: pathlib.Path, name: str, own_files: re.Pattern[str], parameters: dict[str, int]) -> None:
        self.target = folder / name
        self._own_files = own_files
        self._path = folder / f"{name}.json"
        self._removed = folder / f".{name}.removed"
        self._wanted = {OF_ROWS: file_sha256(folder / "kept.csv"), **parameters}
        held = read_sealed(self._path) or {}
        self.exported = held.pop("exported", 0)
        files = held.pop("files", None)
        was_complete = held.pop("complete", False)
        is_of_these_rows = held == self._wanted
        self.is_complete = was_complete and is_of_these_rows and files == self._describe_files()
        if self._removed.exists():  # a run was killed while it removed this
            shutil.rmtree(self._removed)
        if not is_of_these_rows or (was_complete and not self.is_complete):
            self._discard(folder / "not_exported.csv")

    def _discard(self, not_exported: pathlib.Path) -> None:
        """Begin anew: first nothing counts as an export any more, and then the files go, all at once by a rename."""
        others = [name for name, _ in walk_files(self.target) if not self._is_own(name) and "/." not in f"/{name}"]
        if others:
            raise Trouble(EXIT_CONFIG, f"{self.target} is to be replaced, and holds files that curate.py has not written, "
                                       f"such as {min(others)}: take them elsewhere first")
        self._path.unlink(missing_ok=True)
        not_exported.unlink(missing_ok=True)
        if in_store(self.target):
            for path in self.target.rglob("*"):
                path.unlink()
        elif self.target.is_symlink():  # which the user has laid to another disk, so it stays
            for path in self.target.iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
        elif self.target.exists():
            self.target.rename(self._removed)
            shutil.rmtree(self._removed)
        write_sealed(self._path, {**self._wanted, "complete": False})

    def finish(self, exported: Exported) -> None:
        """Record the end; an export that lacks images stays incomplete, and the same command tries those again."""
        self.exported = exported.count
        write_sealed(self._path, {**self._wanted, "complete": not exported.missing, "exported": exported.count,
                                  "files": self._describe_files()})

    def _is_own(self, name: str) -> bool:
        return self._own_files.fullmatch(name) is not None

    def _describe_files(self) -> dict[str, int]:
        """How many files of its own there are, and how many bytes they have together."""
        sizes = [size for name, size in walk_files(self.target) if self._is_own(name)]
        return {"count": len(sizes), "bytes": sum(sizes)}


def walk_files(folder: pathlib.Path) -> Iterator[tuple[str, int]]:
    """Yield the name below the folder, with `/`, and the bytes of each file there."""
    if in_store(folder):  # where a request for each would take minutes
        from addons.stores.paths import StorePath
        for stored, info in StorePath(folder).walk_objects():
            yield stored.relative_to(folder).as_posix(), info.bytes
        return
    for path in folder.rglob("*"):
        if path.is_file():
            yield path.relative_to(folder).as_posix(), path.stat().st_size


def write_missing(path: pathlib.Path, missing: list[tuple[int, str, str]], escape: bool) -> None:
    """Write not_exported.csv: kept rows whose scored image cannot be had any more; no file where there are none.

    With `escape`, URLs that a spreadsheet would run as formulas are made plain text.
    """
    path.unlink(missing_ok=True)
    if not missing:
        return
    with atomic_file(path) as file:
        text = io.TextIOWrapper(file, "utf-8", newline="", write_through=True)
        rows = [(row, escape_formula(url) if escape else url, reason) for row, url, reason in missing]
        csv.writer(text, lineterminator="\n").writerows([("row", "url", "reason"), *rows])
        text.detach()
    say(f"{len(missing):,} kept rows have no image any more, or another one than was scored: see {path}; the same command "
        "tries them again")


def find_extension(data: bytes) -> str | None:
    """The usual ending of an image's file, from its content; None for no image that is known."""
    if data[:4] == b"RIFF" or data[4:8] == b"ftyp":
        return BOX_STARTS.get(data[8:12])
    return next((ending for start, ending in STARTS.items() if data.startswith(start)), None)


def load_records(records: list[Record], images: RunImages, exported: Exported) -> Iterator[tuple[Record, bytes, str]]:
    """Yield (record, bytes, extension) for those whose image can be had; the others are noted in `exported`."""
    for record, data in zip(records, images.load([record.image for record in records]), strict=True):
        if isinstance(data, RowFailure):
            exported.missing.append((record.row, record.url, str(data)))
            continue
        extension = find_extension(data)
        if extension is None:
            exported.missing.append((record.row, record.url, "not an image any more"))
            continue
        yield record, data, extension


class ImageFolder(ImageExport):
    """imagefolder/train/metadata.jsonl and the images it names, 10,000 a folder.

    It loads with datasets.load_dataset("imagefolder", data_dir=...), and with the diffusers training scripts, whose default
    columns are `image` and `text`.
    """

    name: ClassVar[str] = "imagefolder"
    own_files: ClassVar[re.Pattern[str]] = re.compile(rf"train/(metadata\.jsonl|\d+/.*\.({'|'.join(sorted(ENDINGS))}))")

    def write_images(self, target: pathlib.Path, kept: KeptRows, images: RunImages) -> Exported:
        """Write the images and then, last of all, metadata.jsonl."""
        exported = Exported()
        root = target / "train"
        root.mkdir(parents=True, exist_ok=True)
        with atomic_file(root / "metadata.jsonl") as file:
            for records in batched(kept.records(images), FOLDER_ROWS):
                file_names = self._write_missing_images(root, records, images, exported)
                for record in records:
                    if record.key in file_names:
                        line = {"file_name": file_names[record.key], **record.describe()}
                        file.write((json.dumps(line, ensure_ascii=False) + "\n").encode())
                        exported.count += 1
        return exported

    def _write_missing_images(self, root: pathlib.Path, records: list[Record], images: RunImages,
                              exported: Exported) -> dict[str, str]:
        """Write those images that are not there yet; returns where each record's image is below `root`, by its key."""
        file_names: dict[str, str] = {}
        for place in sorted({self._folder_of(record) for record in records}):
            (root / place).mkdir(exist_ok=True)
            for path in (root / place).iterdir():
                if path.suffix[1:] in ENDINGS and not path.name.startswith("."):
                    file_names[path.stem] = f"{place}/{path.name}"
        absent = [record for record in records if record.key not in file_names]
        for record, data, extension in load_records(absent, images, exported):
            file_names[record.key] = f"{self._folder_of(record)}/{record.key}.{extension}"
            with atomic_file(root / file_names[record.key]) as file:
                file.write(data)
        return file_names

    @staticmethod
    def _folder_of(record: Record) -> str:
        return f"{record.row // FOLDER_ROWS:05d}"


class WebDataset(ImageExport):
    """webdataset/kept-00000.tar ..., `shard_rows` rows each: an image, a .txt (caption) and a .json for every key."""

    name: ClassVar[str] = "webdataset"
    own_files: ClassVar[re.Pattern[str]] = re.compile(r"kept-\d+\.tar")

    def parameters(self, curation: Curation) -> dict[str, int]:
        """How many rows a tar holds."""
        return {"shard_rows": curation.shard_rows}

    def write_images(self, target: pathlib.Path, kept: KeptRows, images: RunImages) -> Exported:
        """Write the tars that are not there yet, or that lack rows."""
        exported = Exported()
        target.mkdir(parents=True, exist_ok=True)
        for number, records in enumerate(batched(kept.records(images), kept.curation.shard_rows)):
            path = target / f"kept-{number:05d}.tar"
            if read_keys(path) == [record.key for record in records]:
                exported.count += len(records)
                continue
            with atomic_file(path) as file:
                self._write_tar(file, records, images, exported)
        return exported

    def _write_tar(self, file: BinaryIO, records: list[Record], images: RunImages, exported: Exported) -> None:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for record, data, extension in load_records(records, images, exported):
                description = json.dumps(record.describe(), ensure_ascii=False)
                add_member(tar, f"{record.key}.{extension}", data)
                add_member(tar, f"{record.key}.txt", record.caption.encode())
                add_member(tar, f"{record.key}.json", description.encode())
                exported.count += 1


def add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Append a file to the tar, with owner 0 and time 0: the same bytes at any time."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def read_keys(path: pathlib.Path) -> list[str]:
    """The keys of a finished tar, in order; none where there is no tar that can be read to its end."""
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file) as tar:
            return [name.removesuffix(".txt") for name in tar.getnames() if name.endswith(".txt")]
    except (FileNotFoundError, tarfile.TarError, EOFError):
        return []


# ── Embeddings ────────────────────────────────────────────────────────────────────────────────────────────────────────

class ClipRetrieval:
    """clip-retrieval/img_emb, text_emb and metadata: the saved embeddings as `clip-retrieval inference` lays them out.

    Three files for each part, whose k-th vectors and k-th row belong together: img_emb_00012.npy and text_emb_00012.npy, (n, d)
    float16 unit vectors, and metadata_00012.parquet with the columns key (as in the other exports), image_path (the URL or
    path), caption, similarity and those of measures. autofaiss and `clip-retrieval index` read the folder.
    """

    name: ClassVar[str] = "clip-retrieval"
    needs_images: ClassVar[bool] = False
    own_files: ClassVar[re.Pattern[str]] = re.compile(r"(img_emb|text_emb|metadata)/.*", re.S)

    def write(self, kept: KeptRows, folder: pathlib.Path) -> Exported:
        """Write the kept rows' embeddings below `folder`/clip-retrieval, unless they are there already."""
        state = ExportState(folder, self.name, self.own_files, {})
        if state.is_complete:
            return Exported(state.exported)
        exported = Exported()
        for name in ("img_emb", "text_emb", "metadata"):
            (state.target / name).mkdir(parents=True, exist_ok=True)
        for partition in kept.run.plan.partitions:
            rows = np.flatnonzero(np.asarray(kept.verdicts[partition.start:partition.stop]) == KEPT)
            if len(rows):
                self._write_part(kept.run, partition, rows, state.target)
                exported.count += len(rows)
        state.finish(exported)
        return exported

    def _write_part(self, run: FinishedRun, partition: Partition, rows: np.ndarray, target: pathlib.Path) -> None:
        """Write the three files of one part, of its `rows` (n,), counted from the part's first."""
        import pyarrow as pa
        import pyarrow.parquet as pq
        saved = read_embeddings(partition.embeddings)
        number = f"{partition.index:05d}"
        for name, vectors, of_row in (("img_emb", saved["images"], saved["image_of_row"]),
                                      ("text_emb", saved["texts"], saved["text_of_row"])):
            with atomic_file(target / name / f"{name}_{number}.npy") as file:
                np.save(file, vectors[of_row[rows]].astype(np.float16))
        with partition.parquet.open("rb") as file:
            table = pq.read_table(file, use_threads=False, pre_buffer=False).take(rows)
        columns = {"key": pa.array([f"{partition.start + row:09d}" for row in rows.tolist()], pa.string()),
                   "image_path": table[run.source_name], "caption": table[run.caption_name],
                   "similarity": table["similarity"]}
        for column in run.further_columns:
            columns[f"measure_{column.name}" if column.name in columns else column.name] = table[column.name]
        with atomic_file(target / "metadata" / f"metadata_{number}.parquet") as file:
            pq.write_table(pa.table(columns), file, compression="zstd")


_ALL: tuple[Export, ...] = (Csv(), Parquet(), ImageFolder(), WebDataset(), ClipRetrieval())
EXPORTS = {export.name: export for export in _ALL}
