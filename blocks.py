"""The blocks world: small rendered scenes with questions, answers and thoughts; the embedded data set.

Three tasks with the names and splits of the paper's benchmark (Section 4.1), small enough for a laptop:

    counting        arithmetic over the shapes, colours and sizes of 3 to 6 objects.     -id  -ood: 7 to 9 objects, two steps
    structure       sides, perimeter, area, a missing side of a figure on a unit grid.   -id  -ood: multiple choice, unseen figures
    transformation  which functions turn the first picture into the second, 1 to 4.      -id  -left, -right: second seen from there

A set is a name such as "counting-train" or "structure-ood"; its i-th question follows from the name, i and the seed alone,
so that sets need no files and resuming needs no position but i. Train and test are kept apart by a hash of the question
and its scene: one share of all possible questions is the test's, in every set and with every seed.

A thought is right reasoning over a perceived scene. A mistake is the same reasoning over a scene in which one thing was
misperceived, which is how the scripted experts of experts.py go wrong: plausibly, and with a density one can write down.

    python blocks.py --show sheet.png          # draws a sheet of examples
"""

import argparse
import hashlib
import itertools
import random
import sys
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from data import State
from drawing import COLORS, column_row, draw_figure, draw_scene
from rewards import judge_answer
from runs import UserError, writing

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
SETS = {
    "counting": ("counting-id", "counting-ood"),
    "structure": ("structure-id", "structure-ood"),
    "transformation": ("transformation-id", "transformation-left", "transformation-right"),
}
STYLES = ("careful", "quick")  # the scripted experts' ways of thinking
TEST_SHARE = 0.2  # of all possible questions


# ---------------------------------------------------------------------------------------------- scenes


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


# ---------------------------------------------------------------------------------------------- counting


Filter = tuple[
    str, ...
]  # words that an object has to have, such as ("large", "cube"); () is any object


def noun(words: Filter) -> str:
    """Filters are said in the words of the objects' descriptions: matching "cube" with "cubes" is no part of the lesson."""
    return " ".join(words if words and words[-1] in SHAPES else (*words, "object"))


@dataclass(frozen=True)
class Counting:
    """How many objects match `count` once those that match one of `remove` are gone and `add` more have come."""

    objects: tuple[Object, ...]
    remove: tuple[Filter, ...]
    count: Filter
    add: int
    kind = "discrete"

    @classmethod
    def sample(cls, rng: random.Random, split: str) -> "Counting":
        objects = random_objects(rng, rng.randint(7, 9) if split == "ood" else rng.randint(3, 6))

        def some_filter(attributes: int) -> Filter:
            # Mostly words of an object that is there: else most answers would be 0.
            like = rng.choice(objects) if rng.random() < 0.9 else random_objects(rng, 1)[0]
            words = (like.size, like.color, like.shape)
            return tuple(words[i] for i in sorted(rng.sample(range(3), attributes)))

        if split == "ood":
            return cls(objects, *rng.choice([
                ((some_filter(1), some_filter(1)), (), 0),
                ((some_filter(1),), some_filter(1), 0),
                ((some_filter(2),), some_filter(1), 0),
            ]))  # fmt: skip
        return cls(objects, *rng.choice([
            ((), some_filter(1), 0),
            ((), some_filter(2), 0),
            ((some_filter(1),), (), 0),
            ((some_filter(2),), (), 0),
            ((), some_filter(1), rng.randint(1, 3)),
        ]))  # fmt: skip

    def question(self) -> str:
        words = [f"remove every {noun(words)} ." for words in self.remove]
        words.append(f"count every {noun(self.count)} ." if self.count else "how many are left ?")
        return " ".join([*words, *([f"add {self.add} ."] if self.add else [])])

    def images(self) -> tuple[Image.Image, ...]:
        return (draw_scene(self.objects),)

    def verdict(self, thing: Object) -> str:
        """What becomes of an object: "gone" (removed), else "yes" or "no" (counted or not), or "left" where all the rest count."""
        has = {thing.size, thing.color, thing.shape}
        if any(set(words) <= has for words in self.remove):
            return "gone"
        if not self.count:
            return "left"
        return "yes" if set(self.count) <= has else "no"

    def counts(self, thing: Object) -> bool:
        return self.verdict(thing) in ("yes", "left")

    def answer(self) -> str:
        return str(sum(map(self.counts, self.objects)) + self.add)

    def describe(self) -> str:
        return " , ".join(f"{thing.cell} {thing}" for thing in self.objects)

    def think(self, style: str) -> str:
        """Each object, in what the question asks about, and what becomes of it; careful keeps count on the way, quick does not."""
        asked = {word for words in (self.count, *self.remove) for word in words}
        kinds = [kind for kind in (SIZES, tuple(COLORS), SHAPES) if asked & set(kind)]
        steps, count = [], 0
        for thing in self.objects:
            count += self.counts(thing)
            looks = [
                word
                for word in (thing.size, thing.color, thing.shape)
                if any(word in kind for kind in kinds)
            ]
            steps += [thing.cell, *looks, self.verdict(thing)]
            if self.counts(thing) and style == "careful":
                steps.append(str(count))
        total = (
            f"{count} plus {self.add} is {self.answer()}" if self.add else f"total {self.answer()}"
        )
        return " ".join([*steps, total])

    def misperceived(self) -> "list[Counting]":
        """One object overlooked, or one of its attributes mistaken."""
        scenes = []
        for i, thing in enumerate(self.objects):
            others = self.objects[:i], self.objects[i + 1 :]
            scenes += [others[0] + others[1]]
            scenes += [others[0] + (mistaken,) + others[1] for mistaken in thing.misperceived()]
        return [replace(self, objects=objects) for objects in scenes]


