"""Pictures of runs, from their metrics.jsonl: what to look at while a policy learns.

    python -m training.curves runs/A                              # redraws runs/A/curves.png and runs/A/time.png, where a step's time goes
    python -m training.curves runs/A runs/B --out compare.png     # several runs in one picture; also metrics files themselves

Runs whose names differ in "-seedN" only share a colour.

reward, accuracy   rise; accuracy is of the policy's samples, and dots are greedy accuracy on the test sets
expert share       of the kept actions (Fig. 4): falls as the policy's own get better
dead groups        share of groups without any advantage, which teach nothing: if near 1, nothing is learnt. Dashed: share of groups
                   whose kept actions all have the same advantage, 0 or not, so that none is preferred to another
ESS                effective sample size of the importance weights, as a share of a state's kept actions, mean over states (A.3): how
                   far what is kept is from what the policy would have done
"""

import errno
import os
import re
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.lines import Line2D

from training import console, storage
from training.console import Parser, UserError

matplotlib.use("Agg")

PANELS = {
    "reward": ("reward of the policy's actions", "reward"),
    "accuracy": ("accuracy of its samples (dots: greedy, test sets)", "accuracy"),
    "expert_share": ("expert share of the kept actions (Fig. 4)", "expert share"),
    "dead_groups": ("dead groups (dashed: all advantages equal)", "share"),
    "ess_share": ("effective sample size (A.3)", "ESS / n"),
    "kl": ("KL to the reference", "nats per token"),
}
DASHED = {"dead_groups": "equal_advantages"}  # a second figure of a panel, which older runs lack


def method_of(name: str) -> str:
    return re.sub(r"-seed\d+$", "", name)


def shown(name: str) -> str:
    """A run's name as text of a picture, where $ is no mathematics, a leading _ hides nothing, and 200 letters leave room for curves."""
    name = name.encode(errors="replace").decode()
    name = name if len(name) <= 60 else f"{name[:40]} ... {name[-15:]}"
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def metrics(file: Path) -> list[dict]:
    """The records of a run's metrics.jsonl, of each what is a number."""
    found = []
    for record in storage.read(file):
        numbers = {key: value for key, value in record.items() if isinstance(value, int | float)}
        if "step" in numbers and "states" in numbers:
            found.append(numbers)
    return found


def save(figure, out: Path, dpi: int = 90) -> None:
    """As a picture of the kind that the name's ending says. UserError if it cannot be written."""
    try:
        with storage.writing(out):
            if out.is_dir():  # matplotlib would write a file beside it
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            figure.savefig(out, dpi=dpi)
    except ValueError as error:  # an ending that matplotlib does not know
        raise UserError(f"cannot draw {out}: {error}") from None
    finally:
        plt.close(figure)


def smooth(values: list[float], width: int = 5) -> list[float]:
    """Mean over the last `width` values."""
    return [
        sum(values[max(0, i - width + 1) : i + 1]) / len(values[max(0, i - width + 1) : i + 1])
        for i in range(len(values))
    ]


