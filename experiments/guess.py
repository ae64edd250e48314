"""What a guess from a question's words alone gets in the blocks world: no picture is seen.

    python -m experiments.guess --sets counting-id counting-ood --states 200 --out runs/pass/guess

The answers to the form of a question are counted among the training questions. The commonest one
is the guess; for Pass@k, 64 are drawn as often as they are there. The predictions are written as
evaluate.py writes a model's, so a guess is a row of tables and a curve of figures like any other: a
model that is not above it may not have looked.
"""

import json
import random
import re
from collections import Counter
from dataclasses import asdict
from functools import cache
from pathlib import Path

from blocks.dataset import BlocksSet
from data.predictions import Prediction
from data.state import State
from training import console, storage
from training.console import Parser, UserError

TRAINED = 3200  # training questions whose answers are counted
SAMPLES = 64


def form(question: str) -> str:
    """Of a counting question, whether objects are removed, and its numbers; of one about a figure,
    what is asked, and the area that it names.
    """
    asked = r"remove|times \d|add \d|how many sides|perimeter|area is|area of the figure|is \d+"
    return " ".join(re.findall(asked, question.partition(" choose")[0]))


@cache
def answers_of(task: str) -> dict[str, Counter[str]]:
    """How often each answer is given to each form among the training questions, and to each form
    without its numbers.
    """
    found: dict[str, Counter[str]] = {}
    for state in BlocksSet(f"{task}-train", TRAINED):
        known = form(state.question)
        for key in {known, bare(known)}:
            found.setdefault(key, Counter())[state.answer] += 1
    return found


def bare(known: str) -> str:
    """A form without its numbers."""
    return re.sub(r"\d+", "N", known)


def answers_to(task: str, question: str) -> Counter[str]:
    """The training answers to a question's form; where its numbers are new, to any numbers."""
    found, known = answers_of(task), form(question)
    return found.get(known) or found.get(bare(known)) or Counter([""])


def guess(task: str, question: str, rank: int = 0) -> str | None:
    """The commonest answer to the question's form. rank: 1 for the next; None if there is none."""
    common = answers_to(task, question).most_common(rank + 1)
    return common[rank][0] if len(common) > rank else None


def prediction(task: str, state: State) -> Prediction:
    """The guess, and SAMPLES drawn ones, as a response to a state."""
    found = answers_to(task, state.question)
    rng = random.Random(f"guess {state.id}")
    drawn = rng.choices(list(found), list(found.values()), k=SAMPLES)
    given = [guess(task, state.question), *drawn]
    text, *texts = [f"<answer> {answer} </answer>" for answer in given]
    return Prediction.of(state, text, 3, False, texts)


def run(argv: list[str]) -> str:
    parser = Parser(
        prog="python -m experiments.guess", description=__doc__.split("\n\n")[0], allow_abbrev=False
    )
    parser.add_argument("--sets", nargs="+", default=["counting-id", "counting-ood"])
    parser.add_argument("--states", type=int, default=300, help="questions of each set")
    parser.add_argument("--out", type=Path, required=True, help="directory of the predictions")
    args = parser.parse_args(argv)
    if args.states < 1:
        raise UserError("--states must be at least 1")
    for name in args.sets:
        try:
            states = BlocksSet(name, args.states)
        except ValueError as error:
            raise UserError(str(error)) from None
        lines = []
        for state in states:
            lines.append(json.dumps(asdict(prediction(name.partition("-")[0], state))) + "\n")
        with storage.writing(args.out):
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / f"{name}.jsonl").write_text("".join(lines))
    return str(args.out)


def main() -> None:
    console.command("experiments.guess", run)


if __name__ == "__main__":
    main()
