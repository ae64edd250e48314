"""TODO blocks.counting"""

import random
from dataclasses import dataclass, replace

from PIL import Image

from blocks.drawing import draw_scene
from blocks.scenes import COLORS, SHAPES, SIZES, Object, random_objects

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