# ---------------------------------------------------------------------------------------------- structure


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


# ---------------------------------------------------------------------------------------------- transformation


@dataclass(frozen=True)
class Transformation:
    """Which functions turn the objects `before` (in their order 0, 1, ...) into the objects `after`, seen from `view`."""

    before: tuple[Object, ...]
    after: tuple[Object, ...]
    view: str
    kind = "function"

    @classmethod
    def sample(cls, rng: random.Random, split: str) -> "Transformation":
        before = random_objects(rng, rng.randint(3, 4), distinct=True)
        after = list(before)
        pairs = list(itertools.product(range(len(before)), ("size", "color", "shape", "position")))
        for i, attribute in rng.sample(pairs, rng.randint(1, 4)):
            thing = after[i]
            if attribute == "position":
                taken = {other.cell for other in before} | {other.cell for other in after}
                free = [cell for cell in CELLS if cell not in taken and direction(thing.cell, cell)]
                if free:
                    after[i] = replace(thing, cell=rng.choice(free))
            else:
                values = {"size": SIZES, "color": tuple(COLORS), "shape": SHAPES}[attribute]
                after[i] = replace(
                    thing,
                    **{
                        attribute: rng.choice([v for v in values if v != getattr(thing, attribute)])
                    },
                )
        problem = cls(before, tuple(after), split if split in ("left", "right") else "center")
        return problem if problem.unambiguous() else cls.sample(rng, split)

    def unambiguous(self) -> bool:
        """Whether no other account of which object became which needs as few functions."""
        fewest = sum(len(changes(*pair)) for pair in zip(self.before, self.after, strict=True))
        for after in itertools.permutations(self.after):
            if after != self.after:
                steps = [changes(*pair) for pair in zip(self.before, after, strict=True)]
                if None not in steps and sum(map(len, steps)) <= fewest:
                    return False
        return fewest > 0

    def question(self) -> str:
        objects = " ".join(f"{i} {thing}" for i, thing in enumerate(self.before))
        seen = (
            "" if self.view == "center" else f" the second picture is seen from the {self.view} ."
        )
        return f"objects : {objects} .{seen} what changed ?"

    def images(self) -> tuple[Image.Image, ...]:
        return draw_scene(self.before), draw_scene(self.after, self.view)

    def answer(self) -> str:
        pairs = zip(self.before, self.after, strict=True)
        return " ".join(
            f"{f} ( {i} , {value} )" for i, pair in enumerate(pairs) for f, value in changes(*pair)
        )

    def describe(self) -> str:
        first = " , ".join(f"{thing.cell} {thing}" for thing in self.before)
        second = " , ".join(
            f"{thing.cell} {thing}"
            for thing in sorted(self.after, key=lambda x: CELLS.index(x.cell))
        )
        return f"first {first} second {second}"

    def think(self, style: str) -> str:
        """Each object, look by look, and each change as it is seen: careful says how things were and are, quick only how they are."""
        steps = []
        for i, (old, new) in enumerate(zip(self.before, self.after, strict=True)):
            found = dict(changes(old, new))
            steps.append(str(i))
            for attribute, function in FUNCTIONS.items():
                before, after = getattr(old, attribute), getattr(new, attribute)
                steps += [before, after] if style == "careful" else [after]
                steps += [f"{function} ( {i} , {found[function]} )"] if function in found else []
        return " ".join(steps)

    def misperceived(self) -> "list[Transformation]":
        """One object of the second picture mistaken: an attribute, its cell, or its change overlooked."""
        problems = []
        for i, thing in enumerate(self.after):
            columns_rows = {(c, r): cell for cell in CELLS for c, r in [column_row(cell)]}
            c, r = column_row(thing.cell)
            cells = [
                columns_rows[at]
                for at in ((c - 1, r), (c + 1, r), (c, r - 1), (c, r + 1))
                if at in columns_rows
            ]
            moved = [replace(thing, cell=cell) for cell in cells]
            for mistaken in [self.before[i], *thing.misperceived(), *moved]:
                after = self.after[:i] + (mistaken,) + self.after[i + 1 :]
                legal = all(
                    changes(*pair) is not None for pair in zip(self.before, after, strict=True)
                )
                if (
                    legal
                    and after != self.before
                    and len({other.cell for other in after}) == len(after)
                ):
                    problems.append(replace(self, after=after))
        return problems


