"""open_clip's preprocessing, for `preprocess: fast` as image settings, and for `exact` on Pillow, without torchvision.

`resize_mode`: `shortest` makes the short side fit and cuts out the centre, `longest` makes the long side fit and fills up
around, `squash` makes both sides fit. torchvision's centre crop begins at round((size - crop) / 2), half to even, where
transformers takes the floor: at some sizes one pixel apart. For a frame that is not square, `shortest` is always bicubic,
whatever `interpolation` says (open_clip_torch 3.3.0, transform.py, ResizeKeepRatio without its argument).
"""
import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from addons.models.open_clip_config import PreprocessConfig
from image_text_sim_clip import ImageSettings

if TYPE_CHECKING:
    import numpy.typing as npt

BILINEAR = 2
BICUBIC = 3


@dataclasses.dataclass(frozen=True)
class OpenClipImageSettings(ImageSettings):
    """ImageSettings whose sizes and crops are rounded as torchvision and open_clip round them."""

    frame: tuple[int, int] = (224, 224)  # what the model reads
    longest: bool = False

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after the resize."""
        is_square = self.frame[0] == self.frame[1]
        if self.size or (is_square and not self.longest):
            return super().resized(height, width)
        ratios = (height / self.frame[0], width / self.frame[1])
        ratio = max(ratios) if self.longest else min(ratios)
        return max(1, round(height / ratio)), max(1, round(width / ratio))  # open_clip fails where a side becomes 0

    def place_crop(self, height: int, width: int) -> tuple[int, int]:
        """Top and left of the frame in an image of that size, negative where the frame is larger."""
        return _begin_of_crop(height, self.frame[0]), _begin_of_crop(width, self.frame[1])

    def target(self) -> tuple[int, int] | None:
        """The size that `decode: scaled` must not go below twice of."""
        side = max(self.frame)
        return side, side


def _begin_of_crop(length: int, crop: int) -> int:
    if length < crop:
        return -((crop - length) // 2)
    return round((length - crop) / 2)  # half to even


def image_settings(config: PreprocessConfig) -> OpenClipImageSettings:
    """The settings that the config asks for."""
    height, width = config.size
    resample = BILINEAR if config.interpolation == "bilinear" else BICUBIC
    if config.resize_mode == "squash":
        return OpenClipImageSettings(None, config.size, None, resample, frame=config.size)
    if config.resize_mode == "longest":
        return OpenClipImageSettings(None, None, config.size, resample, config.fill_color, frame=config.size, longest=True)
    if height != width:
        resample = BICUBIC
    return OpenClipImageSettings(max(config.size), None, config.size, resample, frame=config.size)


class OpenClipImages:
    """open_clip's transforms on Pillow, called and asked as transformers' image processors are."""

    do_rescale = True
    do_normalize = True
    rescale_factor = 1 / 255

    def __init__(self, config: PreprocessConfig) -> None:
        self.settings = image_settings(config)
        self.image_mean = list(config.mean)
        self.image_std = list(config.std)

    def __call__(self, image: "Image.Image | npt.NDArray[np.uint8]", do_resize: bool = True, do_rescale: bool = True,
                 do_normalize: bool = True, return_tensors: str | None = None, **_: object) -> dict[str, "torch.Tensor"]:
        """One RGB image, or with `do_resize` off an array (3, h, w) of bytes -> `pixel_values` (1, 3, H, W)."""
        pixels = self._resize(image) if do_resize and isinstance(image, Image.Image) else np.asarray(image)
        values = torch.from_numpy(pixels.copy())
        if do_rescale:
            values = values.float().div(255)
        if do_normalize:
            mean = torch.tensor(self.image_mean).view(3, 1, 1)
            std = torch.tensor(self.image_std).view(3, 1, 1)
            values = (values - mean) / std
        return {"pixel_values": values[None]}

    def _resize(self, image: Image.Image) -> "npt.NDArray[np.uint8]":
        """(3, H, W) bytes."""
        settings = self.settings
        height, width = settings.resized(image.height, image.width)
        resized = image.resize((width, height), Image.Resampling(settings.resample))
        if settings.crop:
            top, left = settings.place_crop(height, width)
            frame = Image.new("RGB", (settings.frame[1], settings.frame[0]), (settings.fill,) * 3)
            frame.paste(resized, (-left, -top))  # what lies outside is cut off
            resized = frame
        return np.asarray(resized).transpose(2, 0, 1)
