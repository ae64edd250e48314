"""The transformation task: which 1 to 4 functions turn the first picture into the second.

The second picture is seen from where the first one was (-train, -id), or from a little further to
the left (-left) or right (-right): all of it is shifted by two pixels.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, replace

from PIL import Image

from blocks.drawing import draw_scene
from blocks.scenes import (
    CELLS,
    COLORS,
    SHAPES,
    SIZES,
    Object,
    column_row,
    direction,
    random_objects,
)

FUNCTIONS = {  # of each attribute
    "cell": "change_position",
    "size": "change_size",
    "color": "change_color",
    "shape": "change_shape",
}


@dataclass(frozen=True)
class Transformation:
    """The functions that turn the objects `before` (0, 1, ...) into `after`, seen from `view`:
    "center", "left" or "right".
    """

    before: tuple[Object, ...]
    after: tuple[Object, ...]
    view: str
    kind, part = "function", ""

    @classmethod
    def sample(cls, rng: random.Random, split: str) -> Transformation:
        before = random_objects(rng, rng.randint(3, 4), distinct=True)
        after = list(before)
        pairs = list(itertools.product(range(len(before)), ("size", "color", "shape", "cell")))
        for i, attribute in rng.sample(pairs, rng.randint(1, 4)):
            thing = after[i]
            if attribute == "cell":
                taken = {other.cell for other in (*before, *after)}
                near = [cell for cell in CELLS if direction(thing.cell, cell)]
                values = [cell for cell in near if cell not in taken]
            else:
                values = {"size": SIZES, "color": tuple(COLORS), "shape": SHAPES}[attribute]
                values = [value for value in values if value != getattr(thing, attribute)]
            if values:
                after[i] = replace(thing, **{attribute: rng.choice(values)})
        problem = cls(before, tuple(after), split if split in ("left", "right") else "center")
        return problem if problem.unambiguous() else cls.sample(rng, split)

    def unambiguous(self) -> bool:
        """Whether no other account of which object became which needs as few functions."""
        fewest = len(self.functions())
        for after in itertools.permutations(self.after):
            if after != self.after:
                steps = [changes(*pair) for pair in zip(self.before, after, strict=True)]
                if None not in steps and sum(map(len, steps)) <= fewest:
                    return False
        return fewest > 0

    def functions(self) -> list[str]:
        """The calls that turn `before` into `after`."""
        calls = []
        for i, (old, new) in enumerate(zip(self.before, self.after, strict=True)):
            calls += [f"{name} ( {i} , {value} )" for name, value in changes(old, new)]
        return calls

    def question(self) -> str:
        objects = " ".join(f"{i} {thing}" for i, thing in enumerate(self.before))
        return f"objects : {objects} . what changed ?"

    def images(self) -> tuple[Image.Image, ...]:
        return draw_scene(self.before), draw_scene(self.after, self.view)

    def answer(self) -> str:
        return " ".join(self.functions()) or "nothing"

    def describe(self) -> str:
        after = sorted(self.after, key=lambda thing: CELLS.index(thing.cell))
        first = " , ".join(f"{thing.cell} {thing}" for thing in self.before)
        second = " , ".join(f"{thing.cell} {thing}" for thing in after)
        return f"first {first} second {second}"

    def think(self, style: str) -> str:
        """Each object, attribute by attribute, each change where it is seen.

        "careful" writes how things were and are, "quick" only how they are.
        """
        steps = []
        for i, (old, new) in enumerate(zip(self.before, self.after, strict=True)):
            found = dict(changes(old, new))
            steps.append(str(i))
            for attribute, function in FUNCTIONS.items():
                before, after = getattr(old, attribute), getattr(new, attribute)
                steps += [before, after] if style == "careful" else [after]
                steps += [f"{function} ( {i} , {found[function]} )"] if function in found else []
        return " ".join(steps)

    def noticed(self, share: float) -> list[tuple[Transformation, float]]:
        """The problem as seen by somebody who notices each change with probability `share`, with
        the probability of each. The expected share of right functions is `share` then.
        """
        changed = []
        for i, (old, new) in enumerate(zip(self.before, self.after, strict=True)):
            changed += [(i, name) for name in FUNCTIONS if getattr(old, name) != getattr(new, name)]
        readings = []
        for seen in itertools.product((True, False), repeat=len(changed)):
            after, probability = list(self.before), 1.0
            for (i, name), noticed in zip(changed, seen, strict=True):
                probability *= share if noticed else 1 - share
                if noticed:
                    after[i] = replace(after[i], **{name: getattr(self.after[i], name)})
            readings.append((replace(self, after=tuple(after)), probability))
        return readings

    def misperceived(self) -> list[Transformation]:
        """One object of the second picture mistaken: an attribute, its cell, or its change."""
        problems = []
        for i, thing in enumerate(self.after):
            moved = [replace(thing, cell=cell) for cell in beside(thing.cell)]
            for mistaken in [self.before[i], *thing.misperceived(), *moved]:
                after = self.after[:i] + (mistaken,) + self.after[i + 1 :]
                apart = len({other.cell for other in after}) == len(after)
                steps = [changes(*pair) for pair in zip(self.before, after, strict=True)]
                if apart and None not in steps and after != self.before:
                    problems.append(replace(self, after=after))
        return problems


def beside(cell: str) -> list[str]:
    """The cells on the left, on the right, behind and in front."""
    c, r = column_row(cell)
    places = {column_row(other): other for other in CELLS}
    around = ((c - 1, r), (c + 1, r), (c, r - 1), (c, r + 1))
    return [places[at] for at in around if at in places]


def changes(old: Object, new: Object) -> list[tuple[str, str]] | None:
    """The functions that turn an object into another, as (function, value).

    None if it would have to move by more than one cell.
    """
    found = []
    for attribute, function in FUNCTIONS.items():
        value = getattr(new, attribute)
        if value == getattr(old, attribute):
            continue
        value = direction(old.cell, new.cell) if attribute == "cell" else value
        if value is None:
            return None
        found.append((function, value))
    return found
