r"""Other ways to spell the name of a file that is not there as the table has it: tried only then, and in a fixed order.

Tables that were written on other systems have backslashes between folders, names that are percent-encoded, or letters with
marks as one character where the disk has two (Unicode's forms NFC and NFD; macOS writes the latter). What is no UTF-8 in the
name of a file is shown as \xe9 and the like.
"""
import re
import unicodedata
import urllib.parse
from collections.abc import Iterator

BYTE = re.compile(r"\\x([89a-f][0-9a-f])")
MOST_NAMES = 64  # a URL may have thousands of endings, of which the longest and the shortest ones are spelled otherwise


def other_spellings(names: list[str]) -> Iterator[str]:
    """What else the names may be called, in order, without what was among them; worked out when the first is asked for."""
    found: dict[str, None] = {}
    few = names if len(names) <= MOST_NAMES else [*names[:MOST_NAMES // 2], *names[-MOST_NAMES // 2:]]
    for name in few:
        found[BYTE.sub(lambda digits: chr(0xDC00 + int(digits[1], 16)), name)] = None  # how Python has such a byte in a name
        found[urllib.parse.unquote(name, errors="surrogateescape")] = None  # %E9 of a URL in Latin-1 is such a byte, too
        for plain in (name, name.replace("\\", "/"), urllib.parse.unquote(name), urllib.parse.unquote(name.replace("\\", "/"))):
            for form in (plain, unicodedata.normalize("NFC", plain), unicodedata.normalize("NFD", plain)):
                found[form] = None
    known = set(names)
    yield from (name for name in found if name not in known and not name.endswith("/"))
