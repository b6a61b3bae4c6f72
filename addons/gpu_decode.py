"""`decode: gpu`: JPEGs are decoded in batches on the card (nvJPEG, through torchvision), resized and cropped there.

Loader threads and the card share the work. Which of them takes a picture is settled by the picture's own hash, never by who
is free, so that a run gives the same scores however it is timed or resumed. The card gets only what it can be trusted
with: a whole baseline or progressive JPEG in grey or YCbCr, whose end is there (it would decode half a picture without a
word). Anything else, and anything that it then fails at, is decoded by Pillow as usual.
"""
import dataclasses
import io
import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

LOADERS_SHARE = 0.4  # of the JPEGs stays with the loader threads, which would otherwise only read
CARD_BYTES = 2 * 2**30  # of decoded pictures in one call; a batch of larger ones is decoded in several


@dataclasses.dataclass
class OnCard:
    """A picture that the card is to decode: its bytes until then, its size, and the failure if Pillow could not either."""

    data: bytes | None
    height: int
    width: int
    failure: Any = None


def find_decoder(device: str) -> tuple[Callable[[list[bytes]], list[Any]] | None, str]:
    """(the card's decoder: JPEG bytes -> (3, h, w) uint8 tensors on `device`; None, and why, where there is none)."""
    if not device.startswith("cuda"):
        return None, "there is no CUDA device"
    try:
        import torch
        from torchvision.io import ImageReadMode, decode_jpeg
    except (ImportError, RuntimeError, OSError) as error:  # one built for another torch raises RuntimeError
        return None, f"torchvision cannot be imported ({type(error).__name__}: {str(error)[:80]})"

    def decode(batch: list[bytes]) -> list[Any]:
        tensors = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in batch]
        return list(decode_jpeg(tensors, mode=ImageReadMode.RGB, device=device))
    return decode, ""


def attach(scorer: Any, plain: Any, loader: Any, failure: type[Exception], say: Callable[[str], None]) -> None:
    """Give the card its share of what `loader` decodes, or say in a line why it cannot take any.

    `plain` is a loader like it that decodes everything itself.
    """
    config, settings = loader.config, loader.settings
    decode, why_not = find_decoder(scorer.device)
    if config.preprocess == "exact" or config.exif_orientation or not settings.knows_fast_resize():
        why_not = "exact resizes and turned pictures are Pillow's"
    if not decode or why_not:
        say(f"decode: gpu is not to be had here, Pillow decodes: {why_not}")
        return
    scorer.card = CardDecoder(decode, scorer.device, settings,
                              lambda data: plain.resize(plain.decode(data), settings), failure)
    loader.for_the_card = lambda data, digest: is_for_the_card(data, digest, config.max_image_pixels)


def is_for_the_card(data: bytes, digest: bytes, max_pixels: int) -> OnCard | None:
    """What the card may decode: a complete JPEG in grey or YCbCr of an allowed size, outside the loaders' share."""
    if digest[0] < LOADERS_SHARE * 256 or data[:3] != b"\xff\xd8\xff" or data[-2:] != b"\xff\xd9":
        return None
    from PIL import Image
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:  # reads the header alone
            plain = image.mode in ("L", "RGB") and image.info.get("adobe_transform", 1) == 1
            if plain and image.width * image.height <= max_pixels and image.format == "JPEG":
                return OnCard(data, image.height, image.width)
    except Exception:  # Pillow raises nearly anything, and says what is wrong when it decodes the picture itself
        return None
    return None


