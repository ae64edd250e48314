"""A model's predictions in an evaluation."""

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
    """A model's predictions.

    temperature, top_p, top_k: of the answer that counts; temperature 0 is greedy. Pass@k samples
    from the policy itself: at temperature 1, from all tokens.
    """

    def __init__(
        self, sampler: Sampler, temperature: float, samples: int, top_p: float = 1.0, top_k: int = 0
    ):
        self.sampler, self.temperature, self.samples = sampler, temperature, samples
        self.top_p, self.top_k = top_p, top_k

    def __call__(self, states: list[State]) -> list[Prediction]:
        prompts = self.sampler.policy.encode(states)
        actions = self.answers(prompts)
        samples = [[]] * len(states)
        if self.samples:
            samples = self.sample(prompts, self.samples, "pass")
        predictions = []
        for state, action, others in zip(states, actions, samples, strict=True):
            length, texts = len(action.tokens), [other.text for other in others]
            answer = Prediction.of(state, action.text, length, action.truncated, texts)
            predictions.append(answer)
        return predictions

    def answers(self, prompts: list[Prompt]) -> list[Action]:
        """The action that counts, for each prompt."""
        policy, sampler = self.sampler.policy, self.sampler
        if not self.temperature:
            return sampler.greedy(prompts)
        policy.temperature, sampler.top_p, sampler.top_k = self.temperature, self.top_p, self.top_k
        actions = [action for (action,) in self.sample(prompts, 1, "answer")]
        policy.temperature, sampler.top_p, sampler.top_k = 1.0, 1.0, 0
        return actions

    def sample(self, prompts: list[Prompt], n: int, purpose: str) -> list[list[Action]]:
        """n actions for each prompt, which depend on its state alone, not on the batch."""
        if self.sampler.seeds_each_state:
            return self.sampler.sample(prompts, n, seed_of(purpose))
        groups = []
        for prompt in prompts:
            groups += self.sampler.sample([prompt], n, seed_of(f"{purpose} {prompt.state.id}"))
        return groups


def seed_of(purpose: str) -> int:
    return random.Random(f"{EVAL_SEED} {purpose}").getrandbits(62)