def draw(histories: dict[str, list[dict]], out: Path) -> None:
    """Draws the panels of each run (its name and its metrics) over the states seen, and saves them as PNG."""
    figure, axes = plt.subplots(2, 3, figsize=(14, 7), layout="constrained")
    methods = list(dict.fromkeys(method_of(name) for name in histories))
    colors = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    tests = dict.fromkeys(
        key
        for history in histories.values()
        for record in history
        for key in record
        if key.startswith("eval/")
    )
    sets = dict(zip(tests, "os^DvP*X", strict=False))  # the marker of each test set
    for axis, (key, (title, label)) in zip(axes.flat, PANELS.items(), strict=True):
        for name, history in histories.items():
            method = method_of(name)
            color = colors[methods.index(method) % len(colors)]
            for figure_of, style in ((key, "-"), (DASHED.get(key), "--")):
                points = [
                    (r["states"], r[figure_of]) for r in history if r.get(figure_of) is not None
                ]
                if points:
                    x, y = zip(*points, strict=True)
                    axis.plot(x, y, color=color, alpha=0.25, linewidth=1)
                    axis.plot(x, smooth(list(y)), style, color=color, linewidth=1.5)
            for test in sets if key == "accuracy" else ():
                tested = [record for record in history if test in record]
                axis.plot(
                    [record["states"] for record in tested],
                    [record[test] for record in tested],
                    sets[test],
                    color=color,
                    markersize=4,
                )
        axis.set(title=title, xlabel="states seen", ylabel=label)
        if key in ("expert_share", "dead_groups", "ess_share"):
            axis.set_ylim(-0.02, 1.02)
        if key == "kl":  # k3 jumps on expert actions while the policy's way of thinking changes
            axis.set_yscale("symlog", linthresh=1)
        axis.grid(alpha=0.3)
        if key == "accuracy" and sets:  # above the dots
            axis.set_ylim(-0.02, 1.05 + 0.075 * len(sets))
            dots = [
                Line2D(
                    [],
                    [],
                    color="grey",
                    marker=marker,
                    linestyle="",
                    markersize=4,
                    label=shown(test.removeprefix("eval/")),
                )
                for test, marker in sets.items()
            ]
            axis.legend(handles=dots, fontsize=7, loc="upper left")
    if len(methods) > 1:  # colours mean the same in all panels
        lines = [
            Line2D([], [], color=colors[i % len(colors)], label=shown(method))
            for i, method in enumerate(methods)
        ]
        figure.legend(handles=lines, loc="outside lower center", ncols=min(len(lines), 7))
    save(figure, out)


def draw_time(history: list[dict], out: Path) -> None:
    """Where the time of each step went (metrics.Stopwatch), evaluations left out, and the share of each phase in the whole, saved as PNG."""
    records = [record for record in history if "loss" in record]
    phases = list(
        dict.fromkeys(
            key
            for record in records
            for key in record
            if key.startswith("seconds/") and key != "seconds/evaluation"
        )
    )
    totals = {phase: sum(record.get(phase, 0.0) for record in records) for phase in phases}
    figure, axis = plt.subplots(figsize=(10, 5), layout="constrained")
    below = [0.0] * len(records)
    for i, phase in enumerate(sorted(phases, key=totals.get, reverse=True)):
        heights = [record.get(phase, 0.0) for record in records]
        share = 100 * totals[phase] / max(sum(totals.values()), 1e-9)
        axis.bar(
            [record["step"] for record in records],
            heights,
            1.0,
            below,
            label=f"{phase.removeprefix('seconds/')} {share:.1f} %",
            color=plt.cm.tab20(i % 20),
        )
        below = [low + height for low, height in zip(below, heights, strict=True)]
    axis.set(
        title="where a step's time goes, in the first process", xlabel="step", ylabel="seconds"
    )
    if phases:
        axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save(figure, out)


def draw_run(file: Path, name: str) -> None:
    """A run's own pictures, beside its metrics so far. Never ends the run: it is worth more than its pictures."""
    try:
        draw_both(file, name)
    except Exception as error:
        console.say(f"{name} goes on without its pictures: {error}")


def draw_both(file: Path, name: str) -> None:
    history = metrics(file)
    draw({name: history}, file.with_name("curves.png"))
    draw_time(history, file.with_name("time.png"))


def run(argv: list[str]) -> str:
    parser = Parser(prog="python -m training.curves", description="Draws the curves of runs.")
    parser.add_argument("runs", nargs="+", help="run directories, or metrics.jsonl files")
    parser.add_argument(
        "--out", help="where to save the picture (default: curves.png in the only run)"
    )
    args = parser.parse_args(argv)
    files = [path / "metrics.jsonl" if path.is_dir() else path for path in map(Path, args.runs)]
    for file in files:
        if not file.is_file() or not metrics(file):
            raise UserError(f"no metrics at {file}")
    if len(files) > 1 and not args.out:
        raise UserError("several runs in one picture need --out")
    names = [file.parent.name if file.name == "metrics.jsonl" else file.stem for file in files]
    names = [
        str(file.parent) if names.count(name) > 1 else name
        for name, file in zip(names, files, strict=True)
    ]
    if args.out:
        draw(dict(zip(names, map(metrics, files), strict=True)), Path(args.out))
        return args.out
    draw_both(files[0], names[0])
    return str(files[0].with_name("curves.png"))


def main() -> None:
    console.command("training.curves", run)


if __name__ == "__main__":
    main()
