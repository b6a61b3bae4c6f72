"""`decode: gpu`: JPEGs are decoded in batches on the GPU (nvJPEG, through torchvision), resized and cropped there.

Loader threads and the GPU share the work. The image's own hash decides which of them takes it, never who is free, so that
a run gives the same scores however it is timed or resumed. The GPU gets only what it can be trusted with: a whole baseline
or progressive JPEG in grey or YCbCr, whose end is there (it would decode half an image without a word). Anything else, and
anything that it then fails at, is decoded by Pillow as usual.
"""
import dataclasses
import functools
import io
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from addons.images import costs, halves
from addons.images.exif import TURNS, find_orientation
from image_text_sim_clip import (
    NO_REMARK,
    RESAMPLE_MODES,
    ImageLoader,
    ImageSettings,
    Remark,
    RowFailure,
    Scorer,
    crop_centre,
    say,
)

if TYPE_CHECKING:
    import numpy as np
    import torch

LOADERS_SHARE = 0.4  # of the JPEGs stays with the loader threads, which would otherwise only read
CALL_BYTES = 2 * 2**30  # of decoded images in one call; a batch of larger ones is decoded in several

# JPEG files' bytes -> their (3, h, w) uint8 tensors; raises RuntimeError if one of them is broken
JpegDecoder = Callable[[list[bytes]], "list[torch.Tensor]"]


@dataclasses.dataclass
class OnGpu:
    """An image that the GPU is to decode: its bytes until then, its size, and the failure if Pillow could not either."""

    data: bytes | None
    height: int
    width: int
    failure: RowFailure | None = None
    remark: Remark = NO_REMARK


def find_decoder(device: str) -> JpegDecoder:
    """The decoder that leaves its tensors on the CUDA device; raises LookupError, which says why, where there is none."""
    if not device.startswith("cuda"):
        raise LookupError("there is no CUDA device")
    try:
        import torch
        from torchvision.io import ImageReadMode, decode_jpeg
    except (ImportError, RuntimeError, OSError) as error:  # one built for another torch raises RuntimeError
        raise LookupError(f"torchvision cannot be imported ({type(error).__name__}: {str(error)[:80]})") from None

    def decode(batch: list[bytes]) -> "list[torch.Tensor]":
        tensors = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in batch]
        return list(decode_jpeg(tensors, mode=ImageReadMode.RGB, device=device))
    return decode


def attach(scorer: Scorer, loader: ImageLoader) -> ImageLoader:
    """A loader that leaves the GPU its share, which the scorer's `gpu_decoder` decodes.

    Where the GPU cannot decode, one line says why, and the loader given is returned.
    """
    config = scorer.config
    try:
        if config.preprocess == "exact" or config.exif_orientation or not scorer.settings.knows_fast_resize():
            raise LookupError("exact resizes and turned images are Pillow's")
        if not scorer.settings.crop and not scorer.settings.size:
            raise LookupError("a model whose images keep their shapes takes them from Pillow")
        decode = find_decoder(scorer.device)
    except LookupError as error:
        say(f"decode: gpu cannot be used here, Pillow decodes: {error}")
        return loader
    scorer.gpu_decoder = GpuDecoder(decode, scorer.device, scorer.settings, loader)
    return dataclasses.replace(loader, on_gpu=functools.partial(offer_to_gpu, max_pixels=config.max_image_pixels))


def offer_to_gpu(data: bytes, digest: bytes, max_pixels: int) -> OnGpu | None:
    """What the GPU is to decode: a complete JPEG in grey or YCbCr of an allowed size, outside the loaders' share."""
    if digest[0] < LOADERS_SHARE * 256 or data[:3] != b"\xff\xd8\xff" or data[-2:] != b"\xff\xd9":
        return None
    try:
        if costs.look(data, max_pixels):
            return None
    except RowFailure:  # which the loader will say
        return None
    from PIL import Image
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:  # reads the header alone
            plain = image.mode in ("L", "RGB") and image.info.get("adobe_transform", 1) == 1
            if plain and image.width * image.height <= max_pixels and image.format == "JPEG":
                is_turned = find_orientation(image) in TURNS  # which the config ignores: see `attach`
                return OnGpu(data, image.height, image.width, remark=Remark(is_turned))
    except Exception:  # Pillow raises nearly anything, and says what is wrong when it decodes the image itself
        return None
    return None


