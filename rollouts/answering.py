"""TODO rollouts.answering"""

import random

from data.predictions import Prediction
from data.state import State
from policy import Prompt
from sampling import Action, Sampler

EVAL_SEED = 0  # of Pass@k's samples


def answer_greedily(sampler: Sampler, states, batch: int = 128) -> list[Action]:
    """One greedy action for each state."""
    actions = []
    for start in range(0, len(states), batch):
        actions += sampler.greedy(sampler.policy.encode(states[start : start + batch]))
    return actions


class ModelAnswers:
    """A model's predictions. temperature, top_p, top_k: of the answer that counts, temperature 0 is greedy; Pass@k samples from the policy
    itself, at 1, all of it."""

    def __init__(
        self,
        sampler: Sampler,
        temperature: float,
        samples: int,
        top_p: float = 1.0,
        top_k: int = 0,
    ):
        self.sampler, self.temperature, self.samples = sampler, temperature, samples
        self.top_p, self.top_k = top_p, top_k

    def __call__(self, states: list[State]) -> list[Prediction]:
        policy = self.sampler.policy
        prompts = policy.encode(states)
        if self.temperature:
            policy.temperature = self.temperature
            self.sampler.top_p, self.sampler.top_k = self.top_p, self.top_k
            actions = [action for (action,) in self.sample(prompts, 1, "answer")]
            policy.temperature, self.sampler.top_p, self.sampler.top_k = 1.0, 1.0, 0
        else:
            actions = self.sampler.greedy(prompts)
        samples = (
            [
                [state.reading(action.text) for action in said]
                for state, said in zip(
                    states, self.sample(prompts, self.samples, "pass"), strict=True
                )
            ]
            if self.samples
            else [[]] * len(states)
        )
        return [
            Prediction(
                state.id,
                state.answer,
                state.kind,
                state.reading(action.text),
                len(action.tokens),
                action.truncated,
                texts,
            )
            for state, action, texts in zip(states, actions, samples, strict=True)
        ]

    def sample(self, prompts: list[Prompt], n: int, purpose: str) -> list[list[Action]]:
        """n actions for each prompt, which depend on its state alone and not on who is in the batch."""
        if self.sampler.seeds_each_state:
            return self.sampler.sample(
                prompts, n, random.Random(f"{EVAL_SEED} {purpose}").getrandbits(62)
            )
        return [
            self.sampler.sample(
                [prompt],
                n,
                random.Random(f"{EVAL_SEED} {purpose} {prompt.state.id}").getrandbits(62),
            )[0]
            for prompt in prompts
        ]
