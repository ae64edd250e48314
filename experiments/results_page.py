"""experiments/results/README.md from page.md beside it: every number is computed when it is made.

    python -m experiments.results_page

page.md is Markdown with places such as {{mean RFT id2}}; `FIGURES` says what each means. A cell is
id1, id2, ood1 or ood2 (counting, one step or two, in or out of distribution) or a cell's whole
name; DIR is a folder of results, counting if none is named. The tests hold README.md equal to what
this makes, and page.md free of numbers with decimals outside of such places.
"""

import json
import re
import statistics
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np

import rewards
from blocks.dataset import BlocksSet
from evaluate import pass_at_k
from experiments import figures, paired
from experiments import guess as blind
from training import console, curves, storage
from training.console import Parser, UserError

RESULTS = Path(__file__).with_name("results")
CELLS = {
    "id1": "counting-id/one-step",
    "id2": "counting-id/two-step",
    "ood1": "counting-ood/one-step",
    "ood2": "counting-ood/two-step",
}
COUNT = 10  # steps at the start and at the end of a run
FIGURES: dict[str, Callable[..., str]] = {}


def figure(function: Callable[..., str]) -> Callable[..., str]:
    """Makes a function of words a place of the page."""
    FIGURES[function.__name__] = function
    return function


@cache
def scores(directory: str) -> paired.Scores:
    return paired.by_method(json.loads((RESULTS / directory / "scores.json").read_text()))


@cache
def histories(directory: str, method: str) -> list[list[dict]]:
    """The records of each of a method's seeds. UserError if there are none."""
    files = sorted((RESULTS / directory).glob(f"{method}-seed*.jsonl"))
    if not files:
        raise UserError(f"no metrics of {method} in {directory}")
    return [storage.read(file) for file in files]


@figure
def mean(method: str, cell: str, directory: str = "counting") -> str:
    """Accuracy in %."""
    return f"{100 * scores(directory)[CELLS.get(cell, cell)][method].mean():.1f}"


@figure
def value(method: str, cell: str, directory: str = "counting") -> str:
    """Accuracy in %, with half its 95 % interval."""
    (found,), groups = whole(directory, CELLS.get(cell, cell), method)
    return paired.told(*paired.interval(found, None, groups), "")


@figure
def difference(method: str, other: str, cell: str, directory: str = "counting") -> str:
    """Of two methods on the same questions, in points, with half its 95 % interval."""
    found, groups = whole(directory, CELLS.get(cell, cell), method, other)
    return paired.told(*paired.interval(*found, groups), "+")


@figure
def gained(method: str, first: str, cell: str, directory: str = "counting") -> str:
    """The same of runs that each go on from a first stage's model of their seed, paired by seed."""
    (after, before), groups = whole(directory, CELLS.get(cell, cell), method, first)
    return paired.told(*paired.interval(after - before, None, groups), "+")


def whole(directory: str, cell: str, *methods: str) -> tuple[list[np.ndarray], np.ndarray | None]:
    """Scores (seeds, questions) of each method, and the questions' kin: of a cell, or of all the
    parts of a set one after another."""
    found, kin = scores(directory), paired.saved_kin(RESULTS / directory)
    if cell in found:
        return [found[cell][method] for method in methods], kin.get(cell)
    parts = [part for part in found if part.startswith(f"{cell}/")]
    groups, start = [], 0
    for part in parts:
        alone = np.arange(found[part][methods[0]].shape[1])
        groups.append(start + kin.get(part, alone))
        start = groups[-1].max() + 1
    joined = [np.concatenate([found[part][m] for part in parts], axis=1) for m in methods]
    return joined, np.concatenate(groups)


@figure
def worth(cell: str, directory: str) -> str:
    """How many different questions those of a cell are worth where some are nearly the same."""
    sizes = np.bincount(paired.saved_kin(RESULTS / directory)[cell])
    return f"{sizes.sum() ** 2 / (sizes**2).sum():.0f}"


@figure
def rate(method: str, directory: str = "counting") -> str:
    """The learning rate that was best for a method on the validation questions."""
    found = json.loads((RESULTS / directory / "rates.json").read_text())[method]
    return max(found, key=found.get)


@figure
def validation(method: str, rate: str, directory: str = "counting") -> str:
    """Accuracy in % on the validation questions with a learning rate."""
    found = json.loads((RESULTS / directory / "rates.json").read_text())
    return f"{100 * found[method][rate]:.1f}"


@figure
def percent(name: str, method: str, when: str, directory: str = "counting") -> str:
    """A share of metrics.jsonl in %, mean over seeds and the first or last ten steps."""
    return f"{100 * during(name, method, when, directory):.1f}"


@figure
def number(name: str, method: str, when: str, directory: str = "counting") -> str:
    """The same of what is no share."""
    return f"{during(name, method, when, directory):.2f}"


def during(name: str, method: str, when: str, directory: str) -> float:
    part = {"first": slice(COUNT), "last": slice(-COUNT, None), "all": slice(None)}[when]
    means = []
    for history in histories(directory, method):
        steps = [record[name] for record in history if "loss" in record][part]
        means.append(statistics.fmean(steps))
    return statistics.fmean(means)


@figure
def reached(method: str, other: str, test: str, directory: str = "counting") -> str:
    """The share in % of its questions at which a method was first seen at the end of another."""
    mean_of = {}
    for name in (method, other):
        found = [figures.accuracy_curve(h, f"eval/{test}") for h in histories(directory, name)]
        mean_of[name] = figures.mean_curve(found)
    share = figures.share_to_reach(mean_of[method], mean_of[other][-1][1])
    return "never" if share is None else f"{100 * share:.0f}"