def direction(old: str, new: str) -> str | None:
    """The name of the one-cell step from a cell to another, None where there is none."""
    (c1, r1), (c2, r2) = column_row(old), column_row(new)
    return next((name for name, step in DIRECTIONS.items() if step == (c2 - c1, r2 - r1)), None)


def changes(old: Object, new: Object) -> list[tuple[str, str]] | None:
    """The functions that turn one object into another, as (function, value); None where it would have to leap."""
    step = direction(old.cell, new.cell) if old.cell != new.cell else None
    if old.cell != new.cell and step is None:
        return None
    values = {
        attribute: step if attribute == "cell" else getattr(new, attribute)
        for attribute in FUNCTIONS
    }
    return [
        (function, values[a])
        for a, function in FUNCTIONS.items()
        if getattr(old, a) != getattr(new, a)
    ]


# ---------------------------------------------------------------------------------------------- states


TASKS = {"counting": Counting, "structure": Structure, "transformation": Transformation}


@dataclass(frozen=True)
class BlocksState(State):
    """A question of the blocks world; `problem` is what only the world and its scripted experts know."""

    set_name: str = ""
    problem: Counting | Structure | Transformation = None

    @property
    def request(self) -> str:
        """Shorter than for real data: tiny/ knows these words only."""
        return "think , then answer ." if self.mode == "reason" else "answer ."


class BlocksSet:
    """The set of that name, `size` states long: `BlocksSet("counting-train", 1000)[17]`.

    name: "TASK-SPLIT" with a task of `SETS` and the split "train", "id" or one of its OOD splits.
    seed: another seed gives other questions of the same kind; test sets keep seed 0 so that runs can be compared.
    mode: of the prompts, see data.py.
    """

    def __init__(self, name: str, size: int, seed: int = 0, mode: str = "reason"):
        task = name.split("-")[0]
        if task not in SETS or name not in (f"{task}-train", *SETS[task]):
            known = ", ".join(f"{task}-train, {', '.join(sets)}" for task, sets in SETS.items())
            raise ValueError(f"no set '{name}' in the blocks world; there are {known}")
        self.name, self.size, self.seed, self.mode = name, size, seed, mode
        self.task, self.split = TASKS[task], name.split("-")[1]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> BlocksState:
        if not 0 <= index < self.size:
            raise IndexError(f"{self.name} has {self.size} states, there is no state {index}")
        rng = random.Random(f"{self.name} {self.seed} {index}")
        while True:
            problem = self.task.sample(rng, self.split)
            # A question that nobody could plausibly get wrong is not asked.
            if in_test(problem) == (self.split != "train") and mistakes(problem):
                break
        return BlocksState(
            id=f"{self.name}-{self.seed}-{index}",
            images=problem.images(),
            question=problem.question(),
            answer=problem.answer(),
            kind=problem.kind,
            thought=problem.think("careful"),
            mode=self.mode,
            set_name=self.name,
            problem=problem,
        )


