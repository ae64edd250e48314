"""The results of a sweep: tables and figures of the finished tasks, and their metrics."""

import json
import statistics
from pathlib import Path

from data.predictions import read_predictions, with_parts
from evaluate import score_predictions
from experiments import paired, report
from experiments.tasks import Task
from training import curves, storage

LAST = 10  # steps, over which the ablation's diagnostics are averaged
KEPT = ("step", "states", "loss", "tokens", "kept_reward", "negative", "trained")
DIAGNOSTICS = (
    "expert_share",
    "dead_groups",
    "kl",
    "ess_share",
    "weight_var",
    "weight_q95",
    "bias_bound",
)


def summarise(kind: str, finished: list[Task], out: Path) -> None:
    """Writes the metrics of every run, and the table and figures of what is listed."""
    for task in finished:
        metrics = task.path / "metrics.jsonl"
        if metrics.exists() and kind != "rates":
            lines = [json.dumps(slim(record)) + "\n" for record in storage.read(metrics)]
            (out / f"{task.name}.jsonl").write_text("".join(lines))
    listed = [task for task in finished if task.listed]
    if kind == "methods":
        paired.run([*(str(task.path) for task in listed), "--out", str(out)])
    elif kind == "rates":
        rates(listed, out)
    elif kind == "table1":
        paths = [str(task.path) for task in listed]
        report.table_command([*paths, "--out", str(out / "table1")])
        report.figures_command([*paths, "--out", str(out)])
    else:
        comparison(listed, out / f"{kind}.md")
        print((out / f"{kind}.md").read_text())


def rates(finished: list[Task], out: Path) -> None:
    """The validation accuracy of each method by its learning rate: rates.json and, in %, rates.md.

    The best one of a method is bold.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for task in finished:
        method, _, rate = curves.method_of(task.name).rpartition("-lr")
        scores = read_predictions(task.path / "predictions").values()
        (accuracy,) = [score_predictions(predictions)["accuracy"] for predictions in scores]
        found.setdefault(method, {}).setdefault(rate, []).append(accuracy)
    columns = sorted(set().union(*found.values()), key=float)
    table = {}
    for method, row in found.items():
        table[method] = {
            rate: round(statistics.fmean(row[rate]), 4) for rate in columns if rate in row
        }
    lines = ["| method | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for method, row in table.items():
        best, cells = max(row, key=row.get), []
        for rate in columns:
            text = f"{100 * row[rate]:.1f}" if rate in row else "-"
            cells.append(f"**{text}**" if rate == best else text)
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    with storage.writing(out):
        (out / "rates.json").write_text(json.dumps(table, indent=1) + "\n")
        (out / "rates.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def slim(record: dict) -> dict:
    """What tables and pictures are made of, in five digits: small enough to be committed."""
    names = {*curves.PANELS, *curves.DASHED.values(), *KEPT}
    kept = {}
    for key, value in record.items():
        if key in names or key.startswith(("share/", "eval/", "seconds/")):
            kept[key] = float(f"{value:.5g}") if isinstance(value, float) else value
    return kept


def comparison(finished: list[Task], out: Path) -> None:
    """A Markdown table, means over seeds: accuracy on test sets, diagnostics of the last steps."""
    found: dict[str, dict[str, list[float]]] = {}
    for task in finished:
        row = found.setdefault(curves.method_of(task.name), {})
        for name, value in figures_of(task).items():
            row.setdefault(name, []).append(value)
    columns = []
    for row in found.values():
        columns += [name for name in row if name not in columns]
    lines = ["| run | seeds | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for name, row in found.items():
        cells = [cell(column, row[column]) if column in row else "-" for column in columns]
        lines.append(f"| {name} | {max(map(len, row.values()))} | " + " | ".join(cells) + " |")
    note = "Accuracy on test sets in %; the other figures are means over the last"
    lines += ["", f"{note} {LAST} steps of training."]
    with storage.writing(out):
        out.write_text("\n".join(lines) + "\n")


def figures_of(task: Task) -> dict[str, float]:
    """A run's accuracy by test set and part, and the diagnostics that all its last records have."""
    predictions = with_parts(read_predictions(task.path / "predictions"))
    figures = {name: score_predictions(ps)["accuracy"] for name, ps in predictions.items()}
    history = curves.metrics(task.path / "metrics.jsonl")
    records = [record for record in history if "loss" in record][-LAST:]
    for name in DIAGNOSTICS:
        values = [record.get(name) for record in records]
        if values and None not in values:
            figures[name] = statistics.fmean(values)
    return figures


def cell(column: str, values: list[float]) -> str:
    """A test set's accuracy (its name has a dash) in percent, a diagnostic as it is."""
    mean = statistics.fmean(values)
    return f"{100 * mean:.1f}" if "-" in column else f"{mean:.3f}"
