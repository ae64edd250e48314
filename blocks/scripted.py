"""Scripted experts of the blocks world, in the place of the paper's GPT-4o and Gemini-1.5-Pro.

Their expected score on each question is what Table 1 says of those two, and their density is exact.
A mistake is right reasoning over a scene in which one thing was misperceived, or in which changes
were overlooked (mistakes.py). "careful" writes its steps; "quick" writes fewer, and in counting
none: what makes it right is then not in its words, as with an API that hides its reasoning.
"""

from __future__ import annotations

import math
import random
import re
from functools import lru_cache

from blocks.dataset import BlocksState
from blocks.mistakes import readings
from data.state import State
from sampling import Action, Sample

STYLES = ("careful", "quick")  # how they think

# Table 1 of the paper: accuracy on the test sets. Questions of "train" are like those of "id".
ACCURACY = {
    "careful": {  # GPT-4o
        "counting-id": 0.6810, "counting-ood": 0.3431,
        "structure-id": 0.5018, "structure-ood": 0.4349,
        "transformation-id": 0.4255, "transformation-left": 0.2867, "transformation-right": 0.2976,
    },
    "quick": {  # Gemini-1.5-Pro
        "counting-id": 0.6180, "counting-ood": 0.3750,
        "structure-id": 0.5012, "structure-ood": 0.4838,
        "transformation-id": 0.2622, "transformation-left": 0.1876, "transformation-right": 0.1988,
    },
}  # fmt: skip


def is_scripted(name: str) -> bool:
    """Whether an expert of this name is scripted; `ScriptedExpert` says what is wrong with it."""
    return name.partition(":")[0] in ACCURACY


class ScriptedExpert:
    """The expert "careful" or "quick"; "careful:0.3" has an expected score of 0.3 on every set.

    ValueError for a score that is not between 0 and 1.
    """

    def __init__(self, name: str):
        self.name = name
        self.style, colon, share = name.partition(":")
        self.share = None  # Table 1's
        if colon:
            number = re.fullmatch(r"0?\.[0-9]{1,9}", share)
            if not number or not float(share):
                raise ValueError(f"expert '{name}': {self.style}:0.3 is right in 30 % of cases")
            self.share = float(share)

    def sample(self, states: list[State], n: int, seed: int) -> list[list[Sample]]:
        drawn = []
        for state in states:
            density = self.density(state)
            rng = random.Random(f"{seed} {self.name} {state.id}")
            texts = rng.choices(list(density), list(density.values()), k=n)
            drawn.append([Sample(text, math.log(density[text])) for text in texts])
        return drawn

    def logp(self, state: State, action: Action) -> float:
        density = self.density(state)
        if action.truncated:  # cut at the length limit: any text that begins like it became it
            start = f"{action.text} "
            probability = sum(p for text, p in density.items() if f"{text} ".startswith(start))
        else:
            probability = density.get(action.text, 0.0)
        return math.log(probability) if probability else -math.inf

    def density(self, state: State) -> dict[str, float]:
        """The probability of each of its responses: the right one, and every plausible mistake."""
        if not isinstance(state, BlocksState):
            raise ValueError(
                f"the scripted expert '{self.name}' knows the blocks world only, "
                f"not the state '{state.id}'"
            )
        task, split = state.set_name.split("-")
        like = f"{task}-id" if split in ("train", "val") else state.set_name
        share = ACCURACY[self.style][like] if self.share is None else self.share
        return _density(self.style, share, state.problem)


def response(problem, style: str) -> str:
    """The thought and the answer of somebody who sees a problem like this."""
    return f"<think> {problem.think(style)} </think> <answer> {problem.answer()} </answer>"


@lru_cache(maxsize=4096)  # used once to sample, and once for each kept action
def _density(style: str, share: float, problem) -> dict[str, float]:
    density: dict[str, float] = {}
    for seen, probability in readings(problem, share):
        text = response(seen, style)  # different misperceptions can lead to the same words
        density[text] = density.get(text, 0.0) + probability
    return density
