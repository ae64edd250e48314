"""The structure task: sides, perimeter, area or a missing side of a figure on a unit grid.

-train, -id: a square, rectangle, triangle, l-shape or strip with sides of 2 to 6 units. -ood has
five parts: a side of 7 units ("larger"), a triangle or l-shape upside down ("turned"), a t-shape or
trapezoid ("unseen"), multiple choice ("letters"), and a picture shifted by 2 pixels ("aside").
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

from PIL import Image

from blocks.drawing import draw_figure, shifted
from blocks.figures import Figure

ASKED = {  # how often, and about which figures
    "sides": (1, ("square", "rectangle", "triangle", "l-shape")),
    "perimeter": (3, ("square", "rectangle", "l-shape")),
    "area": (3, ("square", "rectangle", "triangle", "l-shape")),
    "missing": (3, ("strip",)),
}
SIMILAR = {  # what a figure may be taken for
    "rectangle": ("triangle",),
    "square": ("triangle",),
    "triangle": ("rectangle",),
    "l-shape": ("rectangle", "t-shape"),
    "t-shape": ("l-shape",),
    "trapezoid": ("rectangle", "triangle"),
}
SHOWN = ("larger", "turned", "unseen", "letters")  # parts of -ood that tiny/ has seen pictures of
PARTS = (*SHOWN, "aside")  # equally often
UNSEEN = ("t-shape", "trapezoid")
LONGEST = 6  # units, of the sides in -train


def choices(rng: random.Random, value: int) -> tuple[str, ...]:
    """The value and three others near it, in any order."""
    near = [v for v in range(max(1, value - 6), value + 7) if v != value]
    offered = [str(value), *map(str, rng.sample(near, 3))]
    rng.shuffle(offered)
    return tuple(offered)


@dataclass(frozen=True)
class Structure:
    """A question about a figure; `asks` is one of ASKED, `choices` are four or none. aside: pixels
    that the picture is shifted to the right; not in the `repr` that parts train from test, so that
    no question about a shifted picture is in train without the shift.
    """

    figure: Figure
    asks: str
    choices: tuple[str, ...] = ()
    aside: int = field(default=0, repr=False)

    @property
    def kind(self) -> str:
        return "discrete" if self.choices else "math"

    @property
    def part(self) -> str:
        """Which kind of question of -ood it is, "" for one of -id."""
        if self.aside:
            return "aside"
        if self.choices:
            return "letters"
        if self.figure.shape in UNSEEN:
            return "unseen"
        if self.figure.turned:
            return "turned"
        return "larger" if max(self.figure.width, self.figure.height) > LONGEST else ""

    @property
    def kin(self) -> str:
        """Equal for questions that differ in the figure's colour, place or mirroring alone."""
        figure = replace(self.figure, color="", mirrored=False, x=0, y=0)
        return repr(replace(self, figure=figure))

    @classmethod
    def sample(cls, rng: random.Random, split: str) -> Structure:
        """split: also "shown", the parts SHOWN of "ood"."""
        parts = {"ood": PARTS, "shown": SHOWN}.get(split)
        part = rng.choice(parts) if parts else ""
        plain = "" if part in ("letters", "aside") else part
        while True:
            problem = cls._any(rng, part)
            if "." not in problem.value() and problem.part == plain:
                break  # whole numbers only
        if part == "letters":
            problem = replace(problem, choices=choices(rng, int(problem.value())))
        return replace(problem, aside=rng.choice((-2, 2))) if part == "aside" else problem

    @classmethod
    def _any(cls, rng: random.Random, part: str) -> Structure:
        """A problem that may be of this part."""
        if part == "unseen":
            figure = Figure.sample(rng, UNSEEN)
            return cls(figure, rng.choices(["sides", "area"], [1, 3])[0])
        asks = rng.choices(list(ASKED), [often for often, _ in ASKED.values()])[0]
        figure = Figure.sample(rng, ASKED[asks][1], LONGEST + (part == "larger"))
        turned = part == "turned" and figure.shape in ("triangle", "l-shape")
        return cls(replace(figure, turned=turned), asks)

    def question(self) -> str:
        words = {
            "sides": "how many sides does the figure have ?",
            "perimeter": "what is the perimeter of the figure ?",
            "area": "what is the area of the figure ?",
            "missing": f"the area of the rectangle is {self.area()} . "
            "how long is the missing side ?",
        }[self.asks]
        if self.choices:
            letters = zip("ABCD", self.choices, strict=True)
            words += " choose a letter : " + " ".join(f"{x} {value}" for x, value in letters)
        return words

    def images(self) -> tuple[Image.Image, ...]:
        return (shifted(draw_figure(self.figure), self.aside),)

    def area(self) -> str:
        """By the shoelace formula."""
        corners = self.figure.corners()
        pairs = zip(corners, corners[1:] + corners[:1], strict=True)
        return f"{abs(sum(x1 * y2 - x2 * y1 for (x1, y1), (x2, y2) in pairs)) / 2:g}"

    def value(self) -> str:
        figure = self.figure
        if self.asks == "sides":
            return str(len(figure.corners()))
        if self.asks == "perimeter":  # with right angles only it is that of the box
            return str(2 * (figure.width + figure.height))
        return self.area() if self.asks == "area" else str(figure.height)

    def answer(self) -> str:
        """The value, or the letter of the choice that is nearest to it (a misperceived value)."""
        if not self.choices:
            return self.value()
        distances = [abs(int(choice) - float(self.value())) for choice in self.choices]
        return "ABCD"[distances.index(min(distances))]

    def describe(self) -> str:
        figure = self.figure
        if figure.shape == "strip":
            return f"strip width {figure.width}"
        notch = f" notch {figure.notch[0]} by {figure.notch[1]}" if figure.notch != (0, 0) else ""
        return f"{figure.shape} width {figure.width} height {figure.height}{notch}"

    def think(self, style: str) -> str:
        """The figure and the value; "careful" writes the arithmetic between them."""
        steps = f" {self.arithmetic()}" if style == "careful" else ""
        letter = f" choose {self.answer()}" if self.choices else ""
        return f"{self.describe()}{steps} is {self.value()}{letter}"

    def arithmetic(self) -> str:
        """How the value is found; what is left to say is "is" and the value."""
        w, h, (a, b) = self.figure.width, self.figure.height, self.figure.notch
        box = f"{w} times {h} is {w * h}"
        if self.asks == "sides":
            return "sides"
        if self.asks == "perimeter":
            return f"{w} plus {h} is {w + h} twice {w + h}"
        if self.asks == "missing":
            return f"{w * h} divided by {w}"
        if self.figure.shape == "triangle":
            return f"{box} half of {w * h}"
        if self.figure.shape == "l-shape":
            return f"{box} {a} times {b} is {a * b} {w * h} minus {a * b}"
        if self.figure.shape == "t-shape":
            return f"{box} {2 * a} times {b} is {2 * a * b} {w * h} minus {2 * a * b}"
        if self.figure.shape == "trapezoid":
            both = 2 * w - a
            return f"{w} plus {w - a} is {both} {both} times {h} is {both * h} half of {both * h}"
        return f"{w} times {h}"

    def misperceived(self) -> list[Structure]:
        """One length read wrong by a unit, or the figure taken for a similar one."""
        mistaken = self._other_strips() if self.figure.shape == "strip" else self._other_figures()
        problems = [replace(self, figure=figure) for figure in mistaken]
        return [problem for problem in problems if "." not in problem.value()]

    def _other_strips(self) -> list[Figure]:
        """A width read wrong, or a quotient computed wrong. The question gives the area."""
        figure, mistaken = self.figure, []
        area = figure.width * figure.height
        for width in (figure.width - 1, figure.width + 1):
            if width > 0 and area % width == 0:
                mistaken.append(replace(figure, width=width, height=area // width))
        return mistaken + [replace(figure, height=figure.height + step) for step in (-1, 1)]

    def _other_figures(self) -> list[Figure]:
        figure, mistaken = self.figure, []
        for step in (-1, 1):
            wider = replace(figure, width=figure.width + step)
            taller = replace(figure, height=figure.height + step)
            square = replace(wider, height=taller.height)
            mistaken += [square] if figure.shape == "square" else [wider, taller]
        for shape in SIMILAR[figure.shape]:
            notch = figure.notch if "-shape" in shape else (0, 0)
            mistaken.append(replace(figure, shape=shape, notch=notch))
        return [other for other in mistaken if other.is_proper()]
