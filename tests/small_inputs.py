"""Small inputs that several tests make: unit vectors, encoded images, tars."""
import io
import tarfile

import numpy as np
from PIL import Image

import image_text_sim_clip as script


def unit(rng, count, size=16):
    """float32 (count, size): vectors of length 1 in directions of chance."""
    vectors = rng.standard_normal((count, size)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def resized_by_pillow(image, settings):
    """RGB image -> (3, H, W) uint8 array: resized and cropped as `settings` say, by Pillow alone."""
    image = script.trim_strip(image, settings)
    height, width = settings.resized(image.height, image.width)
    resized = image.resize((width, height), Image.Resampling(settings.resample))
    if settings.crop:
        top, left = settings.place_crop(height, width)
        resized = resized.crop((left, top, left + settings.crop[1], top + settings.crop[0]))  # black where there is nothing
    return np.ascontiguousarray(np.asarray(resized).transpose(2, 0, 1))


def encoded(image, format_="PNG", **options):
    """The bytes of a Pillow image in a format."""
    data = io.BytesIO()
    image.save(data, format_, **options)
    return data.getvalue()


def write_tar(path, members):
    """A tar of (name, bytes) pairs."""
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
