"""Table 1 and Figures 3 to 5 of the paper, from runs and their predictions.

    python -m experiments.report table runs/A-seed0 runs/A-seed1 runs/B --out table1
    python -m experiments.report figures runs/A-seed0 runs/B-seed0 --out figures

Runs whose names differ in "-seedN" only are one method: the table gives their mean and standard
deviation. A run's metrics.jsonl may stand for it, of which the file's name is the run's.

OUT/figure3.png    greedy accuracy against the states seen, figure3.txt says when the end of a
                   method without experts is reached
    figure4.png    the sources of the kept actions
    updates.png    what the updates are made of
    figure5.png    Pass@k, with figure5.csv; samples.json: {set: {run: [samples of each question,
                   [right ones]]}}, from which figure 5 is made again where no run has samples
"""

import csv
import json
import statistics
from dataclasses import replace
from pathlib import Path

from data.legacy import need_math_verify
from data.predictions import Prediction, read_predictions, with_parts
from data.state import SETS
from evaluate import LEGACY, right_samples, score_predictions
from experiments import figures, tables
from training import console, curves
from training.console import Parser, UserError
from training.curves import method_of
from training.storage import writing

Columns = dict[str, dict[str, list[float]]]  # by method and column: one number for each seed
# By set and run: how many samples a question has, and how many of each are right.
Samples = dict[str, dict[str, tuple[int, list[int]]]]
NOTE = (
    "Accuracy in %, mean ± standard deviation over seeds where there are several. AVG is the mean "
    "of the task's whole sets (the paper's follow three formulas: compare single columns)."
)


def by_method(results: dict[str, dict[str, float]]) -> Columns:
    """From results by run and set to results by method, with the mean of each task, "TASK AVG"."""
    table: Columns = {}
    for run, scores in results.items():
        scores = dict(scores)
        for task, names in SETS.items():
            if all(name in scores for name in names):
                scores[f"{task} AVG"] = statistics.fmean(scores[name] for name in names)
        columns = table.setdefault(method_of(run), {})
        for name, value in scores.items():
            columns.setdefault(name, []).append(value)
    return table


def table(results: dict[str, dict[str, float]], out: Path) -> str:
    """Table 1 as Markdown, returned and written to OUT.md, and as CSV to OUT.csv.

    results: accuracy in [0, 1] by run and test set, or "SET/PART", whose column follows its set's.
    """
    methods = by_method(results)
    present: set[str] = set()
    for found in methods.values():
        present |= found.keys()
    order = []
    for task, names in SETS.items():
        for name in names:
            order += [name, *sorted(part for part in present if part.startswith(f"{name}/"))]
        order.append(f"{task} AVG")
    columns = [name for name in order if name in present] + sorted(present - set(order))
    rows = [["method", *columns]]
    for method, found in methods.items():
        rows.append([method, *(cell(found.get(column)) for column in columns)])
    text = f"{tables.markdown(rows)}\n{NOTE}\n"
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        Path(f"{out}.md").write_text(text)
    write_csv(methods, Path(f"{out}.csv"))
    return text


def cell(values: list[float] | None) -> str:
    """Mean and, of several seeds, standard deviation, in percent."""
    if not values:
        return "-"
    text = f"{100 * statistics.fmean(values):.1f}"
    return text if len(values) == 1 else f"{text} ± {100 * statistics.stdev(values):.1f}"


def write_csv(methods: Columns, file: Path) -> None:
    rows = [("method", "set", "mean", "std", "seeds")]
    for method, found in methods.items():
        for column, values in found.items():
            deviation = f"{statistics.stdev(values):.5f}" if len(values) > 1 else ""
            mean = f"{statistics.fmean(values):.5f}"
            rows.append((method, column, mean, deviation, len(values)))
    with writing(file), open(file, "w", newline="") as opened:
        csv.writer(opened).writerows(rows)


def directory_of(run: Path) -> Path:
    """The predictions of a run; a directory of predictions may stand for it."""
    return run / "predictions" if (run / "predictions").is_dir() else run


def table_command(argv: list[str]) -> None:
    parser = Parser(
        prog="python -m experiments.report table",
        description="Table 1 from runs that were evaluated: OUT.md and OUT.csv.",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        help="runs, or directories of predictions; names that differ in -seedN only are one "
        "method, and equal names (of other tasks) one row",
    )
    parser.add_argument("--out", type=Path, required=True, help="where to write, without an ending")
    parser.add_argument("--legacy", action="store_true", help=LEGACY)
    args = parser.parse_args(argv)
    if args.legacy:
        need_math_verify()
    results: dict[str, dict[str, float]] = {}
    for run in args.runs:
        scores = results.setdefault(run.name, {})
        for name, predictions in with_parts(read_predictions(directory_of(run))).items():
            scores[name] = score_predictions(predictions, legacy=args.legacy)["accuracy"]
    print(table(results, args.out))


def counts(predictions: list[Prediction]) -> tuple[int, list[int]]:
    """How many samples every question has, and how many of each are right. More are left out."""
    n = min(len(p.samples) for p in predictions)
    right = []
    for prediction in predictions:
        first = replace(prediction, samples=prediction.samples[:n])
        right.append(right_samples(first))
    return n, right


def samples_of(runs: list[Path]) -> Samples:
    """`counts` of each set and run that has samples."""
    found: Samples = {}
    for run in runs:
        directory = directory_of(run)
        sets = read_predictions(directory) if list(directory.glob("*-*.jsonl")) else {}
        for name, predictions in sets.items():
            n, right = counts(predictions)
            if n:
                found.setdefault(name, {})[run.name] = (n, right)
    return found


def saved_samples(runs: list[Path], file: Path) -> Samples:
    """Those of the runs, saved; else those of the file, if there is one."""
    if found := samples_of(runs):
        with writing(file):
            file.write_text(tables.json_by_set(found))
    elif file.exists():
        found = json.loads(file.read_text())
    return found


def figures_command(argv: list[str]) -> None:
    parser = Parser(
        prog="python -m experiments.report figures",
        description="Figures 3 (data efficiency), 4 (sources of action) and 5 (Pass@k), "
        "and their numbers.",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        help="runs, or files of metrics; names that differ in -seedN only are one method",
    )
    parser.add_argument("--out", type=Path, required=True, help="directory of the figures")
    args = parser.parse_args(argv)
    with writing(args.out):
        args.out.mkdir(parents=True, exist_ok=True)
    histories = {}
    for run in args.runs:
        file = run if run.is_file() else run / "metrics.jsonl"
        if history := curves.metrics(file):
            histories[run.stem if run.is_file() else run.name] = history
    samples = saved_samples(args.runs, args.out / "samples.json")
    if not histories and not samples:
        raise UserError(
            "none of these is a run with metrics, or holds predictions with samples (--pass-k)"
        )
    if histories:
        efficiency = figures.data_efficiency(histories, args.out / "figure3.png")
        with writing(args.out):
            (args.out / "figure3.txt").write_text(efficiency + "\n")
        print(efficiency)
        figures.sources(histories, args.out / "figure4.png")
        figures.updates(histories, args.out / "updates.png")
    if samples:
        figures.pass_at(samples, args.out / "figure5.png")


COMMANDS = {"table": table_command, "figures": figures_command}


def run(argv: list[str]) -> None:
    if not argv or argv[0] not in COMMANDS:
        raise UserError(f"say what to make: {' or '.join(COMMANDS)} (each has --help)")
    COMMANDS[argv[0]](argv[1:])


def main() -> None:
    console.command("experiments.report", run)


if __name__ == "__main__":
    main()
