"""Scenes of the blocks world: objects in the cells of a 4 x 4 floor."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, replace

COLORS = {
    "red": (214, 48, 49),
    "green": (46, 160, 67),
    "blue": (45, 95, 220),
    "yellow": (240, 195, 30),
    "purple": (150, 60, 190),
    "cyan": (40, 190, 205),
}
SHAPES = ("cube", "sphere", "cylinder")
SIZES = ("small", "medium", "large")
GRID = 4  # cells along a side
CELLS = tuple(  # row by row from the back
    column + row for row, column in itertools.product("1234", "abcd")
)
DIRECTIONS = {  # (column, row) steps; row 1 is at the back of the scene, row 4 at the front
    "left": (-1, 0),
    "right": (1, 0),
    "front": (0, 1),
    "behind": (0, -1),
    "front_left": (-1, 1),
    "front_right": (1, 1),
    "behind_left": (-1, -1),
    "behind_right": (1, -1),
}


@dataclass(frozen=True)
class Object:
    """An object with its size, colour and shape.

    Its cell is "a1" at the back on the left, "d4" at the front on the right.
    """

    cell: str
    size: str
    color: str
    shape: str

    def __str__(self) -> str:
        return f"{self.size} {self.color} {self.shape}"

    def misperceived(self) -> list[Object]:
        """This object with one attribute mistaken: a size for the next, a colour or a shape."""
        place = SIZES.index(self.size)
        sizes = [size for i, size in enumerate(SIZES) if abs(i - place) == 1]
        seen = [replace(self, size=size) for size in sizes]
        seen += [replace(self, color=color) for color in COLORS if color != self.color]
        seen += [replace(self, shape=shape) for shape in SHAPES if shape != self.shape]
        return seen


def random_objects(rng: random.Random, count: int, distinct: bool = False) -> tuple[Object, ...]:
    """`count` objects in cells of their own, row by row; `distinct` ones never look the same."""
    looks = list(itertools.product(SIZES, COLORS, SHAPES))
    looks = rng.sample(looks, count) if distinct else rng.choices(looks, k=count)
    cells = sorted(rng.sample(CELLS, count), key=CELLS.index)
    return tuple(Object(cell, *look) for cell, look in zip(cells, looks, strict=True))


def column_row(cell: str) -> tuple[int, int]:
    return "abcd".index(cell[0]), int(cell[1]) - 1


def direction(old: str, new: str) -> str | None:
    """The name of the one-cell step from a cell to another, None if there is none."""
    (c1, r1), (c2, r2) = column_row(old), column_row(new)
    return next((name for name, step in DIRECTIONS.items() if step == (c2 - c1, r2 - r1)), None)
