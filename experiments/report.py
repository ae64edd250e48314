"""Table 1 and Figures 3 to 5 of the paper, from runs and their predictions. Used by evaluate.py; nothing here knows a model.

Runs whose names differ in "-seedN" only are one method: the table gives their mean and standard deviation, the figures their mean
and, behind it, each.
"""

import csv
import statistics
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

from data.predictions import read_predictions
from data.state import SETS
from evaluate import LEGACY, pass_at_k, right_samples, score_predictions
from rewards import need_math_verify
from training import console, curves, storage
from training.console import Parser, UserError
from training.curves import method_of, save, shown, smooth
from training.storage import writing

matplotlib.use("Agg")

Columns = dict[str, dict[str, list[float]]]  # by method and column: one number for each seed


def by_method(results: dict[str, dict[str, float]]) -> Columns:
    """From results by run and set to results by method, with AVG columns: "TASK AVG" is the plain mean of the task's test sets."""
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
    """Table 1 as Markdown, returned and written to OUT.md, and as CSV (mean, standard deviation, seeds) to OUT.csv.

    results: accuracy in [0, 1] by run and test set.
    """
    methods = by_method(results)
    order = [column for task, names in SETS.items() for column in (*names, f"{task} AVG")]
    present = {name for columns in methods.values() for name in columns}
    columns = [name for name in order if name in present] + sorted(present - set(order))

    def cell(values: list[float] | None) -> str:
        if not values:
            return "-"
        text = f"{100 * statistics.fmean(values):.1f}"
        return text if len(values) == 1 else f"{text} ± {100 * statistics.stdev(values):.1f}"

    lines = ["| method | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [
        f"| {method} | " + " | ".join(cell(found.get(column)) for column in columns) + " |"
        for method, found in methods.items()
    ]
    lines += [
        "",
        "Accuracy in %, mean ± standard deviation over seeds where there are several. AVG is the mean of the task's columns "
        "(the paper's follow three formulas: compare single columns).",
    ]
    text = "\n".join(lines) + "\n"
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        Path(f"{out}.md").write_text(text)
    with writing(out), open(f"{out}.csv", "w", newline="") as file:
        rows = [
            (
                method,
                column,
                f"{statistics.fmean(values):.5f}",
                f"{statistics.stdev(values):.5f}" if len(values) > 1 else "",
                len(values),
            )
            for method, found in methods.items()
            for column, values in found.items()
        ]
        csv.writer(file).writerows([("method", "set", "mean", "std", "seeds"), *rows])
    return text


# ---------------------------------------------------------------------------------------------- Figure 3


def mean_curve(curves: list[list[tuple[int, float]]]) -> list[tuple[int, float]]:
    """Points (states, mean value) where every curve has one."""
    shared = set.intersection(*(set(dict(curve)) for curve in curves))
    return [(x, statistics.fmean(dict(curve)[x] for curve in curves)) for x in sorted(shared)]


