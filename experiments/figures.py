"""Figures 3 to 5 of the paper, from the metrics of runs and their predictions.

Runs whose names differ in "-seedN" only are one method: figures show the mean over its seeds and,
behind it, each seed.
"""

import csv
import statistics
from pathlib import Path

import matplotlib.pyplot as plt

from evaluate import pass_at_k
from training.curves import method_of, save, shown, smooth, tests_of
from training.storage import writing

Curve = list[tuple[float, float]]
History = list[dict]  # a run's records


def by_method(runs: dict) -> dict[str, list]:
    """From one value for each run to a list of values, its seeds', for each method."""
    methods: dict[str, list] = {}
    for run, value in runs.items():
        methods.setdefault(method_of(run), []).append(value)
    return methods


def panels(count: int, width: float = 5):
    """A figure with `count` panels in a row, at least one, and its axes."""
    count = max(1, count)
    figure, axes = plt.subplots(
        1, count, figsize=(width * count, 4), layout="constrained", squeeze=False
    )
    return figure, axes[0]


def finish(figure, out: Path) -> None:
    """One legend for all panels, beside them, where it hides nothing; saves the figure."""
    entries = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries[label] = handle
    if entries:
        figure.legend(entries.values(), entries.keys(), loc="outside right upper", fontsize=8)
    save(figure, out)


def mean_curve(curves: list[Curve]) -> Curve:
    """Points (x, mean value) where every curve has one."""
    curves = [dict(curve) for curve in curves]
    means = []
    for x in sorted(set.intersection(*map(set, curves))):
        means.append((x, statistics.fmean(curve[x] for curve in curves)))
    return means


def plot_method(axis, method: str, curves: list[Curve]) -> Curve:
    """Draws the mean of a method's seeds and, paler, each of several. Returns the mean."""
    mean = mean_curve(curves)
    (line,) = axis.plot(*zip(*mean, strict=True), "o-", label=shown(method))
    for curve in curves if len(curves) > 1 else []:
        axis.plot(*zip(*curve, strict=True), color=line.get_color(), alpha=0.25, linewidth=1)
    return mean


def share_to_reach(curve: Curve, target: float) -> float | None:
    """The share of its states at the first point of a curve that is at `target` or above; None if
    none is. Measured: nothing is said of what lies between two points.
    """
    for x, y in curve:
        if y >= target:
            return x / curve[-1][0]
    return None


def expert_shares(seeds: list[History]) -> list[float]:
    """The experts' share of the kept actions in every step of a method; none for SFT."""
    shares = []
    for history in seeds:
        shares += [record["expert_share"] for record in history if "expert_share" in record]
    return shares


def data_efficiency(histories: dict[str, History], out: Path) -> str:
    """Figure 3: greedy accuracy on each test set against the states seen.

    Returns lines that say after which share of its states each method with experts reaches the end
    of each RL method without.
    """
    methods = by_method(histories)
    shares = {method: expert_shares(seeds) for method, seeds in methods.items()}
    alone = [method for method, found in shares.items() if found and not any(found)]
    helped = [method for method, found in shares.items() if any(found)]
    tests: dict[str, None] = {}  # in order; whole sets only
    for history in histories.values():
        tests |= dict.fromkeys(test for test in tests_of(history) if test.count("/") == 1)
    figure, axes = panels(len(tests))
    lines = []
    for axis, test in zip(axes, tests, strict=False):
        name, means = test.removeprefix("eval/"), {}
        for method, seeds in methods.items():
            curves = [accuracy_curve(history, test) for history in seeds]
            if curves := [curve for curve in curves if curve]:
                means[method] = plot_method(axis, method, curves)
        for base in [method for method in alone if method in means]:
            axis.axhline(means[base][-1][1], color="grey", linestyle=":", linewidth=1)
            for method in [method for method in means if method in helped]:
                lines.append(f"{name}: {comparison(method, base, means)}")
        axis.set(title=shown(name), xlabel="states seen", ylabel="greedy accuracy")
        axis.grid(alpha=0.3)
    finish(figure, out)
    return "\n".join(lines)


def accuracy_curve(history: History, test: str) -> Curve:
    return [(record["states"], record[test]) for record in history if test in record]


