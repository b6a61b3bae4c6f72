"""How open_clip makes token ids of a caption: it cleans first, then takes its own byte-level BPE or a Hugging Face tokenizer.

Cleaning repairs wrongly decoded text (ftfy), undoes HTML's escapes twice, and then, as the config says: `lower` joins white
space to single spaces and makes small letters, `whitespace` only joins white space, `canonicalize` takes punctuation away
(ASCII's; _ becomes a space) and makes small letters. The BPE's words come with the repository, or with an installed
open_clip_torch; they are never made up.

One thing differs from open_clip: a control word that stands in a caption, such as <end_of_text>, is read as text, as it is
for all other models here. open_clip ends the caption there.
"""
import gzip
import html
import importlib.util
import json
import pathlib
import string
from collections.abc import Callable
from typing import TYPE_CHECKING

import regex
from tokenizers import models

from addons.models.open_clip_config import TokenizerConfig
from image_text_sim_clip import EXIT_MODEL, Trouble

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# open_clip's pattern but for its control words; in its tokenizer, too, small and capital letters count alike
WORDS = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.IGNORECASE)
BPE_FILE = "bpe_simple_vocab_16e6.txt.gz"
BPE_MERGES = 49152 - 256 - 2  # of that file's 262,144 lines
START_WORDS = ("<|startoftext|>", "<start_of_text>")
END_WORDS = ("<|endoftext|>", "<end_of_text>")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


# ── Cleaning ──────────────────────────────────────────────────────────────────────────────────────────────────────────

def find_cleaning(kind: str, model: str) -> Callable[[str], str]:
    """The cleaning of that name; Trouble (exit 6) where ftfy is missing."""
    try:
        import ftfy
    except ImportError:
        raise Trouble(EXIT_MODEL, f"{model} is in open_clip's format, whose captions are cleaned with the package ftfy: "
                                  "pip install -r addons/requirements.txt") from None
    finish = {"lower": _lower, "whitespace": _join_spaces, "canonicalize": _canonicalize}[kind]

    def clean(caption: str) -> str:
        repaired = html.unescape(html.unescape(ftfy.fix_text(caption)))
        return finish(repaired.strip())
    return clean


def _join_spaces(text: str) -> str:
    return " ".join(text.split())


def _lower(text: str) -> str:
    return _join_spaces(text).lower()


def _canonicalize(text: str) -> str:
    """As big_vision prepares captions for SigLIP."""
    return _join_spaces(text.replace("_", " ").translate(NO_PUNCTUATION).lower())


# ── open_clip's own tokenizer ─────────────────────────────────────────────────────────────────────────────────────────

def byte_symbols() -> dict[int, str]:
    """The printable letter that stands for each byte in the vocabulary of GPT-2 and CLIP, in the vocabulary's order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    symbols = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in symbols:
            symbols[byte] = chr(256 + len(symbols) - len(printable))
    return symbols


class ByteTokenizer:
    """open_clip's SimpleTokenizer, called as transformers' tokenizers are called; captions come cleaned."""

    pad_token_id = 0
    unk_token_id = None  # every byte has an id
    added_tokens_decoder: dict[int, object] = {}  # noqa: RUF012 - none, and nobody adds any

    def __init__(self, vocabulary: dict[str, int], merges: list[tuple[str, str]], start: int, end: int) -> None:
        self.start = start
        self.end = end
        self._vocabulary = vocabulary
        self._bytes = byte_symbols()
        self._bpe = models.BPE(vocabulary, merges, end_of_word_suffix="</w>")

    def get_vocab(self) -> dict[str, int]:
        """Token -> id."""
        return self._vocabulary

    def convert_tokens_to_ids(self, tokens: str | list[str]) -> int | list[int | None] | None:
        """The id of a token, or of each of several; None for what is no token."""
        if isinstance(tokens, str):
            return self._vocabulary.get(tokens)
        return [self._vocabulary.get(token) for token in tokens]

    def __call__(self, captions: str | list[str], truncation: bool = False, max_length: int = 0,
                 **_: object) -> dict[str, list[int] | list[list[int]]]:
        """`input_ids` of one caption, or of each of several, from start to end; a caption that is cut keeps its end."""
        most = max_length if truncation else None
        if isinstance(captions, str):
            return {"input_ids": self._encode(captions, most)}
        return {"input_ids": [self._encode(caption, most) for caption in captions]}

    def _encode(self, caption: str, most: int | None) -> list[int]:
        ids = [self.start]
        for word in WORDS.findall(caption):
            symbols = "".join(self._bytes[byte] for byte in word.encode("utf-8", "surrogatepass"))
            ids += [token.id for token in self._bpe.tokenize(symbols)]
        ids.append(self.end)
        return ids if most is None or len(ids) <= most else [*ids[:most - 1], self.end]


def load_byte_tokenizer(folder: pathlib.Path, model: str) -> tuple[ByteTokenizer, str]:
    """The tokenizer with the words of the model's folder, or else of an installed open_clip_torch; and whose they are."""
    try:
        found = _read_vocabulary(folder)
        origin = "the model's"
        if found is None:
            found = _read_package_vocabulary()
            origin = "open_clip_torch's"
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise Trouble(EXIT_MODEL, f"cannot load {model}: its vocabulary cannot be read ({type(error).__name__}: "
                                  f"{str(error)[:120]})") from None
    if found is None:
        raise Trouble(EXIT_MODEL, f"{model} is in open_clip's format and brings no vocabulary (tokenizer.json, or vocab.json "
                                  f"and merges.txt, or {BPE_FILE}); put OpenAI's there, which is in each CLIP repository, or "
                                  "pip install --no-deps open_clip_torch")
    vocabulary, merges = found
    start = next((vocabulary[word] for word in START_WORDS if word in vocabulary), None)
    end = next((vocabulary[word] for word in END_WORDS if word in vocabulary), None)
    if start is None or end is None:
        raise Trouble(EXIT_MODEL, f"{model}: its vocabulary lacks {START_WORDS[0]} or {END_WORDS[0]}: not CLIP's")
    return ByteTokenizer(vocabulary, merges, start, end), origin


