"""TODO blocks.sheet"""

from pathlib import Path

import numpy as np

from blocks.dataset import BlocksSet
from data.state import SETS
from training import console, curves


def show(path: str, per_set: int = 3, zoom: int = 3) -> None:
    """Draws `per_set` questions of every set with answer and thought, and saves the sheet as PNG."""
    import textwrap

    import matplotlib.pyplot as plt

    names = [name for task, sets in SETS.items() for name in (f"{task}-train", *sets[1:])]
    figure, axes = plt.subplots(
        len(names), per_set, figsize=(5.2 * per_set, 3.9 * len(names)), squeeze=False
    )
    for row, name in zip(axes, names, strict=True):
        for i, axis in enumerate(row):
            state = BlocksSet(name, per_set)[i]
            pictures = [
                np.pad(np.asarray(image), ((0, 0), (0, 6), (0, 0)), constant_values=255)
                for image in state.images
            ]
            axis.imshow(np.concatenate(pictures, axis=1), interpolation="nearest")
            axis.set_axis_off()
            axis.set_title(f"{name}\n" + textwrap.fill(state.question, 62), fontsize=8, loc="left")
            text = (
                textwrap.fill(f"thought: {state.thought}", 66)
                + "\n"
                + textwrap.fill(f"answer: {state.answer}", 66)
            )
            axis.text(0, -0.04, text, transform=axis.transAxes, fontsize=7, va="top")
    figure.subplots_adjust(left=0.02, right=0.98, top=0.98, bottom=0.03, hspace=0.75, wspace=0.1)
    curves.save(figure, Path(path), dpi=25 * zoom)


def run(argv: list[str]) -> None:
    parser = console.Parser(
        prog="python -m blocks.sheet",
        description="The blocks world: draws a sheet of examples of every set.",
    )
    parser.add_argument("--show", metavar="OUT.png", required=True, help="where to save the sheet")
    show(parser.parse_args(argv).show)


def main() -> None:
    console.command("blocks.sheet", run)


if __name__ == "__main__":
    main()
