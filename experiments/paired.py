"""Scores of every question, and the methods' differences on the same questions with intervals.

    python -m experiments.paired runs/sweep/blocks/*/ --out results    # from runs' predictions
    python -m experiments.paired --out results    # again, from scores.json and budgets.json

OUT/scores.json        {cell: {run: scores}}; a cell is a test set, or a part of one where it has
                       parts; scores are those of its questions, sorted by id as text: "0110..."
                       of right and wrong, or a list where there is partial credit
    kin.json           {cell: [group of each question]} where some questions are nearly the same
    budgets.json       {run: what it has used}, see budgets.py
    table.md           what each method has used; its mean over questions and seeds, with half the
                       width of its 95 % interval
    differences.md     less that of the method --of, paired by question

Runs whose names differ in "-seedN" only are one method. An interval is for other questions and
other seeds of this kind: the variance of the questions (in a difference of the same ones) and that
of each method's seeds are added, and Student's t has the degrees of freedom of the sum, which are
few where the seeds are few. A method with one seed has the questions' part only. Questions that are
nearly the same (blocks/dataset.py, `kin_of`) are one group: its deviations are added before they
are squared.
"""

import json
import math
from pathlib import Path

import numpy as np
from scipy.stats import t as student

from blocks.dataset import kin_of
from data.predictions import Prediction, read_predictions, with_parts
from experiments import budgets, tables
from experiments.budgets import Budget
from experiments.report import directory_of
from rewards import accuracy_score
from training import console, storage
from training.console import Parser, UserError, say
from training.curves import method_of

Scores = dict[str, dict[str, np.ndarray]]  # by cell and method: (seeds, questions)
Kin = dict[str, np.ndarray]  # by cell: (questions,), the group of each; none: all are of their own


def score_runs(runs: list[Path]) -> tuple[dict[str, dict[str, str | list[float]]], Kin]:
    """The scores of each question, as scores.json has them, and those that are nearly the same.

    UserError for different questions.
    """
    found, asked = {}, {}
    for run in runs:
        if not list(directory_of(run).glob("*-*.jsonl")):
            say(f"{run} has no predictions: left out")
            continue
        for name, predictions in read_predictions(directory_of(run)).items():
            for cell, answers in cells(name, predictions).items():
                ids = [p.id for p in answers]
                if asked.setdefault(cell, ids) != ids:
                    raise UserError(f"{run}: other questions of {cell} than in the runs before")
                scores = [accuracy_score(p.text, p.answer, p.kind) for p in answers]
                if answers[0].kind == "function":
                    kept = [round(score, 4) for score in scores]
                else:
                    kept = "".join(str(int(score)) for score in scores)
                if run.name in found.setdefault(cell, {}):
                    raise UserError(f"two runs have the name {run.name}")
                found[cell][run.name] = kept
    return found, {cell: groups for cell, ids in asked.items() if (groups := kin(ids)) is not None}


def kin(ids: list[str]) -> np.ndarray | None:
    """The group of each question, from 0; None if each is of its own."""
    names = [kin_of(id) for id in ids]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return np.array([numbers[name] for name in names]) if len(numbers) < len(ids) else None


def cells(name: str, predictions: list[Prediction]) -> dict[str, list[Prediction]]:
    """A set's parts, or the set as it is where it has none."""
    whole, *parts = with_parts({name: predictions}).items()
    return dict(parts or [whole])


def by_method(scores: dict[str, dict[str, str | list[float]]]) -> Scores:
    """(seeds, questions) of each cell and method, from scores.json's content."""
    table: Scores = {}
    for cell, runs in scores.items():
        rows: dict[str, list] = {}
        for run, values in runs.items():
            rows.setdefault(method_of(run), []).append([float(value) for value in values])
        table[cell] = {method: np.array(seeds) for method, seeds in rows.items()}
    return table


