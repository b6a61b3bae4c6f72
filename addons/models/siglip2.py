"""SigLIP 2 NaFlex (model_type siglip2): images keep their shapes, such as google/siglip2-base-patch16-naflex.

An image is resized to as many whole patches as the model reads at most, its sides as near to their ratio as whole patches
allow (Tschannen et al. 2025, arXiv 2502.14786, 2.4.2). Position embeddings are resized to each image's rows and columns of
patches, and a mask hides what fills a batch up. Captions are as for SigLIP 2 of a fixed size: 64 tokens, in lower case, filled
up on the right, and without a mask (big_vision's README_siglip2.md). Those of a fixed size are of type siglip.
"""
import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from image_text_sim_clip import EXIT_MODEL, ImageSettings, Siglip, Trouble

if TYPE_CHECKING:
    import pathlib

    import numpy.typing as npt
    from PIL import Image

MOST_PATCHES = 16_384  # of an image; of 16 x 16 pixels these are 4 megapixels, 200 MB as the model reads them in a batch of 4
SHAPE_BYTES = 4  # rows and columns of patches, two bytes each


@dataclasses.dataclass(frozen=True)
class PatchSettings(ImageSettings):
    """Image settings whose size is a number of patches: sides of `patch` pixels, `most` of them in an image."""

    patch: int = 16
    most: int = 256

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after the resize, both whole patches, found as transformers finds them."""
        from transformers.models.siglip2.image_processing_pil_siglip2 import get_image_size_for_max_num_patches
        size: tuple[int, int] = get_image_size_for_max_num_patches(height, width, self.patch, self.most)
        return size

    def target(self) -> tuple[int, int] | None:
        """The size that `decode: scaled` must not go below twice of: no image's shorter side becomes longer than this."""
        side = self.patch * math.isqrt(self.most)
        return side, side


