"""Pictures of the blocks world: scenes of objects, and figures on a unit grid. 64 x 64 RGB, scaled down from larger drawings."""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from blocks.figures import Figure
from blocks.scenes import COLORS, Object

GRID, CELL = (
    4,
    16,
)  # a picture is 4 x 4 cells of 16 pixels: one cell is one image token of tiny/ (patch 8, merge 2)
UNIT = 8  # pixels of one unit of length in a structure figure


@cache
def sprite(shape: str, color: str, size: str) -> np.ndarray:
    """(16, 16, 4) uint8: one object in its cell, with transparency, drawn large and scaled down."""
    zoom = 8
    picture = Image.new("RGBA", (CELL * zoom, CELL * zoom))
    draw = ImageDraw.Draw(picture)
    rgb = COLORS[color]
    light, dark = (tuple(int(c + (end - c) * 0.45) for c in rgb) for end in (255, 0))
    side = {"small": 7, "medium": 10, "large": 14}[size] * zoom
    left, top = (CELL * zoom - side) // 2, (CELL * zoom - side) // 2
    right, bottom = left + side, top + side
    if shape == "cube":
        depth = side * 3 // 10
        draw.rectangle([left, top + depth, right - depth, bottom], fill=rgb)
        draw.polygon(
            [(left, top + depth), (left + depth, top), (right, top), (right - depth, top + depth)],
            fill=light,
        )
        draw.polygon(
            [
                (right - depth, top + depth),
                (right, top),
                (right, bottom - depth),
                (right - depth, bottom),
            ],
            fill=dark,
        )
    elif shape == "sphere":
        draw.ellipse([left, top, right, bottom], fill=rgb)
        glint = side // 4
        draw.ellipse(
            [left + glint // 2 * 2, top + glint // 2 * 2, left + glint * 2, top + glint * 2],
            fill=light,
        )
    else:
        inset, cap = side // 6, side * 3 // 10
        draw.ellipse([left + inset, bottom - cap, right - inset, bottom], fill=dark)
        draw.rectangle([left + inset, top + cap // 2, right - inset, bottom - cap // 2], fill=rgb)
        draw.ellipse([left + inset, top, right - inset, top + cap], fill=light)
    return np.asarray(picture.resize((CELL, CELL), Image.Resampling.LANCZOS))


def lit(picture: np.ndarray) -> np.ndarray:
    """The floor or the paper (64, 64, 3) in its light: less red to the right, less blue to the front.

    So each place looks a little different. Qwen2-VL has relative positions only, and naming a cell takes an absolute one,
    which a small model is slow to work out from the picture's edges.
    """
    fall = 1 - 0.28 * np.linspace(0, 1, len(picture))
    light = np.stack(
        [
            np.tile(fall, (len(fall), 1)),
            np.ones((len(fall), len(fall))),
            np.tile(fall[:, None], (1, len(fall))),
        ],
        axis=-1,
    )
    return (picture * light).round().astype(np.uint8)


def draw_scene(objects: tuple[Object, ...], view: str = "center") -> Image.Image:
    """A picture of the scene, 64 x 64 RGB, seen from the "center" (front), the "left" or the "right"."""
    picture = np.full((GRID * CELL, GRID * CELL, 3), 232, np.uint8)
    picture[::CELL] = picture[:, ::CELL] = 214  # the floor's tiles
    picture = lit(picture)
    for thing in objects:
        column, row = seen_at(thing.cell, view)
        pixels = sprite(thing.shape, thing.color, thing.size)
        alpha = pixels[..., 3:] / 255.0
        place = picture[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
        place[:] = (pixels[..., :3] * alpha + place * (1 - alpha)).round().astype(np.uint8)
    return Image.fromarray(picture)


def draw_figure(figure: Figure) -> Image.Image:
    """A picture of the figure on its unit grid, 64 x 64 RGB. A side that is not given fades out in dashes."""
    zoom = 4
    side = 8 * UNIT * zoom
    picture = Image.new("RGB", (side, side), (248, 248, 248))
    draw = ImageDraw.Draw(picture)
    for line in range(0, side, UNIT * zoom):
        draw.line([(line, 0), (line, side)], fill=(205, 205, 205), width=2)
        draw.line([(0, line), (side, line)], fill=(205, 205, 205), width=2)
    corners = [
        ((figure.x + x) * UNIT * zoom, side - (figure.y + y) * UNIT * zoom)
        for x, y in figure.corners()
    ]
    rgb = COLORS[figure.color]
    fill, edge = (
        tuple(int(c + (end - c) * share) for c in rgb) for end, share in ((255, 0.55), (0, 0.35))
    )
    if figure.shape == "strip":
        draw.line(corners[:2], fill=edge, width=10)
        for (x, y), height in itertools.product(corners[:2], range(0, 3 * UNIT * zoom, 20)):
            draw.line([(x, y - height), (x, y - height - 11)], fill=edge, width=10)
    else:
        draw.polygon(corners, fill=fill)
        draw.line(corners + corners[:2], fill=edge, width=10, joint="curve")
    picture = picture.resize((8 * UNIT, 8 * UNIT), Image.Resampling.LANCZOS)
    return Image.fromarray(lit(np.asarray(picture)))


def column_row(cell: str) -> tuple[int, int]:
    return "abcd".index(cell[0]), int(cell[1]) - 1


def seen_at(cell: str, view: str) -> tuple[int, int]:
    """Column and row of the picture in which a cell of the scene is seen from "center" (the front), "left" or "right"."""
    column, row = column_row(cell)
    if (
        view == "left"
    ):  # who stands on the left has the scene's left side before them, and its front on their right
        return row, GRID - 1 - column
    return (GRID - 1 - row, column) if view == "right" else (column, row)