@cache
def chances(k: int, test: str, directory: str) -> dict[str, np.ndarray]:
    """Pass@k of each question by method, (seeds, questions), from samples.json."""
    samples = json.loads((RESULTS / directory / "samples.json").read_text())[test]
    found: dict[str, list] = {}
    for run, (n, right) in samples.items():
        found.setdefault(curves.method_of(run), []).append([pass_at_k(n, c, k) for c in right])
    return {method: np.array(seeds) for method, seeds in found.items()}


@figure
def pass_at(k: str, method: str, test: str, directory: str = "counting") -> str:
    """Pass@k in %."""
    return f"{100 * chances(int(k), test, directory)[method].mean():.1f}"


@figure
def pass_difference(k: str, method: str, other: str, test: str, directory: str = "counting") -> str:
    """Of two methods' Pass@k on the same questions, in points, with half its 95 % interval."""
    found = chances(int(k), test, directory)
    return paired.told(*paired.interval(found[method], found[other]), "+")


@figure
def used(name: str, method: str, directory: str = "counting") -> str:
    """Of a method's budget (budgets.py)."""
    found = json.loads((RESULTS / directory / "budgets.json").read_text())
    runs = [budget for run, budget in found.items() if curves.method_of(run) == method]
    cells = dict(zip(paired.budgets.COLUMNS, paired.budgets.told(runs), strict=True))
    return cells[name]


@figure
def hours(directory: str = "*") -> str:
    """Of one thread, in the training runs of a folder or all, without start and evaluations."""
    seconds = 0.0
    for file in RESULTS.glob(f"{directory}/budgets.json"):
        seconds += sum(budget["seconds"] for budget in json.loads(file.read_text()).values())
    return f"{seconds / 3600:.1f}"


@figure
def guess(cell: str, size: str = "2000") -> str:
    """What guessing from the question alone gets in a cell, in % (guess.py)."""
    return f"{100 * statistics.fmean(guessed(CELLS.get(cell, cell), int(size))):.1f}"


@figure
def beyond(method: str, cell: str, directory: str = "counting") -> str:
    """Accuracy in % on the questions of a cell where that guess is wrong."""
    found = scores(directory)[CELLS.get(cell, cell)][method]
    return f"{100 * found[:, unguessed(CELLS.get(cell, cell))].mean():.1f}"


@figure
def second_guess(cell: str) -> str:
    """What the next commonest answer to a question's form gets there, in %."""
    there = unguessed(CELLS.get(cell, cell))
    return f"{100 * guessed(CELLS.get(cell, cell), 2000, 1)[there].mean():.1f}"


@cache
def guessed(cell: str, size: int, rank: int = 0) -> np.ndarray:
    """Whether the guess is right, of each question of a cell in the order of scores.json.

    rank: 1 for the second commonest answer.
    """
    name, _, part = cell.partition("/")
    task, right = name.partition("-")[0], []
    for _, its, question, answer in sorted(asked(name, size)):
        if its == part:
            right.append(blind.guess(task, question, rank) == answer)
    return np.array(right)


def unguessed(cell: str, size: int = 2000) -> np.ndarray:
    return ~guessed(cell, size)


@figure
def one_answer(cell: str, size: str = "500") -> str:
    """Partial credit in % of `best_answer` to every question of a cell."""
    given = best_answer(f"{cell.partition('-')[0]}-train")
    return f"{100 * credit(given, answers(cell, int(size))):.1f}"


@cache
def best_answer(name: str) -> str:
    """Of the first 200 answers of a set, the one with most partial credit on its first 300."""
    true = answers(name, 300)
    return max(true[:200], key=lambda given: credit(given, true))


def credit(given: str, true: list[str]) -> float:
    """Mean partial credit of giving one answer where these are true."""
    text = f"<answer> {given} </answer>"
    return statistics.fmean(rewards.function_score(text, answer) for answer in true)


def answers(name: str, size: int) -> list[str]:
    """Of each question of a set."""
    return [answer for *_, answer in asked(name, size)]


@cache
def asked(name: str, size: int) -> list[tuple[str, str, str, str]]:
    """(id, part, question, answer) of each question of a set."""
    return [(s.id, s.part, s.question, s.answer) for s in BlocksSet(name, size)]


@figure
def include(file: str) -> str:
    return (RESULTS / file).read_text().rstrip()


def render(text: str) -> str:
    """UserError for a place that cannot be filled."""

    def fill(place: re.Match) -> str:
        name, *words = place[1].split()
        try:
            return FIGURES[name](*words)
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise UserError(f"{place[0]}: {type(error).__name__} {error}") from None

    made = re.sub(r"\{\{(.+?)\}\}", fill, text)
    return f"<!-- made from page.md by python -m experiments.results_page -->\n{made}"


def run(argv: list[str]) -> str:
    Parser(
        prog="python -m experiments.results_page", description=__doc__.split("\n")[0]
    ).parse_args(argv)
    with storage.writing(RESULTS):
        (RESULTS / "README.md").write_text(render((RESULTS / "page.md").read_text()))
    return str(RESULTS / "README.md")


def main() -> None:
    console.command("experiments.results_page", run)


if __name__ == "__main__":
    main()