class WholeImages:
    """The model's own image processor; the patches that it gives are laid together to an image again."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self.patch = int(processor.patch_size)
        self.most = int(processor.max_num_patches)
        self.do_resize = processor.do_resize
        self.resample = processor.resample
        self.do_rescale = processor.do_rescale
        self.rescale_factor = processor.rescale_factor
        self.do_normalize = processor.do_normalize
        self.image_mean = processor.image_mean
        self.image_std = processor.image_std

    def __call__(self, image: "Image.Image | npt.NDArray[np.uint8]", do_resize: bool = True, return_tensors: str | None = None,
                 **options: object) -> dict[str, torch.Tensor]:
        """One RGB image -> `pixel_values` (1, 3, h, w), whole patches each way; with `do_resize` off an array (3, h, w) of
        bytes, which keeps its size."""
        if do_resize:
            return {"pixel_values": self._process(image, **options)}
        pixels = np.asarray(image).repeat(self.patch, 1).repeat(self.patch, 2)  # each pixel a patch of its own
        return {"pixel_values": self._process(pixels, do_resize=False, **options)[..., ::self.patch, ::self.patch]}

    def _process(self, image: "Image.Image | npt.NDArray[np.uint8]", **options: object) -> torch.Tensor:
        made = self._processor(image, **options)
        rows, columns = made["spatial_shapes"][0]
        patches = torch.from_numpy(np.asarray(made["pixel_values"][0])[:rows * columns])
        return join_patches(patches, int(rows), int(columns))[None]


def cut_into_patches(pixels: torch.Tensor, patch: int) -> torch.Tensor:
    """(n, 3, h, w) -> (n, rows x columns, patch x patch x 3), row by row, the colours last, as the model reads them."""
    count, colours, height, width = pixels.shape
    cut = pixels.reshape(count, colours, height // patch, patch, width // patch, patch)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(count, -1, patch * patch * colours)


def join_patches(patches: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """(rows x columns, patch x patch x 3) -> (3, h, w): `cut_into_patches` undone, of one image."""
    patch = math.isqrt(patches.shape[1] // 3)
    laid = patches.reshape(rows, columns, patch, patch, 3)
    return laid.permute(4, 0, 2, 1, 3).reshape(3, rows * patch, columns * patch)


class Siglip2(Siglip):
    """SigLIP 2 whose images keep their shapes."""

    kind = "siglip2"
    architecture = "Siglip2Model"

    def __init__(self, model: Any, tokenizer: Any, processor: Any, name: str) -> None:
        if not processor.do_resize:
            raise Trouble(EXIT_MODEL, f"{name}: its image processor resizes nothing, and images may not have more than "
                                      f"{processor.max_num_patches} patches: set do_resize to true in its "
                                      "preprocessor_config.json")
        if type(processor.max_num_patches) is not int or not 1 <= processor.max_num_patches <= MOST_PATCHES:
            raise Trouble(EXIT_MODEL, f"{name}: its image processor cuts at most {processor.max_num_patches!r:.40} patches "
                                      f"(max_num_patches), where a whole number from 1 to {MOST_PATCHES:,} belongs")
        self._images = WholeImages(processor)
        super().__init__(model, tokenizer, self._images, name)

    def image_settings(self) -> PatchSettings:
        """How images are resized for this model."""
        return PatchSettings(None, None, None, int(self._images.resample), patch=self._images.patch, most=self._images.most)

    def check_sizes(self, folder: "pathlib.Path") -> None:
        """Raise Trouble (exit 6) for an image processor that cuts other patches than the model reads."""
        reads = int(self.model.config.vision_config.patch_size)
        if self._images.patch != reads:
            raise Trouble(EXIT_MODEL, f"{self.name}: its image processor cuts patches of {self._images.patch} pixels "
                                      f"(preprocessor_config.json) and its model reads {reads} (config.json): one of the two "
                                      "files belongs to another model")

    def stack(self, images: "list[npt.NDArray[np.uint8]]") -> "npt.NDArray[np.uint8]":
        """Arrays (3, h, w) of any whole patches -> (n, most + 1, patch x patch x 3): the patches of each image, zeros behind
        them, and a last row that begins with the numbers of rows and columns, two bytes each."""
        patch = self._images.patch
        packed = np.zeros((len(images), self._images.most + 1, 3 * patch * patch), np.uint8)
        for into, image in zip(packed, images, strict=True):
            patches = cut_into_patches(torch.from_numpy(image)[None], patch)[0].numpy()
            into[:len(patches)] = patches
            shape = np.array([image.shape[1] // patch, image.shape[2] // patch], ">u2")
            into[-1, :SHAPE_BYTES] = shape.view(np.uint8)
        return packed

    def features_of_bytes(self, model: Any, pixels: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
        """What `stack` has made -> (n, d) features."""
        high_and_low = pixels[:, -1, :SHAPE_BYTES].long().reshape(-1, 2, 2)  # read where it lies: each shape is asked for
        shapes = high_and_low[..., 0] * 256 + high_and_low[..., 1]  # (n, 2)
        patches = pixels[:, :-1].to(levels.device, non_blocking=True).long()
        colour = torch.arange(patches.shape[-1], device=levels.device) % 3
        return self._read_patches(model, levels[colour, patches], shapes)

    def image_features(self, model: Any, pixel_values: torch.Tensor) -> torch.Tensor:
        """(n, 3, h, w) normalised pixels of one shape, whole patches each way -> (n, d) features."""
        patch = self._images.patch
        count, _, height, width = pixel_values.shape
        patches = cut_into_patches(pixel_values, patch)
        filled = torch.nn.functional.pad(patches, (0, 0, 0, self._images.most - patches.shape[1]))
        return self._read_patches(model, filled, torch.tensor([[height // patch, width // patch]] * count))

    def _read_patches(self, model: Any, patches: torch.Tensor, shapes: torch.Tensor) -> torch.Tensor:
        """(n, most, patch x patch x 3) normalised patches and (n, 2) rows and columns -> (n, d) features.

        What is behind an image's patches becomes zeros, as transformers fills up, and is masked.
        """
        is_patch = torch.arange(patches.shape[1]) < shapes.prod(1, keepdim=True).cpu()  # (n, most)
        mask = is_patch.to(patches.device)
        values = (patches * mask[..., None]).to(next(model.parameters()).dtype)
        features: torch.Tensor = model.get_image_features(
            pixel_values=values, pixel_attention_mask=mask.int(), spatial_shapes=shapes).pooler_output
        return features


FAMILY = Siglip2
