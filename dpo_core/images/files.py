"""Images that answers of canonical rows name: `image:SHA256:PATH`, the digest of the bytes and their file; or
with `data:…`, the bytes themselves, in place of the path.

Rules for single images and for pairs are checked while rows are read; a row that breaks one is a fault, which
the data gate counts by reason.
"""

import base64
import hashlib
import io
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_core.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

_MARK = "image:"
_INLINE = "data:image/png;base64,"
_MODES = ("RGB", "L")


class BadImage(Exception):
    """An image breaks a rule; the message is the reason."""


def names_image(answer: str) -> bool:
    """Whether an answer is the name of an image."""
    return answer.startswith(_MARK)


def name_of(path: Path) -> str:
    """The name of a file in place.

    Raises:
        BadImage: it cannot be read.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BadImage(f"cannot be read ({error.strerror or error})") from error
    return f"{_MARK}{hashlib.sha256(content).hexdigest()}:{path.absolute()}"


def inline_name(png: bytes) -> str:
    """The name of a PNG file that holds its bytes, so that sampled images move with their table."""
    return f"{_MARK}{hashlib.sha256(png).hexdigest()}:{_INLINE}{base64.b64encode(png).decode()}"


def store(content: bytes, folder: Path) -> str:
    """The name of bytes, which are kept in a folder, equal ones once."""
    digest = hashlib.sha256(content).hexdigest()
    path = folder.absolute() / digest[:2] / digest
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{digest}.{uuid.uuid4().hex}")
        partial.write_bytes(content)
        os.replace(partial, path)
    return f"{_MARK}{digest}:{path}"


def read_bytes(answer: str) -> bytes:
    """The bytes of the file that an answer names.

    Raises:
        DataError: the file is gone, or is not the one that was named.
    """
    digest, _, path = answer.removeprefix(_MARK).partition(":")
    if path.startswith(_INLINE):
        return base64.b64decode(path.removeprefix(_INLINE))
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise DataError(
            f"the image {path} cannot be read ({error})", "Restore it, or read the data again"
        ) from error
    if hashlib.sha256(content).hexdigest() != digest:
        raise DataError(f"the image {path} was changed after the data were read", "Read the data again")
    return content


def open_image(content: bytes) -> "Image":
    """The image of a file's bytes, as the rules allow it.

    Raises:
        BadImage: it has no bytes, is no image, has transparency or a palette, or is of one colour.
    """
    from PIL import Image  # noqa: PLC0415 - only runs with images need it

    if not content:
        raise BadImage("has no bytes")
    try:
        image = Image.open(io.BytesIO(content))
        image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadImage("is no image that can be read") from error
    if image.mode not in _MODES or "transparency" in image.info:
        raise BadImage(f"has transparency or a palette (mode {image.mode})")
    if all(low == high for low, high in _extrema(image)):
        raise BadImage("is of one colour only")
    return image


def _extrema(image: "Image") -> Sequence[tuple[int, int]]:
    """The smallest and the largest value of each band."""
    return [band.getextrema() for band in image.split()]  # type: ignore[misc]


def pair_fault(chosen: str, rejected: str) -> str:
    """The reason why two named images make no pair; "" for none."""
    opened = []
    for side, answer in (("chosen", chosen), ("rejected", rejected)):
        try:
            opened.append(open_image(read_bytes(answer)))
        except BadImage as error:
            return f"the {side} image {error}"
        except DataError as error:  # it changed since its row was read
            return error.problem
    first, second = opened
    if first.size != second.size:
        return "the two images differ in size"
    if first.convert("RGB").tobytes() == second.convert("RGB").tobytes():
        # Equal bytes are equal pixels; files of two formats can be, too.
        return "the two images are equal"
    return ""
