"""How results are written: Markdown tables, and JSON with a line for each run."""

import json


def markdown(rows: list[list[str]]) -> str:
    """A Markdown table of rows of cells; the first row is the head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]) + "\n"


def json_of(runs: dict) -> str:
    """JSON of {run: values}, a line for each run."""
    lines = [f"{json.dumps(run)}: {json.dumps(values)}" for run, values in runs.items()]
    return "{\n" + ",\n".join(lines) + "\n}"


def json_by_set(sets: dict[str, dict]) -> str:
    """JSON of {set: {run: values}}, a line for each run."""
    parts = [f"{json.dumps(name)}: {json_of(runs)}" for name, runs in sets.items()]
    return "{\n" + ",\n".join(parts) + "\n}\n"