def interval(
    one: np.ndarray, other: np.ndarray | None = None, groups: np.ndarray | None = None
) -> tuple[float, float]:
    """The mean of `one` (seeds, questions), less that of `other`; half the width of its 95 %
    interval. groups: (questions,), of those that are nearly the same; None if none are.
    """
    apart = one.mean(axis=0) - (0.0 if other is None else other.mean(axis=0))  # (questions,)
    sums = apart - apart.mean() if groups is None else np.bincount(groups, apart - apart.mean())
    # Variances of the mean, and their degrees of freedom.
    parts = [((sums**2).sum() / len(apart) ** 2, len(sums) - 1)]
    for scores in (one, other):
        if scores is not None and len(scores) > 1:
            seeds, means = len(scores), scores.mean(axis=1)  # (seeds,)
            parts.append((means.var(ddof=1) / seeds, seeds - 1))
    value, variance = float(apart.mean()), sum(part for part, _ in parts)
    if not variance:
        return value, 0.0
    freedom = variance**2 / sum(part**2 / max(1, n) for part, n in parts)  # Welch-Satterthwaite
    return value, float(student.ppf(0.975, freedom)) * math.sqrt(variance)


def markdown(scores: Scores, used: dict[str, Budget], groups: Kin) -> str:
    """A table of all methods: seeds, what each has used, and scores in percent."""
    rows = [["method", "seeds", *budgets.COLUMNS.values(), *scores]]
    for method, seeds in methods_of(scores).items():
        runs = [budget for run, budget in used.items() if method_of(run) == method]
        row = [method, str(seeds), *budgets.told(runs)]
        for name, cell in scores.items():
            there = method in cell
            row.append(told(*interval(cell[method], None, groups.get(name)), "") if there else "-")
        rows.append(row)
    return tables.markdown(rows)


def differences(scores: Scores, of: str, groups: Kin) -> str:
    """A table of all methods less the method `of`, on the same questions, in points."""
    rows = [[f"less {of}", *scores]]
    for method in methods_of(scores):
        row = [method]
        for name, cell in scores.items():
            if method in cell and of in cell:
                row.append(told(*interval(cell[method], cell[of], groups.get(name)), "+"))
            else:
                row.append("-")
        if method != of:
            rows.append(row)
    return tables.markdown(rows)


def methods_of(scores: Scores) -> dict[str, int]:
    """The number of seeds of each method, in order."""
    methods: dict[str, int] = {}
    for cell in scores.values():
        methods |= {method: len(values) for method, values in cell.items()}
    return methods


def saved_kin(out: Path) -> Kin:
    """kin.json of a directory; nothing where there is none."""
    file = out / "kin.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    return {cell: np.array(numbers) for cell, numbers in found.items()}


def told(value: float, half: float, sign: str) -> str:
    return f"{100 * value:{sign}.1f} ± {100 * half:.1f}"


def run(argv: list[str]) -> None:
    parser = Parser(
        prog="python -m experiments.paired",
        description="Scores of every question, means and paired differences with intervals.",
    )
    parser.add_argument("runs", nargs="*", type=Path, help="evaluated runs (default: scores.json)")
    parser.add_argument("--out", type=Path, required=True, help="directory of scores and tables")
    parser.add_argument("--of", help="compared with (default: Vision-EKIPL, else the first)")
    args = parser.parse_args(argv)
    file, spent = args.out / "scores.json", args.out / "budgets.json"
    if args.runs:
        found, groups = score_runs(args.runs)
        trained = [run for run in args.runs if (run / "metrics.jsonl").exists()]
        used = {run.name: budgets.budget_of(run) for run in trained}
    elif file.exists():
        found = json.loads(file.read_text())
        used = json.loads(spent.read_text()) if spent.exists() else {}
        groups = saved_kin(args.out)
    else:
        raise UserError(f"there is no {file}: name the runs to score")
    scores = by_method(found)
    methods = methods_of(scores)
    args.of = args.of or ("Vision-EKIPL" if "Vision-EKIPL" in methods else next(iter(methods), ""))
    if args.of not in methods:
        raise UserError(f"--of {args.of}: there are {', '.join(methods) or 'no methods'}")
    table, less = markdown(scores, used, groups), differences(scores, args.of, groups)
    with storage.writing(args.out):
        args.out.mkdir(parents=True, exist_ok=True)
        file.write_text(tables.json_by_set(found))
        spent.write_text(tables.json_of(used) + "\n")
        (args.out / "kin.json").unlink(missing_ok=True)
        if groups:
            lists = {cell: numbers.tolist() for cell, numbers in groups.items()}
            (args.out / "kin.json").write_text(tables.json_of(lists) + "\n")
        (args.out / "table.md").write_text(table)
        (args.out / "differences.md").write_text(less)
    print(table)
    print(less)


def main() -> None:
    console.command("experiments.paired", run)


if __name__ == "__main__":
    main()
