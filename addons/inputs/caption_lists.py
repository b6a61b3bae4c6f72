"""Several captions of one image: a list in the caption column gives one row for each of its captions, in order.

Where an input has such lists, the column `caption_index` tells each row's place in its list, 0 for a caption that is none of
a list. A column that already has that name becomes `input_caption_index`. A caption that is NULL or blank keeps its row, which
will be `empty_caption`; a list without any text is one such row, so that no image goes missing.
"""
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

if TYPE_CHECKING:
    import pathlib

CAPTION_INDEX = "caption_index"
OWN_INDEX = "input_caption_index"  # what the input's own column of that name is called


class Captions(NamedTuple):
    """The captions of a column of lists, one after the other, (n,) of each."""

    rows: npt.NDArray[np.int64]  # the row whose list it is in, ascending; each row has one at least
    texts: pa.ChunkedArray  # of the lists' own type of text; NULL for a list without text
    numbers: npt.NDArray[np.int64]  # its place in its list


def is_list(kind: pa.DataType) -> bool:
    """Whether cells of this type are lists."""
    types = pa.types
    tests = (types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_list_view, types.is_large_list_view)
    return any(test(kind) for test in tests)


def take_captions(lists: pa.ChunkedArray, texts: pa.ChunkedArray, is_blank: npt.NDArray[np.bool_]) -> Captions:
    """The captions of `lists`, whose values one after the other are `texts` (m,), blank where `is_blank` (m,) says so."""
    row_of_text = pc.list_parent_indices(lists).combine_chunks().to_numpy().astype(np.int64)
    has_text = np.bincount(row_of_text, ~is_blank, len(lists)) > 0  # (rows,)
    counts = np.where(has_text, np.bincount(row_of_text, minlength=len(lists)), 1)
    rows = np.repeat(np.arange(len(lists)), counts)
    index = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    places = np.full(len(rows), -1, np.int64)
    places[has_text[rows]] = np.flatnonzero(has_text[row_of_text])
    taken = texts.take(pa.array(places, mask=places < 0))
    return Captions(rows, taken, index)


def find_blank(texts: pa.ChunkedArray) -> npt.NDArray[np.bool_]:
    """Which cells of a column of UTF-8 text are NULL or nothing but white space, (n,)."""
    trimmed = pc.utf8_trim_whitespace(texts.fill_null(""))
    blank: npt.NDArray[np.bool_] = pc.equal(pc.binary_length(trimmed), 0).combine_chunks().to_numpy(zero_copy_only=False)
    return blank


def split_list(values: list[object]) -> list[str]:
    """The captions of one JSON list, whose numbers have come as text; one empty caption where it holds no text.

    Raises ValueError for a list in the list, or an object.
    """
    texts: list[str] = []
    for value in values:
        if isinstance(value, list | dict):
            raise ValueError(f"a list with {'a list' if isinstance(value, list) else 'an object'} in it")
        if value is None:
            texts.append("")
        else:
            texts.append(str(value).lower() if isinstance(value, bool) else str(value))
    return texts if any(text.strip() for text in texts) else [""]


def count_staged(path: "pathlib.Path") -> int:
    """How many rows the input had that was staged into the Parquet file `path`, which has the column `caption_index`."""
    import pyarrow.parquet as pq
    count = 0
    with path.open("rb") as file, pq.ParquetFile(file) as staged:
        for batch in staged.iter_batches(columns=[CAPTION_INDEX]):
            count += pc.sum(pc.equal(batch.column(0), "0")).as_py() or 0
    return count
