"""The whole step of one_step.py on one page, with its real numbers: for slides.

python -m lessons.sheet --out DIR      # DIR/one_step.png and .svg, landscape A4
"""

import contextlib
import importlib
import io
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import grpo
from lessons import pictures
from training import console, storage

PANELS = [["state"] + ["group"] * 3, ["kept", "advantages", "loss", "loss"]]
PANELS += [["ratio", "ratio", "clip", "after"]]
STYLE = {"font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold", "svg.fonttype": "none"}
STYLE |= {"axes.titlelocation": "left", "legend.fontsize": 8, "svg.hashsalt": "one step"}


def table(axis, places: list[float], rows: list[list], colors: list, bold=()) -> None:
    """Rows of text at `places` across (negative: flush right); the first row has the heads."""
    axis.set_axis_off()
    for line, (row, color) in enumerate(zip(rows, ["0.45", *colors], strict=True)):
        weight = "bold" if line - 1 in bold else "normal"
        for x, text in zip(places, row, strict=True):
            side, y = "left" if x >= 0 else "right", 1 - (line + 0.5) / len(rows)
            style = dict(color=color, weight=weight, ha=side, va="center")
            axis.text(abs(x), y, text, transform=axis.transAxes, **style)


def short(action) -> str:
    """A response without its tags: thought, arrow, answer."""
    text = action.text.replace("<think> ", "").replace(" </think> <answer>", " →")
    return text.replace(" </answer>", "")


def candidates(walk, axis, state_axis) -> None:
    """The state; the total group with its rewards; which are kept."""
    group, n = walk.group, walk.config.num_samples
    pictures.state(state_axis, walk.state.images[0])
    tokens = f"{len(walk.words)} tokens, {walk.image_tokens} of them the picture"
    label = f"{walk.state.question}\nanswer: {walk.state.answer}\n{tokens}"
    state_axis.set(title="1  State (Section 3.1)", xlabel=label)
    rows = [["", "source", "thought → answer", "format", "accuracy", "R", "kept"]]
    for i, action in enumerate(group.actions):
        parts = (f"{part[i]:.0f}" for part in (group.format, group.accuracy, group.rewards))
        kept = f"✓ {group.kept.index(i) + 1}" if i in group.kept else ""
        rows.append([i, action.source, short(action), *parts, kept])
    colors = [pictures.COLORS[action.source] for action in group.actions]
    table(axis, [0, 0.03, 0.105, -0.81, -0.9, -0.94, 0.96], rows, colors, group.kept)
    axis.set_title(f"2  Total group: {n} of each source (Eq 4, 5, 6); rewards (Eq 7); top G")


def kept(walk, axis, advantages_axis, colors: list) -> None:
    """Weights and ESS; the advantages by both readings of Eq 1."""
    rows, G = [["", "source", "answer", "log π old", "w"]], len(colors)
    for g, action in enumerate(walk.group.kept_actions):
        logp, w = float(walk.old_logp[0, g].sum()), float(walk.weights[0, g])
        rows.append([g + 1, action.source, short(action).split()[-1], f"{logp:.2f}", f"{w:.3g}"])
    table(axis, [0, 0.07, -0.46, -0.7, -1], rows, colors)
    axis.set_title(f"3  Weights (Eq 8, 9): ESS {walk.ess:.2f} of {G}")
    for name, alpha, shift in (("candidates", 1.0, -0.2), ("selected", 0.4, 0.2)):
        values = walk.readings[name][0].tolist()
        places = [g + shift for g in range(1, G + 1)]
        bars = advantages_axis.barh(places, values, 0.4, color=colors, alpha=alpha)
        advantages_axis.bar_label(bars, [f"{value:+.2f}" for value in values], padding=2)
    advantages_axis.set(title="4  Advantages (Eq 1)", xlim=(-2.6, 2.6), yticks=range(1, G + 1))
    advantages_axis.set(ylim=(G + 0.5, 0.5), xlabel="by all M; pale: by the selected G")


