"""Between the codes of a model's images and their pixels, by the codec that its `image_codes` name.

Shapes: N images of H × W pixels with red, green and blue, T codes each.
"""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dpo_core.data.tokens.image_codes import ImageCodes, text_of
from dpo_core.errors import DataError, ModelError
from dpo_core.images import scenes
from dpo_core.images.scenes import Pixels
from dpo_core.models.folder import JANUS


def pixels_of(images: ImageCodes, texts: Sequence[str], folder: str | Path) -> Pixels:
    """(N, H, W, 3) of images in their canonical text, codes as numbers.

    Args:
        folder: the model's, with its decoder if it has one.

    Raises:
        ModelError: there is no codec of that name.
    """
    codes_NT = np.array([list(map(int, text.split())) for text in texts])
    if images.codec == "scenes":
        return scenes.decode(codes_NT)
    _require_janus(images)
    import torch  # noqa: PLC0415 - only for models with a decoder

    from dpo_core.models import visual_lm  # noqa: PLC0415 - only for this codec

    pixels: Pixels = visual_lm.decode(torch.from_numpy(codes_NT), Path(folder)).numpy()
    return pixels


def texts_of(images: ImageCodes, files: Sequence[bytes], folder: str | Path) -> list[str]:
    """The canonical texts of image files, fitted to the size of the model's images.

    Raises:
        DataError: a file is no image, or not of the model's world.
        ModelError: there is no codec of that name.
    """
    from PIL import Image, ImageOps  # noqa: PLC0415 - only runs with images need it

    try:
        opened = [Image.open(io.BytesIO(file)).convert("RGB") for file in files]
    except (OSError, ValueError) as error:
        raise DataError(f"an image cannot be read ({error})", "Remove its row") from error
    if images.codec == "scenes":
        if odd := next((image.size for image in opened if image.size != (scenes.SIDE, scenes.SIDE)), None):
            raise DataError(f"an image of {odd[0]} x {odd[1]} pixels is no scene", "Use images of scenes")
        return [text_of(codes) for codes in scenes.encode(np.stack([np.asarray(i) for i in opened])).tolist()]
    _require_janus(images)
    import torch  # noqa: PLC0415 - only for models with a decoder

    from dpo_core.models import visual_lm  # noqa: PLC0415 - only for this codec

    side = visual_lm.side_of(Path(folder))
    fitted = [np.asarray(ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS)) for image in opened]
    codes_NT = visual_lm.encode(torch.from_numpy(np.stack(fitted)), Path(folder))
    return [text_of(codes) for codes in codes_NT.tolist()]


def _require_janus(images: ImageCodes) -> None:
    if images.codec != JANUS:
        raise ModelError(
            f"there is no codec '{images.codec}' for the images of the model", "Codecs: scenes, janus"
        )