@lru_cache(maxsize=1024)  # each expert asks for them
def mistakes(problem: Counting | Structure | Transformation) -> tuple:
    """The problem as somebody sees it who gets it wrong, in every plausible way, each once."""
    right = problem.answer()
    # By the reward's own judgement, which forgives 5 % of a length or an area.
    wrong = [
        seen
        for seen in problem.misperceived()
        if judge_answer(seen.answer(), right, problem.kind) < 1
    ]
    return tuple(dict.fromkeys(wrong))


def in_test(problem: Counting | Structure | Transformation) -> bool:
    """Whether this question about this scene belongs to the test sets, by a hash of both."""
    digest = hashlib.sha256(repr(problem).encode()).digest()
    return digest[0] < 256 * TEST_SHARE


def vocabulary() -> list[str]:
    """Every word of the world, in a fixed order: the vocabulary of tiny/."""
    words = "<think> </think> <answer> </answer> user assistant think , then answer describe check list . ? : ( )".split()
    words += "how many are there left remove all add object objects total plus minus times divided by is yes no".split()
    words += "what the of figure does have sides perimeter area rectangle missing side long choose a letter".split()
    words += "width height notch half twice square triangle l-shape t-shape trapezoid strip at glance".split()
    words += "changed second first picture seen from now A B C D".split()
    words += [*SHAPES, "every", "count", "gone", *SIZES, *COLORS, *CELLS, *DIRECTIONS]
    words += FUNCTIONS.values()
    words += [str(number) for number in range(85)]
    return list(dict.fromkeys(words))


# ---------------------------------------------------------------------------------------------- a sheet of examples


def show(path: str, per_set: int = 3, zoom: int = 3) -> None:
    """Draws `per_set` questions of every set with answer and thought, and saves the sheet as PNG.
    UserError where it cannot."""
    import matplotlib

    matplotlib.use("Agg")
    import textwrap

    import matplotlib.pyplot as plt

    names = [name for task, sets in SETS.items() for name in (f"{task}-train", *sets[1:])]
    figure, axes = plt.subplots(
        len(names), per_set, figsize=(5.2 * per_set, 3.9 * len(names)), squeeze=False
    )
    for row, name in zip(axes, names, strict=True):
        for i, axis in enumerate(row):
            state = BlocksSet(name, per_set)[i]
            pictures = [
                np.pad(np.asarray(image), ((0, 0), (0, 6), (0, 0)), constant_values=255)
                for image in state.images
            ]
            axis.imshow(np.concatenate(pictures, axis=1), interpolation="nearest")
            axis.set_axis_off()
            axis.set_title(f"{name}\n" + textwrap.fill(state.question, 62), fontsize=8, loc="left")
            text = (
                textwrap.fill(f"thought: {state.thought}", 66)
                + "\n"
                + textwrap.fill(f"answer: {state.answer}", 66)
            )
            axis.text(0, -0.04, text, transform=axis.transAxes, fontsize=7, va="top")
    figure.subplots_adjust(left=0.02, right=0.98, top=0.98, bottom=0.03, hspace=0.75, wspace=0.1)
    try:
        with writing(Path(path)):
            figure.savefig(path, dpi=25 * zoom, format="png")
    finally:
        plt.close(figure)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (--help explains every flag)")


def main() -> None:
    parser = Parser(description="The blocks world: draws a sheet of examples of every set.")
    parser.add_argument("--show", metavar="OUT.png", required=True, help="where to save the sheet")
    try:
        show(parser.parse_args().show)
    except UserError as error:
        print(f"blocks.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
