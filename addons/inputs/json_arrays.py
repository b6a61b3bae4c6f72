"""A JSON array of objects as records, as json.dump and many data sets write it: read a stretch at a time, never held whole.

A record that is no JSON costs itself: the next one is looked for where an object ends and another begins. Which records are
rows is decided by json_lines.py.
"""
import json
import re
from collections.abc import Iterator

from addons.inputs.text import Text
from image_text_sim_clip import MAX_RECORD_CHARS, say

STRETCH_BYTES = 1_000_000  # of text that is looked at a time
CUT_CHARS = 16  # an error nearer to the end of a stretch may be the cut's
NEXT_RECORD = re.compile(r"\}\s*,\s*(?=\{)")
BETWEEN = re.compile(r"[\s,]*")
_SCANNER = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=str)

Record = tuple[int, str]  # the number of its first line, from 1, and its text


def is_array(text: Text) -> bool:
    """Whether a text begins as an array does."""
    return text.peek(STRETCH_BYTES).lstrip(b" \t\r\n").startswith(b"[")


def read_records(text: Text) -> Iterator[Record]:
    """The elements of the array that the text is, each as it stands there; what stands behind its end is one, too."""
    start = text.peek(STRETCH_BYTES)
    size = start.index(b"[") + 1
    text.take(size, lines=start.count(b"\n", 0, size))
    stretch_bytes = STRETCH_BYTES
    while data := text.peek(stretch_bytes):
        is_last = len(data) < stretch_bytes
        stretch = _decode(data, text, is_last)
        taken = 0
        for begin, end in _find_records(stretch, is_last or len(stretch) > MAX_RECORD_CHARS):
            yield text.line + stretch.count("\n", 0, begin), stretch[begin:end]
            taken = end
        taken = _skip(stretch, taken)
        is_closed = stretch[taken:taken + 1] == "]"
        taken += is_closed
        text.take(len(stretch[:taken].encode("utf-8", text.errors)), lines=stretch.count("\n", 0, taken))
        if is_closed:
            yield from _read_rest(text)
            return
        if is_last:
            break
        stretch_bytes = STRETCH_BYTES if taken else 2 * stretch_bytes
    say(f"{text.path} ends before its list does")


def _skip(stretch: str, place: int) -> int:
    """The place behind the white space and commas there."""
    between = BETWEEN.match(stretch, place)
    return between.end() if between else place


def _decode(data: bytes, text: Text, is_last: bool) -> str:
    """The characters of a stretch; one that the stretch cuts is left out."""
    end = len(data)
    while not is_last and end > len(data) - 4 and data[end - 1] & 0xC0 == 0x80:
        end -= 1
    if not is_last and data[end - 1] >= 0xC0:
        end -= 1
    return data[:end].decode("utf-8", text.errors)


def _find_records(stretch: str, is_whole: bool) -> Iterator[tuple[int, int]]:
    """Where the records of a stretch begin and end; what may go on behind it is none, unless it is the whole rest."""
    place = _skip(stretch, 0)
    while place < len(stretch) and stretch[place] != "]":
        try:
            _, end = _SCANNER.raw_decode(stretch, place)
            if end > len(stretch) - CUT_CHARS and not is_whole:
                return  # a number, perhaps, that goes on
        except (json.JSONDecodeError, RecursionError) as error:
            is_cut = isinstance(error, json.JSONDecodeError) and (
                error.msg.startswith("Unterminated") or error.pos > len(stretch) - CUT_CHARS)
            if is_cut and not is_whole:
                return
            following = NEXT_RECORD.search(stretch, place)
            if following is None and not is_whole:
                return
            end = following.start() + 1 if following else len(stretch.rstrip().removesuffix("]").rstrip())
            end = max(end, place + 1)
        yield place, end
        place = _skip(stretch, end)


def _read_rest(text: Text) -> Iterator[Record]:
    """What stands behind the end of the array, a line at a time; blank lines are nothing."""
    for line in text.lines():
        if line.strip():
            yield text.line - 1, line
