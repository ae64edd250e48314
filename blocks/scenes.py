"""TODO blocks.scenes"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, replace

COLORS = {
    "red": (214, 48, 49), "green": (46, 160, 67), "blue": (45, 95, 220),
    "yellow": (240, 195, 30), "purple": (150, 60, 190), "cyan": (40, 190, 205),
}  # fmt: skip

SHAPES = ("cube", "sphere", "cylinder")
SIZES = ("small", "medium", "large")
DIRECTIONS = {  # (column, row) steps; row 1 is at the back of the scene, row 4 at the front
    "left": (-1, 0), "right": (1, 0), "front": (0, 1), "behind": (0, -1),
    "front_left": (-1, 1), "front_right": (1, 1), "behind_left": (-1, -1), "behind_right": (1, -1),
}  # fmt: skip
FUNCTIONS = {
    "cell": "change_position",
    "size": "change_size",
    "color": "change_color",
    "shape": "change_shape",
}
CELLS = tuple(f"{column}{row}" for row in "1234" for column in "abcd")  # row by row from the back


@dataclass(frozen=True)
class Object:
    """One object: its cell ("a1" at the back on the left, "d4" at the front on the right), size, colour and shape."""

    cell: str
    size: str
    color: str
    shape: str

    def __str__(self) -> str:
        return f"{self.size} {self.color} {self.shape}"

    def misperceived(self) -> "list[Object]":
        """This object with one attribute mistaken for a neighbouring one."""
        sizes = [
            SIZES[i]
            for i in (SIZES.index(self.size) - 1, SIZES.index(self.size) + 1)
            if 0 <= i < len(SIZES)
        ]
        return (
            [replace(self, size=size) for size in sizes]
            + [replace(self, color=color) for color in COLORS if color != self.color]
            + [replace(self, shape=shape) for shape in SHAPES if shape != self.shape]
        )


def random_objects(rng: random.Random, count: int, distinct: bool = False) -> tuple[Object, ...]:
    """`count` objects in cells of their own, row by row; `distinct` ones never look the same."""
    looks = list(itertools.product(SIZES, COLORS, SHAPES))
    looks = rng.sample(looks, count) if distinct else rng.choices(looks, k=count)
    cells = sorted(rng.sample(CELLS, count), key=CELLS.index)
    return tuple(Object(cell, *look) for cell, look in zip(cells, looks, strict=True))
