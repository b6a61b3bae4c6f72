"""Other ways to spell the name of a file that is not there as the table has it: tried only then, and in a fixed order.

Tables that were written on other systems have backslashes between folders, names that are percent-encoded, or letters with
marks as one character where the disk has two (Unicode's forms NFC and NFD; macOS writes the latter).
"""
import unicodedata
import urllib.parse

MOST_NAMES = 64  # a URL may have thousands of endings, of which the longest and the shortest ones are spelled otherwise


def other_spellings(names: list[str]) -> list[str]:
    """What else the names may be called, in order, without what was among them."""
    found: dict[str, None] = {}
    few = names if len(names) <= MOST_NAMES else [*names[:MOST_NAMES // 2], *names[-MOST_NAMES // 2:]]
    for name in few:
        for plain in (name, name.replace("\\", "/"), urllib.parse.unquote(name), urllib.parse.unquote(name.replace("\\", "/"))):
            for form in (plain, unicodedata.normalize("NFC", plain), unicodedata.normalize("NFD", plain)):
                found[form] = None
    known = set(names)
    return [name for name in found if name not in known and not name.endswith("/")]