def loss(walk, axis) -> None:
    """Loss and gradient norm by A, B and C."""
    rows = [["", "", "loss", "gradient", "loss", "gradient"]]
    names = {"A": "1/G Σ f", "B": "1/G Σ w f", "C": "Σ w f / Σ w"}
    for letter, formula in names.items():
        row = [letter, formula]
        for reading in ("candidates", "selected"):
            row += [f"{walk.losses[letter, reading]:+z.2f}", f"{walk.norms[letter, reading]:.2f}"]
        rows.append(row)
    rows.insert(0, ["", "−loss =", "", "by all M", "", "by the G"])
    note = f"f: Eq 3, mean over an action's tokens. Eq 10 for A, from these four: {walk.bound:.2f}"
    rows.append(["", note, "", "", "", ""])
    table(axis, [0, 0.06, -0.45, -0.64, -0.81, -1], rows, ["0.45", *["black"] * 4])
    axis.set_title("5  Loss and norm of its gradient (A.2, A.7)")


def after(walk, axes, colors: list) -> None:
    """Ratio, clip and KL after one step of AdamW, and what the question gets."""
    config, group = walk.config, walk.group
    pictures.ratios(axes["ratio"], walk.ratio, group, walk.policy.tokenizer, config.clip_eps)
    axes["ratio"].set_title(f"6  Ratio (Eq 2) after one step of AdamW, lr {config.lr:g}")
    sweep = torch.logspace(-1, 5, 200)
    for g, color in enumerate(colors):
        advantage, tokens = walk.advantages[0, g], len(group.kept_actions[g].tokens)
        for ratio, mark in ((sweep, "-"), (walk.ratio[g, :tokens], "o")):
            objective = grpo.clipped_objective(ratio, advantage, config.clip_eps)
            axes["clip"].plot(ratio, objective, mark, color=color, markersize=4)
    axes["clip"].set(xscale="log", xlabel="ratio", title="7  Clip (Eq 3): min(ρ A, clip(ρ) A)")
    axes["clip"].set(ylim=(-1.5, 2.5), xticks=[0.1, 1, 10, 1e3, 1e5])
    rows = [["", "log π", "", "clipped", "KL"]]
    for g in range(len(colors)):
        old, new = (float(logp[0, g].sum()) for logp in (walk.old_logp, walk.new_logp))
        clipped, kl = (float(walk.second[name][0, g]) for name in ("clip_fraction", "kl"))
        rows.append([g + 1, f"{old:.2f}", f"→ {new:.2f}", f"{clipped:.0%}", f"{kl:.3f}"])
    before, now = walk.right["before"], walk.right["after"]
    rows.append(["", f"right, of 64 samples: {before:.0f} → {now:.0f}", "", "", ""])
    table(axes["after"], [0, 0.08, -0.56, -0.8, -1], rows, [*colors, "black"])
    axes["after"].set_title("8  Afterwards: clip, KL (Eq 3)")


def draw(walk, out: Path) -> None:
    """out/one_step.png and .svg. walk: the module lessons.one_step, or its names."""
    colors = [pictures.COLORS[action.source] for action in walk.group.kept_actions]
    with plt.rc_context(STYLE):
        size = dict(width_ratios=[1.05, 0.95, 0.95, 1.05], height_ratios=[1.4, 0.9, 1])
        figure, axes = plt.subplot_mosaic(
            PANELS, figsize=(11.69, 8.27), layout="constrained", gridspec_kw=size
        )
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
        figure.suptitle(
            "One training step of Vision-EKIPL: a question, a group, an update", size=13
        )
        candidates(walk, axes["group"], axes["state"])
        kept(walk, axes["kept"], axes["advantages"], colors)
        loss(walk, axes["loss"])
        after(walk, axes, colors)
        for ending, metadata in (("png", {}), ("svg", {"Date": None})):  # the same every day
            with storage.writing(out):
                figure.savefig(out / f"one_step.{ending}", dpi=150, metadata=metadata)
        plt.close(figure)


def run(argv: list[str]) -> str:
    parser = console.Parser(prog="python -m lessons.sheet", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    out = parser.parse_args(argv).out
    with storage.writing(out):
        out.mkdir(parents=True, exist_ok=True)
    with contextlib.redirect_stdout(io.StringIO()):  # of the walk
        draw(importlib.import_module("lessons.one_step"), out)
    return f"{out}/one_step.png and .svg"


def main() -> None:
    console.command("lessons.sheet", run)


if __name__ == "__main__":
    main()
