"""Figures of the structure task, with whole-unit sides on an 8 x 8 unit grid."""

from __future__ import annotations

import random
from dataclasses import dataclass

from blocks.scenes import COLORS


@dataclass(frozen=True)
class Figure:
    """A figure; (x, y) is the lower left corner of the box around it, on the grid.

    width, height: of the box. notch: (width, height) of the corner that an "l-shape" lacks, and of
    each of the two that a "t-shape" lacks; the top side of a "trapezoid" is width - notch[0]. A
    "strip" is a rectangle whose height is not shown.
    """

    shape: str
    width: int
    height: int
    notch: tuple[int, int] = (0, 0)
    color: str = "blue"
    mirrored: bool = False
    turned: bool = False  # upside down
    x: int = 0
    y: int = 0

    def corners(self) -> list[tuple[int, int]]:
        """The corners in units from the lower left of the box, in order."""
        w, h, (a, b) = self.width, self.height, self.notch
        if self.shape == "triangle":
            corners = [(0, 0), (w, 0), (0, h)]
        elif self.shape == "l-shape":
            corners = [(0, 0), (w, 0), (w, h - b), (w - a, h - b), (w - a, h), (0, h)]
        elif self.shape == "t-shape":
            corners = [(a, 0), (w - a, 0), (w - a, h - b), (w, h - b)]
            corners += [(w, h), (0, h), (0, h - b), (a, h - b)]
        elif self.shape == "trapezoid":
            corners = [(0, 0), (w, 0), (w - a, h), (0, h)]
        else:
            corners = [(0, 0), (w, 0), (w, h), (0, h)]
        if self.mirrored:
            corners = [(w - x, y) for x, y in corners]
        return [(x, h - y) for x, y in corners] if self.turned else corners

    def on_grid(self) -> list[tuple[int, int]]:
        """The corners in units of the grid."""
        return [(self.x + x, self.y + y) for x, y in self.corners()]

    def is_proper(self) -> bool:
        """Whether each side has a length and the name fits; of a mistaken figure both may fail."""
        w, h, (a, b) = self.width, self.height, self.notch
        if self.shape in ("square", "rectangle") and (self.shape == "square") != (w == h):
            return False
        return w > a * (2 if self.shape == "t-shape" else 1) and h > b

    @classmethod
    def sample(cls, rng: random.Random, shapes: tuple[str, ...], longest: int = 6) -> Figure:
        """One of these shapes, with sides of at most `longest` units."""
        shape = rng.choice(shapes)
        least = 3 if shape in ("l-shape", "t-shape", "trapezoid") else 2
        width, height, notch = rng.randint(least, longest), rng.randint(least, longest), (0, 0)
        if shape == "square":
            height = width
        elif shape == "rectangle":
            height = rng.choice([side for side in range(2, longest + 1) if side != width])
        elif shape == "l-shape":
            notch = rng.randint(1, width - 1), rng.randint(1, height - 1)
        elif shape == "t-shape":
            notch = rng.randint(1, (width - 1) // 2), rng.randint(1, height - 1)
        elif shape == "trapezoid":
            notch = rng.randint(1, width - 1), 0
        tall = 3 if shape == "strip" else height  # as it is drawn
        color, mirrored = rng.choice(list(COLORS)), rng.random() < 0.5
        x, y = rng.randint(0, 8 - width), rng.randint(0, 8 - tall)
        return cls(shape, width, height, notch, color, mirrored, x=x, y=y)
