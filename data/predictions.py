"""Predictions: the responses to the questions of test sets, saved one line a question.

DIR/settings.json    what the predictions depend on; a directory holds those of one setting
    SET.jsonl        one line a question
"""

import dataclasses
import json
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path

from tqdm import tqdm

from data.answers import KINDS
from data.state import SETS, State
from training import storage
from training.console import UserError
from training.distributed import World


@dataclasses.dataclass
class Prediction:
    """The responses to one question: the one that is scored, and the samples of Pass@k."""

    id: str
    answer: str  # the truth
    kind: str
    text: str
    tokens: int
    truncated: bool
    samples: list[str] = dataclasses.field(default_factory=list)
    part: str = ""  # of the set; older files lack it

    @classmethod
    def of(
        cls, state: State, text: str, tokens: int, truncated: bool, samples: Iterable[str] = ()
    ) -> "Prediction":
        """The responses to a state, as rewards.py reads them (`State.reading`)."""
        texts = [state.reading(sample) for sample in samples]
        read = state.reading(text)
        about = (state.id, state.answer, state.kind)
        return cls(*about, read, tokens, truncated, texts, state.part)


def prediction(record: dict) -> Prediction:
    """The prediction of a line. TypeError if the line holds something else."""
    p = Prediction(**record)
    texts = (p.id, p.answer, p.kind, p.text, p.part, *p.samples)
    if not all(isinstance(text, str) for text in texts) or p.kind not in KINDS:
        raise TypeError(f"no prediction: {record}")
    return p


def read_predictions(directory: Path) -> dict[str, list[Prediction]]:
    """Predictions by set, in the order of Table 1's columns, each question once.

    Sets without predictions are left out. UserError if there are none at all.
    """
    files = {file.stem: file for file in directory.glob("*.jsonl")}
    if not files:
        raise UserError(f"no predictions in {directory}: make them with python evaluate.py MODEL")
    columns = list(chain.from_iterable(SETS.values()))
    names = [name for name in columns if name in files]
    names += sorted(files.keys() - set(columns))
    found = {}
    for name in names:
        answers: dict[str, Prediction] = {}
        try:
            for record in storage.read(files[name]):
                answer = prediction(record)
                answers.setdefault(answer.id, answer)
        except TypeError:
            raise UserError(f"{directory} holds other lines than predictions") from None
        if answers:
            found[name] = sorted(answers.values(), key=lambda p: p.id)
    if not found:
        raise UserError(f"no answers in {directory}, so there is nothing to score")
    return found


def with_parts(sets: dict[str, list[Prediction]]) -> dict[str, list[Prediction]]:
    """Each set under its name and, after it, its parts as "SET/PART", sorted.

    What has no part counts in the whole set only.
    """
    groups = {}
    for name, predictions in sets.items():
        groups[name] = predictions
        for part in sorted({p.part for p in predictions} - {""}):
            groups[f"{name}/{part}"] = [p for p in predictions if p.part == part]
    return groups


def claim(out: Path, settings: dict) -> None:
    """Makes and locks a directory of predictions. UserError if it holds those of other settings."""
    file = out / "settings.json"
    try:
        out.mkdir(parents=True, exist_ok=True)
        storage.hold(out, "wait until that has ended, or choose another --out")
        if not file.exists():
            storage.write_aside(file, json.dumps(settings, indent=2) + "\n")
        found = dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"cannot use {out} for predictions: {error}") from None
    for name in [*settings, *found]:
        then, now = found.get(name), settings.get(name)
        if then != now:
            other = f"another {name} ({then}, not {now})"
            raise UserError(f"{out} holds predictions with {other}: choose another --out")


def predict(
    answers: Callable[[list[State]], list[Prediction | None]],
    states: list[State],
    file: Path,
    world: World,
    batch: int = 64,
) -> None:
    """Appends the predictions that `file` lacks, batch by batch.

    Each process answers its shard of a batch, and the first one writes. answers: gives None for a
    question that has no answer; the next call tries it again.
    """

    def saved() -> dict[str, str]:  # an interruption may have cut the last line short
        found = [prediction(r) for r in storage.mend(file, lambda r: bool(prediction(r)))]
        return {p.id: p.answer for p in found}

    done = world.first(saved)
    if any(done.get(state.id, state.answer) != state.answer for state in states):
        raise UserError(f"{file} answers other questions than today's: choose another --out")
    missing = [state for state in states if state.id not in done]
    bar = tqdm(total=len(states), desc=file.stem, disable=world.rank > 0, leave=False)
    bar.update(len(states) - len(missing))
    for start in range(0, len(missing), batch * world.size):
        chunk = missing[start : start + batch * world.size]
        shard = world.shard(chunk)
        predictions = world.gather(answers(shard) if shard else [])
        if world.rank == 0:
            records = [dataclasses.asdict(p) for p in predictions if p is not None]
            storage.append(file, records)
        bar.update(len(chunk))
    bar.close()