def legend(figure) -> None:
    """One for all panels, beside them, where it hides nothing."""
    entries = {
        label: handle
        for axis in figure.axes
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    if entries:
        figure.legend(entries.values(), entries.keys(), loc="outside right upper", fontsize=8)


def share_to_reach(curve: list[tuple[int, float]], target: float) -> float | None:
    """The share of its states after which a curve first is at `target`, straight lines between points; None if it never is."""
    end = curve[-1][0]
    for (x0, y0), (x1, y1) in zip(curve, curve[1:], strict=False):
        if y0 >= target:
            return x0 / end
        if y1 >= target:
            return (x0 + (x1 - x0) * (target - y0) / (y1 - y0)) / end
    return None


def data_efficiency(histories: dict[str, list[dict]], out: Path) -> str:
    """Figure 3: greedy accuracy on each test set against the states seen. Says after which share of them each method with experts
    reaches the end of the one without."""
    tests = list(
        dict.fromkeys(
            key
            for history in histories.values()
            for record in history
            for key in record
            if key.startswith("eval/")
        )
    )
    methods: dict[str, list[list[dict]]] = {}
    for run, history in histories.items():
        methods.setdefault(method_of(run), []).append(history)
    shares = {
        name: [r["expert_share"] for history in found for r in history if "expert_share" in r]
        for name, found in methods.items()
    }
    alone = [
        name for name, found in shares.items() if found and not any(found)
    ]  # GRPO; SFT has no groups
    helped = [name for name, found in shares.items() if any(found)]
    figure, axes = plt.subplots(
        1,
        max(1, len(tests)),
        figsize=(5 * max(1, len(tests)), 4),
        layout="constrained",
        squeeze=False,
    )
    said = []
    for axis, test in zip(axes[0], tests, strict=False):
        means = {}
        for method, found in methods.items():
            curves = [[(r["states"], r[test]) for r in history if test in r] for history in found]
            curves = [curve for curve in curves if curve]
            if not curves:
                continue
            means[method] = mean_curve(curves)
            (line,) = axis.plot(*zip(*means[method], strict=True), "o-", label=shown(method))
            for curve in curves if len(curves) > 1 else []:
                axis.plot(
                    *zip(*curve, strict=True), color=line.get_color(), alpha=0.25, linewidth=1
                )
        name = test.removeprefix("eval/")
        for base in (method for method in alone if method in means):
            target = means[base][-1][1]
            axis.axhline(target, color="grey", linestyle=":", linewidth=1)
            for method in (method for method in means if method in helped):
                share = share_to_reach(means[method], target)
                reached = (
                    f"after {100 * share:.0f} % of its states" if share is not None else "never"
                )
                said.append(
                    f"{name}: {method} reaches the end of {base} ({100 * target:.1f} %) {reached}"
                )
        axis.set(title=shown(name), xlabel="states seen", ylabel="greedy accuracy")
        axis.grid(alpha=0.3)
    legend(figure)
    save(figure, out)
    return "\n".join(said)


# ---------------------------------------------------------------------------------------------- Figures 4, 5


def sources(histories: dict[str, list[dict]], out: Path) -> None:
    """Figure 4: where the kept actions come from, step by step; the mean of a method's seeds, smoothed over five steps."""
    methods: dict[str, list[list[dict]]] = {}
    for run, history in histories.items():
        if any(r.get("expert_share") for r in history):
            methods.setdefault(method_of(run), []).append(
                [r for r in history if "expert_share" in r]
            )
    figure, axes = plt.subplots(
        1,
        max(1, len(methods)),
        figsize=(6 * max(1, len(methods)), 4),
        layout="constrained",
        squeeze=False,
    )
    for axis, (method, found) in zip(axes[0], methods.items(), strict=False):
        steps = range(min(map(len, found)))
        names = list(dict.fromkeys(key for r in found[0] for key in r if key.startswith("share/")))
        shares = {
            name: smooth(
                [statistics.fmean(history[i].get(name, 0.0) for history in found) for i in steps]
            )
            for name in names
        }
        own = [1 - sum(values[i] for values in shares.values()) for i in steps]
        labels = ["policy", *(shown(name.removeprefix("share/")) for name in names)]
        axis.stackplot(
            [found[0][i]["step"] for i in steps], own, *shares.values(), labels=labels, alpha=0.85
        )
        axis.set(
            title=f"sources of the kept actions: {shown(method)}",
            xlabel="step",
            ylabel="share",
            ylim=(0, 1),
        )
    legend(figure)
    save(figure, out)


def pass_at(samples: dict[str, dict[str, list[tuple[int, int]]]], estimate, out: Path) -> None:
    """Figure 5: Pass@k of each method on each set, for k = 1, 2, 4, ... samples; the means over seeds also as CSV beside it.

    samples: by run and set, for each question (samples, right ones). estimate: evaluate.pass_at_k.
    """
    tests = list(dict.fromkeys(name for sets in samples.values() for name in sets))
    figure, axes = plt.subplots(
        1, len(tests), figsize=(5 * len(tests), 4), layout="constrained", squeeze=False
    )
    rows = [["method", "set", "k", "pass_at_k", "seeds"]]
    for axis, test in zip(axes[0], tests, strict=True):
        methods: dict[str, list[list[tuple[int, float]]]] = {}
        for run, sets in samples.items():
            if questions := sets.get(test):
                ks = [2**i for i in range(20) if 2**i <= min(n for n, _ in questions)]
                curve = [(k, statistics.fmean(estimate(n, c, k) for n, c in questions)) for k in ks]
                methods.setdefault(method_of(run), []).append(curve)
        for method, found in methods.items():
            means = mean_curve(found)
            rows += [[method, test, k, f"{value:.4f}", len(found)] for k, value in means]
            (line,) = axis.plot(*zip(*means, strict=True), "o-", label=shown(method))
            for curve in found if len(found) > 1 else []:
                axis.plot(
                    *zip(*curve, strict=True), color=line.get_color(), alpha=0.25, linewidth=1
                )
        axis.set(title=shown(test), xlabel="k", ylabel="Pass@k")
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
    legend(figure)
    save(figure, out)
    with writing(out), open(out.with_suffix(".csv"), "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def table_command(argv: list[str]) -> None:
    parser = Parser(
        prog="python -m experiments.report table",
        description="Table 1 from runs that were evaluated: OUT.md and OUT.csv.",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        help="runs, or directories of predictions; names that differ in -seedN only are one method, and equal names (of other tasks) one row",
    )
    parser.add_argument("--out", type=Path, required=True, help="where to write, without an ending")
    parser.add_argument("--legacy", action="store_true", help=LEGACY)
    args = parser.parse_args(argv)
    if args.legacy:
        need_math_verify()
    results = {}
    for run in args.runs:
        directory = run / "predictions" if (run / "predictions").is_dir() else run
        scores = {
            name: score_predictions(ps, legacy=args.legacy)["accuracy"]
            for name, ps in read_predictions(directory).items()
        }
        results.setdefault(run.name, {}).update(scores)
    text = table(results, args.out)
    print(text)


def figures_command(argv: list[str]) -> None:
    parser = Parser(
        prog="python -m experiments.report figures",
        description="Figures 3 (data efficiency), 4 (sources of action) and 5 (Pass@k), and their numbers.",
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, help="runs; names that differ in -seedN only are one method"
    )
    parser.add_argument("--out", type=Path, required=True, help="directory of the figures")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    histories = {run.name: curves.metrics(run / "metrics.jsonl") for run in args.runs}
    histories = {name: history for name, history in histories.items() if history}
    samples = {}
    for run in args.runs:
        directory = run / "predictions" if (run / "predictions").is_dir() else run
        if list(directory.glob("*-*.jsonl")):
            found = {
                name: ps
                for name, ps in read_predictions(directory).items()
                if min(len(p.samples) for p in ps)
            }
            samples[run.name] = {
                name: [(len(p.samples), right_samples(p)) for p in ps] for name, ps in found.items()
            }
    if not histories and not any(samples.values()):
        raise UserError(
            "none of these is a run with metrics, or holds predictions with samples (--pass-k)"
        )
    if histories:
        efficiency = data_efficiency(histories, args.out / "figure3.png")
        with storage.writing(args.out):
            (args.out / "figure3.txt").write_text(efficiency + "\n")
        print(efficiency)
        sources(histories, args.out / "figure4.png")
    if any(samples.values()):
        pass_at(samples, pass_at_k, args.out / "figure5.png")


COMMANDS = {"table": table_command, "figures": figures_command}


def run(argv: list[str]) -> None:
    if not argv or argv[0] not in COMMANDS:
        raise UserError(f"say what to make: {' or '.join(COMMANDS)} (each has --help)")
    COMMANDS[argv[0]](argv[1:])


def main() -> None:
    console.command("experiments.report", run)


if __name__ == "__main__":
    main()
