"""Responses to test questions, as evaluate.py saves them: one file of JSON lines a set."""

import dataclasses
import itertools
from pathlib import Path

from data.answers import KINDS
from data.state import SETS
from training import storage
from training.console import UserError


@dataclasses.dataclass
class Prediction:
    """The response to one question that counts for accuracy, and the samples of Pass@k."""

    id: str
    answer: str  # the truth
    kind: str
    text: str
    tokens: int
    truncated: bool
    samples: list[str] = dataclasses.field(default_factory=list)


def prediction(record: dict) -> Prediction:
    """A line of a file of predictions; TypeError if it is not one."""
    made = Prediction(**record)
    texts = (made.id, made.answer, made.kind, made.text, *made.samples)
    if not all(isinstance(text, str) for text in texts) or made.kind not in KINDS:
        raise TypeError(f"no prediction: {record}")
    return made


def read_predictions(directory: Path) -> dict[str, list[Prediction]]:
    """The predictions of each set, in the order of Table 1's columns, each question once.

    Sets without answers are left out; UserError if no set has any.
    """
    files = {file.stem: file for file in directory.glob("*.jsonl")}
    order = list(itertools.chain(*SETS.values()))
    known = [name for name in order if name in files]
    names = known + sorted(files.keys() - set(known))
    if not names:
        raise UserError(f"no predictions in {directory}: make them with python evaluate.py MODEL")
    found = {}
    try:
        for name in names:
            answers: dict[str, Prediction] = {}
            for record in storage.read(files[name]):
                made = prediction(record)
                answers.setdefault(made.id, made)
            found[name] = sorted(answers.values(), key=lambda p: p.id)
    except TypeError:
        raise UserError(f"{directory} holds other lines than predictions") from None
    if not any(found.values()):
        raise UserError(f"no answers in {directory}, so there is nothing to score")
    return {name: answers for name, answers in found.items() if answers}
