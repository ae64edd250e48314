"""The picture of the estimators: bias before and after selection, variance, ESS."""

from pathlib import Path

import matplotlib.pyplot as plt

from training import curves

COLORS = {"A": "tab:red", "B": "tab:blue", "C": "tab:green"}
NAMES = {"A": "A, uncorrected", "B": "B, importance weights: 0", "C": "C, self-normalised"}
STYLES = {
    "candidates": ("o-", "8 candidates"),
    "policy_first": ("s:", "4 kept, policy first"),
    "random": ("^--", "4 kept, ties random"),
}
WIDE = {"color": "lightgrey", "linewidth": 6}  # the line of Eq 10, behind the others
Stages = dict[str, list[dict]]  # the rows by stage


def draw(rows: list[dict], out: Path) -> None:
    """Six panels of the case with one expert."""
    rows = [row for row in rows if row["experts"] == 1]
    over_n = by_stage([row for row in rows if row["shift"] == 1.0])
    over_tv = by_stage([row for row in rows if row["N"] == 4])
    figure, axes = plt.subplots(2, 3, figsize=(15, 8), layout="constrained")
    before_selection(axes[0, 0], over_n["candidates"], "n", "AC")  # 0 has no place on a log axis
    after_selection(axes[1, 0], over_n, "n")
    before_selection(axes[0, 1], over_tv["candidates"], "tv_q", "ABC")
    bounds(axes[0, 1], over_tv["candidates"])
    after_selection(axes[1, 1], over_tv, "tv_q")
    variance(axes[0, 2], over_tv)
    effective_sample_size(axes[1, 2], over_tv)
    far, selected = "expert at its farthest", "selection of G = N"
    axes[0, 0].set(title=f"|bias| before selection ({far}; B: 0)", yscale="log")
    axes[0, 0].set(xlabel="candidates, n = 2N", xticks=[2, 4, 6, 8])
    axes[1, 0].set(title=f"|bias| after {selected} ({far})")
    axes[1, 0].set(xlabel="kept actions, n = G", xticks=[1, 2, 3, 4])
    axes[0, 1].set(title="|bias| before selection (N = 4)", ylim=(-0.02, 1.3))
    axes[1, 1].set(title=f"|bias| after {selected} (N = 4)")
    for axis in axes.flat:
        axis.set_xlabel(axis.get_xlabel() or "TV(q, pi_old)")
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=7, loc="center right")
    axes[0, 1].legend(fontsize=7, loc="upper right")
    axes[0, 2].legend(fontsize=7, loc="upper left")
    axes[1, 2].legend(fontsize=7, loc="lower left")
    curves.save(figure, out)


def by_stage(rows: list[dict]) -> Stages:
    stages: Stages = {stage: [] for stage in STYLES}
    for row in rows:
        stages[row["stage"]].append(row)
    return stages


def line(axis, rows: list[dict], x: str, y: str, style: str, **options) -> None:
    points = sorted((row[x], abs(row[y])) for row in rows)
    axis.plot(*zip(*points, strict=True), style, markersize=4, **options)


def before_selection(axis, rows: list[dict], x: str, estimators: str) -> None:
    line(axis, rows, x, "bound", "-", label="Eq 10", **WIDE)
    for name in estimators:
        line(axis, rows, x, f"bias_{name}", "o-", color=COLORS[name], label=NAMES[name])


def bounds(axis, rows: list[dict]) -> None:
    """How far Eq 10 and the bias could go."""
    uncentred, largest = (
        "Eq 10 with f = r, the reward itself",
        "the largest bias that any q can have",
    )
    line(axis, rows, "tv_q", "bound_uncentred", ":", color="grey", label=uncentred)
    line(axis, rows, "tv_q", "largest_bias", "-.", color="grey", label=largest)


def after_selection(axis, stages: Stages, x: str) -> None:
    first, random = stages["policy_first"], stages["random"]
    line(axis, first, x, "bound", "-", label="Eq 10, TV of the kept", **WIDE)
    estimated = "Eq 10, TV as training has it"
    line(axis, first, x, "bound_estimated", ":", color="black", label=estimated)
    line(axis, first, x, "bias_A", "o-", color=COLORS["A"], label="A, any ties")
    for name in "BC":
        color, y = COLORS[name], f"bias_{name}"
        line(axis, first, x, y, "o-", color=color, label=f"{name}, policy first")
        line(axis, random, x, y, "o--", color=color, label=f"{name}, ties random")
    axis.set_ylim(-0.02, 0.85)
    axis.legend(fontsize=7, ncol=2, loc="upper left")


def variance(axis, stages: Stages) -> None:
    for stage in ("candidates", "policy_first"):
        style, label = STYLES[stage]
        for name, color in COLORS.items():
            y = f"variance_{name}"
            line(axis, stages[stage], "tv_q", y, style, color=color, label=f"{name}, {label}")
    axis.set(title="variance (N = 4)", ylim=(0, 0.17))


def effective_sample_size(axis, stages: Stages) -> None:
    for stage, (style, label) in STYLES.items():
        color = "black" if stage == "candidates" else "tab:purple"
        line(axis, stages[stage], "tv_q", "ess_share", style, color=color, label=label)
    axis.set(title="expected ESS / n (N = 4)", ylim=(0, 1.05))
