"""Methods under several conditions in one figure, from the scores of experiments.paired.

    python -m experiments.conditions "1 %=results/base-1" "7 %=results/base-7"
        --methods GRPO,RFT,Vision-EKIPL --label "worked thoughts of the base" --out figure.png

A panel for each test set or part of one; bars are 95 % intervals over questions and seeds.
"""

import json
from pathlib import Path

from experiments.figures import finish, panels
from experiments.paired import Scores, by_method, interval
from training import console
from training.console import Parser, UserError
from training.curves import shown


def read(condition: str) -> tuple[str, Scores]:
    """A condition's label and scores. UserError unless it is LABEL=DIR with a DIR/scores.json."""
    label, sign, directory = condition.rpartition("=")
    if not sign:
        raise UserError(f"{condition}: a condition is LABEL=DIR")
    try:
        return label, by_method(json.loads((Path(directory) / "scores.json").read_text()))
    except (OSError, ValueError, AttributeError, TypeError) as error:
        hint = "python -m experiments.paired makes it"
        raise UserError(f"{directory} has no scores.json to read ({error}): {hint}") from None


def draw(conditions: dict[str, Scores], methods: list[str], label: str, out: Path) -> None:
    """Saves the figure. A method that a condition lacks has no point there."""
    cells: dict[str, None] = {}  # in order
    for scores in conditions.values():
        cells |= dict.fromkeys(scores)
    figure, axes = panels(len(cells), width=4)
    for axis, cell in zip(axes, cells, strict=True):
        for i, method in enumerate(methods):
            places, values, halves = [], [], []
            for place, scores in enumerate(conditions.values()):
                if method in scores.get(cell, {}):
                    value, half = interval(scores[cell][method])
                    places.append(place + 0.04 * (i - len(methods) / 2))  # bars side by side
                    values.append(100 * value)
                    halves.append(100 * half)
            axis.errorbar(places, values, halves, fmt="o-", capsize=2, label=shown(method))
        axis.set(title=shown(cell), xlabel=shown(label), ylabel="greedy accuracy, %")
        axis.set_xticks(range(len(conditions)), map(shown, conditions))
        axis.set_ylim(0, 100)
        axis.grid(alpha=0.3)
    finish(figure, out)


def run(argv: list[str]) -> str:
    parser = Parser(
        prog="python -m experiments.conditions", description="Methods under several conditions."
    )
    add = parser.add_argument
    add("conditions", nargs="+", metavar="LABEL=DIR", help="directories with a scores.json each")
    add("--methods", required=True, metavar="NAME,NAME", help="whose scores are drawn")
    add("--label", default="", help="what the conditions are, under the figure")
    add("--out", type=Path, required=True, help="the picture")
    args = parser.parse_args(argv)
    conditions, methods = dict(map(read, args.conditions)), args.methods.split(",")
    known: set[str] = set()
    for scores in conditions.values():
        known = known.union(*scores.values())
    if unknown := set(methods) - known:
        raise UserError(f"no scores of {min(unknown)}; there are {', '.join(sorted(known))}")
    draw(conditions, methods, args.label, args.out)
    return str(args.out)


def main() -> None:
    console.command("experiments.conditions", run)


if __name__ == "__main__":
    main()
