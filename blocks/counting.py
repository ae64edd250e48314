"""The counting task: how many objects of a scene, and arithmetic on that number.

-train, -id: 3 to 6 objects; -ood: 7 or 8. Half of the questions take one step (count, remove, or
add), which tiny/ has learnt; the others two, which it has not: "remove every cube . how many are
left ? times 2 . add 1 .".
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from PIL import Image

from blocks.drawing import draw_scene
from blocks.scenes import COLORS, SHAPES, SIZES, Object, random_objects

Filter = tuple[str, ...]  # words that an object must have: ("large", "cube"); () is any object


def noun(words: Filter) -> str:
    """In the words of the objects: matching "cube" with "cubes" is not part of the lesson."""
    return " ".join(words if words and words[-1] in SHAPES else (*words, "object"))


@dataclass(frozen=True)
class Counting:
    """How many objects match `count`, after all that match `remove` are gone; times `times`, plus
    `add`.
    """

    objects: tuple[Object, ...]
    remove: Filter | None  # None removes nothing
    count: Filter
    times: int = 1
    add: int = 0
    kind = "discrete"

    @classmethod
    def sample(cls, rng: random.Random, split: str) -> Counting:
        objects = random_objects(rng, rng.randint(7, 8) if split == "ood" else rng.randint(3, 6))
        # Mostly words of an object in the scene: else most answers would be 0.
        like = rng.choice(objects) if rng.random() < 0.9 else random_objects(rng, 1)[0]
        words = (like.size, like.color, like.shape)
        some = tuple(words[i] for i in sorted(rng.sample(range(3), rng.randint(1, 2))))
        k, m = rng.randint(2, 3), rng.randint(1, 3)
        counted, left = (None, some), (some, ())
        if rng.random() < 0.5:
            return cls(objects, *rng.choice([counted, left, (*counted, 1, m)]))
        forms = [(*counted, k), (*counted, k, m), (*left, k), (*left, 1, m), (*left, k, m)]
        problem = cls(objects, *rng.choice(forms))
        # Twice nothing is one step.
        return problem if problem.number() else cls.sample(rng, split)

    @property
    def part(self) -> str:
        """Which kind of question it is; the parts are reported apart."""
        two = self.times > 1 or (self.remove and self.add)
        return "two-step" if two else "one-step"

    def question(self) -> str:
        words = [f"remove every {noun(self.remove)} ."] if self.remove else []
        words.append(f"count every {noun(self.count)} ." if self.count else "how many are left ?")
        words += [f"times {self.times} ."] if self.times > 1 else []
        words += [f"add {self.add} ."] if self.add else []
        return " ".join(words)

    def images(self) -> tuple[Image.Image, ...]:
        return (draw_scene(self.objects),)

    def verdict(self, thing: Object) -> str:
        """What becomes of an object: "gone", "yes" or "no"; "left" if all that is left counts."""
        has = {thing.size, thing.color, thing.shape}
        if self.remove and set(self.remove) <= has:
            return "gone"
        if not self.count:
            return "left"
        return "yes" if set(self.count) <= has else "no"

    def counts(self, thing: Object) -> bool:
        return self.verdict(thing) in ("yes", "left")

    def number(self) -> int:
        return sum(map(self.counts, self.objects))

    def answer(self) -> str:
        return str(self.number() * self.times + self.add)

    def describe(self) -> str:
        return " , ".join(f"{thing.cell} {thing}" for thing in self.objects)

    def think(self, style: str) -> str:
        """Each object with the attributes that the question mentions, the verdict and the count so
        far, then the arithmetic ("careful"). "quick" does not show how it found the answer.
        """
        if style == "quick":
            return "at a glance"
        asked = set(self.count).union(self.remove or ())
        steps, count = [], 0
        for thing in self.objects:
            steps.append(thing.cell)
            steps += [thing.size] if asked.intersection(SIZES) else []
            steps += [thing.color] if asked.intersection(COLORS) else []
            steps += [thing.shape] if asked.intersection(SHAPES) else []
            steps.append(self.verdict(thing))
            if self.counts(thing):
                count += 1
                steps.append(str(count))
        return " ".join([*steps, self.arithmetic()])

    def arithmetic(self) -> str:
        number = self.number()
        if self.times == 1 and not self.add:
            return f"total {number}"
        words = str(number)
        if self.times > 1:
            words += f" times {self.times} is {number * self.times}"
        return f"{words} plus {self.add} is {self.answer()}" if self.add else words

    def misperceived(self) -> list[Counting]:
        """One object overlooked, or one of its attributes mistaken."""
        scenes = []
        for i, thing in enumerate(self.objects):
            before, after = self.objects[:i], self.objects[i + 1 :]
            scenes.append(before + after)
            scenes += [(*before, mistaken, *after) for mistaken in thing.misperceived()]
        return [replace(self, objects=objects) for objects in scenes]
