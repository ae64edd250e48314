"""TODO blocks.figures"""

import random
from dataclasses import dataclass

from blocks.scenes import COLORS


@dataclass(frozen=True)
class Figure:
    """A figure with whole-unit sides, its lower left corner at (x, y) of the 8 x 8 unit grid.

    width, height: of the box around it. notch: (width, height) of the corner that an "l-shape" lacks, and of each of the two
    that a "t-shape" lacks; a "trapezoid" has the top side width - notch[0]. A "strip" is a rectangle whose height is not
    shown.
    """

    shape: str
    width: int
    height: int
    notch: tuple[int, int] = (0, 0)
    color: str = "blue"
    mirrored: bool = False
    x: int = 0
    y: int = 0

    def corners(self) -> list[tuple[int, int]]:
        """The corners in units from the lower left of the box around the figure, in order."""
        w, h, (a, b) = self.width, self.height, self.notch
        corners = {
            "triangle": [(0, 0), (w, 0), (0, h)],
            "l-shape": [(0, 0), (w, 0), (w, h - b), (w - a, h - b), (w - a, h), (0, h)],
            "t-shape": [
                (a, 0),
                (w - a, 0),
                (w - a, h - b),
                (w, h - b),
                (w, h),
                (0, h),
                (0, h - b),
                (a, h - b),
            ],
            "trapezoid": [(0, 0), (w, 0), (w - a, h), (0, h)],
        }.get(self.shape, [(0, 0), (w, 0), (w, h), (0, h)])
        return [(w - x, y) for x, y in corners] if self.mirrored else corners

    def is_proper(self) -> bool:
        """Whether every side has a length and the name fits (a mistaken figure may have neither)."""
        (w, h), (a, b) = (self.width, self.height), self.notch
        square = self.shape != "square" or w == h
        return (
            square
            and w > a * (2 if self.shape == "t-shape" else 1)
            and h > b
            and (self.shape != "rectangle" or w != h)
        )

    @classmethod
    def sample(cls, rng: random.Random, shapes: tuple[str, ...]) -> "Figure":
        shape = rng.choice(shapes)
        width, height, notch = rng.randint(2, 6), rng.randint(2, 6), (0, 0)
        if shape == "square":
            height = width
        elif shape == "rectangle":
            height = rng.choice([side for side in range(2, 7) if side != width])
        elif shape == "l-shape":
            width, height = rng.randint(3, 6), rng.randint(3, 6)
            notch = rng.randint(1, width - 1), rng.randint(1, height - 1)
        elif shape == "t-shape":
            width, height = rng.randint(3, 6), rng.randint(3, 6)
            notch = rng.randint(1, (width - 1) // 2), rng.randint(1, height - 1)
        elif shape == "trapezoid":
            width = rng.randint(3, 6)
            notch = rng.randint(1, width - 1), 0
        tall = 3 if shape == "strip" else height
        color, mirrored = rng.choice(list(COLORS)), rng.random() < 0.5
        return cls(
            shape,
            width,
            height,
            notch,
            color,
            mirrored,
            rng.randint(0, 8 - width),
            rng.randint(0, 8 - tall),
        )
