"""TODO data.predictions"""

import dataclasses
from pathlib import Path

from data.answers import KINDS
from data.state import SETS
from training import storage
from training.console import UserError


@dataclasses.dataclass
class Prediction:
    """What was said to one question: the one answer that counts, and the samples of Pass@k."""

    id: str
    answer: str  # the truth
    kind: str
    text: str
    tokens: int
    truncated: bool
    samples: list[str] = dataclasses.field(default_factory=list)


def prediction(record: dict) -> Prediction:
    """A line of a file of predictions. TypeError if it is another one."""
    made = Prediction(**record)
    texts = (made.id, made.answer, made.kind, made.text, *made.samples)
    if not all(isinstance(text, str) for text in texts) or made.kind not in KINDS:
        raise TypeError(f"no prediction: {record}")
    return made


def read_predictions(directory: Path) -> dict[str, list[Prediction]]:
    """By set, in the order of Table 1's columns, each question once; sets without answers are left out. UserError if there are none."""
    files = {file.stem: file for file in directory.glob("*.jsonl")}
    order = [name for names in SETS.values() for name in names]
    names = sorted(
        files, key=lambda name: (order.index(name) if name in order else len(order), name)
    )
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
