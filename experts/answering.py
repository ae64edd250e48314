"""TODO experts.answering"""

from pathlib import Path

from blocks.scripted import ACCURACY
from data.predictions import Prediction
from data.state import State
from experts.api_expert import VENDORS
from rollouts.answering import EVAL_SEED


class ExpertAnswers:
    """An expert's predictions: its first response counts. Length in words, since an expert's tokens are its own.

    A question that an API does not answer has no prediction; the same command asks it again.
    """

    def __init__(self, expert, samples: int):
        self.expert, self.samples = expert, samples

    def __call__(self, states: list[State]) -> list[Prediction | None]:
        predictions = []
        for state, said in zip(
            states, self.expert.sample(states, max(1, self.samples), EVAL_SEED), strict=True
        ):
            samples = [state.reading(sample.text) for sample in said] if self.samples else []
            prediction = (
                Prediction(
                    state.id,
                    state.answer,
                    state.kind,
                    state.reading(said[0].text),
                    len(said[0].text.split()),
                    said[0].truncated,
                    samples,
                )
                if said
                else None
            )
            predictions.append(prediction)
        return predictions


def is_expert(name: str) -> bool:
    """Whether a name is an expert's and not a model's: "careful", "openai:MODEL", and no directory."""
    return not Path(name).is_dir() and (name in ACCURACY or name.partition(":")[0] in VENDORS)
