"""The results of a sweep: tables and figures of the finished tasks, and their metrics."""

import json
import statistics
from pathlib import Path

from data.predictions import read_predictions
from evaluate import score_predictions
from experiments import paired, report, tables
from experiments.tasks import Task
from training import curves, storage

LAST = 10  # steps, over which diagnostics are averaged
DIAGNOSTICS = (
    "expert_share",
    "dead_groups",
    "equal_advantages",
    "negative",
    "kl",
    "ess_share",
    "weight_var",
)
KEPT = ("step", "states", "loss", "tokens", "kept_reward", "trained", *DIAGNOSTICS)


def summarise(kind: str, finished: list[Task], out: Path) -> None:
    """Writes the metrics of every run, and the table and figures of what is listed."""
    for task in finished:
        metrics = task.path / "metrics.jsonl"
        if metrics.exists() and kind != "rates":
            lines = [json.dumps(slim(record)) + "\n" for record in storage.read(metrics)]
            (out / f"{task.name}.jsonl").write_text("".join(lines))
    listed = [task for task in finished if task.listed]
    if kind in ("methods", "ablation"):
        paired.run([*(str(task.path) for task in listed), "--out", str(out)])
        histories = {task.name: curves.metrics(task.path / "metrics.jsonl") for task in listed}
        text = diagnostics(histories)
        with storage.writing(out):
            (out / "diagnostics.md").write_text(text)
        print(text)
    elif kind == "rates":
        rates(listed, out)
    elif kind == "table1":
        paths = [str(task.path) for task in listed]
        report.table_command([*paths, "--out", str(out / "table1")])
        report.figures_command([*paths, "--out", str(out)])
    else:
        report.table_command([*(str(task.path) for task in listed), "--out", str(out / kind)])


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
    rows = [["method", *columns]]
    for method, row in table.items():
        best, cells = max(row, key=row.get), []
        for rate in columns:
            text = f"{100 * row[rate]:.1f}" if rate in row else "-"
            cells.append(f"**{text}**" if rate == best else text)
        rows.append([method, *cells])
    text = tables.markdown(rows)
    with storage.writing(out):
        (out / "rates.json").write_text(json.dumps(table, indent=1) + "\n")
        (out / "rates.md").write_text(text)
    print(text)


def slim(record: dict) -> dict:
    """What tables and pictures are made of, in five digits: small enough to be committed."""
    names = {*curves.PANELS, *curves.DASHED.values(), *KEPT}
    kept = {}
    for key, value in record.items():
        if key in names or key.startswith(("share/", "eval/", "seconds/")):
            kept[key] = float(f"{value:.5g}") if isinstance(value, float) else value
    return kept


def diagnostics(histories: dict[str, list[dict]]) -> str:
    """A Markdown table: means over the last steps and the seeds of each RL method."""
    found: dict[str, dict[str, list[float]]] = {}
    for run, history in histories.items():
        last = [record for record in history if "expert_share" in record][-LAST:]
        for name in DIAGNOSTICS if last else ():
            values = [record.get(name) for record in last]
            row = found.setdefault(curves.method_of(run), {})
            row.setdefault(name, []).append(None if None in values else statistics.fmean(values))
    rows = [[f"last {LAST} steps", *DIAGNOSTICS]]
    for method, row in found.items():
        cells = []
        for values in row.values():
            cells.append("-" if None in values else f"{statistics.fmean(values):.3f}")
        rows.append([method, *cells])
    return tables.markdown(rows)
