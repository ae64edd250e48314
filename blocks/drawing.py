"""Pictures of scenes and figures: 64 x 64 RGB, drawn larger and scaled down."""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from blocks.figures import Figure
from blocks.scenes import COLORS, GRID, Object, column_row

CELL = 16  # pixels of a cell's side: one cell is one image token of tiny/ (patch 8, merge 2)
UNIT = 8  # pixels of one unit of length in a figure
SHIFTS = {"center": 0, "left": 2, "right": -2}  # pixels that a scene moves to the right, by view


def mixed(rgb: tuple[int, int, int], end: int, share: float) -> tuple[int, ...]:
    """A colour moved towards white (end 255) or black (end 0)."""
    return tuple(int(c + (end - c) * share) for c in rgb)


@cache
def sprite(shape: str, color: str, size: str) -> np.ndarray:
    """(16, 16, 4) uint8: one object in its cell, with transparency."""
    zoom = 8
    picture = Image.new("RGBA", (CELL * zoom, CELL * zoom))
    draw = ImageDraw.Draw(picture)
    rgb = COLORS[color]
    light, dark = mixed(rgb, 255, 0.45), mixed(rgb, 0, 0.45)
    side = {"small": 7, "medium": 10, "large": 14}[size] * zoom
    left = top = (CELL * zoom - side) // 2
    right, bottom = left + side, top + side
    if shape == "cube":
        depth = side * 3 // 10
        near, low = right - depth, top + depth  # the front's right and upper edges
        draw.rectangle([left, low, near, bottom], fill=rgb)
        draw.polygon([(left, low), (left + depth, top), (right, top), (near, low)], fill=light)
        draw.polygon(
            [(near, low), (right, top), (right, bottom - depth), (near, bottom)], fill=dark
        )
    elif shape == "sphere":
        draw.ellipse([left, top, right, bottom], fill=rgb)
        glint = side // 4
        near, far = glint // 2 * 2, glint * 2
        draw.ellipse([left + near, top + near, left + far, top + far], fill=light)
    else:
        inset, cap = side // 6, side * 3 // 10
        draw.ellipse([left + inset, bottom - cap, right - inset, bottom], fill=dark)
        draw.rectangle([left + inset, top + cap // 2, right - inset, bottom - cap // 2], fill=rgb)
        draw.ellipse([left + inset, top, right - inset, top + cap], fill=light)
    return np.asarray(picture.resize((CELL, CELL), Image.Resampling.LANCZOS))


def lit(picture: np.ndarray) -> np.ndarray:
    """The floor or paper (64, 64, 3) in its light: less red to the right, less blue to the front.

    So each place looks a little different. Qwen2-VL has relative positions only; naming a cell
    takes an absolute one, which a small model is slow to work out from the picture's edges.
    """
    fall = 1 - 0.28 * np.linspace(0, 1, len(picture))
    light = np.ones(picture.shape)
    light[:, :, 0] = fall[None]
    light[:, :, 2] = fall[:, None]
    return (picture * light).round().astype(np.uint8)


def draw_scene(objects: tuple[Object, ...], view: str = "center") -> Image.Image:
    """A picture of the scene, seen from the "center", or a little from the "left" or "right"."""
    picture = np.full((GRID * CELL, GRID * CELL, 3), 232, np.uint8)
    picture[::CELL] = picture[:, ::CELL] = 214  # the floor's tiles
    picture = lit(picture)
    for thing in objects:
        column, row = column_row(thing.cell)
        pixels = sprite(thing.shape, thing.color, thing.size)
        alpha = pixels[..., 3:] / 255.0
        place = picture[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
        place[:] = (pixels[..., :3] * alpha + place * (1 - alpha)).round().astype(np.uint8)
    return shifted(Image.fromarray(picture), SHIFTS[view])


def shifted(picture: Image.Image, aside: int) -> Image.Image:
    """The picture, moved to the right by so many pixels; its edge is continued."""
    pixels, room = np.asarray(picture), abs(aside)
    wider = np.pad(pixels, ((0, 0), (room, room), (0, 0)), mode="edge")
    return Image.fromarray(wider[:, room - aside : room - aside + pixels.shape[1]])


def draw_figure(figure: Figure) -> Image.Image:
    """A picture of the figure on its unit grid. A side that is not given fades out in dashes."""
    unit = UNIT * 4  # drawn at four times the size
    side = 8 * unit
    picture = Image.new("RGB", (side, side), (248, 248, 248))
    draw = ImageDraw.Draw(picture)
    for line in range(0, side, unit):
        draw.line([(line, 0), (line, side)], fill=(205, 205, 205), width=2)
        draw.line([(0, line), (side, line)], fill=(205, 205, 205), width=2)
    corners = [(x * unit, side - y * unit) for x, y in figure.on_grid()]
    rgb = COLORS[figure.color]
    fill, edge = mixed(rgb, 255, 0.55), mixed(rgb, 0, 0.35)
    if figure.shape == "strip":
        draw.line(corners[:2], fill=edge, width=10)
        for (x, y), height in itertools.product(corners[:2], range(0, 3 * unit, 20)):
            draw.line([(x, y - height), (x, y - height - 11)], fill=edge, width=10)
    else:
        draw.polygon(corners, fill=fill)
        draw.line(corners + corners[:2], fill=edge, width=10, joint="curve")
    picture = picture.resize((8 * UNIT, 8 * UNIT), Image.Resampling.LANCZOS)
    return Image.fromarray(lit(np.asarray(picture)))
