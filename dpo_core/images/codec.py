"""Images as Python code and files hold them.

Shapes: N images of H × W pixels with red, green and blue.
"""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image

Pixels = NDArray[np.uint8]


def as_images(pixels: Pixels) -> list["Image"]:
    """The images (N, H, W, 3), as Python code reads them."""
    from PIL import Image  # noqa: PLC0415 - only runs with images need it

    return [Image.fromarray(image) for image in pixels]


def read_pixels(files: Sequence[bytes]) -> Pixels:
    """The pixels (N, H, W, 3) of PNG files of one size."""
    from PIL import Image  # noqa: PLC0415 - only runs with images need it

    return np.stack([np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files])


def as_png(pixels: Pixels, scale: int = 1) -> bytes:
    """A PNG file of one image (H, W, 3).

    Args:
        scale: pixels of the file for each of the image; small worlds are drawn larger.
    """
    buffer = io.BytesIO()
    (image,) = as_images(pixels.repeat(scale, axis=0).repeat(scale, axis=1)[None])
    image.save(buffer, "png", optimize=True)
    return buffer.getvalue()
