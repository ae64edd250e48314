"""An expert's predictions in an evaluation."""

from pathlib import Path

from blocks.scripted import is_scripted
from data.predictions import Prediction
from data.state import State
from experts.api_expert import VENDORS
from rollouts.answering import EVAL_SEED


class ExpertAnswers:
    """An expert's predictions: its first response counts.

    Length is in words, since an expert's tokens are its own. A question that an API does not answer
    has no prediction; the same command asks it again.
    """

    def __init__(self, expert, samples: int):
        self.expert, self.samples = expert, samples

    def __call__(self, states: list[State]) -> list[Prediction | None]:
        responses = self.expert.sample(states, max(1, self.samples), EVAL_SEED)
        pairs = zip(states, responses, strict=True)
        return [self.prediction(state, texts) if texts else None for state, texts in pairs]

    def prediction(self, state: State, responses: list) -> Prediction:
        first, samples = responses[0], responses if self.samples else []
        words, texts = len(first.text.split()), [sample.text for sample in samples]
        return Prediction.of(state, first.text, words, first.truncated, texts)


def is_expert(name: str) -> bool:
    """Whether a name is that of an expert ("careful", "openai:MODEL") and of no directory."""
    return not Path(name).is_dir() and (is_scripted(name) or name.partition(":")[0] in VENDORS)
