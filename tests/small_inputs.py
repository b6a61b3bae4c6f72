"""Small inputs that several tests make: unit vectors, encoded images, tars."""
import io
import tarfile

import numpy as np


def unit(rng, count, size=16):
    """float32 (count, size): vectors of length 1 in directions of chance."""
    vectors = rng.standard_normal((count, size)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


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
