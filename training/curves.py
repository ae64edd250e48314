"""Pictures of runs, from their metrics.jsonl: what to look at while a policy learns.

    python -m training.curves runs/A                            # redraws its curves.png, time.png
    python -m training.curves runs/A runs/B --out compare.png   # several runs or metrics files

Runs whose names differ only in "-seedN" share a colour.

reward, accuracy   rise; of the policy's samples. Dots are greedy accuracy on the test sets, on
                   each part of a set that has parts
expert share       of the kept actions (Fig. 4): falls as the policy's own get better
dead groups        groups without any advantage, which teach nothing: near 1, nothing is learnt.
                   Dashed: groups whose kept actions all have the same advantage, 0 or not
ESS                effective sample size of the importance weights, as a share of a state's kept
                   actions, mean over states (A.3): how far they are from the policy's own
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
    """A run's name as text of a picture: short, with $ and a leading _ as themselves."""
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
    means = []
    for end in range(1, len(values) + 1):
        last = values[max(0, end - width) : end]
        means.append(sum(last) / len(last))
    return means


def colors_of(names) -> dict[str, str]:
    """The colour of each run, by name: runs of one method share it."""
    cycle = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    methods = list(dict.fromkeys(map(method_of, names)))
    return {name: cycle[methods.index(method_of(name)) % len(cycle)] for name in names}


def tests_of(history: list[dict]) -> list[str]:
    """What a run was evaluated on, in order: "eval/SET", and "eval/SET/PART" for parts of it."""
    tests: dict[str, None] = {}
    for record in history:
        tests |= dict.fromkeys(key for key in record if key.startswith("eval/"))
    return list(tests)


def dotted(history: list[dict]) -> list[str]:
    """Of these the sets without parts, and the parts in place of the other sets."""
    tests = tests_of(history)
    divided = {test.rpartition("/")[0] for test in tests}
    return [test for test in tests if test not in divided]


def markers_of(histories) -> dict[str, str]:
    """The marker of each test set, or part of one, that some run has dots for."""
    tests: dict[str, None] = {}
    for history in histories:
        tests |= dict.fromkeys(dotted(history))
    return dict(zip(tests, "os^DvP*X", strict=False))


def draw_curve(axis, history: list[dict], key: str, style: str, color: str) -> None:
    """A figure of one run over the states seen, and smoothed."""
    points = [(r["states"], r[key]) for r in history if r.get(key) is not None]
    if points:
        x, y = zip(*points, strict=True)
        axis.plot(x, y, color=color, alpha=0.25, linewidth=1)
        axis.plot(x, smooth(list(y)), style, color=color, linewidth=1.5)


def draw_dots(axis, histories: dict[str, list[dict]], colors: dict[str, str]) -> None:
    """Greedy accuracy on the test sets, and what their markers mean."""
    markers = markers_of(histories.values())
    for name, history in histories.items():
        own = dotted(history)
        for test, marker in markers.items():
            if test not in own:
                continue
            tested = [record for record in history if test in record]
            x, y = [record["states"] for record in tested], [record[test] for record in tested]
            axis.plot(x, y, marker, color=colors[name], markersize=4)
    if markers:
        axis.set_ylim(-0.02, 1.05 + 0.075 * len(markers))  # the legend stands above the dots
        look = dict(color="grey", linestyle="", markersize=4)
        dots = []
        for test, marker in markers.items():
            label = shown(test.removeprefix("eval/"))
            dots.append(Line2D([], [], marker=marker, label=label, **look))
        axis.legend(handles=dots, fontsize=7, loc="upper left")


def draw(histories: dict[str, list[dict]], out: Path) -> None:
    """The panels of each run, from its metrics by name, saved as PNG."""
    figure, axes = plt.subplots(2, 3, figsize=(14, 7), layout="constrained")
    colors = colors_of(histories)
    for axis, (key, (title, label)) in zip(axes.flat, PANELS.items(), strict=True):
        for name, history in histories.items():
            draw_curve(axis, history, key, "-", colors[name])
            if key in DASHED:
                draw_curve(axis, history, DASHED[key], "--", colors[name])
        axis.set(title=title, xlabel="states seen", ylabel=label)
        if key in ("expert_share", "dead_groups", "ess_share"):
            axis.set_ylim(-0.02, 1.02)
        if key == "kl":  # k3 jumps on expert actions while the policy's way of thinking changes
            axis.set_yscale("symlog", linthresh=1)
        if key == "accuracy":
            draw_dots(axis, histories, colors)
        axis.grid(alpha=0.3)
    methods = {method_of(name): color for name, color in colors.items()}
    if len(methods) > 1:  # colours mean the same in all panels
        lines = [Line2D([], [], color=c, label=shown(method)) for method, c in methods.items()]
        figure.legend(handles=lines, loc="outside lower center", ncols=min(len(lines), 7))
    save(figure, out)


def draw_time(history: list[dict], out: Path) -> None:
    """The time of each step by phase without evaluations, and each phase's share, saved as PNG."""
    records = [record for record in history if "loss" in record]
    totals: dict[str, float] = {}  # by phase
    for record in records:
        for key, seconds in record.items():
            if key.startswith("seconds/") and key != "seconds/evaluation":
                totals[key] = totals.get(key, 0.0) + seconds
    figure, axis = plt.subplots(figsize=(10, 5), layout="constrained")
    steps, below = [record["step"] for record in records], [0.0] * len(records)
    for i, phase in enumerate(sorted(totals, key=totals.get, reverse=True)):
        heights = [record.get(phase, 0.0) for record in records]
        share = 100 * totals[phase] / max(sum(totals.values()), 1e-9)
        label = f"{phase.removeprefix('seconds/')} {share:.1f} %"
        axis.bar(steps, heights, 1.0, below, label=label, color=plt.cm.tab20(i % 20))
        below = [low + height for low, height in zip(below, heights, strict=True)]
    axis.set(
        title="where a step's time goes, in the first process", xlabel="step", ylabel="seconds"
    )
    if totals:
        axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save(figure, out)


def draw_run(file: Path, name: str) -> None:
    """A run's own pictures, beside its metrics. An error is reported and does not end the run."""
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