class CardDecoder:
    """Decodes, resizes and crops batches in a thread and a CUDA stream of its own, a batch ahead of the model.

    `settings` are the model's ImageSettings; `load_slowly(data)` gives the (3, H, W) uint8 array that a loader thread would
    make of the bytes, or raises `failure`.
    """

    def __init__(self, decode: Callable[[list[bytes]], list[Any]], device: str, settings: Any,
                 load_slowly: Callable[[bytes], Any], failure: type[Exception]) -> None:
        self.decode, self.device, self.settings = decode, device, settings
        self.load_slowly, self.failure = load_slowly, failure
        self.fell_back = 0  # pictures that the card was given and could not decode
        self._pool = ThreadPoolExecutor(1, "card")
        self._local = threading.local()

    def start(self, batch: Sequence[Any]) -> "Future[Any]":
        """Begin a batch of loaders' arrays (3, H, W) and OnCards; the future gives them as (n, 3, H, W) uint8 on the card.

        An OnCard that nobody could decode gets zeros and its `failure`.
        """
        return self._pool.submit(self._make_batch, list(batch))

    def _make_batch(self, batch: list[Any]) -> Any:
        import torch
        if not self.device.startswith("cuda"):
            return self._fill(batch)
        if not hasattr(self._local, "stream"):
            self._local.stream = torch.cuda.Stream()
        with torch.cuda.stream(self._local.stream):
            pixels = self._fill(batch)
            self._local.stream.synchronize()
        pixels.record_stream(torch.cuda.default_stream())  # which reads it: its memory is not used anew before
        return pixels

    def _fill(self, batch: list[Any]) -> Any:
        import torch
        places = [i for i, picture in enumerate(batch) if isinstance(picture, OnCard)]
        height, width = self.settings.crop or self.settings.resized(1, 1)
        out = torch.zeros(len(batch), 3, height, width, dtype=torch.uint8, device=self.device)
        arrays = [i for i in range(len(batch)) if i not in set(places)]
        if arrays:
            stacked = torch.stack([torch.from_numpy(batch[i]) for i in arrays])
            stacked = stacked.pin_memory() if self.device.startswith("cuda") else stacked
            out[torch.tensor(arrays, device=self.device)] = stacked.to(self.device, non_blocking=True)
        for some in _within(CARD_BYTES, places, batch):
            for i, picture in zip(some, self._decode_all([batch[i] for i in some]), strict=True):
                if picture is not None:
                    out[i] = picture
        return out

    def _decode_all(self, pictures: list[OnCard]) -> list[Any]:
        """(3, H, W) uint8 of each on the card, None for those with a failure; the bytes are let go."""
        try:
            decoded: list[Any] = self.decode([picture.data or b"" for picture in pictures])
        except RuntimeError:  # one that is broken spoils the whole call: find it
            decoded = [self._decode_alone(picture) for picture in pictures]
        for i, picture in enumerate(pictures):
            decoded[i] = self._fall_back(picture) if decoded[i] is None else resize_on_card(decoded[i], self.settings)
            picture.data = None
        return decoded

    def _decode_alone(self, picture: OnCard) -> Any:
        try:
            return self.decode([picture.data or b""])[0]
        except RuntimeError:
            return None

    def _fall_back(self, picture: OnCard) -> Any:
        import torch
        self.fell_back += 1
        try:
            return torch.from_numpy(self.load_slowly(picture.data or b"")).to(self.device)
        except self.failure as failure:
            picture.failure = failure.with_traceback(None)
            return None


def _within(most_bytes: int, places: list[int], batch: list[Any]) -> list[list[int]]:
    """`places` in runs whose decoded pictures take at most `most_bytes` together (one larger than that goes alone)."""
    runs: list[list[int]] = []
    room = 0
    for i in places:
        size = 3 * batch[i].height * batch[i].width
        if not runs or size > room:
            runs.append([])
            room = most_bytes
        runs[-1].append(i)
        room -= size
    return runs


def resize_on_card(pixels: Any, settings: Any) -> Any:
    """(3, h, w) uint8 -> (3, H, W) uint8 as the model's processor resizes and crops, by torch's antialiased kernel.

    On CUDA that kernel works in floats only; rounding after the rows and again after the columns, as the bytes' kernel and
    Pillow do, keeps it within two levels of theirs.
    """
    import torch
    height, width = pixels.shape[1:]
    size = settings.resized(height, width)
    mode = {2: "bilinear", 3: "bicubic"}[settings.resample]
    out = pixels[None].float()  # (1, 3, h, w)
    for step in ((height, size[1]), size):
        out = torch.nn.functional.interpolate(out, step, mode=mode, antialias=True).round_().clamp_(0, 255)
    out = out[0].to(torch.uint8)
    if settings.crop is None:
        return out
    missing = [max(0, wanted - have) for wanted, have in zip(settings.crop, size, strict=True)]
    if any(missing):
        (up, down), (left, right) = ((math.ceil(n / 2), n // 2) for n in missing)
        out = torch.nn.functional.pad(out, (left, right, up, down))
    top, start = ((have - wanted) // 2 for wanted, have in zip(settings.crop, out.shape[1:], strict=True))
    return out[:, top:top + settings.crop[0], start:start + settings.crop[1]]
