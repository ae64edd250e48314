"""A sheet of examples: pictures, questions, thoughts and answers.

python -m blocks.sheet --show sheet.png
python -m blocks.sheet --show scenes.png --sets counting-id,structure-id --per-set 1
"""

import math
import textwrap
from pathlib import Path

import numpy as np

from blocks.dataset import BlocksSet, BlocksState
from data.state import SETS
from training import console, curves
from training.console import UserError

COLUMNS = 3
NAMES = []  # without the -id sets, which look like the -train sets
for task, test_sets in SETS.items():
    NAMES += [f"{task}-train", *test_sets[1:]]


def show(path: str, names: list[str] = NAMES, per_set: int = 3, zoom: int = 3) -> None:
    """Draws the first `per_set` questions of each set, and saves the sheet as PNG."""
    import matplotlib.pyplot as plt

    rows = math.ceil(len(names) * per_set / COLUMNS)
    size = (5.2 * COLUMNS, 3.9 * rows)
    figure, axes = plt.subplots(rows, COLUMNS, figsize=size, squeeze=False)
    examples = []
    for name in names:
        examples += list(BlocksSet(name, per_set))
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, state in zip(axes.flat, examples, strict=False):
        draw(axis, state)
    top, bottom = 1 - 0.14 / rows, 0.21 / rows
    figure.subplots_adjust(left=0.02, right=0.98, top=top, bottom=bottom, hspace=0.75, wspace=0.1)
    curves.save(figure, Path(path), dpi=25 * zoom)


def draw(axis, state: BlocksState) -> None:
    """One question: its pictures side by side, the question above, thought and answer below."""
    gap = ((0, 0), (0, 6), (0, 0))
    pictures = [np.pad(np.asarray(image), gap, constant_values=255) for image in state.images]
    axis.imshow(np.concatenate(pictures, axis=1), interpolation="nearest")
    question = textwrap.fill(state.question, 62)
    axis.set_title(f"{state.set_name}\n{question}", fontsize=8, loc="left")
    lines = [f"thought: {state.thought}", f"answer: {state.answer}"]
    text = "\n".join(textwrap.fill(line, 66) for line in lines)
    axis.text(0, -0.04, text, transform=axis.transAxes, fontsize=7, va="top")


def run(argv: list[str]) -> None:
    parser = console.Parser(
        prog="python -m blocks.sheet",
        description="Draws a sheet of examples of the blocks world.",
    )
    parser.add_argument("--show", metavar="OUT.png", required=True, help="where to save the sheet")
    parser.add_argument("--sets", default=",".join(NAMES), help="of these sets (default: all)")
    parser.add_argument("--per-set", type=int, default=3, help="questions of each set")
    args = parser.parse_args(argv)
    try:
        show(args.show, args.sets.split(","), args.per_set)
    except ValueError as error:  # no such set
        raise UserError(str(error)) from None


def main() -> None:
    console.command("blocks.sheet", run)


if __name__ == "__main__":
    main()
