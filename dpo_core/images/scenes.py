"""A world of 16 × 16 pixels: drawing scenes, and detecting every object in an image.

Objects have one of five shapes, six colours and three textures, are 6 × 6 pixels large and stand on a grid of
2 × 2 pixels with at least one such cell between them, on black. An image is 8 × 8 codes of a codebook that
holds every cell which can be drawn, so coding loses nothing.

Shapes: N images, K kinds of objects, W places, C codes.
"""

from collections.abc import Iterable, Sequence
from functools import cache
from itertools import product

import numpy as np
from numpy.typing import NDArray

from dpo_core.images.records import Box, Thing

SIDE = 16
CELL = 2
SIZE = 6
"""Pixels of an image's side, a cell's and an object's."""
CELLS = SIDE // CELL
_CORNERS = range(0, SIDE - SIZE + 1, CELL)
PLACES = tuple((x, y) for x in _CORNERS for y in _CORNERS)
"""(x, y) of an object's upper left corner."""

SHAPES = {
    "square": ("######", "######", "######", "######", "######", "######"),
    "circle": (".####.", "######", "######", "######", "######", ".####."),
    "ring": (".####.", "######", "##..##", "##..##", "######", ".####."),
    "cross": ("..##..", "..##..", "######", "######", "..##..", "..##.."),
    "triangle": ("..##..", "..##..", ".####.", ".####.", "######", "######"),
}
COLORS = {
    "red": (230, 40, 40),
    "green": (40, 190, 60),
    "blue": (60, 90, 240),
    "yellow": (240, 220, 40),
    "purple": (170, 60, 210),
    "white": (245, 245, 245),
}
TEXTURES = {"solid": ("##", "##"), "striped": ("##", ".."), "dotted": ("#.", ".#")}
"""Which pixels of a cell are bright; the others have 40 % of the colour."""
_DARK = 0.4

STRICT = 0.93
"""An object counts from this fit on: one missing cell of nine is below it, 5 % of noise above it."""

Pixels = NDArray[np.uint8]


@cache
def kinds() -> tuple[tuple[str, str, str], ...]:
    """(shape, colour, texture) of every kind of object."""
    return tuple(product(SHAPES, COLORS, TEXTURES))


