"""TODO blocks.structure"""

import random
from dataclasses import dataclass, replace

from PIL import Image

from blocks.drawing import draw_figure
from blocks.figures import Figure


@dataclass(frozen=True)
class Structure:
    """A question about a figure: its "sides", "perimeter", "area", or the "missing" side of a strip; choices of four or none."""

    figure: Figure
    asks: str
    choices: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        return "discrete" if self.choices else "math"

    @classmethod
    def sample(cls, rng: random.Random, split: str) -> "Structure":
        choose = split == "ood" and rng.random() < 0.5
        if split == "ood" and not choose:
            problem = cls(
                Figure.sample(rng, ("t-shape", "trapezoid")), rng.choice(["sides", "area"])
            )
        else:
            asks = rng.choices(["sides", "perimeter", "area", "missing"], [1, 3, 3, 3])[0]
            shapes = {
                "missing": ("strip",),
                "perimeter": ("square", "rectangle", "l-shape"),
            }.get(asks, ("square", "rectangle", "triangle", "l-shape"))
            problem = cls(Figure.sample(rng, shapes), asks)
        if "." in problem.value():  # whole numbers only
            return cls.sample(rng, split)
        if choose:
            value = int(problem.value())
            near = [v for v in range(max(1, value - 6), value + 7) if v != value]
            choices = [str(value), *map(str, rng.sample(near, 3))]
            rng.shuffle(choices)
            problem = replace(problem, choices=tuple(choices))
        return problem

    def question(self) -> str:
        words = {
            "sides": "how many sides does the figure have ?",
            "perimeter": "what is the perimeter of the figure ?",
            "area": "what is the area of the figure ?",
            "missing": f"the area of the rectangle is {self.area()} . how long is the missing side ?",
        }[self.asks]
        if self.choices:
            words += " choose a letter : " + " ".join(
                f"{x} {v}" for x, v in zip("ABCD", self.choices, strict=True)
            )
        return words

    def images(self) -> tuple[Image.Image, ...]:
        return (draw_figure(self.figure),)

    def area(self) -> str:
        """By the shoelace formula."""
        corners = self.figure.corners()
        pairs = zip(corners, corners[1:] + corners[:1], strict=True)
        return f"{abs(sum(x1 * y2 - x2 * y1 for (x1, y1), (x2, y2) in pairs)) / 2:g}"

    def value(self) -> str:
        figure = self.figure
        if self.asks == "sides":
            return str(len(figure.corners()))
        if (
            self.asks == "perimeter"
        ):  # of a figure with right angles only: that of the box around it
            return str(2 * (figure.width + figure.height))
        return self.area() if self.asks == "area" else str(figure.height)

    def answer(self) -> str:
        if not self.choices:
            return self.value()
        if self.value() in self.choices:
            return "ABCD"[self.choices.index(self.value())]
        # Somebody who misperceived the figure takes the choice that is nearest to what they found.
        return "ABCD"[
            min(range(4), key=lambda i: (abs(int(self.choices[i]) - float(self.value())), i))
        ]

    def describe(self) -> str:
        figure = self.figure
        if figure.shape == "strip":
            return f"strip width {figure.width}"
        notch = f" notch {figure.notch[0]} by {figure.notch[1]}" if figure.notch != (0, 0) else ""
        return f"{figure.shape} width {figure.width} height {figure.height}{notch}"

    def think(self, style: str) -> str:
        """careful: what is seen, then each step of the arithmetic. quick: what is seen, then the value."""
        w, h, (a, b) = self.figure.width, self.figure.height, self.figure.notch
        box = f"{w} times {h} is {w * h}"
        if style == "quick":
            steps = ""
        elif self.asks == "sides":
            steps = " sides"
        elif self.asks == "perimeter":
            steps = f" {w} plus {h} is {w + h} twice {w + h}"
        elif self.asks == "missing":
            steps = f" {w * h} divided by {w}"
        elif self.figure.shape == "triangle":
            steps = f" {box} half of {w * h}"
        elif self.figure.shape == "l-shape":
            steps = f" {box} {a} times {b} is {a * b} {w * h} minus {a * b}"
        elif self.figure.shape == "t-shape":
            steps = f" {box} {2 * a} times {b} is {2 * a * b} {w * h} minus {2 * a * b}"
        elif self.figure.shape == "trapezoid":
            steps = f" {w} plus {w - a} is {2 * w - a} {2 * w - a} times {h} is {(2 * w - a) * h} half of {(2 * w - a) * h}"
        else:
            steps = f" {w} times {h}"
        letter = f" choose {self.answer()}" if self.choices else ""
        return f"{self.describe()}{steps} is {self.value()}{letter}"

    def misperceived(self) -> "list[Structure]":
        """One length read wrong by a unit, or the figure taken for a similar one."""
        figure, mistaken = self.figure, []
        similar = {
            "rectangle": ("triangle",), "square": ("triangle",), "triangle": ("rectangle",),
            "l-shape": ("rectangle", "t-shape"), "t-shape": ("l-shape",), "trapezoid": ("rectangle", "triangle"),
        }  # fmt: skip
        if figure.shape == "strip":
            area = figure.width * figure.height  # as the question says; only the width is seen
            for width in (figure.width - 1, figure.width + 1):
                if width > 0 and area % width == 0:
                    mistaken.append(replace(figure, width=width, height=area // width))
            # Or the division slips: the width is right, the quotient is not.
            mistaken += [replace(figure, height=figure.height + step) for step in (-1, 1)]
        else:
            for step in (-1, 1):
                wider = replace(figure, width=figure.width + step)
                taller = replace(figure, height=figure.height + step)
                square = replace(wider, height=taller.height)
                mistaken += [square] if figure.shape == "square" else [wider, taller]
            for shape in similar[figure.shape]:
                mistaken.append(
                    replace(
                        figure, shape=shape, notch=figure.notch if "-shape" in shape else (0, 0)
                    )
                )
            mistaken = [other for other in mistaken if other.is_proper()]
        problems = [replace(self, figure=other) for other in mistaken]
        return [problem for problem in problems if "." not in problem.value()]