Vocabulary = tuple[dict[str, int], list[tuple[str, str]]]


def _read_vocabulary(folder: pathlib.Path) -> Vocabulary | None:
    """Words and merges of the files in the folder; None where there are none."""
    if (folder / "tokenizer.json").is_file():
        bpe = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
        if bpe["type"] != "BPE" or bpe.get("end_of_word_suffix") != "</w>":
            raise ValueError("tokenizer.json is not CLIP's byte-level BPE")
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in bpe["merges"]]
        return dict(bpe["vocab"]), [(first, second) for first, second in pairs]
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        return vocabulary, _split_merges((folder / "merges.txt").read_text(encoding="utf-8").split("\n")[1:])
    if (folder / BPE_FILE).is_file():
        return _read_bpe_file(folder / BPE_FILE)
    return None


def _read_package_vocabulary() -> Vocabulary | None:
    """That of an installed open_clip_torch, which need not be imported for it."""
    package = importlib.util.find_spec("open_clip")
    if package is None or not package.origin:
        return None
    path = pathlib.Path(package.origin).parent / BPE_FILE
    return _read_bpe_file(path) if path.is_file() else None


def _read_bpe_file(path: pathlib.Path) -> Vocabulary:
    """OpenAI's file of merges, from which the ids follow: bytes, bytes that end a word, merges, start and end."""
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
    merges = _split_merges(lines[1:BPE_MERGES + 1])
    letters = list(byte_symbols().values())
    words = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(merge) for merge in merges)]
    words += [START_WORDS[0], END_WORDS[0]]
    return {word: number for number, word in enumerate(words)}, merges


def _split_merges(lines: list[str]) -> list[tuple[str, str]]:
    merges = []
    for line in lines:
        if line:
            first, second = line.split()
            merges.append((first, second))
    return merges


# ── Hugging Face's tokenizers ─────────────────────────────────────────────────────────────────────────────────────────

def load_hugging_face_tokenizer(folder: pathlib.Path, model: str) -> "PreTrainedTokenizerBase":
    """The tokenizer whose files lie in `folder`; remote code never runs. Raises Trouble (exit 6)."""
    import transformers
    try:
        tokenizer: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a broken folder makes transformers raise nearly anything
        raise Trouble(EXIT_MODEL, f"cannot load the tokenizer of {model}: {type(error).__name__}: "
                                  f"{str(error)[:300]}") from error
    if tokenizer.pad_token_id is None or tokenizer.padding_side != "right":
        raise Trouble(EXIT_MODEL, f"{model}: its tokenizer must fill up captions on the right, and this one does not")
    return tokenizer


def separator_of(tokenizer: "PreTrainedTokenizerBase", config: TokenizerConfig, model: str) -> int | None:
    """The id that becomes 0 in every caption (CLIPA's strip_sep_token), None where there is none to be taken away."""
    if not config.strip_separator:
        return None
    if tokenizer.sep_token_id is None:
        raise Trouble(EXIT_MODEL, f"{model}: strip_sep_token is set, but its tokenizer has no separator")
    return int(tokenizer.sep_token_id)