@cache
def _kind_pixels_K() -> Pixels:
    """(K, 6, 6, 3)."""
    pixels = np.zeros((len(kinds()), SIZE, SIZE, 3), np.uint8)
    for k, (shape, color, texture) in enumerate(kinds()):
        cell = np.array([[1.0 if c == "#" else _DARK for c in row] for row in TEXTURES[texture]])
        light = np.tile(cell, (SIZE // CELL, SIZE // CELL))
        mask = np.array([[c == "#" for c in row] for row in SHAPES[shape]])
        pixels[k] = np.round((light * mask)[..., None] * np.array(COLORS[color])).astype(np.uint8)
    return pixels


def box_at(x: int, y: int) -> Box:
    """The box of an object whose upper left corner is at (x, y)."""
    return Box(x, y, x + SIZE, y + SIZE)


def draw(things: Iterable[Thing]) -> Pixels:
    """(16, 16, 3) with these objects."""
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    for thing in things:
        x, y = int(thing.box.left), int(thing.box.top)
        kind = kinds().index((thing.name, thing.color, thing.texture))
        image[y : y + SIZE, x : x + SIZE] = _kind_pixels_K()[kind]
    return image


def detect(images_N: Pixels, threshold: float = STRICT) -> list[list[Thing]]:
    """The objects of each image, most confident first.

    Every kind is compared with every place; of overlapping places the best one counts. The confidence is the
    fit: 1 minus the root mean square of the difference, as a share of the range of a pixel.

    Args:
        images_N: (N, 16, 16, 3).
        threshold: the lowest fit of an object.
    """
    fit_NWK = _fits(images_N)
    best_NW, kind_NW = fit_NWK.max(-1), fit_NWK.argmax(-1)
    return [_best_places(best_NW[n], kind_NW[n], threshold) for n in range(len(images_N))]


def best_fits(images_N: Pixels) -> NDArray[np.float32]:
    """(N, K) the fit of each kind of object at its best place."""
    return _fits(images_N).max(1)


def _fits(images_N: Pixels) -> NDArray[np.float32]:
    """(N, W, K) the fit of each kind of object at each place."""
    windows_NWP = np.stack(
        [images_N[:, y : y + SIZE, x : x + SIZE].reshape(len(images_N), -1) for x, y in PLACES], axis=1
    ).astype(np.float32)
    kinds_KP = _kind_pixels_K().reshape(len(kinds()), -1).astype(np.float32)
    squares_NWK = (
        (windows_NWP**2).sum(-1)[..., None] - 2 * windows_NWP @ kinds_KP.T + (kinds_KP**2).sum(-1)
    ) / kinds_KP.shape[-1]
    fits: NDArray[np.float32] = 1 - np.sqrt(np.maximum(squares_NWK, 0)) / 255
    return fits


def _best_places(fit_W: NDArray[np.float32], kind_W: NDArray[np.int64], threshold: float) -> list[Thing]:
    things: list[Thing] = []
    for place in np.argsort(-fit_W, kind="stable"):
        if fit_W[place] < threshold:
            break
        x, y = PLACES[place]
        if all(abs(x - t.box.left) >= SIZE or abs(y - t.box.top) >= SIZE for t in things):
            shape, color, texture = kinds()[kind_W[place]]
            things.append(Thing(shape, color, texture, box_at(x, y), float(fit_W[place])))
    return things


def clutter(image: Pixels, things: Sequence[Thing]) -> float:
    """The share of painted pixels that belong to no detected object; 0 where nothing is painted."""
    painted = image.max(-1) > 0
    inside = np.zeros_like(painted)
    for thing in things:
        left, top, right, bottom = map(int, thing.box)
        inside[top:bottom, left:right] = True
    return float((painted & ~inside).sum() / max(1, painted.sum()))


@cache
def _codebook_C() -> Pixels:
    """(C, 2, 2, 3): every cell that can be drawn; code 0 is black."""
    cells = _cells(_kind_pixels_K()).reshape(-1, CELL * CELL * 3)
    return np.unique(np.concatenate([np.zeros_like(cells[:1]), cells]), axis=0).reshape(-1, CELL, CELL, 3)


def _cells(images_N: Pixels) -> Pixels:
    """(N, cells, 2, 2, 3), row by row."""
    n, side = images_N.shape[:2]
    rows = images_N.reshape(n, side // CELL, CELL, side // CELL, CELL, 3)
    return rows.transpose(0, 1, 3, 2, 4, 5).reshape(n, -1, CELL, CELL, 3)


def codes() -> int:
    """Size of the codebook."""
    return len(_codebook_C())


def encode(images_N: Pixels) -> NDArray[np.int64]:
    """(N, 64) codes of (N, 16, 16, 3), the nearest of the codebook for each cell."""
    cells_NTP = _cells(images_N).reshape(len(images_N), CELLS * CELLS, -1).astype(np.float32)
    book_CP = _codebook_C().reshape(codes(), -1).astype(np.float32)
    distance_NTC = (book_CP**2).sum(-1) - 2 * cells_NTP @ book_CP.T
    return distance_NTC.argmin(-1)


@cache
def _kind_codes_K() -> NDArray[np.int64]:
    """(K, 3, 3): the codes of each kind of object."""
    images = np.zeros((len(kinds()), SIDE, SIDE, 3), np.uint8)
    images[:, :SIZE, :SIZE] = _kind_pixels_K()
    return encode(images).reshape(-1, CELLS, CELLS)[:, : SIZE // CELL, : SIZE // CELL]


def codes_of(things: Iterable[Thing]) -> NDArray[np.int64]:
    """(64,) codes of an image of these objects: `encode` of `draw`, without the pixels."""
    image = np.zeros((CELLS, CELLS), np.int64)
    for thing in things:
        x, y = int(thing.box.left) // CELL, int(thing.box.top) // CELL
        kind = kinds().index((thing.name, thing.color, thing.texture))
        image[y : y + SIZE // CELL, x : x + SIZE // CELL] = _kind_codes_K()[kind]
    return image.reshape(-1)


def decode(codes_NT: NDArray[np.int64]) -> Pixels:
    """(N, 16, 16, 3) of (N, 64) codes."""
    cells = _codebook_C()[codes_NT].reshape(-1, CELLS, CELLS, CELL, CELL, 3)
    return cells.transpose(0, 1, 3, 2, 4, 5).reshape(-1, SIDE, SIDE, 3)
