"""The counting task: how many objects of a scene, after some were removed and some were added.

-train, -id: 3 to 6 objects and one step; -ood: 7 to 9 objects and two steps.
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
    """How many objects match `count`, after all that match one of `remove` are gone, plus `add`."""

    objects: tuple[Object, ...]
    remove: tuple[Filter, ...]
    count: Filter
    add: int
    kind = "discrete"

    @classmethod
    def sample(cls, rng: random.Random, split: str) -> Counting:
        objects = random_objects(rng, rng.randint(7, 9) if split == "ood" else rng.randint(3, 6))

        def some(attributes: int) -> Filter:
            # Mostly words of an object in the scene: else most answers would be 0.
            like = rng.choice(objects) if rng.random() < 0.9 else random_objects(rng, 1)[0]
            words = (like.size, like.color, like.shape)
            return tuple(words[i] for i in sorted(rng.sample(range(3), attributes)))

        if split == "ood":
            forms = [  # remove, count, add
                ((some(1), some(1)), (), 0),
                ((some(1),), some(1), 0),
                ((some(2),), some(1), 0),
            ]
        else:
            forms = [
                ((), some(1), 0),
                ((), some(2), 0),
                ((some(1),), (), 0),
                ((some(2),), (), 0),
                ((), some(1), rng.randint(1, 3)),
            ]
        return cls(objects, *rng.choice(forms))

    def question(self) -> str:
        words = [f"remove every {noun(words)} ." for words in self.remove]
        words.append(f"count every {noun(self.count)} ." if self.count else "how many are left ?")
        words += [f"add {self.add} ."] if self.add else []
        return " ".join(words)

    def images(self) -> tuple[Image.Image, ...]:
        return (draw_scene(self.objects),)

    def verdict(self, thing: Object) -> str:
        """What becomes of an object: "gone", "yes" or "no"; "left" if all that is left counts."""
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
        """Each object: the attributes that the question mentions, and the verdict.

        "careful" keeps count on the way, "quick" does not.
        """
        asked = set(self.count).union(*self.remove)
        steps, count = [], 0
        for thing in self.objects:
            steps.append(thing.cell)
            steps += [thing.size] if asked.intersection(SIZES) else []
            steps += [thing.color] if asked.intersection(COLORS) else []
            steps += [thing.shape] if asked.intersection(SHAPES) else []
            steps.append(self.verdict(thing))
            count += self.counts(thing)
            if self.counts(thing) and style == "careful":
                steps.append(str(count))
        end = f"{count} plus {self.add} is" if self.add else "total"
        return " ".join([*steps, end, self.answer()])

    def misperceived(self) -> list[Counting]:
        """One object overlooked, or one of its attributes mistaken."""
        scenes = []
        for i, thing in enumerate(self.objects):
            before, after = self.objects[:i], self.objects[i + 1 :]
            scenes.append(before + after)
            scenes += [(*before, mistaken, *after) for mistaken in thing.misperceived()]
        return [replace(self, objects=objects) for objects in scenes]
