"""The scripted experts of the blocks world: they stand for the paper's GPT-4o and Gemini-1.5-Pro where there is no key.

They know the world, err as often as Table 1 says those two do on the task, and their density is exact. A scripted mistake is
right reasoning over a scene in which one thing was misperceived (blocks.py), never noise.
"""

from __future__ import annotations

import math
import random
from functools import lru_cache

from blocks import dataset
from blocks.mistakes import mistakes
from data.state import State
from sampling import Action, Sample

STYLES = ("careful", "quick")  # the scripted experts' ways of thinking


# Table 1 of the paper: accuracy on the task's test sets. "train" questions are like those of "id".
ACCURACY = {
    "careful": {  # GPT-4o
        "counting-id": 0.6810, "counting-ood": 0.3431, "structure-id": 0.5018, "structure-ood": 0.4349,
        "transformation-id": 0.4255, "transformation-left": 0.2867, "transformation-right": 0.2976,
    },
    "quick": {  # Gemini-1.5-Pro
        "counting-id": 0.6180, "counting-ood": 0.3750, "structure-id": 0.5012, "structure-ood": 0.4838,
        "transformation-id": 0.2622, "transformation-left": 0.1876, "transformation-right": 0.1988,
    },
}  # fmt: skip


class ScriptedExpert:
    """One of the two scripted experts of the blocks world: "careful" writes every step down, "quick" skips some."""

    def __init__(self, name: str):
        self.name = name

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
        if (
            action.truncated
        ):  # cut at the length limit, every text that begins like this has become this action
            probability = sum(
                p for text, p in density.items() if f"{text} ".startswith(f"{action.text} ")
            )
        else:
            probability = density.get(action.text, 0.0)
        return math.log(probability) if probability else -math.inf

    def density(self, state: State) -> dict[str, float]:
        """Its responses to this state, each with its probability: the right one, and every plausible mistake."""
        if not isinstance(state, dataset.BlocksState):
            raise ValueError(
                f"the scripted expert '{self.name}' knows the blocks world only, not the state '{state.id}'"
            )
        return _density(self.name, state.set_name.replace("-train", "-id"), state.problem)


@lru_cache(
    maxsize=4096
)  # a state's density is asked for once to sample, and once for each kept action
def _density(name: str, set_name: str, problem) -> dict[str, float]:
    def response(seen) -> str:
        return f"<think> {seen.think(name)} </think> <answer> {seen.answer()} </answer>"

    right, wrong = ACCURACY[name][set_name], mistakes(problem)
    density = {response(problem): right}
    for seen in wrong:  # different misperceptions can lead to the same words
        density[response(seen)] = density.get(response(seen), 0.0) + (1 - right) / len(wrong)
    return density