def comparison(method: str, base: str, means: dict[str, Curve]) -> str:
    target, curve = means[base][-1][1], means[method]
    share = share_to_reach(curve, target)
    reached = "never" if share is None else f"after {100 * share:.0f} % of its states"
    every = 100 * (curve[-1][0] - curve[-2][0]) / curve[-1][0] if len(curve) > 1 else 100
    end = f"the end of {base} ({100 * target:.1f} %)"
    return f"{method} reaches {end} {reached} (evaluated every {every:.0f} %)"


def sources(histories: dict[str, History], out: Path) -> None:
    """Figure 4: the sources of the kept actions, step by step, smoothed over five steps."""
    steps_of = {}
    for run, history in histories.items():
        if any(record.get("expert_share") for record in history):
            steps_of[run] = [record for record in history if "expert_share" in record]
    methods = by_method(steps_of)
    figure, axes = panels(len(methods), width=6)
    for axis, (method, seeds) in zip(axes, methods.items(), strict=False):
        steps = list(zip(*seeds))  # the records of each step, one a seed
        names: set[str] = set()
        for record in seeds[0]:
            names.update(key for key in record if key.startswith("share/"))
        names, shares = sorted(names), []  # one colour each, whatever the order of --experts
        for name in names:
            shares.append(smooth([mean_share(records, name) for records in steps]))
        policy = [1 - sum(at) for at in zip(*shares, strict=True)]
        labels = ["policy", *(shown(name.removeprefix("share/")) for name in names)]
        numbers = [first["step"] for first, *_ in steps]
        axis.stackplot(numbers, policy, *shares, labels=labels, alpha=0.85)
        axis.set(title=f"sources of the kept actions: {shown(method)}")
        axis.set(xlabel="step", ylabel="share", ylim=(0, 1))
    finish(figure, out)


UPDATES = {
    "equal_advantages": "groups whose kept advantages are all equal",
    "negative": "kept actions with a negative advantage",
    "kept_reward": "reward of the kept actions",
}


def updates(histories: dict[str, History], out: Path) -> None:
    """What an update is made of, step by step, means over seeds, smoothed over five steps.

    Where the kept advantages of a group are all equal, none of its actions is preferred to another;
    where none is negative, nothing is made less likely but by the others becoming likelier.
    """
    figure, axes = panels(len(UPDATES))
    for axis, (name, title) in zip(axes, UPDATES.items(), strict=True):
        curves = {}
        for run, history in histories.items():
            points = [(record["step"], record[name]) for record in history if name in record]
            if points:
                steps, values = zip(*points, strict=True)
                curves[run] = list(zip(steps, smooth(values), strict=True))
        for method, seeds in by_method(curves).items():
            axis.plot(*zip(*mean_curve(seeds), strict=True), label=shown(method))
        axis.set(title=title, xlabel="step", ylim=(0, None))
        axis.grid(alpha=0.3)
    finish(figure, out)


def mean_share(records: tuple[dict, ...], name: str) -> float:
    return statistics.fmean(record.get(name, 0.0) for record in records)


def pass_at(samples: dict[str, dict[str, tuple[int, list[int]]]], out: Path) -> None:
    """Figure 5: Pass@k of each method on each set, for k = 1, 2, 4, ...; the means also as CSV.

    samples: by set and run, how many samples a question has, and how many of each are right.
    """
    figure, axes = panels(len(samples))
    rows = [["method", "set", "k", "pass_at_k", "seeds"]]
    for axis, (test, runs) in zip(axes, samples.items(), strict=True):
        curves = {run: pass_curve(n, right) for run, (n, right) in runs.items()}
        for method, seeds in by_method(curves).items():
            for k, value in plot_method(axis, method, seeds):
                rows.append([method, test, k, f"{value:.4f}", len(seeds)])
        axis.set(title=shown(test), xlabel="k", ylabel="Pass@k")
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
    finish(figure, out)
    with writing(out), open(out.with_suffix(".csv"), "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def pass_curve(n: int, right: list[int]) -> Curve:
    """Mean Pass@k over the questions, each with n samples, for k = 1, 2, 4, ..., n."""
    curve = []
    for k in [2**i for i in range(20) if 2**i <= n]:
        curve.append((k, statistics.fmean(pass_at_k(n, c, k) for c in right)))
    return curve
