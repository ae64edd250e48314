"""Table 1 and Figures 3 to 5 of the paper, from runs and their predictions.

    python -m experiments.report table runs/A-seed0 runs/A-seed1 runs/B --out table1
    python -m experiments.report figures runs/A-seed0 runs/B-seed0 --out figures

Runs whose names differ in "-seedN" only are one method: the table gives their mean and standard
deviation.
"""

import csv
import statistics
from pathlib import Path

from data.legacy import need_math_verify
from data.predictions import Prediction, read_predictions, with_parts
from data.state import SETS
from evaluate import LEGACY, right_samples, score_predictions
from experiments import figures
from training import console, curves
from training.console import Parser, UserError
from training.curves import method_of
from training.storage import writing

Columns = dict[str, dict[str, list[float]]]  # by method and column: one number for each seed
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
    lines = ["| method | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for method, found in methods.items():
        cells = [cell(found.get(column)) for column in columns]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    text = "\n".join([*lines, "", NOTE]) + "\n"
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


def counts(predictions: list[Prediction]) -> list[tuple[int, int]]:
    """For each question the number of samples and of right ones; none if one has no samples."""
    found = [(len(p.samples), right_samples(p)) for p in predictions]
    return found if all(n for n, _ in found) else []


def samples_of(run: Path) -> dict[str, list[tuple[int, int]]]:
    """`counts` of each set that a run has samples of."""
    directory = directory_of(run)
    if not list(directory.glob("*-*.jsonl")):
        return {}
    found = {name: counts(ps) for name, ps in read_predictions(directory).items()}
    return {name: numbers for name, numbers in found.items() if numbers}


def figures_command(argv: list[str]) -> None:
    parser = Parser(
        prog="python -m experiments.report figures",
        description="Figures 3 (data efficiency), 4 (sources of action) and 5 (Pass@k), "
        "and their numbers.",
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, help="runs; names that differ in -seedN only are one method"
    )
    parser.add_argument("--out", type=Path, required=True, help="directory of the figures")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    histories, samples = {}, {}
    for run in args.runs:
        if history := curves.metrics(run / "metrics.jsonl"):
            histories[run.name] = history
        if found := samples_of(run):
            samples[run.name] = found
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