class GpuDecoder:
    """Decodes, resizes and crops batches in a thread and a CUDA stream of its own, a batch ahead of the model.

    `settings` tell how the model wants its images; `loader` makes with Pillow what `decode` fails at. On the device "cpu",
    which the tests use, it does the same without a stream.
    """

    def __init__(self, decode: JpegDecoder, device: str, settings: ImageSettings, loader: ImageLoader) -> None:
        self.decode = decode
        self.device = device
        self.settings = settings
        self.loader = loader
        self.fell_back = 0  # images that the GPU was given and could not decode
        self._pool = ThreadPoolExecutor(1, "gpu decoder")
        self._stream: torch.cuda.Stream | None = None  # made by the pool's thread

    def start(self, batch: "Sequence[np.ndarray | OnGpu]") -> "Future[torch.Tensor]":
        """Begin a batch of loaders' arrays (3, H, W) and OnGpus; the future gives them as (n, 3, H, W) uint8 on the GPU.

        An OnGpu that nobody could decode gets zeros and its `failure`.
        """
        return self._pool.submit(self._make_batch, list(batch))

    def _make_batch(self, batch: "list[np.ndarray | OnGpu]") -> "torch.Tensor":
        import torch
        if not self.device.startswith("cuda"):
            return self._fill(batch)
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        with torch.cuda.stream(self._stream):
            pixels = self._fill(batch)
            self._stream.synchronize()
        pixels.record_stream(torch.cuda.default_stream())  # which reads it: its memory is not used anew before
        return pixels

    def _fill(self, batch: "list[np.ndarray | OnGpu]") -> "torch.Tensor":
        """(n, 3, H, W) uint8 on the device: the loaders' arrays copied there, the other images decoded there."""
        import torch
        height, width = self.settings.crop or self.settings.resized(1, 1)
        out = torch.zeros(len(batch), 3, height, width, dtype=torch.uint8, device=self.device)
        arrays: dict[int, np.ndarray] = {}  # by place in the batch
        encoded: dict[int, OnGpu] = {}
        for place, image in enumerate(batch):
            if isinstance(image, OnGpu):
                encoded[place] = image
            else:
                arrays[place] = image
        if arrays:
            stacked = torch.stack([torch.from_numpy(array) for array in arrays.values()])
            if self.device.startswith("cuda"):
                stacked = stacked.pin_memory()
            out[torch.tensor(list(arrays), device=self.device)] = stacked.to(self.device, non_blocking=True)
        for places in split_by_bytes(encoded, CALL_BYTES):
            decoded = self._decode_all([encoded[place] for place in places])
            for place, pixels in zip(places, decoded, strict=True):
                if pixels is not None:
                    out[place] = pixels
        return out

    def _decode_all(self, images: list[OnGpu]) -> "list[torch.Tensor | None]":
        """(3, H, W) uint8 of each on the device, None for those with a failure; the files' bytes are let go."""
        decoded: list[torch.Tensor | None]
        try:
            decoded = list(self.decode([image.data or b"" for image in images]))
        except RuntimeError:  # one that is broken spoils the whole call: find it
            decoded = [self._decode_alone(image) for image in images]
        for i, image in enumerate(images):
            pixels = decoded[i]
            if pixels is None or halves.is_grey(pixels[:, -1, -1].tolist()):  # Pillow's side knows half images
                decoded[i] = self._fall_back(image)
            else:
                decoded[i] = resize_in_floats(pixels[None], self.settings)[0]
            image.data = None
        return decoded

    def _decode_alone(self, image: OnGpu) -> "torch.Tensor | None":
        """(3, h, w) uint8, or None where the decoder refuses the file."""
        try:
            return self.decode([image.data or b""])[0]
        except RuntimeError:
            return None

    def _fall_back(self, image: OnGpu) -> "torch.Tensor | None":
        """(3, H, W) uint8 that Pillow makes of the file, or None, and the image's `failure` is set."""
        import torch
        self.fell_back += 1
        try:
            with self.loader.open_account() as account:
                pixels, _ = self.loader.make_pixels(image.data or b"", account)
        except RowFailure as failure:
            image.failure = RowFailure(failure.status, failure.detail)  # anew: what it came from holds on to the bytes
            return None
        return torch.from_numpy(pixels).to(self.device)


def resize_in_floats(pixels: "torch.Tensor", settings: ImageSettings) -> "torch.Tensor":
    """(n, 3, h, w) bytes -> (n, 3, H, W) bytes, resized and cropped as `resize_fast` does it.

    CUDA's kernel knows floats alone: by rows and then by columns, each rounded as the kernel for bytes rounds.
    """
    import torch
    height, width = settings.resized(*pixels.shape[-2:])
    resize = functools.partial(torch.nn.functional.interpolate, mode=RESAMPLE_MODES[settings.resample], antialias=True)
    wide = resize(pixels.float(), (pixels.shape[-2], width)).round_().clamp_(0, 255)
    resized = resize(wide, (height, width)).round_().clamp_(0, 255).to(torch.uint8)
    return crop_centre(resized, settings)


def split_by_bytes(images: dict[int, OnGpu], most_bytes: int) -> list[list[int]]:
    """The keys of `images` in runs whose decoded images take at most `most_bytes` together; a larger one goes alone."""
    runs: list[list[int]] = []
    bytes_left = 0
    for place, image in images.items():
        size = 3 * image.height * image.width
        if not runs or size > bytes_left:
            runs.append([])
            bytes_left = most_bytes
        runs[-1].append(place)
        bytes_left -= size
    return runs
