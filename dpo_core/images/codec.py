"""Between the codes of an image and its pixels, by the name of the codec in a model's `image_codes`.

Shapes: N images of H × W pixels with red, green and blue, T codes each.
"""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dpo_core.errors import ModelError
from dpo_core.images import scenes

if TYPE_CHECKING:
    from PIL.Image import Image

Pixels = NDArray[np.uint8]


def pixels_of(codec: str, texts: Sequence[str]) -> Pixels:
    """(N, H, W, 3) of images in their canonical text, codes as numbers.

    Raises:
        ModelError: there is no codec of that name.
    """
    if codec != "scenes":
        raise ModelError(f"there is no codec '{codec}' for the images of the model", "Codecs: scenes")
    return scenes.decode(np.array([list(map(int, text.split())) for text in texts]))


def as_images(pixels: Pixels) -> list["Image"]:
    """The images (N, H, W, 3), as Python code reads them."""
    from PIL import Image  # noqa: PLC0415 - only runs with images need it

    return [Image.fromarray(image) for image in pixels]


def as_png(pixels: Pixels, scale: int = 1) -> bytes:
    """A PNG file of one image (H, W, 3).

    Args:
        scale: pixels of the file for each of the image; small worlds are drawn larger.
    """
    buffer = io.BytesIO()
    (image,) = as_images(pixels.repeat(scale, axis=0).repeat(scale, axis=1)[None])
    image.save(buffer, "png", optimize=True)
    return buffer.getvalue()
