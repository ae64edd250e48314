"""TODO blocks.transformation"""

import itertools
import random
from dataclasses import dataclass, replace

from PIL import Image

from blocks.drawing import column_row, draw_scene
from blocks.scenes import (
    CELLS,
    COLORS,
    DIRECTIONS,
    FUNCTIONS,
    SHAPES,
    SIZES,
    Object,
    random_objects,
)


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
